"""Connecting to a database: retries while it wakes up, and a time limit for every wait."""

import math
import random
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from threading import Thread
from typing import Any

import psycopg2

from postgres.explain import explain
from postgres.findings import Retry
from postgres.url import DatabaseUrl

STEP_SECONDS = 3.0  # for a DNS lookup, for a TCP connection, for an answer about TLS
LOG_IN_SECONDS = 8.0  # for one attempt: most computes have woken up by then
TOTAL_SECONDS = 30.0  # for all attempts of all steps
# The kernel notices within about 15 seconds that the other end has vanished.
TCP_OPTIONS: dict[str, Any] = {
    "keepalives_idle": 10,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
# The longest pauses before each further attempt, in seconds; pause_before() shortens them.
PAUSES: dict[Retry, tuple[float, ...]] = {
    Retry.NO: (),
    Retry.ONCE: (1.0,),
    Retry.ONCE_SLOWLY: (4.0,),
    Retry.YES: (0.25, 0.5, 1.0, 2.0, 4.0),
    Retry.WITH_JITTER: (0.25, 0.5, 1.0, 2.0, 4.0),
    Retry.BACK_OFF: (4.0, 8.0),
}

type OnWait = Callable[[float], None]
type Address = tuple[socket.AddressFamily, tuple[Any, ...] | str]
Connection = psycopg2.extensions.connection


def pause_before(retry: int, policy: Retry) -> float | None:
    """Return the seconds to wait before a retry, the first being 1. None: do not retry."""
    pauses = PAUSES[policy]
    if retry > len(pauses):
        return None
    # Jitter, so that clients that were turned away together do not come back together.
    return pauses[retry - 1] * random.uniform(0.5, 1.0)  # noqa: S311


class TimeBudget:
    """The seconds that work on a database may take, all steps and retries included.

    on_wait: called once a second with the seconds that have passed.
    """

    def __init__(self, url: DatabaseUrl, on_wait: OnWait, seconds: float) -> None:
        self.url = url
        self._on_wait = on_wait
        self._start = time.monotonic()
        self._end = self._start + seconds

    @property
    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)

    def run[T](self, work: Callable[[], T], seconds: float) -> T:
        """Do work that may block for ever. Raises its errors, and TimeoutError after `seconds`.

        The work runs in a thread of its own: nothing else could interrupt the wait, not even
        Ctrl-C.
        """
        answer: Future[T] = Future()

        def run_work() -> None:
            try:
                answer.set_result(work())
            except BaseException as error:  # noqa: BLE001  (raised again by answer.result())
                answer.set_exception(error)

        Thread(target=run_work, daemon=True).start()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if wait([answer], timeout=min(left, 1.0)).done:
                return answer.result()
            self._on_wait(time.monotonic() - self._start)
        raise TimeoutError(f"no answer within {seconds:.0f} s")

    def retry[T](self, work: Callable[[], T], seconds: float) -> T:
        """Do work, and repeat it while its errors suggest so. Raises the last error.

        seconds: for one attempt.
        """
        retries = 0
        while True:
            try:
                return self.run(work, min(seconds, self.left))
            except (OSError, psycopg2.Error) as error:
                retries += 1
                pause = pause_before(retries, explain(error, self.url).retry)
                if pause is None or pause > self.left:
                    raise
            self._sleep(pause)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            self._on_wait(time.monotonic() - self._start)


def log_in(url: DatabaseUrl, budget: TimeBudget | None = None, **parameters: Any) -> Connection:
    """Return a psycopg2 connection. Waits for a compute that wakes up.

    budget: TOTAL_SECONDS if None. parameters: libpq's, which override those in the URL.
    Raises psycopg2.Error or TimeoutError.
    """
    budget = budget or TimeBudget(url, lambda _seconds: None, TOTAL_SECONDS)
    defaults = {name: value for name, value in TCP_OPTIONS.items() if name not in dict(url.options)}

    def connect() -> Connection:
        # libpq counts in whole seconds, at least 2. Its own error says more than a TimeoutError.
        seconds = max(math.floor(min(LOG_IN_SECONDS, budget.left)), 2)
        settings = {**defaults, **parameters, "connect_timeout": seconds}
        connection: Connection = psycopg2.connect(url.for_libpq(), **settings)
        return connection

    return budget.retry(connect, budget.left)  # libpq applies connect_timeout to each address


def abort(connection: Connection) -> None:
    """Cut off a connection. A call that waits for it, in any thread, raises an error at once."""
    with suppress(OSError, ValueError, psycopg2.Error):  # another thread may just have closed it
        stream = socket.socket(fileno=connection.fileno())
        try:
            stream.shutdown(socket.SHUT_RDWR)
        finally:
            stream.detach()  # the descriptor is psycopg2's to close


def resolve(url: DatabaseUrl) -> list[Address]:
    """Return the addresses of the host, in the order in which libpq tries them. Raises OSError."""
    if url.host.startswith("/"):
        return [(socket.AF_UNIX, f"{url.host}/.s.PGSQL.{url.port}")]
    host = dict(url.options).get("hostaddr", url.host)
    try:
        found = socket.getaddrinfo(host, url.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a part of the name is too long
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from None
    return [(family, address) for family, _, _, _, address in found]


def open_socket(addresses: Sequence[Address]) -> tuple[socket.socket, Address]:
    """Connect to the first address that answers. Raises OSError."""
    errors = []
    for family, address in addresses:
        stream = socket.socket(family, socket.SOCK_STREAM)
        stream.settimeout(STEP_SECONDS)
        try:
            stream.connect(address)
        except OSError as error:
            stream.close()
            errors.append(error)
        else:
            return stream, (family, address)
    raise errors[0]


def reach(url: DatabaseUrl) -> None:
    """Raise OSError if nothing answers."""
    stream, _ = open_socket(resolve(url))
    stream.close()
