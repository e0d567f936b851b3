"""Accounts: registration, log-in, tokens, and what somebody tries who has none."""

import asyncio
import base64
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from httpx2 import Response
from limits import RateLimitItemPerMinute
from limits.aio.storage import memory
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy import Engine, func, select, update
from sqlmodel import Session, col
from structlog.testing import capture_logs
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from auth import CLAIMS, ISSUER, document_bearer_tokens, signing_key
from config import Settings
from main import create_app
from models import RefreshToken, Task, User
from passwords import Passwords, Throttle, guesser
from routes.auth import SAME_MOMENT

PASSWORD = "correct horse battery staple"
NEW_PASSWORD = "Tr0ub4dor&3 is not enough"
SLOW = Passwords.HASHER
FAST = PasswordHash((Argon2Hasher(memory_cost=8, time_cost=1, parallelism=1),))


@pytest.fixture(autouse=True)
def fast_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Passwords, "HASHER", FAST)


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """A client behind a proxy, whose address is what X-Forwarded-For says."""
    with TestClient(ProxyHeadersMiddleware(app, trusted_hosts="*")) as client:
        yield client


def new_email() -> str:
    return f"ada-{uuid4().hex}@example.com"


def register(client: TestClient, email: str, **changes: object) -> Response:
    body = {"email": email, "password": PASSWORD, "name": "Ada"}
    return client.post("/auth/register", json=body | changes)


def log_in(
    client: TestClient, email: str, password: str = PASSWORD, address: str = "192.0.2.1"
) -> Response:
    form = {"username": email, "password": password}
    return client.post("/auth/login", data=form, headers={"X-Forwarded-For": address})


def refresh(client: TestClient, token: str) -> Response:
    return client.post("/auth/refresh", json={"refresh_token": token})


def log_out(client: TestClient, token: str) -> Response:
    return client.post("/auth/logout", json={"refresh_token": token})


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def get_me(client: TestClient, token: str) -> Response:
    return client.get("/auth/me", headers=bearer(token))


def change_password(client: TestClient, token: str, current: str, new: str) -> Response:
    body = {"current_password": current, "new_password": new}
    return client.post("/auth/password", json=body, headers=bearer(token))


class Account:
    """A registered user who is logged in."""

    def __init__(self, client: TestClient) -> None:
        self.email = new_email()
        self.id: str = register(client, self.email).json()["id"]
        tokens = log_in(client, self.email).json()
        self.access: str = tokens["access_token"]
        self.refresh: str = tokens["refresh_token"]


@pytest.fixture
def ada(client: TestClient) -> Account:
    return Account(client)


@pytest.fixture
def bob(client: TestClient) -> Account:
    return Account(client)


def count(engine: Engine, model: type[Task | RefreshToken | User], **values: object) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(model).filter_by(**values)) or 0


def age(engine: Engine, account: Account, by: timedelta) -> None:
    """Have an account's refresh tokens be issued, and used, that much earlier."""
    with engine.begin() as connection:
        connection.execute(
            update(RefreshToken)
            .where(col(RefreshToken.user_id) == account.id)
            .values(
                expires_at=col(RefreshToken.expires_at) - by, used_at=col(RefreshToken.used_at) - by
            )
        )


# Registration


def test_a_new_account_is_shown_without_its_password(client: TestClient) -> None:
    email = new_email()

    answer = register(client, email)

    user = answer.json()
    assert answer.status_code == 201
    assert user == {
        "id": user["id"],
        "email": email,
        "name": "Ada",
        "created_at": user["created_at"],
    }


def test_an_email_is_taken_in_any_case(client: TestClient, engine: Engine) -> None:
    email = new_email()
    register(client, email)

    answer = register(client, f" {email.upper()} ", name="Eve")

    assert answer.status_code == 409
    assert answer.json() == {"detail": "this e-mail address is taken"}
    assert count(engine, User, email=email, name="Ada") == 1


def test_of_many_who_register_one_email_at_once_one_gets_it(client: TestClient) -> None:
    email = new_email()

    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda _: register(client, email), range(10)))

    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 9


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("{}@EXAMPLE.com", "{}@example.com"),
        ("Ada+todo.{}@example.com", "ada+todo.{}@example.com"),
        ("{}@bücher.example", "{}@bücher.example"),
        ("{}@xn--bcher-kva.example", "{}@bücher.example"),
        ("E\u0301va.{}@example.com", "éva.{}@example.com"),
    ],
)
def test_an_email_has_one_spelling(client: TestClient, written: str, stored: str) -> None:
    unique = uuid4().hex
    email = written.format(unique)

    answer = register(client, email)

    assert answer.json()["email"] == stored.format(unique)
    assert log_in(client, email).status_code == 200
    assert log_in(client, stored.format(unique)).status_code == 200


@pytest.mark.parametrize(
    "email",
    [
        "",
        "ada",
        "ada@",
        "@example.com",
        "ada@localhost",
        "ada@example..com",
        "ada@[127.0.0.1]",
        "Ada <ada@example.com>",
        "ada@example.com\u0000",
        "ada\n@example.com",
        "a@" + "b" * 250 + ".com",
        "İ" * 64 + "@" + "b" * 62 + "." + "c" * 62 + ".example.com",  # 394 in lower case
        None,
        7,
        ["ada@example.com"],
    ],
)
def test_what_is_no_email_is_refused(client: TestClient, email: object) -> None:
    answer = client.post(
        "/auth/register", json={"email": email, "password": PASSWORD, "name": "Ada"}
    )

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "email"]


@pytest.mark.parametrize("password", ["12345678", " " * 8, "😀" * 128, "\u0001" * 8, "é" * 100])
def test_a_password_is_taken_as_it_is(client: TestClient, password: str) -> None:
    email = new_email()

    assert register(client, email, password=password).status_code == 201

    assert log_in(client, email, password).status_code == 200
    assert log_in(client, email, password + " ").status_code in {401, 422}


@pytest.mark.parametrize("password", ["", "1234567", "x" * 129, "😀" * 129, None, 12345678, ["x"]])
def test_a_password_out_of_bounds_is_refused(client: TestClient, password: object) -> None:
    answer = register(client, new_email(), password=password)

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "password"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "   "},
        {"name": "x" * 101},
        {"name": "\u0000"},
        {"admin": True},
        {"id": str(uuid4())},
    ],
)
def test_other_fields_have_their_bounds_and_unknown_ones_are_refused(
    client: TestClient, change: dict[str, object]
) -> None:
    answer = register(client, new_email(), **change)

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", *change]


@pytest.mark.parametrize("field", ["email", "password", "name"])
def test_a_lone_surrogate_is_refused(client: TestClient, field: str) -> None:
    body = {"email": new_email(), "password": PASSWORD, "name": "Ada"} | {field: "\ud800" * 8}

    answer = client.post(
        "/auth/register",
        content=json.dumps(body),  # as ASCII, with escapes
        headers={"Content-Type": "application/json"},
    )

    assert answer.status_code == 422


# Log-in


def test_login_yields_two_tokens(client: TestClient, ada: Account) -> None:
    answer = log_in(client, ada.email.upper())

    tokens = answer.json()
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert (tokens["token_type"], tokens["expires_in"]) == ("bearer", 900)
    assert get_me(client, tokens["access_token"]).json()["id"] == ada.id
    assert tokens.keys() == {"access_token", "token_type", "expires_in", "refresh_token"}


def test_login_takes_what_oauth2_clients_send(client: TestClient, ada: Account) -> None:
    form = {
        "grant_type": "password",
        "username": ada.email,
        "password": PASSWORD,
        "scope": "",
        "client_id": "docs",
        "client_secret": "",
    }

    assert client.post("/auth/login", data=form).status_code == 200
    assert client.post("/auth/login", json=form).status_code == 422
    assert client.post("/auth/login", data=form | {"grant_type": "x"}).status_code == 422


def test_a_wrong_password_and_an_unknown_email_have_one_answer(
    client: TestClient, ada: Account
) -> None:
    wrong = log_in(client, ada.email, "wrong password")
    unknown = log_in(client, new_email())

    assert wrong.status_code == unknown.status_code == 401
    assert wrong.content == unknown.content
    assert wrong.headers == unknown.headers
    assert wrong.headers["WWW-Authenticate"] == "Bearer"


class RecordingHasher(Argon2Hasher):
    """Notes each computation; `hash` and `verify` cost the same."""

    def __init__(self, memory_cost: int = 8) -> None:
        super().__init__(memory_cost=memory_cost, time_cost=1, parallelism=1)
        self.computations = 0

    def hash(self, password: str | bytes, *, salt: bytes | None = None) -> str:
        self.computations += 1
        return super().hash(password, salt=salt)

    def verify(self, password: str | bytes, hash: str | bytes) -> bool:  # noqa: A002
        self.computations += 1
        return super().verify(password, hash)


@pytest.mark.parametrize("route", [log_in, register])
def test_an_unknown_email_costs_as_much_as_a_known_one(
    client: TestClient,
    ada: Account,
    monkeypatch: pytest.MonkeyPatch,
    route: Callable[[TestClient, str], Response],
) -> None:
    hasher = RecordingHasher()
    monkeypatch.setattr(Passwords, "HASHER", PasswordHash((hasher,)))

    route(client, ada.email)
    known, hasher.computations = hasher.computations, 0
    route(client, new_email())

    assert (known, hasher.computations) == (1, 1)


def test_a_password_is_hashed_anew_when_the_parameters_have_changed(
    client: TestClient, ada: Account, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stronger = RecordingHasher(memory_cost=16)
    monkeypatch.setattr(Passwords, "HASHER", PasswordHash((stronger,)))

    assert log_in(client, ada.email).status_code == 200

    with engine.connect() as connection:
        query = select(col(User.password_hash)).where(col(User.id) == ada.id)
        assert "m=16," in str(connection.scalar(query))
    stronger.computations = 0
    assert log_in(client, ada.email).status_code == 200
    assert stronger.computations == 1


def test_a_login_during_a_change_of_the_password_gets_nothing(
    client: TestClient, ada: Account, engine: Engine
) -> None:
    account = col(User.id) == ada.id
    change = update(User).where(account).values(password_hash=FAST.hash(NEW_PASSWORD))

    with ThreadPoolExecutor(1) as thread:
        with engine.begin() as connection:
            connection.execute(change)
            answer = thread.submit(log_in, client, ada.email)  # still sees the old password
            wait_for_a_lock(engine)

        assert answer.result(10).status_code == 401


def wait_for_a_lock(engine: Engine) -> None:
    waiting = select(func.count()).select_from(func.pg_locks()).where(~col_granted())
    deadline = time.monotonic() + 10
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.scalar(waiting):
            assert time.monotonic() < deadline, "nobody waits for a lock"
            time.sleep(0.01)
