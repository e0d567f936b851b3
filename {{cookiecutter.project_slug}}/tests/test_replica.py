"""Lists come from the replica in READ_DATABASE_URL, or from the primary if it cannot answer.

A second database takes its place, with another task in it, so a list shows where it comes from.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import create_engine
from sqlmodel import Session
from structlog.testing import capture_logs
from structlog.typing import EventDict

import db
import migrations
from models import Task
from postgres.tests.counting_proxy import CountingProxy, counting_proxy
from postgres.tests.servers import create_database, run_alone
from postgres.url import DatabaseUrl

POOL_SIZE = 2
END_CONNECTIONS = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity JOIN pg_database USING (datname)
WHERE NOT datallowconn
"""
FAILS = """
ALTER TABLE tasks RENAME TO stored;
CREATE FUNCTION fails() RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'canceling statement' USING ERRCODE = '{}'; END $$;
CREATE VIEW tasks AS SELECT * FROM stored WHERE fails();
"""
DISCONNECTS = """
ALTER TABLE tasks RENAME TO stored;
CREATE FUNCTION disconnects() RETURNS boolean LANGUAGE SQL VOLATILE AS
    $$ SELECT pg_terminate_backend(pg_backend_pid()) $$;
CREATE VIEW tasks AS SELECT * FROM stored WHERE disconnects();
"""


def add_task(url: DatabaseUrl, owner: str, title: str) -> str:
    now = datetime.now(UTC)
    task = Task(id=uuid4(), owner_id=owner, title=title, created_at=now, updated_at=now)
    path = f"/tasks/{task.id}"
    engine = create_engine(url.for_sqlalchemy())
    with Session(engine) as session:
        session.add(task)
        session.commit()
    engine.dispose()
    return path


@pytest.fixture
def owner() -> str:
    return str(uuid4())


@pytest.fixture
def path(embedded_url: DatabaseUrl, owner: str) -> str:
    """The path of the task that only the primary has."""
    return add_task(embedded_url, owner, "on the primary")


@pytest.fixture
def replica(embedded_server: DatabaseUrl, owner: str) -> DatabaseUrl:
    url = create_database(embedded_server)
    migrations.upgrade(url)
    add_task(url, owner, "on the replica")
    return url


@pytest.fixture
def link(replica: DatabaseUrl) -> Iterator[CountingProxy]:
    """What is between the app and the replica."""
    with counting_proxy(replica) as link:
        yield link


@pytest.fixture
def log() -> Iterator[list[EventDict]]:
    with capture_logs() as lines:
        yield lines


@pytest.fixture
def client(
    embedded_url: DatabaseUrl,
    replica: DatabaseUrl,
    link: CountingProxy,
    app_with: Callable[..., FastAPI],
    token_for: Callable[[str], str],
    owner: str,
    path: str,  # noqa: ARG001
    log: list[EventDict],  # noqa: ARG001  (logging is set up first)
) -> Iterator[TestClient]:
    read_url = replica.replace(port=link.port)
    app = app_with(embedded_url, read_database_url=read_url, db_pool_size=POOL_SIZE)
    with TestClient(app) as client:
        client.headers["Authorization"] = f"Bearer {token_for(owner)}"
        yield client


def titles(client: TestClient) -> list[str]:
    answer = client.get("/tasks")
    assert answer.status_code == 200, answer.text
    return [task["title"] for task in answer.json()]


def events(log: list[EventDict]) -> list[tuple[str, str | None]]:
    lines = (line for line in log if line["event"] != "request")
    return [(line["event"], line.get("finding")) for line in lines]


def shut(replica: DatabaseUrl, server: DatabaseUrl, link: CountingProxy) -> None:
    run_alone(server, f"ALTER DATABASE {replica.database} ALLOW_CONNECTIONS false")
    run_alone(server, END_CONNECTIONS)
    link.wait_for_ends()


def reopen(replica: DatabaseUrl, server: DatabaseUrl) -> None:
    run_alone(server, f"ALTER DATABASE {replica.database} ALLOW_CONNECTIONS true")


def test_lists_come_from_the_replica_and_all_else_from_the_primary(
    client: TestClient, link: CountingProxy, path: str
) -> None:
    changed = client.patch(path, json={"description": "changed"})

    assert changed.status_code == 200
    assert client.get(path).json()["description"] == "changed"
    assert client.get("/ready").status_code == 200
    assert link.queries == []
    assert titles(client) == ["on the replica"]


def test_lists_come_from_the_primary_until_the_replica_is_back(
    client: TestClient,
    link: CountingProxy,
    replica: DatabaseUrl,
    embedded_server: DatabaseUrl,
    log: list[EventDict],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(db, "REPLICA_PAUSE_SECONDS", 0.0)
    before = titles(client)

    shut(replica, embedded_server, link)
    meanwhile = [titles(client) for _ in range(3)]
    reopen(replica, embedded_server)
    after = titles(client)

    assert before == after == ["on the replica"]
    assert meanwhile == [["on the primary"]] * 3
    assert events(log) == [("replica lost", "database-closed"), ("replica back", None)]


@pytest.mark.parametrize(
    ("change", "event", "finding"),
    [
        (DISCONNECTS, "replica lost", "server-stopped"),
        (FAILS.format("40001"), "replica refuses", "conflict"),  # with what the primary deleted
        ("ALTER TABLE tasks DROP COLUMN priority", "replica refuses", "schema-behind"),
    ],
)
def test_the_request_that_notices_is_answered_by_the_primary(
    client: TestClient,
    replica: DatabaseUrl,
    log: list[EventDict],
    change: str,
    event: str,
    finding: str,
) -> None:
    titles(client)
    run_alone(replica, change)

    assert titles(client) == ["on the primary"]
    assert events(log) == [(event, finding)]


def test_a_list_that_takes_too_long_is_not_read_twice(
    client: TestClient, replica: DatabaseUrl
) -> None:
    run_alone(replica, FAILS.format("57014"))

    answer = client.get("/tasks")

    assert answer.status_code == 503
    assert "takes too long" in answer.json()["detail"]


def test_a_frozen_replica_leaves_time_for_the_primary(
    client: TestClient, link: CountingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles(client)
    monkeypatch.setattr(db, "REPLICA_SECONDS", 0.3)

    with link.holding_back("FROM tasks"), ThreadPoolExecutor() as clients:
        lists = list(clients.map(titles, [client] * 2 * POOL_SIZE))  # half of them get connections

    assert lists == [["on the primary"]] * 2 * POOL_SIZE


def test_a_replica_that_was_away_is_not_asked_for_each_list(
    client: TestClient,
    link: CountingProxy,
    replica: DatabaseUrl,
    embedded_server: DatabaseUrl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(db, "REPLICA_PAUSE_SECONDS", 60.0)
    shut(replica, embedded_server, link)
    meanwhile = titles(client)
    reopen(replica, embedded_server)

    assert meanwhile == titles(client) == ["on the primary"]
