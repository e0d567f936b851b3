"""The log of a real server on which people register, log in and mistype: it has no secret."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, create_engine, text

import db
from auth.passwords import Passwords
from config import Settings
from main import create_app
from postgres.tests.counting_proxy import counting_proxy
from postgres.url import DatabaseUrl
from tests.accounts import FAST
from tests.logged_server import Run, served

EMAIL = "ada.kangaroo@example.com"
PASSWORD = "wallaby battery staple"
NEW_PASSWORD = "wombat battery staple"
ACCOUNT = {"email": EMAIL, "password": PASSWORD, "name": "Ada Wallaby"}
SERVER = {"DEBUG": "true", "REGISTRATION": "open"}

READ_LOG = "SELECT pg_read_file(current_setting('data_directory') || '/../log')"


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    embedded_url: DatabaseUrl,
    settings_for: Callable[..., Settings],
) -> Run:
    """A server that logs SQL statements too, and whose database goes away in the end."""
    with (
        counting_proxy(embedded_url) as database,
        served(
            tmp_path_factory.mktemp("run"),
            settings_for(embedded_url.replace(port=database.port)),
            **SERVER,
        ) as run,
        httpx2.Client(base_url=run.url, timeout=60) as client,
    ):
        answers = run.answers
        answers["register"] = client.post("/auth/register", json=ACCOUNT)
        answers["register again"] = client.post("/auth/register", json=ACCOUNT)
        form = {"username": EMAIL, "password": NEW_PASSWORD}
        answers["wrong password"] = client.post("/auth/login", data=form)
        form["password"] = PASSWORD
        answers["login"] = client.post("/auth/login", data=form)
        answers["refresh"] = client.post(
            "/auth/refresh", json={"refresh_token": answers["login"].json()["refresh_token"]}
        )
        answers["refresh again"] = client.post(
            "/auth/refresh", json={"refresh_token": answers["refresh"].json()["refresh_token"]}
        )
        answers["reuse"] = client.post(
            "/auth/refresh", json={"refresh_token": answers["login"].json()["refresh_token"]}
        )
        answers["password"] = client.post(
            "/auth/password",
            json={"current_password": PASSWORD, "new_password": NEW_PASSWORD},
            headers={"Authorization": f"Bearer {answers['login'].json()['access_token']}"},
        )
        answers["deletion"] = client.request(
            "DELETE",
            "/auth/me",
            json={"current_password": NEW_PASSWORD},
            headers={"Authorization": f"Bearer {answers['password'].json()['access_token']}"},
        )
        for _ in range(11):
            answers["eleventh guess"] = client.post("/auth/login", data=form)
        database.close()
        answers["no database"] = client.post("/auth/register", json=ACCOUNT)
    return run


def test_no_secret_of_an_account_is_in_any_line(run: Run) -> None:
    tokens = [
        run.answers[name].json() for name in ("login", "refresh", "refresh again", "password")
    ]
    secrets = [
        EMAIL,
        PASSWORD,
        NEW_PASSWORD,
        "kangaroo",
        "Wallaby",
        *(token[kind] for token in tokens for kind in ("access_token", "refresh_token")),
    ]

    found = [secret for secret in secrets if secret in run.output]

    assert found == []


def test_every_request_has_its_line(run: Run) -> None:
    lines = {name: run.line_of(name)["status"] for name in run.answers}

    assert lines == {
        "register": 201,
        "register again": 409,
        "wrong password": 401,
        "login": 200,
        "refresh": 200,
        "refresh again": 200,
        "reuse": 401,
        "password": 200,
        "deletion": 204,
        "eleventh guess": 429,
        "no database": 503,
    }


@pytest.mark.parametrize(
    ("name", "level", "event", "more"),
    [
        ("register", "info", "account created", {}),
        ("wrong password", "warning", "wrong password", {}),
        ("login", "info", "logged in", {}),
        ("reuse", "warning", "refresh token reused, login session ended", {}),
        ("deletion", "info", "account deleted", {}),
        ("eleventh guess", "warning", "rate limit reached", {"limit": "account", "user_id": None}),
    ],
)
def test_what_may_be_an_attack_has_a_line_of_its_own(
    run: Run, name: str, level: str, event: str, more: dict[str, object]
) -> None:
    user_id = run.answers["register"].json()["id"]

    (line,) = events_of(run, name)

    expected = {"event": event, "level": level, "client": "127.0.0.1", "user_id": user_id} | more
    assert {key: line[key] for key in expected} == expected


def test_what_is_usual_has_none(run: Run) -> None:
    assert events_of(run, "refresh") == []


def events_of(run: Run, name: str) -> list[dict[str, Any]]:
    """Return the app's own lines about an answer, other than the one of every request."""
    request_id = run.answers[name].headers["X-Request-ID"]
    return [
        line
        for line in run.lines
        if line.get("request_id") == request_id
        and line["event"] != "request"
        and "logger" not in line  # DEBUG has SQLAlchemy log too
    ]


@pytest.mark.parametrize("hidden", [False, True])
def test_postgresqls_log_has_a_statement_that_timed_out_unless_that_is_switched_off(
    embedded_url: DatabaseUrl,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    hidden: bool,
) -> None:
    role = f"app_{uuid4().hex}"
    email = f"{role}@example.com"
    engine = create_engine(embedded_url.for_sqlalchemy())
    with engine.begin() as owner:
        owner.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'"))
        owner.execute(text(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"))
        if hidden:  # as in docs/database.md
            owner.execute(text(f"ALTER ROLE {role} SET log_min_error_statement = panic"))
    url = embedded_url.replace(user=role, password=PASSWORD)
    app = create_app(settings_for(url, db_queue_seconds=0.1))

    with (
        TestClient(app) as client,
        engine.begin() as owner,
        ThreadPoolExecutor(1) as thread,
    ):
        assert client.get("/ready").status_code == 200  # with a connection, for the next request
        # Enough to send the statement, after a hash that takes no time.
        monkeypatch.setattr(db, "USE_SECONDS", 2.5)
        monkeypatch.setattr(Passwords, "HASHER", FAST)
        owner.execute(text("LOCK TABLE users"))
        request = thread.submit(client.post, "/auth/register", json=ACCOUNT | {"email": email})
        wait_for_statements(engine, role, 1)
        answer = request.result()
        wait_for_statements(engine, role, 0)
        log = str(owner.scalar(text(READ_LOG)))
    engine.dispose()

    assert answer.status_code == 503
    assert (email in log) is not hidden


def wait_for_statements(engine: Engine, role: str, number: int) -> None:
    """Return when that number of a role's statements are running."""
    running = text(
        "SELECT count(*) FROM pg_stat_activity WHERE usename = :role AND state = 'active'"
    )
    deadline = time.monotonic() + 10
    # In a transaction, pg_stat_activity would always show the same.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while connection.scalar(running, {"role": role}) != number:
            assert time.monotonic() < deadline
            time.sleep(0.01)
