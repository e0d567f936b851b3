"""Requests share connections in order of arrival, and lose none."""

import asyncio
import gc
import random
import sys
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

import psutil
import pytest
from hypothesis import settings
from sqlalchemy import Engine, exc, func, literal, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util.concurrency import greenlet_spawn
from sqlmodel.ext.asyncio.session import AsyncSession

from postgres import dialect
from postgres.engine import DatabaseBusy, OrderedPool, open_engine
from postgres.statements import CompiledStatement
from postgres.tests.asking import Run, scalar, time_limit, wait_until, wait_until_true
from postgres.tests.scripted_server import error, scripted_server
from postgres.url import DatabaseUrl

FOREVER = 30.0  # seconds: longer than any test waits


async def take(engine: AsyncEngine) -> AsyncConnection:
    """Check out a connection in another task, as another request would."""

    async def connect() -> AsyncConnection:
        return await engine.connect()

    return await asyncio.create_task(connect())


# The queue.


def test_a_request_that_returns_its_connection_does_not_overtake_waiting_ones(
    run: Run, server: DatabaseUrl
) -> None:
    order: list[str] = []

    async def ask(engine: AsyncEngine, name: str, times: int) -> None:
        for _ in range(times):
            connection = await engine.connect()
            order.append(name)
            await connection.scalar(select(literal(42)))
            await connection.close()  # then asks for the next one, before any other task runs

    async def use() -> None:
        async with open_engine(server) as engine, asyncio.TaskGroup() as tasks:
            tasks.create_task(ask(engine, "greedy", 5))
            tasks.create_task(ask(engine, "first", 1))
            tasks.create_task(ask(engine, "second", 1))

    run(use())

    assert order == ["greedy", "first", "second", *["greedy"] * 4]


def test_a_full_queue_refuses_at_once(run: Run, server: DatabaseUrl) -> None:
    async def use() -> list[Any]:
        async with open_engine(server, queue_size=2, queue_seconds=FOREVER) as engine:
            taken = await take(engine)
            waiting = [asyncio.create_task(scalar(engine)) for _ in range(2)]
            await asyncio.sleep(0)
            async with asyncio.timeout(5):
                with pytest.raises(DatabaseBusy, match="too many requests wait"):
                    await scalar(engine)
            await taken.close()
            return await asyncio.gather(*waiting)

    assert run(use()) == [42, 42]


@pytest.mark.parametrize("limit", ["of the queue", "of the request"])
def test_a_wait_in_the_queue_ends_in_time(run: Run, server: DatabaseUrl, limit: str) -> None:
    queue_seconds = 0.2 if limit == "of the queue" else FOREVER
    request_seconds = 0.2 if limit == "of the request" else FOREVER

    async def use() -> float:
        async with open_engine(server, queue_seconds=queue_seconds) as engine:
            taken = await take(engine)
            start = asyncio.get_running_loop().time()
            with time_limit(request_seconds), pytest.raises(DatabaseBusy, match="are in use"):
                await scalar(engine)
            seconds = asyncio.get_running_loop().time() - start
            await taken.close()
            return seconds

    assert 0.1 < run(use()) < FOREVER / 3


def test_if_a_connection_cannot_be_opened_the_next_request_tries_at_once(
    run: Run, embedded_server: DatabaseUrl
) -> None:
    refusal = error("password authentication failed")

    async def use(port: int) -> list[Any]:
        url = embedded_server.replace(port=port)
        async with open_engine(url, queue_seconds=FOREVER) as engine, asyncio.timeout(10):
            return await asyncio.gather(*(scalar(engine) for _ in range(4)), return_exceptions=True)

    with scripted_server(refusal, refusal, behind=embedded_server) as proxy:
        first, second, *others = run(use(proxy.port))

    assert (type(first), type(second)) == (exc.OperationalError, exc.OperationalError)
    assert others == [42, 42]


def test_if_a_connection_cannot_be_opened_a_newcomer_does_not_overtake(
    run: Run, embedded_server: DatabaseUrl
) -> None:
    order: list[str] = []

    async def ask(engine: AsyncEngine, name: str) -> None:
        await scalar(engine)
        order.append(name)

    async def fail_and_come_again(engine: AsyncEngine) -> None:
        with pytest.raises(exc.OperationalError):
            await scalar(engine)
        await ask(engine, "newcomer")

    async def use(port: int) -> None:
        url = embedded_server.replace(port=port)
        async with open_engine(url, queue_seconds=FOREVER) as engine, asyncio.TaskGroup() as tasks:
            tasks.create_task(fail_and_come_again(engine))
            tasks.create_task(ask(engine, "waiting"))

    with scripted_server(error("too bad"), behind=embedded_server) as proxy:
        run(use(proxy.port))

    assert order == ["waiting", "newcomer"]


def test_a_cancelled_request_passes_its_connection_on(run: Run, server: DatabaseUrl) -> None:
    async def use() -> Any:
        async with open_engine(server, queue_seconds=FOREVER) as engine, asyncio.timeout(10):
            taken = await take(engine)
            leaving, staying = (asyncio.create_task(scalar(engine)) for _ in range(2))
            await asyncio.sleep(0)
            await taken.close()
            leaving.cancel()  # it has been given the connection, but has not run since
            answer = await staying
            assert leaving.cancelled()
            return answer

    assert run(use()) == 42


def test_a_cancelled_request_passes_its_turn_to_connect_on(
    run: Run, embedded_server: DatabaseUrl
) -> None:
    async def use(port: int) -> Any:
        async def fail() -> None:
            with pytest.raises(exc.OperationalError):
                await scalar(engine)
            leaving.cancel()  # it is its turn, but it has not run since

        url = embedded_server.replace(port=port)
        async with open_engine(url, queue_seconds=FOREVER) as engine, asyncio.timeout(10):
            failing = asyncio.create_task(fail())
            leaving, staying = (asyncio.create_task(scalar(engine)) for _ in range(2))
            answer = await staying
            await failing
            assert leaving.cancelled()
            return answer

    with scripted_server(error("too bad"), behind=embedded_server) as proxy:
        assert run(use(proxy.port)) == 42


@pytest.fixture
def waking(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that makes connecting slower from then on, like a waking compute."""

    async def wake_up(*arguments: Any) -> str | None:
        await asyncio.sleep(0.5)
        return await choose_address(*arguments)

    choose_address = dialect.choose_address
    return lambda: monkeypatch.setattr(dialect, "choose_address", wake_up)


def test_requests_wait_longer_while_all_connections_are_being_opened(
    run: Run, server: DatabaseUrl, waking: Callable[[], None]
) -> None:
    async def use() -> list[Any]:
        async with open_engine(server, queue_seconds=0.1) as engine:
            waking()
            return await asyncio.gather(*(scalar(engine) for _ in range(3)))

    assert run(use()) == [42, 42, 42]


def test_requests_do_not_wait_longer_while_a_connection_is_in_use(
    run: Run, server: DatabaseUrl, waking: Callable[[], None]
) -> None:
    async def use() -> list[Any]:
        async with open_engine(server, pool_size=2, queue_seconds=0.1) as engine:
            taken = await take(engine)
            waking()
            asking = (scalar(engine) for _ in range(2))
            answers = await asyncio.gather(*asking, return_exceptions=True)
            await taken.close()
            return answers

    answer, refusal = run(use())

    assert answer == 42
    assert isinstance(refusal, DatabaseBusy)


def test_a_task_can_hold_only_one_connection_per_engine(run: Run, server: DatabaseUrl) -> None:
    async def use() -> object:
        async with (
            open_engine(server, pool_size=2) as engine,
            open_engine(server) as other,
            engine.connect(),
        ):
            answer = await scalar(other)
            with pytest.raises(RuntimeError, match="holds a connection already"):
                await scalar(engine)
            return answer

    assert run(use()) == 42


def test_a_transaction_started_by_a_statement_ends_with_its_request(
    run: Run, server: DatabaseUrl
) -> None:
    async def use() -> None:
        async with open_engine(server) as engine, open_engine(server) as other:
            for statement in ("BEGIN", "CREATE TABLE kept (id integer)"):
                async with engine.connect() as connection:
                    await connection.execution_options(isolation_level="AUTOCOMMIT")
                    await connection.execute(text(statement))
            async with other.begin() as connection:
                await connection.execute(text("SET LOCAL lock_timeout = '5s'; DROP TABLE kept"))

    run(use())


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
@pytest.mark.parametrize("way", ["forgotten", "detached"])
def test_a_task_that_gave_up_its_connection_can_take_another(
    run: Run, server: DatabaseUrl, way: str
) -> None:
    async def use() -> object:
        async with open_engine(server) as engine:
            connection = await engine.connect()
            raw = await connection.get_raw_connection()
            if way == "detached":
                raw.detach()
            del connection, raw
            gc.collect()
            return await scalar(engine)

    assert run(use()) == 42


# No connection is lost.

# On each of the two event loops. More where the tests look for new examples, as the template's do.
REQUESTS = 1_000 if settings.get_current_profile_name() == "fixed" else 5_000
AT_ONCE = 60
POOL_SIZE = 3
NUMBERS = CompiledStatement(text("SELECT generate_series(1, 20) FROM pg_sleep(0.001)"))

PHASES = ("waiting", "connecting", "executing", "fetching", "closing")

# What a request calls when it reaches a phase.
reach: ContextVar[Callable[[str], None]] = ContextVar("reach")


def send_alone(engine: Engine) -> None:
    with engine.connect() as connection:
        driver_connection = connection.connection.driver_connection
        assert driver_connection is not None
        driver_connection.autocommit = True
        reach.get()("executing")
        NUMBERS.execute(connection, {})


async def send_one_statement(engine: AsyncEngine) -> None:
    await greenlet_spawn(send_alone, engine.sync_engine)


async def commit(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await session.connection()
        reach.get()("executing")
        await session.scalar(select(literal(1)))
        reach.get()("closing")
        await session.commit()


async def roll_back(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        reach.get()("executing")
        await connection.execute(select(literal(1)))
        reach.get()("closing")


async def stream(engine: AsyncEngine) -> None:
    numbers = select(func.generate_series(1, 60)).execution_options(yield_per=20)
    async with AsyncSession(engine) as session:
        rows = await session.stream(numbers)
        reach.get()("fetching")
        async for _ in rows:
            pass


async def cancel_one(engine: AsyncEngine, chance: random.Random) -> str:
    """Start a request, and cancel it soon after it reaches a phase. Returns its last phase.

    Most end while they wait: they need no new connection afterwards, and are fast.
    """
    phases: list[str] = []
    (target,) = chance.choices(PHASES, weights=(5, 1, 1, 1, 1))
    delay = chance.expovariate(1 / 0.02 if target == "waiting" else 1 / 0.001)

    def note(phase: str) -> None:
        phases.append(phase)
        if phase == target:
            asyncio.get_running_loop().call_later(delay, task.cancel)

    async def request() -> None:
        reach.set(note)
        note("waiting")
        async with asyncio.timeout(FOREVER):
            await chance.choice([send_one_statement, commit, roll_back, stream])(engine)

    task = asyncio.create_task(request())
    await asyncio.wait([task])
    if task.cancelled():
        return phases[-1]
    task.result()
    return "done"


async def cancel_many(engine: AsyncEngine) -> Counter[str]:
    """Cancel REQUESTS requests, AT_ONCE at a time. Returns the counts of their last phases."""
    chance = random.Random(26)  # noqa: S311  (the same each time)
    ends: Counter[str] = Counter()

    async def go_on() -> None:
        while ends.total() - ends["done"] < REQUESTS:
            ends[await cancel_one(engine, chance)] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(go_on())
    return ends


def in_use(engine: AsyncEngine) -> int:
    assert isinstance(engine.pool, OrderedPool)
    return engine.pool.checkedout()


async def use_all(engine: AsyncEngine) -> list[Any]:
    """Use all connections of the pool at the same time."""
    all_are_held = asyncio.Barrier(POOL_SIZE)

    async def use_one() -> Any:
        async with engine.connect() as connection:
            await all_are_held.wait()
            return await connection.scalar(select(literal(42)))

    async with asyncio.timeout(10):
        return await asyncio.gather(*(use_one() for _ in range(POOL_SIZE)))


@pytest.mark.skipif(sys.platform == "win32", reason="counts file descriptors")
def test_thousands_of_cancelled_requests_lose_no_connection(
    run: Run, embedded_server: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"cancelled {uuid4()}"
    options = (*embedded_server.options, ("application_name", name))
    url = embedded_server.replace(options=options)
    all_others_have_gone = (
        "SELECT count(*) = :number FROM pg_stat_activity WHERE application_name = :name"
    )
    files = psutil.Process().num_fds

    async def use() -> Counter[str]:
        at_first = files()
        # On a busy machine, connecting again takes long, and the queue with it.
        async with open_engine(url, pool_size=POOL_SIZE, queue_seconds=FOREVER) as engine:
            ends = await cancel_many(engine)
            # A cancelled session finishes its work in the background.
            await wait_until(lambda: not in_use(engine))
            assert await use_all(engine) == [42] * POOL_SIZE
            assert files() == at_first + POOL_SIZE
            await wait_until_true(engine, all_others_have_gone, number=POOL_SIZE, name=name)
        assert files() == at_first
        return ends

    async def note_and_choose(*arguments: Any) -> str | None:
        if note := reach.get(None):
            note("connecting")
        return await choose_address(*arguments)

    choose_address = dialect.choose_address
    monkeypatch.setattr(dialect, "choose_address", note_and_choose)

    ends = run(use())

    assert ends.keys() == {*PHASES, "done"}
