"""The database: the engine, its connections, and the sessions that requests get.

The usual session dependency locks an app up under load: requests that hold a connection wait for
a thread, and the threads wait for a connection. Here a request waits for its connection on the
event loop, and gives it back before its response is sent.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, Request
from sqlalchemy import Engine, create_engine, event, exc, text
from sqlmodel import Session, SQLModel

import models  # noqa: F401  (create_db_and_tables must know the tables)
from config import Settings
from database_url import DatabaseUrl

CONNECT_SECONDS = 5  # a whole number, as libpq wants it
WAIT_SECONDS = 5.0  # how long a request waits for a connection of the pool
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
        connect_args={"connect_timeout": CONNECT_SECONDS, **TRANSPORT},
        echo=echo,
        hide_parameters=True,  # they are the users' data, and would stand in errors and logs
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=WAIT_SECONDS,
        pool_use_lifo=True,  # lets connections that are not needed go idle
    )
    event.listen(engine, "checkin", note_time_of_return)
    event.listen(engine, "checkout", try_long_idle_connection)
    return engine


def note_time_of_return(_connection: Any, record: Any) -> None:
    record.info["returned_at"] = time.monotonic()


def try_long_idle_connection(connection: Any, record: Any, _proxy: Any) -> None:
    """Replace a connection that died idle, without a round trip for one that was just in use.

    Neon closes connections when it scales to zero, after five minutes without queries.
    """
    if time.monotonic() - record.info.get("returned_at", time.monotonic()) < IDLE_SECONDS:
        return
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        connection.rollback()
    except connection.Error as error:
        raise exc.DisconnectionError from error  # the pool connects anew, and tries again


def create_db_and_tables(engine: Engine) -> None:
    """Create the tables that are missing, straight from the models: for a scratch database.

    A database that shall live gets its tables from migrations: `uv run manage.py migrate`.
    """
    SQLModel.metadata.create_all(engine)


def ping(engine: Engine) -> float:
    """Ask the database for an answer. Returns seconds. Raises sqlalchemy.exc.DBAPIError."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        start = time.perf_counter()
        connection.execute(text("SELECT 1"))
        return time.perf_counter() - start


class Database:
    """An engine with its threads and its queue: as many of each as there are connections."""

    def __init__(self, settings: Settings) -> None:
        size = settings.db_pool_size
        self.engine = create_db_engine(settings.database_url, pool_size=size, echo=settings.debug)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="database")
        self._connections = asyncio.Semaphore(size)

    @asynccontextmanager
    async def connection_slot(self) -> AsyncIterator[None]:
        """Wait in order, on the event loop, for the right to a connection of the pool.

        Raises DatabaseUnavailable after WAIT_SECONDS.
        """
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._connections.acquire()
        except TimeoutError:
            raise DatabaseUnavailable("all connections are in use") from None
        try:
            yield
        finally:
            self._connections.release()

    async def run[T](self, work: Callable[[], T]) -> T:
        """Run blocking work in one of the database's own threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def ping(self) -> float:
        """Ask the database for an answer. Returns seconds. Raises DatabaseUnavailable."""
        async with self.connection_slot():
            try:
                return await self.run(lambda: ping(self.engine))
            except exc.SQLAlchemyError as error:
                raise DatabaseUnavailable("the database does not answer") from error

    def close(self) -> None:
        """Give back threads and connections; nothing is waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.engine.dispose()


async def get_session(request: Request) -> AsyncIterator[Session]:
    """Yield a session that commits when it is told to, and that nobody else uses."""
    database: Database = request.app.state.database
    async with database.connection_slot():
        session = Session(database.engine, expire_on_commit=False)
        try:
            yield session
        finally:
            await database.run(session.close)


# "function": the connection is back in the pool before the response is sent, so that a client
# that reads slowly holds none.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
