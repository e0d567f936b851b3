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


@pytest.mark.parametrize(
    ("arguments", "shown", "seconds"),
    [
        ("tests postgres/tests", "test session starts", 1.0),  # while the server starts
        ("-n2 postgres/tests", "PASSED", 0.0),
        ("-n0 tests", "PASSED", 0.0),
        # The server is frozen when Ctrl-C comes.
        ("postgres/tests/test_connect.py -k freezes_after", "alembic_version-schema]", 0.5),
        # The command stops with "nothing was copied", but the tests must end, too. If this one has
        # ended already, the next one runs.
        ("tests/test_copying.py -k freezes_ends_the_copy", "ends_the_copy_in_time[source]", 1.0),
    ],
    ids=["at the start", "in parallel", "one by one", "in a check", "in a copy"],
)
def test_ctrl_c_ends_the_tests_and_leaves_nothing(
    project: Project, tmp_path: Path, arguments: str, shown: str, seconds: float
) -> None:
    terminal = pexpect.spawn(
        str(project.python),
        ["-m", "pytest", "--verbose", *arguments.split()],
        cwd=project.path,
        env={**project.environment, "TMPDIR": str(tmp_path)},
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

    assert re.search("!! (KeyboardInterrupt|Interrupted: Ctrl-C) !!", terminal.before or "")
    assert processes(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir() if "pytest-of" not in path.name] == []
