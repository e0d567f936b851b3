"""The pool of connections: how they are made, watched while they are used, and given up.

Nothing here waits for ever: who uses a connection holds a `Slot`, which ends whatever it waits for.
"""

import asyncio
import random
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import psycopg2
from sqlalchemy import Connection, Dialect, Engine, create_engine, event, exc

from connecting import TRANSPORT, hang_up
from database_url import DatabaseUrl
from diagnosis import explain
from findings import Finding, Retry

CONNECT_SECONDS = 9  # a compute that wakes up may take as long; a whole number, as libpq wants it
FIRST_PAUSE_SECONDS = 0.25  # before another attempt to connect; each further one is twice as long
IDLE_SECONDS = 30.0  # a connection unused for longer is tried before it is used
ALONE = ("SAVEPOINT", "ROLLBACK TO", "RELEASE")  # has to work in a transaction that has failed
READ_ONLY = "25006"  # PostgreSQL's code for a server that does not write


class DatabaseUnavailable(Exception):
    """The database does not answer, or every connection is taken: worth another try later.

    finding: what is wrong with the database; None where it is only busy.
    """

    def __init__(self, detail: str, finding: Finding | None = None) -> None:
        super().__init__(detail)
        self.finding = finding


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
        use_native_hstore=False,  # spares each new connection a question
    )
    event.listen(engine, "do_connect", connect_patiently(url))
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

    def __init__(self, seconds: float, *, patient: bool = True) -> None:
        self.seconds = seconds
        self.is_patient = patient  # with a database that asks for another try
        self._deadline = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._connection: Any = None
        self._over = False

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    @property
    def connecting_seconds(self) -> float:
        """How long it has waited for a connection; 0 once it has one."""
        return self.seconds - self.seconds_left if self._connection is None else 0.0

    def use(self, connection: Any) -> None:
        """Note the connection, or None when it is given back. Raises DatabaseUnavailable."""
        with self._lock:
            if self._over and connection is not None:
                raise DatabaseUnavailable("the database does not answer")
            self._connection = connection

    def watch(self, connection: Any) -> Any:
        """Note a new connection: SQLAlchemy has questions of its own to the first one."""
        try:
            self.use(connection)
        except DatabaseUnavailable:
            connection.close()
            raise
        return connection

    def abort(self) -> None:
        """End what the connection waits for, with an error. A connection given back stays whole."""
        with self._lock:
            self._over = True
            if self._connection is not None:
                hang_up(self._connection)


current_slot: ContextVar[Slot | None] = ContextVar("current_slot", default=None)


def connect_patiently(url: DatabaseUrl) -> Callable[..., Any]:
    """Return a listener that connects, and again where a database that wakes up asks for it."""

    def connect(dialect: Dialect, _record: Any, arguments: Any, parameters: Any) -> Any:
        slot = current_slot.get()
        if slot is None:
            return dialect.connect(*arguments, **parameters)
        pause = FIRST_PAUSE_SECONDS
        while True:
            # libpq takes whole seconds, 2 at least, for each address of the host.
            seconds = max(2, min(CONNECT_SECONDS, int(slot.seconds_left)))
            try:
                connection = dialect.connect(
                    *arguments, **parameters | {"connect_timeout": seconds}
                )
            except psycopg2.OperationalError as error:
                worth_it = explain(error, url).retry in {Retry.YES, Retry.WITH_JITTER}
                if not (worth_it and slot.is_patient and slot.seconds_left > pause + 2):
                    raise
            else:
                return slot.watch(connection)
            # Jitter, so that those who were turned away together do not come back together.
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause *= 2

    return connect


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

    Not so for what PostgreSQL takes alone, for many rows at once, and for server-side cursors.
    LOCAL is over with the statement's own transaction: a pooler hands the connection to others.
    """
    slot = current_slot.get()
    if slot is None or many or cursor.name is not None or statement.startswith(ALONE):
        return statement, parameters
    milliseconds = max(1, int(1000 * slot.seconds_left))
    if milliseconds > 1000:  # whole seconds: pg_stat_statements lists each number by itself
        milliseconds -= milliseconds % 1000
    return f"SET LOCAL statement_timeout = {milliseconds}; {statement}", parameters


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
        if not has_news(connection):
            if time.monotonic() - returned_at > IDLE_SECONDS:
                connection.autocommit = True
                with connection.cursor() as cursor:
                    cursor.execute("SELECT 1")
                connection.autocommit = False
            return
    except psycopg2.Error:  # what it was does not matter
        pass
    if slot := current_slot.get():
        slot.use(None)
    raise exc.DisconnectionError  # the pool connects anew, and tries again


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
