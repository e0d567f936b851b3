"""The *async textbook app*: the textbook app on the event loop, as tutorials write it.

`async def` routes; a `yield` dependency with SQLModel's `AsyncSession` and
`expire_on_commit=False`; and asyncpg, the driver that most tutorials choose. Everything else is as
in the textbook app.

Runs in the generated project's environment, with asyncpg added for this app only.
"""

import os
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.security import OAuth2PasswordBearer
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import col, func, select
from sqlmodel.ext.asyncio.session import AsyncSession
from textbook_models import Task, TaskCreate, TaskPublic, TaskUpdate, User, now, public, read_token

engine = create_async_engine(os.environ["BENCH_DATABASE_URL"], pool_pre_ping=True)
app = FastAPI()


async def get_session() -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


SessionDep = Annotated[AsyncSession, Depends(get_session)]
TokenDep = Annotated[str, Depends(OAuth2PasswordBearer(tokenUrl="auth/login"))]


async def get_current_user(session: SessionDep, token: TokenDep) -> User:
    user = await session.get(User, read_token(token))
    if user is None:
        raise HTTPException(status_code=401, detail="User not found")
    return user


CurrentUser = Annotated[User, Depends(get_current_user)]


async def get_own_task(session: AsyncSession, user: User, task_id: UUID) -> Task:
    task = await session.get(Task, task_id)
    if task is None or task.owner_id != str(user.id):
        raise HTTPException(status_code=404, detail="Task not found")
    return task


@app.get("/tasks", response_model=list[TaskPublic])
async def list_tasks(
    session: SessionDep,
    user: CurrentUser,
    request: Request,
    response: Response,
    offset: int = 0,
    limit: Annotated[int, Query(le=100)] = 20,
) -> list[TaskPublic]:
    own = col(Task.owner_id) == str(user.id)
    count = (await session.exec(select(func.count()).select_from(Task).where(own))).one()
    newest_first = (
        select(Task).where(own).order_by(col(Task.created_at).desc(), col(Task.id).desc())
    )
    tasks = (await session.exec(newest_first.offset(offset).limit(limit))).all()
    response.headers["X-Total-Count"] = str(count)
    return [public(task, request) for task in tasks]


@app.post("/tasks", response_model=TaskPublic, status_code=201)
async def create_task(
    session: SessionDep, user: CurrentUser, body: TaskCreate, request: Request
) -> TaskPublic:
    task = Task.model_validate(body, update={"owner_id": str(user.id)})
    session.add(task)
    await session.commit()
    await session.refresh(task)
    return public(task, request)


@app.get("/tasks/{task_id}", response_model=TaskPublic)
async def get_task(
    session: SessionDep, user: CurrentUser, task_id: UUID, request: Request
) -> TaskPublic:
    return public(await get_own_task(session, user, task_id), request)


@app.patch("/tasks/{task_id}", response_model=TaskPublic)
async def update_task(
    session: SessionDep, user: CurrentUser, task_id: UUID, body: TaskUpdate, request: Request
) -> TaskPublic:
    task = await get_own_task(session, user, task_id)
    task.sqlmodel_update(body.model_dump(exclude_unset=True), update={"updated_at": now()})
    session.add(task)
    await session.commit()
    await session.refresh(task)
    return public(task, request)


@app.delete("/tasks/{task_id}", status_code=204)
async def delete_task(session: SessionDep, user: CurrentUser, task_id: UUID) -> None:
    await session.delete(await get_own_task(session, user, task_id))
    await session.commit()
