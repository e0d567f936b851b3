"""Copies the data of one database into another: all rows of all tables, or none.

The tables are those of the models: one that is added there is copied, too. Rows go by COPY, in the
order that foreign keys want, out of one snapshot and into one transaction, which is not committed
here. What would drop or hide rows, such as a trigger or a policy, is an error.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Self

import psycopg2
import sqlalchemy as sa
from psycopg2 import sql

from postgres.connect import Connection, TimeBudget, abort, log_in
from postgres.url import DatabaseUrl

LOCK_WAIT = "10s"
CHUNK = 65_536  # bytes
# Both ends write and read values in the same way, no rows are hidden, and nobody's own limits end
# a transaction that the other end keeps waiting.
TRANSACTION = f"""
SET LOCAL datestyle = 'ISO, YMD';
SET LOCAL intervalstyle = 'postgres';
SET LOCAL extra_float_digits = 3;
SET LOCAL row_security = off;
SET LOCAL statement_timeout = 0;
SET LOCAL idle_in_transaction_session_timeout = 0;
SET LOCAL lock_timeout = '{LOCK_WAIT}'
"""
OTHER_CLIENTS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
OTHER_TABLES = """
SELECT format('%%I.%%I', nspname, relname)
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind IN ('r', 'p') AND NOT relispartition AND relname <> 'alembic_version'
  AND nspname !~ '^pg_' AND nspname <> 'information_schema'
  AND pg_class.oid <> ALL (%s::regclass[])
ORDER BY 1
"""
COLUMNS = """
SELECT attname FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
ORDER BY attnum
"""
SEQUENCES = """
SELECT pg_get_serial_sequence(%s, attname) AS name FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""
# NULL of an empty table; true where the migration that was run last wrote every row.
IS_MIGRATED = "SELECT bool_and(xmin = ANY (SELECT xmin FROM alembic_version)) FROM {}"


class CopyRefused(Exception):
    """The two databases are not what a copy needs. It says why."""


class EndFailed(Exception):
    """The database at `url` failed; the cause is psycopg2's error, or a TimeoutError."""

    def __init__(self, url: DatabaseUrl) -> None:
        super().__init__(str(url))
        self.url = url


@contextmanager
def failing_at(url: DatabaseUrl) -> Iterator[None]:
    """Tell which of the two databases an error comes from. Raises EndFailed."""
    try:
        yield
    except (psycopg2.Error, TimeoutError) as error:
        raise EndFailed(url) from error


@dataclass(frozen=True)
class End:
    """One of the two databases, and a connection to it. Every method raises EndFailed."""

    url: DatabaseUrl
    connection: Connection

    @classmethod
    def log_in(cls, url: DatabaseUrl, budget: TimeBudget) -> Self:
        with failing_at(url):
            return cls(url, log_in(url, budget))

    @contextmanager
    def cursor(self) -> Iterator[Any]:
        with failing_at(self.url), self.connection.cursor() as cursor:
            yield cursor

    def ask(self, query: str | sql.Composable, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement. Returns its rows, if it has any."""
        with self.cursor() as cursor:
            cursor.execute(query, values or None)
            return cursor.fetchall() if cursor.description else []

    def other_clients(self) -> int:
        """Return how many other connections this database has."""
        ((number,),) = self.ask(OTHER_CLIENTS)
        return int(number)

    def commit(self) -> None:
        with failing_at(self.url):
            self.connection.commit()

    def hang_up(self) -> None:
        """End whatever it waits for, in another thread, too. Raises nothing."""
        abort(self.connection)


@dataclass
class Progress:
    """How far a copy is. rows: of each table that was begun, by its name."""

    rows: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.rows:
            return "copying"
        table, rows = next(reversed(self.rows.items()))
        return f"copying {table}: {rows:,} rows"


class Meter:
    """Where COPY writes to, one row at a time."""

    def __init__(self, pipe: IO[bytes], progress: Progress, table: str) -> None:
        self._pipe = pipe
        self._rows = progress.rows
        self._table = table

    def write(self, row: bytes) -> None:
        self._pipe.write(row)
        self._rows[self._table] += 1


def find_missing(target: End, metadata: sa.MetaData) -> list[str]:
    """Return the names of the tables that are yet to be made.

    Raises EndFailed, and CopyRefused where the others have rows.
    """
    missing: list[sa.Table] = []
    present: list[sa.Table] = []
    for table in metadata.sorted_tables:
        name = name_of(table).as_string(target.connection)
        is_missing = target.ask("SELECT to_regclass(%s)", name) == [(None,)]
        (missing if is_missing else present).append(table)
    target.ask(TRANSACTION)
    refuse_rows(target, present)
    return [table.fullname for table in missing]


def copy_rows(
    source: End,
    target: End,
    metadata: sa.MetaData,
    progress: Progress,
    made: Collection[str] = (),
) -> list[str]:
    """Copy all rows of the metadata's tables, and set the sequences behind them.

    Nothing of it is there before `target.commit()`. made: tables that `find_missing` found before
    the migrations: what those inserted there makes room. Returns the tables of the source that the
    metadata does not have. Raises CopyRefused and EndFailed.
    """
    tables = metadata.sorted_tables
    with failing_at(source.url):
        source.connection.rollback()
        source.connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
    for end in (source, target):
        with failing_at(end.url):
            end.connection.set_client_encoding("UTF8")
        end.ask(TRANSACTION)
    lock(target, tables)
    make_room(target, tables, made)
    for table in tables:
        copy_table(source, target, table, progress)
    for table in tables:
        copy_sequences(source, target, table)
        target.ask(sql.SQL("ANALYZE {}").format(name_of(table)))
    known = [name_of(table).as_string(source.connection) for table in tables]
    return [name for (name,) in source.ask(OTHER_TABLES, known)]


def lock(target: End, tables: Sequence[sa.Table]) -> None:
    """Keep everybody else from writing there."""
    names = sql.SQL(", ").join(map(name_of, tables))
    target.ask(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(names))


def make_room(target: End, tables: Sequence[sa.Table], made: Collection[str]) -> None:
    """Remove the rows that a migration inserted. Raises CopyRefused where there are others.

    The tables are locked. Those in `made` were not there when this run began, so what one and the
    same transaction wrote into them and into alembic_version is nobody's data.
    """
    is_migrated = sql.SQL(IS_MIGRATED)
    migrated = [
        table
        for table in tables
        if table.fullname in made and target.ask(is_migrated.format(name_of(table))) == [(True,)]
    ]
    refuse_rows(target, [table for table in tables if table not in migrated])
    if migrated:
        # All of them, and in one go: keys point from one to the other. A table that is no model's,
        # and has such a key, makes it an error.
        names = sql.SQL(", ").join(map(name_of, tables))
        target.ask(sql.SQL("TRUNCATE {}").format(names))


def refuse_rows(target: End, tables: Sequence[sa.Table]) -> None:
    """Raise CopyRefused where rows are there already."""
    has_rows = sql.SQL("SELECT EXISTS (SELECT FROM {})")
    full = [
        table.fullname
        for table in tables
        if target.ask(has_rows.format(name_of(table))) == [(True,)]
    ]
    if full:
        place = f"{target.url.address}/{target.url.database}"
        raise CopyRefused(f"{place} has rows already, in {', '.join(full)}: take an empty database")


def copy_table(source: End, target: End, table: sa.Table, progress: Progress) -> None:
    """Have one server send a table's rows while the other one takes them."""
    # All that the source has, whether a model knows it or not: what has no place is an error.
    found = source.ask(COLUMNS, name_of(table).as_string(source.connection))
    columns = [sql.Identifier(column) for (column,) in found]
    parts = {"table": name_of(table), "columns": sql.SQL(", ").join(columns)}
    send = sql.SQL("COPY (SELECT {columns} FROM {table}) TO STDOUT").format(**parts)
    take = sql.SQL("COPY {table} ({columns}) FROM STDIN").format(**parts)
    progress.rows[table.fullname] = 0
    reading, writing = os.pipe()

    def send_rows() -> None:
        with os.fdopen(writing, "wb") as pipe, source.cursor() as cursor:
            cursor.copy_expert(send, Meter(pipe, progress, table.fullname))

    with ThreadPoolExecutor(1) as sender:
        sent = sender.submit(send_rows)
        # Where taking fails, the closed pipe ends the sending. Where sending fails, taking ends as
        # if that were all: only the sender's result tells.
        with os.fdopen(reading, "rb") as pipe, target.cursor() as cursor:
            cursor.copy_expert(take, pipe, size=CHUNK)
        sent.result()
    ((arrived,),) = target.ask(sql.SQL("SELECT count(*) FROM {}").format(name_of(table)))
    rows = progress.rows[table.fullname]
    if arrived != rows:
        raise CopyRefused(
            f"{table.fullname}: {rows:,} rows were sent, and {arrived:,} are there: look for a"
            " trigger or a rule on the new database"
        )


def copy_sequences(source: End, target: End, table: sa.Table) -> None:
    """Have the next numbers be those of the source. This is not undone by a rollback."""
    name = name_of(table).as_string(source.connection)
    owned = {sequence for (sequence,) in source.ask(SEQUENCES, name, name) if sequence is not None}
    named = {
        name_of(column.default).as_string(source.connection)
        for column in table.columns
        if isinstance(column.default, sa.Sequence)
    }
    for sequence in sorted(owned | named):  # names come quoted
        state = sql.SQL("SELECT last_value, is_called FROM {}").format(sql.SQL(sequence))
        ((value, is_called),) = source.ask(state)
        target.ask("SELECT setval(%s, %s, %s)", sequence, value, is_called)


def name_of(thing: sa.Table | sa.Sequence) -> sql.Identifier:
    return sql.Identifier(*filter(None, (thing.schema, thing.name)))
