"""Creates tasks, each in one statement that also checks the owner's account and quota.

An access token outlives its account by some minutes. Without the check, it could create tasks
without an owner.
"""

import math
import time
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import UUID

from fastapi import HTTPException, Request, status
from sqlalchemy import (
    CTE,
    ColumnElement,
    Integer,
    Select,
    String,
    Text,
    Uuid,
    bindparam,
    cast,
    exists,
    func,
    literal,
    outerjoin,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlmodel import col

from auth import account_id, no_account
from db import USE_SECONDS, CompiledStatement, OneStatement, Row
from errors import found, not_found
from models import Task, User, later_than
from pagination import UserLimit
from resources import resources
from routes.preconditions import Preconditions, not_excluded
from schemas.tasks import TaskCreate, TaskPublic

FIELDS = tuple(TaskCreate.model_fields)  # what a client sets
COUNTED_SECONDS = 60.0
MAX_OWNERS = 10_000  # whose room a process remembers: some megabytes
NEVER_REPLACE = Preconditions(must_exist=False, match=None, none_match=None)

# The columns that a client sees: the id of the owner is left out. The id of the task is text, as in
# URLs, because making a UUID of it would take longer than all the rest.
COLUMNS = [
    cast(col(Task.id), Text).label("id"),
    *(col(getattr(Task, name)) for name in TaskPublic.model_fields if name not in {"id", "url"}),
]
IS_OWN = col(Task.owner_id) == bindparam("owner")


def insert_task(account: CTE, condition: ColumnElement[bool]) -> Insert:
    values = select(
        bindparam("task_id", type_=Uuid),
        bindparam("owner", type_=String),
        *(bindparam(name, type_=getattr(Task, name).type) for name in FIELDS),
    )
    values = values.select_from(account).where(condition)
    return insert(Task).from_select(["id", "owner_id", *FIELDS], values, include_defaults=False)


def put_task(account: CTE, *, counts: bool) -> Select[Any]:
    """Insert a task, or replace the owner's own. Always returns one row.

    If it did neither, COLUMNS are NULL, and the other columns say why. has_account: whether the
    owner has an account. is_own: whether the task with this id is the owner's, or NULL if there is
    no such task. tasks: how many the owner has.
    """
    same_id = select(IS_OWN).where(col(Task.id) == bindparam("task_id"))
    with_this_id = same_id.scalar_subquery()
    most = bindparam("most", type_=Integer)
    up_to_most = select(literal(1)).where(IS_OWN).limit(most).subquery()
    used = select(func.count().label("tasks")).select_from(up_to_most).cte("used")
    number = select(used.c.tasks).scalar_subquery()

    new = insert_task(account, (number < most) | with_this_id if counts else true())
    put = new.on_conflict_do_update(
        index_elements=[col(Task.id)],
        set_={name: new.excluded[name] for name in FIELDS}
        | {"updated_at": later_than("tasks.updated_at")},
        where=IS_OWN & not_excluded(col(Task.updated_at)),
    )
    done = put.returning(*COLUMNS).cte("done")
    columns: list[ColumnElement[Any]] = [
        exists().select_from(account).label("has_account"),
        with_this_id.label("is_own"),
    ]
    if counts:
        columns.append(number.label("tasks"))
    one_row = select(literal(1)).subquery("one_row")
    return select(*done.c, *columns).select_from(outerjoin(one_row, done, true()))


class Statements:
    """The statements that create tasks. account: a row if the owner has an account, else none."""

    def __init__(self, account: Select[Any]) -> None:
        owner = account.cte("account")
        self.create = CompiledStatement(insert_task(owner, true()).returning(*COLUMNS))
        self.put = CompiledStatement(put_task(owner, counts=False))
        self.put_counting = CompiledStatement(put_task(owner, counts=True))


# Accounts of ours: the row is locked, so that it cannot be deleted until the task is there. If a
# deletion has begun, the statement waits for it, and finds no account.
FOR_OWN_ACCOUNTS = Statements(
    select(col(User.id))
    .where(col(User.id) == bindparam("account"))
    .with_for_update(read=True, key_share=True)
)
# Accounts of a Better Auth server are not in this database: anyone with a token has one.
FOR_ANYBODY = Statements(select(literal(1).label("id")))


class Quota:
    """The most tasks that an owner may have, and how many they may create before the next count.

    Counting the tasks of a full account takes as long as creating several. So a process counts
    again only when the owner has used a tenth of the room that the last count found, or after a
    minute. Only one count of an owner runs at a time, so a full account occupies one connection:
    a client that creates many tasks at once waits for the first count.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._room: dict[str, tuple[int, float]] = {}  # by owner: how many, and until when
        self._counts = UserLimit(at_once=1, waiting=math.inf, wait_seconds=USE_SECONDS)

    def must_count(self, owner_id: str) -> bool:
        """Return whether the owner's next task needs a count. If not, use some of their room."""
        if not self.most:
            return False
        room, until = self._room.get(owner_id, (0, 0.0))
        if room <= 0 or time.monotonic() > until:
            return True
        self._room[owner_id] = room - 1, until
        return False

    def turn(self, owner_id: str) -> AbstractAsyncContextManager[None]:
        """Wait until nobody else counts the owner's tasks. Raises HTTPException, 429."""
        return self._counts.turn(owner_id)

    def counted(self, owner_id: str, tasks: int) -> None:
        if len(self._room) >= MAX_OWNERS:
            self._room.clear()
        self._room[owner_id] = (self.most - tasks) // 10, time.monotonic() + COUNTED_SECONDS

    def check(self, tasks: int) -> None:
        """Raise HTTPException, 409, if an owner of so many tasks may have no more."""
        if tasks >= self.most:
            detail = f"you have {self.most} tasks, and more are not allowed: delete some first"
            raise HTTPException(status.HTTP_409_CONFLICT, detail)


class NewTask:
    """A task that a client wants to create, or to replace. The methods raise HTTPException."""

    def __init__(self, request: Request, owner_id: str, task_id: UUID, body: TaskCreate) -> None:
        self._quota = resources(request).quota
        self._owner_id = owner_id
        self._values = {"task_id": task_id, "owner": owner_id, **body.model_dump()}
        self._statements = FOR_ANYBODY
        if resources(request).settings.better_auth_url is None:
            self._statements = FOR_OWN_ACCOUNTS
            self._values["account"] = account_id(owner_id)

    async def create(self, statement: OneStatement) -> Row:
        """Return COLUMNS of the new task, whose id is new, too."""
        if row := await self._put_if_to_count(statement, NEVER_REPLACE):
            return row
        row = await statement.first(self._statements.create, **self._values)
        if row is None:
            raise no_account()
        return row

    async def put(self, statement: OneStatement, conditions: Preconditions) -> Row:
        """Return COLUMNS of the task, which is new if it has not changed since its creation."""
        if row := await self._put_if_to_count(statement, conditions):
            return row
        return await self._put(statement, conditions, counts=False)

    async def _put_if_to_count(
        self, statement: OneStatement, conditions: Preconditions
    ) -> Row | None:
        """Put the task if the owner's tasks must be counted. Otherwise, return None."""
        if self._quota.must_count(self._owner_id):
            async with self._quota.turn(self._owner_id):
                if self._quota.must_count(self._owner_id):  # nobody else has counted meanwhile
                    return await self._put(statement, conditions, counts=True)
        return None

    async def _put(
        self, statement: OneStatement, conditions: Preconditions, *, counts: bool
    ) -> Row:
        values = self._values | conditions.parameters
        if counts:
            values["most"] = self._quota.most
        put = self._statements.put_counting if counts else self._statements.put
        row = found(await statement.first(put, **values), "task")
        has_account, is_own, tasks = row.pop("has_account"), row.pop("is_own"), row.pop("tasks", 0)
        if counts:
            self._quota.counted(self._owner_id, tasks)
        if row["id"] is not None:
            return row
        if not has_account:
            raise no_account()
        if counts and is_own is None:
            self._quota.check(tasks)
        if is_own is False or conditions.none_match == []:
            raise not_found("task")  # it is another owner's
        detail = "there is a task with this id already: read it"
        raise HTTPException(status.HTTP_412_PRECONDITION_FAILED, detail)
