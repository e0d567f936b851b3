"""How these tests ask an engine: on an event loop, and within a time limit."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, Protocol

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from postgres import deadline


class Run(Protocol):
    """Runs a coroutine on an event loop of its own."""

    def __call__[T](self, main: Coroutine[Any, Any, T]) -> T: ...


def time_limit(seconds: float) -> AbstractContextManager[None]:
    """Limit what is asked within, as for a request."""
    return deadline.time_limit(deadline.Deadline(seconds))


async def scalar(engine: AsyncEngine, sql: str = "SELECT 42", **values: object) -> Any:
    """Ask in a transaction. Returns the first value."""
    async with engine.connect() as connection:
        return await connection.scalar(text(sql), values)


async def wait_until(question: Callable[[], object]) -> None:
    """Wait until the answer is a true one. Raises TimeoutError."""
    async with asyncio.timeout(10):
        while not question():  # noqa: ASYNC110  (nobody tells)
            await asyncio.sleep(0.01)


async def wait_until_true(engine: AsyncEngine, sql: str, **values: object) -> None:
    """Wait until the server's answer is a true one. Raises TimeoutError."""
    async with asyncio.timeout(10):
        while not await scalar(engine, sql, **values):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
