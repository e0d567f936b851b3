"""Tasks: each route sends one SQL statement, and sees its owner's tasks only."""

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response, status
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter
from sqlalchemy import (
    ColumnElement,
    Text,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal_column,
    select,
    update,
)
from sqlmodel import col
from uuid_utils.compat import uuid7

from auth import CurrentUserId
from db import CompiledStatement, OneStatement, Row, StatementDep
from errors import found
from models import FOREVER, LAST, Priority, Task
from pagination import PageQuery, PageReaderDep, Pages
from routes.urls import url_of
from schemas.problem import BODY, NEXT_PAGE, problems, with_headers
from schemas.tasks import Moment, TaskCreate, TaskPublic, TaskUpdate
from schemas.text import PlainText

router = APIRouter(prefix="/tasks", tags=["tasks"])

TASKS = TypeAdapter(list[TaskPublic])

# The columns that a client sees, named: an owner's id is not sent back for each of his tasks. The
# id comes as text, as it stands in addresses: to make a UUID of it would take longer than the rest.
COLUMNS = [
    cast(col(Task.id), Text).label("id"),
    *(col(getattr(Task, name)) for name in TaskPublic.model_fields if name not in {"id", "url"}),
]

# Statements are compiled once, since that costs more than sending them: what differs between
# requests are parameters. Each names the owner, so that another owner's task is a 404.
OWN_TASK = (col(Task.id) == bindparam("task_id")) & (col(Task.owner_id) == bindparam("owner"))
CREATE = CompiledStatement(insert(Task).returning(*COLUMNS))
READ = CompiledStatement(select(*COLUMNS).where(OWN_TASK))
CHANGE = CompiledStatement(update(Task).where(OWN_TASK).returning(*COLUMNS))
DELETE = CompiledStatement(delete(Task).where(OWN_TASK).returning(col(Task.id)))
OWN_TASKS = col(Task.owner_id) == bindparam("owner")
DELETE_ALL = CompiledStatement(delete(Task).where(OWN_TASKS))
DELETE_SOME = CompiledStatement(
    delete(Task).where(OWN_TASKS, col(Task.completed) == bindparam("completed"))
)

# Where tasks without a date or an order come in a list, as the indexes spell it: PostgreSQL finds
# an expression in an index only if it is the same.
NEVER_DUE: ColumnElement[Any] = literal_column(FOREVER)
effective_due = func.coalesce(col(Task.due_at), NEVER_DUE)
effective_order = func.coalesce(col(Task.order), literal_column(str(LAST)))

# The list: what its orders compare, and what its filters mean. An order has an index in models.py.
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

ADDRESS = {"Location": "The task's address."}


def containing(text: str | None) -> str | None:
    r"""Return the LIKE pattern of a text: "%", "_" and "\" stand for themselves."""
    if not text:
        return None
    return "%" + text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"


class TaskQuery(PageQuery):
    """Which tasks a list shows, in what order, and how many at once."""

    completed: bool | None = None
    q: Annotated[PlainText | None, Field(max_length=200), AfterValidator(containing)] = None
    priority: Priority | None = None
    due_before: Moment | None = None
    due_after: Moment | None = None
    sort: Annotated[TaskSort, Field(description='"-" reverses the order')] = "-created_at"


class TaskDeletion(BaseModel):
    """Which tasks are deleted: all, unless it says which. A typing error must not mean all."""

    model_config = ConfigDict(extra="forbid")

    completed: bool | None = None


def tasks_url(request: Request) -> str:
    return url_of(request, "tasks")


class OwnTask:
    """One task of the caller's. Another's is as unknown as one that does not exist: 404."""

    def __init__(self, task_id: UUID, owner_id: str, statement: OneStatement, url: str) -> None:
        self._names = {"task_id": task_id, "owner": owner_id}
        self._statement = statement
        self._url = url

    async def send(self, statement: CompiledStatement, **values: object) -> Row:
        """Send a statement on OWN_TASK. Returns what it returns. Raises HTTPException."""
        row = await self._statement.first(statement, **self._names, **values)
        return found(row, "task")

    async def after(self, statement: CompiledStatement, **values: object) -> TaskPublic:
        """Send a statement that returns COLUMNS. Returns the task. Raises HTTPException."""
        return TaskPublic(**await self.send(statement, **values), url=self._url)


async def get_own_task(
    task_id: UUID, owner_id: CurrentUserId, statement: StatementDep, request: Request
) -> OwnTask:
    return OwnTask(task_id, owner_id, statement, f"{tasks_url(request)}/{task_id}")


OwnTaskDep = Annotated[OwnTask, Depends(get_own_task)]


@router.get("", responses=problems(401, 422, 503) | NEXT_PAGE)
async def list_tasks(
    owner_id: CurrentUserId,
    query: Annotated[TaskQuery, Query()],
    reader: PageReaderDep,
    request: Request,
) -> list[TaskPublic]:
    """List tasks. The next page, if there is one, stands in the header Link, as rel="next"."""
    url = tasks_url(request)
    rows = await reader.read(TASK_PAGES, query, url, owner=owner_id)
    for row in rows:
        row["url"] = f"{url}/{row['id']}"
    return TASKS.validate_python(rows)


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    responses=problems(401, *BODY, 503) | {201: with_headers(ADDRESS)},
)
async def create_task(
    body: TaskCreate,
    owner_id: CurrentUserId,
    statement: StatementDep,
    request: Request,
    response: Response,
) -> TaskPublic:
    """Create a task. Its address stands in the header Location too."""
    task_id = uuid7()
    (row,) = await statement.all(CREATE, id=task_id, owner_id=owner_id, **body.model_dump())
    response.headers["Location"] = url = f"{tasks_url(request)}/{task_id}"
    return TaskPublic(**row, url=url)


@router.delete("", status_code=status.HTTP_204_NO_CONTENT, responses=problems(401, 422, 503))
async def delete_tasks(
    owner_id: CurrentUserId, statement: StatementDep, which: Annotated[TaskDeletion, Query()]
) -> None:
    """Delete all tasks, or with `completed` only those that are done, or are not."""
    if which.completed is None:
        await statement.all(DELETE_ALL, owner=owner_id)
    else:
        await statement.all(DELETE_SOME, owner=owner_id, completed=which.completed)


@router.get("/{task_id}", responses=problems(401, 404, 422, 503))
async def get_task(task: OwnTaskDep) -> TaskPublic:
    """Read one task."""
    return await task.after(READ)


@router.patch("/{task_id}", responses=problems(401, 404, *BODY, 503))
async def update_task(task: OwnTaskDep, body: TaskUpdate) -> TaskPublic:
    """Change what is sent, leave the rest."""
    changes = body.model_dump(exclude_unset=True)
    if not changes:
        return await task.after(READ)
    return await task.after(CHANGE, **changes)


@router.put("/{task_id}", responses=problems(401, 404, *BODY, 503))
async def replace_task(task: OwnTaskDep, body: TaskCreate) -> TaskPublic:
    """Change all of a task: what is not sent gets its default."""
    return await task.after(CHANGE, **body.model_dump())


@router.delete(
    "/{task_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(401, 404, 422, 503),
)
async def delete_task(task: OwnTaskDep) -> None:
    """Delete one task."""
    await task.send(DELETE)
