"""HTTP/1.1 as uvicorn speaks it, with limits for clients that send too much, too slowly or oddly.

uvicorn has no settings for these (docs/deploying.md lists them). The methods that are overridden
here are internal to uvicorn: tests/test_protocol.py fails if a new version changes them.
"""

import asyncio
import json
import math
import sys
from collections import Counter
from functools import cache
from typing import Any, ClassVar
from urllib.parse import unquote

import httptools
import structlog
from starlette.applications import Starlette
from starlette.routing import Match
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from auth.client import client_key
from config import get_settings
from logs import ID_HEADER, NO_STORE, SAFE_HEADERS, read_request_id
from schemas.problem import RETRY_AFTER_SECONDS

MAX_CONNECTIONS = 4000  # of one process; 2,000 clients at once are within what it answers in time
SPARE_FILES = 100  # that a process opens besides: the database, libraries, logs
CLIENT_SHARE = 4  # one client may have a quarter of them: several offices share an address
WARNING_SECONDS = 60.0  # at most one line about too many connections, and one about a client's
MAX_WARNED_PEERS = 20

log = structlog.get_logger()


class Refused(Exception):
    """A request that is answered here, before the app sees it."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class LimitedProtocol(HttpToolsProtocol):
    """One connection. What is refused gets an answer in the app's shape, and a line in the log."""

    HEAD_BYTES = 65_536  # the request line and the headers
    # Parsed at once. A piece may also contain the start of the next request.
    PIECE_BYTES = 16_384
    HEAD_SECONDS = 20.0  # until they are complete; silent connections get no more either
    # Until the body is complete. For a route that takes larger bodies than errors.py allows now,
    # allow more.
    REQUEST_SECONDS = 40.0
    SEND_SECONDS_AT_SHUTDOWN = 3.0  # the same after SIGTERM
    LINGER_SECONDS = 2.0  # a client that is still sending would not read the answer otherwise

    # One of each for the process.
    clients: ClassVar[Counter[str]] = Counter()  # connections by client, without trusted proxies
    accepted = 0  # connections of this process so far
    warned_at: ClassVar[dict[int, float]] = {}  # by the status of a refusal
    warned_peers: ClassVar[set[str]] = set()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._due: float | None = None  # when what the client is sending must be complete
        self._write_due: float | None = None  # when it must have read what is waiting for it
        self._timer: asyncio.TimerHandle | None = None
        self._in_headers = True
        self._unread = 0  # bytes since the last request, or since the last piece of its body
        self._refusal: Refused | None = None
        self._upgrades = False  # to a WebSocket
        self._repeats = False  # the request is parsed again, as one without Upgrade
        self._from_proxy = False  # a trusted one keeps the connection for any client's requests
        self._ends = False  # after the next response, because the process shuts down
        self._counted: str | None = None  # the client in `clients`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        LimitedProtocol.accepted += 1
        if self.client is not None:  # IPv4 on a socket for both
            self.client = (self.client[0].removeprefix("::ffff:"), self.client[1])
        self._count()
        if len(self.connections) > max_connections():
            self._refuse_connection(Refused(503, "too many connections"), max_connections())
            return
        most = max(1, max_connections() // CLIENT_SHARE)
        if self._counted is not None and self.clients[self._counted] > most:
            self._refuse_connection(Refused(429, "too many connections from this address"), most)
            return
        self._due = self.loop.time() + self.HEAD_SECONDS
        self._timer = self.loop.call_at(self._due, self._check_time)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_counting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._refusal is not None:
            return
        if self._due is None:
            self._due = self.loop.time() + self.HEAD_SECONDS
        try:
            for start in range(0, len(data), self.PIECE_BYTES):
                piece = memoryview(data)[start : start + self.PIECE_BYTES]
                self._unread += len(piece)
                self._parse(piece)
                if self._upgrades:
                    return
                if self._unread > self.HEAD_BYTES:
                    raise self._too_large()
        except httptools.HttpParserError as error:
            cause = error.__context__  # what a callback raised
            self._refuse(cause if isinstance(cause, Refused) else Refused(400, "invalid HTTP"))
        except Refused as refusal:
            self._refuse(refusal)

    def _parse(self, data: memoryview) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self._upgrades:
                    self._stop_counting()  # the other protocol will not report its end
                    self.handle_websocket_upgrade()
                    return
                self._repeat_without_upgrade()
                data = data[upgrade.args[0] :]
            else:
                return

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        if self._due is None:  # it begins in the same piece in which the last one ends
            self._due = self.loop.time() + self.HEAD_SECONDS
            self._unread = 1  # or more

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # trailers are no headers (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        may_be_large = self._unread > self.HEAD_BYTES - self.PIECE_BYTES
        if may_be_large and self._head_bytes() > self.HEAD_BYTES:
            raise self._too_large()
        self._unread = 0
        if self.parser.should_upgrade():
            self._choose_protocol()
            if self._repeats:
                return
        headers = dict(self.headers)
        if b"host" not in headers or len(headers) < len(self.headers):
            self._require_one_host()
        if b"x-forwarded-for" in headers or b"x-forwarded-proto" in headers:
            self._read_forwarded()
        if self._due is not None and not self._ends:
            self._due += self.REQUEST_SECONDS - self.HEAD_SECONDS
        super().on_headers_complete()
        if self._ends and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._repeats:  # only the headers are complete: they are parsed again
            return
        self._due = None
        super().on_message_complete()
        self.headers = []  # the next request may be refused before it has its own

    # Limits

    def _count(self) -> None:
        """Count the connection for its client, unless a trusted proxy shares it among clients."""
        if self.client is not None and not self._is_trusted(self.client[0]):
            self._counted = client_key(self.client[0])
            self.clients[self._counted] += 1

    def _stop_counting(self) -> None:
        if self._counted is not None:
            self.clients[self._counted] -= 1
            if not self.clients[self._counted]:
                del self.clients[self._counted]
            self._counted = None

    def _is_trusted(self, peer: str) -> bool:
        return peer in getattr(self.app, "trusted_hosts", ())

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _too_large(self) -> Refused:
        return Refused(431, f"the headers are larger than {self.HEAD_BYTES} bytes")

    def _check_time(self) -> None:
        """Refuse a late request. Each connection has one timer, so requests need none."""
        now = self.loop.time()
        if self._write_due is None and self.transport.is_closing():
            self._write_due = now + self.REQUEST_SECONDS
        due = self._write_due
        if due is None and not self.flow.read_paused:  # or the app is late, not the client
            due = self._due
        if due is None or now < due:
            self._timer = self.loop.call_at(due or now + self.HEAD_SECONDS, self._check_time)
        elif self._unread == 0 and (self.cycle is None or self.cycle.response_complete):
            self.transport.abort()  # nothing was asked: some clients connect before they need it
        elif self._write_due is None:
            self._refuse(Refused(408, "the request did not arrive in time"))
        else:
            self._refuse(Refused(408, "the response was not read in time"))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_due = self.loop.time() + self.REQUEST_SECONDS

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_due = None

    def shutdown(self) -> None:
        """Hang up after the current request, or after the one that a proxy may be sending.

        A proxy does not repeat a POST if its idle connection is closed just then, because it cannot
        know whether it was read.
        """
        self._ends = True
        if self._from_proxy and (self.cycle is None or self.cycle.response_complete):
            self._due = self._due or math.inf
        else:
            super().shutdown()
        if self._due is not None and self._refusal is None:
            self._stop_timer()
            self._due = min(self._due, self.loop.time() + self.SEND_SECONDS_AT_SHUTDOWN)
            self._timer = self.loop.call_at(self._due, self._check_time)

    # Answers

    def _refuse(self, refusal: Refused) -> None:
        """Answer and hang up; if another answer is on its way, hang up after it."""
        self._refusal = refusal
        self._stop_timer()
        request_id = read_request_id(self.headers or ())
        log.warning(
            "request refused",
            status=refusal.status,
            error=refusal.detail,
            client=client_key(self.client[0]) if self.client else None,
            request_id=request_id,
        )
        cycle = self.cycle
        if self.transport.is_closing():
            self.transport.abort()
            return
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body and not self.flow.write_paused:
                cycle.keep_alive = False  # an earlier request, which is complete
                self._due = None
                self._check_time()  # the client has yet to read the answer
                return
            cycle.disconnected = True  # whatever the app still answers is dropped
            if cycle.response_started or self.pipeline:
                self.transport.abort()
                return
        self._answer(refusal, request_id)
        if refusal.status != 408 and self.transport.can_write_eof():
            self.transport.write_eof()
            self._timer = self.loop.call_later(self.LINGER_SECONDS, self.transport.abort)
        else:
            self.transport.close()

    def _refuse_connection(self, refusal: Refused, limit: int) -> None:
        self._refusal = refusal
        now = self.loop.time()
        if now > self.warned_at.get(refusal.status, -math.inf) + WARNING_SECONDS:
            self.warned_at[refusal.status] = now
            client = client_key(self.client[0]) if self.client else None
            log.warning(refusal.detail, limit=limit, client=client)
        self._answer(refusal, read_request_id(()))
        self.transport.close()

    def _answer(self, refusal: Refused, request_id: str) -> None:
        body = json.dumps({"detail": refusal.detail}, separators=(",", ":")).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *SAFE_HEADERS.items(),
            NO_STORE,
            (ID_HEADER, request_id.encode()),
            (b"connection", b"close"),
        ]
        if refusal.status in {429, 503}:
            headers.append((b"retry-after", b"%d" % RETRY_AFTER_SECONDS))
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[refusal.status], lines, body))

    # Upgrade: only to WebSockets, and only where the app has a route for them

    def _choose_protocol(self) -> None:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise Refused(400, "CONNECT is for proxies")
        self._upgrades = (
            method == b"GET"
            and super()._should_upgrade()
            and has_websocket(self.app, unquote(httptools.parse_url(self.url).path.decode()))
        )
        self._repeats = not self._upgrades

    def _should_upgrade(self) -> bool:
        return self._upgrades

    def _repeat_without_upgrade(self) -> None:
        """Parse the headers again: after an upgrade, the parser does not expect a body."""
        self._repeats = False
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def _require_one_host(self) -> None:
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and self.parser.get_http_version() != "1.0"):
            raise Refused(400, "the request must have one Host header")

    # Proxies

    def _read_forwarded(self) -> None:
        """Prepare what uvicorn reads from trusted proxies. Warn of one that is not trusted."""
        peer = self.client[0] if self.client else ""
        if not self._is_trusted(peer):
            if peer not in self.warned_peers and len(self.warned_peers) < MAX_WARNED_PEERS:
                self.warned_peers.add(peer)
                log.warning(
                    "X-Forwarded headers ignored",
                    peer=peer,
                    advice=f"if this is your proxy, add {peer} to FORWARDED_ALLOW_IPS",
                )
            return
        self._from_proxy = True
        schemes = [value for name, value in self.headers if name == b"x-forwarded-proto"]
        if len(schemes) > 1 or (schemes and b"," in schemes[0]):
            # The first is the client's. uvicorn reads the last header, and takes no list.
            self.headers.append((b"x-forwarded-proto", schemes[0].partition(b",")[0].strip()))


@cache
def max_connections() -> int:
    """Return MAX_CONNECTIONS, or fewer if this process may not open as many files."""
    if sys.platform == "win32":
        return MAX_CONNECTIONS
    import resource  # noqa: PLC0415  (not on Windows)

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(files - SPARE_FILES, 1))


def has_websocket(app: Any, path: str) -> bool:
    """Return whether an app has a WebSocket route at a path; True if that cannot be known.

    path: with or without ROOT_PATH: some proxies remove it, others do not.
    """
    while not isinstance(app, Starlette):
        if not hasattr(app, "app"):
            return True
        app = app.app  # uvicorn's middleware
    root_path = get_settings().root_path
    scope = {"type": "websocket", "path": path, "root_path": root_path, "headers": []}
    return any(
        getattr(route, "routes", [route])  # files that are mounted have no routes
        and route.matches(scope)[0] is Match.FULL
        for route in app.routes
    )
