"""The *session app*: the generated project with task routes as tutorials write them.

The routes are those of the async textbook app, but use the project's `SessionDep`. App, session,
tables, schemas and authentication are the project's.

Runs in the generated project's environment and folder.
"""

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from auth import CurrentUserId
from config import get_settings
from db import SessionDep
from fastapi import APIRouter, HTTPException, Query, Request, Response
from main import create_app
from models import Task
from routes import tasks as task_routes
from schemas.tasks import TaskCreate, TaskPublic, TaskUpdate
from sqlmodel import col, func, select

router = APIRouter(prefix="/tasks")


def public(task: Task, request: Request) -> TaskPublic:
    return TaskPublic(**task.model_dump(), url=f"{request.base_url}tasks/{task.id}")


async def get_own_task(session: SessionDep, owner_id: str, task_id: UUID) -> Task:
    task = await session.get(Task, task_id)
    if task is None or task.owner_id != owner_id:
        raise HTTPException(status_code=404, detail="Task not found")
    return task


@router.get("", response_model=list[TaskPublic])
async def list_tasks(
    session: SessionDep,
    owner_id: CurrentUserId,
    request: Request,
    response: Response,
    offset: int = 0,
    limit: Annotated[int, Query(le=100)] = 20,
) -> list[TaskPublic]:
    own = col(Task.owner_id) == owner_id
    count = (await session.exec(select(func.count()).select_from(Task).where(own))).one()
    newest_first = (
        select(Task).where(own).order_by(col(Task.created_at).desc(), col(Task.id).desc())
    )
    tasks = (await session.exec(newest_first.offset(offset).limit(limit))).all()
    response.headers["X-Total-Count"] = str(count)
    return [public(task, request) for task in tasks]


@router.post("", response_model=TaskPublic, status_code=201)
async def create_task(
    session: SessionDep, owner_id: CurrentUserId, body: TaskCreate, request: Request
) -> TaskPublic:
    task = Task(**body.model_dump(), owner_id=owner_id)
    session.add(task)
    await session.commit()
    await session.refresh(task)
    return public(task, request)


@router.get("/{task_id}", response_model=TaskPublic)
async def get_task(
    session: SessionDep, owner_id: CurrentUserId, task_id: UUID, request: Request
) -> TaskPublic:
    return public(await get_own_task(session, owner_id, task_id), request)


@router.patch("/{task_id}", response_model=TaskPublic)
async def update_task(
    session: SessionDep,
    owner_id: CurrentUserId,
    task_id: UUID,
    body: TaskUpdate,
    request: Request,
) -> TaskPublic:
    task = await get_own_task(session, owner_id, task_id)
    changes = body.model_dump(exclude_unset=True)
    task.sqlmodel_update(changes, update={"updated_at": datetime.now(UTC)})
    session.add(task)
    await session.commit()
    await session.refresh(task)
    return public(task, request)


@router.delete("/{task_id}", status_code=204)
async def delete_task(session: SessionDep, owner_id: CurrentUserId, task_id: UUID) -> None:
    await session.delete(await get_own_task(session, owner_id, task_id))
    await session.commit()


task_routes.router = router  # create_app includes it
app = create_app(get_settings())
