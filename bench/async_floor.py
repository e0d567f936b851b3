"""The *async floor*: the minimum work on the event loop. Not a way to write an app.

The floor without its threads: psycopg2's asynchronous connections, each watched by the event loop.
There are as many as in the generated project's pool, and requests queue for them. A connection
that has its rows sends the next statement at once.

Runs in the generated project's environment, so that both use the same packages.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg2
from floor_routes import CONNECTIONS, URL, Rows, create_app
from psycopg2.extensions import POLL_OK
from psycopg2.extras import RealDictCursor, wait_select
from starlette.applications import Starlette

Answer = asyncio.Future[Rows]


class Connection:
    """A database connection that runs one statement at a time."""

    def __init__(self) -> None:
        connection = psycopg2.connect(URL, async_=1)
        wait_select(connection)
        self.poll = connection.poll
        self.cursor = connection.cursor(cursor_factory=RealDictCursor)
        asyncio.get_running_loop().add_reader(connection.fileno(), self.read)

    def execute(self, statement: str, values: tuple[Any, ...], answer: Answer) -> None:
        """Send a statement. It is small, so the socket accepts it in one write."""
        self.answer = answer
        self.cursor.execute(statement, values)

    def read(self) -> None:
        """Read from the server, and resolve the future once all rows have arrived."""
        try:
            if self.poll() != POLL_OK:
                return
            self.answer.set_result(self.cursor.fetchall())
        except psycopg2.Error as error:
            self.answer.set_exception(error)
        if waiting:
            self.execute(*waiting.popleft())
        else:
            free.append(self)


free: list[Connection] = []
waiting: deque[tuple[str, tuple[Any, ...], Answer]] = deque()


async def send(statement: str, *values: Any) -> Rows:
    answer: Answer = asyncio.get_running_loop().create_future()
    if free:
        free.pop().execute(statement, values, answer)
    else:
        waiting.append((statement, values, answer))
    return await answer


@asynccontextmanager
async def connect(_app: Starlette) -> AsyncIterator[None]:
    free.extend(Connection() for _ in range(CONNECTIONS))
    yield


app = create_app(send, connect)
