"""Mail: where it is sent, what a message looks like, and sending it without making a request wait.

Without MAIL_URL, an app in development keeps its messages in memory, and /mailbox shows them.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime, make_msgid
from html import escape
from urllib.parse import parse_qs, unquote, urlsplit

import structlog

PORTS = {"smtp": 587, "smtps": 465}
SECONDS = 15.0  # to deliver a message: connecting, TLS, logging in, sending
RETRY_SECONDS = 5.0  # before the second and last attempt
AT_ONCE = 4  # connections to the mail server
MAX_WAITING = 1000  # messages, of some kilobytes each
CLOSE_SECONDS = 8.0  # for those that wait when the app ends
KEPT = 100  # in the mailbox of development
EXAMPLE = "smtp://USER:PASSWORD@HOST:587?from=todo@example.com"
BUTTON = (
    "display:inline-block;padding:10px 18px;border-radius:6px;background:#1f5fbf;color:#ffffff;"
    "text-decoration:none"
)
ADDRESS = re.compile(r"[^\s@<>\",;:\\]+@[^\s@<>\",;:\\]+")

log = structlog.get_logger()


class MailError(Exception):
    """A message was not delivered. is_final: whether a second attempt would fail too."""

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


@dataclass(frozen=True)
class MailUrl:
    """A mail server, and the address that messages come from."""

    host: str
    port: int
    sender: str
    tls: bool  # from the first byte; otherwise STARTTLS
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> "MailUrl":
        """Read a URL as in EXAMPLE. Raises ValueError, without a part of the text."""
        try:
            url = urlsplit(text.strip())
            port = url.port
        except ValueError:
            raise ValueError(f"is not a URL such as {EXAMPLE}") from None
        if url.scheme not in PORTS or not url.hostname or url.path not in {"", "/"}:
            raise ValueError(f"is not a URL such as {EXAMPLE}; encode special characters as %40")
        user = unquote(url.username) if url.username else None
        password = unquote(url.password) if url.password else None
        if (user is None) != (password is None):
            raise ValueError(f"has a user without a password: write {EXAMPLE}")
        options = parse_qs(url.query)
        if set(options) - {"from"}:
            raise ValueError(f"has an option other than from: write {EXAMPLE}")
        sender = options.get("from", [user or ""])[0]
        if not ADDRESS.fullmatch(sender):
            raise ValueError(f"does not say the sender's address: write {EXAMPLE}")
        tls = url.scheme == "smtps"
        return cls(url.hostname, port or PORTS[url.scheme], sender, tls, user, password)


@dataclass(frozen=True)
class Message:
    """A message to one person, as plain text and as HTML. paragraphs: with the link in between."""

    to: str
    subject: str
    before: tuple[str, ...]
    link: str | None = field(default=None, repr=False)
    label: str = ""  # of the link
    after: tuple[str, ...] = ()

    def as_email(self, app_name: str, sender: str) -> EmailMessage:
        name = " ".join(app_name.split())
        email = EmailMessage(SMTP)
        email["From"] = Address(name, *sender.rsplit("@", 1))
        email["To"] = Address("", *self.to.rsplit("@", 1))
        email["Subject"] = self.subject
        email["Date"] = localtime()
        email["Message-ID"] = make_msgid(domain=sender.rpartition("@")[2])
        email["Auto-Submitted"] = "auto-generated"  # out-of-office programs do not reply (RFC 3834)
        link = (self.link,) if self.link else ()
        email.set_content("\n\n".join([*self.before, *link, *self.after, name]) + "\n")
        email.add_alternative(self.as_html(name), subtype="html")
        return email

    def as_html(self, name: str) -> str:
        before, after = (
            "".join(f"<p>{escape(text)}</p>" for text in part) for part in (self.before, self.after)
        )
        button = ""
        if self.link:
            style = (
                "display:inline-block;padding:10px 18px;border-radius:6px;background:#1f5fbf;"
                "color:#ffffff;text-decoration:none"
            )
            button = (
                f'<p><a href="{escape(self.link)}" style="{style}">{escape(self.label)}</a></p>'
            )
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f"<title>{escape(self.subject)}</title>"
            '<body style="font:16px/1.5 system-ui,sans-serif;max-width:34em">'
            f'{before}{button}{after}<p style="color:#666666">{escape(name)}</p>'
        )


async def deliver(url: MailUrl, email: EmailMessage) -> None:
    """Hand a message over to the mail server. Raises MailError.

    A password is only sent over TLS, and a certificate that does not fit is refused.
    """
    import aiosmtplib  # noqa: PLC0415  (an app that sends no mail starts without it)

    try:
        async with asyncio.timeout(SECONDS):
            await aiosmtplib.send(
                email,
                hostname=url.host,
                port=url.port,
                username=url.user,
                password=url.password,
                use_tls=url.tls,
                # None: if the server offers it, as a relay in the same network may not.
                start_tls=None if url.tls or url.user is None else True,
                timeout=SECONDS,
            )
    except TimeoutError:
        raise MailError(f"{url.host} did not take it within {SECONDS:.0f} s") from None
    except aiosmtplib.SMTPRecipientsRefused as error:
        codes = [recipient.code for recipient in error.recipients]
        raise MailError(
            f"{url.host} refused the recipient: {codes}",
            is_final=all(code >= 500 for code in codes),
        ) from None
    except aiosmtplib.SMTPResponseException as error:
        raise MailError(
            f"{url.host} refused it: {error.code} {error.message}", is_final=error.code >= 500
        ) from None
    except (aiosmtplib.SMTPException, OSError) as error:
        raise MailError(f"{url.host} cannot be used: {error}") from None


class Mailer:
    """Sends messages after their requests have been answered, so that no answer depends on them."""

    def __init__(self, url: MailUrl | None, app_name: str, *, keeps: bool) -> None:
        """keeps: whether to keep messages in a mailbox if there is no URL."""
        self._url = url
        self._app_name = app_name
        self._sender = url.sender if url else "todo@localhost.example"
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = asyncio.Semaphore(AT_ONCE)
        self.mailbox: deque[EmailMessage] | None = None
        if url is None and keeps:
            self.mailbox = deque(maxlen=KEPT)

    @property
    def can_send(self) -> bool:
        return self._url is not None or self.mailbox is not None

    def send(self, make: Callable[[], Message]) -> None:
        """Make a message and send it in a task of its own, with one more attempt if it fails.

        To make one takes time, and a client could learn from that whether an address is known: so
        it is made in the task too.
        """
        if len(self._tasks) >= MAX_WAITING:
            log.error("message dropped", error=f"{MAX_WAITING} wait for the mail server")
            return
        task = asyncio.create_task(self._send(make))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, make: Callable[[], Message]) -> None:
        message = make()
        email = message.as_email(self._app_name, self._sender)
        if self.mailbox is not None:
            self.mailbox.append(email)
            log.info("message kept", subject=message.subject, link=message.link, page="/mailbox")
        if self._url is None:
            return
        async with self._connections:
            try:
                await self._deliver(self._url, email)
            except MailError as error:
                log.error("message not sent", subject=message.subject, error=str(error))
            else:
                log.info("message sent", subject=message.subject)

    async def _deliver(self, url: MailUrl, email: EmailMessage) -> None:
        try:
            await deliver(url, email)
        except MailError as error:
            if error.is_final:
                raise
            log.warning("message delayed", error=str(error))
            await asyncio.sleep(RETRY_SECONDS)
            await deliver(url, email)

    async def aclose(self) -> None:
        """Wait for the messages that are being sent, but not for long."""
        if self._tasks:
            _, unsent = await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
            for task in unsent:
                task.cancel()
            if unsent:
                log.error("messages not sent", count=len(unsent), error="the app ended")
