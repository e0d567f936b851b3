"""The last hook, as a module: what its steps promise beside what the command line shows."""

import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from repository import REPOSITORY, load_hook

ANSWERS = {"project_name": "Todo Backend", "project_slug": "todo-backend", "database": "local"}


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook, at work in a folder that holds what it reads."""
    example = REPOSITORY / "{{cookiecutter.project_slug}}" / ".env.example"
    (tmp_path / ".env.example").write_bytes(example.read_bytes())
    monkeypatch.chdir(tmp_path)
    return load_hook("post_gen_project")


def test_nothing_is_done_where_cruft_renders_in_passing(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passing = tmp_path / "tmp1234" / "todo-backend"
    passing.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(passing)

    hook.main(ANSWERS)

    assert list(passing.iterdir()) == []


def test_a_command_that_takes_too_long_is_stopped(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "LONGEST", 0.5)

    with pytest.raises(hook.StepFailed, match="too long"):
        hook.run(
            *(sys.executable, "-c"),
            "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)",
        )

    assert not psutil.pid_exists(int(Path("pid").read_text("utf-8")))


def test_a_daemon_that_keeps_the_output_open_is_not_waited_for(hook: ModuleType) -> None:
    start = time.monotonic()

    hook.run("sh", "-c", "sleep 5 & echo started")

    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    "name",
    [
        "APP_NAME",
        "DATABASE_URL",
        "FORCE_COLOR",
        "NEON_DATABASE_URL",
        "PORT",
        "PYENV_VERSION",
        "VIRTUAL_ENV",
    ],
)
def test_a_step_sees_no_setting_of_another_program(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "other")

    assert name not in hook.environment()


def test_a_step_sees_the_rest_of_the_environment(hook: ModuleType) -> None:
    assert hook.environment()["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "error: No interpreter found for Python >=3.14 in search path",
            "the Python of .python-version is not installed, and uv could not download it",
        ),
        (
            "cause: Failed to download `https://…/python-build-standalone/…`\ncause: dns error",
            "the Python of .python-version is not installed, and uv could not download it",
        ),
        (
            "cause: error sending request for url (https://…)",
            "the package index cannot be reached",
        ),
        (
            "hint: Packages were unavailable because the network was disabled.",
            "the package index cannot be reached",
        ),
        ("cause: No space left on device (os error 28)", "the disk is full"),
    ],
)
def test_words_of_uv_are_told_in_one_line(hook: ModuleType, output: str, reason: str) -> None:
    assert hook.reason(output) == reason


def test_what_has_no_meaning_yet_is_passed_on_as_it_ends(hook: ModuleType) -> None:
    output = "\n".join(f"line {number}" for number in range(9))

    assert hook.reason(output).split("\n    ") == [f"line {number}" for number in range(3, 9)]


def test_what_the_check_found_is_told_without_the_steps_that_passed(hook: ModuleType) -> None:
    output = """\
✓ settings  complete; DATABASE_URL comes from .env
✓ TCP       203.0.113.7:5432 answers after 21 ms
  waiting for the database, 1 s so far
✗ log-in    the plan's compute time is used up
          → wait for the next month
            error: ERROR: Your account or project has exceeded the compute time quota.
- not reached: database, endpoint, schema
"""

    assert hook.reason(output).split("\n    ") == [
        "log-in the plan's compute time is used up",
        "→ wait for the next month",
        "error: ERROR: Your account or project has exceeded the compute time quota.",
    ]


def test_a_full_disk_of_the_server_is_not_taken_for_one_of_this_machine(hook: ModuleType) -> None:
    output = "✗ 203.0.113.7:5432: the server's disk is full\n  error: No space left on device"

    assert hook.reason(output).startswith("203.0.113.7:5432: the server's disk")
