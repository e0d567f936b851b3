"""Ctrl-C during a project's tests: they end soon, and leave nothing behind."""

import re
import time
from contextlib import suppress
from pathlib import Path

import pexpect
import psutil
import pytest

from machine import Project

SECONDS = 60  # for the tests to reach the point of interruption
END_SECONDS = 20  # generous: only detects a hang


def processes(temp: Path) -> list[str]:
    """Return the processes that run in a temporary folder, or were started with it as TMPDIR."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_there = process.cwd().startswith(str(temp))
            if is_there or process.environ().get("TMPDIR") == str(temp):
                found.append(" ".join(process.cmdline()))
    return found


def press_ctrl_c(
    project: Project, temp: Path, arguments: str, shown: str, seconds: float, **environment: str
) -> str:
    """Run pytest, press Ctrl-C seconds after a text is shown, and return the output after it."""
    terminal = pexpect.spawn(
        str(project.python),
        ["-m", "pytest", "--verbose", *arguments.split()],
        cwd=project.path,
        env={**project.environment, "TMPDIR": str(temp), **environment},
        encoding="utf-8",
        timeout=SECONDS,
        dimensions=(50, 200),
    )
    try:
        terminal.expect_exact(shown)
        time.sleep(seconds)
        terminal.sendintr()
        terminal.expect(pexpect.EOF, timeout=END_SECONDS)
    finally:
        terminal.close(force=True)
    return terminal.before or ""


@pytest.mark.parametrize(
    ("arguments", "shown", "seconds"),
    [
        ("tests postgres/tests", "test session starts", 1.0),  # while the server starts
        ("-n2 postgres/tests", "PASSED", 0.0),
        ("-n0 tests", "PASSED", 0.0),
        # The server is frozen when Ctrl-C comes.
        ("postgres/tests/test_connect.py -k check", "alembic_version-schema]", 0.5),
        # The command stops with "nothing was copied", but the tests must end, too.
        ("tests/test_copying.py -k freezes", "ends_the_copy_in_time[target]", 0.7),
    ],
    ids=["at the start", "in parallel", "one by one", "in a check", "in a copy"],
)
def test_ctrl_c_ends_the_tests_and_leaves_nothing(
    project: Project, tmp_path: Path, arguments: str, shown: str, seconds: float
) -> None:
    output = press_ctrl_c(project, tmp_path, arguments, shown, seconds)

    assert re.search("!! (KeyboardInterrupt|Interrupted: Ctrl-C) !!", output)
    assert processes(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir() if "pytest-of" not in path.name] == []


SLOW_END = """
import time
from contextlib import contextmanager

import pytest
from postgres.tests import servers

temporary_server = servers.temporary_server


@contextmanager
def slow_server(**settings):
    with temporary_server(**settings) as url:
        yield url
        time.sleep(3)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish():
    time.sleep(3)
    return (yield)


servers.temporary_server = slow_server
"""
SLOW_TESTS = """
import time


def test_without_a_server(request):
    print("begun", flush=True)
    end = time.monotonic() + 20
    while not request.session.shouldstop and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)


def test_with_a_server(embedded_server, request):
    test_without_a_server(request)
"""


@pytest.mark.parametrize("test", ["test_without_a_server", "test_with_a_server"])
def test_ctrl_c_does_not_interrupt_what_follows_the_last_test(
    project: Project, tmp_path: Path, test: str
) -> None:
    (tmp_path / "slow_end.py").write_text(SLOW_END)
    (tmp_path / "test_slow.py").write_text(SLOW_TESTS)
    arguments = f"-c pyproject.toml -s -p slow_end {tmp_path}/test_slow.py::{test}"

    output = press_ctrl_c(project, tmp_path, arguments, "begun", 0.0, PYTHONPATH=str(tmp_path))

    assert "!! Interrupted: Ctrl-C !!" in output
    assert "Traceback" not in output
