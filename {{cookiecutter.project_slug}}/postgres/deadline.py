"""The time limit for what a task, such as a request, does in the database."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy

RESERVE_SECONDS = 1.0  # the server stops this much earlier, so that its answer arrives in time
CLOCK_SECONDS = 300.0  # clocks drift apart by a few milliseconds in that time


class Deadline:
    """When a task's database work must be done: some seconds after it began."""

    statement_seconds = math.inf  # how long the server may work on one statement

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._reserve = min(RESERVE_SECONDS, seconds / 10)
        self._at: float | None = None

    def at(self) -> float:
        """Return the deadline on the event loop's clock. The seconds count from the first call."""
        if self._at is None:
            self._at = asyncio.get_running_loop().time() + self._seconds
        return self._at

    def on_server(self) -> float:
        """Return until when the server may work, on the event loop's clock."""
        return self.at() - self._reserve

    def with_statement_limit(self, seconds: float) -> "Deadline":
        """Return the same deadline, but the server cancels a statement after so many seconds.

        Only the server's work counts, not the time in a pooler's queue.
        """
        self.at()
        limit = copy(self)
        limit.statement_seconds = seconds
        return limit


class ServerClock:
    """How far the server's clock is ahead of the event loop's, in seconds."""

    def __init__(self) -> None:
        self._ahead: float | None = None
        self._learned_at = -math.inf

    def is_outdated(self) -> bool:
        return asyncio.get_running_loop().time() - self._learned_at > CLOCK_SECONDS

    def learn(self, seconds: float) -> None:
        """Take the time that the server has just reported, as seconds since 1970.

        The answer took a while, so the server's clock shows a later time by now. The largest
        difference of several is the best.
        """
        now = asyncio.get_running_loop().time()
        ahead = seconds - now
        if self._ahead is None or ahead > self._ahead or self.is_outdated():
            self._ahead, self._learned_at = ahead, now

    def at(self, moment: float) -> float | None:
        """Return what the server's clock shows at a moment of the event loop's clock.

        None if the server has not been asked yet.
        """
        return None if self._ahead is None else moment + self._ahead


deadline: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def current_deadline() -> float | None:
    """Return the current task's deadline on the event loop's clock, None for no limit."""
    limit = deadline.get()
    return limit.at() if limit else None


@contextmanager
def time_limit(limit: Deadline) -> Iterator[None]:
    """Limit all database work of this task inside the block.

    What takes longer raises sqlalchemy.exc.OperationalError, and the server cancels it too. There,
    it replaces any other statement_timeout or idle_in_transaction_session_timeout, such as the
    role's or one in the URL.
    """
    reset = deadline.set(limit)
    try:
        yield
    finally:
        deadline.reset(reset)
