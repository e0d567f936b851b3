"""Copies all data of one database into another, empty one: all rows, or none.

The tables are those of the models, so tables that are added there are copied too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import sqlalchemy as sa
import typer

from postgres import check, connect
from postgres.check import Check, StepFailed, check_connection, compare_schema
from postgres.connect import Connection, OnWait, TimeBudget
from postgres.console import Waiting, fail, on_stop
from postgres.copy_tables import (
    NOTHING_COPIED,
    CopyError,
    End,
    Progress,
    copy_rows,
    find_missing,
    naming_database,
    place,
)
from postgres.url import DatabaseUrl

MAYBE_COPIED = "all rows may have been copied: type the same command again to find out"

type History = Callable[[], Sequence[str]]
type OnCheck = Callable[[Check], None]


def copy_database(
    source: DatabaseUrl,
    target: DatabaseUrl,
    metadata: sa.MetaData,
    history: History,
    upgrade: Callable[[DatabaseUrl, Connection], None],
    timeout: float,
) -> None:
    """Check and migrate the target, then copy all rows into it in one transaction.

    history: returns the code's revisions, the newest first. upgrade: migrates a database.
    timeout: seconds for the migrations, and again for the rows. Shows the steps and what was
    copied; ends the command with a message if it fails, or if Ctrl-C stops it.
    """
    progress = Progress()
    try:
        with (
            on_stop(MAYBE_COPIED),
            Waiting("waiting for the database") as screen,
            ExitStack() as stack,
        ):
            waiting = partial(screen.update, screen.what)
            budget = TimeBudget(target, lambda time: screen.update(str(progress), time), timeout)
            with on_stop(NOTHING_COPIED):
                if source.is_same_database(target):
                    advice = "paste the connection string of another database"
                    raise CopyError("source and target are the same database", advice=advice)
                check_target(target, history, screen.show, waiting)
                new_tables = find_new_tables(target.direct, metadata, waiting)
                migrate(
                    target.direct, upgrade, timeout, waiting, partial(screen.update, "migrating")
                )
                screen.show(Check("schema", ok=True, detail=f"migrated to {history()[0]}"))
                old = stack.enter_context(connected(source, waiting))
                new = stack.enter_context(connected(target.direct, waiting))
                check_source(old, history, screen.show, waiting)
                left_out = run_within(
                    timeout, budget, lambda: copy_rows(old, new, metadata, progress, new_tables)
                )
            with naming_database(new.url, outcome=MAYBE_COPIED):
                budget.run(new.commit, connect.TOTAL_SECONDS)
    except CopyError as error:
        fail(str(error), advice=error.advice, error=error.message)
    if left_out:
        typer.echo(f"! not copied, since no model has them: {', '.join(left_out)}")
    width = max(map(len, progress.rows))
    for table, number in progress.rows.items():
        typer.echo(f"✓ {table:<{width}} {number:>9,} {'row' if number == 1 else 'rows'}")
    typer.echo(f"✓ all rows are at {target}")


@contextmanager
def connected(url: DatabaseUrl, on_wait: OnWait) -> Iterator[End]:
    """Yield a connection, and abort it in the end: another thread may still wait for it."""
    with naming_database(url):
        connection = connect.log_in(url, TimeBudget(url, on_wait, connect.TOTAL_SECONDS))
    try:
        yield End(url, connection)
    finally:
        connect.abort(connection)


def run_within[T](timeout: float, budget: TimeBudget, work: Callable[[], T]) -> T:
    try:
        return budget.run(work, timeout)
    except TimeoutError:
        advice = "allow more time: --timeout SECONDS"
        raise CopyError(f"gave up after {timeout:.0f} s", advice=advice) from None


def check_target(target: DatabaseUrl, history: History, on_check: OnCheck, on_wait: OnWait) -> None:
    """Check the connection to the target. Its schema may be behind."""
    for step in check_connection(target, history, on_wait):
        if step.finding and step.finding.name == "schema-behind":
            return
        if step.ok is False:
            # The finding's advice is about DATABASE_URL, which is the source here.
            advice = step.advice.replace("manage.py env", "manage.py copy")
            on_check(replace(step, advice=advice))
            raise CopyError(f"{place(target)} cannot be used")
        on_check(step)


def find_new_tables(target: DatabaseUrl, metadata: sa.MetaData, on_wait: OnWait) -> list[str]:
    """Return the tables that migrations will create. The others must be empty."""
    budget = TimeBudget(target, on_wait, connect.TOTAL_SECONDS)
    with connected(target, on_wait) as end, naming_database(target):
        return budget.run(lambda: find_missing(end, metadata), connect.TOTAL_SECONDS)


def migrate(
    target: DatabaseUrl,
    upgrade: Callable[[DatabaseUrl, Connection], None],
    timeout: float,
    on_connect_wait: OnWait,
    on_wait: OnWait,
) -> None:
    """Run the migrations that the target lacks."""
    with connected(target, on_connect_wait) as end, naming_database(target):
        budget = TimeBudget(target, on_wait, timeout)
        run_within(timeout, budget, lambda: upgrade(target, end.connection))


def check_source(source: End, history: History, on_check: OnCheck, on_wait: OnWait) -> None:
    """Check the source's schema, and whether others may be writing to it."""
    budget = TimeBudget(source.url, on_wait, connect.TOTAL_SECONDS)
    try:
        with naming_database(source.url):
            compare_schema(source.url, source.connection, history, budget)
            others = budget.run(source.other_clients, check.QUERY_SECONDS)
    except StepFailed as failure:
        problem = f"{place(source.url)}: {failure}"
        raise CopyError(problem, advice=failure.finding.advice) from None
    if others:
        detail = f"{others} other connections" if others > 1 else "1 other connection"
        advice = "stop the app: rows that it writes from now on are not copied"
        on_check(Check("source", ok=True, detail=detail, advice=advice))
