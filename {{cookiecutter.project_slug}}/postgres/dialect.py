"""psycopg2 on the event loop: an asynchronous SQLAlchemy engine without another driver.

psycopg2 calls a *wait callback* whenever it waits for the server. SQLAlchemy's asyncio extension
runs its synchronous code in a greenlet, from which `await_` hands control to the event loop. The
callback in this module connects the two: while one request waits for PostgreSQL, the others go on,
without threads. Why: docs/decisions in the template's repository, number 20.

There is one callback per process. Outside a greenlet, in a thread or a synchronous program, it
waits as psycopg2 does by default. While it is set, psycopg2 refuses COPY.
"""

import asyncio
import math
import select
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import psycopg2
import psycopg2.extensions
from anyio.abc import SocketAttribute
from psycopg2.extensions import (
    POLL_OK,
    POLL_READ,
    STATUS_BEGIN,
    STATUS_READY,
    TRANSACTION_STATUS_ACTIVE,
    TRANSACTION_STATUS_INTRANS,
)
from psycopg2.extras import wait_select
from sqlalchemy import URL, AsyncAdaptedQueuePool, Pool
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.util.concurrency import await_, greenlet_spawn, in_greenlet

from postgres.deadline import Deadline, ServerClock, current_deadline, deadline

DRIVER = "psycopg2_asyncio"
IDLE_TIMEOUT = "idle_in_transaction_session_timeout"
ATTEMPT_SECONDS = 9.0  # for one attempt: a compute may take that long to wake up


class Connection(psycopg2.extensions.connection):
    """A connection whose socket the event loop watches until it is closed.

    That notices when the server closes an idle connection. It also saves time: to add the socket
    to the loop for each answer would take a fifth of the time of a short statement.
    """

    has_news = False  # the server sent something unasked, such as the end of the connection
    _loop: asyncio.AbstractEventLoop | None = None
    _watched: int | None = None  # the socket's descriptor while it is watched
    _answer: "asyncio.Future[bool] | None" = None  # pending while a statement waits
    pending: "asyncio.Future[bool] | None" = None  # while psycopg2 waits, and holds its lock
    clock: ServerClock
    idle_limit = math.inf  # seconds after which the server ends a transaction without a statement

    def answer(self) -> "asyncio.Future[bool]":
        """Return a future that becomes true when the server has sent something."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # in tests, each client may have its own
            self.unwatch()
        self.watch()
        self._answer = loop.create_future()
        if is_readable(self):  # uvloop reports a reset connection only once
            loop.call_soon(resolve, self._answer)
        return self._answer

    def watch(self) -> None:
        if self._watched is None:
            self._loop, self._watched = asyncio.get_running_loop(), self.fileno()
            self._loop.add_reader(self._watched, self._notice)

    def _notice(self) -> None:
        if self._answer is not None:
            resolve(self._answer)
        elif is_readable(self):  # not an outdated event for data that was read already
            self.has_news = True
            self.unwatch()

    def forget_answer(self) -> None:
        self._answer = None
        if self.status not in {STATUS_READY, STATUS_BEGIN}:  # libpq may switch to another socket
            self.unwatch()

    def unwatch(self) -> None:
        """Stop watching the socket before it is closed: a new one may get its descriptor."""
        if self._loop is not None and self._watched is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._watched)
            self._watched = None

    # While a task waits for the server, psycopg2 locks the connection. If another task committed,
    # rolled back or closed it, that would wait for the lock, and the event loop with it, forever.

    def commit(self) -> None:
        if self.pending:
            raise psycopg2.ProgrammingError("cannot commit while another task sends a statement")
        if limit := deadline.get():
            self._limit_commit(limit.at())
        super().commit()

    def _limit_commit(self, limit: float) -> None:
        """Make sure that a COMMIT that is held up on its way cannot succeed after the deadline.

        The server ends a transaction that has been idle for `idle_limit`. That may be too late, if
        the last statement took long, or was a while ago.
        """
        clock = asyncio.get_running_loop().time
        while (
            self.get_transaction_status() == TRANSACTION_STATUS_INTRANS
            and clock() + self.idle_limit > limit
        ):
            self.idle_limit = (limit - clock()) / 2  # the rest is for the answer
            with self.cursor(cursor_factory=psycopg2.extensions.cursor) as cursor:
                cursor.execute(f"SET LOCAL {IDLE_TIMEOUT} = {milliseconds(self.idle_limit)}")

    def rollback(self) -> None:
        if self.pending:
            self.interrupt()
        else:
            super().rollback()

    def close(self) -> None:
        if self.pending:
            self.interrupt()
        self.unwatch()
        super().close()

    def read_clock(self) -> None:
        with self.cursor() as cursor:
            cursor.execute("SELECT date_part('epoch', clock_timestamp())")
            ((seconds,),) = cursor.fetchall()
        self.clock.learn(seconds)

    def interrupt(self) -> None:
        """Raise an error in the task that waits, which makes psycopg2 close the connection."""
        while self.pending:
            if not self.pending.done():
                error = psycopg2.ProgrammingError("another task closed this connection or session")
                self.pending.set_exception(error)
            await_(asyncio.sleep(0))


def is_readable(connection: Connection) -> bool:
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([connection], [], [], 0)[0])  # Windows


def wait(connection: Any) -> None:
    """Wait until the server has answered: psycopg2's wait callback.

    Raises psycopg2.OperationalError past the deadline. Any exception here makes psycopg2 close the
    connection, which could not be reused while an answer is pending.
    """
    if not (isinstance(connection, Connection) and in_greenlet()):
        wait_select(connection)
        return
    try:
        while (state := connection.poll()) != POLL_OK:
            wait_for(connection, state)
        if connection.get_transaction_status() == TRANSACTION_STATUS_ACTIVE:
            raise psycopg2.NotSupportedError(
                "the app's process cannot COPY, not even in a thread: use a command of manage.py,"
                " or another process of its own"
            )
    except BaseException:
        connection.unwatch()
        raise


def wait_for(connection: Connection, state: int) -> None:
    """Wait until the socket is readable or writable. Raises psycopg2.OperationalError."""
    loop = asyncio.get_running_loop()
    limit = current_deadline()
    if state == POLL_READ:
        ready = connection.answer()
    else:
        ready, descriptor = loop.create_future(), connection.fileno()
        loop.add_writer(descriptor, resolve, ready)
    timer = loop.call_at(limit, resolve, ready, False) if limit is not None else None
    connection.pending = ready
    try:
        in_time = await_(ready)
    finally:
        connection.pending = None
        connection.forget_answer()
        if state != POLL_READ:
            loop.remove_writer(descriptor)
        if timer:
            timer.cancel()
    if not in_time:
        raise psycopg2.OperationalError("timeout expired: the server did not answer in time")


open_engines = 0


@contextmanager
def waiting_on_event_loop() -> Iterator[None]:
    """Set the wait callback while an engine is in use.

    Raises RuntimeError on Windows' default event loop.
    """
    if sys.platform == "win32" and isinstance(
        asyncio.get_running_loop(), asyncio.ProactorEventLoop
    ):
        raise RuntimeError(
            "this event loop cannot watch psycopg2's sockets: use `uv run main.py`, or"
            " `uvicorn --loop asyncio:SelectorEventLoop`"
        )
    global open_engines  # noqa: PLW0603  (as the callback, it is one for the process)
    open_engines += 1
    psycopg2.extensions.set_wait_callback(wait)
    try:
        yield
    finally:
        open_engines -= 1
        if not open_engines:
            psycopg2.extensions.set_wait_callback(None)


def resolve(future: "asyncio.Future[bool]", result: bool = True) -> None:
    if not future.done():
        future.set_result(result)


class Cursor(psycopg2.extensions.cursor):
    """A cursor whose statements the server also cancels at the deadline.

    The time limit and the statement are one message, which costs no extra round trip. The limits
    end with the transaction, so a pooler does not leak them. Why: docs/decisions in the template's
    repository, number 30.
    """

    connection: Connection

    WITHOUT_LIMIT = ("SAVEPOINT", "ROLLBACK TO", "RELEASE")  # must work in a failed transaction

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002  (psycopg2's name)
        """Send a statement with a time limit, unless it is one of a server-side cursor."""
        limit = deadline.get()
        if limit is None or self.name is not None or not isinstance(query, str):
            self.connection.idle_limit = math.inf
            super().execute(query, vars)
        elif not self.connection.autocommit:
            if query.startswith(self.WITHOUT_LIMIT):
                self.connection.idle_limit = math.inf  # what it was may be restored
                super().execute(query, vars)
            else:
                super().execute(self._limit_transaction(limit) + query, vars)
        elif query.startswith("SELECT"):
            super().execute(f"{set_timeout(limit)}; {query}", vars)
        else:
            self._change(query, vars, limit)

    def executemany(self, query: Any, vars_list: Any) -> None:
        limit = deadline.get()
        if limit is not None:
            super().execute(self._limit_transaction(limit))
        super().executemany(query, vars_list)

    def _limit_transaction(self, limit: Deadline) -> str:
        """Return commands that limit the next statement, and the wait for what follows it."""
        left = self.connection.idle_limit = max(time_left(limit), 0.001)
        return f"{set_timeout(limit)}; SET LOCAL {IDLE_TIMEOUT} = {milliseconds(left)}; "

    def _change(self, query: str, values: Any, limit: Deadline) -> None:
        """Send a statement that the server refuses if it arrives after the deadline.

        A pooler whose connections are all in use, or a machine that was frozen, delivers it even
        when nobody waits for it any more.
        """
        loop, connection = asyncio.get_running_loop(), self.connection
        while (at := connection.clock.at(limit.on_server())) is not None:
            try:
                super().execute(
                    f"{set_timeout_until(at, limit.statement_seconds)}; {query}", values
                )
            except psycopg2.errors.InvalidParameterValue as error:
                if "statement_timeout" not in str(error):
                    raise
            else:
                return
            if loop.time() >= limit.on_server():
                raise psycopg2.errors.QueryCanceled("canceling statement due to statement timeout")
            connection.read_clock()  # the server's clock was set forward
        super().execute(f"{set_timeout(limit)}; {query}", values)

    async def _async_soft_close(self) -> None:
        """Called by SQLAlchemy. All rows have been fetched, so there is nothing to wait for."""


def milliseconds(seconds: float) -> int:
    """Round down to whole seconds: pg_stat_statements has a row for each value."""
    exact = max(1, int(1000 * seconds))
    return exact - exact % 1000 if exact > 1000 else exact


def time_left(limit: Deadline) -> float:
    return limit.on_server() - asyncio.get_running_loop().time()


def set_timeout(limit: Deadline) -> str:
    seconds = min(time_left(limit), limit.statement_seconds)
    return f"SET LOCAL statement_timeout = {milliseconds(seconds)}"


def set_timeout_until(moment: float, at_most: float = math.inf) -> str:
    """Return a statement that leaves the next one the time until a moment on the server's clock.

    at_most: seconds, for a stricter limit.

    After that moment, the timeout would be negative, which is an error. The decimals keep it from
    becoming 0: that would mean no timeout.
    """
    left = f"floor(1e3 * ({moment:.3f} - date_part('epoch', clock_timestamp())))"
    if at_most < math.inf:
        left = f"least({left}, {milliseconds(at_most)})"
    return f"SELECT set_config('statement_timeout', concat({left}, '.9'), true)"


class AsyncPsycopg2Dialect(PGDialect_psycopg2):
    """SQLAlchemy's psycopg2 dialect for its asyncio extension: `postgresql+psycopg2_asyncio://`."""

    driver = DRIVER
    is_async = True
    has_terminate = True
    supports_statement_cache = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.clock = ServerClock()

    def initialize(self, connection: Any) -> None:
        super().initialize(connection)  # type: ignore[no-untyped-call]
        connection.connection.driver_connection.read_clock()

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:  # noqa: ARG003
        return AsyncAdaptedQueuePool

    @classmethod
    def get_async_dialect_cls(cls, url: URL) -> type["AsyncPsycopg2Dialect"]:  # noqa: ARG003
        return cls

    def connect(self, *arguments: Any, **parameters: Any) -> Any:
        """Connect to one of the host's addresses within `connect_timeout` seconds.

        libpq would block the event loop during the DNS lookup, and ignores its time limit when
        there is a wait callback. Raises psycopg2.OperationalError.
        """
        if psycopg2.extensions.get_wait_callback() is not wait:
            raise RuntimeError(
                "psycopg2 would block the event loop: use the engine within open_engine(…)"
            )
        seconds = float(parameters.pop("connect_timeout", ATTEMPT_SECONDS))
        return await_(self.connect_in_time(seconds, arguments, parameters))

    async def connect_in_time(self, seconds: float, arguments: Any, parameters: Any) -> Any:
        try:
            async with asyncio.timeout(seconds):
                if address := await choose_address(parameters):
                    parameters["hostaddr"] = address  # beside the host, which TLS needs
                return await greenlet_spawn(self.connect_to_address, *arguments, **parameters)
        except TimeoutError:
            raise psycopg2.OperationalError("timeout expired: could not connect in time") from None

    def connect_to_address(self, *arguments: Any, **parameters: Any) -> Any:
        factories = {"connection_factory": Connection, "cursor_factory": Cursor}
        try:
            connection = super().connect(*arguments, **factories, **parameters)
        except BaseException as error:
            # It leads to the frames of wait(), and they to the connection: the socket would stay
            # open for as long as anybody keeps the error.
            error.__traceback__ = None
            raise
        connection.clock = self.clock
        connection.watch()
        return connection

    def do_terminate(self, dbapi_connection: Any) -> None:
        dbapi_connection.close()  # sends one small packet and does not wait

    def set_isolation_level(self, dbapi_connection: Any, level: Any) -> None:
        """Switch levels without a round trip. When it leaves AUTOCOMMIT, psycopg2's own method
        sends a SET, which a transaction pooler would leak to other clients.
        """
        dbapi_connection.autocommit = level == "AUTOCOMMIT"
        if level != "AUTOCOMMIT":
            is_default = level == self.default_isolation_level
            dbapi_connection.isolation_level = None if is_default else level


async def choose_address(parameters: dict[str, Any]) -> str | None:
    """Return the address to connect to, None if libpq needs no DNS lookup.

    If there are several, it is the first that accepts a TCP connection.
    Raises psycopg2.OperationalError.
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
    first, *others = dict.fromkeys(str(address[0]) for *_, address in found)
    if not others:
        return first
    try:  # tries the next address when one fails, or does not answer within 0.25 s (RFC 8305)
        async with await anyio.connect_tcp(host, port) as stream:
            return str(stream.extra(SocketAttribute.remote_address)[0])  # noqa: S610  (no Django)
    except OSError:
        return first  # libpq's error says more


registry.register(f"postgresql.{DRIVER}", __name__, "AsyncPsycopg2Dialect")
