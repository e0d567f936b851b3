"""Mail, sent to a real SMTP server: how it is secured, and what becomes of faults."""

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
from structlog.testing import capture_logs

import mail
from mail import Mailer, MailError, MailUrl, Message, deliver
from tests.mail_server import HOST, PASSWORD, USER, MailServer, mail_server, make_certificate

type Send = Callable[..., Mailer]

MESSAGE = Message(
    to="jörg@exämple.com",
    subject="Grüße",
    before=("Is this <you>?",),
    link="https://app.example.com/x?token=a&b=c",
    label="Confirm",
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(mail, "DELAY_SECONDS", (0.0, 0.0))


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))  # as the operator of a private CA would do
    return path


@pytest.fixture
def server() -> Iterator[MailServer]:
    with mail_server(MailServer()) as server:
        yield server


def url_of(server: MailServer, login: str = "", scheme: str = "smtp") -> MailUrl:
    return MailUrl.parse(f"{scheme}://{login}{HOST}:{server.port}?from=todo@example.com")


@pytest.fixture(autouse=True)
def runner() -> Iterator[asyncio.Runner]:
    """A loop that outlives the servers, as an app's does.

    TLS is closed in its background. A loop that ended at once would leave sockets open, now and
    then, and fail a later test.
    """

    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    with asyncio.Runner() as runner:
        yield runner
        runner.run(settle())


@pytest.fixture
def send(runner: asyncio.Runner) -> Send:
    """Send messages as an app does, until it ends."""

    async def run(url: MailUrl | None, messages: Sequence[Message], *, keeps: bool) -> Mailer:
        mailer = Mailer(url, "Ada's Todo\nApp", keeps=keeps)
        for message in messages:
            mailer.send(partial(replace, message))
        await mailer.aclose()
        return mailer

    def send(url: MailUrl | None, *messages: Message, keeps: bool = False) -> Mailer:
        return runner.run(run(url, messages, keeps=keeps))

    return send


def email() -> EmailMessage:
    return MESSAGE.as_email("Todo", "todo@example.com")


def test_a_message_arrives_as_plain_text_and_as_html(send: Send, server: MailServer) -> None:
    send(url_of(server), MESSAGE)

    received = server.wait()
    plain, html = (part.get_content() for part in received.iter_parts())
    assert (received["To"], received["Subject"]) == ("jörg@xn--exmple-cua.com", MESSAGE.subject)
    assert received["From"] == "Ada's Todo App <todo@example.com>"
    assert "Is this <you>?" in plain
    assert MESSAGE.link in plain.splitlines()
    assert "Is this &lt;you&gt;?" in html
    assert 'href="https://app.example.com/x?token=a&amp;b=c"' in html


@pytest.mark.filterwarnings("ignore:Requiring AUTH")  # aiosmtpd does not see TLS around it
@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
def test_a_password_is_sent_over_tls(
    runner: asyncio.Runner, certificate: Path, scheme: str
) -> None:
    login = f"{quote(USER)}:{quote(PASSWORD, safe='')}@"
    secured = MailServer(certificate, login=True, implicit_tls=scheme == "smtps")
    with mail_server(secured) as server:
        runner.run(deliver(url_of(server, login, scheme), email()))

    assert len(server.messages) == 1


def test_a_password_is_not_sent_without_tls(runner: asyncio.Runner, server: MailServer) -> None:
    with pytest.raises(MailError, match="STARTTLS"):
        runner.run(deliver(url_of(server, "ada:kangaroo@"), email()))

    assert server.attempts == 0


def test_a_certificate_that_nobody_vouches_for_is_refused(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    with (
        mail_server(MailServer(make_certificate(tmp_path))) as server,
        pytest.raises(MailError, match="certificate"),
    ):
        runner.run(deliver(url_of(server), email()))


def test_a_wrong_password_is_final_and_not_logged(send: Send, certificate: Path) -> None:
    with mail_server(MailServer(certificate, login=True)) as server, capture_logs() as lines:
        send(url_of(server, "ada:kangaroo@"), MESSAGE)

    assert [line["event"] for line in lines] == ["message not sent"]
    assert "535" in lines[0]["error"]
    assert "kangaroo" not in str(lines)


def test_a_server_that_is_busy_is_asked_once_more(send: Send, server: MailServer) -> None:
    server.replies = ["451 try again later"]
    with capture_logs() as lines:
        send(url_of(server), MESSAGE)

    assert (server.attempts, len(server.messages)) == (2, 1)
    assert [line["event"] for line in lines] == ["message delayed", "message sent"]


def test_a_message_that_is_refused_is_not_sent_again(send: Send, server: MailServer) -> None:
    server.replies = ["554 5.7.1 no mail for <jörg@xn--exmple-cua.com>, sorry"]
    with capture_logs() as lines:
        send(url_of(server), MESSAGE)

    assert server.attempts == 1
    assert lines[-1]["event"] == "message not sent"
    assert "554 5.7.1 no mail for sorry" in lines[-1]["error"]
    assert "jörg" not in str(lines)


def test_a_server_that_is_silent_at_the_end_has_taken_the_message(
    send: Send, server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "DELIVERY_SECONDS", 3.0)
    monkeypatch.setattr(mail, "QUIT_SECONDS", 0.1)
    server.quit_delay = 5
    with capture_logs() as lines:
        send(url_of(server), MESSAGE)

    assert server.attempts == 1
    assert [line["event"] for line in lines] == ["message sent"]


def test_a_server_that_does_not_answer_is_given_up(
    runner: asyncio.Runner, server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "DELIVERY_SECONDS", 0.2)
    server.delay = 5

    with pytest.raises(MailError, match="within"):
        runner.run(deliver(url_of(server), email()))


def test_a_message_that_cannot_be_made_costs_a_line_in_the_log(send: Send) -> None:
    with capture_logs() as lines:
        send(None, replace(MESSAGE, to="nobody"), keeps=True)

    assert [line["event"] for line in lines] == ["message not sent"]


@pytest.mark.parametrize("near", ["localhost", "mailpit", "10.0.0.7", "[::1]"])
def test_only_a_relay_nearby_may_do_without_tls(near: str) -> None:
    assert not MailUrl.parse(f"smtp://{near}?from=a@b.co").requires_tls
    assert MailUrl.parse(f"smtp://ada:pw@{near}?from=a@b.co").requires_tls
    assert MailUrl.parse("smtp://smtp.example.com?from=a@b.co").requires_tls


def test_a_dead_server_costs_two_lines_in_the_log(send: Send) -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    with capture_logs() as lines:
        send(MailUrl.parse(f"smtp://{HOST}:{port}?from=todo@example.com"), MESSAGE)

    assert [line["event"] for line in lines] == ["message delayed", "message not sent"]


def test_an_app_that_ends_does_not_wait_for_long(
    send: Send, server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "CLOSE_SECONDS", 0.2)
    server.delay = 5
    with capture_logs() as lines:
        send(url_of(server), *[MESSAGE] * 8)

    assert lines == [
        {"event": "messages not sent", "count": 8, "error": "the app ended", "log_level": "error"}
    ]


def test_more_messages_than_can_wait_are_dropped(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "MAX_WAITING", 2)
    with capture_logs() as lines:
        mailer = send(None, *[MESSAGE] * 3, keeps=True)

    assert mailer.mailbox is not None
    assert len(mailer.mailbox) == 2
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["message dropped"]


def test_without_a_server_a_mailbox_keeps_the_newest(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "MAILBOX_SIZE", 2)
    with capture_logs() as lines:
        mailer = send(None, *[MESSAGE] * 3, keeps=True)

    assert mailer.mailbox is not None
    assert len(mailer.mailbox) == 2
    assert lines[0]["link"] == MESSAGE.link


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smtp://h?from=a@b.co", MailUrl("h", 587, "a@b.co", tls=False)),
        ("smtps://h/?from=a@b.co", MailUrl("h", 465, "a@b.co", tls=True)),
        ("smtp://a%40b.co:p%2Fw@h:25", MailUrl("h", 25, "a@b.co", False, "a@b.co", "p/w")),
        ("smtp://key:pw@h?from=a%40b.co", MailUrl("h", 587, "a@b.co", False, "key", "pw")),
        ("smtp://[::1]:1025?from=a+x@b.co", MailUrl("::1", 1025, "a+x@b.co", tls=False)),
    ],
)
def test_a_url_names_server_login_and_sender(text: str, expected: MailUrl) -> None:
    assert MailUrl.parse(text) == expected


@pytest.mark.parametrize("password", ["a/b", "a#b", "a?b"])
def test_an_unencoded_password_gets_another_message_than_a_typo(password: str) -> None:
    with pytest.raises(ValueError, match="# is %23"):
        MailUrl.parse(f"smtp://ada:{password}@h?from=a@b.co")


@pytest.mark.parametrize(
    "text",
    [
        "mail.example.com",
        "http://kangaroo:kangaroo@h?from=a@b.co",
        "smtp://kangaroo@h?from=a@b.co",
        "smtp://kangaroo:kangaroo@h",  # no sender
        "smtp://kangaroo:kangaroo@h?from=a@b.co&tls=no",
        "smtp://kangaroo:kangaroo@h:kangaroo?from=a@b.co",
        "smtp://kangaroo:kangaroo@h?from=a@b.co%0d%0aBcc:+x",
        "smtp://a:kangaroo/kangaroo@h?from=a@b.co",  # a slash that is not encoded
        "smtp://a:kangaroo#kangaroo@h?from=a@b.co",
        "smtp://a:kangaroo@h:465?from=a@b.co",  # TLS from the start
        "smtp://a:kangaroo@h?from=a@b.co&from=kangaroo@b.co",
        "smtp://a:kangaroo@h?from=kangaroo@b..co",
    ],
)
def test_other_urls_are_refused_without_a_word_of_them(text: str) -> None:
    with pytest.raises(ValueError, match="smtp://USER") as error:
        MailUrl.parse(text)

    assert "kangaroo" not in str(error.value)
