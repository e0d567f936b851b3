"""Helpers that query an engine on an event loop, and within a time limit."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, Protocol

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from postgres import deadline


class Run(Protocol):
    """Runs a coroutine on a new event loop."""

    def __call__[T](self, main: Coroutine[Any, Any, T]) -> T: ...


def time_limit(seconds: float) -> AbstractContextManager[None]:
    """Limit the time of queries in the block, as for a request."""
    return deadline.time_limit(deadline.Deadline(seconds))


async def scalar(engine: AsyncEngine, sql: str = "SELECT 42", **values: object) -> Any:
    """Run a query in a transaction. Returns the first value."""
    async with engine.connect() as connection:
        return await connection.scalar(text(sql), values)


async def wait_until(question: Callable[[], object]) -> None:
    """Call `question` until its result is true. Raises TimeoutError."""
    async with asyncio.timeout(10):
        while not question():  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0.01)


async def wait_until_true(engine: AsyncEngine, sql: str, **values: object) -> None:
    """Repeat a query until its result is true. Raises TimeoutError."""
    async with asyncio.timeout(10):
        while not await scalar(engine, sql, **values):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
