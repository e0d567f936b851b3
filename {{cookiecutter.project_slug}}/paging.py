"""Pages of tasks by keyset: one costs the same at the beginning of a list and at its end.

A cursor says behind which task the next page begins, by the value that the list is sorted by, and
by the id, which settles ties. It is signed, so that only one of ours ever reaches a query.
"""

import hashlib
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from itsdangerous import BadData, URLSafeSerializer
from pydantic import SecretStr
from sqlalchemy import (
    Integer,
    RowMapping,
    Select,
    SQLColumnExpression,
    String,
    Uuid,
    cast,
    func,
    literal,
    tuple_,
)
from sqlalchemy.types import TypeEngine
from sqlmodel import col

from models import PRIORITY, TIMESTAMP, Task

FOREVER = "infinity"  # where tasks without a date stand, in PostgreSQL's words
LAST = 2**31 - 1  # and those without an order


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


# What each order compares, beside the id, and its type. Ids grow with time: alone, they sort by it.
KEYS: dict[str, tuple[tuple[SQLColumnExpression[Any], TypeEngine[Any]], ...]] = {
    "created_at": (),
    "due_at": ((func.coalesce(col(Task.due_at), cast(literal(FOREVER), TIMESTAMP)), TIMESTAMP),),
    "order": ((func.coalesce(col(Task.order), LAST), Integer()),),
    "priority": ((col(Task.priority), PRIORITY),),
}
ID = (col(Task.id), Uuid())


def key_of(task: RowMapping, sort: Sort) -> list[str]:
    """Return what a cursor keeps of a task, as text."""
    match sort.field:
        case "due_at":
            due_at: datetime | None = task["due_at"]
            return [due_at.isoformat() if due_at else FOREVER, str(task["id"])]
        case "order":
            return [str(LAST if task["order"] is None else task["order"]), str(task["id"])]
        case "priority":
            return [str(task["priority"]), str(task["id"])]
        case _:
            return [str(task["id"])]


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
