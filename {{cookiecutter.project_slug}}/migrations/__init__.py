"""The migrations: runs them, and returns what the code expects of the schema."""

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlmodel import SQLModel

import models  # noqa: F401  (columns() must know the tables)
from postgres.url import DatabaseUrl

# Any number will do, as long as all replicas of this app use the same.
LOCK_KEY = 7_206_041


def alembic_config(url: DatabaseUrl | None = None) -> Config:
    """Return what Alembic's commands want. url: the database, the one in the settings if None."""
    config = Config(toml_file=Path(__file__).parents[1] / "pyproject.toml")
    config.attributes["url"] = url
    return config


def upgrade(url: DatabaseUrl, connection: Any = None) -> None:
    """Apply all missing migrations, or none if one fails.

    connection: psycopg2's, to the same database, to be used and closed; a new one if None.
    """
    config = alembic_config(url)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def history() -> list[str]:
    """Return the revisions that the code knows, the newest first.

    Raises alembic.util.CommandError if they have several heads.
    """
    scripts = ScriptDirectory.from_config(alembic_config())
    scripts.get_current_head()  # raises if there are several
    return [script.revision for script in scripts.walk_revisions()]


def head() -> str | None:
    """Return the revision that the code expects."""
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


def columns() -> set[str]:
    """Return the columns of the models, as `table.column`."""
    return {
        f"{table.name}.{column.name}"
        for table in SQLModel.metadata.tables.values()
        if table.schema is None
        for column in table.columns
    }
