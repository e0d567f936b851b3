"""The *textbook app*: the generated project's tasks API, as tutorials write it.

FastAPI and SQLModel; `def` routes; a `yield` dependency for the session; the engine's defaults with
pre-ping; a user lookup on every request; offset pagination with a count; commit, refresh, return;
a response model. fastapi/full-stack-fastapi-template, the best-known FastAPI template, does the
same, but without pre-ping and on psycopg 3. This app returns the same responses as the generated
project.

Runs in the generated project's environment, so that both use the same packages.
"""

import os
from collections.abc import Iterator
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.security import OAuth2PasswordBearer
from sqlmodel import Session, col, create_engine, func, select
from textbook_models import Task, TaskCreate, TaskPublic, TaskUpdate, User, now, public, read_token

engine = create_engine(os.environ["BENCH_DATABASE_URL"], pool_pre_ping=True)
app = FastAPI()


def get_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


SessionDep = Annotated[Session, Depends(get_session)]
TokenDep = Annotated[str, Depends(OAuth2PasswordBearer(tokenUrl="auth/login"))]


def get_current_user(session: SessionDep, token: TokenDep) -> User:
    user = session.get(User, read_token(token))
    if user is None:
        raise HTTPException(status_code=401, detail="User not found")
    return user


CurrentUser = Annotated[User, Depends(get_current_user)]


def get_own_task(session: Session, user: User, task_id: UUID) -> Task:
    task = session.get(Task, task_id)
    if task is None or task.owner_id != str(user.id):
        raise HTTPException(status_code=404, detail="Task not found")
    return task


@app.get("/tasks", response_model=list[TaskPublic])
def list_tasks(
    session: SessionDep,
    user: CurrentUser,
    request: Request,
    response: Response,
    offset: int = 0,
    limit: Annotated[int, Query(le=100)] = 20,
) -> list[TaskPublic]:
    own = col(Task.owner_id) == str(user.id)
    count = session.exec(select(func.count()).select_from(Task).where(own)).one()
    newest_first = (
        select(Task).where(own).order_by(col(Task.created_at).desc(), col(Task.id).desc())
    )
    tasks = session.exec(newest_first.offset(offset).limit(limit)).all()
    response.headers["X-Total-Count"] = str(count)
    return [public(task, request) for task in tasks]


@app.post("/tasks", response_model=TaskPublic, status_code=201)
def create_task(
    session: SessionDep, user: CurrentUser, body: TaskCreate, request: Request
) -> TaskPublic:
    task = Task.model_validate(body, update={"owner_id": str(user.id)})
    session.add(task)
    session.commit()
    session.refresh(task)
    return public(task, request)


@app.get("/tasks/{task_id}", response_model=TaskPublic)
def get_task(session: SessionDep, user: CurrentUser, task_id: UUID, request: Request) -> TaskPublic:
    return public(get_own_task(session, user, task_id), request)


@app.patch("/tasks/{task_id}", response_model=TaskPublic)
def update_task(
    session: SessionDep, user: CurrentUser, task_id: UUID, body: TaskUpdate, request: Request
) -> TaskPublic:
    task = get_own_task(session, user, task_id)
    task.sqlmodel_update(body.model_dump(exclude_unset=True), update={"updated_at": now()})
    session.add(task)
    session.commit()
    session.refresh(task)
    return public(task, request)


@app.delete("/tasks/{task_id}", status_code=204)
def delete_task(session: SessionDep, user: CurrentUser, task_id: UUID) -> None:
    session.delete(get_own_task(session, user, task_id))
    session.commit()
