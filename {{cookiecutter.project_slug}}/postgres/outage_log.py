"""Logs when the database is lost, and when it is back.

It sends no queries of its own but listens to the app's. So a sleeping database stays asleep, and
the first request that fails reports the outage.
"""

import asyncio
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextvars import Context
from dataclasses import replace
from threading import Thread
from typing import Any

import structlog
from sqlalchemy import ExceptionContext, event, text
from sqlalchemy.ext.asyncio import AsyncEngine
from structlog.typing import FilteringBoundLogger

from postgres.check import (
    LIST_COLUMNS,
    StepFailed,
    check_connection,
    compare_columns,
    compare_revisions,
)
from postgres.deadline import Deadline, time_limit
from postgres.explain import recognize
from postgres.findings import Finding
from postgres.url import DatabaseUrl

QUIET_SECONDS = 10.0  # an unstable connection is logged at most this often
REFUSAL_SECONDS = 60.0  # and a persistent refusal at most this often
LOOK_SECONDS = 5.0  # for the closer look, which a failed request waits for
# The database's revisions, and its columns.
SCHEMA = text("SELECT ARRAY(SELECT version_num FROM alembic_version), ARRAY(" + LIST_COLUMNS + ")")  # noqa: S608  (a constant)

# Returns the revisions that the code knows, the newest first, and the models' columns.
type KnownSchema = Callable[[], tuple[Sequence[str], Collection[str]]]


class Availability:
    """Listens to every query, and logs when the database is lost and when it is back.

    known: for a closer look when a table or a column is missing; called in a thread. name, advice:
    for the log, if this is not the app's main database.
    """

    def __init__(
        self,
        url: DatabaseUrl,
        known: KnownSchema | None = None,
        *,
        name: str = "database",
        advice: str = "",
    ) -> None:
        self._url = url
        self._known = known
        self._name = name
        self._advice = advice
        self._look: asyncio.Task[Finding] | None = None  # the closer look, once there was one
        self._log: FilteringBoundLogger = structlog.get_logger().bind()
        self._lost_at = math.inf  # when the first query of an outage failed
        self._failed_at = math.inf  # when the last one did
        self._failures = 0
        self._is_logged = False  # whether the log has this outage
        self._logged_at: dict[str, float] = {}  # by the finding's name

    def listen_to(self, engine: AsyncEngine) -> None:
        """Listen to the statements of an engine, and to its failed attempts to connect."""

        def note_failure(context: ExceptionContext) -> None:
            self.lost(context.original_exception)

        def note_success(connection: Any, record: Any) -> None:
            if connection is not None and not connection.closed:
                self.back(record.info["taken_at"])

        self._engine = engine
        event.listen(engine.sync_engine, "handle_error", note_failure)
        event.listen(engine.sync_engine, "checkin", note_success)

    def explain(self, error: BaseException) -> Finding | None:
        """Return what an error means, None if it may be a bug. Clients may know its `public`."""
        return recognize(error, self._url)

    async def diagnose(self, error: BaseException) -> Finding | None:
        """Return what an error means, after a closer look if the schema is to blame."""
        finding = self.explain(error)
        if finding and finding.name == "schema-behind" and self._look is not None:
            finding = replace(await asyncio.shield(self._look), message=finding.message)
        return finding

    def lost(self, error: BaseException) -> None:
        """Record a query that failed, unless that was its own fault."""
        finding = self.explain(error)
        if finding is None:
            return
        now = time.monotonic()
        last_logged_at = self._logged_at.get(finding.name, -math.inf)
        if finding.is_outage:
            self._lost_at = min(self._lost_at, now)
            self._failed_at = now
            self._failures += 1
            is_news = last_logged_at < self._lost_at and now - last_logged_at > QUIET_SECONDS
        else:
            is_news = now - last_logged_at > REFUSAL_SECONDS
        if is_news:
            self._logged_at[finding.name] = now
            self._is_logged = self._is_logged or finding.is_outage
            if finding.name == "schema-behind" and self._known is not None:
                # In a context of its own: the request may still hold its connection.
                look = self._look_closer(finding, self._known)
                self._look = asyncio.create_task(look, context=Context())
            else:
                self._log_finding(finding)

    async def _look_closer(self, finding: Finding, known: KnownSchema) -> Finding:
        """Log, and return, whether migrations have not run or were never written."""
        try:
            with time_limit(Deadline(LOOK_SECONDS)):
                async with self._engine.connect() as connection:
                    revisions, columns = (await connection.execute(SCHEMA)).one()
            history, expected = await asyncio.to_thread(known)
            compare_revisions(revisions, lambda: history, self._url)
            compare_columns(expected, columns, self._url)
        except StepFailed as failure:
            finding = replace(failure.finding, cause=str(failure), message=finding.message)
        except Exception:  # noqa: BLE001, S110  (then it is as it seemed)
            pass
        self._log_finding(finding)
        return finding

    def back(self, began: float) -> None:
        """Record a query that succeeded. began: when it was sent, by time.monotonic().

        A query that was already running when another one failed proves nothing.
        """
        if began <= self._failed_at:  # always so while all is well
            return
        if self._is_logged:
            seconds = round(time.monotonic() - self._lost_at, 1)
            self._log.info(f"{self._name} back", after_s=seconds, failed=self._failures)
        self._lost_at = self._failed_at = math.inf
        self._failures = 0
        self._is_logged = False

    def _log_finding(self, finding: Finding) -> None:
        self._log.error(
            f"{self._name} lost" if finding.is_outage else f"{self._name} refuses",
            finding=finding.name,
            cause=finding.cause,
            advice=self._advice or finding.advice,
            error=finding.message,
            database=self._url.address,
        )


def look_once(
    url: DatabaseUrl,
    history: Callable[[], Sequence[str]],
    columns: Callable[[], Collection[str]] = list,
) -> Thread:
    """Check the connection once, in the background, and log what is wrong with it.

    For `uv run main.py`, whose user watches the log. It wakes up a sleeping database.
    history, columns: as for check.check_connection().
    """
    log: FilteringBoundLogger = structlog.get_logger().bind()

    def look() -> None:
        for step in check_connection(url, history, lambda _seconds: None, columns):
            if step.finding:
                log.error(
                    "database not ready",
                    finding=step.finding.name,
                    cause=step.detail,
                    advice=step.advice,
                    error=step.finding.message,
                    database=url.address,
                )

    thread = Thread(target=look, daemon=True)
    thread.start()
    return thread
