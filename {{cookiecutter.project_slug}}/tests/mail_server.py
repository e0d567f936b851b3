"""A real SMTP server for the tests, on 127.0.0.1: with STARTTLS and logins, slow, or refusing."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

USER = "todo@example.com"
PASSWORD = "kangaroo/@:mail"
HOST = "127.0.0.1"


@dataclass
class MailServer:
    """What a test tells the server to do, and what it has received."""

    certificate: Path | None = None
    login: bool = False
    implicit_tls: bool = False  # from the first byte, instead of STARTTLS
    replies: list[str] = field(default_factory=list)  # to the next messages; then it takes all
    delay: float = 0.0
    quit_delay: float = 0.0
    port: int = 0
    messages: list[EmailMessage] = field(default_factory=list)
    attempts: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)

    # The names are aiosmtpd's.
    async def handle_DATA(self, _: SMTP, __: Session, envelope: Envelope) -> str:  # noqa: N802
        self.attempts += 1
        await asyncio.sleep(self.delay)
        if self.replies:
            return self.replies.pop(0)
        assert isinstance(envelope.content, bytes)
        message: Any = message_from_bytes(envelope.content, policy=policy.default)
        self.messages.append(message)
        self.arrived.set()
        return "250 OK"

    async def handle_QUIT(self, *_: object) -> str:  # noqa: N802
        await asyncio.sleep(self.quit_delay)
        return "221 Bye"

    def authenticate(self, *arguments: Any) -> AuthResult:
        data = arguments[-1]
        right = (data.login, data.password) == (USER.encode(), PASSWORD.encode())
        return AuthResult(success=right, handled=False)

    def context(self) -> ssl.SSLContext | None:
        if self.certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate)
        return context

    def protocol(self) -> SMTP:
        context = None if self.implicit_tls else self.context()
        return SMTP(
            self,
            hostname="mail.test",
            enable_SMTPUTF8=True,
            tls_context=context,
            require_starttls=context is not None,
            auth_required=self.login,
            auth_require_tls=context is not None,
            authenticator=self.authenticate,
        )

    def wait(self) -> EmailMessage:
        """Return the newest message, once there is one."""
        assert self.arrived.wait(10), "no message has arrived"
        self.arrived.clear()
        return self.messages[-1]


@contextmanager
def mail_server(server: MailServer) -> Iterator[MailServer]:
    """Run a server in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def listen() -> asyncio.Server:
        context = server.context() if server.implicit_tls else None
        return await loop.create_server(server.protocol, HOST, 0, ssl=context)

    async def end() -> None:
        # Accept no more, and let asyncio set up what it has accepted, which takes a few rounds of
        # the loop: abort_clients() would miss those connections, and they would stay open.
        loop.remove_reader(listener.sockets[0])
        for _ in range(3):
            await asyncio.sleep(0)
        listener.close()
        listener.abort_clients()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    listener = asyncio.run_coroutine_threadsafe(listen(), loop).result(10)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def make_certificate(folder: Path) -> Path:
    """Return a file with a key, and a certificate for HOST that it has signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mail.test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path = folder / "mail.pem"
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path
