"""psycopg2 on the event loop: an asynchronous SQLAlchemy engine without another driver.

psycopg2 calls a *wait callback* whenever it waits for the server. SQLAlchemy's asyncio extension
runs its synchronous code in a greenlet, from which `await_` hands control to the event loop. The
callback here joins the two: while one request waits for PostgreSQL, the others go on, and no
thread takes part. Why: docs/decisions in the template's repository, number 20.

The callback is one for the process. Outside a greenlet, in a thread or a synchronous program, it
waits as psycopg2 does by itself; only COPY is refused while it is set.
"""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import POLL_OK, POLL_READ
from psycopg2.extras import wait_select
from sqlalchemy import URL, AsyncAdaptedQueuePool, Pool
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.util.concurrency import await_, greenlet_spawn, in_greenlet

DRIVER = "psycopg2_asyncio"
CONNECT_SECONDS = 9.0  # for one attempt: a compute that wakes up may take as long
ALONE = ("SAVEPOINT", "ROLLBACK TO", "RELEASE")
PROBE_SECONDS = 3.0  # for one address of a host that has several

# When the current request's work must be done, by the event loop's clock. None: no limit.
deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def wait(connection: Any) -> None:
    """Wait until the server has answered: psycopg2's wait callback.

    Raises psycopg2.OperationalError past the deadline. Whatever is raised here makes psycopg2 close
    the connection: nobody else could use it while an answer is under way.
    """
    if not in_greenlet():
        wait_select(connection)
        return
    loop = asyncio.get_running_loop()
    limit = deadline.get()
    while (state := connection.poll()) != POLL_OK:
        ready = loop.create_future()
        # The descriptor is looked up anew, and let go before psycopg2 goes on, which may close it:
        # its number could then belong to another connection.
        descriptor = connection.fileno()
        add, remove = (
            (loop.add_reader, loop.remove_reader)
            if state == POLL_READ
            else (loop.add_writer, loop.remove_writer)
        )
        add(descriptor, finish, ready)
        timer = loop.call_at(limit, finish, ready, False) if limit is not None else None
        try:
            in_time = await_(ready)
        finally:
            remove(descriptor)
            if timer:
                timer.cancel()
        if not in_time:
            raise psycopg2.OperationalError("timeout expired: the server has not answered in time")


@contextmanager
def waiting_on_event_loop() -> Iterator[None]:
    """Set the wait callback for as long as an engine is in use."""
    before = psycopg2.extensions.get_wait_callback()
    psycopg2.extensions.set_wait_callback(wait)
    try:
        yield
    finally:
        psycopg2.extensions.set_wait_callback(before)


def finish(future: "asyncio.Future[bool]", result: bool = True) -> None:
    if not future.done():
        future.set_result(result)


class Cursor(psycopg2.extensions.cursor):
    """A cursor whose statements end by the deadline on the server, too."""

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002  (psycopg2's name)
        """Execute a statement behind its time limit, in one message: that costs no round trip.

        Not so for a server-side cursor, nor for what has to work in a transaction that has failed.
        LOCAL is over with the statement's own transaction: a pooler hands the connection to others.
        """
        limit = deadline.get()
        if limit is not None and self.name is None and not query.startswith(ALONE):
            query = f"{time_limit(limit)}; {query}"
        super().execute(query, vars)

    async def _async_soft_close(self) -> None:
        """Called by SQLAlchemy; the rows are all here, so there is nothing to wait for."""


def time_limit(limit: float) -> str:
    milliseconds = max(1, int(1000 * (limit - asyncio.get_running_loop().time())))
    if milliseconds > 1000:  # whole seconds: pg_stat_statements lists each number by itself
        milliseconds -= milliseconds % 1000
    return f"SET LOCAL statement_timeout = {milliseconds}"


class AsyncPsycopg2Dialect(PGDialect_psycopg2):
    """SQLAlchemy's psycopg2 dialect for its asyncio extension: `postgresql+psycopg2_asyncio://`."""

    driver = DRIVER
    is_async = True
    has_terminate = True
    supports_statement_cache = True

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:  # noqa: ARG003
        return AsyncAdaptedQueuePool

    @classmethod
    def get_async_dialect_cls(cls, url: URL) -> type["AsyncPsycopg2Dialect"]:  # noqa: ARG003
        return cls

    def connect(self, *arguments: Any, **parameters: Any) -> Any:
        """Connect within `connect_timeout` seconds, to any of the host's addresses.

        libpq itself would block the event loop while it looks up a name, and heeds no time limit
        under a wait callback. Raises psycopg2.OperationalError.
        """
        if psycopg2.extensions.get_wait_callback() is not wait:
            raise RuntimeError(
                "psycopg2 would block the event loop: use the engine within open_engine(…)"
            )
        seconds = float(parameters.pop("connect_timeout", CONNECT_SECONDS))

        def connect() -> Any:
            return super(PGDialect_psycopg2, self).connect(
                *arguments, cursor_factory=Cursor, **parameters
            )

        return await_(within(seconds, connect, parameters))

    def do_terminate(self, dbapi_connection: Any) -> None:
        dbapi_connection.close()  # sends one small packet, and waits for nothing

    def set_isolation_level(self, dbapi_connection: Any, level: Any) -> None:
        """Switch autocommit without a round trip: psycopg2's own setter sends a SET."""
        if level == "AUTOCOMMIT":
            dbapi_connection.autocommit = True
            return
        dbapi_connection.autocommit = False
        super().set_isolation_level(dbapi_connection, level)  # type: ignore[no-untyped-call]


async def within(seconds: float, connect: Callable[[], Any], parameters: dict[str, Any]) -> Any:
    try:
        async with asyncio.timeout(seconds):
            if address := await choose_address(parameters):
                parameters["hostaddr"] = address  # beside the host, which TLS needs
            return await greenlet_spawn(connect)
    except TimeoutError:
        raise psycopg2.OperationalError("timeout expired: no connection in time") from None


async def choose_address(parameters: dict[str, Any]) -> str | None:
    """Return the address to connect to; None where libpq needs no help.

    Of several, it is the first that takes a TCP connection. Raises psycopg2.OperationalError.
    """
    host, port = parameters.get("host") or "", int(parameters.get("port") or 5432)
    if not host or host.startswith("/") or parameters.get("hostaddr"):
        return None
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise psycopg2.OperationalError(
            f'could not translate host name "{host}" to address: {error}'
        ) from None
    *others, last = dict.fromkeys(str(address[0]) for *_, address in found)
    for address in others:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                _, writer = await asyncio.open_connection(address, port)
        except (OSError, TimeoutError):
            continue
        writer.close()
        return address
    return last


registry.register(f"postgresql.{DRIVER}", __name__, "AsyncPsycopg2Dialect")
