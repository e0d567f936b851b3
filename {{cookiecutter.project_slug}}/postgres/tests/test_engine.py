"""The engine and its driver: psycopg2 on the event loop, with a real PostgreSQL.

Each test runs on asyncio's event loop and on uvloop, which uvicorn prefers.
"""

import asyncio
import gc
import io
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from contextvars import Context
from operator import methodcaller
from typing import Any
from uuid import uuid4

import psutil
import psycopg2
import psycopg2.errors
import pytest
from psycopg2.extensions import get_wait_callback
from sqlalchemy import create_engine, event, exc, func, insert, inspect, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlmodel.ext.asyncio.session import AsyncSession

from postgres import engine as engine_module
from postgres.dialect import AsyncPsycopg2Dialect, set_timeout_until
from postgres.engine import open_engine
from postgres.explain import explain
from postgres.tests.asking import Run, scalar, time_limit, wait_until, wait_until_true
from postgres.tests.counting_proxy import CountingProxy, counting_proxy
from postgres.tests.scripted_server import SILENCE, scripted_server
from postgres.tests.servers import create_database
from postgres.url import DatabaseUrl


class Base(DeclarativeBase):
    """Base class of tables for these tests."""


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


def with_items(url: DatabaseUrl) -> DatabaseUrl:
    """Create the table of Item in a database."""
    engine = create_engine(url.for_sqlalchemy())
    Base.metadata.create_all(engine)
    engine.dispose()
    return url


@pytest.fixture(scope="module")
def items_url(new_database: Callable[[], DatabaseUrl]) -> DatabaseUrl:
    return with_items(new_database())


@pytest.fixture(scope="module")
def embedded_items_url(embedded_server: DatabaseUrl) -> DatabaseUrl:
    """For tests with a proxy, which does not understand TLS."""
    return with_items(create_database(embedded_server))


@pytest.fixture
def proxy(embedded_server: DatabaseUrl) -> Iterator[CountingProxy]:
    with counting_proxy(embedded_server) as proxy:
        yield proxy


async def turns_during(work: Awaitable[Any]) -> int:
    """Return how often another task ran until the work was done."""
    task = asyncio.ensure_future(work)
    turns = 0
    while not task.done():
        await asyncio.sleep(0.001)
        turns += 1
    await task
    return turns


async def measure(work: Coroutine[Any, Any, Any]) -> tuple[exc.OperationalError, float]:
    """Return the error that work raises, and the seconds until then."""
    start = asyncio.get_running_loop().time()
    with pytest.raises(exc.OperationalError) as caught:
        async with asyncio.timeout(10):
            await work
    return caught.value, asyncio.get_running_loop().time() - start


# The event loop.


def test_the_event_loop_runs_while_the_server_works(run: Run, server: DatabaseUrl) -> None:
    async def use() -> int:
        async with open_engine(server) as engine:
            await scalar(engine)
            return await turns_during(scalar(engine, "SELECT pg_sleep(0.5)"))

    assert run(use()) > 5


def test_statements_on_several_connections_run_concurrently(run: Run, server: DatabaseUrl) -> None:
    lock = uuid4().int % 2**31

    async def use() -> list[int]:
        async with (
            open_engine(server, pool_size=10, queue_seconds=60) as engine,
            open_engine(server) as watcher,
            open_engine(server) as other,
            other.connect() as holder,
        ):
            await holder.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
            query = "SELECT 42 FROM pg_advisory_xact_lock_shared(:lock)"
            asking = [asyncio.create_task(scalar(engine, query, lock=lock)) for _ in range(10)]
            all_wait = (
                "SELECT count(*) = 10 FROM pg_locks"
                " WHERE locktype = 'advisory' AND objid = :lock AND NOT granted"
            )
            await wait_until_true(watcher, all_wait, lock=lock)
            await holder.rollback()
            answers: list[int] = await asyncio.gather(*asking)
            return answers

    assert run(use()) == [42] * 10


def test_connections_are_reused(run: Run, server: DatabaseUrl) -> None:
    made: list[object] = []

    async def ask_often(engine: AsyncEngine) -> None:
        for _ in range(20):
            await scalar(engine, "SELECT 1")

    async def use() -> None:
        async with open_engine(server, pool_size=2) as engine:
            event.listen(engine.sync_engine, "connect", lambda *its: made.append(its))
            await asyncio.gather(*(ask_often(engine) for _ in range(5)))

    run(use())

    assert len(made) == 2


def test_the_event_loop_runs_while_large_messages_are_transferred(
    run: Run, embedded_server: DatabaseUrl
) -> None:
    long = "x" * 20_000_000

    async def use() -> tuple[int, str]:
        async with open_engine(embedded_server) as engine, engine.connect() as connection:
            asking = asyncio.create_task(connection.execute(text("SELECT :text"), {"text": long}))
            turns = await turns_during(asking)
            return turns, asking.result().scalar_one()

    turns, answer = run(use())
    assert turns > 2
    assert answer == long


# Connecting.


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Resolve every host name to these addresses."""

    def look_up(_host: str, port: int, *_rest: object, **_options: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@contextmanager
def silent_addresses(port: int) -> Iterator[list[str]]:
    """Reserve addresses that drop new connections: their backlogs are full."""
    addresses = [f"127.0.0.{number}" for number in range(2, 6)]
    with ExitStack() as stack:
        for address in addresses:
            listener = stack.enter_context(socket.socket())
            listener.bind((address, port))
            listener.listen(0)
            for _ in range(3):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex((address, port))
        yield addresses


async def address_in_use(url: DatabaseUrl) -> tuple[str, str]:
    """Return the host and the address that were passed to libpq."""
    async with open_engine(url) as engine, engine.connect() as connection:
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        parameters = raw.driver_connection.info.dsn_parameters
        return parameters["host"], parameters["hostaddr"]


def test_an_address_that_refuses_is_skipped_and_tls_keeps_the_host_name(
    embedded_server: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, "127.0.0.2", "127.0.0.1")

    found = asyncio.run(address_in_use(embedded_server.replace(host="db.example.com")))

    assert found == ("db.example.com", "127.0.0.1")


@pytest.mark.skipif(sys.platform != "linux", reason="fills a backlog as Linux counts it")
def test_addresses_that_do_not_answer_do_not_use_up_the_time(
    embedded_server: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    with silent_addresses(embedded_server.port) as silent:
        resolve(monkeypatch, *silent, "127.0.0.1")
        found = asyncio.run(address_in_use(embedded_server.replace(host="db.example.com")))

    assert found == ("db.example.com", "127.0.0.1")


@pytest.mark.parametrize("name", ["no-such-host.invalid", f"{'x' * 70}.example.com"])
def test_a_name_without_an_address_is_an_unknown_host(
    run: Run, embedded_server: DatabaseUrl, name: str
) -> None:
    url = embedded_server.replace(host=name)

    async def use() -> str:
        async with open_engine(url) as engine:
            with pytest.raises(exc.OperationalError) as caught:
                await scalar(engine)
            return explain(caught.value, url).name

    assert run(use()) == "host-unknown"


@pytest.mark.parametrize(
    ("connect_seconds", "timeout_in_url"), [(0.2, "60"), (0.2, "0"), (60.0, "1")]
)
def test_a_connection_attempt_to_a_silent_server_ends_in_time(
    run: Run,
    embedded_server: DatabaseUrl,
    monkeypatch: pytest.MonkeyPatch,
    connect_seconds: float,
    timeout_in_url: str,
) -> None:
    monkeypatch.setattr(engine_module, "ATTEMPT_SECONDS", connect_seconds)

    async def use(url: DatabaseUrl) -> tuple[str, float]:
        async with open_engine(url) as engine:
            error, seconds = await measure(scalar(engine))
            return explain(error, url).name, seconds

    options = (*embedded_server.options, ("connect_timeout", timeout_in_url))
    with scripted_server(SILENCE) as silent:
        finding, seconds = run(use(embedded_server.replace(port=silent.port, options=options)))

    assert finding == "no-answer"
    assert seconds < 2


def test_a_request_to_a_silent_server_ends_in_time(run: Run, embedded_server: DatabaseUrl) -> None:
    async def use(url: DatabaseUrl) -> float:
        async with open_engine(url) as engine:
            with time_limit(0.2):
                _, seconds = await measure(scalar(engine))
            return seconds

    with scripted_server(SILENCE) as silent:
        seconds = run(use(embedded_server.replace(port=silent.port)))

    assert seconds < 2


async def end_an_attempt(engine: AsyncEngine, port: int, end: str) -> None:
    """Try to connect, and stop before it succeeds."""

    async def attempt() -> None:
        with time_limit(0.1 if end == "time limit" else 60):
            await scalar(engine)

    attempting = asyncio.create_task(attempt())
    await wait_until(lambda: connections_to(port) or attempting.done())
    if end == "cancelled":
        attempting.cancel()
    await asyncio.wait([attempting])
    assert attempting.cancelled() or isinstance(attempting.exception(), exc.OperationalError)


@pytest.mark.parametrize("end", ["time limit", "cancelled"])
def test_an_aborted_attempt_leaves_no_connection_open(
    run: Run, embedded_server: DatabaseUrl, end: str
) -> None:
    async def use(port: int) -> int:
        async with open_engine(embedded_server.replace(port=port)) as engine:
            await end_an_attempt(engine, port, end)
            return connections_to(port)

    gc.disable()  # it would close them eventually
    try:
        with scripted_server(SILENCE) as silent:
            left = run(use(silent.port))
    finally:
        gc.enable()

    assert left == 0


def connections_to(port: int) -> int:
    """Return the number of this process's connections to a port."""
    connections = psutil.Process().net_connections("tcp")
    return sum(1 for one in connections if one.raddr and one.raddr.port == port)


def test_a_connection_that_died_idle_is_replaced(run: Run, embedded_server: DatabaseUrl) -> None:
    async def use() -> list[int]:
        pids = []
        async with open_engine(embedded_server) as own, open_engine(embedded_server) as other:
            for _ in range(2):
                pids.append(await scalar(own, "SELECT pg_backend_pid()"))
                await scalar(other, f"SELECT pg_terminate_backend({pids[-1]}, 5000)")
        return pids

    first, second = run(use())
    assert first != second


ASK_THE_TIME = "SELECT date_part('epoch', clock_timestamp())"


@pytest.mark.parametrize(("idle_seconds", "tries"), [(30.0, []), (-1.0, [ASK_THE_TIME])])
def test_only_a_connection_that_was_idle_for_long_is_tried_first(
    run: Run,
    proxy: CountingProxy,
    embedded_server: DatabaseUrl,
    monkeypatch: pytest.MonkeyPatch,
    idle_seconds: float,
    tries: list[str],
) -> None:
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", idle_seconds)

    async def use() -> None:
        async with open_engine(embedded_server.replace(port=proxy.port)) as engine:
            await scalar(engine)
            proxy.queries.clear()
            await scalar(engine)

    run(use())

    assert proxy.queries == [*tries, "BEGIN", "SELECT 42", "ROLLBACK"]


def test_a_disconnect_between_two_statements_is_noticed_at_once(
    run: Run, embedded_server: DatabaseUrl
) -> None:
    async def hang_up(pid: int) -> None:
        async with open_engine(embedded_server) as other:
            await scalar(other, f"SELECT pg_terminate_backend({pid}, 5000)")

    async def use() -> tuple[exc.OperationalError, float]:
        async with open_engine(embedded_server) as engine, engine.connect() as connection:
            pid = await connection.scalar(text("SELECT pg_backend_pid()"))
            await asyncio.create_task(hang_up(pid), context=Context())
            return await measure(connection.execute(text("SELECT 1")))

    error, seconds = run(use())
    assert explain(error, embedded_server).name == "server-stopped"
    assert seconds < 2


# Two tasks on one connection.


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("commit", "cannot commit while another task sends a statement"),
        ("rollback", "None"),
        ("close", "None"),
        ("invalidate", "None"),
    ],
)
def test_a_connection_can_be_closed_while_another_task_waits_for_its_result(
    run: Run, server: DatabaseUrl, name: str, refusal: str
) -> None:
    async def share(engine: AsyncEngine) -> list[object]:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            waiting = asyncio.create_task(connection.execute(text("SELECT pg_sleep(60)")))
            await asyncio.sleep(0.05)
            end = await asyncio.gather(methodcaller(name)(connection), return_exceptions=True)
        return [*end, *await asyncio.gather(waiting, return_exceptions=True)]

    async def use() -> list[object]:
        async with open_engine(server) as engine, asyncio.timeout(10):
            return [*await asyncio.create_task(share(engine)), await scalar(engine)]

    end, error, answer = run(use())

    assert refusal in str(end)
    assert "another task closed this connection" in str(error)
    assert answer == 42


# The wait callback, of which a process has one.


def ask_synchronously(url: DatabaseUrl) -> int:
    with closing(psycopg2.connect(url.for_libpq())) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT 42")
        answer: int = cursor.fetchone()[0]  # type: ignore[index]
        return answer


def test_an_engine_cannot_connect_outside_open_engine(run: Run, server: DatabaseUrl) -> None:
    async def use() -> None:
        async with open_engine(server) as engine:
            pass
        await scalar(engine)

    with pytest.raises(RuntimeError, match=r"use the engine within open_engine\(…\)"):
        run(use())


def test_closing_the_engine_restores_psycopg2(run: Run, server: DatabaseUrl) -> None:
    async def use() -> None:
        async with open_engine(server) as engine, open_engine(server):
            await scalar(engine)

    run(use())

    assert get_wait_callback() is None
    copy = io.StringIO()
    with closing(psycopg2.connect(server.for_libpq())) as connection:
        connection.cursor().copy_expert("COPY (SELECT 42) TO STDOUT", copy)
    assert copy.getvalue() == "42\n"


def test_an_engine_works_after_one_opened_earlier_is_closed(run: Run, server: DatabaseUrl) -> None:
    async def use() -> object:
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            await first.enter_async_context(open_engine(server))
            engine = await second.enter_async_context(open_engine(server))
            await first.aclose()
            return await scalar(engine)

    assert run(use()) == 42
    assert get_wait_callback() is None


def test_a_synchronous_connection_works_in_a_thread_meanwhile(
    run: Run, server: DatabaseUrl
) -> None:
    async def use() -> list[int]:
        async with open_engine(server) as engine:
            in_thread = asyncio.to_thread(ask_synchronously, server)
            answers: list[int] = await asyncio.gather(in_thread, scalar(engine))
            return answers

    assert run(use()) == [42, 42]


def test_a_synchronous_connection_works_in_run_sync(run: Run, server: DatabaseUrl) -> None:
    async def use() -> int:
        async with open_engine(server) as engine, engine.connect() as connection:
            return await connection.run_sync(lambda _: ask_synchronously(server))

    assert run(use()) == 42


# Time limits.

HAS_ENDED = (
    "SELECT count(*) = 0 FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%' || :mark"
)


def test_a_statement_past_its_time_limit_ends_here_and_on_the_server(
    run: Run, embedded_server: DatabaseUrl
) -> None:
    mark = f"-- {uuid4().hex}"

    async def use() -> tuple[float, int]:
        async with open_engine(embedded_server) as engine, open_engine(embedded_server) as other:
            with time_limit(0.3):
                _, seconds = await measure(scalar(engine, f"SELECT pg_sleep(60) {mark}"))
            answer = await scalar(engine)
            await wait_until_true(other, HAS_ENDED, mark=mark)
            return seconds, answer

    seconds, answer = run(use())
    assert seconds < 2
    assert answer == 42


def test_executemany_past_its_time_limit_ends_here_and_on_the_server(
    run: Run, embedded_server: DatabaseUrl
) -> None:
    mark = f"-- {uuid4().hex}"
    statement = text(f"SELECT pg_sleep(:seconds) {mark}")

    async def execute_many(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.execute(statement, [{"seconds": 60}] * 2)

    async def use() -> float:
        async with open_engine(embedded_server) as engine, open_engine(embedded_server) as other:
            with time_limit(0.3):
                _, seconds = await measure(execute_many(engine))
            await wait_until_true(other, HAS_ENDED, mark=mark)
            return seconds

    assert run(use()) < 2


async def hold_back(
    url: DatabaseUrl, proxy: CountingProxy, level: str, insertion: str, query: str
) -> bool:
    """Insert an item, while one query of it is held back until its time limit is over.

    Returns whether the item is there after the query was delivered.
    """
    name = uuid4().hex
    async with open_engine(url.replace(port=proxy.port)) as engine, open_engine(url) as other:
        pid = await scalar(engine, "SELECT pg_backend_pid()")
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level=level)

            async def insert_item() -> None:
                await connection.execute(text(insertion), {"name": name})
                await connection.commit()

            # Enough for the statements before it, on a busy machine too.
            with time_limit(2), proxy.holding_back(query):
                await measure(insert_item())
        gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = :pid"
        await wait_until_true(other, gone, pid=pid)
        there = "SELECT count(*) > 0 FROM items WHERE name = :name"
        return bool(await scalar(other, there, name=name))


INSERT = "INSERT INTO items (name) SELECT :name"


@pytest.mark.parametrize(
    ("level", "insertion", "query"),
    [
        ("AUTOCOMMIT", INSERT, "INSERT"),
        ("READ COMMITTED", INSERT, "COMMIT"),
        ("READ COMMITTED", f"{INSERT} FROM pg_sleep(0.6)", "COMMIT"),
        ("READ COMMITTED", f"SAVEPOINT one; {INSERT}; RELEASE one", "COMMIT"),
    ],
)
def test_what_arrives_after_its_time_limit_changes_nothing(
    run: Run,
    proxy: CountingProxy,
    embedded_items_url: DatabaseUrl,
    level: str,
    insertion: str,
    query: str,
) -> None:
    for _ in range(5):  # a busy machine may not come to the query within the limit
        assert not run(hold_back(embedded_items_url, proxy, level, insertion, query))
        if query in proxy.queries[-1]:
            break
    assert query in proxy.queries[-1]


def test_a_server_whose_clock_was_set_forward_refuses_nothing(
    run: Run, proxy: CountingProxy, embedded_items_url: DatabaseUrl
) -> None:
    async def use() -> None:
        async with open_engine(embedded_items_url.replace(port=proxy.port)) as engine:
            await scalar(engine)
            dialect = engine.sync_engine.dialect
            assert isinstance(dialect, AsyncPsycopg2Dialect)
            assert dialect.clock._ahead is not None
            dialect.clock._ahead -= 3600
            proxy.queries.clear()
            with time_limit(5):
                for _ in range(2):
                    await ask_at_level(
                        engine, "AUTOCOMMIT", "UPDATE items SET id = 0 WHERE false RETURNING id"
                    )

    run(use())

    refused, clock, repeated, next_one = proxy.queries
    assert "UPDATE" in refused
    assert clock.endswith(ASK_THE_TIME)
    assert "UPDATE" in repeated
    assert "UPDATE" in next_one


@pytest.mark.parametrize(
    ("milliseconds", "timeout"), [(5000.5, "5001ms"), (1.5, "2ms"), (0.4, "1ms"), (-0.4, None)]
)
def test_time_that_is_left_is_never_rounded_to_no_limit(
    embedded_server: DatabaseUrl, milliseconds: float, timeout: str | None
) -> None:
    moment = 1_800_000_000
    now = f"to_timestamp({moment} - {milliseconds / 1000})"
    command = set_timeout_until(moment).replace("clock_timestamp()", now)

    with closing(psycopg2.connect(embedded_server.for_libpq())) as connection:
        cursor = connection.cursor()
        if timeout is None:
            with pytest.raises(psycopg2.errors.InvalidParameterValue, match="statement_timeout"):
                cursor.execute(command)
        else:
            cursor.execute(f"{command}; SHOW statement_timeout")
            assert cursor.fetchone() == (timeout,)


def test_a_time_limit_is_over_at_its_end(run: Run, server: DatabaseUrl) -> None:
    async def use() -> int:
        async with open_engine(server) as engine:
            await scalar(engine)  # takes time to connect
            with time_limit(1.0):
                await ask_at_level(engine, "AUTOCOMMIT", "SELECT 1")
            answer: int = await scalar(engine, "SELECT 42 FROM pg_sleep(1.1)")
            return answer

    assert run(use()) == 42


# What SQLAlchemy relies on.


async def ask_at_level(engine: AsyncEngine, level: Any, sql: str) -> Any:
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level=level)
        return await connection.scalar(text(sql))


def test_autocommit_costs_no_round_trip(
    run: Run, proxy: CountingProxy, embedded_server: DatabaseUrl
) -> None:
    async def use() -> None:
        async with open_engine(embedded_server.replace(port=proxy.port)) as engine:
            await scalar(engine)  # SQLAlchemy sends some queries on a new connection
            proxy.queries.clear()
            await ask_at_level(engine, "AUTOCOMMIT", "SELECT 1")
            await scalar(engine, "SELECT 2")
            await ask_at_level(engine, "AUTOCOMMIT", "SELECT 3")

    run(use())

    assert proxy.queries == ["SELECT 1", "BEGIN", "SELECT 2", "ROLLBACK", "SELECT 3"]


def test_an_isolation_level_costs_no_round_trip_and_ends_with_its_transaction(
    run: Run, proxy: CountingProxy, embedded_server: DatabaseUrl
) -> None:
    level = "SHOW transaction_isolation"

    async def use() -> list[str]:
        async with open_engine(embedded_server.replace(port=proxy.port)) as engine:
            await scalar(engine)
            proxy.queries.clear()
            return [await ask_at_level(engine, "SERIALIZABLE", level), await scalar(engine, level)]

    levels = run(use())

    assert levels == ["serializable", "read committed"]
    serializable = ["BEGIN ISOLATION LEVEL SERIALIZABLE", level, "ROLLBACK"]
    assert proxy.queries == [*serializable, "BEGIN", level, "ROLLBACK"]


@pytest.mark.parametrize(
    ("sql", "kind", "original", "code"),
    [
        ("SELECT 1 / 0", exc.DataError, psycopg2.errors.DivisionByZero, "22012"),
        ("SELECT FROM nothing", exc.ProgrammingError, psycopg2.errors.UndefinedTable, "42P01"),
        (
            "INSERT INTO items (name) VALUES ('twice'), ('twice')",
            exc.IntegrityError,
            psycopg2.errors.UniqueViolation,
            "23505",
        ),
    ],
)
def test_errors_keep_their_class_and_code(
    run: Run,
    items_url: DatabaseUrl,
    sql: str,
    kind: type[exc.DBAPIError],
    original: type[psycopg2.Error],
    code: str,
) -> None:
    async def use() -> psycopg2.Error:
        async with open_engine(items_url) as engine:
            with pytest.raises(kind) as caught:
                await scalar(engine, sql)
            assert await scalar(engine, "SELECT 42") == 42
        assert isinstance(caught.value.orig, psycopg2.Error)
        return caught.value.orig

    error = run(use())
    assert type(error) is original
    assert error.pgcode == code


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "READ COMMITTED"])
@pytest.mark.parametrize("sql", ["COPY (SELECT 1) TO STDOUT", "COPY items FROM STDIN"])
def test_copy_is_refused_and_leaks_no_connection(
    run: Run, items_url: DatabaseUrl, sql: str, level: str
) -> None:
    async def use() -> int:
        async with open_engine(items_url, queue_seconds=0.1) as engine:
            with pytest.raises(exc.DBAPIError, match="cannot COPY"):
                await ask_at_level(engine, level, sql)
            answer: int = await scalar(engine)
            return answer

    assert run(use()) == 42


def test_a_session_streams_rows_from_the_server(
    run: Run, proxy: CountingProxy, embedded_server: DatabaseUrl
) -> None:
    numbers = select(func.generate_series(1, 3000))

    async def use() -> list[int]:
        async with open_engine(embedded_server.replace(port=proxy.port)) as engine:
            with time_limit(30):
                async with AsyncSession(engine) as session:
                    rows = await session.stream_scalars(numbers)
                    return [number async for number in rows]

    numbers_found = run(use())

    assert numbers_found == list(range(1, 3001))
    fetches = [query for query in proxy.queries if query.startswith("FETCH")]
    assert len(fetches) > 3  # each returns a part of the rows


async def in_rolled_back_session[T](
    url: DatabaseUrl, work: Callable[[AsyncSession], Awaitable[T]]
) -> T:
    async with open_engine(url) as engine, AsyncSession(engine) as session:
        return await work(session)


def test_a_session_inserts_many_rows_and_gets_their_ids(run: Run, items_url: DatabaseUrl) -> None:
    async def insert_many(session: AsyncSession) -> list[int]:
        items = [Item(name=f"item {number}") for number in range(2000)]
        session.add_all(items)
        await session.flush()
        names = {item.id: item.name async for item in await session.stream_scalars(select(Item))}
        assert names == {item.id: item.name for item in items}
        return [item.id for item in items]

    ids = run(in_rolled_back_session(items_url, insert_many))

    assert len(set(ids)) == 2000


def test_a_bulk_insert_returns_a_row_for_each_one(run: Run, items_url: DatabaseUrl) -> None:
    names = [f"item {number}" for number in range(2000)]

    async def insert_many(session: AsyncSession) -> list[str]:
        connection = await session.connection()
        statement = insert(Item).returning(Item.name, sort_by_parameter_order=True)
        result = await connection.execute(statement, [{"name": name} for name in names])
        return list(result.scalars())

    assert run(in_rolled_back_session(items_url, insert_many)) == names


def test_synchronous_code_runs_on_a_session(run: Run, items_url: DatabaseUrl) -> None:
    def work(session: Session) -> str:
        session.add(Item(name="by run_sync"))
        session.commit()
        item = session.scalars(select(Item).where(Item.name == "by run_sync")).one()
        name = item.name
        session.delete(item)
        session.commit()
        return name

    assert (
        run(in_rolled_back_session(items_url, lambda session: session.run_sync(work)))
        == "by run_sync"
    )


def test_a_connection_can_be_inspected(run: Run, items_url: DatabaseUrl) -> None:
    async def names(connection: AsyncConnection) -> list[str]:
        return await connection.run_sync(lambda own: inspect(own).get_table_names())

    async def use() -> list[str]:
        async with open_engine(items_url) as engine, engine.connect() as connection:
            return await names(connection)

    assert run(use()) == ["items"]
