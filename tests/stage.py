"""A server with a migrated database for fault tests, and the project to serve on it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg2

from app_server import AppServer, app_server
from machine import Outcome, Project
from postgres_server import Server, postgres_server

POOL_SIZE = 4  # connections per process: few, so that requests have to wait


@dataclass(frozen=True)
class Stage:
    """A database on a server, and operations on it. folder: for the logs."""

    project: Project
    server: Server
    database: str
    folder: Path

    def copy(self, tablespace: str = "pg_default") -> "Stage":
        """Return a stage with a copy of the database that no app has used yet."""
        return replace(self, database=self.server.new_database(self.database, tablespace))

    def empty(self) -> "Stage":
        """Return a stage with an empty database, without migrations."""
        return replace(self, database=self.server.new_database())

    def url(self, port: int | None = None) -> str:
        """Return the database's URL. port: of a proxy or pooler in front of it."""
        return self.server.url(port=port, database=self.database)

    def app(
        self, name: str, port: int | None = None, *, workers: int = 1, **settings: str
    ) -> AbstractContextManager[AppServer]:
        """Serve the project. name: of its log. port: see `url`."""
        return app_server(
            self.project,
            self.url(port),
            self.folder / f"{self.database}-{name}.log",
            {"DB_POOL_SIZE": str(POOL_SIZE), **settings},
            workers=workers,
        )

    def migrate(self, project: Project | None = None) -> Outcome:
        """Migrate the database as an operator would. project: where to take migrations from."""
        project = project or self.project
        operator = Project(project.path, {**project.environment, "DATABASE_URL": self.url()})
        return operator.run(str(self.project.python), "manage.py", "migrate")

    def ask(self, sql: str, *values: object) -> list[tuple[object, ...]]:
        return self.server.ask(sql, *values, database=self.database)

    def titles(self) -> list[str]:
        """Return the titles of all tasks."""
        return [str(title) for (title,) in self.ask("SELECT title FROM tasks")]

    @contextmanager
    def locked(self, table: str, mode: str = "ACCESS EXCLUSIVE") -> Iterator[None]:
        """Lock a table. mode: of PostgreSQL; the default makes all queries of the table wait."""
        with closing(psycopg2.connect(self.url())) as connection, connection.cursor() as cursor:
            cursor.execute(f"LOCK TABLE {table} IN {mode} MODE")
            yield
            connection.rollback()

    def active(self) -> list[int]:
        """Return the pids of the other backends that execute a statement."""
        rows = self.ask(
            "SELECT pid FROM pg_stat_activity WHERE state = 'active'"
            " AND datname = current_database() AND pid <> pg_backend_pid()"
        )
        return [pid for (pid,) in rows if isinstance(pid, int)]

    def waiting(self) -> list[int]:
        """Return the pids of backends that wait for a lock."""
        rows = self.ask(
            "SELECT pid FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        return [pid for (pid,) in rows if isinstance(pid, int)]


@contextmanager
def new_stage(
    project: Project, folder: Path, wrapper: Sequence[str] = (), **settings: object
) -> Iterator[Stage]:
    """Start a server for a project, and migrate a database on it.

    folder: for the logs. wrapper, settings: see `postgres_server`.
    """
    with postgres_server(settings=settings, wrapper=wrapper) as server:
        stage = Stage(project, server, server.new_database(), folder)
        outcome = stage.migrate()
        assert outcome.code == 0, outcome.output
        yield stage
