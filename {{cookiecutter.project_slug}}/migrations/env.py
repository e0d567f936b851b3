"""How Alembic reaches the database; `uv run alembic …` and `manage.py migrate` both come here."""

from collections.abc import Sequence
from typing import Any

from alembic import context
from alembic.operations.ops import AddColumnOp, DropColumnOp, DropTableOp, ExecuteSQLOp
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import Enum, NullPool, create_engine, inspect, text
from sqlmodel import SQLModel

import models  # noqa: F401  (autogenerate must know the tables)
from config import get_settings
from migrations import LOCK_KEY
from postgres.connect import log_in
from postgres.url import DatabaseUrl

LOCK_WAIT = "60s"


def database() -> DatabaseUrl:
    url: DatabaseUrl | None = context.config.attributes.get("url")
    return url or get_settings().migration_url


def improve(migration: MigrationContext, _revision: Any, directives: Sequence[Any]) -> None:
    """Check and complete what autogenerate is about to write."""
    if "drop" not in context.get_x_argument():
        refuse_to_lose_rows(directives[0])
    create_enums(directives[0], inspect(migration.connection))


def create_enums(script: Any, inspector: Any) -> None:
    """Add the CREATE TYPE for a new Enum column, which autogenerate omits."""
    known = {enum["name"] for enum in inspector.get_enums()}
    added = {
        change.column.type.name: change.column.type
        for operation in script.upgrade_ops.ops
        for change in getattr(operation, "ops", [])
        if isinstance(change, AddColumnOp) and isinstance(change.column.type, Enum)
    }
    for name, kind in added.items():
        if name not in known:
            values = ", ".join("'{}'".format(value.replace("'", "''")) for value in kind.enums)
            script.upgrade_ops.ops.insert(0, ExecuteSQLOp(f"CREATE TYPE {name} AS ENUM ({values})"))
            script.downgrade_ops.ops.append(ExecuteSQLOp(f"DROP TYPE {name}"))


def refuse_to_lose_rows(script: Any) -> None:
    """Refuse to drop a table or column, which may only have been renamed."""
    lost = [
        f"{change.table_name}.{change.column_name}"
        if isinstance(change, DropColumnOp)
        else change.table_name
        for operation in script.upgrade_ops.ops
        for change in getattr(operation, "ops", [operation])
        if isinstance(change, DropColumnOp | DropTableOp)
    ]
    if lost:
        raise CommandError(
            f"no model has {', '.join(lost)} any more: the migration would delete the data. If you"
            " renamed it, write the migration by hand, as docs/extending.md shows. To delete it:"
            ' uv run alembic -x drop revision --autogenerate -m "…"'
        )


def run_offline() -> None:
    """Print the SQL: `uv run alembic upgrade head --sql`."""
    context.configure(
        url=database().for_sqlalchemy(),
        target_metadata=SQLModel.metadata,
        literal_binds=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run all migrations in one transaction."""
    url, given = database(), context.config.attributes.get("connection")
    engine = create_engine(
        url.for_sqlalchemy(), creator=lambda: given or log_in(url), poolclass=NullPool
    )
    with engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=SQLModel.metadata,
            process_revision_directives=improve,
        )
        with context.begin_transaction():
            # Replicas that start together take turns. The lock ends with the transaction, so it
            # works through a pooler. The timeout: a forgotten session must not block this forever.
            connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT}'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
