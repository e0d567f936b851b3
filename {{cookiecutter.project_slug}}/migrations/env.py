"""How Alembic reaches the database; `uv run alembic …` and `manage.py migrate` both come here."""

from alembic import context
from sqlalchemy import NullPool, create_engine, text
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
    """Migrate in one transaction: all of it, or nothing."""
    url, given = database(), context.config.attributes.get("connection")
    engine = create_engine(
        url.for_sqlalchemy(), creator=lambda: given or log_in(url), poolclass=NullPool
    )
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=SQLModel.metadata)
        with context.begin_transaction():
            # Replicas that start together take turns. The lock ends with the transaction, so it
            # holds through a pooler too; and nothing waits for ever behind a forgotten session.
            connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT}'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
