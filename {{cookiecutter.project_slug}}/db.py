"""The database: the engine, its connections, and the three ways in which requests use them.

The usual session dependency locks an app up under load: requests that hold a connection wait for
a thread, and the threads wait for a connection. Here a request waits for its connection on the
event loop, in order, and gives it back before its response is sent.
"""

import asyncio
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Annotated, Any

import psycopg2
from fastapi import Depends, Request
from sqlalchemy import (
    Connection,
    Engine,
    Executable,
    RowMapping,
    create_engine,
    event,
    exc,
    text,
)
from sqlmodel import Session, SQLModel

import models  # noqa: F401  (create_db_and_tables must know the tables)
from config import Settings
from database_url import DatabaseUrl

CONNECT_SECONDS = 5  # a whole number, as libpq wants it
WAIT_SECONDS = 4.0  # how long a request waits for a connection of the pool
ANSWER_SECONDS = 10.0  # how long it may keep one
IDLE_SECONDS = 30.0  # a connection unused for longer is tried before it is used
TRANSPORT: dict[str, Any] = {
    # A peer that vanished without a word is noticed by the kernel, within about 15 seconds.
    "keepalives_idle": 10,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


class DatabaseUnavailable(Exception):
    """The database does not answer, or every connection is taken: worth another try later."""


def create_db_engine(url: DatabaseUrl, *, pool_size: int = 1, echo: bool = False) -> Engine:
    """Create an engine with at most `pool_size` connections. It connects when first used."""
    engine = create_engine(
        url.for_sqlalchemy(),
        connect_args={"connect_timeout": CONNECT_SECONDS, **TRANSPORT, **dict(url.options)},
        echo=echo,
        hide_parameters=True,  # they are the users' data, and would stand in errors and logs
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=WAIT_SECONDS,
        pool_use_lifo=True,  # lets connections that are not needed go idle
    )
    event.listen(engine, "checkout", note_use)  # first: the next one may have to wait, too
    event.listen(engine, "checkout", replace_dead_connection)
    event.listen(engine, "checkin", note_return)
    event.listen(engine, "handle_error", keep_other_connections)
    return engine


class Slot:
    """The right to use one connection of the pool, and a way to end a wait that takes too long.

    A server that is frozen, or cut off, leaves its clients waiting for ever, in a call that no
    other thread can interrupt; but it ends at once when its socket is shut down.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Any = None
        self._over = False

    def use(self, connection: Any) -> None:
        """Note the connection, or None when it is given back. Raises DatabaseUnavailable."""
        with self._lock:
            if self._over and connection is not None:
                raise DatabaseUnavailable("the database does not answer")
            self._connection = connection

    def abort(self) -> None:
        """End what the connection waits for, with an error. A connection given back stays whole."""
        with self._lock, suppress(OSError, psycopg2.Error):
            self._over = True
            if self._connection is not None:
                stream = socket.socket(fileno=self._connection.fileno())
                try:
                    stream.shutdown(socket.SHUT_RDWR)
                finally:
                    stream.detach()  # it is psycopg2 that closes it


current_slot: ContextVar[Slot | None] = ContextVar("current_slot", default=None)


def note_use(connection: Any, _record: Any, _proxy: Any) -> None:
    slot = current_slot.get()
    if slot is None:
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # a thread, as it should be
        slot.use(connection)
    else:
        raise RuntimeError(
            "a session would block the event loop, and all requests with it: write `def` in place"
            " of `async def`, or use StatementDep"
        )


def note_return(connection: Any, record: Any) -> None:
    if connection is not None and not connection.closed:
        connection.autocommit = False
    record.info["returned_at"] = time.monotonic()
    if slot := current_slot.get():
        slot.use(None)


def replace_dead_connection(connection: Any, record: Any, _proxy: Any) -> None:
    """Have a connection that died idle replaced, without a round trip for one that was just in use.

    What the server said by itself, it said as it hung up: a restart, a shutdown, or Neon's scaling
    to zero after five minutes. Only a connection that nobody hung up, and that a router on the
    way may have forgotten, takes a query to try.
    """
    returned_at = record.info.get("returned_at")
    if returned_at is None:  # it is new
        return
    try:
        if has_news(connection):
            raise exc.DisconnectionError  # the pool connects anew, and tries again
        if time.monotonic() - returned_at > IDLE_SECONDS:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            connection.autocommit = False
    except psycopg2.Error as error:
        raise exc.DisconnectionError from error


def keep_other_connections(context: Any) -> None:
    """Give up one connection for an error of one: the others are looked at when they are used."""
    context.invalidate_pool_on_disconnect = False


def has_news(connection: Any) -> bool:
    """Has the server said something that nobody asked for? Looks at the socket alone."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([connection], [], [], 0)[0])  # Windows


@contextmanager
def autocommitting(engine: Engine) -> Iterator[Connection]:
    """Yield a connection whose statements are transactions by themselves, without a BEGIN.

    It is told by psycopg2's own switch, which sends nothing. SQLAlchemy's isolation level
    AUTOCOMMIT has psycopg2 send a SET as the connection is given back.
    """
    with engine.connect() as connection:
        driver_connection = connection.connection.driver_connection
        assert driver_connection is not None  # noqa: S101  (it is, until it is given back)
        driver_connection.autocommit = True
        yield connection


def create_db_and_tables(engine: Engine) -> None:
    """Create the tables that are missing, straight from the models: for a scratch database.

    A database that shall live gets its tables from migrations: `uv run manage.py migrate`.
    """
    SQLModel.metadata.create_all(engine)


def ping(engine: Engine) -> float:
    """Ask the database for an answer. Returns seconds. Raises sqlalchemy.exc.DBAPIError."""
    with autocommitting(engine) as connection:
        start = time.perf_counter()
        connection.execute(text("SELECT 1"))
        return time.perf_counter() - start


class Database:
    """An engine with its threads and its queue: as many of each as there are connections."""

    def __init__(self, settings: Settings) -> None:
        size = settings.db_pool_size
        self.engine = create_db_engine(settings.database_url, pool_size=size, echo=settings.debug)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="database")
        self._free = asyncio.Semaphore(size)

    @asynccontextmanager
    async def connection_slot(self) -> AsyncIterator[None]:
        """Wait in order, on the event loop, for the right to use a connection of the pool.

        Raises DatabaseUnavailable after WAIT_SECONDS. What then takes longer than ANSWER_SECONDS
        is ended: it raises sqlalchemy.exc.OperationalError.
        """
        if current_slot.get() is not None:  # requests that wait for two could wait for each other
            raise RuntimeError("this request has a connection already: use its session for all")
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._free.acquire()
        except TimeoutError:
            raise DatabaseUnavailable("all connections are in use") from None
        slot = Slot()
        reset = current_slot.set(slot)
        limit = asyncio.get_running_loop().call_later(ANSWER_SECONDS, slot.abort)
        try:
            yield
        except asyncio.CancelledError:
            slot.abort()  # a thread goes on without us, and shall end soon
            raise
        finally:
            limit.cancel()
            current_slot.reset(reset)
            self._free.release()

    async def in_thread[T](self, work: Callable[[], T]) -> T:
        """Run blocking work, which a slot was waited for. Raises DatabaseUnavailable."""
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, copy_context().run, work)
        except exc.OperationalError as error:
            raise DatabaseUnavailable("the database does not answer") from error

    async def statement(self, statement: Executable) -> Sequence[RowMapping]:
        """Run one statement, in one round trip: it is atomic by itself. Returns all its rows.

        Raises DatabaseUnavailable, and sqlalchemy.exc.IntegrityError.
        """

        def run() -> Sequence[RowMapping]:
            with autocommitting(self.engine) as connection:
                result = connection.execute(statement)
                return result.mappings().all() if result.returns_rows else []

        async with self.connection_slot():
            return await self.in_thread(run)

    async def transaction[T](self, work: Callable[[Session], T]) -> T:
        """Run `work` in one transaction, committed when it returns, rolled back when it raises.

        Raises DatabaseUnavailable, and what `work` raises.
        """

        def run() -> T:
            with Session(self.engine, expire_on_commit=False) as session:
                result = work(session)
                session.commit()
                return result

        async with self.connection_slot():
            return await self.in_thread(run)

    async def ping(self) -> float:
        """Ask the database for an answer. Returns seconds. Raises DatabaseUnavailable."""
        async with self.connection_slot():
            return await self.in_thread(lambda: ping(self.engine))

    def close(self) -> None:
        """Give back threads and connections; nothing is waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.engine.dispose()


async def get_database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


DatabaseDep = Annotated[Database, Depends(get_database)]


class OneStatement:
    """The right to send one statement, for a request that needs no more.

    One is atomic by itself and costs one round trip. Two of them would be two transactions, and
    a failure between them would leave half the work done: the second is refused.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sent = False

    async def all(self, statement: Executable) -> Sequence[RowMapping]:
        """Send it. Returns its rows. Raises DatabaseUnavailable; RuntimeError at a second call."""
        if self._sent:
            raise RuntimeError(
                "this request has sent its statement: put both into one function, and run that by"
                " `database.transaction(work)`, which keeps them together"
            )
        self._sent = True
        return await self._database.statement(statement)

    async def first(self, statement: Executable) -> RowMapping | None:
        """Send it. Returns its first row, None if it has none."""
        rows = await self.all(statement)
        return rows[0] if rows else None


async def get_statement(database: DatabaseDep) -> OneStatement:
    return OneStatement(database)  # FastAPI would run the class itself in a thread


StatementDep = Annotated[OneStatement, Depends(get_statement)]


async def get_session(database: DatabaseDep) -> AsyncIterator[Session]:
    """Yield a session that commits when it is told to, and that nobody else uses.

    For `def` routes: in an `async def` route it would stop all other requests, and refuses to.
    """
    async with database.connection_slot():
        session = Session(database.engine, expire_on_commit=False)
        try:
            yield session
        finally:
            await database.in_thread(session.close)


# "function": the connection is back in the pool before the response is sent, so that a client
# that reads slowly holds none.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
