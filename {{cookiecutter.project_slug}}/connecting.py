"""The way to the database: patience where a compute wakes up, and an end to every wait."""

import math
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

import psycopg2

from database_url import DatabaseUrl
from diagnosis import explain, told
from findings import Finding, Retry

STEP_SECONDS = 3.0  # for a name, for a connection of the network, for an answer about TLS
LOG_IN_SECONDS = 8.0  # for one attempt: most computes have woken up by then
TOTAL_SECONDS = 30.0  # for all attempts at all of these
QUERY_SECONDS = 10.0
OLDEST = 15  # the oldest PostgreSQL that this project runs on
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
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
    with suppress(OSError, psycopg2.Error):
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


@dataclass(frozen=True)
class Check:
    """One step on the way to the database. ok: None where it was not reached.

    advice: what to do, of a step that failed or could be better. finding: what was wrong.
    """

    name: str
    ok: bool | None
    detail: str
    advice: str = ""
    finding: Finding | None = None


STEPS = ("DNS", "TCP", "TLS", "log-in", "database", "endpoint", "schema")


class StepFailed(Exception):
    """A step failed, and no error of the database's tells why."""

    def __init__(self, finding: Finding, detail: str = "") -> None:
        super().__init__(detail or finding.cause)
        self.finding = finding


def check_connection(
    url: DatabaseUrl, history: Callable[[], Sequence[str]], on_wait: OnWait
) -> Iterator[Check]:
    """Go to the database step by step, and yield each of STEPS; after one that fails none is tried.

    history: returns the revisions that the code knows, the newest first. on_wait: is told once a
    second how many seconds have passed.
    """
    steps = walk(url, history, Patience(url, on_wait, TOTAL_SECONDS))
    failed = False
    for name in STEPS:
        if failed:
            yield Check(name, ok=None, detail="not reached")
            continue
        try:
            detail, advice = next(steps)
        except StepFailed as failure:
            failed, finding, detail = True, failure.finding, str(failure)
        except (OSError, psycopg2.Error) as error:
            failed, finding = True, explain(error, url)
            detail = finding.cause
        else:
            yield Check(name, ok=True, detail=detail, advice=advice)
            continue
        yield Check(name, ok=False, detail=detail, advice=finding.advice, finding=finding)


def walk(
    url: DatabaseUrl, history: Callable[[], Sequence[str]], patience: Patience
) -> Iterator[tuple[str, str]]:
    """Yield what each step found, and advice. Raises StepFailed, OSError or psycopg2.Error."""
    try:
        addresses = patience.insist(lambda: look_up(url), STEP_SECONDS)
    except TimeoutError as error:
        raise StepFailed(told("host-unknown", url, f"name server: {error}")) from None
    yield describe_addresses(url, addresses), ""

    start = time.monotonic()
    stream, (family, address) = patience.insist(lambda: dial(addresses), patience.left)
    stream.close()
    silent = addresses.index((family, address))
    others = f"; {silent} tried before it did not" * (silent > 0)
    yield f"{show_address(address)} answers after {milliseconds(start)}{others}", ""

    sslmode = dict(url.options).get("sslmode") or os.environ.get("PGSSLMODE") or "prefer"
    offered = patience.insist(lambda: offers_tls(url, family, address), STEP_SECONDS + 1)
    start = time.monotonic()
    # The address that has answered just now: libpq would begin with the first one again.
    place = {} if isinstance(address, str) else {"hostaddr": address[0]}
    try:
        connection = log_in(url, patience, **place)
    except (TimeoutError, psycopg2.Error) as error:
        finding = explain(error, url)
        if finding.step != "TLS":
            yield describe_tls(sslmode, offered=offered), ""
        if finding.step == "database":  # PostgreSQL looks for it when the log-in is done
            yield f"as {url.user}", ""
        raise
    version = connection.info.ssl_attribute("protocol") or ""
    tls = describe_tls(sslmode, offered=connection.info.ssl_in_use)
    yield ", ".join(filter(None, [tls, version])), ""
    yield f"as {url.user} in {milliseconds(start)}", ""

    try:
        connection.autocommit = True
        yield look_around(url, connection, patience), ""
        yield describe_endpoint(url)
        yield compare_schema(url, connection, history, patience), ""
    finally:
        connection.close()


def ask(connection: Connection, patience: Patience, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query. Raises psycopg2.Error or TimeoutError."""

    def execute() -> list[tuple[Any, ...]]:
        with closing(connection.cursor()) as cursor:
            cursor.execute(query)
            return cursor.fetchall()

    try:
        return patience.run(execute, QUERY_SECONDS)
    except TimeoutError:
        hang_up(connection)  # the other thread would keep it for itself
        raise


def look_around(url: DatabaseUrl, connection: Connection, patience: Patience) -> str:
    """Look for what stands in the way of using the database. Raises StepFailed."""
    ((version, read_only),) = ask(
        connection,
        patience,
        "SELECT current_setting('server_version'), current_setting('transaction_read_only')",
    )
    start = time.monotonic()
    ask(connection, patience, "SELECT 1")
    round_trip = milliseconds(start)
    number, _, _ = version.partition(" ")
    if connection.server_version < OLDEST * 10_000:
        raise StepFailed(told("server-too-old", url), f"PostgreSQL {number} is older than {OLDEST}")
    if read_only == "on":
        raise StepFailed(told("read-only", url))
    return f"{url.database}, PostgreSQL {number}, one round trip takes {round_trip}"


def compare_schema(
    url: DatabaseUrl,
    connection: Connection,
    history: Callable[[], Sequence[str]],
    patience: Patience,
) -> str:
    """Compare the database's revision with the code's. Raises StepFailed."""
    revisions: list[tuple[Any, ...]] = []
    if ask(connection, patience, "SELECT to_regclass('alembic_version')") != [(None,)]:
        revisions = ask(connection, patience, "SELECT version_num FROM alembic_version")
    revision = ", ".join(number for (number,) in revisions)
    try:
        known = history()
    except Exception as error:  # noqa: BLE001  (the files are code, and may raise anything)
        raise StepFailed(told("migrations-broken", url, str(error))) from None
    if revision and revision not in known:
        detail = f"the database is at {revision}, which the code does not know: the code is older"
        raise StepFailed(told("schema-ahead", url), detail)
    newest = known[0] if known else ""
    if revision != newest:
        detail = f"the database is at {revision or 'no revision'}, the code expects {newest}"
        raise StepFailed(told("schema-behind", url), detail)
    return f"at head, {revision}"


def offers_tls(url: DatabaseUrl, family: socket.AddressFamily, address: Any) -> bool:
    """Ask, the way libpq does: a server that is frozen does not even answer this.

    Raises OSError. What is no PostgreSQL gives False: libpq will tell.
    """
    options = dict(url.options)
    is_file = isinstance(address, str)  # libpq uses no TLS there
    if is_file or options.get("sslnegotiation") == "direct":
        return not is_file
    stream, _ = dial([(family, address)])
    with stream, suppress(ConnectionError):
        stream.sendall(SSL_REQUEST)
        return stream.recv(1) == b"S"
    return False


def milliseconds(start: float) -> str:
    duration = (time.monotonic() - start) * 1000
    return f"{duration:.{0 if duration >= 10 else 1}f} ms"


def show_address(address: Any) -> str:
    if isinstance(address, str):
        return address
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def describe_addresses(url: DatabaseUrl, addresses: Sequence[Address]) -> str:
    host = dict(url.options).get("hostaddr", url.host)
    known = {address if isinstance(address, str) else address[0] for _, address in addresses}
    if known == {host} or url.host.startswith("/"):
        return f"{host}, no name to look up"
    return f"{host} has {len(known)} address{'es' * (len(known) > 1)}"


def describe_tls(sslmode: str, *, offered: bool) -> str:
    if offered and sslmode != "disable":
        return f"on (sslmode={sslmode})"
    return f"off (sslmode={sslmode})"


def describe_endpoint(url: DatabaseUrl) -> tuple[str, str]:
    """Return what the host is, and advice."""
    if url.is_embedded:
        return "the embedded server", ""
    if url.is_pooled:
        return f"pooled; migrations go to {url.direct.host}", ""
    if url.is_neon:
        advice = f"the app is better off with the pooled host {url.pooled.host}"
        return "direct", f"{advice}: uv run manage.py env"
    return "direct", ""
