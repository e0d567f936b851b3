"""The status that the page at / shows. It is for developers and not part of the API."""

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
    is_registration_open: bool = False
    mailbox: bool = False


class DatabaseStatus(BaseModel):
    """Which database the app uses, without user and password, and whether it answers."""

    ok: bool
    kind: Literal["embedded PostgreSQL", "Neon", "PostgreSQL"]
    name: str
    address: str
    latency_ms: float | None = None
    cause: str | None = None
    advice: str | None = None


class MigrationStatus(BaseModel):
    """Whether the schema is the one that the code expects. ok: None if that is unknown."""

    ok: bool | None
    state: State
    revision: str | None = None
    cause: str | None = None
    advice: str | None = None


class Status(BaseModel):
    app: AppStatus
    database: DatabaseStatus
    migrations: MigrationStatus
