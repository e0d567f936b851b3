"""Test data shared by all apps: owners with few and with many tasks, in one table."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import NAMESPACE_DNS, uuid5

import psycopg2

from .plan import USUAL_TASKS, Cell

PAGE = 20  # tasks, the apps' default
CROWD = 10_000  # owners
CROWD_TASKS = 100  # per owner
WRITERS_FIRST = 10_000_000  # number of the writer's first task, after all others
BATCH = 100_000  # rows per step of the progress display

# Time-ordered ids, as the apps create them: version 7 UUIDs, one per millisecond.
UUID7 = """(lpad(to_hex(1700000000000 + {n}), 12, '0') || '7' || substr(md5({n}::text), 1, 3)
    || '8' || substr(md5({n}::text), 4, 15))::uuid"""
INSERT_TASKS = f"""
INSERT INTO tasks (id, owner_id, title, description, completed, "order", due_at, created_at)
SELECT {UUID7.format(n="n")}, (%(owners)s::text[])[1 + n %% %(owner_count)s],
    'Task number ' || n, CASE WHEN n %% 3 = 0 THEN repeat('What there is to do. ', 5) END,
    n %% 2 = 0, CASE WHEN n %% 5 = 0 THEN n %% 1000 END,
    CASE WHEN n %% 4 = 0 THEN timestamptz '2030-01-01 12:00Z' + n * interval '1 second' END,
    timestamptz '2025-01-01 12:00Z' + n * interval '1 second'
FROM generate_series(%(first)s, %(first)s + %(count)s - 1) AS n
"""


@dataclass(frozen=True)
class Owner:
    """A user, with the number of their tasks."""

    id: str
    tasks: int


def named(name: str, tasks: int) -> Owner:
    """Return an owner whose id depends only on the name, so that it is the same in every run."""
    return Owner(str(uuid5(NAMESPACE_DNS, name)), tasks)


READER = named("reader", USUAL_TASKS)
WRITER = named("writer", 0)  # all creates, updates and deletes, so that other tasks do not change
CROWD_OWNERS = tuple(named(f"one of many, {number}", CROWD_TASKS) for number in range(CROWD))
VISITORS = tuple(named(f"visitor {number}", 0) for number in range(200))  # log in repeatedly


def owners_of(cell: Cell) -> tuple[Owner, ...]:
    """Return the owners who read. In "growth" they also write, so each size has its own owner."""
    if cell.owners > 1:
        return CROWD_OWNERS
    return (named(f"owner of {cell.tasks}", cell.tasks) if cell.chapter == "growth" else READER,)


def email_of(owner: Owner) -> str:
    return f"{owner.id}@example.com"


class Data:
    """A direct connection to the database, bypassing proxies and apps."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg2.connect(url)
        self._connection.autocommit = True
        self._next = 0

    def execute(self, statement: str, values: Any = None) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def add_owners(self, owners: Sequence[Owner]) -> None:
        """Add users without a password."""
        self.execute(
            "INSERT INTO users (id, email, password_hash, name)"
            " SELECT id::uuid, email, 'none', 'Ada' FROM unnest(%s, %s) AS new (id, email)",
            ([owner.id for owner in owners], [email_of(owner) for owner in owners]),
        )

    def set_password(self, owners: Sequence[Owner], password_hash: str) -> None:
        self.execute(
            "UPDATE users SET password_hash = %s WHERE id = ANY(%s::uuid[])",
            (password_hash, [owner.id for owner in owners]),
        )

    def add_tasks(self, owners: Sequence[Owner], count: int) -> Iterable[int]:
        """Add `count` tasks, spread over the owners. Yields after each batch how many are left."""
        while count:
            step = min(count, BATCH)
            self._insert(owners, self._next, step)
            self._next += step
            count -= step
            yield count

    def _insert(self, owners: Sequence[Owner], first: int, count: int) -> None:
        ids = [owner.id for owner in owners]
        values = {"owners": ids, "owner_count": len(ids), "first": first, "count": count}
        self.execute(INSERT_TASKS, values)

    @contextmanager
    def without_indexes(self) -> Iterator[None]:
        """Drop the indexes and recreate them at the end: faster for many rows."""
        statement = """
            SELECT indexname, indexdef FROM pg_indexes
            WHERE tablename = 'tasks' AND NOT EXISTS
                (SELECT FROM pg_constraint WHERE conname = indexname)
        """
        indexes = self.execute(statement)
        for name, _ in indexes:
            self.execute(f'DROP INDEX "{name}"')
        yield
        self.execute("SET maintenance_work_mem = '512MB'")
        for _, definition in indexes:
            self.execute(definition)

    def settle(self) -> None:
        """Vacuum and checkpoint now, so that the server does not do it during a measurement."""
        self.execute("VACUUM (ANALYZE) tasks")
        self.execute("VACUUM (ANALYZE) users")
        self.execute("CHECKPOINT")

    def ids(self, owner: Owner, limit: int) -> list[str]:
        """Return the ids of an owner's newest tasks."""
        statement = (
            "SELECT id::text FROM tasks WHERE owner_id = %s ORDER BY created_at DESC LIMIT %s"
        )
        return [row[0] for row in self.execute(statement, (owner.id, limit))]

    def before_last_page(self, owners: Sequence[Owner]) -> list[tuple[datetime, str]]:
        """Return date and id of the last task before each owner's last page.

        Owners with at most one page are left out.
        """
        statement = """
            SELECT task.created_at, task.id::text
            FROM unnest(%s) WITH ORDINALITY AS owner (id, place), LATERAL (
                SELECT tasks.created_at, tasks.id FROM tasks WHERE owner_id = owner.id
                ORDER BY tasks.created_at, tasks.id OFFSET %s LIMIT 1
            ) AS task ORDER BY owner.place
        """
        ids = [owner.id for owner in owners]
        return [(created_at, task) for created_at, task in self.execute(statement, (ids, PAGE))]

    def reset(self, owner: Owner) -> None:
        """Delete the tasks that the apps created: they are newer than ours."""
        statement = (
            "DELETE FROM tasks WHERE owner_id = %s AND created_at > now() - interval '1 day'"
        )
        self.execute(statement, (owner.id,))

    def reset_writer(self, tasks: int) -> list[str]:
        """Replace the writer's tasks with `tasks` new ones. Returns their ids."""
        self.execute("DELETE FROM tasks WHERE owner_id = %s", (WRITER.id,))
        if tasks:
            self._insert([WRITER], WRITERS_FIRST, tasks)
        return self.ids(WRITER, tasks)

    def version(self) -> str:
        """Return the server's version, such as "18.6"."""
        return str(self.execute("SHOW server_version")[0][0]).split()[0]

    def close(self) -> None:
        self._connection.close()
