"""The check of a connection: the way to the database in steps, and what each of them found."""

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import psycopg2

from postgres import connect
from postgres.connect import Connection, OnWait, Patience
from postgres.explain import explain, told
from postgres.findings import Finding
from postgres.url import DatabaseUrl

STEPS = ("DNS", "TCP", "TLS", "log-in", "database", "endpoint", "schema")
QUERY_SECONDS = 10.0
OLDEST = 15  # the oldest PostgreSQL that this project runs on
SSL_REQUEST = struct.pack("!ii", 8, 80877103)


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
    steps = walk(url, history, Patience(url, on_wait, connect.TOTAL_SECONDS))
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
        addresses = patience.insist(lambda: connect.look_up(url), connect.STEP_SECONDS)
    except TimeoutError as error:
        raise StepFailed(told("host-unknown", url, f"name server: {error}")) from None
    yield describe_addresses(url, addresses), ""

    start = time.monotonic()
    stream, (family, address) = patience.insist(lambda: connect.dial(addresses), patience.left)
    stream.close()
    silent = addresses.index((family, address))
    others = f"; {silent} tried before it did not" * (silent > 0)
    yield f"{show_address(address)} answers after {milliseconds(start)}{others}", ""

    sslmode = dict(url.options).get("sslmode") or os.environ.get("PGSSLMODE") or "prefer"
    offered = patience.insist(lambda: offers_tls(url, family, address), connect.STEP_SECONDS + 1)
    start = time.monotonic()
    # The address that has answered just now: libpq would begin with the first one again.
    place = {} if isinstance(address, str) else {"hostaddr": address[0]}
    try:
        connection = connect.log_in(url, patience, **place)
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
        connect.hang_up(connection)  # the other thread would keep it for itself
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
    return f"at head, {compare_revisions([number for (number,) in revisions], history, url)}"


def compare_revisions(
    revisions: Sequence[str], history: Callable[[], Sequence[str]], url: DatabaseUrl
) -> str:
    """Return a database's revision, if it is the newest that the code has. Raises StepFailed."""
    revision = ", ".join(revisions)
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
    return revision


def offers_tls(url: DatabaseUrl, family: socket.AddressFamily, address: Any) -> bool:
    """Ask, the way libpq does: a server that is frozen does not even answer this.

    Raises OSError. What is no PostgreSQL gives False: libpq will tell.
    """
    options = dict(url.options)
    is_file = isinstance(address, str)  # libpq uses no TLS there
    if is_file or options.get("sslnegotiation") == "direct":
        return not is_file
    stream, _ = connect.dial([(family, address)])
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


def describe_addresses(url: DatabaseUrl, addresses: Sequence[connect.Address]) -> str:
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
