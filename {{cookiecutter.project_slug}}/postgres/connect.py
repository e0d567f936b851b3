"""The way to the database: patience where a compute wakes up, and an end to every wait."""

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

STEP_SECONDS = 3.0  # for a name, for a connection of the network, for an answer about TLS
LOG_IN_SECONDS = 8.0  # for one attempt: most computes have woken up by then
TOTAL_SECONDS = 30.0  # for all attempts at all of these
# A peer that vanished without a word is noticed by the kernel, within about 15 seconds.
TRANSPORT: dict[str, Any] = {
    "keepalives_idle": 10,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
# Seconds before each further attempt, at most: half of it, and a random part of the other half.
PAUSES: dict[Retry, tuple[float, ...]] = {
    Retry.NO: (),
    Retry.ONCE: (1.0,),
    Retry.ONCE_SLOWLY: (4.0,),
    Retry.YES: (1.0, 2.0, 4.0),
    Retry.WITH_JITTER: (1.0, 2.0, 4.0),
    Retry.BACK_OFF: (4.0, 8.0),
}

type OnWait = Callable[[float], None]
type Address = tuple[socket.AddressFamily, tuple[Any, ...] | str]
Connection = psycopg2.extensions.connection


class Patience:
    """Seconds to spend on a database, and somebody who is told, once a second, how many passed."""

    def __init__(self, url: DatabaseUrl, on_wait: OnWait, seconds: float) -> None:
        self.url = url
        self._on_wait = on_wait
        self._start = time.monotonic()
        self._end = self._start + seconds

    @property
    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)

    def run[T](self, work: Callable[[], T], seconds: float) -> T:
        """Do work that may block for ever. Raises what it raises, and TimeoutError after `seconds`.

        It is done in a thread of its own: otherwise nothing, Ctrl-C included, would end the wait.
        """
        answer: Future[T] = Future()

        def do() -> None:
            try:
                answer.set_result(work())
            except BaseException as error:  # noqa: BLE001  (it is raised where it is waited for)
                answer.set_exception(error)

        Thread(target=do, daemon=True).start()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if wait([answer], timeout=min(left, 1.0)).done:
                return answer.result()
            self._on_wait(time.monotonic() - self._start)
        raise TimeoutError(f"no answer within {seconds:.0f} s")

    def insist[T](self, work: Callable[[], T], seconds: float) -> T:
        """Do work, and again where its error says that this may help. Raises the last error.

        seconds: for one attempt.
        """
        attempts = 0
        while True:
            try:
                return self.run(work, min(seconds, self.left))
            except (OSError, psycopg2.Error) as error:
                pauses = PAUSES[explain(error, self.url).retry]
                if attempts >= len(pauses) or pauses[attempts] > self.left:
                    raise
            self._pause(pauses[attempts])
            attempts += 1

    def _pause(self, longest: float) -> None:
        # Jitter, so that those who were turned away together do not come back together.
        end = time.monotonic() + longest * random.uniform(0.5, 1.0)  # noqa: S311
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            self._on_wait(time.monotonic() - self._start)


def log_in(url: DatabaseUrl, patience: Patience | None = None, **parameters: Any) -> Connection:
    """Return a connection of psycopg2's, even where a compute has to wake up first.

    patience: TOTAL_SECONDS if None. parameters: libpq's, which go before those in the URL.
    Raises psycopg2.Error or TimeoutError.
    """
    patience = patience or Patience(url, lambda _seconds: None, TOTAL_SECONDS)
    options = {name: value for name, value in TRANSPORT.items() if name not in dict(url.options)}

    def connect() -> Connection:
        # libpq knows whole seconds, 2 at least. It may end first: it tells more.
        limit = max(math.floor(min(LOG_IN_SECONDS, patience.left)), 2)
        settings = {**options, **parameters, "connect_timeout": limit}
        connection: Connection = psycopg2.connect(url.for_libpq(), **settings)
        return connection

    return patience.insist(connect, patience.left)  # libpq has that limit for each address


def hang_up(connection: Connection) -> None:
    """End whatever a connection waits for, in another thread too: a call of it raises at once."""
    with suppress(OSError, ValueError, psycopg2.Error):  # another thread may just have closed it
        stream = socket.socket(fileno=connection.fileno())
        try:
            stream.shutdown(socket.SHUT_RDWR)
        finally:
            stream.detach()  # it is psycopg2 that closes it


def look_up(url: DatabaseUrl) -> list[Address]:
    """Return the addresses of the host, in the order in which libpq tries them. Raises OSError."""
    if url.host.startswith("/"):
        return [(socket.AF_UNIX, f"{url.host}/.s.PGSQL.{url.port}")]
    host = dict(url.options).get("hostaddr", url.host)
    try:
        found = socket.getaddrinfo(host, url.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a part of the name is too long
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from None
    return [(family, address) for family, _, _, _, address in found]


def dial(addresses: Sequence[Address]) -> tuple[socket.socket, Address]:
    """Open a connection of the network to the first address that answers. Raises OSError."""
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
    """Raise OSError where nothing answers."""
    dial(look_up(url))[0].close()
