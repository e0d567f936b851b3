"""Explaining errors: messages of Neon, PgBouncer and PostgreSQL, over real connections."""

import errno
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, exc, text

from postgres.connect import PAUSES
from postgres.explain import BY_NAME, LIBPQ_PREFIX, RULES, advise, explain
from postgres.findings import FINDINGS, Finding, Retry
from postgres.tests.error_texts import TABLE
from postgres.tests.scripted_server import SILENCE, error, scripted_server
from postgres.url import DatabaseUrl

URL = DatabaseUrl("ada", "correct horse", "127.0.0.1", 1, "todo", (("sslmode", "disable"),))
NEON = URL.replace(host="ep-cool-name-a1b2c3d4.us-east-2.aws.neon.tech")

CLIENTS = ("libpq", "OpenSSL", "psycopg2", "this app", "SQLAlchemy", "asyncio", "Alembic")


def read_table() -> Iterator[tuple[str, str, str, str]]:
    """Yield source, text, finding, and whether to try again."""
    source = ""
    for line in TABLE.strip().splitlines():
        if line.startswith("# "):
            source = line.removeprefix("# ")
        else:
            finding, retry, words = line.split(" | ")
            yield source, words.replace(r"\n", "\n").replace(r"\t", "\t"), finding, retry


TEXTS = list(read_table())


def fail_to_connect(url: DatabaseUrl, **parameters: Any) -> Finding:
    """Return the finding for psycopg2's error."""
    with pytest.raises(psycopg2.Error) as failure:
        psycopg2.connect(url.for_libpq(), connect_timeout=2, **parameters)
    assert failure.value.pgcode is None
    return explain(failure.value, url)


@pytest.mark.parametrize(
    ("source", "words", "name", "retry"),
    [row for row in TEXTS if not row[0].startswith(CLIENTS)],
)
def test_server_messages_become_findings(source: str, words: str, name: str, retry: str) -> None:
    severity = "ERROR" if source == "Neon" else "FATAL"
    with scripted_server(error(words, severity)) as server:
        finding = fail_to_connect(URL.replace(port=server.port))

    assert (finding.name, finding.retry) == (name, retry)
    assert finding.message == f"{severity}: {words}"
    assert finding.cause
    assert finding.advice


@pytest.mark.parametrize(
    ("source", "words", "name", "retry"), [row for row in TEXTS if row[0].startswith(CLIENTS)]
)
def test_the_words_of_a_client_become_a_finding(
    source: str, words: str, name: str, retry: str
) -> None:
    finding = explain(psycopg2.OperationalError(words), URL)

    assert (finding.name, finding.retry) == (name, retry), source


def test_each_part_of_a_rule_decides_for_a_text() -> None:
    parts = [(part, name) for name, pattern in RULES for part in pattern.split("|")]
    needed = set()
    for source, words, _, _ in TEXTS:
        message = LIBPQ_PREFIX.sub("", words) if source.startswith(CLIENTS) else f"FATAL:  {words}"
        fitting = [rule for rule in parts if re.search(rule[0], message, re.IGNORECASE)]
        if fitting and {name for _, name in fitting[1:2]} != {fitting[0][1]}:
            needed.add(fitting[0])

    assert not [part for part, name in parts if (part, name) not in needed]


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ("server login failed: FATAL", "pooler-waits"),
        ("Failed to connect to the compute node:", "waking-up"),
    ],
)
def test_a_servers_error_that_a_pooler_forwards_keeps_its_finding(words: str, own: str) -> None:
    """The order of the rules decides, since the text has the words of both."""
    told = [(text, name) for source, text, name, _ in TEXTS if source == "PostgreSQL"]
    assert len(told) > 40
    vague = {"connection-lost", "no-answer", "server-refused"}

    found = [
        (text, explain(psycopg2.OperationalError(f"FATAL:  {words} {text}"), URL).name)
        for text, _ in told
    ]

    assert found == [(text, own if name in vague else name) for text, name in told]


@pytest.mark.parametrize(
    ("options", "answer", "name"),
    [
        ({"sslmode": "require"}, SILENCE, "tls-not-offered"),
        ({}, SILENCE, "no-answer"),
        ({}, b"HTTP/1.1 400 Bad Request\r\n\r\n", "not-postgresql"),
        ({}, b"R\0\0\0\x08\0\0\0\x03", "password-missing"),
        (
            {"channel_binding": "require"},
            b"R\0\0\0\x08\0\0\0\x03",
            "channel-binding-unsupported",
        ),
        ({"sslmode": "require", "sslrootcert": "/nowhere.pem"}, SILENCE, "tls-not-offered"),
        ({"sslmode": "require", "sslrootcert": "system"}, SILENCE, "certificate-refused"),
    ],
)
def test_an_error_of_libpq_gives_a_finding(
    options: dict[str, str], answer: bytes, name: str
) -> None:
    with scripted_server(answer) as server:
        url = URL.replace(port=server.port, password="", options=tuple(options.items()))

        assert fail_to_connect(url).name == name


@pytest.mark.parametrize(
    ("host", "name", "step"),
    [
        ("127.0.0.1", "nothing-listens", "TCP"),
        ("no-such-host.invalid", "host-unknown", "DNS"),
        ("/no/such/folder", "nothing-listens", "TCP"),
    ],
)
def test_network_errors_are_distinguished_from_server_errors(
    host: str, name: str, step: str
) -> None:
    with socket.socket() as reserved:  # so that nothing can listen there
        reserved.bind(("127.0.0.1", 0))
        finding = fail_to_connect(URL.replace(host=host, port=reserved.getsockname()[1]))

    assert (finding.name, finding.step) == (name, step)


def test_the_first_line_counts_if_a_misleading_one_follows() -> None:
    """libpq retries with or without TLS, and reports both errors."""
    with scripted_server(error("password authentication failed for user 'ada'")) as server:
        url = URL.replace(port=server.port, options=(("sslmode", "allow"),))
        with pytest.raises(psycopg2.Error, match=r"failed: ERROR[^$]*failed: .*SSL") as failure:
            psycopg2.connect(url.for_libpq())

    finding = explain(failure.value, url)

    assert finding.name == "login-refused"
    assert finding.message == "ERROR: password authentication failed for user 'ada'"


def test_the_error_of_an_address_that_answers_takes_precedence() -> None:
    with socket.socket() as reserved, scripted_server(error("Too many connections attempts")) as it:
        reserved.bind(("127.0.0.1", 0))
        ports = f"{reserved.getsockname()[1]},{it.port}"
        finding = fail_to_connect(URL, host="127.0.0.1,127.0.0.1", port=ports)

    assert finding.name == "connect-storm"


def test_a_message_in_another_language_is_passed_on() -> None:
    words = "Passwort-Authentifizierung für Benutzer »ada« fehlgeschlagen"
    with scripted_server(error(words, "SCHWERWIEGEND", "28P01")) as server:
        finding = fail_to_connect(URL.replace(port=server.port))

    assert (finding.name, finding.step) == ("server-refused", "login")
    assert finding.message == f"SCHWERWIEGEND: {words}"


def test_secrets_in_a_servers_message_are_hidden() -> None:
    words = "no luck with correct%20horse, Correct horse, correct horse or ada@example.com"
    with scripted_server(error(words)) as server:
        finding = fail_to_connect(URL.replace(port=server.port))

    assert finding.message == "ERROR: no luck with ***, Correct horse, *** or ***"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("53100", "disk-full"),
        ("53200", "out-of-memory"),
        ("53300", "server-full"),
        ("25006", "read-only"),
        ("57P01", "server-stopped"),
        ("57P02", "server-crashed"),
        ("57P03", "server-starting"),
        ("57014", "query-cancelled"),
        ("55P03", "lock-timeout"),
        ("40P01", "conflict"),
        ("42P01", "schema-behind"),
        ("42501", "permission-denied"),
        ("58030", "server-trouble"),
        ("28P01", "login-refused"),
        ("08P01", "nothing-listens"),  # so vague that the text counts
        ("58000", "nothing-listens"),
        ("XX000", "nothing-listens"),
        ("XX001", "server-trouble"),
        ("23505", "other-error"),
    ],
)
def test_an_error_is_recognized_by_its_sqlstate(server: DatabaseUrl, code: str, name: str) -> None:
    """Its text and language do not matter."""
    raising = f"DO $$BEGIN RAISE 'connection refused' USING ERRCODE = '{code}'; END$$"
    engine = create_engine(server.for_sqlalchemy())
    with engine.connect() as connection, pytest.raises(exc.DBAPIError) as failure:
        connection.execute(text(raising))
    engine.dispose()

    assert explain(failure.value, server).name == name


@pytest.mark.parametrize(
    ("statements", "name"),
    [
        (["SELECT * FROM no_such_table"], "schema-behind"),
        (["SELECT no_such_column FROM pg_class"], "schema-behind"),
        (["SET TRANSACTION READ ONLY", "CREATE TABLE t ()"], "read-only"),
        (["SET LOCAL statement_timeout = 1", "SELECT pg_sleep(5)"], "query-cancelled"),
        # The server sends the reason as it disconnects, but it does not always arrive.
        (["SELECT pg_terminate_backend(pg_backend_pid())"], "server-stopped|connection-lost"),
        (["SELECT 1 / 0"], "other-error"),
    ],
)
def test_errors_of_a_real_server_give_findings(
    server: DatabaseUrl, statements: list[str], name: str
) -> None:
    engine = create_engine(server.for_sqlalchemy())
    *preparing, failing = map(text, statements)
    with engine.connect() as connection:
        for statement in preparing:
            connection.execute(statement)
        with pytest.raises(exc.DBAPIError) as failure:
            connection.execute(failing)
    engine.dispose()

    assert explain(failure.value, server).name in name.split("|")


def test_rows_quoted_in_an_error_are_not_passed_on(
    new_database: Callable[[], DatabaseUrl],
) -> None:
    url = new_database()
    with closing(psycopg2.connect(url.for_libpq())) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE diary (entry text UNIQUE)")
        cursor.execute("INSERT INTO diary VALUES ('kangaroo')")
        with pytest.raises(psycopg2.Error) as failure:
            cursor.execute("INSERT INTO diary VALUES ('kangaroo')")

    assert "kangaroo" in str(failure.value)
    assert "kangaroo" not in explain(failure.value, url).message


@pytest.mark.parametrize(
    ("raised", "name"),
    [
        (socket.gaierror(-2, "Name or service not known"), "host-unknown"),
        (TimeoutError("timed out"), "no-answer"),
        (ConnectionRefusedError(111, "Verbindungsaufbau abgelehnt"), "nothing-listens"),
        (ConnectionResetError(104, "Connection reset by peer"), "connection-lost"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "network-unreachable"),
        (PermissionError(errno.EACCES, "Permission denied"), "connection-forbidden"),
        (OSError(errno.EMFILE, "Too many open files"), "too-many-files"),
        (OSError("AF_UNIX path too long"), "settings-wrong"),
        (OSError("whatever"), "other-error"),
        (ValueError("whatever"), "other-error"),
    ],
)
def test_network_errors_give_findings(raised: Exception, name: str) -> None:
    assert explain(raised, URL).name == name


def test_the_cause_of_a_wrapped_error_is_explained() -> None:
    cause = psycopg2.OperationalError("Couldn't connect to compute node")
    wrapped = RuntimeError("the database does not answer")
    wrapped.__cause__ = exc.OperationalError("SELECT 1", {}, cause)

    assert explain(wrapped, URL).name == "waking-up"


@given(
    password=st.text(min_size=1, max_size=20),
    parts=st.lists(st.sampled_from(["raw", "encoded", " failed: FATAL:  "]) | st.text()),
    code=st.sampled_from([None, "XX000", "28P01", "99999"]),
)
def test_any_text_gives_a_finding_without_the_password(
    password: str, parts: list[str], code: str | None
) -> None:
    secret = {"raw": password, "encoded": quote(password, safe="")}
    words = "".join(secret.get(part, part) for part in parts)
    raised = type("Error", (psycopg2.OperationalError,), {"pgcode": code})(words)

    finding = explain(raised, URL.replace(password=password))

    assert finding.name in BY_NAME
    assert finding.message.isprintable()
    assert len(finding.message) <= 300
    assert password not in finding.message
    assert quote(password, safe="") not in finding.message


def test_a_text_is_dropped_if_masking_creates_the_secret_again() -> None:
    words = psycopg2.OperationalError("no luck with aa*")

    assert explain(words, URL.replace(password="a*")).message == ""


def test_advice_depends_on_the_server() -> None:
    embedded = URL.replace(user="embedded")

    assert "manage.py postgres start" in advise(BY_NAME["nothing-listens"], embedded)
    assert "manage.py postgres start" not in advise(BY_NAME["nothing-listens"], URL)
    assert NEON.pooled.host in advise(BY_NAME["server-full"], NEON)
    assert "-pooler" not in advise(BY_NAME["server-full"], NEON.pooled)


def test_findings_have_names_that_programs_can_compare() -> None:
    assert len(BY_NAME) == len(FINDINGS)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in BY_NAME)
    assert set(PAUSES) == set(Retry)


def test_public_messages_name_no_host_user_or_setting() -> None:
    assert not [f.public for f in FINDINGS if re.search(r"[A-Z_@`.]|neon|user|role", f.public)]
