"""Tables, schemas and token decoding, shared by both textbook apps.

Tables and tokens are those of the generated project.
"""

import os
from datetime import UTC, datetime
from enum import StrEnum
from uuid import UUID

import jwt
from fastapi import HTTPException, Request
from sqlalchemy import DateTime, Enum
from sqlmodel import Field, SQLModel
from uuid_utils.compat import uuid7


class Priority(StrEnum):
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


PRIORITY = Enum(Priority, name="task_priority", values_callable=lambda _: list(map(str, Priority)))
TIMESTAMP = DateTime(timezone=True)


def now() -> datetime:
    return datetime.now(UTC)


class User(SQLModel, table=True):
    __tablename__ = "users"

    id: UUID = Field(primary_key=True)
    email: str
    password_hash: str
    name: str
    created_at: datetime = Field(sa_type=TIMESTAMP)


class TaskBase(SQLModel):
    title: str = Field(max_length=200)
    description: str | None = Field(default=None, max_length=5000)
    completed: bool = False
    order: int | None = None
    priority: Priority = Field(default=Priority.MEDIUM, sa_type=PRIORITY)
    due_at: datetime | None = Field(default=None, sa_type=TIMESTAMP)


class Task(TaskBase, table=True):
    __tablename__ = "tasks"

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    owner_id: str
    created_at: datetime = Field(default_factory=now, sa_type=TIMESTAMP)
    updated_at: datetime = Field(default_factory=now, sa_type=TIMESTAMP)


class TaskCreate(TaskBase):
    pass


class TaskUpdate(SQLModel):
    title: str | None = Field(default=None, max_length=200)
    description: str | None = Field(default=None, max_length=5000)
    completed: bool | None = None
    order: int | None = None
    priority: Priority | None = None
    due_at: datetime | None = None


class TaskPublic(TaskBase):
    id: UUID
    url: str
    created_at: datetime
    updated_at: datetime


def read_token(token: str) -> UUID:
    """Return the user's id. Raises HTTPException."""
    key = bytes.fromhex(os.environ["BENCH_TOKEN_KEY"])
    issuer = os.environ["BENCH_TOKEN_ISSUER"]
    try:
        claims = jwt.decode(token, key, algorithms=["HS256"], audience=issuer, issuer=issuer)
    except jwt.InvalidTokenError:
        raise HTTPException(status_code=401, detail="Could not validate credentials") from None
    return UUID(claims["sub"])


def public(task: Task, request: Request) -> TaskPublic:
    return TaskPublic.model_validate(task, update={"url": f"{request.base_url}tasks/{task.id}"})
