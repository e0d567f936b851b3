"""The page at /: who gets it, what it may load, and what it says about the database."""

import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, event, text
from starlette.routing import Match

import main
import migrations
from config import Settings
from main import create_app
from pages import home
from pages.policy import hashes_of
from postgres.url import DatabaseUrl, parse

type Build = Callable[..., FastAPI]

HOME = ["/", "/home/status"]


def status_of(client: TestClient) -> dict[str, dict[str, object]]:
    answer = client.get("/home/status")
    assert answer.status_code == 200, answer.text
    status: dict[str, dict[str, object]] = answer.json()
    return status


def mark(database: DatabaseUrl, revision: str) -> None:
    """Set the revision of a migrated database."""
    engine = create_engine(database.for_sqlalchemy())
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :new"), {"new": revision})
    engine.dispose()


def test_the_page_may_run_its_own_script_and_talk_to_this_app_only(client: TestClient) -> None:
    answer = client.get("/")

    policy = dict(
        rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert answer.status_code == 200
    assert policy == {
        "default-src": "'none'",
        "script-src": hashes_of("script", answer.text),
        "style-src": hashes_of("style", answer.text),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["style-src"])
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_the_page_names_nothing_from_elsewhere(client: TestClient) -> None:
    html = client.get("/").text

    addresses = re.findall(r"""(?:src|href|action|url\()\s*=?\s*["']([^"']*)""", html)
    assert {"docs", "redoc", "openapi.json"} < set(addresses)
    assert [address for address in addresses if re.match(r"(?!data:)\w+:|//", address)] == []


@pytest.mark.parametrize(
    "name", ["localStorage", "sessionStorage", "indexedDB", "document.cookie", "innerHTML"]
)
def test_the_page_keeps_nothing_and_takes_no_text_for_code(client: TestClient, name: str) -> None:
    assert name not in client.get("/").text


def test_production_does_not_serve_the_page(
    nowhere: DatabaseUrl, settings_for: Callable[..., Settings]
) -> None:
    with TestClient(create_app(settings_for(nowhere, environment="production"))) as client:
        answers = [client.get(path) for path in HOME]

    assert [answer.status_code for answer in answers] == [404, 404]
    assert [answer.json() for answer in answers] == [{"detail": "Not Found"}] * 2


def test_the_page_is_no_part_of_the_api() -> None:
    assert not main.app.openapi()["paths"].keys() & {*HOME, "/docs", "/redoc"}


def test_other_routes_are_found_before_the_page_is_looked_at(app: FastAPI) -> None:
    def place(path: str) -> int:
        """Return how many routes are looked at until this one is found."""
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        found = (route.matches(scope)[0] is Match.FULL for route in app.routes)
        return list(found).index(True)

    places = [place(path) for path in ("/health", "/docs", "/")]
    assert places == sorted(places)
    assert places[-1] == len(app.routes) - 1


def test_a_database_that_is_well(client: TestClient, database_url: DatabaseUrl) -> None:
    status = status_of(client)

    assert status["database"].pop("latency_ms") >= 0  # type: ignore[operator]
    assert status["database"] == {
        "ok": True,
        "kind": home.kind_of(database_url),
        "name": database_url.database,
        "address": database_url.address,
        "cause": None,
        "advice": None,
    }
    assert status["migrations"] == {
        "ok": True,
        "state": "up to date",
        "revision": migrations.head(),
        "cause": None,
        "advice": None,
    }


def test_a_database_without_tables_is_behind(
    new_database: Callable[[], DatabaseUrl], app_with: Build
) -> None:
    with TestClient(app_with(new_database())) as client:
        status = status_of(client)

    assert status["database"]["ok"] is True
    assert status["migrations"]["ok"] is False
    assert status["migrations"]["state"] == "behind the code"
    assert status["migrations"]["advice"] == "uv run manage.py migrate"


def test_a_database_that_newer_code_has_migrated_is_ahead(
    new_database: Callable[[], DatabaseUrl], app_with: Build
) -> None:
    database = new_database()
    migrations.upgrade(database)
    mark(database, "9999")

    with TestClient(app_with(database)) as client:
        status = status_of(client)

    assert status["migrations"]["state"] == "ahead of the code"
    assert status["migrations"]["revision"] == "9999"


def test_models_that_no_migration_knows_are_reported(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "columns", lambda: {"tasks.colour"})

    status = status_of(client)

    assert status["migrations"]["state"] == "behind the models"
    assert status["migrations"]["cause"] == "no migration creates the column tasks.colour"


def test_migrations_that_cannot_be_read_are_reported(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def history() -> list[str]:
        raise SyntaxError("0002_broken.py, line 3")

    monkeypatch.setattr(migrations, "history", history)

    status = status_of(client)

    assert status["migrations"]["state"] == "broken"
    assert "0002_broken.py, line 3" in str(status["migrations"]["cause"])


def test_a_database_that_is_away_is_reported_with_what_to_do(
    nowhere: DatabaseUrl, app_with: Build
) -> None:
    with TestClient(app_with(nowhere)) as client:
        status = status_of(client)

    assert status["database"]["ok"] is False
    assert status["database"]["latency_ms"] is None
    assert status["database"]["cause"]
    assert status["database"]["advice"]
    assert status["migrations"]["ok"] is None
    assert status["migrations"]["state"] == "not known"


def test_a_frozen_database_is_reported_within_the_limit_and_blocks_nobody(
    database_url: DatabaseUrl, app_with: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "STATUS_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as thread:
        app = app_with(database_url.replace(port=silent.getsockname()[1]))
        with TestClient(app) as client:
            question = thread.submit(client.get, "/home/status")
            connection, _ = silent.accept()  # the app has begun to ask
            with connection:
                health = client.get("/health")
                answered_first = not question.done()
                status = question.result().json()

    assert health.status_code == 200
    assert answered_first
    assert status["database"]["ok"] is False


def test_the_database_is_asked_once_and_only_when_somebody_looks(
    database_url: DatabaseUrl, app_with: Build
) -> None:
    app = app_with(database_url)
    queries = []
    with TestClient(app) as client:
        event.listen(
            app.state.resources.engine.sync_engine,
            "before_cursor_execute",
            lambda *arguments: queries.append(arguments),
        )
        client.get("/")
        before = len(queries)
        client.get("/home/status")

    assert before == 0
    assert len(queries) == 1


def test_no_secret_is_reported(nowhere: DatabaseUrl, app_with: Build, settings: Settings) -> None:
    database = nowhere.replace(user="hunter1-hunter1", password="hunter2-hunter2")

    with TestClient(app_with(database)) as client:
        status = client.get("/home/status")
        told = status.text + client.get("/").text

    assert status.json()["database"]["name"] == nowhere.database
    assert database.user not in told
    assert database.password not in told
    assert settings.better_auth_secret.get_secret_value() not in told


@pytest.mark.parametrize("path", HOME)
@pytest.mark.parametrize(
    "host",
    ["localhost:8000", "laptop", "todo.localhost", "LAPTOP.LOCAL", "192.168.1.20:80", "[::1]:8000"],
)
def test_the_page_is_for_names_of_this_network(client: TestClient, path: str, host: str) -> None:
    answer = client.get(path, headers={"Host": host})

    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", HOME)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "notlocalhost.example",
        "mylocal.example",
        "under_score.evil.example",
        "127.0.0.1.",
        "[",
    ],
)
def test_another_host_name_gets_a_400(client: TestClient, path: str, host: str) -> None:
    answer = client.get(path, headers={"Host": host})

    assert answer.status_code == 400
    assert "localhost" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("postgresql://embedded@127.0.0.1:5433/todo", "embedded PostgreSQL"),
        ("postgresql://me:pw@ep-calm-sky-a1b2c3d4-pooler.eu-central-1.aws.neon.tech/todo", "Neon"),
        ("postgresql://me:pw@db.example.com/todo", "PostgreSQL"),
    ],
)
def test_the_kind_of_database_is_reported(url: str, kind: str) -> None:
    assert home.kind_of(parse(url)) == kind
