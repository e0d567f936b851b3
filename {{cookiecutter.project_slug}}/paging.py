"""Pages of tasks by keyset: one costs the same at the beginning of a list and at its end.

A cursor says behind which task the next page begins, by the value that the list is sorted by, and
by the id, which settles ties. It is signed, so that only one of ours ever reaches a query.
"""

import hashlib
from enum import StrEnum
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from itsdangerous import BadData, URLSafeSerializer
from pydantic import SecretStr
from sqlalchemy import (
    ColumnElement,
    Integer,
    RowMapping,
    Select,
    SQLColumnExpression,
    String,
    Uuid,
    cast,
    func,
    literal,
    literal_column,
    tuple_,
)
from sqlalchemy.types import TypeEngine
from sqlmodel import col

from models import FOREVER, LAST, PRIORITY, TIMESTAMP, Task


class Sort(StrEnum):
    """What tasks are sorted by. "-" turns it round; those without a date or an order come last,
    and then first."""

    CREATED = "created_at"
    NEWEST = "-created_at"
    DUE = "due_at"
    LATEST_DUE = "-due_at"
    ORDER = "order"
    REVERSED = "-order"
    PRIORITY = "priority"
    URGENT = "-priority"

    @property
    def field(self) -> str:
        return self.removeprefix("-")

    @property
    def descending(self) -> bool:
        return self.startswith("-")


# As the indexes spell them: an expression is found in an index only if it is the same.
NEVER_DUE: ColumnElement[Any] = literal_column(FOREVER)
effective_due = func.coalesce(col(Task.due_at), NEVER_DUE)
effective_order = func.coalesce(col(Task.order), literal_column(str(LAST)))

CREATED_AT = (col(Task.created_at), TIMESTAMP)
# What each order compares, before the id, and its type. That creation is told by a column of its
# own keeps PostgreSQL from walking the primary key through everybody's tasks.
KEYS: dict[str, tuple[tuple[SQLColumnExpression[Any], TypeEngine[Any]], ...]] = {
    "created_at": (CREATED_AT,),
    "due_at": ((effective_due, TIMESTAMP),),
    "order": ((effective_order, Integer()),),
    "priority": ((col(Task.priority), PRIORITY), CREATED_AT),
}
ID = (col(Task.id), Uuid())


def key_of(task: RowMapping, sort: Sort) -> list[str]:
    """Return what a cursor keeps of a task, as text: the values of KEYS, and the id."""
    match sort.field:
        case "due_at":
            key = [task["due_at"].isoformat() if task["due_at"] else "infinity"]
        case "order":
            key = [str(LAST if task["order"] is None else task["order"])]
        case "priority":
            key = [str(task["priority"]), task["created_at"].isoformat()]
        case _:
            key = [task["created_at"].isoformat()]
    return [*key, str(task["id"])]


class Cursors:
    """Writes and reads cursors, which hold for the life of the secret they are signed with."""

    def __init__(self, secret: SecretStr) -> None:
        self._serializer = URLSafeSerializer(
            secret.get_secret_value(),
            salt="cursor",
            signer_kwargs={"digest_method": hashlib.sha256},
        )

    def write(self, task: RowMapping, sort: Sort) -> str:
        """Return the cursor of the page behind a task."""
        return str(self._serializer.dumps([sort, *key_of(task, sort)]))

    def read(self, cursor: str, sort: Sort) -> list[str]:
        """Return what the list's columns are compared with. Raises RequestValidationError."""
        try:
            parts: list[str] = self._serializer.loads(cursor)
        except BadData:
            raise invalid_cursor("is not one of ours: take it from a Link header") from None
        if parts[0] != sort:
            raise invalid_cursor(f"belongs to another order: sort={parts[0]}")
        return parts[1:]


def invalid_cursor(reason: str) -> RequestValidationError:
    return RequestValidationError(
        [{"type": "cursor", "loc": ("query", "cursor"), "msg": f"The cursor {reason}"}]
    )


def sorted_page(tasks: Select[Any], sort: Sort, after: list[str] | None, limit: int) -> Select[Any]:
    """Sort tasks, and cut out the page that begins behind `after`, the values of a cursor."""
    columns = (*KEYS[sort.field], ID)
    tasks = tasks.order_by(*(c.desc() if sort.descending else c.asc() for c, _ in columns))
    if after is not None:
        row = tuple_(*(column for column, _ in columns))
        values = zip(after, columns, strict=True)
        last = tuple_(*(cast(literal(value, String), kind) for value, (_, kind) in values))
        tasks = tasks.where(row < last if sort.descending else row > last)
    return tasks.limit(limit)


async def get_cursors(request: Request) -> Cursors:
    cursors: Cursors = request.app.state.cursors
    return cursors


CursorsDep = Annotated[Cursors, Depends(get_cursors)]
