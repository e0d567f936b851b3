"""Sessions and statements in requests, also when the database is busy or down; and the schema."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from typing import Annotated, Any, Protocol

import psycopg2
import pytest
from alembic import command
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    exc,
    func,
    insert,
    inspect,
    text,
)
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlmodel import SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

import db
import migrations
from config import PROJECT_DIR
from db import (
    Deadline,
    EngineDep,
    SessionDep,
    StatementDep,
    create_db_and_tables,
    open_engine,
    ping,
    time_limit,
)
from migrations import LOCK_KEY
from postgres import dialect
from postgres import engine as engine_module
from postgres.url import DatabaseUrl
from tests.conftest import holding_connection, served

NOTES = Table("notes", MetaData(), Column("id", Integer, primary_key=True), Column("text", Text))


@pytest.fixture
def notes(engine: Engine) -> Iterator[Table]:
    """An empty table for tests."""
    NOTES.create(engine)
    yield NOTES
    NOTES.drop(engine)


class AppOfSize(Protocol):
    def __call__(self, connections: int, url: DatabaseUrl = ..., **settings: object) -> FastAPI: ...


@pytest.fixture
def app_of_size(database_url: DatabaseUrl, app_with: Callable[..., FastAPI]) -> AppOfSize:
    """Return an app with a pool of some size, and with a route as in tutorials."""

    def build(connections: int, url: DatabaseUrl = database_url, **settings: object) -> FastAPI:
        app = app_with(url, db_pool_size=connections, **settings)

        @app.get("/slow")
        async def slow(session: SessionDep) -> dict[str, int]:
            return {"answer": await session.scalar(text("SELECT 42 FROM pg_sleep(0.05)")) or 0}

        return app

    return build


@contextmanager
def short_requests(seconds: float) -> Iterator[None]:
    """Shorten the time limit of requests that should fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "USE_SECONDS", seconds)
        yield


def test_ping_returns_the_seconds_of_a_round_trip(database_url: DatabaseUrl) -> None:
    async def ask() -> float:
        async with open_engine(database_url) as engine:
            return await ping(engine)

    assert 0 < asyncio.run(ask()) < 3


def test_ping_fails_when_nothing_listens(server: DatabaseUrl) -> None:
    async def ask() -> float:
        async with open_engine(server.replace(port=1)) as engine:
            return await ping(engine)

    with pytest.raises(exc.OperationalError, match="refused"):
        asyncio.run(ask())


def test_a_session_commits_only_if_asked_to(new_database: Callable[[], DatabaseUrl]) -> None:
    async def use() -> list[int]:
        counts = []
        async with open_engine(new_database()) as engine:
            async with engine.begin() as connection:
                await connection.execute(text("CREATE TABLE items ()"))
            for commits in (False, True):
                async with AsyncSession(engine) as session:
                    connection = await session.connection()
                    await connection.execute(text("INSERT INTO items DEFAULT VALUES"))
                    if commits:
                        await session.commit()
                async with AsyncSession(engine) as session:
                    counts.append(await session.scalar(text("SELECT count(*) FROM items")))
        return counts

    assert asyncio.run(use()) == [0, 1]


def test_migrations_and_models_agree(database_url: DatabaseUrl) -> None:
    command.check(migrations.alembic_config(database_url))  # raises on a difference


def test_tables_created_from_models_equal_those_of_the_migrations(
    engine: Engine, new_database: Callable[[], DatabaseUrl]
) -> None:
    url = new_database()

    async def create_twice() -> None:
        async with open_engine(url) as own:
            await create_db_and_tables(own)
            await create_db_and_tables(own)  # keeps existing tables

    asyncio.run(create_twice())

    scratch = create_engine(url.for_sqlalchemy())
    in_models, in_database = (
        {f"{table}: {part}" for table, parts in describe(each).items() for part in parts}
        for each in (scratch, engine)
    )
    scratch.dispose()
    missing = sorted(in_models - in_database)
    left = sorted(part for part in in_database - in_models if not part.startswith("alembic_"))
    advice = "\n".join(["models.py has, and the migrations lack:", *missing])
    advice += "\n".join(["\nthe migrations have, and models.py lacks:", *left])
    assert not missing + left, advice


def describe(engine: Engine) -> dict[str, list[str]]:
    inspector = inspect(engine)
    return {
        table: [
            *sorted(
                f"{column['name']} {column['type']!r} {column['nullable']} {column['default']}"
                for column in inspector.get_columns(table)
            ),
            *sorted(str(index["name"]) for index in inspector.get_indexes(table)),
            *sorted(str(check["name"]) for check in inspector.get_check_constraints(table)),
            *sorted(str(key["name"]) for key in inspector.get_foreign_keys(table)),
        ]
        for table in inspector.get_table_names()
    }


def test_every_migration_can_be_reverted(new_database: Callable[[], DatabaseUrl]) -> None:
    url = new_database()
    migrations.upgrade(url)

    command.downgrade(migrations.alembic_config(url), "base")

    engine = create_engine(url.for_sqlalchemy())
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_replicas_that_migrate_at_once_take_turns(new_database: Callable[[], DatabaseUrl]) -> None:
    url = new_database()
    environment = os.environ | {"DATABASE_URL": url.for_libpq()}
    waiting = text(
        "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database "
        "WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted"
    )
    engine = create_engine(url.for_sqlalchemy())
    with ThreadPoolExecutor(1) as thread, engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})

        # A process of its own, because Alembic migrates one database at a time.
        other = subprocess.Popen(
            [sys.executable, "manage.py", "migrate"], cwd=PROJECT_DIR, env=environment
        )
        this = thread.submit(migrations.upgrade, url)

        deadline = time.monotonic() + 60
        while connection.scalar(waiting) != 2:
            assert time.monotonic() < deadline, "the replicas did not wait for each other"
            time.sleep(0.05)

    this.result()
    assert other.wait(timeout=60) == 0
    assert SQLModel.metadata.tables.keys() <= set(inspect(engine).get_table_names())
    engine.dispose()


def test_more_requests_than_connections_are_all_answered(
    app_of_size: AppOfSize,
) -> None:
    app = app_of_size(5, db_queue_seconds=60)

    # More than the threads in which FastAPI runs what is not async.
    with TestClient(app) as client, ThreadPoolExecutor(50) as clients:
        answers = list(clients.map(lambda _: client.get("/slow"), range(50)))

    assert [answer.status_code for answer in answers] == [200] * 50


def test_a_request_that_waits_too_long_for_a_connection_gets_a_503(
    app_of_size: AppOfSize,
) -> None:
    app = app_of_size(1, db_queue_seconds=0.2)

    with TestClient(app) as client:
        with holding_connection(app, client):
            refused = client.get("/slow")
        afterwards = client.get("/slow")

    assert refused.status_code == 503
    assert refused.json() == {"detail": "all connections are in use"}
    assert int(refused.headers["Retry-After"]) > 0
    assert afterwards.status_code == 200


def test_a_request_that_finds_the_queue_full_gets_a_503_at_once(app_of_size: AppOfSize) -> None:
    app = app_of_size(1, db_queue_size=3, db_queue_seconds=60)  # so that no other limit is met

    with TestClient(app) as client, ThreadPoolExecutor(3) as clients:
        with holding_connection(app, client):
            waiting = [clients.submit(client.get, "/slow") for _ in range(3)]
            while app.state.resources.engine.pool.waiting < len(waiting):
                assert not any(request.done() for request in waiting)
                time.sleep(0.01)
            refused = client.get("/slow")
        answers = [request.result() for request in waiting]

    assert refused.status_code == 503
    assert refused.json() == {"detail": "too many requests wait for the database"}
    assert int(refused.headers["Retry-After"]) > 0
    assert [answer.status_code for answer in answers] == [200] * 3


def use_session(session: SessionDep) -> None:
    assert session


def use_statement(statement: StatementDep) -> None:
    assert statement


async def use_dependency(it: Annotated[None, Depends(use_session)]) -> None:
    assert it is None


@pytest.mark.parametrize(
    ("kind", "route"),
    [
        ("get", use_session),
        ("get", use_statement),
        ("get", use_dependency),
        ("websocket", use_dependency),
    ],
)
def test_a_route_in_a_thread_that_uses_the_database_is_rejected_at_startup(
    app_with: Callable[..., FastAPI],
    nowhere: DatabaseUrl,
    kind: str,
    route: Callable[..., Any],
) -> None:
    router = APIRouter(prefix="/threads")
    getattr(router, kind)("/use")(route)
    app = app_with(nowhere)
    app.include_router(router)

    with pytest.raises(TypeError, match=r"write `async def use_\w+\(…\)`"), TestClient(app):
        pass


def test_a_connection_that_cannot_be_opened_in_time_gives_a_503(
    app_of_size: AppOfSize, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_of_size(1, db_queue_seconds=0.1)
    answers_names = asyncio.Event()

    @app.get("/one")
    async def one(statement: StatementDep) -> None:
        await statement.all(text("SELECT 1"))

    async def look_up(*arguments: Any) -> Any:
        await answers_names.wait()  # like a DNS query that nothing answers
        return await choose_address(*arguments)

    choose_address = dialect.choose_address
    monkeypatch.setattr(dialect, "choose_address", look_up)
    with TestClient(app) as client:
        with short_requests(0.3):
            lost = client.get("/one")
        answers_names.set()
        afterwards = client.get("/one")

    assert lost.status_code == 503
    assert lost.json() == {"detail": "the database does not answer"}
    assert afterwards.status_code == 200


def test_no_connection_is_held_after_a_response(app_of_size: AppOfSize) -> None:
    app = app_of_size(2)

    with TestClient(app) as client:
        client.get("/slow")

        assert app.state.resources.engine.pool.checkedout() == 0


def test_a_session_cannot_be_used_after_its_request(app_of_size: AppOfSize) -> None:
    app = app_of_size(1)

    @app.get("/export")
    async def export(session: SessionDep) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            for number in await session.exec(select(func.generate_series(1, 3))):
                yield f"{number}\n"

        return StreamingResponse(lines())

    with TestClient(app) as client:
        with pytest.raises(exc.InvalidRequestError, match="permanently closed"):
            client.get("/export")

        assert app.state.resources.engine.pool.checkedout() == 0


def test_a_websocket_can_use_a_session_and_a_statement(app_of_size: AppOfSize) -> None:
    app = app_of_size(1)

    @app.websocket("/socket")
    async def talk(socket: WebSocket, session: SessionDep, statement: StatementDep) -> None:
        await socket.accept()
        number = await session.scalar(text("SELECT 1"))
        await session.commit()
        await socket.send_json([number, *await statement.all(text("SELECT 2 AS two"))])

    with TestClient(app) as client, client.websocket_connect("/socket") as socket:
        assert socket.receive_json() == [1, {"two": 2}]


def test_a_statement_that_does_not_end_gives_a_503_and_leaks_no_connection(
    app_of_size: AppOfSize,
) -> None:
    app = app_of_size(1, db_queue_seconds=0.1)

    @app.get("/endless")
    async def endless(statement: StatementDep) -> None:
        await statement.all(text("SELECT pg_sleep(60)"))

    @app.get("/endless-session")
    async def endless_session(session: SessionDep) -> None:
        await session.scalar(text("SELECT pg_sleep(60)"))

    with TestClient(app) as client:
        with short_requests(0.3):
            endless_ones = [client.get("/endless"), client.get("/endless-session")]

        assert [answer.status_code for answer in endless_ones] == [503, 503]
        assert client.get("/slow").status_code == 200


def test_a_statement_that_got_a_503_is_not_executed_afterwards(
    app_of_size: AppOfSize, engine: Engine, notes: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "USE_SECONDS", 1.9)
    app = app_of_size(1, db_queue_seconds=0.1)

    @app.post("/late")
    async def late(statement: StatementDep) -> None:
        await statement.all(insert(notes), id=1, text="too late")

    with TestClient(app) as client, engine.connect() as other:
        other.execute(text("LOCK TABLE notes"))
        answer = client.post("/late")
        other.rollback()

    with engine.connect() as connection:
        connection.execute(
            text("LOCK TABLE notes")
        )  # waits until the statements that waited for it are done
        written = connection.scalar(select(func.count()).select_from(notes))
    assert answer.status_code == 503
    assert written == 0


def test_a_failed_savepoint_does_not_end_the_transaction(
    app_of_size: AppOfSize, notes: Table
) -> None:
    app = app_of_size(1)

    @app.post("/twice")
    async def twice(session: SessionDep) -> list[str]:
        await session.exec(insert(notes).values(id=1, text="one"))
        with suppress(exc.IntegrityError):
            async with session.begin_nested():
                await session.exec(insert(notes).values(id=1, text="two"))
        return list(await session.exec(select(notes.c.text)))

    with TestClient(app) as client:
        answer = client.post("/twice")

    assert answer.json() == ["one"]


@pytest.mark.skipif(sys.platform == "win32", reason="freezes a process with a signal")
def test_a_new_connection_that_freezes_gives_a_503_and_is_replaced(
    app_of_size: AppOfSize, embedded_url: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pooler would make up the pid.
    app = app_of_size(1, embedded_url, db_queue_seconds=0.1)
    frozen: list[int] = []

    @app.get("/one")
    async def one(statement: StatementDep) -> None:
        await statement.all(text("SELECT 1"))

    def connect_and_freeze(*arguments: Any, **options: Any) -> Any:
        connection = connect(*arguments, **options)
        if not frozen:
            frozen.append(connection.info.backend_pid)
            os.kill(frozen[0], signal.SIGSTOP)
        return connection

    connect = psycopg2.connect
    monkeypatch.setattr(psycopg2, "connect", connect_and_freeze)
    try:
        with TestClient(app) as client:
            # SQLAlchemy sends some queries on its first connection before it is used.
            with short_requests(0.5):
                for _ in range(40):  # a busy machine may not connect within that time
                    lost = client.get("/one")
                    if frozen:
                        break
            assert frozen, "no connection was opened"
            afterwards = client.get("/one")
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)

    assert lost.status_code == 503
    assert afterwards.status_code == 200


def test_what_a_request_waits_for_before_its_statement_counts(app_of_size: AppOfSize) -> None:
    app = app_of_size(1, db_queue_seconds=0.1)

    @app.get("/late")
    async def late(statement: StatementDep) -> None:
        await asyncio.sleep(0.6)
        await statement.all(text("SELECT pg_sleep(0.3)"))

    with TestClient(app, raise_server_exceptions=False) as client, short_requests(0.6):
        assert client.get("/late").status_code == 503


def test_all_statements_of_a_request_share_one_time_limit(app_of_size: AppOfSize) -> None:
    app = app_of_size(1, db_queue_seconds=0.1)

    @app.get("/several")
    async def several(session: SessionDep) -> None:
        for _ in range(10):
            await session.scalar(text("SELECT pg_sleep(0.2)"))
            await session.commit()

    with TestClient(app) as client:
        with short_requests(0.4):
            answer = client.get("/several")
        afterwards = client.get("/slow")

    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert afterwards.status_code == 200


@pytest.mark.parametrize("way", ["session", "statement", "read", "change"])
def test_a_route_can_set_a_shorter_time_limit(app_of_size: AppOfSize, way: str) -> None:
    app = app_of_size(1)
    sleep = text("SELECT pg_sleep(60)")

    @app.get("/session")
    async def use_session(session: SessionDep) -> None:
        with time_limit(Deadline(0.2)):
            await session.scalar(sleep)

    @app.get("/statement")
    async def use_statement(statement: StatementDep) -> None:
        with time_limit(Deadline(0.2)):
            await statement.all(sleep)

    @app.get("/read")
    async def limit_on_server(statement: StatementDep) -> None:
        statement.seconds = 0.2
        await statement.all(sleep)

    @app.get("/change")
    async def limit_change_on_server(statement: StatementDep) -> None:
        statement.seconds = 0.2
        await statement.all(text("WITH done AS (SELECT pg_sleep(60)) SELECT FROM done"))

    start = time.monotonic()
    with TestClient(app) as client:
        assert client.get(f"/{way}").status_code == 503
    assert time.monotonic() - start < 5


def test_each_request_has_its_own_time_limit_and_background_tasks_have_none(
    app_of_size: AppOfSize,
) -> None:
    app = app_of_size(2, db_queue_seconds=0.1)
    followed: list[int | None] = []

    async def follow(engine: AsyncEngine, seconds: float) -> None:
        async with AsyncSession(engine) as session:
            sleep = text("SELECT 42 FROM pg_sleep(:seconds)")
            followed.append(await session.scalar(sleep, {"seconds": seconds}))

    @app.get("/work")
    async def work(
        session: SessionDep, engine: EngineDep, tasks: BackgroundTasks, seconds: float, after: float
    ) -> None:
        tasks.add_task(follow, engine, after)
        await session.scalar(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})

    statuses = []
    with served(app) as port, closing(HTTPConnection("127.0.0.1", port, timeout=30)) as client:
        for limit, seconds, after in ((0.3, 60, 0), (10, 0, 0), (2, 0, 2.5)):
            with short_requests(limit):
                client.request("GET", f"/work?seconds={seconds}&after={after}")
                answer = client.getresponse()
                answer.read()
            statuses.append(answer.status)
            assert client.sock, "the app closed the connection"

    assert statuses == [503, 200, 200]
    assert followed == [42, 42]


@pytest.mark.skipif(sys.platform == "win32", reason="freezes a process with a signal")
@pytest.mark.parametrize("idle_seconds", [-1.0, 30.0])
def test_a_frozen_connection_gives_a_503_and_is_replaced(
    app_of_size: AppOfSize,
    embedded_url: DatabaseUrl,
    monkeypatch: pytest.MonkeyPatch,
    idle_seconds: float,
) -> None:
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", idle_seconds)
    app = app_of_size(1, embedded_url, db_queue_seconds=0.1)

    @app.get("/pid")
    async def get_pid(session: SessionDep) -> int:
        return await session.scalar(text("SELECT pg_backend_pid()")) or 0

    with TestClient(app) as client:
        pid = client.get("/pid").json()
        os.kill(pid, signal.SIGSTOP)
        try:
            with short_requests(0.3):
                frozen = client.get("/pid")
            following = client.get("/pid")
        finally:
            os.kill(pid, signal.SIGCONT)

    assert frozen.status_code == 503
    assert following.status_code == 200
    assert following.json() != pid


def test_a_request_cannot_wait_for_a_second_connection(app_of_size: AppOfSize) -> None:
    app = app_of_size(5)

    @app.get("/both")
    async def both(session: SessionDep, statement: StatementDep) -> None:
        await session.scalar(text("SELECT 1"))
        await statement.all(text("SELECT 1"))

    with TestClient(app) as client, pytest.raises(RuntimeError, match="holds a connection already"):
        client.get("/both")


def test_a_begin_without_an_end_is_refused(app_of_size: AppOfSize) -> None:
    app = app_of_size(1)

    @app.get("/begin")
    async def begin(statement: StatementDep) -> None:
        await statement.all(text("BEGIN"))

    with TestClient(app) as client, pytest.raises(RuntimeError, match="ask for `session"):
        client.get("/begin")


def test_a_committed_session_releases_its_connection_for_a_statement(
    app_of_size: AppOfSize,
) -> None:
    app = app_of_size(1)

    @app.get("/in-turn")
    async def in_turn(session: SessionDep, statement: StatementDep) -> None:
        await session.scalar(text("SELECT 1"))
        await session.commit()
        await statement.all(text("SELECT 1"))

    with TestClient(app) as client:
        assert client.get("/in-turn").status_code == 200


def test_concurrent_use_of_a_session_raises_an_error_and_leaks_no_connection(
    app_of_size: AppOfSize,
) -> None:
    app = app_of_size(1, db_queue_seconds=0.1)

    @app.get("/gather")
    async def gather(session: SessionDep) -> None:
        await asyncio.gather(*(session.scalar(text("SELECT 1")) for _ in range(2)))

    with TestClient(app) as client:
        # Without an open connection, then with one.
        for error in (exc.InvalidRequestError, exc.ProgrammingError):
            with pytest.raises(error):
                client.get("/gather")

            assert client.get("/slow").status_code == 200


def test_an_error_on_one_connection_keeps_the_others(app_of_size: AppOfSize) -> None:
    app = app_of_size(2)
    both = asyncio.Barrier(2)

    @app.get("/meet")
    async def use_both_connections(session: SessionDep) -> None:
        await session.connection()
        async with asyncio.timeout(20):
            await both.wait()

    @app.get("/suicide")
    async def end_own_connection(session: SessionDep) -> None:
        await session.scalar(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with TestClient(app) as client, ThreadPoolExecutor(2) as clients:
        list(clients.map(client.get, ["/meet"] * 2))
        opened: list[object] = []
        event.listen(
            app.state.resources.engine.sync_engine, "connect", lambda *made: opened.append(made)
        )

        ended = client.get("/suicide")
        list(clients.map(client.get, ["/meet"] * 2))

    assert ended.status_code == 503
    assert len(opened) == 1
