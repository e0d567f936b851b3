"""The tables. A change here needs a migration: `uv run alembic revision --autogenerate -m "…"`."""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    DDL,
    ColumnElement,
    DateTime,
    Delete,
    Enum,
    Index,
    LargeBinary,
    String,
    TextClause,
    delete,
    event,
    false,
    func,
    select,
    text,
)
from sqlmodel import Field, SQLModel
from uuid_utils.compat import uuid7

# Constraints with predictable names can be changed by a later migration.
SQLModel.metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

# Extensions that the indexes need. A migration that needs another one creates it itself.
for extension in ("btree_gin", "pg_trgm"):
    create = DDL(f"CREATE EXTENSION IF NOT EXISTS {extension}")  # type: ignore[no-untyped-call]
    event.listen(SQLModel.metadata, "before_create", create)

TIMESTAMP = DateTime(timezone=True)
NO_DUE_DATE = "'infinity'::timestamptz"  # the sort value of tasks without a due date, as SQL
NO_ORDER = 2**31 - 1  # the sort value of tasks without an order


def later_than(column: str) -> TextClause:
    """Return the current time, or 1 µs after the column's if the clock has not moved on.

    ETags are made from it, so no two versions may share one.
    """
    return text(f"greatest(now(), {column} + interval '1 microsecond')")


def set_by_database(**column: Any) -> Any:
    """Return a field for a point in time, UTC, that the database's clock fills in."""
    return Field(
        default=None,
        nullable=False,
        sa_type=TIMESTAMP,
        sa_column_kwargs={"server_default": func.now(), **column},
    )


def in_turn(owner_id: str | ColumnElement[str]) -> ColumnElement[bool]:
    """Return a condition that waits until no other transaction changes all rows of an owner.

    If two of them locked rows in different orders, each could wait for the other. To lock the rows
    in order first would take several times as long.
    """
    lock = select(func.pg_advisory_xact_lock(func.hashtextextended(owner_id, 0)))
    return lock.scalar_subquery().is_not(None)


def delete_owned(owner_id: str) -> dict[str, Delete]:
    """Return the statements that delete all that a user owns, by table.

    They are in an order that foreign keys allow.
    """
    tables = reversed(SQLModel.metadata.sorted_tables)
    return {
        table.name: delete(table).where(table.c.owner_id == owner_id, in_turn(owner_id))
        for table in tables
        if "owner_id" in table.columns
    }


class Priority(StrEnum):
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


# A PostgreSQL enum type, which sorts in the order of declaration.
PRIORITY = Enum(Priority, name="task_priority", values_callable=lambda _: list(map(str, Priority)))


class User(SQLModel, table=True):
    """An account of this app. Users of a Better Auth server have no row here."""

    __tablename__ = "users"  # "user" is a reserved word of SQL, and a table of Better Auth

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    email: str = Field(sa_type=String(254), unique=True, index=True)  # in lower case
    password_hash: str = Field(sa_type=String(255))
    name: str = Field(sa_type=String(100))
    # When its owner followed a link that was mailed to the address; None if never.
    email_verified_at: datetime | None = Field(default=None, sa_type=TIMESTAMP)
    created_at: datetime = set_by_database()


class Task(SQLModel, table=True):
    """A todo of one owner."""

    __tablename__ = "tasks"
    # One index for each sort order, and for the most common filters. Each begins with the owner,
    # so a list stays fast however many tasks other owners have.
    __table_args__ = (
        Index("ix_tasks_created", "owner_id", "created_at", "id"),
        Index("ix_tasks_completed", "owner_id", "completed", "created_at", "id"),
        Index("ix_tasks_priority", "owner_id", "priority", "created_at", "id"),
        Index("ix_tasks_due", "owner_id", text(f"coalesce(due_at, {NO_DUE_DATE})"), "id"),
        Index("ix_tasks_order", "owner_id", text(f'coalesce("order", {NO_ORDER})'), "id"),
        # Trigram index for substring search.
        Index(
            "ix_tasks_text",
            "owner_id",
            "title",
            "description",
            postgresql_using="gin",
            postgresql_ops={"title": "gin_trgm_ops", "description": "gin_trgm_ops"},
        ),
    )

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    # Text without a foreign key: the user may be on a Better Auth server.
    owner_id: str = Field(sa_type=String(255))
    title: str = Field(sa_type=String(200))
    description: str | None = Field(default=None, sa_type=String(5000))
    completed: bool = Field(default=False, sa_column_kwargs={"server_default": false()})
    order: int | None = None
    priority: Priority = Field(
        default=Priority.MEDIUM,
        sa_type=PRIORITY,
        sa_column_kwargs={"server_default": Priority.MEDIUM.value},
    )
    due_at: datetime | None = Field(default=None, sa_type=TIMESTAMP)
    created_at: datetime = set_by_database()
    updated_at: datetime = set_by_database(onupdate=later_than("tasks.updated_at"))


class RefreshToken(SQLModel, table=True):
    """A login session; stores the hash of its current refresh token."""

    __tablename__ = "refresh_tokens"

    id: UUID = Field(primary_key=True)  # of the session: random, and part of its tokens
    user_id: UUID = Field(foreign_key="users.id", ondelete="CASCADE", index=True)
    token_hash: bytes = Field(sa_type=LargeBinary(32))  # SHA-256
    expires_at: datetime = Field(sa_type=TIMESTAMP)
    replaced_at: datetime | None = Field(default=None, sa_type=TIMESTAMP)  # at the last refresh
    address: str | None = Field(default=None, sa_type=String(64))  # from which the user logged in
    created_at: datetime = set_by_database()
