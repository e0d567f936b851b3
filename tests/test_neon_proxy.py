"""The imitation of Neon's proxy behaves like Neon for clients."""

import os
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import psycopg2
import pytest
from psycopg2.errors import QueryCanceled

from neon_proxy import Endpoint, NeonProxy, Reply, neon_proxy, wire
from postgres_server import find_programs

LIMIT = 30  # seconds


@pytest.fixture(scope="module")
def neon() -> Iterator[NeonProxy]:
    with neon_proxy() as neon:
        yield neon


@pytest.fixture
def endpoint(neon: NeonProxy) -> Endpoint:
    return neon.new_endpoint()


def ask_psycopg2(url: str, sql: str) -> str:
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(sql)
        (row,) = cursor.fetchall()
        return str(row[0])


def ask_psycopg(url: str, sql: str) -> str:
    with psycopg.connect(url) as connection:
        (row,) = connection.execute(sql.encode()).fetchall()
        return str(row[0])


def ask_psql(url: str, sql: str) -> str:
    psql = str(find_programs() / "psql")
    command = [psql, "--no-psqlrc", "--tuples-only", "--no-align", "--command", sql, url]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT)
    return done.stdout.strip()


def refusal(url: str) -> str:
    """Return why psycopg2 cannot connect."""
    with pytest.raises(psycopg2.OperationalError) as caught:
        psycopg2.connect(url)
    return str(caught.value).split(" failed: ", 1)[1].strip()


class RawClient:
    """A client that returns raw protocol messages."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def __enter__(self) -> "RawClient":
        plain = socket.create_connection(("127.0.0.1", self.endpoint.proxy.port), LIMIT)
        plain.sendall(wire.opening(wire.SSL_REQUEST, b""))
        assert plain.recv(1) == b"S"
        context = ssl.create_default_context(cafile=self.endpoint.proxy.authority)
        self.stream = context.wrap_socket(plain, server_hostname=self.endpoint.host())
        database = {"user": self.endpoint.user, "database": self.endpoint.database}
        self.stream.sendall(wire.startup(database))
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def read(self) -> bytes:
        return self.stream.recv(10_000)


# Clients


@pytest.mark.parametrize("ask", [ask_psycopg2, ask_psycopg, ask_psql])
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "direct"])
def test_clients_connect_with_the_consoles_connection_string(
    endpoint: Endpoint, ask: Callable[[str, str], str], *, pooled: bool
) -> None:
    url = endpoint.url(host=endpoint.host(pooled=pooled))

    answer = ask(url, "SELECT current_database()")

    assert "sslmode=require&channel_binding=require" in url
    assert answer == endpoint.database
    assert [connection["pooled"] for connection in endpoint.show()["connections"]] == [pooled]


def test_clients_can_connect_without_channel_binding(endpoint: Endpoint) -> None:
    assert ask_psycopg2(endpoint.url(channel_binding="disable"), "SELECT 1") == "1"


def test_clients_can_verify_the_certificate(neon: NeonProxy, endpoint: Endpoint) -> None:
    url = endpoint.url(sslmode="verify-full", sslrootcert=str(neon.authority))
    elsewhere = url.replace(endpoint.host(), "example.com")

    assert ask_psycopg2(url, "SELECT 1") == "1"
    assert 'does not match host name "example.com"' in refusal(elsewhere)


def test_large_messages_pass_in_both_directions(endpoint: Endpoint) -> None:
    with closing(psycopg2.connect(endpoint.url())) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT %s || 'x'", ("ä" * 3_000_000,))
        (row,) = cursor.fetchall()

    assert row[0] == "ä" * 3_000_000 + "x"


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "direct"])
def test_a_statement_can_be_cancelled(endpoint: Endpoint, *, pooled: bool) -> None:
    with closing(psycopg2.connect(endpoint.url(host=endpoint.host(pooled=pooled)))) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cancel = threading.Timer(0.2, connection.cancel)
        cancel.start()

        with pytest.raises(QueryCanceled):
            cursor.execute("SELECT pg_sleep(30)")
        cancel.join(LIMIT)


def test_a_cancel_request_can_be_encrypted(endpoint: Endpoint) -> None:
    with psycopg.connect(endpoint.direct_url()) as connection:
        cancel = threading.Timer(0.2, connection.cancel_safe)
        cancel.start()

        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute("SELECT pg_sleep(30)")
        cancel.join(LIMIT)


def test_pooled_clients_share_the_servers_connections(neon: NeonProxy, endpoint: Endpoint) -> None:
    if neon.pooler is None:
        pytest.skip("no PgBouncer is installed on the system")
    with (
        psycopg.connect(endpoint.url(), autocommit=True) as one,
        psycopg.connect(endpoint.url(), autocommit=True) as other,
    ):
        backends = [
            connection.execute("SELECT pg_backend_pid()").fetchone()
            for connection in (one, other, one)
        ]

    assert len(set(backends)) == 1


# Authentication


def test_connections_without_tls_are_refused(endpoint: Endpoint) -> None:
    url = endpoint.url(sslmode="disable", channel_binding=None)

    assert refusal(url) == "ERROR:  connection is insecure (try using `sslmode=require`)"


def test_a_wrong_password_role_or_endpoint_gives_the_same_error(endpoint: Endpoint) -> None:
    nowhere = "ep-no-body-1234.us-east-2.aws.neon.tech"

    error = "ERROR:  password authentication failed for user '{}'"
    assert refusal(endpoint.url(password="wrong")) == error.format(endpoint.user)
    assert refusal(endpoint.url(host=nowhere)) == error.format(endpoint.user)
    assert refusal(endpoint.url(user="nobody")) == error.format("nobody")


def test_a_client_that_names_no_endpoint_gets_an_error(endpoint: Endpoint) -> None:
    url = endpoint.url(sslsni="0", channel_binding=None)

    assert refusal(url).startswith("ERROR:  Endpoint ID is not specified. ")
    assert refusal(endpoint.url(host="example.com", channel_binding=None)) == refusal(url)


def test_a_client_that_requires_channel_binding_gives_up_without_it(endpoint: Endpoint) -> None:
    assert refusal(endpoint.url(host="example.com")) == (
        "channel binding required but not supported by server's authentication request"
    )


@pytest.mark.parametrize("word", ["endpoint", "project"])
def test_options_can_name_the_endpoint(endpoint: Endpoint, word: str) -> None:
    options = f"{word}={endpoint.name} -c statement_timeout=5s"
    url = endpoint.direct_url(sslsni="0", options=options)

    answer = ask_psycopg2(url, "SHOW statement_timeout")

    assert answer == "5s"


def test_host_and_options_must_agree(endpoint: Endpoint) -> None:
    assert refusal(endpoint.direct_url(options="endpoint=ep-x")) == (
        f"ERROR:  Inconsistent project name inferred from SNI ('{endpoint.name}')"
        " and project option ('ep-x')."
    )


def test_only_the_pooled_host_refuses_other_options(endpoint: Endpoint) -> None:
    options = "-c statement_timeout=5s"

    assert refusal(endpoint.url(options=options)) == (
        "FATAL:  unsupported startup parameter in options: statement_timeout"
    )
    assert ask_psycopg2(endpoint.direct_url(options=options), "SHOW statement_timeout") == "5s"


def test_the_servers_errors_are_passed_on(endpoint: Endpoint) -> None:
    url = endpoint.direct_url(database="nowhere")

    assert refusal(url) == 'FATAL:  database "nowhere" does not exist'


# Controls


def test_a_sleeping_compute_wakes_once_for_all_clients(neon: NeonProxy) -> None:
    endpoint = neon.new_endpoint(wake_seconds=1)
    start = time.monotonic()

    first = psycopg2.connect(endpoint.url(connect_timeout="5"))
    second = psycopg2.connect(endpoint.url())
    waited = time.monotonic() - start
    first.close()
    second.close()

    assert 1 <= waited < LIMIT
    assert endpoint.show()["asleep"] is False


def test_a_compute_wakes_even_if_the_client_gives_up(neon: NeonProxy) -> None:
    endpoint = neon.new_endpoint(wake_seconds=2.5)
    impatient = endpoint.url(connect_timeout="2")  # the minimum of libpq

    assert "timeout expired" in refusal(impatient)
    assert ask_psycopg2(impatient, "SELECT 1") == "1"


def test_an_error_is_sent_as_often_as_requested(endpoint: Endpoint) -> None:
    endpoint.reply(
        Reply("Control plane request failed", times=2), Reply("Authentication timed out", times=1)
    )

    errors = [refusal(endpoint.url()) for _ in range(3)]

    assert errors == ["ERROR:  Control plane request failed"] * 2 + [
        "ERROR:  Authentication timed out"
    ]
    assert ask_psycopg2(endpoint.url(), "SELECT 1") == "1"


def test_an_error_from_the_proxy_has_three_fields(endpoint: Endpoint) -> None:
    endpoint.reply(Reply("Too many connections attempts", before_login=True))

    with RawClient(endpoint) as client:
        message = client.read()

    body = b"SERROR\0CXX000\0MToo many connections attempts\0\0"
    assert message == wire.message(b"E", body)


def test_a_reply_can_imitate_an_error_from_the_server(endpoint: Endpoint) -> None:
    endpoint.reply(Reply("sorry, too many clients already", "FATAL", "53300"))

    assert refusal(endpoint.url()) == "FATAL:  sorry, too many clients already"


@pytest.mark.parametrize("way", ["fatal", "close", "reset"])
def test_a_connection_attempt_can_end_without_an_answer(endpoint: Endpoint, way: Any) -> None:
    endpoint.reply(Reply(way=way, times=1))

    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(endpoint.url())
    assert ask_psycopg2(endpoint.url(), "SELECT 1") == "1"


@pytest.mark.parametrize(
    ("way", "seen"),
    [
        ("fatal", "FATAL 57P01"),
        ("close", "the end"),
        ("reset", "Connection reset by peer"),
    ],
)
def test_an_idle_client_can_be_disconnected(endpoint: Endpoint, way: Any, seen: str) -> None:
    with closing(psycopg2.connect(endpoint.url())) as connection:
        count = endpoint.hang_up(way)

        assert count == 1
        assert look_at(connection.fileno()) == seen
        with pytest.raises(psycopg2.OperationalError, match=r"closed|EOF detected"):
            connection.cursor().execute("SELECT 1")
    assert endpoint.show()["clients"] == 0


def look_at(descriptor: int) -> str:
    """Return what a client's socket would read next, without consuming it."""
    stream = socket.socket(fileno=os.dup(descriptor))
    with stream:
        select.select([stream], [], [], LIMIT)
        try:
            data = stream.recv(1000, socket.MSG_PEEK)
        except OSError as error:
            return str(error.strerror)
        # The data is encrypted: it can only be the error and TLS's close_notify.
        return "FATAL 57P01" if data else "the end"


def test_statements_are_recorded(endpoint: Endpoint) -> None:
    ask_psycopg2(endpoint.url(), "SELECT 'simple'")
    with psycopg.connect(endpoint.url(), autocommit=True) as connection:
        connection.execute("SELECT %s::text", ("extended",))

    statements = [statement for _, statement in endpoint.show()["statements"]]
    assert statements == ["BEGIN", "SELECT 'simple'", "SELECT $1::text"]


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "neon_proxy", str(tmp_path), "1", "1"],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()

    process.stdin.close()  # as the system does when the parent is killed

    try:
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.stdout.close()
