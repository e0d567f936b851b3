"""How often a request goes to the database and back, as the database sees it."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, insert, select

import pagination
from config import Settings
from db import SessionDep
from main import create_app
from postgres.tests.counting_proxy import CountingProxy, counting_proxy
from postgres.url import DatabaseUrl

NOTES = Table("notes", MetaData(), Column("id", Integer, primary_key=True))


@pytest.fixture(scope="module")
def engine(embedded_url: DatabaseUrl) -> Iterator[Engine]:
    engine = create_engine(embedded_url.for_sqlalchemy())
    yield engine
    engine.dispose()


@pytest.fixture
def notes(engine: Engine) -> Iterator[Table]:
    """An empty table of the tests' own."""
    NOTES.create(engine)
    yield NOTES
    NOTES.drop(engine)


@pytest.fixture(scope="module")
def proxy(embedded_url: DatabaseUrl) -> Iterator[CountingProxy]:
    with counting_proxy(embedded_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def app(
    proxy: CountingProxy, embedded_url: DatabaseUrl, settings_for: Callable[..., Settings]
) -> FastAPI:
    """The app that the tests of this file share."""
    app = create_app(settings_for(embedded_url.replace(port=proxy.port)))

    @app.post("/two-notes")
    async def create_two_notes(session: SessionDep) -> None:
        for number in (1, 2):
            await session.exec(insert(NOTES).values(id=number))
        await session.commit()

    @app.post("/half")
    async def half(session: SessionDep) -> None:
        await session.exec(insert(NOTES).values(id=1))
        raise ValueError("in the middle")

    return app


@pytest.fixture
def caller(ada: TestClient) -> TestClient:
    """A user with a task, whose app has a connection already."""
    ada.post("/tasks", json={"title": "The first"}).raise_for_status()
    return ada


def queries_of(
    proxy: CountingProxy, client: TestClient, method: str, url: str, **kwargs: Any
) -> list[str]:
    proxy.queries.clear()
    answer = client.request(method, url, **kwargs)
    assert answer.status_code < 500, answer.text
    return list(proxy.queries)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/tasks", None),
        ("GET", "/tasks?completed=false&q=first&sort=-due_at&limit=5", None),
        ("POST", "/tasks", {"title": "x", "due_at": "2030-01-01T00:00:00Z"}),
        ("GET", "/tasks/{id}", None),
        ("PATCH", "/tasks/{id}", {"title": "y"}),
        ("PATCH", "/tasks/{id}", {}),
        ("PUT", "/tasks/{id}", {"title": "z"}),
        ("PUT", "/tasks/{new}", {"title": "new"}),
        ("DELETE", "/tasks/{id}", None),
        ("PATCH", "/tasks", {"completed": True}),
        ("PATCH", "/tasks?completed=true", {"completed": False}),
        ("DELETE", "/tasks?completed=true", None),
        ("GET", "/ready", None),
    ],
)
def test_a_request_is_one_round_trip(
    proxy: CountingProxy, caller: TestClient, method: str, path: str, body: object
) -> None:
    task = caller.get("/tasks").json()[0]
    url = path.replace("{id}", task["id"]).replace("{new}", str(uuid4()))

    queries = queries_of(proxy, caller, method, url, json=body)

    assert len(queries) == 1, queries


@pytest.mark.parametrize("etag", ["{etag}", '"another"', "*"])
@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
@pytest.mark.parametrize("method", ["GET", "PATCH", "PUT", "DELETE"])
def test_preconditions_cost_no_second_round_trip(
    proxy: CountingProxy, caller: TestClient, method: str, header: str, etag: str
) -> None:
    task = caller.get("/tasks").json()[0]
    headers = {header: etag.replace("{etag}", f'"{task["updated_at"]}"')}
    body = {"title": "y"} if method in {"PATCH", "PUT"} else None

    queries = queries_of(proxy, caller, method, f"/tasks/{task['id']}", json=body, headers=headers)

    assert len(queries) == 1, queries


@pytest.mark.parametrize("query", ["", "?completed=true", "?q=milk&sort=due_at"])
def test_the_server_gives_a_list_two_seconds(
    proxy: CountingProxy, caller: TestClient, query: str
) -> None:
    (sent,) = queries_of(proxy, caller, "GET", f"/tasks{query}")

    assert sent.startswith("SET LOCAL statement_timeout = 2000; SELECT")


def test_the_time_of_a_list_counts_only_on_the_server(
    proxy: CountingProxy, caller: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagination, "LIST_SECONDS", 1.0)
    with ThreadPoolExecutor(1) as thread:
        with proxy.holding_back("SELECT"):  # as in a pooler's queue
            answer = thread.submit(caller.get, "/tasks")
            time.sleep(1.5)

        assert answer.result().status_code == 200


def test_health_and_a_bad_token_cost_none(proxy: CountingProxy, caller: TestClient) -> None:
    proxy.queries.clear()

    caller.get("/health")
    caller.get("/tasks", headers={"Authorization": "Bearer x"})

    assert proxy.queries == []


@pytest.mark.usefixtures("notes")
def test_the_work_of_a_session_is_committed_as_a_whole(
    proxy: CountingProxy, caller: TestClient
) -> None:
    queries = queries_of(proxy, caller, "POST", "/two-notes")

    statements = [query.rpartition("; ")[2] for query in queries]  # behind its time limit
    assert [text.split()[0] for text in statements] == ["BEGIN", "INSERT", "INSERT", "COMMIT"]


def test_a_session_that_fails_leaves_nothing(
    caller: TestClient, engine: Engine, notes: Table
) -> None:
    with pytest.raises(ValueError, match="in the middle"):
        caller.post("/half")

    with engine.connect() as connection:
        assert connection.scalar(select(notes.c.id)) is None
