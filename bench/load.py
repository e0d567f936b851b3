"""Load generation with wrk. Each client sends its next request once the last one is answered."""

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
SILENCE_SECONDS = 5  # without any response: no more will come. Our slowest is a 503 after 4
GRACE_SECONDS = 20  # for the last responses, while they keep arriving
LATE_SECONDS = 60  # wrk omits slower responses from its percentiles; none is this slow
FILES = 4096  # open file limit: one socket per client, and some to spare
INSTALL = "sudo apt-get install wrk (Debian, Ubuntu), brew install wrk (macOS)"


@dataclass(frozen=True)
class Health:
    """Health checks made during a run. Times are in milliseconds."""

    asked: int
    failed: int  # no response, or not a 200
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True)
class Run:
    """What the clients saw. Times are in milliseconds, over responses of any status."""

    seconds: float
    sent: int
    answered: int
    in_time: int  # 2xx responses within `seconds`
    statuses: dict[str, int]
    broken: int  # connections that were refused or lost
    p50_ms: float
    p99_ms: float
    max_ms: float
    refused: int = 0  # 503 responses with Retry-After: the app says that it is busy
    took: float = 0  # seconds from the first request to the last response
    cpu_seconds: float = 0  # of the app's process, since the first request
    health: Health | None = None  # checked on a kept connection
    probe: Health | None = None  # checked on a new connection each time

    @property
    def cpu_us(self) -> float:
        """CPU time per response in microseconds: the figure that a busy machine affects least."""
        return 1e6 * self.cpu_seconds / self.answered if self.answered else 0

    @property
    def rate(self) -> float:
        """2xx responses per second."""
        return self.in_time / self.seconds

    @property
    def throughput(self) -> float:
        """2xx responses per second until the last one, for crowds still served after `seconds`."""
        return self.succeeded / self.took if self.took else 0

    @property
    def succeeded(self) -> int:
        return sum(count for status, count in self.statuses.items() if status.startswith("2"))

    @property
    def unanswered(self) -> int:
        return self.sent - self.answered

    @property
    def failed(self) -> int:
        """Requests that got neither a 2xx nor a 503 with Retry-After."""
        return self.sent - self.succeeded - self.refused


def prepare(method: str, path: str, token: str, body: object = None) -> bytes:
    """Return the raw bytes of a request. body: sent as JSON."""
    head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}"]
    if body is None:
        return with_body(head, b"")
    return with_body([*head, "Content-Type: application/json"], json.dumps(body).encode())


def prepare_form(path: str, address: str, **fields: str) -> bytes:
    """Return the raw bytes of a form post. address: of the client, as a proxy passes it on."""
    head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"X-Forwarded-For: {address}"]
    head.append("Content-Type: application/x-www-form-urlencoded")
    return with_body(head, urlencode(fields).encode())


def with_body(head: Sequence[str], content: bytes) -> bytes:
    length = [f"Content-Length: {len(content)}"] if content else []
    return "\r\n".join([*head, *length, "", ""]).encode() + content


def require_wrk() -> str:
    """Return wrk's path, and raise the open file limit. Raises BenchError."""
    program = shutil.which("wrk")
    if program is None:
        raise BenchError(f"the load generator wrk is not installed: {INSTALL}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
        except ValueError:
            raise BenchError(f"needs {FILES} open files, but the limit is {hard}") from None
    return program


def send(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Run:
    """Send the requests in a loop from `clients` connections.

    After `seconds`, wait for the last responses until none has come for SILENCE_SECONDS.
    """
    with tempfile.NamedTemporaryFile(prefix="bench-requests-") as file:
        file.write(b"\0".join(requests))
        file.flush()
        output = run(
            require_wrk(),
            "--threads=1",  # is far from busy; a second one would take a core from the app
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
