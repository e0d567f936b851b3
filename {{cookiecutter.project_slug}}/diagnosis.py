"""What is wrong with a connection: errors told in plain words, and a check of every step to it."""

import random
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import psycopg2

from database_url import DatabaseUrl

CONNECT_SECONDS = 3
WAKE_UP_SECONDS = 30.0
SSL_REQUEST = struct.pack("!ii", 8, 80877103)


@dataclass(frozen=True)
class Finding:
    """What an error of the database means. `retry`: the same attempt may work a little later."""

    name: str
    cause: str
    advice: str
    retry: bool = False


# Errors are told apart by their text: a connection that failed has no SQLSTATE. First match wins.
FINDINGS: tuple[tuple[str, Finding], ...] = (
    (
        (
            "could not translate host name|Name or service not known|nodename nor servname|"
            "getaddrinfo failed|Temporary failure in name resolution"
        ),
        Finding(
            "unknown host",
            "no such host name, or no network",
            "compare the host in DATABASE_URL with the one your provider shows",
        ),
    ),
    (
        r"[Cc]onnection refused|actively refused",
        Finding(
            "nothing listens",
            "nothing listens on this host and port",
            "is the database running, and the port right?",
        ),
    ),
    (
        r"timeout expired|timed out|Authentication timed out",
        Finding(
            "no answer",
            "the host does not answer: a firewall, or a compute that is waking up",
            "try again; if it stays, check the network and the host",
            retry=True,
        ),
    ),
    (
        r"connection is insecure",
        Finding("TLS is off", "the server wants TLS", "add ?sslmode=require to DATABASE_URL"),
    ),
    (
        r"server does not support SSL|SSL error|certificate",
        Finding(
            "TLS fails",
            "the server and the sslmode of DATABASE_URL do not agree about TLS",
            "a provider's host: check the host name; your own server: switch TLS on in it",
        ),
    ),
    (
        r"password authentication failed|no password supplied",
        Finding(
            "log-in refused",
            "wrong password or role; on Neon also a wrong endpoint",
            "copy the connection string again, then: uv run manage.py env",
        ),
    ),
    (
        r'role ".*" does not exist',
        Finding("no such role", "the role does not exist", "check the user in DATABASE_URL"),
    ),
    (
        r'database ".*" does not exist',
        Finding(
            "no such database",
            "the server has no database of this name",
            "check the name at the end of DATABASE_URL, or create it: CREATE DATABASE …",
        ),
    ),
    (
        (
            "Couldn't connect to compute node|Control plane request failed$|"
            "the database system is starting up"
        ),
        Finding("waking up", "the compute is waking up", "try again in a moment", retry=True),
    ),
    (
        r"remaining connection slots|too many clients|no more connections allowed",
        Finding(
            "no free connection",
            "the server has as many connections as it allows",
            "close some, lower DB_POOL_SIZE, or use the pooled host",
            retry=True,
        ),
    ),
)


def explain(error: BaseException, url: DatabaseUrl) -> Finding:
    """Tell what an error means. An unknown one is passed on, without the password."""
    message = str(error).strip()
    for pattern, finding in FINDINGS:
        if re.search(pattern, message, re.MULTILINE):
            if url.is_embedded and finding.name == "nothing listens":
                return replace(finding, advice="start it: uv run manage.py postgres start")
            return finding
    first_line = message.partition("\n")[0] or type(error).__name__
    if url.password:
        first_line = first_line.replace(url.password, "***")
    return Finding(
        "other error", first_line, "see the server's log, or the README's troubleshooting"
    )


@dataclass(frozen=True)
class Check:
    """One step on the way to the database. `ok` is None for a step that was not reached."""

    name: str
    ok: bool | None
    detail: str
    advice: str = ""


def check_connection(
    url: DatabaseUrl, head: Callable[[], str | None], on_wait: Callable[[float], None]
) -> Iterator[Check]:
    """Go to the database step by step, and yield each; after one that fails none is tried.

    head: returns the schema revision that the code expects. on_wait: is told, before each further
    attempt to log in, how many seconds have passed.
    """
    steps = walk(url, head, on_wait)
    for name in ("network", "TLS", "log-in", "query", "endpoint", "schema"):
        try:
            yield Check(name, ok=True, detail=next(steps))
        except StopIteration:
            yield Check(name, ok=None, detail="not reached")
        except StepFailed as failure:
            yield Check(name, False, failure.finding.cause, failure.finding.advice)
        except (OSError, psycopg2.Error) as error:
            finding = explain(error, url)
            yield Check(name, False, finding.cause, finding.advice)


class StepFailed(Exception):
    """A step whose failure no error of the database's tells."""

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(cause)
        self.finding = Finding(cause, cause, advice)


def walk(
    url: DatabaseUrl, head: Callable[[], str | None], on_wait: Callable[[float], None]
) -> Iterator[str]:
    """Yield what each step found. Raises StepFailed, OSError or psycopg2.Error at the last."""
    start = time.monotonic()
    with reach(url) as probe:
        yield f"{url.address} answers after {milliseconds(start)}"
        probe.sendall(SSL_REQUEST)
        tls_offered = probe.recv(1) == b"S"
    sslmode = dict(url.options).get("sslmode", "prefer")
    if sslmode in {"require", "verify-ca", "verify-full"} and not tls_offered:
        raise StepFailed(
            f"the server offers no TLS, and DATABASE_URL has sslmode={sslmode}",
            "check the host; on your own server, switch TLS on or drop sslmode",
        )
    yield describe_tls(sslmode, offered=tls_offered)
    start = time.monotonic()
    with closing(connect(url, on_wait)) as connection:
        connection.autocommit = True
        yield f"as {url.user} to {url.database} in {milliseconds(start)}"
        with connection.cursor() as cursor:
            cursor.execute("SHOW server_version")
            (version,) = cursor.fetchone() or ("?",)
            start = time.monotonic()
            cursor.execute("SELECT 1")
            yield f"PostgreSQL {version}, one round trip takes {milliseconds(start)}"
            yield describe_endpoint(url)
            cursor.execute("SELECT to_regclass('alembic_version')")
            revision = None
            if cursor.fetchone() != (None,):
                cursor.execute("SELECT version_num FROM alembic_version")
                (revision,) = cursor.fetchone() or (None,)
    expected = head()
    if revision != expected:
        raise StepFailed(
            f"the database is at {revision or 'no revision'}, the code expects {expected}",
            "run: uv run manage.py migrate",
        )
    yield f"at head, {revision}"


def reach(url: DatabaseUrl) -> socket.socket:
    """Open a connection of the network alone. Raises OSError."""
    if not url.host.startswith("/"):
        host = dict(url.options).get("hostaddr", url.host)
        return socket.create_connection((host, url.port), timeout=CONNECT_SECONDS)
    probe = socket.socket(socket.AF_UNIX)
    probe.settimeout(CONNECT_SECONDS)
    probe.connect(f"{url.host}/.s.PGSQL.{url.port}")
    return probe


def connect(url: DatabaseUrl, on_wait: Callable[[float], None]) -> "psycopg2.extensions.connection":
    """Log in; where it is worth it, again and again for WAKE_UP_SECONDS. Raises psycopg2.Error."""
    start = time.monotonic()
    pause = 0.5
    while True:
        try:
            return psycopg2.connect(url.for_libpq(), connect_timeout=CONNECT_SECONDS)
        except psycopg2.OperationalError as error:
            waited = time.monotonic() - start
            if not explain(error, url).retry or waited + pause > WAKE_UP_SECONDS:
                raise
        on_wait(waited)
        # Jitter, so that replicas that wait together do not come back together.
        time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
        pause = min(2 * pause, 4.0)


def milliseconds(start: float) -> str:
    return f"{(time.monotonic() - start) * 1000:.0f} ms"


def describe_tls(sslmode: str, *, offered: bool) -> str:
    if offered and sslmode != "disable":
        return f"on (sslmode={sslmode})"
    return f"off (sslmode={sslmode})"


def describe_endpoint(url: DatabaseUrl) -> str:
    if url.is_embedded:
        return "the embedded server"
    if url.is_pooled:
        return f"pooled; migrations go to {url.direct.host}"
    if url.is_neon:
        return f"direct; the app is better off with the pooled host {url.pooled.host}"
    return "direct"
