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
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Annotated, Any

import psycopg2
from fastapi import Depends, Request
from sqlalchemy import (
    Connection,
    Engine,
    Executable,
    create_engine,
    event,
    exc,
    text,
)
from sqlmodel import Session, SQLModel

import models  # noqa: F401  (create_db_and_tables must know the tables)
from config import Settings
from database_url import DatabaseUrl

CONNECT_SECONDS = 9  # a compute that wakes up may take as long; a whole number, as libpq wants it
ANSWER_SECONDS = 10.0  # how long a request may keep a connection
IDLE_SECONDS = 30.0  # a connection unused for longer is tried before it is used
TRANSPORT: dict[str, Any] = {
    # A peer that vanished without a word is noticed by the kernel, within about 15 seconds.
    "keepalives_idle": 10,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
READ_ONLY = "25006"  # PostgreSQL's code for a server that does not write


type Row = dict[str, Any]  # values by the names of the columns


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
        pool_use_lifo=True,  # lets connections that are not needed go idle
    )
    event.listen(engine, "checkout", note_use)  # first: the next one may have to wait, too
    event.listen(engine, "checkout", replace_dead_connection)
    event.listen(engine, "checkin", note_return)
    event.listen(engine, "handle_error", keep_other_connections)
    event.listen(engine, "before_cursor_execute", limit_statement, retval=True)
    return engine


class Slot:
    """The right to use one connection of the pool for some seconds, and a way to end that.

    A statement that is slow, or waits for a lock, is ended by the server when the time is over, so
    that what was answered with a 503 is not done afterwards. A server that is frozen, or cut off,
    leaves its clients waiting for ever, in a call that no other thread can interrupt; but it ends
    at once when its socket is shut down.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._connection: Any = None
        self._over = False

    @property
    def is_connecting(self) -> bool:
        return self._connection is None

    @property
    def statement_timeout(self) -> int:
        """Milliseconds. Whole seconds, since pg_stat_statements lists each number by itself."""
        return max(1, int(self._deadline - time.monotonic())) * 1000

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


def limit_statement(
    _connection: Any, cursor: Any, statement: str, parameters: Any, _context: Any, many: bool
) -> tuple[str, Any]:
    """Have the server end a statement in time. Both go in one message, so it costs no round trip.

    LOCAL is over with the statement's own transaction: a pooler hands the connection to others.
    """
    slot = current_slot.get()
    if slot is None or many or cursor.name is not None:  # a server-side cursor's is no statement
        return statement, parameters
    return f"SET LOCAL statement_timeout = {slot.statement_timeout}; {statement}", parameters


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
    """Give up one connection for an error of one: the others are looked at when they are used.

    One that refuses to write is given up, too: its server was full, or has become a standby, and
    the connection would keep that in mind. The next one may lead elsewhere.
    """
    context.invalidate_pool_on_disconnect = False
    if getattr(context.original_exception, "pgcode", None) == READ_ONLY:
        context.is_disconnect = True


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
    """An engine with its threads and its queue: as many threads as there are connections."""

    def __init__(self, settings: Settings) -> None:
        size = settings.db_pool_size
        self.engine = create_db_engine(settings.database_url, pool_size=size, echo=settings.debug)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="database")
        self._free = asyncio.Semaphore(size)
        self._slots: set[Slot] = set()  # those in use
        self._waiting = 0
        self._queue_size = settings.db_queue_size
        self._queue_seconds = settings.db_queue_seconds

    async def _admit(self) -> Slot:
        """Wait in order, on the event loop, for the right to use a connection of the pool.

        Raises DatabaseUnavailable: at once where the queue is full, or when the wait is over.
        """
        if current_slot.get() is not None:  # requests that wait for two could wait for each other
            raise RuntimeError("this request has a connection already: use its session for all")
        seconds = ANSWER_SECONDS
        if self._free.locked():
            if self._waiting >= self._queue_size:
                raise DatabaseUnavailable("too many requests wait for the database")
            patience = self._queue_seconds
            if all(slot.is_connecting for slot in self._slots):
                # The database is waking up. Who waits for that longer has less time afterwards.
                patience = max(patience, CONNECT_SECONDS)
            began = time.monotonic()
            self._waiting += 1
            try:
                async with asyncio.timeout(patience):
                    await self._free.acquire()
            except TimeoutError:
                raise DatabaseUnavailable("all connections are in use") from None
            finally:
                self._waiting -= 1
            seconds -= max(0.0, time.monotonic() - began - self._queue_seconds)
        else:
            await self._free.acquire()
        slot = Slot(seconds)
        self._slots.add(slot)
        return slot

    def _release(self, slot: Slot) -> None:
        self._slots.discard(slot)
        self._free.release()

    @asynccontextmanager
    async def connection_slot(self) -> AsyncIterator[None]:
        """Hold the right to use one connection: what is done within is done on that.

        Raises DatabaseUnavailable, when no connection gets free. What then takes longer than
        ANSWER_SECONDS is ended: it raises sqlalchemy.exc.OperationalError.
        """
        slot = await self._admit()
        reset = current_slot.set(slot)
        limit = asyncio.get_running_loop().call_later(slot.seconds, slot.abort)
        try:
            yield
        finally:
            limit.cancel()
            current_slot.reset(reset)
            self._release(slot)

    async def in_slot[T](self, work: Callable[[], T]) -> T:
        """Have a thread do blocking work, on the connection whose slot is held."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, copy_context().run, work)

    async def run[T](self, work: Callable[[], T]) -> T:
        """Have a thread do blocking work on one connection. Raises DatabaseUnavailable.

        Whoever waits is answered after ANSWER_SECONDS at the latest; the connection counts as
        taken for as long as the thread needs to notice.
        """
        slot = await self._admit()
        context = copy_context()
        context.run(current_slot.set, slot)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Future[T]] = loop.create_future()

        def finish(done: Future[T]) -> None:
            self._release(slot)
            if not answer.done():
                answer.set_result(done)

        def give_up() -> None:
            slot.abort()
            if not answer.done():
                answer.set_exception(DatabaseUnavailable("the database does not answer"))

        def hand_over(done: Future[T]) -> None:
            with suppress(RuntimeError):  # the app has ended meanwhile, and its loop with it
                loop.call_soon_threadsafe(finish, done)

        self._threads.submit(context.run, work).add_done_callback(hand_over)
        limit = loop.call_later(slot.seconds, give_up)
        try:
            return (await answer).result()
        except exc.OperationalError as error:
            raise DatabaseUnavailable("the database does not answer") from error
        except asyncio.CancelledError:
            slot.abort()  # a thread goes on without us, and shall end soon
            raise
        finally:
            limit.cancel()

    async def statement(self, statement: Executable, **parameters: object) -> list[Row]:
        """Run one statement, in one round trip: it is atomic by itself. Returns all its rows.

        parameters: what the statement's `bindparam`s stand for, and for an INSERT or UPDATE
        without `values`, the columns to write. Raises DatabaseUnavailable, and
        sqlalchemy.exc.IntegrityError.
        """

        def run() -> list[Row]:
            with autocommitting(self.engine) as connection:
                result = connection.execute(statement, parameters)
                if not result.returns_rows:
                    return []
                names = tuple(result.keys())
                return [dict(zip(names, row, strict=True)) for row in result]

        return await self.run(run)

    async def transaction[T](self, work: Callable[[Session], T]) -> T:
        """Run `work` in one transaction, committed when it returns, rolled back when it raises.

        Raises DatabaseUnavailable, and what `work` raises.
        """

        def run() -> T:
            with Session(self.engine, expire_on_commit=False) as session:
                result = work(session)
                session.commit()
                return result

        return await self.run(run)

    async def ping(self) -> float:
        """Ask the database for an answer. Returns seconds. Raises DatabaseUnavailable."""
        return await self.run(lambda: ping(self.engine))

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

    async def all(self, statement: Executable, **parameters: object) -> list[Row]:
        """Send it. Returns its rows. Raises DatabaseUnavailable; RuntimeError at a second call."""
        if self._sent:
            raise RuntimeError(
                "this request has sent its statement: put both into one function, and run that by"
                " `database.transaction(work)`, which keeps them together"
            )
        self._sent = True
        return await self._database.statement(statement, **parameters)

    async def first(self, statement: Executable, **parameters: object) -> Row | None:
        """Send it. Returns its first row, None if it has none."""
        rows = await self.all(statement, **parameters)
        return rows[0] if rows else None


async def get_statement(request: Request) -> OneStatement:
    return OneStatement(
        request.app.state.database
    )  # FastAPI would run the class itself in a thread


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
            await database.in_slot(session.close)


# "function": the connection is back in the pool before the response is sent, so that a client
# that reads slowly holds none.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
