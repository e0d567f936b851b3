"""Log messages and responses when the database goes down and comes back."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs
from structlog.typing import EventDict

import migrations
from db import SessionDep, StatementDep
from postgres import outage_log
from postgres.tests.scripted_server import error, scripted_server
from postgres.url import DatabaseUrl

URL = DatabaseUrl("ada", "correct horse", "db.example.com", 5432, "todo", ())
LOST = psycopg2.OperationalError("server closed the connection unexpectedly\n\tThis probably …")


@pytest.fixture
def log() -> Iterator[list[EventDict]]:
    with capture_logs(processors=[merge_contextvars]) as lines:
        yield lines


def events(log: list[EventDict]) -> list[tuple[str, Any]]:
    return [(line["event"], line.get("finding")) for line in log]


def test_an_outage_is_logged_once_for_all_requests(
    nowhere: DatabaseUrl, app_with: Callable[..., FastAPI], log: list[EventDict]
) -> None:
    with TestClient(app_with(nowhere)) as client:
        answers = [client.get("/ready") for _ in range(5)]

    assert {answer.status_code for answer in answers} == {503}
    assert [line["finding"] for line in log if line["event"] == "database lost"] == [
        "nothing-listens"
    ]


def test_the_log_says_that_the_database_is_back(
    database_url: DatabaseUrl, app_with: Callable[..., FastAPI], log: list[EventDict]
) -> None:
    app = app_with(database_url)
    with TestClient(app) as client:
        app.state.resources.availability.lost(LOST)
        client.get("/ready")

    assert events(log)[:2] == [("database lost", "connection-lost"), ("database back", None)]


@pytest.mark.parametrize(
    ("words", "detail"),
    [
        ("Couldn't connect to compute node", "the database is starting"),
        ("password authentication failed for user 'ada'", "the database refuses the app's login"),
        ("sorry, too many clients already", "the database has no free connection"),
        ("Control plane request failed: endpoint is disabled", "the database is turned off"),
    ],
)
def test_responses_name_the_cause_in_general_terms(
    words: str, detail: str, app_with: Callable[..., FastAPI]
) -> None:
    with scripted_server(error(words)) as server:
        url = URL.replace(host="127.0.0.1", port=server.port, options=(("sslmode", "disable"),))
        with TestClient(app_with(url)) as client:
            answer = client.get("/ready")

    assert answer.status_code == 503
    assert answer.json()["detail"] == detail
    assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize("uses_session", [False, True])
@pytest.mark.parametrize(
    ("migrated", "finding", "advice"),
    [
        (False, "schema-behind", "uv run manage.py migrate"),
        (True, "models-ahead", "uv run alembic revision --autogenerate"),
    ],
)
def test_the_log_says_whether_to_run_migrations_or_to_write_one(
    new_database: Callable[[], DatabaseUrl],
    app_with: Callable[..., FastAPI],
    monkeypatch: pytest.MonkeyPatch,
    log: list[EventDict],
    *,
    uses_session: bool,
    migrated: bool,
    finding: str,
    advice: str,
) -> None:
    url = new_database()
    if migrated:
        migrations.upgrade(url)
    monkeypatch.setattr(migrations, "columns", lambda: {"users.colour"})
    app = app_with(url)

    colours = text("SELECT colour FROM users")

    @app.get("/colours")
    async def list_colours(statement: StatementDep) -> None:
        await statement.all(colours)

    @app.get("/colours/session")
    async def list_colours_in_session(session: SessionDep) -> None:
        await session.scalar(colours)

    with TestClient(app) as client:
        answers = [client.get("/colours/session" if uses_session else "/colours") for _ in range(3)]

    assert {answer.status_code for answer in answers} == {503}
    assert answers[0].json() == {"detail": "the schema is behind the code"}
    logged = [line for line in log if line["event"] == "database refuses"]
    assert [line["finding"] for line in logged] == [finding]
    assert logged[0]["advice"].startswith(advice)
    requests = [line["finding"] for line in log if line["event"] == "request"]
    assert requests == [finding] * 3


def test_a_closer_look_at_the_schema_has_a_time_limit(
    new_database: Callable[[], DatabaseUrl],
    app_with: Callable[..., FastAPI],
    monkeypatch: pytest.MonkeyPatch,
    log: list[EventDict],
) -> None:
    monkeypatch.setattr(outage_log, "LOOK_SECONDS", 0.5)
    url = new_database()
    migrations.upgrade(url)
    app = app_with(url)

    @app.get("/colours")
    async def list_colours(statement: StatementDep) -> None:
        await statement.all(text("SELECT colour FROM users"))

    with closing(psycopg2.connect(url.for_libpq())) as other, TestClient(app) as client:
        other.cursor().execute("LOCK TABLE alembic_version")
        answer = client.get("/colours")

    assert answer.status_code == 503
    findings = [line["finding"] for line in log if line["event"] == "database refuses"]
    assert findings[-1] == "schema-behind"  # after what became of the look itself


def test_the_app_starts_without_connecting_to_the_database(
    app_with: Callable[..., FastAPI],
) -> None:
    with scripted_server(error("sorry")) as server:
        url = URL.replace(host="127.0.0.1", port=server.port)
        with TestClient(app_with(url)) as client:
            client.get("/health")

    assert server.log_ins == 0
