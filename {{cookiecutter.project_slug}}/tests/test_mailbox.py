"""/mailbox: who gets it, and what it shows of the messages that were not sent."""

import re
from collections.abc import Callable
from email.message import EmailMessage
from html import unescape

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from auth.links import link, reset_message, verify_message
from config import Settings
from mail import Message
from main import create_app
from postgres.url import DatabaseUrl

type Build = Callable[..., Settings]
type Put = Callable[[EmailMessage | Message], str]

MARKUP = "<script>alert(1)</script>"


@pytest.fixture
def put(app: FastAPI, client: TestClient) -> Put:
    """Put a message into the mailbox of the app, which is empty at first, and return the page."""
    app.state.resources.mailer.mailbox.clear()

    def put(message: EmailMessage | Message) -> str:
        if isinstance(message, Message):
            message = message.as_email("Todo", "todo@example.com")
        app.state.resources.mailer.mailbox.append(message)
        return client.get("/mailbox").text

    return put


@pytest.mark.usefixtures("put")
def test_an_empty_mailbox_says_how_to_get_a_message(client: TestClient) -> None:
    answer = client.get("/mailbox")

    assert answer.status_code == 200
    assert "There are no messages." in answer.text


def test_each_message_has_a_link_that_works_without_a_front_end(
    put: Put, settings: Settings
) -> None:
    put(reset_message(settings, "ada@example.com", "token-1"))
    page = put(verify_message(settings, "bob@example.com", "token-2"))

    assert re.findall(r"To ([^,]+),", page) == ["bob@example.com", "ada@example.com"]
    assert re.findall(r'href="(\./#[^"]+)', page) == ["./#verify=token-2", "./#reset=token-1"]
    assert link(settings, settings.frontend_reset_path, "token-1") in page


def test_a_message_runs_and_loads_nothing(put: Put, client: TestClient) -> None:
    message = EmailMessage()
    message["To"], message["Subject"] = "ada@example.com", MARKUP
    message["Date"] = "Wed, 30 Jan 2030 09:30:00 +0000"
    message.set_content(MARKUP)
    message.add_alternative(f'"><p>{MARKUP}', subtype="html")

    page = put(message)

    assert MARKUP not in page
    ((sandbox, html),) = re.findall(r'sandbox="([^"]*)"[^>]*\ssrcdoc="([^"]*)"', page)
    assert set(sandbox.split()) == {"allow-popups", "allow-popups-to-escape-sandbox"}
    assert f'"><p>{MARKUP}' in unescape(html)
    policy = client.get("/mailbox").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


@pytest.mark.parametrize(
    "changes",
    [
        {"environment": "production"},
        {"mail_url": "smtp://user:password@mail.example.com?from=todo@example.com"},
        {"better_auth_url": "https://auth.example.com"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_there_is_no_mailbox_elsewhere(
    database_url: DatabaseUrl, settings_for: Build, changes: dict[str, str]
) -> None:
    with TestClient(create_app(settings_for(database_url, **changes))) as client:
        assert client.get("/mailbox").status_code == 404


def test_the_mailbox_is_no_part_of_the_api(client: TestClient) -> None:
    assert "/mailbox" not in client.get("/openapi.json").json()["paths"]


def test_another_host_name_cannot_read_the_mailbox(client: TestClient) -> None:
    assert client.get("/mailbox", headers={"Host": "evil.example"}).status_code == 400
