"""Copies the rows of tables from one database into another, in one transaction.

It uses COPY, table by table in the order that foreign keys need, and reads from one snapshot. The
caller commits. Whatever would lose or hide rows, such as a trigger or a policy, is an error.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import psycopg2
import sqlalchemy as sa
from alembic.util import CommandError
from psycopg2 import sql

from postgres.connect import Connection
from postgres.explain import explain
from postgres.url import DatabaseUrl

COPY_LOCK_WAIT = "10s"
CHUNK_BYTES = 65_536
# Both databases read and write values in the same format, no rows are hidden, and no time limit of
# a server ends the transaction while the other server is slow.
TRANSACTION = f"""
SET LOCAL datestyle = 'ISO, YMD';
SET LOCAL intervalstyle = 'postgres';
SET LOCAL extra_float_digits = 3;
SET LOCAL row_security = off;
SET LOCAL statement_timeout = 0;
SET LOCAL idle_in_transaction_session_timeout = 0;
SET LOCAL lock_timeout = '{COPY_LOCK_WAIT}'
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
COPIED_COLUMNS = """
SELECT attname FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
ORDER BY attnum
"""
SEQUENCES = """
SELECT pg_get_serial_sequence(%s, attname) AS name FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""
# NULL for an empty table; true if the latest migration wrote every row.
IS_MIGRATED = "SELECT bool_and(xmin = ANY (SELECT xmin FROM alembic_version)) FROM {}"

NOTHING_COPIED = "nothing was copied"


class CopyError(Exception):
    """Why a copy failed, and what is true of it now.

    problem: what went wrong. outcome: whether rows were copied. advice: what to do. message: the
    database's own error, without secrets.
    """

    def __init__(
        self,
        problem: str,
        *,
        outcome: str = NOTHING_COPIED,
        advice: str = "",
        message: str = "",
    ) -> None:
        super().__init__(f"{problem}; {outcome}")
        self.problem = problem
        self.outcome = outcome
        self.advice = advice
        self.message = message


@contextmanager
def naming_database(url: DatabaseUrl, *, outcome: str = NOTHING_COPIED) -> Iterator[None]:
    """Turn an error of a database, or of its migrations, into a CopyError that names it."""
    try:
        yield
    except (psycopg2.Error, TimeoutError, sa.exc.DBAPIError, CommandError) as error:
        finding = explain(error, url)
        raise CopyError(
            f"{place(url)}: {finding.cause}",
            outcome=outcome,
            advice=finding.advice,
            message=finding.message,
        ) from error


def place(url: DatabaseUrl) -> str:
    """Return which database a URL names, to be shown."""
    return f"{url.address}/{url.database}"


@dataclass(frozen=True)
class End:
    """One of the two databases, and a connection to it. Every method raises CopyError."""

    url: DatabaseUrl
    connection: Connection

    @contextmanager
    def cursor(self) -> Iterator[Any]:
        with naming_database(self.url), self.connection.cursor() as cursor:
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
        with naming_database(self.url):
            self.connection.commit()


@dataclass
class Progress:
    """How far a copy has got. rows: copied so far, by table."""

    rows: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.rows:
            return "copying"
        table, rows = next(reversed(self.rows.items()))
        return f"copying {table}: {rows:,} rows"


class CountingPipe:
    """The file that COPY writes to, one row per call. It counts them."""

    def __init__(self, pipe: IO[bytes], progress: Progress, table: str) -> None:
        self._pipe = pipe
        self._rows = progress.rows
        self._table = table

    def write(self, row: bytes) -> None:
        self._pipe.write(row)
        self._rows[self._table] += 1


def find_missing(target: End, metadata: sa.MetaData) -> list[str]:
    """Return the names of the tables that do not exist yet.

    Raises CopyError if the others have rows.
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
    new_tables: Collection[str] = (),
) -> list[str]:
    """Copy all rows of the metadata's tables, and set their sequences.

    Takes effect with `target.commit()`. new_tables: those that find_missing() found before the
    migrations ran; rows that migrations inserted into them are replaced. Returns the source's
    tables that are not in the metadata. Raises CopyError.
    """
    tables = metadata.sorted_tables
    with naming_database(source.url):
        source.connection.rollback()
        source.connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
    for end in (source, target):
        with naming_database(end.url):
            end.connection.set_client_encoding("UTF8")
        end.ask(TRANSACTION)
    lock(target, tables)
    remove_migrated_rows(target, tables, new_tables)
    for table in tables:
        copy_table(source, target, table, progress)
    for table in tables:
        copy_sequences(source, target, table)
        target.ask(sql.SQL("ANALYZE {}").format(name_of(table)))
    known = [name_of(table).as_string(source.connection) for table in tables]
    return [name for (name,) in source.ask(OTHER_TABLES, known)]


def lock(target: End, tables: Sequence[sa.Table]) -> None:
    """Keep everybody else from writing to the tables."""
    names = sql.SQL(", ").join(map(name_of, tables))
    target.ask(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(names))


def remove_migrated_rows(
    target: End, tables: Sequence[sa.Table], new_tables: Collection[str]
) -> None:
    """Remove the rows that migrations inserted. Raises CopyError if there are others.

    The tables are locked. Those in `new_tables` did not exist when this run began. If their rows
    come from the same transaction as the row in alembic_version, they are nobody's data.
    """
    migrated = []
    for table in tables:
        is_migrated = sql.SQL(IS_MIGRATED).format(name_of(table))
        if table.fullname in new_tables and target.ask(is_migrated) == [(True,)]:
            migrated.append(table)
    refuse_rows(target, [table for table in tables if table not in migrated])
    if migrated:
        # All tables in one statement, since foreign keys connect them. It fails if a table that is
        # in no model has such a key.
        names = sql.SQL(", ").join(map(name_of, tables))
        target.ask(sql.SQL("TRUNCATE {}").format(names))


def refuse_rows(target: End, tables: Sequence[sa.Table]) -> None:
    """Raise CopyError if a table has rows."""
    has_rows = sql.SQL("SELECT EXISTS (SELECT FROM {})")
    full = [
        table.fullname
        for table in tables
        if target.ask(has_rows.format(name_of(table))) == [(True,)]
    ]
    if full:
        raise CopyError(
            f"{place(target.url)} has rows already, in {', '.join(full)}",
            advice="use an empty database",
        )


def copy_table(source: End, target: End, table: sa.Table, progress: Progress) -> None:
    """Copy a table's rows: one server sends them while the other one receives them."""
    # All columns of the source, also those of no model: if the target lacks one, it is an error.
    found = source.ask(COPIED_COLUMNS, name_of(table).as_string(source.connection))
    columns = [sql.Identifier(column) for (column,) in found]
    parts = {"table": name_of(table), "columns": sql.SQL(", ").join(columns)}
    send = sql.SQL("COPY (SELECT {columns} FROM {table}) TO STDOUT").format(**parts)
    receive = sql.SQL("COPY {table} ({columns}) FROM STDIN").format(**parts)
    progress.rows[table.fullname] = 0
    reading, writing = os.pipe()

    def send_rows() -> None:
        with os.fdopen(writing, "wb") as pipe, source.cursor() as cursor:
            cursor.copy_expert(send, CountingPipe(pipe, progress, table.fullname))

    with ThreadPoolExecutor(1) as sender:
        sent = sender.submit(send_rows)
        # If receiving fails, the closed pipe ends the sending. If sending fails, receiving ends as
        # if all rows had come: only the sender's result shows it.
        with os.fdopen(reading, "rb") as pipe, target.cursor() as cursor:
            cursor.copy_expert(receive, pipe, size=CHUNK_BYTES)
        sent.result()
    ((arrived,),) = target.ask(sql.SQL("SELECT count(*) FROM {}").format(name_of(table)))
    rows = progress.rows[table.fullname]
    if arrived != rows:
        raise CopyError(
            f"{table.fullname}: {rows:,} rows were sent, but {arrived:,} arrived",
            advice="look for a trigger or a rule on that table in the new database",
        )


def copy_sequences(source: End, target: End, table: sa.Table) -> None:
    """Continue with the source's next numbers. A rollback does not undo this."""
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
    return sql.Identifier(thing.schema, thing.name) if thing.schema else sql.Identifier(thing.name)
