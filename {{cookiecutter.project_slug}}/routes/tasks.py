"""Tasks: each route sends one SQL statement, and sees its owner's tasks only."""

from typing import Annotated, Any
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response, status
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, RowMapping, Select, delete, insert, or_, select, update
from sqlalchemy.sql.dml import ReturningDelete, ReturningUpdate
from sqlmodel import col
from uuid_utils.compat import uuid7

from auth import CurrentUserId
from db import OneStatement, StatementDep
from models import Priority, Task
from paging import NEVER_DUE, CursorsDep, Sort, effective_due, sorted_page
from schemas.problem import BODY, problems, with_headers
from schemas.tasks import Moment, TaskCreate, TaskPublic, TaskUpdate
from schemas.text import PlainText

router = APIRouter(prefix="/tasks", tags=["tasks"])

# The columns that a client sees, named: an owner's id is not sent back for each of his tasks.
COLUMNS = [col(getattr(Task, name)) for name in TaskPublic.model_fields if name != "url"]


NEXT_PAGE = {"Link": '<address>; rel="next"; missing on the last page.'}
ADDRESS = {"Location": "The task's address."}


class TaskFilter(BaseModel):
    """Which tasks a list shows, in what order, and how many at once."""

    model_config = ConfigDict(extra="forbid")

    completed: bool | None = None
    q: Annotated[PlainText | None, Field(max_length=200)] = None
    priority: Priority | None = None
    due_before: Moment | None = None
    due_after: Moment | None = None
    sort: Sort = Sort.NEWEST
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    cursor: Annotated[PlainText | None, Field(max_length=500, description="From a Link header")] = (
        None
    )

    def conditions(self) -> list[ColumnElement[bool]]:
        wanted: list[ColumnElement[bool]] = []
        if self.completed is not None:
            wanted.append(col(Task.completed).is_(self.completed))
        if self.q:
            text = f"%{escape_like(self.q)}%"
            wanted.append(or_(col(Task.title).ilike(text), col(Task.description).ilike(text)))
        if self.priority:
            wanted.append(col(Task.priority) == self.priority)
        if self.due_before:
            wanted.append(effective_due < self.due_before)
        if self.due_after:
            wanted += [effective_due > self.due_after, effective_due < NEVER_DUE]
        return wanted


class TaskDeletion(BaseModel):
    """Which tasks are deleted: all, unless it says which. A typing error must not mean all."""

    model_config = ConfigDict(extra="forbid")

    completed: bool | None = None


def escape_like(text: str) -> str:
    r"""Have "%", "_" and "\" stand for themselves in a LIKE pattern."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


async def get_tasks_url(request: Request) -> str:
    """Return the absolute address of the list, as the client reached it."""
    return f"{request.base_url}tasks"


TasksUrl = Annotated[str, Depends(get_tasks_url)]


class OwnTask:
    """One task of the caller's. Another's is as unknown as one that does not exist: 404."""

    def __init__(
        self, task_id: UUID, owner_id: str, statement: OneStatement, tasks_url: str
    ) -> None:
        self._condition = (col(Task.id) == task_id) & (col(Task.owner_id) == owner_id)
        self._statement = statement
        self._tasks_url = tasks_url

    async def row_of[S: (Select[Any], ReturningUpdate[Any], ReturningDelete[Any])](
        self, statement: S
    ) -> RowMapping:
        """Send a statement to this task alone. Returns what it returns. Raises HTTPException."""
        row = await self._statement.first(statement.where(self._condition))
        if row is None:
            raise HTTPException(status.HTTP_404_NOT_FOUND, "there is no such task")
        return row

    async def result_of[S: (Select[Any], ReturningUpdate[Any])](self, statement: S) -> TaskPublic:
        """Send a statement that returns COLUMNS. Returns the task. Raises HTTPException."""
        return public(await self.row_of(statement), self._tasks_url)


async def get_own_task(
    task_id: UUID, owner_id: CurrentUserId, statement: StatementDep, tasks_url: TasksUrl
) -> OwnTask:
    return OwnTask(task_id, owner_id, statement, tasks_url)


OwnTaskDep = Annotated[OwnTask, Depends(get_own_task)]


def public(task: RowMapping, tasks_url: str) -> TaskPublic:
    """Add what the table does not hold: the task's address."""
    return TaskPublic(**task, url=f"{tasks_url}/{task['id']}")


@router.get("", responses=problems(401, 422, 503) | {200: with_headers(NEXT_PAGE)})
async def list_tasks(
    owner_id: CurrentUserId,
    filters: Annotated[TaskFilter, Query()],
    cursors: CursorsDep,
    statement: StatementDep,
    tasks_url: TasksUrl,
    request: Request,
    response: Response,
) -> list[TaskPublic]:
    """List tasks. The next page, if there is one, stands in the header Link, as rel="next"."""
    after = cursors.read(filters.cursor, filters.sort) if filters.cursor else None
    tasks = select(*COLUMNS).where(col(Task.owner_id) == owner_id, *filters.conditions())
    # One more than was asked for tells whether there is a next page.
    rows = await statement.all(sorted_page(tasks, filters.sort, after, filters.limit + 1))
    page = rows[: filters.limit]
    if len(rows) > len(page):
        cursor = cursors.write(page[-1], filters.sort)
        query = request.query_params.multi_items()
        query = [(name, value) for name, value in query if name != "cursor"]
        link = f"{tasks_url}?{urlencode([*query, ('cursor', cursor)])}"
        response.headers["Link"] = f'<{link}>; rel="next"'
    return [public(task, tasks_url) for task in page]


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    responses=problems(401, *BODY, 503) | {201: with_headers(ADDRESS)},
)
async def create_task(
    body: TaskCreate,
    owner_id: CurrentUserId,
    statement: StatementDep,
    tasks_url: TasksUrl,
    response: Response,
) -> TaskPublic:
    """Create a task. Its address stands in the header Location too."""
    new = insert(Task).values(id=uuid7(), owner_id=owner_id, **body.model_dump())
    (row,) = await statement.all(new.returning(*COLUMNS))
    task = public(row, tasks_url)
    response.headers["Location"] = task.url
    return task


@router.delete("", status_code=status.HTTP_204_NO_CONTENT, responses=problems(401, 422, 503))
async def delete_tasks(
    owner_id: CurrentUserId, statement: StatementDep, which: Annotated[TaskDeletion, Query()]
) -> None:
    """Delete all tasks, or with `completed` only those that are done, or are not."""
    tasks = delete(Task).where(col(Task.owner_id) == owner_id)
    if which.completed is not None:
        tasks = tasks.where(col(Task.completed).is_(which.completed))
    await statement.all(tasks)


@router.get("/{task_id}", responses=problems(401, 404, 422, 503))
async def get_task(task: OwnTaskDep) -> TaskPublic:
    """Read one task."""
    return await task.result_of(select(*COLUMNS))


@router.patch("/{task_id}", responses=problems(401, 404, *BODY, 503))
async def update_task(task: OwnTaskDep, body: TaskUpdate) -> TaskPublic:
    """Change what is sent, leave the rest."""
    changes = body.model_dump(exclude_unset=True)
    if not changes:
        return await task.result_of(select(*COLUMNS))
    return await task.result_of(update(Task).values(changes).returning(*COLUMNS))


@router.put("/{task_id}", responses=problems(401, 404, *BODY, 503))
async def replace_task(task: OwnTaskDep, body: TaskCreate) -> TaskPublic:
    """Change all of a task: what is not sent gets its default."""
    return await task.result_of(update(Task).values(body.model_dump()).returning(*COLUMNS))


@router.delete(
    "/{task_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(401, 404, 422, 503),
)
async def delete_task(task: OwnTaskDep) -> None:
    """Delete one task."""
    await task.row_of(delete(Task).returning(col(Task.id)))
