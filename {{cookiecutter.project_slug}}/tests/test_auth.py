"""Accounts: registration, login, tokens, and what somebody tries who has none."""

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from itertools import islice
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import jwt
import pytest
from alembic import command
from anyio.from_thread import BlockingPortal
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from httpx2 import Response
from limits.aio.storage import memory
from limits.aio.strategies import FixedWindowRateLimiter
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy import Engine, create_engine, func, select, text, update
from sqlmodel import Session, col
from structlog.testing import capture_logs

import migrations
from auth import InvalidToken, refresh_tokens
from auth.client import client_key
from auth.passwords import COMMON, Passwords, Throttle, normalize
from auth.refresh_tokens import LIFETIME, MAX_SESSION_AGE, REPEATABLE
from auth.tokens import ACCESS_TOKEN_SECONDS, CLAIMS, ISSUER, OwnTokens, signing_key
from config import Settings
from errors import MAX_BODY_BYTES
from models import RefreshToken, User
from postgres.url import DatabaseUrl
from routes.tasks import DELETE_ALL
from tests.accounts import (
    FAST,
    NEW_PASSWORD,
    PASSWORD,
    Account,
    bearer,
    change_password,
    delete_me,
    end_session,
    first_client,
    get_me,
    list_sessions,
    log_in,
    log_out,
    new_email,
    refresh,
    register,
    set_limit,
    wait_until_somebody_waits,
)

SLOW = Passwords.HASHER
DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def fast_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Passwords, "HASHER", FAST)


@pytest.fixture
def client(app: FastAPI, portal: BlockingPortal) -> TestClient:
    return first_client(app, portal)


@pytest.fixture
def ada(client: TestClient) -> Account:
    return Account(client)


@pytest.fixture
def bob(client: TestClient) -> Account:
    return Account(client)


def count(engine: Engine, model: type[RefreshToken | User], **values: object) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(model).filter_by(**values)) or 0


def age(engine: Engine, account: Account, by: timedelta) -> None:
    """Have an account's refresh tokens be issued, and used, that much earlier."""
    with engine.begin() as connection:
        connection.execute(
            update(RefreshToken)
            .where(col(RefreshToken.user_id) == account.id)
            .values(
                created_at=col(RefreshToken.created_at) - by,
                expires_at=col(RefreshToken.expires_at) - by,
                replaced_at=col(RefreshToken.replaced_at) - by,
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
        "email_verified_at": None,
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
    addresses = [f"203.0.113.{number}" for number in range(10)]

    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda address: register(client, email, address), addresses))

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
def test_an_invalid_email_is_rejected(client: TestClient, email: object) -> None:
    answer = client.post(
        "/auth/register", json={"email": email, "password": PASSWORD, "name": "Ada"}
    )

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "email"]


@pytest.mark.parametrize(
    "password", ["  7  7  ", "😀" * 128, "\u0001" * 7 + "x", "é" * 100, "ﷺ" * 128, "Password 1"]
)
def test_a_password_is_taken_as_it_is(client: TestClient, password: str) -> None:
    email = new_email()

    assert register(client, email, password=password).status_code == 201

    assert log_in(client, email, password).status_code == 200
    assert log_in(client, email, password + " ").status_code in {401, 422}


@pytest.mark.parametrize(
    "password",
    [
        *("", "1234567", "x" * 129, "😀" * 129, "\u0000" * 8, None, 12345678, ["x"]),
        *(" " * 8, "\u200b" * 8, "\u00a0\u3000\t\n" * 2, "\u3164" * 8, "\u0001" * 8),
        *("password", "PASSWORD1", "12345678", "ｐａｓｓｗｏｒｄ", "e\u0301" * 7),
        *("ada.lovelace", "Ada.Lovelace@Example.com"),
    ],
)
def test_a_password_that_is_no_good_is_refused(
    client: TestClient, token_for: Callable[[str], str], password: object
) -> None:
    new = register(client, "ada.lovelace@example.com", password=password)
    changed = change_password(client, token_for(str(uuid4())), PASSWORD, password)

    assert new.status_code == 422
    assert new.json()["detail"][0]["loc"] == ["body", "password"]
    if "lovelace" not in str(password).lower():  # not Ada's here
        assert changed.status_code == 422
        assert changed.json()["detail"][0]["loc"] == ["body", "new_password"]


def test_an_own_email_is_no_new_password(client: TestClient, ada: Account) -> None:
    for password in (ada.email.upper(), ada.email.partition("@")[0]):
        answer = change_password(client, ada.access, PASSWORD, password)

        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "new_password"]


def test_the_commonest_passwords_are_known() -> None:
    assert len(COMMON) == 5000
    assert {"qwertyuiop", "iloveyou", "11111111"} <= COMMON
    assert all(normalize(password).casefold() == password for password in COMMON)


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "   "},
        {"name": "x" * 101},
        {"name": "\u0000"},
        {"admin": True},
        {"id": str(UUID(int=0))},
    ],
)
def test_other_fields_have_their_bounds_and_unknown_ones_are_refused(
    client: TestClient, change: dict[str, Any]
) -> None:
    answer = register(client, new_email(), **change)

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", *change]


# Login


def test_login_yields_two_tokens(client: TestClient, ada: Account) -> None:
    answer = log_in(client, ada.email.upper())

    tokens = answer.json()
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert (tokens["token_type"], tokens["expires_in"]) == (
        "bearer",
        ACCESS_TOKEN_SECONDS,
    )
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


def test_a_login_form_that_is_too_large_is_refused(client: TestClient) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    chunks = itertools.repeat(b"7" * 1_000, MAX_BODY_BYTES // 1_000 + 1)

    answer = client.post("/auth/login", content=chunks, headers=form)

    assert answer.status_code == 413


def test_a_wrong_password_and_an_unknown_email_have_one_answer(
    client: TestClient, ada: Account
) -> None:
    wrong = log_in(client, ada.email, "wrong password")
    unknown = log_in(client, new_email())

    assert wrong.status_code == unknown.status_code == 401
    assert wrong.content == unknown.content
    assert wrong.headers.keys() == unknown.headers.keys()
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


def guess(client: TestClient, email: str) -> Response:
    return log_in(client, email, "Pässword")


def guess_unnormalized(client: TestClient, email: str) -> Response:
    return log_in(client, email, "Pa\u0308ssword")


@pytest.mark.parametrize(
    ("route", "computations"), [(guess, 1), (guess_unnormalized, 2), (register, 1)]
)
def test_an_unknown_email_costs_as_much_as_a_known_one(
    client: TestClient,
    ada: Account,
    monkeypatch: pytest.MonkeyPatch,
    route: Callable[[TestClient, str], Response],
    computations: int,
) -> None:
    hasher = RecordingHasher()
    monkeypatch.setattr(Passwords, "HASHER", PasswordHash((hasher,)))

    route(client, ada.email)
    known, hasher.computations = hasher.computations, 0
    route(client, new_email())

    assert (known, hasher.computations) == (computations, computations)


SPELLINGS = ["Zoë's ﬁne pässword", "Zoe\u0308's fine pa\u0308ssword"]


@pytest.mark.parametrize(("first", "second"), [SPELLINGS, SPELLINGS[::-1]])
def test_a_password_has_one_spelling(client: TestClient, first: str, second: str) -> None:
    email = new_email()
    register(client, email, password=first)

    tokens = log_in(client, email, second).json()

    assert log_in(client, email, first).status_code == 200
    assert change_password(client, tokens["access_token"], second, first).status_code == 200
    assert log_in(client, email, second).status_code == 200


def test_a_password_that_was_hashed_as_it_was_sent_works_on_and_is_hashed_again(
    client: TestClient, ada: Account, engine: Engine
) -> None:
    normal, sent = SPELLINGS
    with engine.begin() as connection:
        old = update(User).where(col(User.id) == ada.id).values(password_hash=FAST.hash(sent))
        connection.execute(old)
    assert log_in(client, ada.email, normal).status_code == 401

    assert log_in(client, ada.email, sent).status_code == 200

    assert log_in(client, ada.email, normal).status_code == 200


def test_a_password_is_hashed_again_when_the_parameters_have_changed(
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


def test_logins_that_rehash_a_password_at_once_are_not_taken_for_wrong(
    client: TestClient, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Passwords, "HASHER", PasswordHash((RecordingHasher(memory_cost=16),)))
    addresses = [f"203.0.113.{number}" for number in range(8)]

    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(lambda address: log_in(client, ada.email, address=address), addresses)
        )

    statuses = {answer.status_code for answer in answers}
    assert 200 in statuses
    assert statuses <= {200, 503}
    assert log_in(client, ada.email).status_code == 200


@pytest.mark.parametrize(
    "request_of",
    [
        lambda client, ada: log_in(client, ada.email),
        lambda client, ada: delete_me(client, ada.access),
    ],
    ids=["login", "deletion"],
)
def test_during_a_change_of_the_password_the_old_one_is_good_for_nothing(
    client: TestClient,
    ada: "Account",
    engine: Engine,
    request_of: Callable[[TestClient, "Account"], Response],
) -> None:
    account = col(User.id) == ada.id
    change = update(User).where(account).values(password_hash=FAST.hash(NEW_PASSWORD))

    with ThreadPoolExecutor(1) as thread:
        with engine.begin() as connection:
            connection.execute(change)
            answer = thread.submit(request_of, client, ada)  # still sees the old hash
            wait_until_somebody_waits(connection)

        assert answer.result(10).status_code == 503
    assert count(engine, User, id=ada.id) == 1
    assert count(engine, RefreshToken, user_id=ada.id) == 1  # the one that was there


# Refresh tokens


def test_a_refresh_token_yields_the_next_pair(client: TestClient, ada: Account) -> None:
    answer = refresh(client, ada.refresh)

    tokens = answer.json()
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert tokens["refresh_token"] != ada.refresh
    assert get_me(client, tokens["access_token"]).json()["id"] == ada.id
    assert refresh(client, tokens["refresh_token"]).status_code == 200


def test_only_a_hash_of_a_refresh_token_is_stored(ada: Account, engine: Engine) -> None:
    with engine.connect() as connection:
        query = select(col(RefreshToken.token_hash)).where(col(RefreshToken.user_id) == ada.id)
        stored = connection.scalar(query)

    assert stored == hashlib.sha256(ada.refresh.encode()).digest()


def test_a_reused_refresh_token_ends_its_login_and_no_other(
    client: TestClient, ada: Account, engine: Engine
) -> None:
    newest = refresh(client, ada.refresh).json()["refresh_token"]
    age(engine, ada, REPEATABLE)
    other = log_in(client, ada.email).json()["refresh_token"]

    with capture_logs() as lines:
        reused = refresh(client, ada.refresh)

    assert reused.status_code == refresh(client, newest).status_code == 401
    assert refresh(client, other).status_code == 200
    (line,) = [line for line in lines if line["log_level"] == "warning"]
    assert line["user_id"] == ada.id
    assert ada.refresh not in str(lines)


def test_a_refresh_token_whose_answer_was_lost_can_be_repeated(
    client: TestClient, ada: Account, engine: Engine
) -> None:
    lost = refresh(client, ada.refresh).json()["refresh_token"]
    age(engine, ada, REPEATABLE - timedelta(seconds=5))

    repeated = refresh(client, ada.refresh)

    assert (repeated.status_code, repeated.json()["refresh_token"]) == (200, lost)
    assert get_me(client, repeated.json()["access_token"]).status_code == 200
    assert refresh(client, lost).status_code == 200


def test_a_refresh_token_can_be_repeated_for_a_minute_after_its_first_use(
    client: TestClient, ada: Account, engine: Engine
) -> None:
    for _ in range(2):
        newest = refresh(client, ada.refresh).json()["refresh_token"]
        age(engine, ada, REPEATABLE / 2)

    assert refresh(client, ada.refresh).status_code == 401
    assert refresh(client, newest).status_code == 401


def test_a_refresh_token_whose_successor_was_used_cannot_be_repeated(
    client: TestClient, ada: Account
) -> None:
    newest = refresh(client, ada.refresh).json()["refresh_token"]
    newest = refresh(client, newest).json()["refresh_token"]

    assert refresh(client, ada.refresh).status_code == 401
    assert refresh(client, newest).status_code == 401


def test_many_who_use_one_refresh_token_at_once_get_the_same_successor(
    client: TestClient, ada: Account
) -> None:
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: refresh(client, ada.refresh), range(20)))

    assert [answer.status_code for answer in answers] == [200] * 20
    (successor,) = {answer.json()["refresh_token"] for answer in answers}
    assert refresh(client, successor).status_code == 200


def test_a_successor_cannot_be_computed_without_the_secret(
    client: TestClient, ada: Account, settings: Settings
) -> None:
    computed = refresh_tokens.next_token(ada.refresh, signing_key(settings, "refresh token"))
    others = {refresh_tokens.next_token(ada.refresh, key) for key in (b"", signing_key(settings))}

    successor = refresh(client, ada.refresh).json()["refresh_token"]

    assert successor == computed
    assert successor not in others


@pytest.mark.parametrize(("passed", "status"), [(LIFETIME - DAY, 200), (LIFETIME, 401)])
def test_a_refresh_token_has_a_lifetime(
    client: TestClient, ada: Account, engine: Engine, passed: timedelta, status: int
) -> None:
    age(engine, ada, passed)

    assert refresh(client, ada.refresh).status_code == status


def test_each_refresh_begins_another_lifetime(
    client: TestClient, ada: Account, engine: Engine
) -> None:
    age(engine, ada, LIFETIME - DAY)
    token = refresh(client, ada.refresh).json()["refresh_token"]
    age(engine, ada, LIFETIME - DAY)

    assert refresh(client, token).status_code == 200


def test_a_login_ends_at_its_greatest_age_however_often_it_is_used(
    client: TestClient, ada: Account, engine: Engine
) -> None:
    token, left = ada.refresh, MAX_SESSION_AGE - DAY
    while left:
        step = min(left, LIFETIME - DAY)
        age(engine, ada, step)
        token = refresh(client, token).json()["refresh_token"]
        left -= step

    age(engine, ada, DAY)

    assert refresh(client, token).status_code == 401


def test_a_login_from_before_this_rule_ends_then_too(
    new_database: Callable[[], DatabaseUrl],
) -> None:
    url = new_database()
    command.upgrade(migrations.alembic_config(url), "0001")
    engine = create_engine(url.for_sqlalchemy())
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO users VALUES (gen_random_uuid(), 'ada', '', '')"))
        connection.execute(
            text(
                "INSERT INTO refresh_tokens (id, user_id, token_hash, created_at, expires_at)"
                " SELECT gen_random_uuid(), id, '', now() - days * interval '1 day',"
                " now() + interval '30 days' FROM users, unnest(ARRAY[10, 80]) AS days"
            )
        )

    migrations.upgrade(url)

    with engine.connect() as connection:
        left = text("SELECT round(extract(day FROM expires_at - now())) FROM refresh_tokens")
        assert sorted(connection.scalars(left)) == [9, 29]
    engine.dispose()


def test_a_login_removes_the_same_users_expired_ones(
    client: TestClient, ada: Account, bob: Account, engine: Engine
) -> None:
    age(engine, ada, LIFETIME + DAY)
    age(engine, bob, LIFETIME + DAY)

    log_in(client, ada.email)

    assert count(engine, RefreshToken, user_id=ada.id) == 1
    assert count(engine, RefreshToken, user_id=bob.id) == 1


@pytest.mark.parametrize(
    "token",
    [
        "x",
        ".",
        "a.b.c",
        "é",
        "\x00",
        "0" * 200,
        f"{'0' * 32}.{'x' * 43}",
        f"urn:uuid:{UUID(int=0)}.x",
    ],
)
def test_an_invalid_refresh_token_is_rejected(client: TestClient, token: str) -> None:
    assert refresh(client, token).status_code in {401, 422}
    assert log_out(client, token).status_code in {204, 422}


def test_logout_ends_the_login_whichever_of_its_tokens_comes(
    client: TestClient, ada: Account
) -> None:
    newest = refresh(client, ada.refresh).json()["refresh_token"]
    other = log_in(client, ada.email).json()["refresh_token"]

    answers = [log_out(client, ada.refresh), log_out(client, ada.refresh)]

    assert [(answer.status_code, answer.content) for answer in answers] == [(204, b"")] * 2
    assert refresh(client, newest).status_code == 401
    assert refresh(client, other).status_code == 200


# Login sessions


def test_a_user_sees_her_login_sessions_and_no_other(
    client: TestClient, ada: Account, bob: Account, engine: Engine
) -> None:
    age(engine, ada, timedelta(days=1))
    phone = log_in(client, ada.email, address="2001:db8::7").json()

    sessions = list_sessions(client, ada.access)

    addresses = [client_key("2001:db8::7"), "192.0.2.1"]
    assert [session["address"] for session in sessions] == addresses
    assert [session["is_current"] for session in sessions] == [False, True]
    assert sessions[0]["created_at"] == sessions[0]["last_used_at"]
    assert list_sessions(client, phone["access_token"])[0]["is_current"]
    assert len(list_sessions(client, bob.access)) == 1


def test_a_session_is_used_when_it_is_refreshed(
    client: TestClient, ada: Account, engine: Engine
) -> None:
    age(engine, ada, timedelta(days=1))
    log_in(client, ada.email)

    refreshed = refresh(client, ada.refresh).json()

    first, second = list_sessions(client, refreshed["access_token"])
    assert (first["is_current"], second["is_current"]) == (True, False)
    assert first["created_at"] < second["created_at"] < first["last_used_at"]


def test_a_session_that_has_expired_is_not_listed(
    client: TestClient, ada: Account, engine: Engine
) -> None:
    age(engine, ada, LIFETIME)

    assert list_sessions(client, ada.access) == []


def test_a_user_ends_one_of_her_login_sessions(
    client: TestClient, ada: Account, bob: Account
) -> None:
    other = log_in(client, ada.email).json()
    (session,) = [one for one in list_sessions(client, ada.access) if not one["is_current"]]

    others = end_session(client, bob.access, session["id"])
    answers = [end_session(client, ada.access, session["id"]) for _ in range(2)]

    assert others.status_code == 404
    assert [answer.status_code for answer in answers] == [204, 404]
    assert refresh(client, other["refresh_token"]).status_code == 401
    assert refresh(client, ada.refresh).status_code == 200


def test_a_user_ends_all_her_other_login_sessions(
    client: TestClient, ada: Account, bob: Account
) -> None:
    others = [log_in(client, ada.email).json()["refresh_token"] for _ in range(2)]

    answer = client.delete("/auth/sessions", headers=bearer(ada.access))

    assert (answer.status_code, answer.content) == (204, b"")
    assert [refresh(client, token).status_code for token in others] == [401, 401]
    assert refresh(client, ada.refresh).status_code == 200
    assert refresh(client, bob.refresh).status_code == 200


# The account


def test_a_new_password_begins_a_login_and_ends_all_others_of_the_user(
    client: TestClient, ada: Account, bob: Account
) -> None:
    other = log_in(client, ada.email).json()["refresh_token"]

    answer = change_password(client, ada.access, PASSWORD, NEW_PASSWORD)

    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert get_me(client, answer.json()["access_token"]).json()["id"] == ada.id
    assert refresh(client, answer.json()["refresh_token"]).status_code == 200
    assert refresh(client, ada.refresh).status_code == 401
    assert refresh(client, other).status_code == 401
    assert refresh(client, bob.refresh).status_code == 200
    assert log_in(client, ada.email, PASSWORD).status_code == 401
    assert log_in(client, ada.email, NEW_PASSWORD).status_code == 200


def test_a_password_is_not_changed_without_the_current_one(
    client: TestClient, ada: Account
) -> None:
    answer = change_password(client, ada.access, "wrong password", NEW_PASSWORD)

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "current_password"]
    assert log_in(client, ada.email).status_code == 200
    assert refresh(client, ada.refresh).status_code == 200


def test_of_two_changes_of_a_password_at_once_one_wins(
    client: TestClient, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Passwords, "HASHER", SLOW)  # so that the second one begins in time
    passwords = ["first new password", "second new password"]

    with ThreadPoolExecutor(2) as threads:
        answers = list(
            threads.map(lambda new: change_password(client, ada.access, PASSWORD, new), passwords)
        )

    assert sum(answer.is_success for answer in answers) == 1
    assert {answer.status_code for answer in answers} <= {200, 422, 503}
    for answer, password in zip(answers, passwords, strict=True):
        assert log_in(client, ada.email, password).is_success == answer.is_success


def test_deleting_an_account_deletes_only_its_login_sessions(
    client: TestClient, ada: Account, bob: Account, engine: Engine
) -> None:
    answer = delete_me(client, ada.access)

    assert (answer.status_code, answer.content) == (204, b"")
    for account, rows in ((ada, 0), (bob, 1)):
        assert count(engine, User, id=account.id) == rows
        assert count(engine, RefreshToken, user_id=account.id) == rows
    assert get_me(client, ada.access).status_code == 401
    assert change_password(client, ada.access, PASSWORD, NEW_PASSWORD).status_code == 401
    assert delete_me(client, ada.access).status_code == 401
    assert refresh(client, ada.refresh).status_code == 401
    assert log_in(client, ada.email).status_code == 401
    assert register(client, ada.email).status_code == 201


def test_a_deletion_waits_for_a_change_of_all_tasks_of_the_account(
    client: TestClient, ada: Account, engine: Engine
) -> None:
    with ThreadPoolExecutor(1) as thread:
        with engine.begin() as connection:
            DELETE_ALL.execute(connection, {"owner": ada.id})
            answer = thread.submit(delete_me, client, ada.access)
            wait_until_somebody_waits(connection)

        assert answer.result(10).status_code == 204


def test_an_account_is_not_deleted_without_the_current_password(
    client: TestClient, ada: Account
) -> None:
    nothing = client.delete("/auth/me", headers=bearer(ada.access))
    wrong = delete_me(client, ada.access, "wrong password")

    assert nothing.status_code == wrong.status_code == 422
    assert nothing.json()["detail"][0]["loc"] == ["body"]
    assert wrong.json()["detail"][0]["loc"] == ["body", "current_password"]
    assert get_me(client, ada.access).status_code == 200
    assert refresh(client, ada.refresh).status_code == 200


def test_a_token_from_before_a_change_of_the_password_cannot_delete_the_account(
    client: TestClient, ada: Account
) -> None:
    tokens = change_password(client, ada.access, PASSWORD, NEW_PASSWORD).json()

    answer = delete_me(client, ada.access, NEW_PASSWORD)

    assert answer.status_code == 401
    assert get_me(client, ada.access).status_code == 200  # for its 15 minutes
    assert delete_me(client, tokens["access_token"], NEW_PASSWORD).status_code == 204


@pytest.mark.parametrize("end", ["logout", "expiry", "another user's"])
def test_a_token_of_a_login_that_has_ended_cannot_delete_the_account(
    client: TestClient, ada: Account, bob: Account, engine: Engine, settings: Settings, end: str
) -> None:
    token = ada.access
    if end == "logout":
        log_out(client, ada.refresh)
    elif end == "expiry":
        age(engine, ada, LIFETIME)
    else:
        token = OwnTokens(settings).issue(ada.id, refresh_tokens.login_of(bob.refresh))

    assert delete_me(client, token).status_code == 401


# Access tokens


@pytest.fixture
def claims() -> dict[str, Any]:
    """What a valid token says."""
    now = int(time.time())
    return {
        "iss": ISSUER,
        "aud": ISSUER,
        "sub": str(uuid4()),
        "iat": now,
        "exp": now + 60,
        "jti": uuid4().hex,
    }


@pytest.fixture
def key(settings: Settings) -> bytes:
    return signing_key(settings)


@pytest.fixture
def tokens(settings: Settings) -> OwnTokens:
    return OwnTokens(settings)


def test_a_token_with_all_claims_is_accepted(
    tokens: OwnTokens, claims: dict[str, Any], key: bytes
) -> None:
    assert asyncio.run(tokens.user_id(sign(claims, key))) == claims["sub"]


def test_a_request_with_a_refused_token_gets_a_401(client: TestClient, ada: Account) -> None:
    answer = get_me(client, f"{ada.access}x")

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json() == {"detail": "the token is invalid or has expired"}


def test_an_issued_token_has_all_claims_and_its_lifetime(ada: Account, bob: Account) -> None:
    adas, bobs = (
        jwt.decode(account.access, options={"verify_signature": False}) for account in (ada, bob)
    )

    assert sorted(adas) == sorted([*CLAIMS, "sid"])
    assert adas["exp"] - adas["iat"] == ACCESS_TOKEN_SECONDS
    assert adas["jti"] != bobs["jti"]


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_token_without_one_of_the_claims_is_refused(
    tokens: OwnTokens, claims: dict[str, Any], key: bytes, claim: str
) -> None:
    del claims[claim]

    assert_refused(tokens, sign(claims, key))


@pytest.mark.parametrize(
    "change",
    [
        {"iss": "https://auth.example.com"},
        {"aud": "another-app"},
        {"aud": []},
        {"exp": 1},
        {"exp": "soon"},
        {"iat": 2**40},
        {"nbf": 2**40},
        {"sub": None},
        {"sub": 7},
    ],
)
def test_a_token_with_a_wrong_claim_is_refused(
    tokens: OwnTokens, claims: dict[str, Any], key: bytes, change: dict[str, Any]
) -> None:
    assert_refused(tokens, sign(claims | change, key))


def test_a_token_of_a_user_with_no_account_here_has_no_account(
    client: TestClient, claims: dict[str, Any], key: bytes
) -> None:
    for user_id in (str(uuid4()), "x" * 32):
        assert get_me(client, sign(claims | {"sub": user_id}, key)).status_code == 401


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_a_token_of_another_algorithm_is_refused(
    tokens: OwnTokens, claims: dict[str, Any], key: bytes, algorithm: str
) -> None:
    assert_refused(tokens, sign(claims, key, algorithm))


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "HS256", "RS256", ""])
@pytest.mark.parametrize("signature", ["", "AA", "A" * 43])
def test_a_token_that_nobody_signed_is_refused(
    tokens: OwnTokens, claims: dict[str, Any], algorithm: str, signature: str
) -> None:
    token = f"{encode({'alg': algorithm, 'typ': 'JWT'})}.{encode(claims)}.{signature}"

    assert_refused(tokens, token)


def test_a_token_signed_with_a_key_pair_is_refused_as_is_one_signed_with_the_public_key(
    tokens: OwnTokens, claims: dict[str, Any]
) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    public = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    jwk = jwt.algorithms.ECAlgorithm.to_jwk(private.public_key(), as_dict=True)

    assert_refused(tokens, jwt.encode(claims, private, "ES256"))
    assert_refused(tokens, jwt.encode(claims, private, "ES256", headers={"jwk": jwk}))
    assert_refused(tokens, sign(claims, public))


def test_a_token_signed_with_the_secret_itself_is_refused(
    tokens: OwnTokens, claims: dict[str, Any], settings: Settings
) -> None:
    secret = settings.better_auth_secret.get_secret_value().encode()

    assert_refused(tokens, sign(claims, secret))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_token_that_was_tampered_with_is_refused(tokens: OwnTokens, part: int) -> None:
    own, others = (tokens.issue(name).split(".") for name in ("ada", "bob"))
    own[part] = encode({"alg": "HS256", "typ": "JWT", "kid": ""}) if part == 0 else others[part]

    assert_refused(tokens, ".".join(own))


def test_a_part_of_a_token_or_more_than_a_token_is_refused(tokens: OwnTokens) -> None:
    good = tokens.issue("ada")

    for token in (good[:-1], good[1:], f"{good}.", f"{good}.x", good.rpartition(".")[0]):
        assert_refused(tokens, token)


@pytest.mark.parametrize(
    "token", ["", "x", ".", "..", "a.b.c", "\xe9.\xe9.\xe9", "null", "x" * 10_000, "{}.{}.{}"]
)
def test_an_invalid_token_is_rejected(client: TestClient, token: str) -> None:
    header = f"Bearer {token}".encode("latin-1")

    answer = client.get("/auth/me", headers={b"Authorization": header})

    assert answer.status_code == 401


def test_a_deeply_nested_header_is_refused(tokens: OwnTokens) -> None:
    assert_refused(tokens, encode_bytes(b"[" * 20_000) + ".e30.AA")


@pytest.mark.parametrize("scheme", ["Basic", "Token", ""])
def test_a_token_under_another_scheme_is_refused(
    client: TestClient, ada: Account, scheme: str
) -> None:
    answer = client.get("/auth/me", headers={"Authorization": f"{scheme} {ada.access}".strip()})

    assert answer.status_code == 401


def test_access_and_refresh_tokens_are_not_interchangeable(
    client: TestClient, ada: Account
) -> None:
    assert get_me(client, ada.refresh).status_code == 401
    assert refresh(client, ada.access).status_code in {401, 422}
    assert refresh(client, ada.refresh).status_code == 200  # neither was taken for reuse


def sign(claims: dict[str, Any], key: bytes, algorithm: str = "HS256") -> str:
    """Make a token by hand: PyJWT refuses to make some of those that it must refuse to take."""
    signed = f"{encode({'alg': algorithm, 'typ': 'JWT'})}.{encode(claims)}"
    digest = f"sha{algorithm.removeprefix('HS')}"
    return f"{signed}.{encode_bytes(hmac.digest(key, signed.encode(), digest))}"


def encode(part: object) -> str:
    return encode_bytes(json.dumps(part).encode())


def encode_bytes(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def assert_refused(tokens: OwnTokens, token: str) -> None:
    with pytest.raises(InvalidToken):
        asyncio.run(tokens.user_id(token))


# Guessing, and storms


def test_too_many_guesses_get_a_429(client: TestClient, ada: Account) -> None:
    guesses = [log_in(client, ada.email, "guess").status_code for _ in range(10)]

    answer = log_in(client, ada.email)  # it would be right

    assert guesses == [401] * 10
    assert answer.status_code == 429
    assert 0 < int(answer.headers["Retry-After"]) <= 15 * 60


def test_concurrent_guesses_are_all_counted(client: TestClient, ada: Account) -> None:
    def guess(_: int) -> int:
        return log_in(client, ada.email, "guess").status_code

    with ThreadPoolExecutor(20) as threads:
        at_once = list(threads.map(guess, range(20)))
    statuses = at_once + [guess(number) for number in range(11)]

    assert set(statuses) == {401, 429}
    assert statuses.count(401) == 10


def test_a_guesser_does_not_lock_out_the_owner_who_is_elsewhere(
    client: TestClient, ada: Account
) -> None:
    for _ in range(11):
        guess = log_in(client, ada.email, "guess", address="198.51.100.7")

    assert guess.status_code == 429
    assert log_in(client, ada.email, address="203.0.113.7").status_code == 200


def guess_from_everywhere(client: TestClient, email: str) -> Response:
    """Guess from a new address each time, until that is refused."""
    for number in range(1000):
        guess = log_in(client, email, "guess", address=f"198.51.{number // 250}.{number % 250}")
        if guess.status_code != 401:
            break
    return guess


@pytest.fixture
def few_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit(monkeypatch, "ELSEWHERE", 5)


@pytest.mark.usefixtures("few_guesses")
def test_who_guesses_from_many_addresses_has_to_wait_and_the_owner_has_not(
    client: TestClient, ada: Account
) -> None:
    log_in(client, ada.email, address="203.0.113.7")

    guess = guess_from_everywhere(client, ada.email)

    assert guess.status_code == 429
    assert 0 < int(guess.headers["Retry-After"]) <= 60 * 60
    assert log_in(client, ada.email, address="203.0.113.8").status_code == 429
    assert log_in(client, ada.email, address="203.0.113.7").status_code == 200
    assert guess_from_everywhere(client, new_email()).status_code == 429


@pytest.mark.usefixtures("few_guesses")
@pytest.mark.parametrize("forgotten", ["sessions", "counts"])
def test_an_owner_is_known_by_a_login_session_or_by_an_earlier_one(
    app: FastAPI, client: TestClient, ada: Account, forgotten: str
) -> None:
    if forgotten == "sessions":
        log_out(client, ada.refresh)
    else:
        app.state.resources.throttle._limiter = FixedWindowRateLimiter(memory.MemoryStorage())

    guess_from_everywhere(client, ada.email)

    assert log_in(client, ada.email).status_code == 200


def test_an_owner_is_known_for_30_days_after_the_latest_login(portal: BlockingPortal) -> None:
    storage = memory.MemoryStorage()
    throttle = Throttle(storage)
    key = Throttle.KNOWN.key_for("ada", "client")

    portal.call(throttle.succeed, "ada", "client")
    storage.expirations[key] -= DAY.total_seconds()  # as if a day had passed
    portal.call(throttle.succeed, "ada", "client")

    assert portal.call(storage.get_expiry, key) > time.time() + (29.5 * DAY).total_seconds()


def test_the_limits_are_what_they_should_be_where_tests_have_lower_ones() -> None:
    hour = 60 * 60
    limits = {
        Throttle.ELSEWHERE: (100, hour),
        Throttle.LOGINS: (60, hour),
        Throttle.MAIL_REQUESTS: (20, hour),
        Throttle.PER_ADDRESS: (100, 15 * 60),
        Throttle.REGISTRATIONS: (20, hour),
    }

    assert {limit: (limit.amount, limit.get_expiry()) for limit in limits} == limits


def test_an_unknown_email_is_limited_as_a_known_one(client: TestClient) -> None:
    email = new_email()

    guesses = [log_in(client, email, "guess").status_code for _ in range(11)]

    assert guesses == [401] * 10 + [429]


def test_a_success_resets_the_count(client: TestClient, ada: Account) -> None:
    for _ in range(2):
        for _ in range(9):
            assert log_in(client, ada.email, "guess").status_code == 401
        assert log_in(client, ada.email).status_code == 200


def test_the_count_ends_with_its_window(
    client: TestClient, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(11):
        log_in(client, ada.email, "guess")
    in_fifteen_minutes = SimpleNamespace(time=lambda: time.time() + 15 * 60)

    monkeypatch.setattr(memory, "time", in_fifteen_minutes)

    assert log_in(client, ada.email).status_code == 200


def test_an_address_that_guesses_at_many_accounts_has_to_wait(
    client: TestClient, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit(monkeypatch, "PER_ADDRESS", 3)
    for _ in range(3):
        log_in(client, new_email(), "guess")
        log_in(client, ada.email)  # an own account does not help

    answer = log_in(client, ada.email)

    assert answer.status_code == 429
    assert log_in(client, ada.email, address="203.0.113.7").status_code == 200


def test_an_address_that_asks_which_emails_are_taken_has_to_wait(
    client: TestClient, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit(monkeypatch, "PER_ADDRESS", 3)

    answers = [register(client, ada.email).status_code for _ in range(4)]

    assert answers == [409, 409, 409, 429]
    assert register(client, new_email()).status_code == 429


def test_an_address_that_registers_many_accounts_has_to_wait(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit(monkeypatch, "REGISTRATIONS", 3)
    answers = [register(client, new_email()).status_code for _ in range(4)]

    refused = register(client, new_email())
    assert answers == [201] * 3 + [429]
    assert 0 < int(refused.headers["Retry-After"]) <= 60 * 60
    assert register(client, new_email(), address="203.0.113.7").status_code == 201


def test_who_logs_in_again_and_again_has_to_wait(
    client: TestClient, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit(monkeypatch, "LOGINS", 3)
    answers = [log_in(client, ada.email).status_code for _ in range(4)]

    assert answers == [200] * 3 + [429]
    assert log_in(client, ada.email, address="203.0.113.7").status_code == 200


def test_an_account_keeps_its_hundred_newest_sessions(
    client: TestClient, ada: Account, bob: Account, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh_tokens, "MAX_SESSIONS", 3)
    second = log_in(client, ada.email).json()["refresh_token"]
    newest = refresh(client, ada.refresh).json()["refresh_token"]  # it is the one used last
    soon = func.now() + timedelta(days=5)  # as of a session that began 85 days ago
    with engine.begin() as connection:
        used_last = col(RefreshToken.replaced_at).is_not(None) & (
            col(RefreshToken.user_id) == ada.id
        )
        connection.execute(update(RefreshToken).where(used_last).values(expires_at=soon))

    for _ in range(2):
        log_in(client, ada.email)

    assert count(engine, RefreshToken, user_id=ada.id) == 3
    assert refresh(client, second).status_code == 401
    assert refresh(client, newest).status_code == 200
    assert refresh(client, bob.refresh).status_code == 200


def test_the_current_password_cannot_be_guessed_with_a_stolen_token(
    client: TestClient, ada: Account
) -> None:
    guesses = [
        answer.status_code
        for _ in range(6)
        for answer in (
            change_password(client, ada.access, "guess", NEW_PASSWORD),
            delete_me(client, ada.access, "guess"),
        )
    ]

    assert guesses == [422] * 10 + [429] * 2
    assert log_in(client, ada.email, "guess", address="testclient").status_code == 429


@pytest.mark.parametrize(
    ("host", "stands_for"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::/56"),
        ("fe80::1%eth0", "fe80::/56"),
        ("", ""),
        ("a socket", "a socket"),
        ("x" * 60_000, "x" * 45),
    ],
)
def test_an_ipv6_client_cannot_change_its_address_and_guess_on(host: str, stands_for: str) -> None:
    assert client_key(host) == stands_for


def test_a_full_queue_refuses_at_once_and_counts_no_guess(
    client: TestClient, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(Passwords, "QUEUE", -Passwords.THREADS)
        answers = [log_in(client, ada.email) for _ in range(11)]

    assert {answer.status_code for answer in answers} == {503}
    assert int(answers[0].headers["Retry-After"]) > 0
    assert log_in(client, ada.email).status_code == 200


def test_few_passwords_are_hashed_at_once_and_few_wait_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_work: set[int] = set()
    most = 0
    loop_thread = threading.get_ident()

    class Hasher(RecordingHasher):
        def hash(self, password: str | bytes, *, salt: bytes | None = None) -> str:
            nonlocal most
            at_work.add(threading.get_ident())
            most = max(most, len(at_work))
            assert loop_thread not in at_work
            time.sleep(0.001)
            at_work.remove(threading.get_ident())
            return super().hash(password, salt=salt)

    monkeypatch.setattr(Passwords, "HASHER", PasswordHash((Hasher(),)))

    async def storm() -> list[str | BaseException]:
        passwords = Passwords()
        work = (passwords.hash(PASSWORD, f"client {number}") for number in range(200))
        results = await asyncio.gather(*work, return_exceptions=True)
        passwords.close()
        return results

    results = asyncio.run(storm())

    hashes = [result for result in results if isinstance(result, str)]
    refused = [result for result in results if isinstance(result, HTTPException)]
    assert most == Passwords.THREADS
    assert len(hashes) == Passwords.THREADS + Passwords.QUEUE
    assert len(refused) == 200 - len(hashes)
    assert {error.status_code for error in refused} == {503}


def test_many_concurrent_logins_do_not_delay_other_requests(
    client: TestClient, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()

    class Hasher(RecordingHasher):
        def verify(self, password: str | bytes, hash: str | bytes) -> bool:  # noqa: A002
            may_go_on.wait()
            return super().verify(password, hash)

    monkeypatch.setattr(Passwords, "HASHER", PasswordHash((Hasher(),)))
    monkeypatch.setattr(Passwords, "QUEUE", 10)

    def log_in_from(number: int) -> int:
        return log_in(client, ada.email, address=f"203.0.113.{number}").status_code

    with ThreadPoolExecutor(20) as threads:
        try:
            log_ins = [threads.submit(log_in_from, number) for number in range(20)]
            first = next(as_completed(log_ins)).result()  # while no password can be checked
            health = [client.get("/health").status_code for _ in range(5)]
        finally:
            may_go_on.set()

    assert first == 503
    assert health == [200] * 5
    assert {log_in.result() for log_in in log_ins} == {200, 503}


def test_a_flood_from_one_address_leaves_room_for_others(
    client: TestClient, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()

    class Hasher(RecordingHasher):
        def hash(self, password: str | bytes, *, salt: bytes | None = None) -> str:
            may_go_on.wait()
            return super().hash(password, salt=salt)

    monkeypatch.setattr(Passwords, "HASHER", PasswordHash((Hasher(),)))
    monkeypatch.setattr(Passwords, "QUEUE", 10)
    set_limit(monkeypatch, "REGISTRATIONS", 1000)

    def log_in_from(number: int) -> Response:
        return log_in(client, ada.email, address=f"203.0.113.{number}")

    with ThreadPoolExecutor(30) as threads:
        try:
            flood = [threads.submit(register, client, new_email()) for _ in range(20)]
            refused = [one.result() for one in islice(as_completed(flood, timeout=30), 15)]
            log_ins = [threads.submit(log_in_from, number) for number in range(6)]
        finally:
            may_go_on.set()

    assert {answer.status_code for answer in refused} == {429}
    assert int(refused[0].headers["Retry-After"]) > 0
    assert [log_in.result().status_code for log_in in log_ins] == [200] * 6
    assert [one.result().status_code for one in flood].count(201) == Passwords.PER_CLIENT


# What clients and others see


def test_no_secret_is_in_any_response_or_log(
    client: TestClient, ada: Account, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = [
        register(client, ada.email),
        register(client, new_email(), password=PASSWORD[:7]),
        register(client, new_email(), password=PASSWORD * 10),
        register(client, "no e-mail"),
        register(client, new_email(), surplus=PASSWORD),
        log_in(client, ada.email, PASSWORD + "x"),
        log_in(client, ada.email, PASSWORD * 10),
        change_password(client, ada.access, PASSWORD + "x", NEW_PASSWORD),
        change_password(client, ada.access, PASSWORD, NEW_PASSWORD[:7]),
        change_password(client, ada.access + "x", PASSWORD, NEW_PASSWORD),
        delete_me(client, ada.access, PASSWORD + "x"),
        get_me(client, ada.access),
        refresh(client, ada.refresh + "x"),
        refresh(client, ada.refresh * 10),
        client.post("/auth/refresh", json={"refresh": ada.refresh}),
        client.post("/auth/refresh", content=ada.refresh),
    ]

    shown = "".join(f"{answer.headers} {answer.text}\n" for answer in answers)
    output = "".join(capfd.readouterr())
    for text_to_hide in (PASSWORD[:7], NEW_PASSWORD[:7], "$argon2", ada.refresh, ada.access):
        assert text_to_hide not in shown
        assert text_to_hide not in output
    assert ada.email not in output


def test_the_openapi_has_names_for_clients_and_the_authorize_button(app: FastAPI) -> None:
    schema = app.openapi()

    operations = {
        operation["operationId"]: operation
        for path, methods in schema["paths"].items()
        for operation in methods.values()
        if path.startswith("/auth")
    }
    assert set(operations) == {
        "register",
        "login",
        "refresh_token",
        "logout",
        "change_password",
        "get_me",
        "delete_me",
        "list_sessions",
        "end_session",
        "end_other_sessions",
        "update_me",
        "forgot_password",
        "reset_password",
        "verify_address",
        "resend_verification",
    }
    assert {name for name, operation in operations.items() if "security" in operation} == {
        "change_password",
        "get_me",
        "delete_me",
        "list_sessions",
        "end_session",
        "end_other_sessions",
        "update_me",
    }
    (flow,) = schema["components"]["securitySchemes"]["bearer"]["flows"].values()
    assert flow["tokenUrl"] == "auth/login"
    form = "application/x-www-form-urlencoded"
    assert list(operations["login"]["requestBody"]["content"]) == [form]
