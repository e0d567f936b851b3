"""The database, and the three ways in which requests use it.

The usual session dependency locks an app up under load: requests that hold a connection wait for
a thread, and the threads wait for a connection. Here a request waits for its connection on the
event loop, in order, and gives it back before its response is sent.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from typing import Annotated, Any

from fastapi import Depends, Request
from sqlalchemy import Engine, Executable, exc, text
from sqlmodel import Session, SQLModel

import models  # noqa: F401  (create_db_and_tables must know the tables)
from availability import Availability
from config import Settings
from pool import (
    CONNECT_SECONDS,
    DatabaseUnavailable,
    Slot,
    autocommitting,
    create_db_engine,
    current_slot,
)

# All that the rest of the app needs, wherever it is defined.
__all__ = [
    "Database",
    "DatabaseDep",
    "DatabaseUnavailable",
    "OneStatement",
    "Row",
    "SessionDep",
    "StatementDep",
    "TimeLimit",
    "create_db_and_tables",
    "create_db_engine",
    "ping",
]

# What a statement raises when it is not to blame: a 503, and a line in the log.
AWAY = (TimeoutError, exc.OperationalError, exc.InterfaceError, exc.InternalError)
ANSWER_SECONDS = 10.0  # how long a request may keep a connection
SEVERAL_SECONDS = 14.0  # what a request takes at most whose statements are sent one by one

type Row = dict[str, Any]  # values by the names of the columns


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
        self.availability = Availability(settings.database_url)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="database")
        self._free = asyncio.Semaphore(size)
        self._slots: set[Slot] = set()  # those in use
        self._waiting = 0
        self._queue_size = settings.db_queue_size
        self._queue_seconds = settings.db_queue_seconds

    async def _admit(self, seconds: float, *, patient: bool = True) -> Slot:
        """Wait in order, on the event loop, for the right to use a connection of the pool.

        Raises DatabaseUnavailable: at once where the queue is full, or when the wait is over.
        """
        if current_slot.get() is not None:  # requests that wait for two could wait for each other
            raise RuntimeError("this request has a connection already: use its session for all")
        if self._free.locked():
            # Whoever waited for longer than usual has less time afterwards.
            seconds -= max(0.0, await self._wait_in_queue() - self._queue_seconds)
        else:
            await self._free.acquire()
        slot = Slot(seconds, patient=patient)
        self._slots.add(slot)
        return slot

    async def _wait_in_queue(self) -> float:
        """Return how many seconds it took. Raises DatabaseUnavailable."""
        if self._waiting >= self._queue_size:
            raise DatabaseUnavailable("too many requests wait for the database")
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._waiting += 1
        try:
            async with asyncio.timeout(self._queue_seconds) as limit:

                def grant_more() -> None:
                    if self._is_waking_up():
                        limit.reschedule(began + max(self._queue_seconds, CONNECT_SECONDS))

                look = loop.call_later(self._queue_seconds * 0.9, grant_more)
                try:
                    await self._free.acquire()
                finally:
                    look.cancel()
        except TimeoutError:
            raise DatabaseUnavailable("all connections are in use") from None
        finally:
            self._waiting -= 1
        return loop.time() - began

    def _is_waking_up(self) -> bool:
        """Tell whether all connections have been in the making for as long as others wait."""
        least = self._queue_seconds / 2
        return bool(self._slots) and all(slot.connecting_seconds > least for slot in self._slots)

    def _release(self, slot: Slot) -> None:
        self._slots.discard(slot)
        self._free.release()

    @asynccontextmanager
    async def connection_slot(self) -> AsyncIterator[None]:
        """Hold the right to use one connection: what is done within is done on that.

        Raises DatabaseUnavailable, when no connection gets free. What then takes longer than
        ANSWER_SECONDS is ended: it raises sqlalchemy.exc.OperationalError.
        """
        slot = await self._admit(ANSWER_SECONDS)
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

    async def run[T](
        self, work: Callable[[], T], *, seconds: float | None = None, patient: bool = True
    ) -> T:
        """Have a thread do blocking work on one connection. Raises DatabaseUnavailable.

        seconds: ANSWER_SECONDS if None. patient: with a database that cannot be connected to, but
        may be a moment later.

        Whoever waits is answered after ANSWER_SECONDS at the latest; the connection counts as
        taken for as long as the thread needs to notice.
        """
        slot = await self._admit(seconds or ANSWER_SECONDS, patient=patient)
        began = time.monotonic()
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
                answer.set_exception(TimeoutError("no answer in time"))

        def hand_over(done: Future[T]) -> None:
            with suppress(RuntimeError):  # the app has ended meanwhile, and its loop with it
                loop.call_soon_threadsafe(finish, done)

        self._threads.submit(context.run, work).add_done_callback(hand_over)
        limit = loop.call_later(slot.seconds, give_up)
        try:
            result = (await answer).result()
        except AWAY as error:
            finding = self.availability.lost(error)
            if finding.name == "other-error":  # the statement is to blame after all
                raise
            raise DatabaseUnavailable(finding.public, finding) from error
        except CancelledError:
            raise DatabaseUnavailable("the app is ending") from None
        except asyncio.CancelledError:
            slot.abort()  # a thread goes on without us, and shall end soon
            raise
        finally:
            limit.cancel()
        self.availability.back(began)
        return result

    async def statement(self, statement: Executable, **parameters: object) -> list[Row]:
        """Run one statement, in one round trip: it is atomic by itself. Returns all its rows.

        parameters: what the statement's `bindparam`s stand for, and for an INSERT or UPDATE
        without `values`, the columns to write. What PostgreSQL runs alone only, such as VACUUM,
        does not go: its time limit goes before it. Raises DatabaseUnavailable, and
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

    async def ping(self, seconds: float | None = None) -> float:
        """Ask the database for an answer, within a limit. Returns how many seconds it took.

        Raises DatabaseUnavailable.
        """
        return await self.run(lambda: ping(self.engine), seconds=seconds, patient=False)

    def close(self) -> None:
        """Give back threads and connections; what still waits for the database is ended."""
        for slot in self._slots:
            slot.abort()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.engine.dispose()


async def get_database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


DatabaseDep = Annotated[Database, Depends(get_database)]


async def limit_time() -> AsyncIterator[None]:
    """End a request whose statements are sent one by one: each would have its own wait and limit.

    Raises DatabaseUnavailable after SEVERAL_SECONDS.
    """
    try:
        async with asyncio.timeout(SEVERAL_SECONDS):
            yield
    except TimeoutError as error:
        raise DatabaseUnavailable("the database took too long") from error


# For routes: `dependencies=[TimeLimit]`. "function": it is about the route, not about its response.
TimeLimit = Depends(limit_time, scope="function")


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
