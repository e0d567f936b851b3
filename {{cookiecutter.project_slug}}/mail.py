"""Mail: where it is sent, what a message looks like, and sending it without making a request wait.

Without MAIL_URL, an app in development keeps its messages in memory, and /mailbox shows them.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime, make_msgid
from html import escape
from ipaddress import ip_address
from urllib.parse import parse_qs, unquote, urlsplit

PORTS = {"smtp": 587, "smtps": 465}
DELIVERY_SECONDS = 15.0  # connecting, TLS, logging in, sending
QUIT_SECONDS = 1.0  # for a server's goodbye
RETRY_SECONDS = 5.0  # before the second and last attempt
# Waited before a message is made. Otherwise the next response on the connection would be late, and
# so reveal that the address has an account.
DELAY_SECONDS = (0.2, 1.0)
CLOSE_SECONDS = 4.0  # for messages that wait when the app ends
MAX_SMTP_CONNECTIONS = 4  # to the mail server
MAX_WAITING = 1000  # messages
MAILBOX_SIZE = 100  # messages that development keeps
EXAMPLE_URL = "smtp://USER:PASSWORD@HOST:587?from=todo@example.com"
BUTTON = (
    "display:inline-block;padding:10px 18px;border-radius:6px;background:#1f5fbf;color:#ffffff;"
    "text-decoration:none"
)


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
        """Read a URL as in EXAMPLE_URL. Raises ValueError, without a part of the text."""
        # config.py imports this module, and with it every command: what is slow to import waits.
        from email_validator import EmailNotValidError, validate_email  # noqa: PLC0415

        mistake = ValueError(
            f"is not a URL such as {EXAMPLE_URL}; in user and password, @ is %40, / is %2F and"
            " # is %23"
        )
        try:
            url = urlsplit(text.strip())
            port = url.port
        except ValueError:
            raise mistake from None
        if url.scheme not in PORTS or not url.hostname or url.path not in {"", "/"} or url.fragment:
            raise mistake
        if (url.scheme, port) == ("smtp", PORTS["smtps"]):
            raise ValueError(f"has the port of smtps://, with smtp://: write {EXAMPLE_URL}")
        user = unquote(url.username) if url.username else None
        password = unquote(url.password) if url.password else None
        if (user is None) != (password is None):
            raise ValueError(f"has a user without a password: write {EXAMPLE_URL}")
        options = parse_qs(url.query.replace("+", "%2B"))  # not form data: + is not a space
        if set(options) - {"from"} or len(options.get("from", [])) > 1:
            raise ValueError(f"may have only one option, from: write {EXAMPLE_URL}")
        sender = options.get("from", [user or ""])[0]
        try:
            validate_email(sender, check_deliverability=False)
        except EmailNotValidError:
            raise ValueError(f"does not say the sender's address: write {EXAMPLE_URL}") from None
        tls = url.scheme == "smtps"
        return cls(url.hostname, port or PORTS[url.scheme], sender, tls, user, password)

    @property
    def requires_tls(self) -> bool:
        """Whether messages need TLS: not to a relay on this machine or in the same network."""
        try:
            is_near = ip_address(self.host).is_private
        except ValueError:
            is_near = "." not in self.host
        return self.user is not None or not is_near


@dataclass(frozen=True)
class Message:
    """A message to one person, as text and as HTML. before, after: paragraphs around the link."""

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
        email["To"] = Address("", *ascii_domain(self.to).rsplit("@", 1))
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
            href, label = escape(self.link), escape(self.label)
            button = f'<p><a href="{href}" style="{BUTTON}">{label}</a></p>'
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f"<title>{escape(self.subject)}</title>"
            '<body style="font:16px/1.5 system-ui,sans-serif;max-width:34em">'
            f'{before}{button}{after}<p style="color:#666666">{escape(name)}</p>'
        )


def ascii_domain(address: str) -> str:
    """Return an address with its domain in ASCII (xn--…), which every mail server takes."""
    from email_validator import validate_email  # noqa: PLC0415  (slow to import)

    parsed = validate_email(address, check_deliverability=False)
    return f"{parsed.local_part}@{parsed.ascii_domain}"


async def deliver(url: MailUrl, email: EmailMessage) -> None:
    """Hand a message over to the mail server. Raises MailError.

    A password is only sent over TLS, and so is a message, except to a relay nearby that offers
    none. A certificate that does not fit is refused.
    """
    import aiosmtplib  # noqa: PLC0415  (an app that sends no mail starts without it)

    client = aiosmtplib.SMTP(
        hostname=url.host,
        port=url.port,
        username=url.user,
        password=url.password,
        use_tls=url.tls,
        start_tls=True if url.requires_tls and not url.tls else None,  # None: if it is offered
        timeout=DELIVERY_SECONDS,
    )
    try:
        async with asyncio.timeout(DELIVERY_SECONDS):
            await client.connect()
            await client.send_message(email)
        with suppress(aiosmtplib.SMTPException, OSError):  # it has taken the message
            await client.quit(timeout=QUIT_SECONDS)
    except TimeoutError:
        raise MailError(f"{url.host} did not take it within {DELIVERY_SECONDS:.0f} s") from None
    except aiosmtplib.SMTPRecipientsRefused as error:
        codes = [recipient.code for recipient in error.recipients]
        raise MailError(
            f"{url.host} refused the recipient: {codes}",
            is_final=all(code >= 500 for code in codes),
        ) from None
    except aiosmtplib.SMTPResponseException as error:
        words = [str(error.code), *error.message.split()]
        text = " ".join(word for word in words if "@" not in word)  # addresses are not logged
        raise MailError(f"{url.host} refused it: {text}", is_final=error.code >= 500) from None
    except (aiosmtplib.SMTPException, OSError) as error:
        is_final = isinstance(error, aiosmtplib.SMTPNotSupported)
        raise MailError(f"{url.host} cannot be used: {error}", is_final=is_final) from None
    finally:
        client.close()


class Mailer:
    """Sends messages after their requests have been answered, so that no answer depends on them."""

    def __init__(self, url: MailUrl | None, app_name: str, *, keeps: bool) -> None:
        """keeps: whether to keep messages in a mailbox if there is no URL."""
        import structlog  # noqa: PLC0415  (slow to import)

        self._log = structlog.get_logger()
        self._url = url
        self._app_name = app_name
        self._sender = url.sender if url else "todo@localhost.example"
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = asyncio.Semaphore(MAX_SMTP_CONNECTIONS)
        self.mailbox: deque[EmailMessage] | None = None
        if url is None and keeps:
            self.mailbox = deque(maxlen=MAILBOX_SIZE)

    @property
    def can_send(self) -> bool:
        return self._url is not None or self.mailbox is not None

    def send(self, make: Callable[[], Message]) -> None:
        """Make a message and send it in a task of its own, with one more attempt if it fails."""
        if len(self._tasks) >= MAX_WAITING:
            self._log.error("message dropped", error=f"{MAX_WAITING} messages are waiting")
            return
        task = asyncio.create_task(self._send(make))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, make: Callable[[], Message]) -> None:
        try:
            if self._url is not None:
                await self._deliver(self._url, make)
            elif self.mailbox is not None:
                message = make()
                self.mailbox.append(message.as_email(self._app_name, self._sender))
                self._log.info(
                    "message kept", subject=message.subject, link=message.link, page="/mailbox"
                )
        except MailError as error:
            self._log.error("message not sent", error=str(error))
        except Exception:  # noqa: BLE001  (nobody else would see it)
            self._log.exception("message not sent")

    async def _deliver(self, url: MailUrl, make: Callable[[], Message]) -> None:
        await asyncio.sleep(random.uniform(*DELAY_SECONDS))  # noqa: S311  (no secret)
        async with self._connections:
            email = make().as_email(self._app_name, self._sender)  # its link is not old yet
            try:
                await deliver(url, email)
            except MailError as error:
                if error.is_final:
                    raise
                self._log.warning("message delayed", error=str(error))
            else:
                self._log.info("message sent", subject=email["Subject"])
                return
        await asyncio.sleep(RETRY_SECONDS)
        async with self._connections:
            await deliver(url, email)
        self._log.info("message sent", subject=email["Subject"])

    async def aclose(self) -> None:
        """Wait for the messages that are being sent, but not for long."""
        if self._tasks:
            _, unsent = await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
            for task in unsent:
                task.cancel()
            if unsent:
                self._log.error("messages not sent", count=len(unsent), error="the app ended")
