"""The engine: it retries connecting, checks connections before use, and queues for them fairly."""

import asyncio
import math
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any, Literal

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from sqlalchemy import AsyncAdaptedQueuePool, Dialect, PoolProxiedConnection, event, exc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util.concurrency import await_
from sqlalchemy.util.queue import AsyncAdaptedQueue, Empty

from postgres.connect import TCP_OPTIONS, pause_before
from postgres.deadline import current_deadline
from postgres.dialect import ATTEMPT_SECONDS, DRIVER, Connection, waiting_on_event_loop
from postgres.explain import explain
from postgres.findings import Retry
from postgres.url import DatabaseUrl

ATTEMPT_RESERVE_SECONDS = 2.0  # a retry needs at least this much time before the deadline
WAKE_UP_SECONDS = 9.0  # how long to wait in the queue while all connections are being made
IDLE_SECONDS = 30.0  # a connection that was idle for longer is tested before use
READ_ONLY = "25006"  # PostgreSQL's code for a server that does not accept writes


class DatabaseBusy(Exception):
    """All connections are in use: the queue is full, or this request has waited too long."""


@asynccontextmanager
async def open_engine(
    url: DatabaseUrl,
    *,
    pool_size: int = 1,
    queue_size: int = 2000,
    queue_seconds: float = 4.0,
    echo: bool = False,
    name: str = "app",
) -> AsyncIterator[AsyncEngine]:
    """Yield an engine with at most `pool_size` connections. It connects on first use.

    queue_size: how many requests may wait for a connection. queue_seconds: for how long. name: of
    the pool, in metrics.
    """
    engine = create_db_engine(url, pool_size, queue_size, queue_seconds, echo=echo, name=name)
    with waiting_on_event_loop():
        try:
            yield engine
        finally:
            await engine.dispose()


def create_db_engine(
    url: DatabaseUrl,
    pool_size: int,
    queue_size: int,
    queue_seconds: float,
    *,
    echo: bool,
    name: str,
) -> AsyncEngine:
    engine = create_async_engine(
        url.for_sqlalchemy(DRIVER),
        connect_args={**TCP_OPTIONS, **dict(url.options)},
        echo=echo,
        hide_parameters=True,  # they are user data, and would appear in errors and logs
        poolclass=OrderedPool,
        pool_logging_name=name,
        pool_size=pool_size,
        queue_size=queue_size,
        max_overflow=0,
        pool_timeout=queue_seconds,
        pool_use_lifo=True,  # unneeded connections become idle
        use_native_hstore=False,  # saves each new connection a query
    )
    sync_engine = engine.sync_engine

    def do_connect(dialect: Dialect, _record: Any, arguments: Any, parameters: Any) -> Any:
        pool = sync_engine.pool
        assert isinstance(pool, OrderedPool)  # noqa: S101  (as asked for above)
        pool.connecting += 1
        try:
            return connect_patiently(url, dialect, arguments, parameters)
        finally:
            pool.connecting -= 1

    event.listen(sync_engine, "do_connect", do_connect)
    event.listen(sync_engine, "checkout", check_out)
    event.listen(sync_engine, "checkin", check_in)
    event.listen(sync_engine, "handle_error", keep_other_connections)
    return engine


class OrderedQueue(AsyncAdaptedQueue[ConnectionPoolEntry]):
    """Gives a free connection to the request that has waited longest.

    asyncio's own queue lets a new request take it, and puts the waiting one at the end of the line
    again: under load, some requests would never get a connection.
    """

    pool: "OrderedPool"
    limit: int

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        super().__init__(maxsize, use_lifo)
        self._line: deque[asyncio.Future[ConnectionPoolEntry]] = deque()

    def put(
        self, item: ConnectionPoolEntry, block: bool = True, timeout: float | None = None
    ) -> None:
        if first := self.take_first():
            first.set_result(item)
        else:
            super().put(item, block, timeout)

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        """Wait for a connection for `timeout` seconds, but not past the deadline.

        Raises Empty then, and DatabaseBusy at once if too many requests wait already.
        """
        if not block or not self.empty():
            free: ConnectionPoolEntry = self.get_nowait()
            return free
        if len(self._line) >= self.limit:
            raise DatabaseBusy("too many requests wait for the database")
        loop = asyncio.get_running_loop()
        place = loop.create_future()
        self._line.append(place)
        now, limit = loop.time(), current_deadline() or math.inf
        at_latest = min(now + WAKE_UP_SECONDS, limit)
        timer = loop.call_at(min(now + (timeout or 0), limit), self._give_up, place, at_latest)
        try:
            item: ConnectionPoolEntry = await_(place)
            return item
        except asyncio.CancelledError:
            if place.cancelled():
                with suppress(ValueError):  # take_first() has removed it already
                    self._line.remove(place)
            elif not place.exception():  # it got a connection at the same moment
                self.put(place.result(), block=False)
            raise
        finally:
            timer.cancel()

    def take_first(self) -> "asyncio.Future[ConnectionPoolEntry] | None":
        """Remove and return the request that has waited longest."""
        while self._line:
            place = self._line.popleft()
            if not place.done():
                return place
        return None

    def _give_up(self, place: "asyncio.Future[ConnectionPoolEntry]", at_latest: float) -> None:
        if place.done():
            return
        loop = asyncio.get_running_loop()
        if self.pool.is_waking_up and loop.time() < at_latest:
            loop.call_at(at_latest, self._give_up, place, at_latest)
            return
        self._line.remove(place)
        place.set_exception(Empty())


class OrderedPool(AsyncAdaptedQueuePool):
    """SQLAlchemy's pool, where at most `queue_size` requests wait for a connection."""

    _queue_class = OrderedQueue
    _pool: OrderedQueue

    def __init__(self, creator: Any, queue_size: int = 2000, **options: Any) -> None:
        super().__init__(creator, **options)
        self.connecting = 0
        self._held: ContextVar[Callable[[], Any]] = ContextVar("held", default=lambda: None)
        self._pool.limit = queue_size
        self._pool.pool = self

    @property
    def is_waking_up(self) -> bool:
        """Whether all connections are still being opened. Then requests may wait longer."""
        return self.connecting >= self.size()

    @property
    def waiting(self) -> int:
        """How many requests wait for a connection."""
        return len(self._pool._line)

    def recreate(self) -> "OrderedPool":
        pool = super().recreate()
        assert isinstance(pool, OrderedPool)  # noqa: S101  (of the class of this one)
        pool._pool.limit = self._pool.limit
        return pool

    def _dec_overflow(self) -> Literal[True]:
        """Called when connecting failed: the first request in line tries at once."""
        if first := self._pool.take_first():
            first.set_result(_ConnectionRecord(self, connect=False))  # it connects on use
            return True
        return super()._dec_overflow()

    def connect(self) -> PoolProxiedConnection:
        """Take a connection. Raises DatabaseBusy if none becomes free in time.

        Raises RuntimeError if the current request already holds one: requests that hold a
        connection and wait for another could deadlock.
        """
        held = self._held.get()()
        if held is not None and held.is_valid and not held.is_detached:
            raise RuntimeError("this request holds a connection already: use its session for all")
        try:
            connection = super().connect()
        except exc.TimeoutError:
            raise DatabaseBusy("all connections are in use") from None
        self._held.set(weakref.ref(connection))
        return connection


def connect_patiently(
    url: DatabaseUrl, dialect: Dialect, arguments: Any, parameters: dict[str, Any]
) -> Any:
    """Connect. Until the deadline, retry while the database wakes up or is flooded."""
    limit = current_deadline()
    clock = asyncio.get_running_loop().time
    at_most = float(parameters.get("connect_timeout", 0))  # from the URL
    at_most = min(at_most, ATTEMPT_SECONDS) if at_most > 0 else ATTEMPT_SECONDS
    retries = 0
    while True:
        seconds = at_most if limit is None else min(at_most, limit - clock())
        try:
            return dialect.connect(*arguments, **parameters | {"connect_timeout": seconds})
        except psycopg2.OperationalError as error:
            retries += 1
            policy = explain(error, url).retry
            if limit is None or policy not in {Retry.YES, Retry.WITH_JITTER}:
                raise  # waiting here would not help
            pause = pause_before(retries, policy)
            if pause is None or limit - clock() < pause + ATTEMPT_RESERVE_SECONDS:
                raise
        await_(asyncio.sleep(pause))


def check_out(connection: Connection, record: Any, _proxy: Any) -> None:
    """Replace a connection that died while idle, without a round trip for one in recent use.

    An idle connection has unexpected data only when the server closes it: a restart, a shutdown, or
    Neon's scale to zero after five minutes. Any other connection that was idle for long is tested
    with a query, because a NAT on the way may have dropped it. The query reads the server's clock,
    which the deadlines of later statements need; every few minutes it is sent only for that.
    """
    now = record.info["taken_at"] = time.monotonic()
    returned_at = record.info.get("returned_at")
    if returned_at is None:  # it is new
        return
    try:
        if not (connection.has_news or connection.closed):
            if now - returned_at > IDLE_SECONDS or connection.clock.is_outdated():
                connection.autocommit = True
                connection.read_clock()
                connection.autocommit = False
            return
    except psycopg2.Error:  # whatever it was, the connection is unusable
        pass
    raise exc.DisconnectionError  # the pool opens a new connection instead


def check_in(connection: Connection | None, record: Any) -> None:
    if connection is not None and not connection.closed:
        if connection.get_transaction_status() == TRANSACTION_STATUS_IDLE:
            connection.autocommit = False
        else:  # a transaction that SQLAlchemy did not end: the next request must not get into it
            connection.close()
    record.info["returned_at"] = time.monotonic()


def keep_other_connections(context: Any) -> None:
    """Drop only the connection that failed: the others are checked when they are used.

    A connection that refuses writes is dropped too. Its server was full or has become a standby,
    and the connection would stay read-only. A new one may reach another server.
    """
    context.invalidate_pool_on_disconnect = False
    if getattr(context.original_exception, "pgcode", None) == READ_ONLY:
        context.is_disconnect = True
