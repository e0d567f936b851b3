"""The database, and the two ways in which requests use it: a session, or one statement.

Both run on the event loop: a request that waits for the database, or for a connection, blocks no
thread and no other request.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from inspect import isasyncgenfunction, iscoroutinefunction, isfunction
from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.requests import HTTPConnection
from fastapi.routing import APIRoute, APIWebSocketRoute, iter_route_contexts
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from sqlalchemy import Engine, Executable, text
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util.concurrency import greenlet_spawn
from sqlmodel import SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

import models  # noqa: F401  (create_db_and_tables must know the tables)
from postgres.deadline import Deadline, deadline, time_limit
from postgres.engine import DatabaseBusy, OrderedPool, open_engine
from postgres.outage_log import Availability
from postgres.statements import CompiledStatement, Row, execute
from postgres.url import DatabaseUrl
from resources import resources

# Everything that the rest of the app needs, wherever it is defined.
__all__ = [
    "USE_SECONDS",
    "CompiledStatement",
    "DatabaseBusy",
    "Deadline",
    "EngineDep",
    "OneStatement",
    "ReadStatementDep",
    "Replica",
    "Row",
    "SessionDep",
    "StatementDep",
    "create_db_and_tables",
    "get_statement",
    "open_engine",
    "ping",
    "refuse_threads",
    "time_limit",
]

USE_SECONDS = 10.0  # how long a request may use the database, after it has waited for a connection
REPLICA_SECONDS = 3.0  # the part of a request's time for a replica; the rest is for the primary
REPLICA_PAUSE_SECONDS = 5.0  # after a failure, how long nothing is read from a replica
REPLICA_AWAY_ADVICE = "the primary answers instead; to see why: uv run manage.py check"

type AnyStatement = Executable | CompiledStatement


async def create_db_and_tables(engine: AsyncEngine) -> None:
    """Create missing tables directly from the models: for a temporary database.

    Any other database gets its tables from migrations: `uv run manage.py migrate`.
    """
    async with engine.begin() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)


async def ping(engine: AsyncEngine) -> float:
    """Return how many seconds the database takes to answer. Raises sqlalchemy.exc.DBAPIError."""
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        start = time.perf_counter()
        await connection.execute(text("SELECT 1"))
        return time.perf_counter() - start


async def get_engine(request: HTTPConnection) -> AsyncEngine:
    return resources(request).engine


EngineDep = Annotated[AsyncEngine, Depends(get_engine)]


class RequestSession(AsyncSession):
    """An AsyncSession that closes even if another task still uses it, as in asyncio.gather()."""

    async def close(self) -> None:
        while True:
            try:
                return await super().close()
            except IllegalStateChangeError:  # the other task is getting a connection
                await asyncio.sleep(0.01)


async def get_session(engine: EngineDep, request: HTTPConnection) -> AsyncIterator[AsyncSession]:
    """Yield the request's own session. It commits only on `await session.commit()`."""
    with time_limit(deadline_of(request, engine)):
        async with RequestSession(
            engine, expire_on_commit=False, close_resets_only=False
        ) as session:
            yield session


# "function": the connection is back in the pool before the response is sent, so that a client
# that reads slowly holds none. Later use, in a background task or a stream, is an error
# (close_resets_only), because nothing would close the session then.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]


def deadline_of(request: HTTPConnection, engine: AsyncEngine) -> Deadline:
    """Return the one deadline for all that a request, or a WebSocket, asks of the database.

    A WebSocket that is open for longer opens a session for each message: `AsyncSession(engine)`,
    of an `EngineDep`, within a `time_limit(…)`.
    """
    assert isinstance(engine.pool, OrderedPool)  # noqa: S101  (that of open_engine)
    limit = Deadline(engine.pool.timeout() + USE_SECONDS)
    shared: Deadline = request.scope.setdefault("database_deadline", limit)
    shared.at()  # begins now, so that what the request waits for before its statement counts too
    return shared


class OneStatement:
    """Sends one statement, for a request that needs no more.

    One statement is atomic by itself and costs one round trip. Two would be two transactions, and a
    failure between them would leave half of the work done, so a second one raises an error.
    """

    # How long the server may work on the statement; the wait for a connection, or in a pooler's
    # queue, does not count. Above one second, it is rounded down.
    seconds: float | None = None

    def __init__(self, engine: AsyncEngine, limit: Deadline) -> None:
        self._engine = engine
        self._limit = limit
        self._sent = False

    async def all(self, statement: AnyStatement, **parameters: object) -> list[Row]:
        """Send it without BEGIN and COMMIT. Returns all its rows.

        parameters: values of the statement's `bindparam`s, and for an INSERT or UPDATE without
        `values`, of its columns. VACUUM and similar commands do not work, because the time limit is
        sent along with the statement. Raises RuntimeError on a second call, and
        sqlalchemy.exc.DBAPIError.
        """
        if self._sent:
            raise RuntimeError(
                "this request has already sent its one statement: to send several, ask for"
                " `session: SessionDep`, then `await session.exec(…)` and `await session.commit()`"
            )
        self._sent = True
        with time_limit(deadline.get() or self._limit):
            return await greenlet_spawn(
                send, self._engine.sync_engine, statement, parameters, self.seconds
            )

    async def first(self, statement: AnyStatement, **parameters: object) -> Row | None:
        """Send it. Returns its first row, or None."""
        rows = await self.all(statement, **parameters)
        return rows[0] if rows else None


def statement_limit(seconds: float | None) -> AbstractContextManager[None]:
    """Limit how long the server may work on a statement of the block. There is a deadline."""
    limit = deadline.get()
    if seconds is None or limit is None:
        return nullcontext()
    return time_limit(limit.with_statement_limit(seconds))


def send(
    engine: Engine, statement: AnyStatement, parameters: Row, seconds: float | None
) -> list[Row]:
    with engine.connect() as connection, statement_limit(seconds):
        driver_connection = connection.connection.driver_connection
        assert driver_connection is not None  # noqa: S101  (until it is returned to the pool)
        driver_connection.autocommit = True  # sends nothing; check_in() switches it off
        if isinstance(statement, CompiledStatement):
            rows = statement.execute(connection, parameters)
        else:
            rows = execute(connection, statement, parameters)
        if driver_connection.get_transaction_status() != TRANSACTION_STATUS_IDLE:
            raise RuntimeError("a BEGIN needs a session: ask for `session: SessionDep`")
        return rows


def refuse_threads(app: FastAPI) -> None:
    """Raise TypeError if a route or dependency without `async` uses a session or a statement.

    FastAPI would run it in a thread, where neither works.
    """
    providers = {get_session, get_statement, get_read_statement}
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        unseen = [context.dependant] if isinstance(route, APIRoute | APIWebSocketRoute) else []
        while unseen:
            dependant = unseen.pop()
            unseen += dependant.dependencies
            asks = {part.call for part in dependant.dependencies} & providers
            call = dependant.call
            is_async = iscoroutinefunction(call) or isasyncgenfunction(call)
            if asks and isfunction(call) and not is_async:
                raise TypeError(
                    f"{call.__module__}.{call.__name__}() uses the database: write `async def"
                    f" {call.__name__}(…)`, and `await session.exec(…)`"
                )


async def get_statement(request: HTTPConnection) -> OneStatement:
    engine = resources(request).engine  # FastAPI would run the class in a thread
    return OneStatement(engine, deadline_of(request, engine))


StatementDep = Annotated[OneStatement, Depends(get_statement)]


class Replica:
    """A server with a copy of the data, which may be a moment old: it answers lists.

    While it fails, the primary answers them. Every few seconds, one request tries it again.
    """

    def __init__(self, engine: AsyncEngine, url: DatabaseUrl) -> None:
        self._engine = engine.sync_engine
        self._availability = Availability(url, name="replica", advice=REPLICA_AWAY_ADVICE)
        self._availability.listen_to(engine)
        self._paused_until = 0.0  # by time.monotonic(); 0 if the last statement did not fail

    async def all(
        self, statement: AnyStatement, parameters: Row, seconds: float | None
    ) -> list[Row] | None:
        """Return the rows, or None if the primary has to answer. Raises as OneStatement.all()."""
        now = time.monotonic()
        if now < self._paused_until:
            return None
        if self._paused_until:
            # Other requests go to the primary while this one tries the replica.
            self._paused_until = now + REPLICA_PAUSE_SECONDS
        try:
            with time_limit(Deadline(REPLICA_SECONDS)):
                rows = await greenlet_spawn(send, self._engine, statement, parameters, seconds)
        except DatabaseBusy:
            if not self._paused_until:
                raise
        except DBAPIError as error:
            finding = self._availability.explain(error)
            if finding is None or finding.name == "query-cancelled":  # the primary would fail too
                raise
            self._paused_until = time.monotonic() + REPLICA_PAUSE_SECONDS
        else:
            self._paused_until = 0.0
            return rows
        return None


class ReadStatement(OneStatement):
    """Sends one SELECT to the replica, or to the primary if the replica cannot answer."""

    def __init__(self, engine: AsyncEngine, limit: Deadline, replica: Replica) -> None:
        super().__init__(engine, limit)
        self._replica = replica

    async def all(self, statement: AnyStatement, **parameters: object) -> list[Row]:
        if not self._sent:
            rows = await self._replica.all(statement, parameters, self.seconds)
            if rows is not None:
                self._sent = True
                return rows
        return await super().all(statement, **parameters)


async def get_read_statement(request: HTTPConnection) -> OneStatement:
    found = resources(request)
    limit = deadline_of(request, found.engine)
    if found.replica is None:
        return OneStatement(found.engine, limit)
    return ReadStatement(found.engine, limit, found.replica)


# Like StatementDep, for a SELECT whose rows may be a moment old.
ReadStatementDep = Annotated[OneStatement, Depends(get_read_statement)]
