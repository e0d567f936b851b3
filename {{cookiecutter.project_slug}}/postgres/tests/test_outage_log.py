"""Log messages when the database goes down and comes back."""

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from postgres import outage_log
from postgres.outage_log import Availability, look_once
from postgres.url import DatabaseUrl

URL = DatabaseUrl("ada", "correct horse", "db.example.com", 5432, "todo", ())
LOST = psycopg2.OperationalError("server closed the connection unexpectedly\n\tThis probably …")
WAKING = psycopg2.OperationalError("Couldn't connect to compute node")
FULL = psycopg2.errors.DiskFull("could not extend file: No space left on device")


@pytest.fixture
def log() -> Iterator[list[EventDict]]:
    with capture_logs() as lines:
        yield lines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], float]:
    """Replace the clock with one that a test moves forward."""
    now = 1000.0

    def let_pass(seconds: float) -> float:
        nonlocal now
        now += seconds
        return now

    monkeypatch.setattr(time, "monotonic", lambda: now)
    return let_pass


def events(log: list[EventDict]) -> list[tuple[str, Any]]:
    return [(line["event"], line.get("finding")) for line in log]


def test_an_outage_and_its_end_are_logged_once(
    log: list[EventDict], clock: Callable[[float], float]
) -> None:
    database = Availability(URL)

    for _ in range(50):
        database.lost(LOST)
        clock(1)
    database.back(began=clock(1))
    database.back(began=clock(1))

    assert events(log) == [("database lost", "connection-lost"), ("database back", None)]
    assert log[1]["after_s"] == 51
    assert log[1]["failed"] == 50


def test_the_log_has_cause_advice_and_error_without_secrets(log: list[EventDict]) -> None:
    Availability(URL).lost(psycopg2.OperationalError("sorry, correct horse, too many clients"))

    (line,) = log
    assert line["finding"] == "server-full"
    assert line["database"] == "db.example.com:5432"
    assert line["advice"]
    assert line["error"] == "sorry, ***, too many clients"


def test_another_cause_during_an_outage_is_logged(
    log: list[EventDict], clock: Callable[[float], float]
) -> None:
    database = Availability(URL)

    for failure in (LOST, WAKING, LOST, WAKING):
        database.lost(failure)
        clock(60)

    assert [line["finding"] for line in log] == ["connection-lost", "waking-up"]


def test_an_unstable_connection_does_not_flood_the_log(
    log: list[EventDict], clock: Callable[[float], float]
) -> None:
    database = Availability(URL)

    for _ in range(300):
        database.lost(LOST)
        database.back(began=clock(0.1))

    assert len(log) <= 2 * (30 / outage_log.QUIET_SECONDS + 1)


def test_a_query_that_started_before_the_outage_does_not_end_it(
    log: list[EventDict], clock: Callable[[float], float]
) -> None:
    database = Availability(URL)
    began = clock(0)
    clock(1)

    database.lost(LOST)
    database.back(began)

    assert [line["event"] for line in log] == ["database lost"]


def test_nothing_is_logged_while_the_database_is_available(log: list[EventDict]) -> None:
    database = Availability(URL)

    database.back(began=time.monotonic())

    assert log == []


def test_a_refused_request_is_not_an_outage_and_is_logged_at_most_once_a_minute(
    log: list[EventDict], clock: Callable[[float], float]
) -> None:
    database = Availability(URL)

    for _ in range(90):
        database.lost(RuntimeError("all connections are in use"))
        database.back(began=clock(1))

    assert events(log) == [("database refuses", "pool-exhausted")] * 2


@pytest.fixture
def away(server: DatabaseUrl) -> Iterator[DatabaseUrl]:
    """A database that is down: nothing listens on its port, which is reserved."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield server.replace(port=reserved.getsockname()[1])


def test_a_single_check_logs_what_is_wrong(away: DatabaseUrl, log: list[EventDict]) -> None:
    look_once(away, list).join(timeout=30)

    (line,) = log
    assert (line["event"], line["finding"]) == ("database not ready", "nothing-listens")


def test_a_single_check_of_a_healthy_database_logs_nothing(
    new_database: Callable[[], DatabaseUrl], log: list[EventDict]
) -> None:
    look_once(new_database(), list).join(timeout=30)

    assert log == []
