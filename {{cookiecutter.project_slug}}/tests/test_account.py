"""The ways back to an account, and its address: what is mailed, and what its links may do."""

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.message import EmailMessage
from typing import Any
from uuid import UUID, uuid4

import jwt
import pytest
from alembic import command
from anyio.from_thread import BlockingPortal
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from limits import RateLimitItem
from limits.aio.strategies import FixedWindowRateLimiter
from sqlalchemy import Engine, create_engine, text, update
from sqlmodel import Session, col, select
from structlog.testing import capture_logs

import mail
import main
import migrations
from auth import links
from auth.passwords import Passwords, Throttle
from config import Settings
from mail import Mailer, MailUrl
from models import User
from postgres.tests.counting_proxy import counting_proxy
from postgres.url import DatabaseUrl
from resources import Resources
from tests.accounts import (
    FAST,
    NEW_PASSWORD,
    PASSWORD,
    Account,
    bearer,
    behind_proxy,
    change_password,
    delete_me,
    first_client,
    get_me,
    log_in,
    new_email,
    refresh,
    register,
    set_limit,
    wait_until_somebody_waits,
)
from tests.mail_server import MailServer, mail_server

SLOW = Passwords.HASHER


@pytest.fixture(autouse=True)
def fast_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Passwords, "HASHER", FAST)
    monkeypatch.setattr(mail, "DELAY_SECONDS", (0.0, 0.0))


@pytest.fixture
def client(app: FastAPI, portal: BlockingPortal) -> TestClient:
    return first_client(app, portal)


@pytest.fixture
def mailbox(app: FastAPI, client: TestClient) -> Callable[[str], list[EmailMessage]]:  # noqa: ARG001
    """Return the messages to an address, oldest first, once all have been made."""

    def messages(email: str) -> list[EmailMessage]:
        found: Resources = app.state.resources
        for _ in range(200):
            if not found.mailer._tasks:
                break
            time.sleep(0.01)
        assert found.mailer.mailbox is not None
        return [message for message in found.mailer.mailbox if message["To"] == email]

    return messages


type Mailbox = Callable[[str], list[EmailMessage]]


@pytest.fixture
def ada(client: TestClient, mailbox: Mailbox) -> Account:
    account = Account(client)
    mailbox(account.email)
    return account


def forget(client: TestClient, email: str, address: str = "192.0.2.1") -> Response:
    headers = {"X-Forwarded-For": address}
    return client.post("/auth/password/forgot", json={"email": email}, headers=headers)


def reset(client: TestClient, token: str, password: str = NEW_PASSWORD) -> Response:
    body = {"token": token, "new_password": password}
    headers = {"X-Forwarded-For": "192.0.2.1"}
    return client.post("/auth/password/reset", json=body, headers=headers)


def verify(client: TestClient, token: str) -> Response:
    return client.post("/auth/verify", json={"token": token})


def resend(client: TestClient, email: str) -> Response:
    return client.post("/auth/verify/resend", json={"email": email})


def change(client: TestClient, account: Account, **body: object) -> Response:
    return client.patch("/auth/me", json=body, headers=bearer(account.access))


def token_in(message: EmailMessage) -> str:
    """Return the token of a message's link, which both of its texts have."""
    found = [
        re.findall(r"http://localhost:3000/[\w-]+\?token=([\w.-]+)", part.get_content())
        for part in message.iter_parts()
    ]
    assert found[0] == found[1]
    [token] = found[0]
    return str(token)


def verified_at(client: TestClient, account: Account) -> str | None:
    moment: str | None = get_me(client, account.access).json()["email_verified_at"]
    return moment


# A forgotten password


def test_a_mailed_link_leads_to_a_new_password(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    asked = forget(client, ada.email)
    message = mailbox(ada.email)[-1]

    assert (asked.status_code, asked.content) == (202, b"")
    assert "/reset-password?" in message.as_string()
    assert reset(client, token_in(message)).status_code == 204
    assert log_in(client, ada.email).status_code == 401
    assert log_in(client, ada.email, NEW_PASSWORD).status_code == 200
    assert refresh(client, ada.refresh).status_code == 401  # all login sessions have ended
    assert verified_at(client, ada) is not None  # the link was mailed to it


def test_an_unknown_address_gets_the_same_response_and_no_mail(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    unknown = new_email()
    known, other = forget(client, ada.email), forget(client, unknown)

    assert (other.status_code, other.content) == (known.status_code, known.content)
    assert {*other.headers} == {*known.headers}
    assert mailbox(unknown) == []


def test_a_link_works_once(client: TestClient, ada: Account, mailbox: Mailbox) -> None:
    forget(client, ada.email)
    token = token_in(mailbox(ada.email)[-1])
    reset(client, token)

    assert reset(client, token, PASSWORD).status_code == 422
    assert log_in(client, ada.email, NEW_PASSWORD).status_code == 200


@pytest.mark.parametrize("kind", ["password", "address", "account"])
def test_a_link_does_not_outlive_a_change(
    client: TestClient, ada: Account, mailbox: Mailbox, kind: str
) -> None:
    forget(client, ada.email)
    token = token_in(mailbox(ada.email)[-1])
    if kind == "password":
        change_password(client, ada.access, PASSWORD, NEW_PASSWORD)
    elif kind == "address":
        new = new_email()
        change(client, ada, email=new, current_password=PASSWORD)
        verify(client, token_in(mailbox(new)[-1]))
    else:
        delete_me(client, ada.access)

    answer = reset(client, token, "one more long password")

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "token"]


def test_of_two_resets_at_once_one_wins(
    client: TestClient, ada: Account, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(client, ada.email)
    token = token_in(mailbox(ada.email)[-1])
    monkeypatch.setattr(Passwords, "HASHER", SLOW)  # so that the second one begins in time
    passwords = ["first new password", "second new password"]

    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda new: reset(client, token, new), passwords))

    assert sorted(answer.status_code for answer in answers) == [204, 422]
    for answer, password in zip(answers, passwords, strict=True):
        assert log_in(client, ada.email, password).is_success == answer.is_success


@pytest.mark.parametrize("password", ["short", "password123"])
def test_the_new_password_follows_the_rules(
    client: TestClient, ada: Account, mailbox: Mailbox, password: str
) -> None:
    forget(client, ada.email)
    token = token_in(mailbox(ada.email)[-1])

    assert reset(client, token, password).status_code == 422
    assert reset(client, token, ada.email).json()["detail"][0]["type"] == "own_address"
    assert reset(client, token).status_code == 204  # the link is not used up


# An address


def test_a_mailed_link_verifies_the_address_of_a_new_account(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    [message] = mailbox(ada.email)
    before = verified_at(client, ada)
    token = token_in(message)

    assert before is None
    assert "/verify-email?" in message.as_string()
    assert verify(client, token).status_code == 204
    first = verified_at(client, ada)
    assert first is not None
    assert verify(client, token).status_code == 204  # a second click does no harm
    assert verified_at(client, ada) == first


def test_the_link_is_mailed_again_to_an_address_that_is_not_verified(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    unknown = new_email()
    answers = [resend(client, ada.email), resend(client, unknown)]
    verify(client, token_in(mailbox(ada.email)[-1]))
    answers.append(resend(client, ada.email))

    assert [answer.status_code for answer in answers] == [202, 202, 202]
    assert len(mailbox(ada.email)) == 2
    assert mailbox(unknown) == []


def test_a_new_address_counts_when_it_is_verified_and_the_old_one_gets_a_message(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    old, new = ada.email, new_email()
    answer = change(client, ada, email=new, current_password=PASSWORD)

    assert (answer.status_code, answer.json()["email"]) == (200, old)
    assert log_in(client, new).status_code == 401
    token = token_in(mailbox(new)[-1])
    assert verify(client, token).status_code == 204
    assert verify(client, token).status_code == 204
    assert get_me(client, ada.access).json()["email"] == new
    assert verified_at(client, ada) is not None
    assert log_in(client, new).status_code == 200
    assert "has changed" in mailbox(old)[-1]["Subject"]
    assert new not in mailbox(old)[-1].as_string()


def test_an_address_that_has_an_account_is_not_revealed_and_not_taken(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    bob = Account(client)
    free, taken = (
        change(client, ada, email=email, current_password=PASSWORD)
        for email in (new_email(), bob.email)
    )

    assert free.json() == taken.json()
    assert "token=" not in mailbox(bob.email)[-1].as_string()


def test_an_address_that_was_taken_meanwhile_stays_its_owners(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    new = new_email()
    change(client, ada, email=new, current_password=PASSWORD)
    token = token_in(mailbox(new)[-1])
    register(client, new)

    answer = verify(client, token)

    assert (answer.status_code, answer.json()["detail"]) == (409, "this e-mail address is taken")
    assert get_me(client, ada.access).json()["email"] == ada.email


def test_a_link_that_a_new_password_overtakes_is_no_longer_valid(
    client: TestClient, ada: Account, mailbox: Mailbox, engine: Engine
) -> None:
    new = new_email()
    change(client, ada, email=new, current_password=PASSWORD)
    token = token_in(mailbox(new)[-1])
    of_ada = col(User.id) == ada.id

    with ThreadPoolExecutor(1) as thread:
        with engine.begin() as connection:
            connection.execute(update(User).where(of_ada).values(password_hash="another"))
            answer = thread.submit(verify, client, token)  # still sees the old hash
            wait_until_somebody_waits(connection)

        assert answer.result(10).status_code == 422


def test_only_the_newest_address_can_be_replaced(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    first, second = new_email(), new_email()
    for email in (first, second):
        change(client, ada, email=email, current_password=PASSWORD)
    verify(client, token_in(mailbox(first)[-1]))

    assert verify(client, token_in(mailbox(second)[-1])).status_code == 422


@pytest.mark.parametrize("kind", ["reset", "change"])
def test_a_new_password_ends_the_link_of_a_new_address(
    client: TestClient, ada: Account, mailbox: Mailbox, kind: str
) -> None:
    thief = new_email()
    change(client, ada, email=thief, current_password=PASSWORD)
    if kind == "reset":
        forget(client, ada.email)
        reset(client, token_in(mailbox(ada.email)[-1]))
    else:
        change_password(client, ada.access, PASSWORD, NEW_PASSWORD)

    assert verify(client, token_in(mailbox(thief)[-1])).status_code == 422
    assert log_in(client, ada.email, NEW_PASSWORD).status_code == 200
    assert "password" in mailbox(ada.email)[-1]["Subject"]


def test_a_link_that_is_followed_twice_at_once_works(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    new = new_email()
    change(client, ada, email=new, current_password=PASSWORD)
    token = token_in(mailbox(new)[-1])

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: verify(client, token), range(4)))

    assert [answer.status_code for answer in answers] == [204] * 4


def test_the_name_changes_without_a_password(client: TestClient, ada: Account) -> None:
    answer = change(client, ada, name="Ada Lovelace")

    assert (answer.status_code, answer.json()["name"]) == (200, "Ada Lovelace")
    assert change(client, ada).json() == answer.json()


@pytest.mark.parametrize("password", [None, "not the password"])
def test_the_address_does_not_change_without_the_password(
    client: TestClient, ada: Account, mailbox: Mailbox, password: str | None
) -> None:
    new = new_email()
    body = {"current_password": password} if password else {}
    answer = change(client, ada, name="Eve", email=new, **body)

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "current_password"]
    assert get_me(client, ada.access).json()["name"] == "Ada"
    assert mailbox(new) == []


def test_the_address_of_an_account_that_is_gone_does_not_change(
    client: TestClient, ada: Account
) -> None:
    delete_me(client, ada.access)

    assert change(client, ada, name="Eve").status_code == 401


# Tokens


def test_a_token_is_for_one_purpose_and_one_account(
    client: TestClient, ada: Account, settings: Settings, engine: Engine
) -> None:
    user_id, bob = UUID(ada.id), Account(client)
    with Session(engine) as session:
        stored = session.exec(select(User.password_hash).where(User.id == user_id)).one()
    of_ada = (settings, user_id, ada.email, stored, 60)
    right = {
        "reset": links.reset_token(*of_ada),
        "verify": links.verify_token(settings, user_id, ada.email),
    }
    claims = jwt.decode(right["reset"], options={"verify_signature": False})
    wrong_reset = [
        right["verify"],
        ada.access,
        links.issue(settings, links.VERIFY, claims, 60),  # another purpose
        links.reset_token(settings, UUID(bob.id), ada.email, stored, 60),
        links.reset_token(settings, uuid4(), ada.email, stored, 60),
        links.reset_token(settings, user_id, bob.email, stored, 60),
        links.reset_token(settings, user_id, ada.email, "another hash", 60),
        links.reset_token(*of_ada[:-1], -1),
        "kangaroo",
    ]
    claims = jwt.decode(right["verify"], options={"verify_signature": False})
    wrong_verify = [
        right["reset"],
        ada.access,
        links.issue(settings, links.RESET, claims, 60),  # another purpose
        links.verify_token(settings, UUID(bob.id), ada.email),
        links.verify_token(settings, uuid4(), ada.email),
        links.new_address_token(settings, user_id, new_email(), ada.email, "another hash"),
        links.new_address_token(settings, user_id, new_email(), bob.email, stored),
        "kangaroo",
    ]

    assert {reset(client, token).status_code for token in wrong_reset} == {422}
    assert {verify(client, token).status_code for token in wrong_verify} == {422}
    assert verify(client, right["verify"]).status_code == 204
    assert reset(client, right["reset"]).status_code == 204


@pytest.mark.parametrize("path", ["forgot", "resend"])
def test_a_link_expires(
    client: TestClient,
    ada: Account,
    mailbox: Mailbox,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    monkeypatch.setattr(links, "RESET_SECONDS", -1)
    monkeypatch.setattr(links, "VERIFY_SECONDS", -1)
    if path == "forgot":
        forget(client, ada.email)
    else:
        resend(client, ada.email)
    token = token_in(mailbox(ada.email)[-1])

    assert (reset if path == "forgot" else verify)(client, token).status_code == 422


# Limits


def test_requests_that_mail_nothing_do_not_use_up_the_limit_of_an_address(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    verify(client, token_in(mailbox(ada.email)[-1]))
    for _ in range(Throttle.MAILS.amount + 1):
        resend(client, ada.email)
    forget(client, ada.email)

    assert "password" in mailbox(ada.email)[-1]["Subject"]


def test_who_has_reset_the_password_can_log_in_whoever_has_guessed_at_it(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    for _ in range(Throttle.PER_ACCOUNT.amount):
        log_in(client, ada.email, "not the password")
    before = log_in(client, ada.email)
    forget(client, ada.email)
    reset(client, token_in(mailbox(ada.email)[-1]))

    assert before.status_code == 429
    assert log_in(client, ada.email, NEW_PASSWORD).status_code == 200


def test_an_address_gets_few_messages_an_hour_and_nobody_learns_that(
    client: TestClient, ada: Account, mailbox: Mailbox
) -> None:
    answers = [forget(client, ada.email, f"192.0.2.{number}") for number in range(8)]

    assert {answer.status_code for answer in answers} == {202}
    assert len(mailbox(ada.email)) == 1 + Throttle.MAILS.amount


@pytest.mark.parametrize("ask", [forget, resend])
def test_what_is_counted_takes_as_long_for_an_address_without_an_account(
    client: TestClient,
    ada: Account,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[TestClient, str], Response],
) -> None:
    questions: list[str] = []  # each may be a round trip, with THROTTLE_URL
    count = FixedWindowRateLimiter.hit

    async def hit(limiter: FixedWindowRateLimiter, item: RateLimitItem, *key: str) -> bool:
        questions.append(item.namespace)
        return await count(limiter, item, *key)

    monkeypatch.setattr(FixedWindowRateLimiter, "hit", hit)
    ask(client, ada.email)
    with_account = questions.copy()
    questions.clear()
    ask(client, new_email())

    assert with_account == questions == [Throttle.MAIL_REQUESTS.namespace, Throttle.MAILS.namespace]


def test_a_client_can_ask_for_few_messages_an_hour(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit(monkeypatch, "MAIL_REQUESTS", 3)
    answers = [forget(client, new_email(), "198.51.100.7") for _ in range(5)]

    assert [answer.status_code for answer in answers] == [202] * 3 + [429] * 2
    assert forget(client, new_email(), "198.51.100.8").status_code == 202


def test_wrong_links_are_counted_and_logged(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit(monkeypatch, "PER_ADDRESS", 3)
    with capture_logs() as lines:
        answers = [verify(client, "kangaroo").status_code for _ in range(4)]

    assert answers == [422] * 3 + [429]
    assert lines[0]["event"] == "wrong link"
    assert "kangaroo" not in str(lines)


# Settings


@pytest.fixture
def client_with(
    settings_for: Callable[..., Settings], database_url: DatabaseUrl
) -> Callable[..., TestClient]:
    def build(**changes: object) -> TestClient:
        return behind_proxy(main.create_app(settings_for(database_url, **changes)))

    return build


@pytest.fixture
def use(app: FastAPI, client: TestClient) -> Iterator[Callable[..., None]]:  # noqa: ARG001
    """Give the shared app other resources for one test."""
    before: Resources = app.state.resources

    def use(**changes: Any) -> None:
        app.state.resources = replace(before, **changes)

    yield use
    app.state.resources = before


def test_links_from_real_messages_are_followed(client_with: Callable[..., TestClient]) -> None:
    with mail_server(MailServer()) as server:
        url = MailUrl.parse(f"smtp://127.0.0.1:{server.port}?from=todo@example.com")
        changes = {"mail_url": url, "environment": "production", "registration": "open"}
        with client_with(**changes, require_verified_email=True) as client:
            email = new_email()
            register(client, email)
            before = log_in(client, email)
            verify(client, token_in(server.wait()))
            after = log_in(client, email)
            forget(client, email)
            reset(client, token_in(server.wait()))

            assert (before.status_code, after.status_code) == (403, 200)
            assert log_in(client, email, NEW_PASSWORD).status_code == 200


@pytest.mark.parametrize("fault", ["slow", "refusing", "dead"])
def test_no_response_depends_on_the_mail_server(
    client: TestClient,
    portal: BlockingPortal,
    use: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    monkeypatch.setattr(mail, "CLOSE_SECONDS", 0.0)
    with mail_server(MailServer(replies=["554 no"] * 9, delay=9.0 * (fault == "slow"))) as server:
        port = 9 if fault == "dead" else server.port
        url = MailUrl.parse(f"smtp://127.0.0.1:{port}?from=todo@example.com")
        mailer = Mailer(url, "Todo", keeps=False)
        use(mailer=mailer)
        ada = Account(client)
        answers = [forget(client, ada.email), forget(client, new_email())]
        portal.call(mailer.aclose)

    assert [answer.status_code for answer in answers] == [202, 202]
    assert all(answer.elapsed.total_seconds() < 5 for answer in answers)


def test_a_request_for_a_link_is_one_round_trip_for_any_address(
    embedded_url: DatabaseUrl, settings_for: Callable[..., Settings]
) -> None:
    with counting_proxy(embedded_url) as proxy:
        settings = settings_for(embedded_url.replace(port=proxy.port))
        with behind_proxy(main.create_app(settings)) as client:
            ada = Account(client)
            sent = []
            for ask in (forget, resend):
                for email in (ada.email, new_email()):
                    proxy.queries.clear()
                    ask(client, email)
                    sent.append(len(proxy.queries))

    assert sent == [1] * 4


def test_accounts_of_before_can_log_in_and_are_not_verified(
    new_database: Callable[[], DatabaseUrl], settings_for: Callable[..., Settings]
) -> None:
    url = new_database()
    command.upgrade(migrations.alembic_config(url), "0002")
    engine = create_engine(url.for_sqlalchemy())
    with engine.begin() as connection:
        new = text("INSERT INTO users VALUES (gen_random_uuid(), 'ada@example.com', :hash, 'Ada')")
        connection.execute(new, {"hash": FAST.hash(PASSWORD)})
    engine.dispose()

    migrations.upgrade(url)

    with behind_proxy(main.create_app(settings_for(url))) as client:
        token = log_in(client, "ada@example.com").json()["access_token"]
        assert get_me(client, token).json()["email_verified_at"] is None


def test_in_production_without_a_mail_server_no_link_can_be_asked_for(
    client_with: Callable[..., TestClient],
) -> None:
    with (
        capture_logs() as lines,
        client_with(environment="production", registration="open") as client,
    ):
        ada = Account(client)
        answers = [
            forget(client, ada.email),
            resend(client, ada.email),
            change(client, ada, email=new_email(), current_password=PASSWORD),
        ]

        assert [answer.status_code for answer in answers] == [503] * 3
        assert answers[0].json() == {"detail": "this server cannot send mail"}
        assert change(client, ada, name="Eve").status_code == 200
    assert [line["event"] for line in lines[:2]] == [
        "no mail is sent",
        "links lead to this machine",
    ]
    assert "MAIL_URL" in lines[0]["advice"]
    assert "FRONTEND_URL" in lines[1]["advice"]


def test_registration_is_closed_in_production_unless_it_is_opened(
    client_with: Callable[..., TestClient],
) -> None:
    production = {"environment": "production", "frontend_url": "https://app.example.com"}
    with capture_logs() as lines, client_with(**production) as client:
        answer = register(client, new_email())

    assert (answer.status_code, answer.json()) == (403, {"detail": "registration is closed"})
    events = [line["event"] for line in lines]
    assert events[1:3] == ["registration is closed", "registration refused: closed"]


def test_a_login_session_of_an_unverified_account_ends_when_that_is_required(
    client: TestClient, ada: Account, settings: Settings, use: Callable[..., None]
) -> None:
    use(settings=settings.model_copy(update={"require_verified_email": True}))
    assert refresh(client, ada.refresh).status_code == 401
    answer = log_in(client, ada.email)

    assert answer.status_code == 403
    assert "verify your e-mail address" in answer.json()["detail"]
    assert log_in(client, ada.email, "not the password").status_code == 401
