"""The clients: wrk, which sends prepared requests, each client its next when it has its answer."""

import json
import resource
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from .processes import BenchError, run

SCRIPT = Path(__file__).parent / "load.lua"
SILENCE_SECONDS = 5  # without any answer: none will come any more. Our slowest is a 503 after 4
GRACE_SECONDS = 20  # for the last answers, if some of them come all the time
LATE_SECONDS = 60  # wrk leaves slower answers out of its percentiles: none is so slow
FILES = 4096  # that a program may have open: a socket for each client, and then some
INSTALL = "sudo apt-get install wrk (Debian, Ubuntu), brew install wrk (macOS)"


@dataclass(frozen=True)
class Health:
    """What someone saw who asked the app for its health meanwhile. Times are in milliseconds."""

    asked: int
    failed: int  # got no answer, or not a 200
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True)
class Run:
    """What the clients saw. Times are in milliseconds, of all answers, whatever their status."""

    seconds: float
    sent: int
    answered: int
    in_time: int  # answers 2xx within `seconds`
    statuses: dict[str, int]
    broken: int  # connections that were refused or lost
    p50_ms: float
    p99_ms: float
    max_ms: float
    refused: int = 0  # answers 503 with Retry-After: the app is busy, and says so
    took: float = 0  # seconds, from the first request to the last answer
    cpu_seconds: float = 0  # of the app's process, since the first request
    health: Health | None = None  # asked on a connection that is there already
    probe: Health | None = None  # asked on a new connection each time

    @property
    def cpu_us(self) -> float:
        """Microseconds of processor time for each answer: what a busy machine changes least."""
        return 1e6 * self.cpu_seconds / self.answered if self.answered else 0

    @property
    def rate(self) -> float:
        """2xx a second."""
        return self.in_time / self.seconds

    @property
    def throughput(self) -> float:
        """2xx a second until the last answer, for crowds that are still served after `seconds`."""
        return self.succeeded / self.took if self.took else 0

    @property
    def succeeded(self) -> int:
        return sum(count for status, count in self.statuses.items() if status.startswith("2"))

    @property
    def unanswered(self) -> int:
        return self.sent - self.answered

    @property
    def failed(self) -> int:
        """Requests that got neither a 2xx, nor a 503 that says when to come back."""
        return self.sent - self.succeeded - self.refused


def prepare(method: str, path: str, token: str, body: object = None) -> bytes:
    """Return a request as it goes over the wire. body: sent as JSON."""
    head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}"]
    if body is None:
        return with_body(head, b"")
    return with_body([*head, "Content-Type: application/json"], json.dumps(body).encode())


def prepare_form(path: str, **fields: str) -> bytes:
    """Return a form as a browser posts it."""
    head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1"]
    head.append("Content-Type: application/x-www-form-urlencoded")
    return with_body(head, urlencode(fields).encode())


def with_body(head: Sequence[str], content: bytes) -> bytes:
    length = [f"Content-Length: {len(content)}"] if content else []
    return "\r\n".join([*head, *length, "", ""]).encode() + content


def require_wrk() -> str:
    """Return wrk's path; and allow sockets enough. Raises BenchError."""
    program = shutil.which("wrk")
    if program is None:
        raise BenchError(f"wrk, which plays the clients, is not installed: {INSTALL}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
        except ValueError:
            raise BenchError(f"{FILES} open files are needed, allowed are {hard}") from None
    return program


def send(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Run:
    """Have so many clients send requests, in their order and then from the start again.

    After `seconds` they wait for the last answers, until none has come for SILENCE_SECONDS.
    """
    with tempfile.NamedTemporaryFile(prefix="bench-requests-") as file:
        file.write(b"\0".join(requests))
        file.flush()
        output = run(
            require_wrk(),
            "--threads=1",  # far from busy; a second one would take a core from the app
            f"--connections={clients}",
            f"--duration={round(seconds + GRACE_SECONDS)}",
            f"--timeout={LATE_SECONDS}",
            f"--script={SCRIPT}",
            f"http://127.0.0.1:{port}",
            "--",
            str(seconds),
            file.name,
            cwd=SCRIPT.parent,
            seconds=seconds + GRACE_SECONDS + 30,
            silence=SILENCE_SECONDS,
            since=seconds,
        )
    return Run(seconds=seconds, **json.loads(output.strip().splitlines()[-1]))
