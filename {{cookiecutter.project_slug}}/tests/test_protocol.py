"""What the server refuses before the app sees it: on real connections, with short limits."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles
from structlog.testing import capture_logs
from websockets.sync.client import connect

from config import get_settings
from server import protocol, shutdown
from server.protocol import LimitedProtocol
from server.shutdown import Server

LARGE = 10_000_000
LONG = 5.0  # more than any limit here, and only waited for when a test fails
HANDSHAKE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
COMPLETE = "GET /where HTTP/1.1\r\nHost: x\r\n\r\n"

app = FastAPI()
app.mount("/files", StaticFiles(directory=Path(__file__).parent))
disconnected = threading.Event()


@app.get("/where")
async def where(request: Request) -> list[str]:
    assert request.client is not None
    return [request.url.scheme, request.client.host]


@app.post("/length")
async def length(request: Request) -> int:
    try:
        return len(await request.body())
    except Exception:
        disconnected.set()
        raise


@app.post("/later")
async def later(request: Request) -> int:
    await asyncio.sleep(1)
    return len(await request.body())


@app.post("/deaf")
async def deaf() -> str:
    return "the body is not read"


@app.get("/busy")
async def busy() -> str:
    time.sleep(0.3)  # noqa: ASYNC251  (the event loop does nothing else meanwhile)
    return "served"


@app.get("/endless")
async def endless() -> StreamingResponse:
    async def zeros() -> AsyncIterator[bytes]:
        while True:
            yield bytes(100_000)
            await asyncio.sleep(0)

    return StreamingResponse(zeros())


@app.get("/large")
async def large() -> Response:
    return Response(bytes(LARGE))


@app.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(await websocket.receive_text())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Served:
    """The server, in a thread."""

    def __init__(self, server: uvicorn.Server, thread: threading.Thread, port: int) -> None:
        self.server = server
        self.thread = thread
        self.port = port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONG)

    def send(self, *parts: str | bytes) -> str:
        """Send something. Returns all that comes until the server hangs up."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part.encode() if isinstance(part, str) else part)
            return everything(connection)

    def wait_until_idle(self) -> None:
        state = self.server.server_state
        wait_until(lambda: not (state.connections or state.tasks))

    def ask(self, *requests: str | bytes) -> str:
        """Send requests that the server answers without hanging up. Returns the answers."""
        answers = self.send(*requests, COMPLETE.replace("Host", "Connection: close\r\nHost"))
        return answers.rpartition("HTTP/1.1 200 ")[0]


def everything(connection: socket.socket) -> str:
    return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()


def exchange(connection: socket.socket, request: str) -> str:
    """Send a request. Returns the answer, after which the connection stays open."""
    connection.sendall(request.encode())
    answer = ""
    while "\r\n\r\n" not in answer or not bodies(answer)[0]:
        part = connection.recv(65_536)
        assert part
        answer += part.decode()
    return answer


def bodies(answers: str) -> list[str]:
    """Return the bodies of responses that came one after the other."""
    found = []
    while answers:
        head, _, rest = answers.partition("\r\n\r\n")
        size = int(re.findall(r"content-length: (\d+)", head)[0])
        found.append(rest[:size])
        answers = rest[size:]
    return found


def trickle(connection: socket.socket, first: bytes, then: bytes) -> None:
    connection.sendall(first)
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        time.sleep(0.02)
        connection.sendall(then)


def post(path: str, *headers: str) -> str:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *headers, "", ""])


def start(sockets: list[socket.socket] | None = None) -> Served:
    config = uvicorn.Config(
        app,
        port=0,
        http=LimitedProtocol,
        log_config=None,
        lifespan="off",
        forwarded_allow_ips="127.0.0.1, 10.0.0.0/8",
    )
    server = Server(config)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return Served(server, thread, server.servers[0].sockets[0].getsockname()[1])


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    served = start()
    yield served
    served.server.should_exit = True
    served.thread.join()


@pytest.fixture
def served(running: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr(LimitedProtocol, "LINGER_SECONDS", 0.2)
    monkeypatch.setattr(LimitedProtocol, "warned_peers", set())
    monkeypatch.setattr(LimitedProtocol, "warned_at", {})
    disconnected.clear()
    running.wait_until_idle()  # the last test's connections count too
    return running


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can wait for."""
    monkeypatch.setattr(LimitedProtocol, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(LimitedProtocol, "REQUEST_SECONDS", 0.6)


def test_headers_up_to_the_limit_are_read(served: Served) -> None:
    headers = f"X: {'x' * (LimitedProtocol.HEAD_BYTES - 100)}"

    answer = served.ask(f"GET /where HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n")

    assert answer.startswith("HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "parts",
    [
        ("GET /where HTTP/1.1\r\nHost: x\r\n", "X: ", "x" * 66_000, "\r\n\r\n"),
        ("GET /where HTTP/1.1\r\nHost: x\r\n", "X: x\r\n" * 12_000, "\r\n"),
        (f"GET /{'x' * 66_000} HTTP/1.1\r\nHost: x\r\n\r\n",),
        ("GET /where HTTP/1.1\r\nHost: x\r\n", "X: ", *["x" * 100_000] * 3),
        ("GET /where HTTP/1.1\r\nHost: x\r\n", *["X: x\r\n" * 10_000] * 9),
        ("GET /", *["x" * 100_000] * 3),
        (post("/length", "Transfer-Encoding: chunked"), "0\r\nX: ", *["x" * 100_000] * 9),
        (post("/length", "Transfer-Encoding: chunked"), "1;x=", *["x" * 100_000] * 9),
    ],
    ids=[
        "one header",
        "many headers",
        "path",
        "unfinished header",
        "unfinished headers",
        "unfinished path",
        "trailer",
        "chunk extension",
    ],
)
def test_larger_headers_are_refused(served: Served, parts: tuple[str, ...]) -> None:
    with capture_logs() as log:
        answer = served.send(*parts)

    assert answer.startswith("HTTP/1.1 431 ")
    assert bodies(answer) == ['{"detail":"the headers are larger than 65536 bytes"}']
    assert [(line["event"], line["status"], line["client"]) for line in log] == [
        ("request refused", 431, "127.0.0.1")
    ]


def test_headers_in_small_pieces_are_refused_too(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /where HTTP/1.1\r\nHost: x\r\nX: ")
        for _ in range(7):
            connection.sendall(b"x" * 10_000)
            time.sleep(0.02)  # so that they arrive one by one

        assert everything(connection).startswith("HTTP/1.1 431 ")


@pytest.mark.parametrize("end", ["\r\n\r\n", "x" * 16_384], ids=["finished", "unfinished"])
def test_larger_headers_of_the_next_request_are_refused(served: Served, end: str) -> None:
    with capture_logs() as log:
        answer = served.send(f"{COMPLETE}GET /where HTTP/1.1\r\nHost: x\r\nX: {'x' * 66_000}{end}")

    # If the first response is not complete yet, the connection is closed after it.
    assert re.findall(r"HTTP/1.1 (\d+)", answer) in (["200"], ["200", "431"])
    assert [line["status"] for line in log] == [431]


def test_the_headers_of_several_requests_are_not_added_up(served: Served) -> None:
    request = COMPLETE.replace("Host", f"X: {'x' * 10_000}\r\nHost")

    with served.connect() as connection:
        for _ in range(8):
            assert exchange(connection, request).startswith("HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_",
    [
        "GET /where HTTP/1.1\r\n\r\n",
        "GET /where HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET where HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://[::1/where HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /where?q=\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /where HTTP/1.1\r\nHost: x\r\nX : x\r\n\r\n",
        "GET /where HTTP/1.1\r\nHost: x\r\nX: x\r\n x\r\n\r\n",
        "BREW /where HTTP/1.1\r\nHost: x\r\n\r\n",
        "CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        "CONNECT /where HTTP/1.1\r\nHost: x\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        post("/length", "Content-Length: 2", "Content-Length: 3") + "{}",
        post("/length", "Content-Length: x") + "{}",
        post("/length", "Content-Length: -1") + "{}",
        post("/length", "Content-Length: 99999999999999999999") + "{}",
        post("/length", "Content-Length: 2", "Transfer-Encoding: chunked") + "0\r\n\r\n",
        post("/length", "Transfer-Encoding: gzip") + "x",
        post("/length", "Transfer-Encoding: chunked") + "zz\r\n",
    ],
)
def test_what_is_not_http_is_a_400(served: Served, request_: str | bytes) -> None:
    answer = served.send(request_)

    assert answer.startswith("HTTP/1.1 400 ")
    assert answer.count("HTTP/1.1") == 1
    assert json.loads(bodies(answer)[0]).keys() == {"detail"}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET http://y/where HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        ("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        ("GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (f"GET /{'x' * 60_000} HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        ('GET /where HTTP/1.1\r\nHost: a b/"<>\r\n\r\n', 200),
    ],
)
def test_odd_requests_are_answered(served: Served, request_: str, status: int) -> None:
    assert served.ask(request_).startswith(f"HTTP/1.1 {status} ")


@pytest.mark.usefixtures("short")
def test_refusals_have_the_headers_that_every_response_has(served: Served) -> None:
    with capture_logs() as log:
        with served.connect() as connection:
            exchange(connection, COMPLETE.replace("Host", "X-Request-ID: first\r\nHost"))
            connection.sendall(b"\r\n")  # no request follows
            own_id = everything(connection)
        sent_id = served.send(COMPLETE.replace("Host: x", "X-Request-ID: second"))

    for refusal in (own_id, sent_id):
        assert "\r\nx-content-type-options: nosniff\r\n" in refusal
        assert "\r\nreferrer-policy: no-referrer\r\n" in refusal
        assert "\r\ncache-control: no-store\r\n" in refusal
    ids = [re.findall(r"x-request-id: (\S+)", refusal)[0] for refusal in (own_id, sent_id)]
    assert ids[1] == "second"
    assert re.fullmatch("[0-9a-f]{32}", ids[0])
    assert [line["request_id"] for line in log] == ids


def test_http_1_0_needs_no_host(served: Served) -> None:
    assert served.send("GET /where HTTP/1.0\r\n\r\n").startswith("HTTP/1.1 200 ")


def test_bodies_and_many_requests_have_no_such_limit(served: Served) -> None:
    body = "x" * 300_000
    sized = post("/length", f"Content-Length: {len(body)}") + body
    chunked = post("/length", "Transfer-Encoding: chunked")
    chunked += "".join(f"3e8\r\n{body[:1000]}\r\n" for _ in range(300)) + "0\r\n\r\n"
    many = COMPLETE * 500

    answers = bodies(served.ask(sized, chunked, many, chunked))

    assert answers == ["300000", "300000", *['["http","127.0.0.1"]'] * 500, "300000"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("first", "count"), [("", 1), (COMPLETE, 2)], ids=["new connection", "kept connection"]
)
def test_headers_that_are_late_get_a_408(served: Served, first: str, count: int) -> None:
    with served.connect() as connection, capture_logs() as log:
        connection.sendall(first.encode() + b"GET /where HTTP/1.1\r\nHost:")
        time.sleep(0.05)
        connection.sendall(b" x")  # a byte now and then does not help
        answer = everything(connection)

    assert answer.count("HTTP/1.1 ") == count
    assert bodies(answer)[-1] == '{"detail":"the request did not arrive in time"}'
    assert [line["status"] for line in log] == [408]


@pytest.mark.usefixtures("short")
def test_headers_that_begin_with_the_last_request_are_late_too(served: Served) -> None:
    answer = served.send(COMPLETE + "GET /where HTTP/1.1\r\nHost:")

    assert re.findall(r"HTTP/1.1 (\d+)", answer) == ["200", "408"]


@pytest.mark.usefixtures("short")
def test_silent_connections_are_closed(served: Served) -> None:
    with capture_logs() as log:
        assert served.send() == ""
        with served.connect() as connection:
            exchange(connection, COMPLETE)
            connection.sendall(b"\r\n")
            everything(connection)

    assert [line["status"] for line in log] == [408]  # the blank line began a request


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("upgrade", ["", HANDSHAKE, H2C], ids=["plain", "websocket", "h2c"])
def test_a_body_that_is_late_gets_a_408_and_ends_the_route(served: Served, upgrade: str) -> None:
    disconnected.clear()

    answer = served.send(post("/length", f"{upgrade}Content-Length: 9"), "half")

    assert answer.startswith("HTTP/1.1 408 ")
    assert answer.count("HTTP/1.1 ") == 1
    assert disconnected.wait(LONG)


@pytest.mark.usefixtures("short")
def test_a_body_that_the_route_reads_late_is_not_the_clients_fault(served: Served) -> None:
    body = "x" * 1_000_000

    answer = served.ask(post("/later", f"Content-Length: {len(body)}") + body)

    assert bodies(answer) == ["1000000"]


@pytest.mark.usefixtures("short")
def test_a_body_that_nobody_waits_for_has_the_same_limit(served: Served) -> None:
    request = post("/deaf", "Transfer-Encoding: chunked").encode()

    with served.connect() as connection, pytest.raises(OSError, match=r"Broken pipe|reset"):
        trickle(connection, request, b"1\r\nx\r\n")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("requests", [1, 3])
def test_a_client_that_does_not_read_is_dropped(served: Served, requests: int) -> None:
    endless = COMPLETE.replace("where", "endless").encode()

    with served.connect() as connection:
        connection.sendall(endless)
        time.sleep(0.1)
        connection.sendall(endless * (requests - 1))
        served.wait_until_idle()


@pytest.mark.usefixtures("short")
def test_a_client_that_reads_slowly_is_not_dropped(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LimitedProtocol, "REQUEST_SECONDS", 2.0)  # which a busy machine can keep
    with served.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        connection.sendall(COMPLETE.replace("where", "endless").encode())
        end = time.monotonic() + 4  # what the kernel holds is read after the limit, too
        while time.monotonic() < end:
            assert connection.recv(500_000)
            time.sleep(0.02)


@pytest.mark.usefixtures("short")
def test_a_kept_connection_stays_open_after_a_slow_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LimitedProtocol, "REQUEST_SECONDS", 2.0)
    with served.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        connection.sendall(COMPLETE.replace("where", "large").encode())
        time.sleep(0.1)  # the server has to wait meanwhile
        read = 0
        while read < LARGE:
            part = connection.recv(100_000)
            assert part
            read += len(part)
        time.sleep(2.5)

        assert "HTTP/1.1 200 " in exchange(connection, COMPLETE)


def test_half_a_body_does_not_hold_up_the_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LimitedProtocol, "SEND_SECONDS_AT_SHUTDOWN", 0.2)
    monkeypatch.setattr(LimitedProtocol, "LINGER_SECONDS", 0.2)
    served = start()
    with served.connect() as connection:
        connection.sendall((post("/length", "Content-Length: 9") + "half").encode())
        while not served.server.server_state.tasks:
            time.sleep(0.01)
        served.server.should_exit = True
        served.thread.join(LONG)

        assert not served.thread.is_alive()
        assert everything(connection).startswith("HTTP/1.1 408 ")


FROM_PROXY = COMPLETE.replace("Host", "X-Forwarded-For: 192.0.2.1\r\nHost")


def test_at_shutdown_a_proxy_may_send_one_more_request_on_each_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LimitedProtocol, "SEND_SECONDS_AT_SHUTDOWN", 1.0)
    served = start()
    with served.connect() as used, served.connect() as idle, served.connect() as browsers:
        for connection, request in ((used, FROM_PROXY), (idle, FROM_PROXY), (browsers, COMPLETE)):
            exchange(connection, request)
        served.server.should_exit = True
        assert everything(browsers) == ""
        assert served.thread.is_alive()
        used.sendall(FROM_PROXY.encode())
        answer = everything(used)
        served.thread.join(LONG)

        assert not served.thread.is_alive()
        assert answer.startswith("HTTP/1.1 200 ")
        assert "connection: close" in answer
        assert everything(idle) == ""


def is_refused(served: Served) -> bool:
    try:
        served.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def test_at_shutdown_connections_that_are_not_accepted_yet_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutdown, "ARRIVAL_SECONDS", 1.0)
    monkeypatch.setattr(LimitedProtocol, "SEND_SECONDS_AT_SHUTDOWN", 0.2)
    served = start()
    with ExitStack() as stack:
        busy = stack.enter_context(served.connect())
        busy.sendall(COMPLETE.replace("where", "busy").encode())
        wait_until(lambda: bool(served.server.server_state.tasks))
        served.server.should_exit = True
        connections = [stack.enter_context(served.connect()) for _ in range(20)]
        wait_until(lambda: is_refused(served))
        for connection in connections:
            connection.sendall(FROM_PROXY.encode())

        answers = [everything(connection) for connection in connections]
        served.thread.join(LONG)

    assert [answer[:13] for answer in answers] == ["HTTP/1.1 200 "] * len(connections)
    assert not served.thread.is_alive()


@pytest.mark.usefixtures("short")
def test_a_refused_client_has_to_read_what_came_before(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(COMPLETE.replace("where", "endless").encode())
        connection.sendall(b"GET nowhere HTTP/1.1\r\n\r\n")
        assert connection.recv(1000)

        served.wait_until_idle()


def test_a_complete_request_is_answered_before_the_one_that_is_refused(served: Served) -> None:
    answers = served.send(COMPLETE, COMPLETE, "GET nowhere HTTP/1.1\r\n\r\n")

    assert answers.count("HTTP/1.1 200 ") == 2


def test_more_connections_than_the_limit_are_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "max_connections", lambda: 2)
    with capture_logs() as log, served.connect() as first, served.connect():
        exchange(first, COMPLETE)

        refused = [served.send() for _ in range(3)]

        assert exchange(first, COMPLETE).startswith("HTTP/1.1 200 ")
        assert [answer[:13] for answer in refused] == ["HTTP/1.1 503 "] * 3
        assert all("retry-after: 2" in answer for answer in refused)
    assert [(line["event"], line["limit"]) for line in log] == [("too many connections", 2)]


@pytest.fixture
def without_proxy(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is not trusted as a proxy."""
    monkeypatch.setattr(served.server.config.loaded_app, "trusted_hosts", {"10.0.0.1"})


@pytest.mark.usefixtures("without_proxy")
def test_a_client_may_have_a_quarter_of_the_connections(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "max_connections", lambda: 8)
    with capture_logs() as log, served.connect() as first:
        exchange(first, COMPLETE)
        with served.connect() as second:
            exchange(second, COMPLETE)
            refused = [served.send() for _ in range(3)]
            assert exchange(first, COMPLETE).startswith("HTTP/1.1 200 ")
        wait_until(lambda: LimitedProtocol.clients == {"127.0.0.1": 1})
        assert served.ask(COMPLETE).startswith("HTTP/1.1 200 ")

    assert [answer[:13] for answer in refused] == ["HTTP/1.1 429 "] * 3
    assert all("retry-after: 2" in answer for answer in refused)
    assert log == [
        {
            "event": "too many connections from this address",
            "limit": 2,
            "client": "127.0.0.1",
            "log_level": "warning",
        }
    ]


def test_a_trusted_proxy_may_have_all_connections(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "max_connections", lambda: 4)
    with served.connect(), served.connect(), served.connect():
        assert served.ask(COMPLETE).startswith("HTTP/1.1 200 ")


@pytest.mark.usefixtures("without_proxy")
def test_no_connection_stays_counted(served: Served) -> None:
    with connect(f"ws://127.0.0.1:{served.port}/echo") as websocket:
        websocket.send("hello")
        websocket.recv(LONG)
    served.ask(COMPLETE)

    wait_until(lambda: LimitedProtocol.clients == {})


def test_the_limit_of_connections_leaves_files_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (300, 300))

    assert protocol.max_connections.__wrapped__() == 300 - protocol.SPARE_FILES


@pytest.mark.parametrize(
    "headers", [HANDSHAKE, "Connection: Upgrade\r\nUpgrade: websocket\r\n", H2C]
)
@pytest.mark.parametrize(
    ("path", "status"), [("/where", 200), ("/files/__init__.py", 200), ("/nowhere", 404)]
)
def test_an_upgrade_of_a_plain_route_is_answered_as_http(
    served: Served, headers: str, path: str, status: int
) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"

    answers = served.ask(request, request, COMPLETE)

    assert re.findall(r"HTTP/1.1 (\d+)", answers) == [str(status), str(status), "200"]


def test_many_upgrades_at_once_are_answered(served: Served) -> None:
    request = f"GET /where HTTP/1.1\r\nHost: x\r\n{H2C}\r\n"

    assert len(bodies(served.ask(request * 1000))) == 1000


@pytest.mark.parametrize("headers", [HANDSHAKE, H2C])
def test_an_upgrade_does_not_lose_the_body(served: Served, headers: str) -> None:
    request = post("/length", headers.strip(), "Content-Length: 5")

    answers = bodies(served.ask(request + "12", "345", COMPLETE))

    assert answers == ["5", '["http","127.0.0.1"]']


@pytest.mark.usefixtures("short")
def test_a_websocket_route_works_and_has_no_time_limit(served: Served) -> None:
    with connect(f"ws://127.0.0.1:{served.port}/echo") as websocket:
        time.sleep(1)
        websocket.send("hello")

        assert websocket.recv(LONG) == "hello"


@pytest.mark.parametrize("path", ["/api/v1/echo", "/echo", "/ech%6f"])
def test_a_websocket_route_works_under_the_path_of_a_proxy(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    settings = get_settings().model_copy(update={"root_path": "/api/v1"})
    monkeypatch.setattr(protocol, "get_settings", lambda: settings)
    monkeypatch.setattr(app, "root_path", "/api/v1")  # which RequestLog does in the real app

    with connect(f"ws://127.0.0.1:{served.port}{path}") as websocket:
        websocket.send("hello")

        assert websocket.recv(LONG) == "hello"


@pytest.mark.parametrize(
    ("headers", "seen"),
    [
        (["X-Forwarded-For: 203.0.113.7"], ["http", "203.0.113.7"]),
        (["X-Forwarded-For: 1.2.3.4, 203.0.113.7, 10.1.1.1"], ["http", "203.0.113.7"]),
        (["X-Forwarded-For: 1.2.3.4, 203.0.113.7", "X-Forwarded-For: 10.1.1.1"],
         ["http", "203.0.113.7"]),
        (["X-Forwarded-For: 2001:db8::7"], ["http", "2001:db8::7"]),
        (["X-Forwarded-Proto: https"], ["https", "127.0.0.1"]),
        (["X-Forwarded-Proto: https, http"], ["https", "127.0.0.1"]),
        (["X-Forwarded-Proto: https", "X-Forwarded-Proto: http"], ["https", "127.0.0.1"]),
        (["X-Forwarded-Proto: javascript, https"], ["http", "127.0.0.1"]),
    ],
)  # fmt: skip
def test_trusted_proxies_say_who_the_client_is(
    served: Served, headers: list[str], seen: list[str]
) -> None:
    lines = "".join(f"{header}\r\n" for header in headers)

    with capture_logs() as log:
        answer = served.ask(f"GET /where HTTP/1.1\r\nHost: x\r\n{lines}\r\n")

    assert json.loads(bodies(answer)[0]) == seen
    assert log == []


def test_a_trailer_is_not_a_header(served: Served) -> None:
    head = "GET /where HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    answer = served.ask(f"{head}0\r\nX-Forwarded-For: 203.0.113.9\r\n\r\n")

    assert json.loads(bodies(answer)[0]) == ["http", "127.0.0.1"]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_an_ipv4_address_on_a_socket_for_both_kinds_is_one() -> None:
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    served = start([listener])

    answer = served.ask(COMPLETE)
    served.server.should_exit = True
    served.thread.join()

    assert bodies(answer) == ['["http","127.0.0.1"]']


@pytest.mark.usefixtures("without_proxy")
def test_a_proxy_that_is_not_trusted_is_logged_once(served: Served) -> None:
    request = "GET /where HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n"

    with capture_logs() as log:
        answers = bodies(served.ask(request, request))

    assert answers == ['["http","127.0.0.1"]'] * 2
    assert [(line["event"], line["peer"]) for line in log] == [
        ("X-Forwarded headers ignored", "127.0.0.1")
    ]
    assert "add 127.0.0.1 to FORWARDED_ALLOW_IPS" in log[0]["advice"]
