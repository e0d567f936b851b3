"""Checks the connection to a database step by step, and says what each step found."""

import os
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import psycopg2

from postgres import connect
from postgres.connect import Connection, OnWait, TimeBudget
from postgres.explain import explain, finding_for
from postgres.findings import Finding
from postgres.url import DatabaseUrl

STEPS = ("DNS", "TCP", "TLS", "login", "database", "endpoint", "schema")
QUERY_SECONDS = 10.0
OLDEST_VERSION = 15  # of PostgreSQL, that this project supports
AFTER_LOG_IN = {"database-missing", "permission-denied"}  # PostgreSQL finds these last
# Each column that a statement finds without naming its schema, as `table.column`.
LIST_COLUMNS = """
    SELECT relname || '.' || attname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    WHERE attnum > 0 AND NOT attisdropped AND relkind <> 'i' AND pg_table_is_visible(attrelid)
    AND relnamespace <> 'pg_catalog'::regnamespace
"""
SSL_REQUEST = struct.pack("!ii", 8, 80877103)


@dataclass(frozen=True)
class Check:
    """One step on the way to the database. ok: None if it was not reached.

    advice: what to do if the step failed, or could be better. finding: what is wrong.
    """

    name: str
    ok: bool | None
    detail: str
    advice: str = ""
    finding: Finding | None = None


class StepFailed(Exception):
    """A step failed without an error of the database that explains it."""

    def __init__(self, finding: Finding, detail: str = "") -> None:
        super().__init__(detail or finding.cause)
        self.finding = finding


def check_connection(
    url: DatabaseUrl,
    history: Callable[[], Sequence[str]],
    on_wait: OnWait,
    columns: Callable[[], Collection[str]] = list,
) -> Iterator[Check]:
    """Yield a check for each of STEPS. The steps after one that fails are not tried.

    history: returns the revisions that the code knows, the newest first. on_wait: called once a
    second with the seconds that have passed. columns: returns those of the models, as
    `table.column`.
    """
    remaining = list(STEPS)
    try:
        budget = TimeBudget(url, on_wait, connect.TOTAL_SECONDS)
        for check in passed_checks(url, history, columns, budget):
            remaining.remove(check.name)
            yield check
    except StepFailed as failure:
        finding, detail = failure.finding, str(failure)
    except (OSError, psycopg2.Error) as error:
        finding = explain(error, url)
        detail = finding.cause
    else:
        return
    failed, *unreached = remaining
    yield Check(failed, ok=False, detail=detail, advice=finding.advice, finding=finding)
    for name in unreached:
        yield Check(name, ok=None, detail="not reached")


def passed_checks(
    url: DatabaseUrl,
    history: Callable[[], Sequence[str]],
    columns: Callable[[], Collection[str]],
    budget: TimeBudget,
) -> Iterator[Check]:
    """Yield the steps that pass. Raises StepFailed, OSError or psycopg2.Error when one fails."""

    def passed(name: str, detail: str, advice: str = "") -> Check:
        return Check(name, ok=True, detail=detail, advice=advice)

    try:
        addresses = budget.retry(lambda: connect.resolve(url), connect.STEP_SECONDS)
    except TimeoutError as error:
        raise StepFailed(finding_for("host-unknown", url, f"name server: {error}")) from None
    yield passed("DNS", describe_addresses(url, addresses))

    start = time.monotonic()
    stream, (family, address) = budget.retry(lambda: connect.open_socket(addresses), budget.left)
    stream.close()
    detail = f"{show_address(address)} answers after {time_since(start)}"
    if silent := addresses.index((family, address)):
        detail += f"; {silent} before it did not answer"
    yield passed("TCP", detail)

    sslmode = dict(url.options).get("sslmode") or os.environ.get("PGSSLMODE") or "prefer"
    offered = budget.retry(lambda: offers_tls(url, family, address), connect.STEP_SECONDS + 1)
    start = time.monotonic()
    # The address that has just answered: libpq would start with the first one again.
    hostaddr = {} if isinstance(address, str) else {"hostaddr": address[0]}
    try:
        connection = connect.log_in(url, budget, **hostaddr)
    except (TimeoutError, psycopg2.Error) as error:
        finding = explain(error, url)
        if finding.step != "TLS":
            yield passed("TLS", describe_tls(sslmode, in_use=offered and sslmode != "disable"))
        if finding.name in AFTER_LOG_IN:
            yield passed("login", f"as {url.user}")
        raise
    log_in_time = time_since(start)
    with closing(connection):
        tls = describe_tls(sslmode, in_use=connection.info.ssl_in_use)
        version = connection.info.ssl_attribute("protocol")
        yield passed("TLS", f"{tls}, {version}" if version else tls)
        yield passed("login", f"as {url.user} in {log_in_time}")

        connection.autocommit = True
        yield passed("database", check_server(url, connection, budget))
        yield passed("endpoint", *describe_endpoint(url))
        revision = compare_schema(url, connection, history, budget)
        found = [column for (column,) in ask(connection, budget, LIST_COLUMNS)]
        compare_columns(columns(), found, url)
        yield passed("schema", revision)


def ask(connection: Connection, budget: TimeBudget, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query. Raises psycopg2.Error or TimeoutError."""

    def execute() -> list[tuple[Any, ...]]:
        with closing(connection.cursor()) as cursor:
            cursor.execute(query)
            return cursor.fetchall()

    try:
        return budget.run(execute, QUERY_SECONDS)
    except (KeyboardInterrupt, TimeoutError):
        # The other thread still waits for an answer, and close() would wait for that thread.
        connect.abort(connection)
        raise


def check_server(url: DatabaseUrl, connection: Connection, budget: TimeBudget) -> str:
    """Check the server's version, speed and whether it takes writes. Raises StepFailed."""
    ((version, read_only),) = ask(
        connection,
        budget,
        "SELECT current_setting('server_version'), current_setting('transaction_read_only')",
    )
    start = time.monotonic()
    ask(connection, budget, "SELECT 1")
    round_trip = time_since(start)
    number, _, _ = version.partition(" ")
    if connection.server_version < OLDEST_VERSION * 10_000:
        detail = f"PostgreSQL {number} is older than {OLDEST_VERSION}"
        raise StepFailed(finding_for("server-too-old", url), detail)
    if read_only == "on":
        raise StepFailed(finding_for("read-only", url))
    return f"{url.database}, PostgreSQL {number}, one round trip takes {round_trip}"


def compare_schema(
    url: DatabaseUrl,
    connection: Connection,
    history: Callable[[], Sequence[str]],
    budget: TimeBudget,
) -> str:
    """Compare the database's revision with the code's. Raises StepFailed."""
    revisions: list[tuple[Any, ...]] = []
    if ask(connection, budget, "SELECT to_regclass('alembic_version')") != [(None,)]:
        revisions = ask(connection, budget, "SELECT version_num FROM alembic_version")
    return f"at head, {compare_revisions([number for (number,) in revisions], history, url)}"


def compare_revisions(
    revisions: Sequence[str], history: Callable[[], Sequence[str]], url: DatabaseUrl
) -> str:
    """Return the database's revision if it is the code's newest one. Raises StepFailed."""
    revision = ", ".join(revisions)
    try:
        known = history()
    except Exception as error:  # noqa: BLE001  (migration files are code: they can raise anything)
        raise StepFailed(finding_for("migrations-broken", url, str(error))) from None
    if revision and revision not in known:
        detail = f"the database is at {revision}, which the code does not know: the code is older"
        raise StepFailed(finding_for("schema-ahead", url), detail)
    newest = known[0] if known else ""
    if revision != newest:
        detail = f"the database is at {revision or 'no revision'}, the code expects {newest}"
        raise StepFailed(finding_for("schema-behind", url), detail)
    return revision


def compare_columns(expected: Collection[str], found: Collection[str], url: DatabaseUrl) -> None:
    """Compare the models' columns with those of a database that is at head. Raises StepFailed."""
    tables = {column.partition(".")[0] for column in found}
    missing = set()
    for column in set(expected) - set(found):
        table = column.partition(".")[0]
        missing.add(f"the column {column}" if table in tables else f"the table {table}")
    if missing:
        detail = f"no migration creates {', '.join(sorted(missing))}"
        raise StepFailed(finding_for("models-ahead", url), detail)


def offers_tls(url: DatabaseUrl, family: socket.AddressFamily, address: Any) -> bool:
    """Ask whether the server offers TLS, as libpq does. A frozen server does not even answer this.

    Raises OSError. A server that is not PostgreSQL gives False: libpq will explain it.
    """
    if isinstance(address, str):  # libpq does not use TLS on a Unix socket
        return False
    if dict(url.options).get("sslnegotiation") == "direct":
        return True
    stream, _ = connect.open_socket([(family, address)])
    with stream, suppress(ConnectionError):
        stream.sendall(SSL_REQUEST)
        return stream.recv(1) == b"S"
    return False


def time_since(start: float) -> str:
    """Return the milliseconds since `start`, to be shown."""
    duration = (time.monotonic() - start) * 1000
    return f"{duration:.0f} ms" if duration >= 10 else f"{duration:.1f} ms"


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
    return f"{host} has 1 address" if len(known) == 1 else f"{host} has {len(known)} addresses"


def describe_tls(sslmode: str, *, in_use: bool) -> str:
    return f"on (sslmode={sslmode})" if in_use else f"off (sslmode={sslmode})"


def describe_endpoint(url: DatabaseUrl) -> tuple[str, str]:
    """Return which kind of host the URL names, and advice."""
    if url.is_embedded:
        return "the embedded server", ""
    if url.is_pooled:
        return f"pooled; migrations go to {url.direct.host}", ""
    if url.is_neon:
        advice = f"the app is better off with the pooled host {url.pooled.host}"
        return "direct", f"{advice}: uv run manage.py env"
    return "direct", ""
