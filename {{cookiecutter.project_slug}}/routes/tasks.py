"""Tasks. Each route sends one SQL statement, which reaches only the caller's tasks."""

from functools import cache
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response, status
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter
from sqlalchemy import (
    Boolean,
    ColumnElement,
    Delete,
    Update,
    bindparam,
    delete,
    func,
    literal_column,
    outerjoin,
    select,
    true,
    update,
)
from sqlmodel import col
from uuid_utils.compat import uuid7

from auth import CurrentUserId
from db import CompiledStatement, OneStatement, Row, StatementDep
from errors import found
from models import NO_DUE_DATE, NO_ORDER, Priority, Task, in_turn
from pagination import PageQuery, PageReaderDep, Pages
from resources import resources
from routes.new_tasks import COLUMNS, NewTask
from routes.preconditions import (
    UNCONDITIONAL,
    accepted,
    changed,
    document_preconditions,
    etag_of,
    preconditions_of,
)
from routes.urls import url_of
from schemas.problem import (
    BODY,
    ETAG,
    NEXT_PAGE,
    NOT_MODIFIED,
    problems,
    with_headers,
)
from schemas.tasks import (
    Moment,
    Search,
    TaskCreate,
    TaskPublic,
    TasksChanged,
    TasksUpdate,
    TaskUpdate,
)

router = APIRouter(prefix="/tasks", tags=["tasks"])

TASKS = TypeAdapter(list[TaskPublic])

# Compiling a statement costs more than sending it, so each is compiled once and takes parameters.
# Each names the owner, so another owner's task is a 404.
OWN_TASK = (col(Task.id) == bindparam("task_id")) & (col(Task.owner_id) == bindparam("owner"))
READ = CompiledStatement(select(*COLUMNS).where(OWN_TASK))
CHANGE = CompiledStatement(update(Task).where(OWN_TASK).returning(*COLUMNS))
DELETE = CompiledStatement(delete(Task).where(OWN_TASK).returning(col(Task.id)))


def if_accepted(change: Update | Delete) -> CompiledStatement:
    """Change a task if its version is accepted. Returns no row if there is no such task.

    If there is one that was not changed, all values of its row are NULL.
    """
    done = change.where(OWN_TASK, accepted(col(Task.updated_at))).returning(*COLUMNS).cte("done")
    tasks = outerjoin(Task, done, true())
    return CompiledStatement(select(*done.c).select_from(tasks).where(OWN_TASK))


@cache  # for each set of fields that a client can change
def change_if_accepted(*fields: str) -> CompiledStatement:
    values = {name: bindparam(name, type_=getattr(Task, name).type) for name in fields}
    return if_accepted(update(Task).values(values))


DELETE_IF_ACCEPTED = if_accepted(delete(Task))
OWN_TASKS = col(Task.owner_id) == bindparam("owner")
OWN_TASKS_IN_TURN = OWN_TASKS & in_turn(bindparam("owner"))
DELETE_ALL = CompiledStatement(delete(Task).where(OWN_TASKS_IN_TURN))
COMPLETED = bindparam("value", type_=Boolean)
COMPLETE = CompiledStatement(
    select(func.count().label("changed")).select_from(
        update(Task)
        .where(OWN_TASKS_IN_TURN, col(Task.completed) != COMPLETED)
        .values(completed=COMPLETED)
        .returning(col(Task.id))
        .cte("changed")
    )
)
DELETE_SOME = CompiledStatement(
    delete(Task).where(OWN_TASKS_IN_TURN, col(Task.completed) == bindparam("completed"))
)

# The sort values of tasks without a due date or an order. PostgreSQL uses an index on an expression
# only if the query contains the same expression.
NEVER_DUE: ColumnElement[Any] = literal_column(NO_DUE_DATE)
effective_due = func.coalesce(col(Task.due_at), NEVER_DUE)
effective_order = func.coalesce(col(Task.order), literal_column(str(NO_ORDER)))

# The sort orders and filters of the list. Each sort order has an index in models.py.
TASK_PAGES = Pages(
    select(*COLUMNS).where(OWN_TASKS),
    sorts={
        "created_at": [col(Task.created_at), col(Task.id)],
        "due_at": [effective_due, col(Task.id)],
        "order": [effective_order, col(Task.id)],
        "priority": [col(Task.priority), col(Task.created_at), col(Task.id)],
    },
    filters={
        "completed": col(Task.completed) == bindparam("completed"),
        "q": col(Task.title).ilike(bindparam("q")) | col(Task.description).ilike(bindparam("q")),
        "priority": col(Task.priority) == bindparam("priority"),
        "due_before": effective_due < bindparam("due_before"),
        "due_after": (effective_due > bindparam("due_after")) & (effective_due < NEVER_DUE),
    },
)
TaskSort = Literal[
    "created_at", "-created_at", "due_at", "-due_at", "order", "-order", "priority", "-priority"
]

ADDRESS = {"Location": "The task's URL."}
ONE_TASK: dict[int | str, dict[str, Any]] = {200: with_headers(ETAG)}


def containing(text: str | None) -> str | None:
    r"""Return a LIKE pattern that finds the text anywhere, with "%", "_" and "\" escaped."""
    if text is None:
        return None
    return "%" + text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"


class TaskQuery(PageQuery):
    """Which tasks a list shows, in what order, and how many at once."""

    completed: bool | None = None
    q: Annotated[Search | None, AfterValidator(containing)] = None
    priority: Priority | None = None
    due_before: Moment | None = None
    due_after: Moment | None = None
    sort: Annotated[TaskSort, Field(description='"-" reverses the order')] = "-created_at"


class TaskChoice(BaseModel):
    """Which tasks are meant: all, unless it says which. A typing error must not mean all."""

    model_config = ConfigDict(extra="forbid")

    completed: bool | None = None


def tasks_url(request: Request) -> str:
    return url_of(request, "tasks")


class OwnTask:
    """One task of the caller's. Another user's task gets a 404, as if it did not exist.

    All methods raise HTTPException, also for preconditions that the task does not fulfil.
    """

    def __init__(
        self,
        task_id: UUID,
        owner_id: str,
        statement: OneStatement,
        request: Request,
        response: Response,
    ) -> None:
        self._conditions = preconditions_of(request)
        self._id = task_id
        self._owner_id = owner_id
        self._statement = statement
        self._request = request
        self._response = response

    async def read(self, *, only_reads: bool = True) -> TaskPublic:
        """Return the task. only_reads: if the client has it already, this is a 304, no 412."""
        row = await self._statement.first(READ, task_id=self._id, owner=self._owner_id)
        task = self._shown(found(row, "task"))
        self._conditions.check(task.updated_at, only_reads=only_reads)
        return task

    async def change(self, values: dict[str, Any]) -> TaskPublic:
        """Set these values, at least one."""
        if self._conditions is UNCONDITIONAL:
            return self._shown(await self._send(CHANGE, values))
        return self._shown(await self._send(change_if_accepted(*values), values))

    async def put(self, body: TaskCreate) -> TaskPublic:
        """Create or replace the task."""
        if self._conditions.must_exist:
            return await self.change(body.model_dump())
        new = NewTask(self._request, self._owner_id, self._id, body)
        task = self._shown(await new.put(self._statement, self._conditions))
        if task.created_at == task.updated_at:  # every change moves updated_at
            self._response.status_code = status.HTTP_201_CREATED
            self._response.headers["Location"] = task.url
        return task

    async def delete(self) -> None:
        await self._send(DELETE if self._conditions is UNCONDITIONAL else DELETE_IF_ACCEPTED, {})

    async def _send(self, statement: CompiledStatement, values: dict[str, Any]) -> Row:
        values = values | {"task_id": self._id, "owner": self._owner_id}
        if self._conditions is not UNCONDITIONAL:
            values |= self._conditions.parameters
        row = found(await self._statement.first(statement, **values), "task")
        if row["id"] is None:
            raise changed()
        return row

    def _shown(self, row: Row) -> TaskPublic:
        """Return a task as its owner sees it, and its ETag in the response."""
        task = TaskPublic(**row, url=f"{tasks_url(self._request)}/{self._id}")
        self._response.headers["ETag"] = etag_of(task.updated_at)
        return task


async def get_own_task(
    task_id: UUID,
    owner_id: CurrentUserId,
    statement: StatementDep,
    request: Request,
    response: Response,
) -> OwnTask:
    return OwnTask(task_id, owner_id, statement, request, response)


OwnTaskDep = Annotated[OwnTask, Depends(get_own_task)]


@router.get("", responses=problems(401, 422, 429, 503) | NEXT_PAGE)
async def list_tasks(
    owner_id: CurrentUserId,
    query: Annotated[TaskQuery, Query()],
    reader: PageReaderDep,
    request: Request,
) -> list[TaskPublic]:
    """List tasks. The `Link` header has the URL of the next page, as rel="next"."""
    url = tasks_url(request)
    rows = await reader.read(TASK_PAGES, query, url, owner=owner_id)
    for row in rows:
        row["url"] = f"{url}/{row['id']}"
    return TASKS.validate_python(rows)


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    responses=problems(401, 409, 429, *BODY, 503) | {201: with_headers(ADDRESS | ETAG)},
)
async def create_task(
    body: TaskCreate,
    owner_id: CurrentUserId,
    statement: StatementDep,
    request: Request,
    response: Response,
) -> TaskPublic:
    """Create a task. The `Location` header has its URL."""
    task_id = uuid7()
    row = await NewTask(request, owner_id, task_id, body).create(statement)
    url = f"{tasks_url(request)}/{task_id}"
    task = TaskPublic(**row, url=url)
    response.headers["Location"] = url
    response.headers["ETag"] = etag_of(task.updated_at)
    return task


@router.patch("", responses=problems(401, 429, *BODY, 503))
async def complete_tasks(
    body: TasksUpdate,
    owner_id: CurrentUserId,
    statement: StatementDep,
    which: Annotated[TaskChoice, Query()],
    request: Request,
) -> TasksChanged:
    """Complete all tasks, or open them again; with `completed` only the completed or the open ones.

    Tasks that have the value already do not change, and are not counted.
    """
    if which.completed == body.completed:
        return TasksChanged(changed=0)
    async with resources(request).user_limit.turn(owner_id):
        (row,) = await statement.all(COMPLETE, owner=owner_id, value=body.completed)
    return TasksChanged(**row)


@router.delete("", status_code=status.HTTP_204_NO_CONTENT, responses=problems(401, 422, 429, 503))
async def delete_tasks(
    owner_id: CurrentUserId,
    statement: StatementDep,
    which: Annotated[TaskChoice, Query()],
    request: Request,
) -> None:
    """Delete all tasks, or with `completed` only the completed or the open ones."""
    async with resources(request).user_limit.turn(owner_id):
        if which.completed is None:
            await statement.all(DELETE_ALL, owner=owner_id)
        else:
            await statement.all(DELETE_SOME, owner=owner_id, completed=which.completed)


@router.get(
    "/{task_id}",
    responses=problems(401, 404, 412, 422, 503) | ONE_TASK | NOT_MODIFIED,
    openapi_extra=document_preconditions("If-None-Match"),
)
async def get_task(task: OwnTaskDep) -> TaskPublic:
    """Read one task."""
    return await task.read()


@router.patch(
    "/{task_id}",
    responses=problems(401, 404, 412, *BODY, 503) | ONE_TASK,
    openapi_extra=document_preconditions("If-Match"),
)
async def update_task(task: OwnTaskDep, body: TaskUpdate) -> TaskPublic:
    """Change the fields that are sent."""
    changes = body.model_dump(exclude_unset=True)
    return await (task.change(changes) if changes else task.read(only_reads=False))


@router.put(
    "/{task_id}",
    responses=problems(401, 404, 409, 412, 429, *BODY, 503)
    | ONE_TASK
    | {201: {"model": TaskPublic, **with_headers(ADDRESS | ETAG)}},
    openapi_extra=document_preconditions("If-Match", "If-None-Match"),
)
async def replace_task(task: OwnTaskDep, body: TaskCreate) -> TaskPublic:
    """Create a task under an id that you choose, or replace it.

    Omitted fields get their defaults. It is safe to repeat if the response was lost.
    """
    return await task.put(body)


@router.delete(
    "/{task_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(401, 404, 412, 422, 503),
    openapi_extra=document_preconditions("If-Match"),
)
async def delete_task(task: OwnTaskDep) -> None:
    """Delete one task."""
    await task.delete()
