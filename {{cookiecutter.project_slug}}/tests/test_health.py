"""Liveness and readiness, as a load balancer asks for them."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event
from structlog.testing import capture_logs

from config import PYPROJECT
from postgres.url import DatabaseUrl
from routes import health
from server import refuse_port_in_use
from tests.conftest import holding_connection


@pytest.fixture
def silent(database_url: DatabaseUrl) -> Iterator[DatabaseUrl]:
    """A database that is frozen: it takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield database_url.replace(port=listener.getsockname()[1])


def test_health_tells_the_apps_name_and_version(client: TestClient) -> None:
    answer = client.get("/health")

    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "app": PYPROJECT["tool"]["todo"]["title"],
        "version": PYPROJECT["project"]["version"],
    }


def test_health_does_not_need_the_database(
    nowhere: DatabaseUrl, app_with: Callable[..., FastAPI]
) -> None:
    with TestClient(app_with(nowhere)) as client:
        assert client.get("/health").status_code == 200


def test_ready_tells_that_the_database_answers(client: TestClient) -> None:
    answer = client.get("/ready")

    assert answer.status_code == 200
    assert answer.json()["status"] == "ready"


def test_not_ready_when_the_database_is_away(
    nowhere: DatabaseUrl, app_with: Callable[..., FastAPI]
) -> None:
    with TestClient(app_with(nowhere)) as client:
        answer = client.get("/ready")

    assert answer.status_code == 503
    assert answer.json() == {"detail": "the database does not answer"}
    assert int(answer.headers["Retry-After"]) > 0


def test_not_ready_within_the_limit_when_the_database_is_frozen(
    silent: DatabaseUrl, app_with: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PING_SECONDS", 0.5)
    with TestClient(app_with(silent)) as client, capture_logs() as log:
        answer = client.get("/ready")

    assert answer.status_code == 503
    # Without its own limit, the query would still wait at the end of /ready's.
    assert [line["finding"] for line in log if line["event"] == "database lost"] == ["no-answer"]


def test_a_busy_database_is_not_reported_as_lost(
    database_url: DatabaseUrl,
    app_with: Callable[..., FastAPI],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "READY_SECONDS", 0.2)
    app = app_with(database_url, db_pool_size=1)

    with TestClient(app) as client, holding_connection(app, client), capture_logs() as log:
        answer = client.get("/ready")

    assert answer.status_code == 503
    assert [line for line in log if line["event"] == "database lost"] == []


def test_concurrent_requests_share_one_query(
    database_url: DatabaseUrl, app_with: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("READY_SECONDS", "PING_SECONDS", "SHARED_SECONDS"):
        monkeypatch.setattr(health, limit, 60.0)  # the machine may be busy
    app = app_with(database_url)
    queries = []
    with TestClient(app) as client, ThreadPoolExecutor(10) as threads:
        event.listen(
            app.state.resources.engine.sync_engine,
            "after_cursor_execute",
            lambda *arguments: queries.append(arguments),
        )
        answers = list(threads.map(lambda _: client.get("/ready"), range(20)))

    assert {answer.status_code for answer in answers} == {200}
    assert len(queries) == 1


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=f"^Port {port} is taken .* PORT in .env$"):
            refuse_port_in_use("127.0.0.1", port)

    refuse_port_in_use("127.0.0.1", port)
