"""The time limit for what a task, such as a request, does in the database."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Deadline:
    """When a task's database work must be done: some seconds after it began."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at: float | None = None

    def at(self) -> float:
        """Return the deadline on the event loop's clock. The seconds count from the first call."""
        if self._at is None:
            self._at = asyncio.get_running_loop().time() + self._seconds
        return self._at


deadline: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def current_deadline() -> float | None:
    """Return the current task's deadline on the event loop's clock, None for no limit."""
    limit = deadline.get()
    return limit.at() if limit else None


@contextmanager
def time_limit(limit: Deadline) -> Iterator[None]:
    """Limit all database work of this task inside the block.

    What takes longer raises sqlalchemy.exc.OperationalError, and the server cancels it too. There,
    it replaces any other statement_timeout, such as the role's or one in the URL.
    """
    reset = deadline.set(limit)
    try:
        yield
    finally:
        deadline.reset(reset)
