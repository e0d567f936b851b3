"""Migrates a database that may be asleep, within a time limit."""

from collections.abc import Callable

import psycopg2
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from postgres.connect import TOTAL_SECONDS, Connection, TimeBudget, abort, log_in
from postgres.console import Waiting, fail
from postgres.explain import explain
from postgres.url import DatabaseUrl

# The advice of a finding is about DATABASE_URL.
DIRECT_ADVICE = "correct DATABASE_URL_DIRECT, or remove it"


def bring_up_to_date(
    url: DatabaseUrl,
    upgrade: Callable[[DatabaseUrl, Connection], None],
    timeout: float = 600,
    *,
    named: DatabaseUrl,
) -> None:
    """Apply the missing migrations. Ends the command with a message if that fails.

    timeout: seconds. named: DATABASE_URL, which may be a pooled host.
    """
    connection = None
    try:
        with Waiting("waiting for the database") as waiting:
            connection = log_in(url, TimeBudget(url, waiting, TOTAL_SECONDS))
        with Waiting("migrating") as waiting:
            budget = TimeBudget(url, waiting, timeout)
            budget.run(lambda: upgrade(url, connection), timeout)
    except (CommandError, DBAPIError, psycopg2.Error, TimeoutError) as error:
        if connection is not None and isinstance(error, TimeoutError):
            abort(connection)
            advice = (
                "`uv run manage.py check` says whether it is done; --timeout gives it more time"
            )
            fail(f"{url.address}: gave up after {timeout:.0f} s", advice=advice)
        finding = explain(error, url)
        is_unsure = connection is not None and finding.is_outage  # it may have been committing
        outcome = "migrations may have been applied" if is_unsure else "no migration was applied"
        problem, advice = f"{url.address}: {finding.cause}; {outcome}", finding.advice
        if named.is_pooled and named.direct == url:
            problem += (
                "; migrations use the direct host, because a transaction pooler does not keep"
                " sessions"
            )
        elif url != named:
            problem += "; migrations use DATABASE_URL_DIRECT"
            advice = DIRECT_ADVICE
        fail(problem, advice=advice, error=finding.message)
