"""The operator's commands for our own accounts: `manage.py account`."""

import getpass
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import Engine, func, update
from sqlmodel import Session, col
from typer.testing import CliRunner

import config
import manage
from auth import operator
from auth.passwords import Passwords
from config import Settings
from models import RefreshToken
from postgres.tests.scripted_server import scripted_server
from postgres.tests.servers import create_database
from postgres.tests.terminal import on_terminal
from postgres.url import DatabaseUrl
from tests.accounts import (
    FAST,
    NEW_PASSWORD,
    PASSWORD,
    bearer,
    log_in,
    new_email,
    refresh,
    register,
)
from tests.mail_server import HOST, MailServer, mail_server

SECONDS = 20  # more than a test takes


@pytest.fixture(autouse=True)
def fast_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Passwords, "HASHER", FAST)


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Callable[..., None]:
    """Write the .env that the commands use instead of the developer's."""
    monkeypatch.setattr(config, "ENV_FILE", tmp_path / ".env")
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.delenv("BETTER_AUTH_SECRET")

    def write(url: DatabaseUrl, *lines: str) -> None:
        secret = settings.better_auth_secret.get_secret_value()
        own = (f"DATABASE_URL={url.for_libpq()}", f"BETTER_AUTH_SECRET={secret}")
        (tmp_path / ".env").write_text("\n".join(own + lines), "utf-8")

    return write


@pytest.fixture(autouse=True)
def _same_database(use: Callable[..., None], database_url: DatabaseUrl) -> None:
    """Let the commands use the database of the app."""
    use(database_url)


def account(*arguments: str, answer: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(manage.app, ["account", *arguments], input=answer)
    # On a busy machine, a command may say that it waits.
    output = re.sub(r"(?m)^  waiting for the database, \d+ s so far\n", "", result.output)
    return result.exit_code, output


def account_json(*arguments: str, answer: str = "") -> dict[str, Any]:
    result = CliRunner().invoke(manage.app, ["account", *arguments, "--json"], input=answer)
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.fixture
def ada(client: TestClient) -> str:
    """The address of an account that has registered."""
    return new_account(client)


def new_account(client: TestClient, name: str = "Ada") -> str:
    email = new_email()
    assert register(client, email, name=name).status_code == 201
    return email


def token_in(text: str) -> str:
    """Return the token of the link in a message."""
    [token] = re.findall(r"https?://[\w.:]+/reset-password\?token=([\w.-]+)", text)
    return str(token)


def reset(client: TestClient, token: str) -> Response:
    body = {"token": token, "new_password": NEW_PASSWORD}
    return client.post("/auth/password/reset", json=body)


def test_accounts_are_listed_the_newest_first(client: TestClient) -> None:
    emails = [new_account(client) for _ in range(3)]

    _, first = account("list", "--limit", "2")
    everything = account_json("list", "--limit", "1000")

    listed = re.findall(r"^(\S+@\S+) ", first, re.MULTILINE)
    assert listed == [emails[2], emails[1]]
    assert "- there are more: --limit shows up to 1000\n" in first
    assert [row["email"] for row in everything["accounts"][:3]] == emails[::-1]
    assert everything["has_more"] is False


def test_the_list_has_the_login_sessions_that_have_not_ended(
    client: TestClient, ada: str, engine: Engine
) -> None:
    for _ in range(3):
        token = log_in(client, ada).json()["refresh_token"]
    with Session(engine) as session:
        latest = col(RefreshToken.id) == token.partition(".")[0]
        ended = {"expires_at": func.now(), "created_at": func.now() + timedelta(hours=1)}
        session.exec(update(RefreshToken).where(latest).values(ended))
        session.commit()

    row = account_json("list", "--limit", "1")["accounts"][0]

    assert row["email"] == ada
    assert row["sessions"] == 2
    assert row["created_at"] <= row["last_used_at"]
    assert row["last_used_at"] < account_json("verify", ada)["email_verified_at"]


def test_a_name_cannot_control_the_operators_terminal(client: TestClient) -> None:
    new_account(client, "Ada\x1b]0;owned\x07\n\N{RIGHT-TO-LEFT OVERRIDE}")

    _, output = account("list", "--limit", "1")

    assert output.splitlines()[1].endswith("  Ada\ufffd]0;owned\ufffd\ufffd\ufffd")


def test_without_accounts_the_list_says_so(
    use: Callable[..., None], embedded_server: DatabaseUrl
) -> None:
    url = create_database(embedded_server)
    use(url)
    CliRunner().invoke(manage.app, ["migrate"])

    assert account("list") == (0, "- there are no accounts yet\n")


@pytest.fixture
def smtp(use: Callable[..., None], database_url: DatabaseUrl) -> Iterator[MailServer]:
    """A mail server, which the commands use."""
    with mail_server(MailServer()) as server:
        mail_url = f"MAIL_URL=smtp://{HOST}:{server.port}?from=todo@example.com"
        use(database_url, mail_url, "FRONTEND_URL=https://app.example.com")
        yield server


def test_an_invitation_is_mailed_and_leads_to_a_login(client: TestClient, smtp: MailServer) -> None:
    email = new_email()

    code, output = account("invite", email)
    message = smtp.wait()

    assert (code, output) == (
        0,
        f"✓ {email} has an account; the invitation was mailed, and works for 7 days\n",
    )
    assert message["To"] == email
    [text, _] = message.iter_parts()
    assert reset(client, token_in(text.get_content())).status_code == 204
    assert log_in(client, email, NEW_PASSWORD).status_code == 200
    assert account_json("list", "--limit", "1")["accounts"][0]["email_verified_at"] is not None


def test_an_invitation_prints_its_link_where_no_mail_can_be_sent(client: TestClient) -> None:
    code, output = account("invite", new_email())

    assert code == 0, output
    assert "! MAIL_URL is not set. Send this link yourself" in output
    token = token_in(output)
    seven_days = timedelta(days=7).total_seconds()
    expires = jwt.decode(token, options={"verify_signature": False})["exp"]
    assert time.time() + seven_days - SECONDS < expires <= time.time() + seven_days
    assert reset(client, token).status_code == 204


def test_in_development_an_invitation_also_works_without_a_front_end(
    use: Callable[..., None], database_url: DatabaseUrl
) -> None:
    production = account_json("invite", new_email())
    use(database_url, "ENVIRONMENT=development", "PORT=8123")

    _, output = account("invite", new_email())

    assert f"\nhttp://127.0.0.1:8123/#reset={token_in(output)}\n" in output
    assert production["page_link"] is None


@pytest.mark.parametrize("again", [[], ["--again"]])
@pytest.mark.parametrize(
    ("setting", "warns"),
    [
        ("FRONTEND_URL=", True),
        ("FRONTEND_URL=http://127.0.0.1:3000", True),
        ("FRONTEND_URL=https://app.example.com", False),
        ("ENVIRONMENT=development", False),
    ],
)
def test_an_invitation_warns_if_its_link_leads_to_this_machine(
    use: Callable[..., None],
    database_url: DatabaseUrl,
    setting: str,
    again: list[str],
    *,
    warns: bool,
) -> None:
    email = new_email()
    if again:
        account("invite", email)
    use(database_url, setting)

    code, output = account("invite", email, *again)

    assert code == 0, output
    line = "! FRONTEND_URL is not set to your front end: this link leads to this machine\n"
    assert output.count(line) == warns


def test_nobody_can_log_in_before_following_the_invitation(client: TestClient) -> None:
    email = new_email()

    invited = account_json("invite", email)

    assert invited["name"] == email.partition("@")[0]
    assert invited["email_verified_at"] is None
    assert log_in(client, email).status_code == 401


def test_the_name_of_an_invited_account_can_be_chosen() -> None:
    invited = account_json("invite", new_email(), "--name", "  Ada Lovelace ")

    assert invited["name"] == "Ada Lovelace"


def test_an_account_is_invited_again_only_on_request() -> None:
    email = new_email()
    account_json("invite", email, "--name", "Ada")
    code, output = account("invite", email.upper())
    again = account_json("invite", email, "--again", "--name", "Eve")

    assert code == 1
    assert output == (
        f"✗ {email} has an account\n"
        f"  → to send another link: uv run manage.py account invite {email} --again\n"
    )
    assert "?token=" in again["link"]
    assert again["name"] == "Ada"


def test_an_account_that_is_in_use_is_not_invited_again(client: TestClient, ada: str) -> None:
    log_in(client, ada)

    code, output = account("invite", ada, "--again")

    assert code == 1
    assert f"→ to set a new password: uv run manage.py account password {ada}\n" in output


def test_an_invitation_that_cannot_be_mailed_can_be_sent_again(
    client: TestClient, smtp: MailServer
) -> None:
    smtp.replies = ["451 come back later"]
    email = new_email()

    code, output = account("invite", email)
    again = account_json("invite", email, "--again")

    assert code == 1
    assert output == (
        f"✗ {email} has an account, but the invitation was not sent: {HOST} refused it: 451 come"
        f" back later\n  → to send another link: uv run manage.py account invite {email} --again\n"
    )
    assert again["link"] is None
    [text, _] = smtp.wait().iter_parts()
    assert reset(client, token_in(text.get_content())).status_code == 204


def test_a_new_password_ends_all_login_sessions(client: TestClient, ada: str) -> None:
    token = log_in(client, ada).json()["refresh_token"]

    code, output = account("password", ada, answer=f"{NEW_PASSWORD}\n")

    assert code == 0, output
    assert NEW_PASSWORD not in output
    assert refresh(client, token).status_code == 401
    assert log_in(client, ada).status_code == 401
    assert log_in(client, ada, NEW_PASSWORD).status_code == 200


def test_a_new_password_has_one_spelling(client: TestClient, ada: str) -> None:
    account("password", ada, answer="cafe\u0301 au lait\n")

    assert log_in(client, ada, "caf\u00e9 au lait").status_code == 200


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("", "String should have at least 8 characters"),
        ("Password1", "choose another password: many people use this one"),
        ("x" * 129, "String should have at most 128 characters"),
        ("{name}", "choose a password that is not the e-mail address or its part before @"),
        ("\u3164" * 8, "choose a password with letters, digits or signs"),
    ],
)
def test_the_operator_keeps_the_rules_for_passwords(
    client: TestClient, ada: str, new: str, reason: str
) -> None:
    new = new.format(name=ada.partition("@")[0].upper())

    refused = account("password", ada, answer=f"{new}\n")

    assert refused == (1, f"✗ this password is refused: {reason}\n")
    assert log_in(client, ada).status_code == 200


def test_a_password_in_another_encoding_is_refused(ada: str) -> None:
    answer = "caf\u00e9 au lait\n".encode("latin-1")

    result = CliRunner().invoke(manage.app, ["account", "password", ada], input=answer)

    assert result.exit_code == 1
    assert result.stderr.startswith("✗ this password is refused: Input should be a valid string")


def test_an_address_is_verified_once(ada: str) -> None:
    first = account_json("verify", ada)
    second = account_json("verify", ada)

    assert first["email_verified_at"] is not None
    assert second == first


def test_an_account_is_deleted_with_what_it_owns(client: TestClient, ada: str) -> None:
    headers = bearer(log_in(client, ada).json()["access_token"])
    for title in ("Paint", "Sing"):
        assert client.post("/tasks", json={"title": title}, headers=headers).status_code == 201

    deletion = account_json("delete", ada, "--yes")

    assert deletion["email"] == ada
    assert deletion["deleted"]["tasks"] == 2
    assert client.get("/tasks", headers=headers).json() == []
    assert log_in(client, ada).status_code == 401


@pytest.mark.parametrize(
    ("typed", "expected", "outcome"),
    [
        ("{email}\n", 0, "✓ {email} is deleted, "),
        ("eve@example.com\n", 1, "✗ the address is not {email}: nothing was changed\n"),
    ],
)
def test_the_address_confirms_a_deletion(
    client: TestClient, ada: str, typed: str, expected: int, outcome: str
) -> None:
    code, output = account("delete", ada, answer=typed.format(email=ada))

    assert code == expected
    assert outcome.format(email=ada) in output
    assert log_in(client, ada).status_code == (200 if code else 401)


@pytest.mark.parametrize(
    "command", [["invite", "--again"], ["password"], ["verify"], ["delete", "--yes"]]
)
def test_an_unknown_address_has_no_account(command: list[str]) -> None:
    refused = account(*command, "nobody@example.com", answer=f"{PASSWORD}\n")

    assert refused == (
        1,
        "✗ nobody@example.com has no account\n  → uv run manage.py account list\n",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "ada"],
        ["verify", ""],
        ["invite", "ada@example.com", "--name", " "],
        ["list", "--limit", "0"],
        ["password"],
    ],
)
def test_wrong_usage_has_an_exit_code_of_its_own(arguments: list[str]) -> None:
    code, output = account(*arguments)

    assert code == 2
    assert "Usage: " in output


@pytest.mark.parametrize("command", ["list", "invite", "password", "verify", "delete"])
def test_with_better_auth_the_commands_say_where_accounts_are(
    use: Callable[..., None], database_url: DatabaseUrl, command: str
) -> None:
    use(database_url, "BETTER_AUTH_URL=https://auth.example.com")

    said = account(command, *[] if command == "list" else ["ada@example.com"])

    assert said == (
        1,
        "✗ accounts are on the Better Auth server at https://auth.example.com, not here\n",
    )


def test_a_database_without_tables_is_explained(
    use: Callable[..., None], new_database: Callable[[], DatabaseUrl]
) -> None:
    use(new_database())

    code, output = account("invite", "ada@example.com")

    assert code == 1
    assert "some migrations have not run; nothing was changed\n" in output
    assert "→ uv run manage.py migrate\n" in output


def test_a_database_that_freezes_is_given_up(
    use: Callable[..., None], embedded_url: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "TRANSACTION_SECONDS", 1.5)
    with scripted_server(behind=embedded_url) as server:
        server.freezes_at = b"COMMIT"
        use(embedded_url.replace(port=server.port))
        code, output = account("invite", new_email())

    assert code == 1
    assert "the change may have been made: uv run manage.py account list\n" in output


# Asks, and prints whether the answer is the expected one.
PROGRAM = f"""
from commands.account import ask_password
print("as typed:", ask_password() == {NEW_PASSWORD!r})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_a_password_is_typed_twice_and_never_shown() -> None:
    with on_terminal(PROGRAM) as terminal:
        for confirmation in (f"{NEW_PASSWORD}!", NEW_PASSWORD):  # the first time, they differ
            terminal.wait_for("New password (hidden): ")
            terminal.type(f"{NEW_PASSWORD}\n")
            terminal.wait_for("confirmation: ")
            terminal.type(f"{confirmation}\n")
        code, screen = terminal.wait()

    assert code == 0, screen
    assert "as typed: True" in screen
    assert NEW_PASSWORD not in screen


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ctrl_c_says_that_nothing_was_changed(
    client: TestClient,
    ada: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def press_ctrl_c(_prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr(getpass, "getpass", press_ctrl_c)

    with pytest.raises(SystemExit) as end:
        manage.app(["account", "password", ada])

    assert end.value.code == 130
    assert "✗ stopped: nothing was changed" in capsys.readouterr().err
    assert log_in(client, ada).status_code == 200
