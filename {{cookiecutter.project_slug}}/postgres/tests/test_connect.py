"""Connecting and checking: waits, retries and timeouts."""

import asyncio
import socket
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from postgres import check as check_module
from postgres import connect
from postgres.check import Check, check_connection
from postgres.connect import TimeBudget, abort, log_in
from postgres.embedded import temporary_server
from postgres.engine import open_engine
from postgres.tests.asking import scalar
from postgres.tests.scripted_server import SILENCE, error, scripted_server
from postgres.tests.servers import connected, create_database
from postgres.url import DatabaseUrl, parse

WAKING = error("Couldn't connect to compute node")
REFUSED = error("password authentication failed for user 'ada'")


@pytest.fixture(scope="module")
def plain(embedded_server: DatabaseUrl) -> DatabaseUrl:
    """A database at revision 1 without TLS, so that a scripted server can be in front of it."""
    url = create_database(embedded_server)
    with connected(url) as cursor:
        cursor.execute("CREATE TABLE alembic_version AS SELECT '1' version_num")
    return url


def history() -> list[str]:
    return ["1"]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses and step timeouts."""
    pauses = {
        retry: tuple(pause / 20 for pause in pauses) for retry, pauses in connect.PAUSES.items()
    }
    monkeypatch.setattr(connect, "PAUSES", pauses)
    monkeypatch.setattr(connect, "STEP_SECONDS", 0.3)


def check(url: DatabaseUrl) -> tuple[dict[str, Check], list[float]]:
    """Return the steps by name, and the seconds that on_wait was called with."""
    waits: list[float] = []
    return {step.name: step for step in check_connection(url, history, waits.append)}, waits


def failed(steps: dict[str, Check]) -> tuple[str, str]:
    """Return the step that failed, and the finding's name."""
    (step,) = (step for step in steps.values() if step.ok is False)
    assert step.finding
    return step.name, step.finding.name


def test_all_steps_pass_on_a_healthy_database(plain: DatabaseUrl) -> None:
    steps, _ = check(plain)

    assert list(steps) == list(check_module.STEPS)
    assert all(step.ok for step in steps.values())


def test_after_a_failed_step_the_others_are_skipped(plain: DatabaseUrl) -> None:
    steps, _ = check(plain.replace(password="wrong"))

    assert failed(steps) == ("login", "login-refused")
    assert [step.name for step in steps.values() if step.ok is None] == [
        "database",
        "endpoint",
        "schema",
    ]


@pytest.mark.usefixtures("hurried")
def test_the_check_waits_for_a_waking_compute(plain: DatabaseUrl) -> None:
    with scripted_server(WAKING, WAKING, behind=plain) as server:
        steps, _ = check(plain.replace(port=server.port))

    assert all(step.ok for step in steps.values()), steps
    assert server.log_ins == 3


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("words", "attempts"),
    [
        ("password authentication failed for user 'ada'", 1),
        ("Control plane request failed: endpoint is temporarily unavailable. …", 2),
        ("Couldn't connect to compute node", 6),
        ("Too many connections attempts", 6),
        ("no more connections allowed (max_client_conn)", 3),
        ("the flux capacitor is out of tune", 1),
    ],
)
def test_an_attempt_is_retried_if_that_can_help(
    plain: DatabaseUrl, words: str, attempts: int
) -> None:
    with scripted_server(error(words)) as server:
        steps, _ = check(plain.replace(port=server.port))

    assert failed(steps)[0] == "login"
    assert server.log_ins == attempts


def test_pauses_grow_and_stay_within_bounds(
    plain: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(TimeBudget, "_sleep", lambda _self, seconds: slept.append(seconds))

    with scripted_server(WAKING) as server, pytest.raises(psycopg2.OperationalError):
        log_in(plain.replace(port=server.port))

    longest = [0.25, 0.5, 1.0, 2.0, 4.0]
    assert all(end / 2 <= pause <= end for pause, end in zip(slept, longest, strict=True)), slept


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("silent_after", "step"),
    [(b"current_setting", "database"), (b"alembic_version", "schema")],
)
def test_the_check_ends_if_the_server_freezes_after_login(
    plain: DatabaseUrl, monkeypatch: pytest.MonkeyPatch, silent_after: bytes, step: str
) -> None:
    monkeypatch.setattr(check_module, "QUERY_SECONDS", 1.0)

    with scripted_server(behind=plain) as server:
        server.freezes_at = silent_after
        steps, _ = check(plain.replace(port=server.port))

    assert failed(steps) == (step, "no-answer")


@pytest.mark.timeout(20, method="thread")  # a signal would not end a hang here
def test_ctrl_c_ends_the_check_of_a_server_that_freezes(plain: DatabaseUrl) -> None:
    def press_ctrl_c(_seconds: float) -> None:
        raise KeyboardInterrupt

    with scripted_server(behind=plain) as server:
        server.freezes_at = b"current_setting"
        checks = check_connection(plain.replace(port=server.port), history, press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            list(checks)


@pytest.mark.usefixtures("hurried")
def test_a_server_that_does_not_answer_a_login_ends_the_check(
    plain: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "LOG_IN_SECONDS", 2.0)
    monkeypatch.setattr(connect, "TOTAL_SECONDS", 1.5)

    with scripted_server(SILENCE) as server:
        steps, waits = check(plain.replace(port=server.port))

    assert failed(steps) == ("login", "no-answer")
    assert waits
    assert waits == sorted(waits)


@pytest.mark.usefixtures("hurried")
def test_a_server_that_does_not_answer_the_tls_request_ends_the_check(
    plain: DatabaseUrl,
) -> None:
    with scripted_server(SILENCE) as server:
        server.is_frozen = True
        steps, _ = check(plain.replace(port=server.port))

    assert failed(steps) == ("TLS", "no-answer")


@pytest.mark.usefixtures("hurried")
def test_a_name_server_that_does_not_answer_ends_the_check(
    plain: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "resolve", lambda _url: time.sleep(30))

    steps, _ = check(plain)

    assert failed(steps) == ("DNS", "host-unknown")


@pytest.mark.usefixtures("hurried")
def test_an_invalid_host_name_is_an_unknown_host(plain: DatabaseUrl) -> None:
    steps, _ = check(plain.replace(host=f"{'x' * 70}.example.com"))

    assert failed(steps) == ("DNS", "host-unknown")


def test_an_error_is_reported_at_the_step_it_belongs_to(plain: DatabaseUrl) -> None:
    with scripted_server(error('database "x" does not exist')) as server:
        missing, _ = check(plain.replace(port=server.port))
    with scripted_server(error("connection is insecure (try using `sslmode=require`)")) as server:
        insecure, _ = check(plain.replace(port=server.port))
    with scripted_server(error("pool statement timeout")) as server:
        cut_off, _ = check(plain.replace(port=server.port))

    assert failed(missing) == ("database", "database-missing")
    assert missing["login"].ok
    assert failed(insecure) == ("TLS", "tls-required")
    assert failed(cut_off) == ("login", "query-cancelled")


def test_a_read_only_server_is_reported(plain: DatabaseUrl) -> None:
    options = (*plain.options, ("options", "-c default_transaction_read_only=on"))

    steps, _ = check(plain.replace(options=options))

    assert failed(steps) == ("database", "read-only")


def test_a_server_that_is_too_old_is_reported(
    plain: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "OLDEST_VERSION", 99)

    steps, _ = check(plain)

    assert failed(steps) == ("database", "server-too-old")


def test_a_database_that_is_newer_than_the_code_is_reported(plain: DatabaseUrl) -> None:
    steps = {step.name: step for step in check_connection(plain, lambda: ["0000"], print)}

    assert failed(steps) == ("schema", "schema-ahead")


def test_migrations_that_cannot_be_read_are_reported(plain: DatabaseUrl) -> None:
    def history() -> list[str]:
        raise SyntaxError("invalid syntax (0002_add_colour.py, line 7)")

    steps = {step.name: step for step in check_connection(plain, history, print)}

    assert failed(steps) == ("schema", "migrations-broken")
    assert "0002_add_colour.py" in str(steps["schema"].finding)


@pytest.mark.parametrize(
    ("column", "detail"),
    [
        ("alembic_version.colour", "no migration creates the column alembic_version.colour"),
        ("parcels.colour", "no migration creates the table parcels"),
    ],
)
def test_models_without_a_migration_are_reported(
    plain: DatabaseUrl, column: str, detail: str
) -> None:
    def columns() -> list[str]:
        return ["alembic_version.version_num", column]

    steps = {step.name: step for step in check_connection(plain, history, print, columns)}

    assert failed(steps) == ("schema", "models-ahead")
    assert steps["schema"].detail == detail
    assert "uv run alembic revision --autogenerate" in steps["schema"].advice


@pytest.mark.parametrize(
    ("host", "detail", "advice"),
    [
        ("ep-a-b-c1.us-east-2.aws.neon.tech", "direct", "ep-a-b-c1-pooler.us-east-2.aws.neon.tech"),
        ("ep-a-b-c1-pooler.us-east-2.aws.neon.tech", "ep-a-b-c1.us-east-2.aws.neon.tech", ""),
        ("db.example.com", "direct", ""),
    ],
)
def test_the_app_should_use_the_pooled_endpoint_and_migrations_use_the_direct_one(
    host: str, detail: str, advice: str
) -> None:
    found, advised = check_module.describe_endpoint(DatabaseUrl("ada", "", host, 5432, "todo", ()))

    assert detail in found
    assert (advice in advised) if advice else not advised


def test_one_reachable_address_is_enough(plain: DatabaseUrl) -> None:
    """For example, if a host also has an IPv6 address, but only IPv4 works."""
    closed = ("127.0.0.2", 1)

    stream, (_, address) = connect.open_socket(
        [(socket.AF_INET, closed), (socket.AF_INET, (plain.host, plain.port))]
    )
    stream.close()

    assert address == (plain.host, plain.port)


def test_a_wait_can_be_aborted(plain: DatabaseUrl) -> None:
    with closing(psycopg2.connect(plain.for_libpq())) as connection:
        budget = TimeBudget(plain, lambda _seconds: None, 10)
        try:
            with pytest.raises(TimeoutError):
                budget.run(lambda: connection.cursor().execute("SELECT pg_sleep(60)"), 0.2)
        finally:  # otherwise close() would wait for the statement, also after Ctrl-C
            abort(connection)

        with pytest.raises(psycopg2.Error):  # at once: the connection is free again
            connection.cursor().execute("SELECT 1")


def test_exceptions_of_the_work_are_passed_on(plain: DatabaseUrl) -> None:
    with pytest.raises(ZeroDivisionError):
        TimeBudget(plain, print, 10).run(lambda: 1 / 0, 5)


@pytest.mark.skipif(sys.platform == "win32", reason="no Unix sockets")
def test_a_socket_is_a_host() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as root:  # a short path
        folder = Path(root, "my-proj:europe-west3:inst")  # as Cloud SQL names it
        folder.mkdir()
        for each in (folder, folder.parent):  # for the server, which root starts as another user
            each.chmod(0o777)
        with temporary_server(unix_socket_directories=str(folder)) as server:
            login = f"postgresql://{server.user}:{server.password}"
            url = parse(f"{login}@/{server.database}?host={folder}&port={server.port}")

            async def use() -> object:
                async with open_engine(url) as engine:
                    return await scalar(engine, "SELECT inet_server_addr()")

            steps, _ = check(url)

            assert asyncio.run(use()) is None  # it is not TCP
            assert steps["login"].ok
