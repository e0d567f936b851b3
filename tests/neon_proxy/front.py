"""The front end: accepts clients like Neon's proxy, and connects them to the compute.

Source of its behaviour and messages: Neon's documentation and proxy source, early in 2026.
"""

import asyncio
import re
import socket
import ssl
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from trustme import LeafCert

from neon_proxy import wire
from neon_proxy.login import passes_scram

OPENING_SECONDS = 60
CLOSING_SECONDS = 5
LOGGED = 500  # characters of a statement
LOOPBACK = "127.0.0.1"
ENDPOINT_OPTION = re.compile(r"(?:endpoint|project)=(\S+)")
# Startup parameters that PgBouncer tracks per client, and so accepts. It rejects others by name.
POOLABLE = {"user", "database", "replication", "client_encoding", "datestyle", "timezone"}
POOLABLE |= {"standard_conforming_strings", "application_name", "intervalstyle"}
POOLABLE |= {"extra_float_digits"}
NO_TLS = "connection is insecure (try using `sslmode=require`)"
NO_ENDPOINT = (
    "Endpoint ID is not specified. Either please upgrade the postgres client library (libpq) for"
    " SNI support or pass the endpoint ID (first part of the domain name) as a parameter:"
    " '?options=endpoint%3D<endpoint-id>'. See more at https://neon.tech/sni"
)

Way = Literal["fatal", "close", "reset"]


class Refused(Exception):
    """An error response that ends a connection attempt."""

    def __init__(self, text: str, severity: str = "ERROR", code: str = "XX000") -> None:
        super().__init__(text)
        self.severity = severity
        self.code = code


@dataclass(frozen=True)
class Reply:
    """The reply to the next connection attempt, instead of a connection.

    times: number of attempts that get it; None: all. before_login: as for an IP allow list; errors
    about waking come after the login. way: disconnect this way, without a message.
    """

    text: str = ""
    severity: str = "ERROR"
    code: str = "XX000"
    times: int | None = None
    before_login: bool = False
    way: Way | None = None


@dataclass(eq=False)
class Client:
    """A client's connection, and how to close it. way: None for a clean close."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    host: str | None = None  # by SNI
    way: Way | None = None
    leave: asyncio.Event = field(default_factory=asyncio.Event)  # set to disconnect
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def part(self) -> None:
        """Close like a server that shuts down ("fatal") or dies ("close"), or with a "reset"."""
        stream: socket.socket = self.writer.get_extra_info("socket")
        with suppress(OSError, TimeoutError):
            if self.way == "reset":
                # Without lingering, the system sends RST instead of FIN.
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.writer.transport.abort()
            elif self.way == "close":
                stream.shutdown(socket.SHUT_WR)  # without TLS's close_notify
            elif self.way == "fatal":
                text = "terminating connection due to administrator command"
                self.writer.write(wire.error(text, "FATAL", "57P01"))
                self.writer.close()
                stream.shutdown(socket.SHUT_WR)
            else:
                self.writer.close()
            self.gone.set()
            # Keep the socket until the client has noticed. Otherwise data that it sends meanwhile
            # would be answered with a reset.
            async with asyncio.timeout(CLOSING_SECONDS):
                await self.reader.read()
        self.writer.transport.abort()


@dataclass
class Endpoint:
    """A compute with its roles, its scripted behaviour, and a record of requests."""

    name: str
    roles: dict[str, str]  # passwords by role
    wake_seconds: float = 0
    asleep: bool = False
    replies: list[Reply] = field(default_factory=list)
    clients: set[Client] = field(default_factory=set)
    connections: list[dict[str, object]] = field(default_factory=list)
    statements: list[tuple[float, str]] = field(default_factory=list)
    waking: asyncio.Task[None] | None = None

    def next_reply(self, *, before_login: bool) -> Reply | None:
        """Take the next scripted reply, if it is for this stage."""
        if not self.replies or self.replies[0].before_login != before_login:
            return None
        reply = self.replies[0]
        if reply.times is not None:
            left = [replace(reply, times=reply.times - 1)] if reply.times > 1 else []
            self.replies[:1] = left
        return reply

    async def hang_up(self, way: Way) -> int:
        """Disconnect all clients. Returns how many there were."""
        clients = list(self.clients)
        for client in clients:
            client.way = way
            client.leave.set()
        await asyncio.gather(*(client.gone.wait() for client in clients))
        return len(clients)

    async def wake(self) -> None:
        """Wait until the compute is awake. Concurrent clients share one wake-up."""
        if not self.asleep:
            return
        if self.waking is None:
            self.waking = asyncio.create_task(self.wake_up())
        await asyncio.shield(self.waking)

    async def wake_up(self) -> None:
        await asyncio.sleep(self.wake_seconds)
        self.asleep, self.waking = False, None


class Front:
    """Serves clients. server_port, pooler_port: local ports of the servers behind it."""

    def __init__(self, certificate: LeafCert, server_port: int, pooler_port: int) -> None:
        self.certificate = certificate
        self.server_port = server_port
        self.pooler_port = pooler_port
        self.endpoints: dict[str, Endpoint] = {}
        self.cancel_ports: dict[bytes, int] = {}  # by the key of the connection to cancel

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client until it disconnects."""
        client = Client(reader, writer)
        try:
            with suppress(OSError, EOFError, ValueError, TimeoutError):
                async with asyncio.timeout(OPENING_SECONDS):
                    session = await self.open(client)
                if session:
                    await session.run()
        except Refused as refusal:
            writer.write(wire.error(str(refusal), refusal.severity, refusal.code))
        except asyncio.CancelledError:
            return  # the process ends
        finally:
            await client.part()

    async def open(self, client: Client) -> "Session | None":
        """Start a client's session. Returns None if there is none and nothing to send."""
        code, body = await wire.read_opening(client.reader)
        encrypted = False
        while code in {wire.SSL_REQUEST, wire.GSS_REQUEST} and not encrypted:
            encrypted = code == wire.SSL_REQUEST
            client.writer.write(b"S" if encrypted else b"N")
            if encrypted:
                await self.encrypt(client)
            code, body = await wire.read_opening(client.reader)
        if code == wire.CANCEL_REQUEST:
            await self.cancel(body)
            return None
        if code >> 16 != 3:
            return None
        if not encrypted:
            raise Refused(NO_TLS)
        return await self.log_in(client, wire.read_parameters(body))

    async def encrypt(self, client: Client) -> None:
        """Upgrade to TLS, and record the host name from SNI."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.certificate.configure_cert(context)

        def note(_socket: ssl.SSLObject, host: str | None, _context: ssl.SSLContext) -> None:
            client.host = host

        context.sni_callback = note
        # Do not read between sending "S" and this call: start_tls() would lose the data.
        await client.writer.start_tls(context)

    async def cancel(self, key: bytes) -> None:
        port = self.cancel_ports.get(key)
        if port is None:
            return
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        writer.write(wire.opening(wire.CANCEL_REQUEST, key))
        await reader.read()  # the server closes the connection after sending the signal
        writer.close()

    async def log_in(self, client: Client, parameters: dict[str, str]) -> "Session | None":
        """Find the endpoint, check the password, wake the compute and connect to it."""
        user = parameters.get("user", "")
        name = await self.find_endpoint(client, parameters)
        endpoint = self.endpoints.get(name.removesuffix("-pooler"))
        if endpoint is None:
            endpoint = Endpoint(name, {})  # do not reveal that there is none
        endpoint.connections.append(
            {"at": time.time(), "host": client.host, "pooled": name.endswith("-pooler")}
            | {"parameters": dict(parameters)}
        )
        if is_over(client, endpoint.next_reply(before_login=True)):
            return None
        password = endpoint.roles.get(user)
        if not await passes_scram(client.reader, client.writer, password, self.certificate):
            raise Refused(f"password authentication failed for user '{user}'")
        client.writer.write(wire.AUTHENTICATION_OK)
        if is_over(client, endpoint.next_reply(before_login=False)):
            return None
        await endpoint.wake()
        port = self.server_port
        if name.endswith("-pooler"):
            port = self.pooler_port
            refuse_unpoolable(parameters)
        return await self.connect(client, endpoint, port, parameters)

    async def find_endpoint(self, client: Client, parameters: dict[str, str]) -> str:
        """Return the endpoint's name from the host or the options, and remove it from those."""
        host = (client.host or "").lower()
        by_host = host.partition(".")[0] if host.endswith(".neon.tech") else None
        options = parameters.get("options", "")
        names = ENDPOINT_OPTION.findall(options)
        by_option = names[0] if len(names) == 1 else None
        left = ENDPOINT_OPTION.sub("", options).strip()
        if left:
            parameters["options"] = left
        else:
            parameters.pop("options", None)
        if by_host and by_option and by_host != by_option:
            raise Refused(
                f"Inconsistent project name inferred from SNI ('{by_host}')"
                f" and project option ('{by_option}')."
            )
        name = by_option or by_host
        if name is None:
            # The password could name the endpoint. A client that requires channel binding does not
            # send one.
            client.writer.write(wire.ASK_FOR_PASSWORD)
            await wire.read_message(client.reader)
            raise Refused(NO_ENDPOINT)
        return name

    async def connect(
        self, client: Client, endpoint: Endpoint, port: int, parameters: dict[str, str]
    ) -> "Session | None":
        """Start a session with the server, and pass its messages on unchanged."""
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        kind, words = b"", b""
        try:
            writer.write(wire.startup(parameters))
            while kind not in {b"Z", b"E"}:
                kind, body = await wire.read_message(reader)
                if kind == b"K":
                    self.cancel_ports[body] = port
                if kind != b"R":  # the client is already authenticated
                    words += wire.message(kind, body)
            client.writer.write(words)
            await client.writer.drain()  # fails if the client has given up meanwhile
        except BaseException:
            writer.close()
            raise
        if kind == b"E":
            writer.close()
            return None
        return Session(client, endpoint, reader, writer)


def is_over(client: Client, reply: Reply | None) -> bool:
    """Send a scripted reply. Returns whether to disconnect the client. Raises Refused."""
    if reply is None:
        return False
    if reply.way is None:
        raise Refused(reply.text, reply.severity, reply.code)
    client.way = reply.way
    return True


def refuse_unpoolable(parameters: dict[str, str]) -> None:
    """Reject parameters that a transaction pooler cannot track, like PgBouncer since 1.20.

    Debian's PgBouncer 1.18 would reject `options` altogether.
    """
    for name in parameters:
        if name.lower() not in POOLABLE | {"options"}:
            text = f"unsupported startup parameter: {name}"
            raise Refused(text, "FATAL", "08P01")
    for name in re.findall(r"(?:-c\s*|--)([\w.-]+)\s*=", parameters.get("options", "")):
        if name.lower() not in POOLABLE:
            text = f"unsupported startup parameter in options: {name}"
            raise Refused(text, "FATAL", "08P01")


@dataclass
class Session:
    """An established connection between a client and its server."""

    client: Client
    endpoint: Endpoint
    reader: asyncio.StreamReader  # from the server
    writer: asyncio.StreamWriter

    async def run(self) -> None:
        """Forward messages in both directions until one side disconnects."""
        self.endpoint.clients.add(self.client)
        ends = [self.ask(), self.answer(), self.client.leave.wait()]
        tasks = [asyncio.ensure_future(end) for end in ends]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.endpoint.clients.discard(self.client)
            self.writer.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def ask(self) -> None:
        while True:
            kind, body = await wire.read_message(self.client.reader)
            statement = wire.statement_of(kind, body)
            if statement is not None:
                self.endpoint.statements.append((time.time(), statement[:LOGGED]))
            self.writer.write(wire.message(kind, body))
            await self.writer.drain()

    async def answer(self) -> None:
        while data := await self.reader.read(1 << 16):
            self.client.writer.write(data)
            await self.client.writer.drain()
