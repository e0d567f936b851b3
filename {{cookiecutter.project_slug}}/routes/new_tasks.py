"""Creating tasks, each in one statement that also asks whether its owner has an account.

An access token outlives its account by some minutes: the tasks that it created would be nobody's.
"""

from typing import Any
from uuid import UUID

from fastapi import HTTPException, Request, status
from sqlalchemy import (
    CTE,
    Select,
    String,
    Text,
    Uuid,
    bindparam,
    cast,
    exists,
    literal,
    outerjoin,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlmodel import col

from auth import unauthorized
from db import CompiledStatement, OneStatement, Row
from errors import found
from models import LATER, Task, User
from resources import resources
from routes.preconditions import Preconditions, not_excluded
from schemas.tasks import TaskCreate, TaskPublic

FIELDS = tuple(TaskCreate.model_fields)  # what a client sets

# The columns that a client sees, named: an owner's id is not sent back for each of his tasks. The
# id comes as text, as it stands in addresses: to make a UUID of it would take longer than the rest.
COLUMNS = [
    cast(col(Task.id), Text).label("id"),
    *(col(getattr(Task, name)) for name in TaskPublic.model_fields if name not in {"id", "url"}),
]


def account() -> CTE:
    """Find the owner's account, and lock it: it cannot be deleted until the task is there.

    If a deletion has begun, this waits for it, and finds no account.
    """
    own = select(col(User.id)).where(col(User.id) == bindparam("account"))
    return own.with_for_update(read=True, key_share=True).cte("account")


def insert_task(*sources: CTE) -> Insert:
    """Insert a task for each row of the sources: none without an account."""
    values = select(
        bindparam("task_id", type_=Uuid),
        bindparam("owner", type_=String),
        *(bindparam(name, type_=getattr(Task, name).type) for name in FIELDS),
    ).select_from(*sources)
    return insert(Task).from_select(["id", "owner_id", *FIELDS], values, include_defaults=False)


def put_task(*sources: CTE) -> Select[Any]:
    """Insert a task, or replace the owner's own. If it did neither, the last columns tell why."""
    new = insert_task(*sources)
    is_own = col(Task.owner_id) == bindparam("owner")
    put = new.on_conflict_do_update(
        index_elements=[col(Task.id)],
        set_={name: new.excluded[name] for name in FIELDS} | {"updated_at": LATER},
        where=is_own & not_excluded(col(Task.updated_at)),
    )
    done = put.returning(*COLUMNS).cte("done")
    found_owner = select(is_own).where(col(Task.id) == bindparam("task_id"))
    return select(
        *done.c,
        (exists().select_from(*sources) if sources else true()).label("has_account"),
        found_owner.scalar_subquery().label("is_own"),
    ).select_from(outerjoin(select(literal(1)).subquery("one_row"), done, true()))


# By whether accounts are ours, with a row in `users`, or a Better Auth server's.
CREATE = {
    True: CompiledStatement(insert_task(account()).returning(*COLUMNS)),
    False: CompiledStatement(insert_task().returning(*COLUMNS)),
}
PUT = {True: CompiledStatement(put_task(account())), False: CompiledStatement(put_task())}


class NewTask:
    """A task that a client wants to create, or to replace."""

    def __init__(self, request: Request, owner_id: str, task_id: UUID, body: TaskCreate) -> None:
        self._has_account = resources(request).settings.better_auth_url is None
        self._values = {"task_id": task_id, "owner": owner_id, **body.model_dump()}
        if self._has_account:
            self._values["account"] = account_id(owner_id)

    async def create(self, statement: OneStatement) -> Row:
        """Return COLUMNS of the new task. Raises HTTPException."""
        row = await statement.first(CREATE[self._has_account], **self._values)
        if row is None:
            raise no_account()
        return row

    async def put(self, statement: OneStatement, conditions: Preconditions) -> Row:
        """Return COLUMNS of the task, which is new if it has not changed since its creation.

        Raises HTTPException.
        """
        values = self._values | conditions.parameters
        row = found(await statement.first(PUT[self._has_account], **values), "task")
        has_account, is_own = row.pop("has_account"), row.pop("is_own")
        if row["id"] is not None:
            return row
        if not has_account:
            raise no_account()
        if is_own or (is_own is None and conditions.none_match != []):
            # The second: another request has created it at the same time.
            detail = "there is a task with this id already: read it"
            raise HTTPException(status.HTTP_412_PRECONDITION_FAILED, detail)
        return found(None, "task")


def account_id(user_id: str) -> UUID:
    try:
        return UUID(user_id)
    except ValueError:
        raise no_account() from None  # not an id of ours


def no_account() -> HTTPException:
    return unauthorized("the account does not exist")
