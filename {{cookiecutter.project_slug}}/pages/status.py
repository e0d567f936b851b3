"""What the page at / is told. It is for developers, and no part of the API."""

from typing import Literal

from pydantic import BaseModel

type State = Literal[
    "up to date", "behind the code", "behind the models", "ahead of the code", "broken", "not known"
]


class AppStatus(BaseModel):
    name: str
    version: str
    docs: bool
    login: Literal["password", "better-auth"]
    better_auth_url: str | None


class DatabaseStatus(BaseModel):
    """Which database it is, never with whose log-in, and how it answered."""

    ok: bool
    kind: Literal["embedded PostgreSQL", "Neon", "PostgreSQL"]
    name: str
    address: str
    latency_ms: float | None = None
    cause: str | None = None
    advice: str | None = None


class MigrationStatus(BaseModel):
    """Whether the tables are those that the code expects. ok: None where that is not known."""

    ok: bool | None
    state: State
    revision: str | None = None
    cause: str | None = None
    advice: str | None = None


class Status(BaseModel):
    app: AppStatus
    database: DatabaseStatus
    migrations: MigrationStatus
