"""End-to-end tests with the default answers: what the README promises."""

import json
import os
import re
import secrets
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest
from filelock import FileLock

from machine import UV, Outcome, Project
from postgres_server import free_port

STEPS = ["dependencies", "settings", "database", "schema", "connection", "git"]


class Served:
    """The app as `uv run main.py` serves it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str) -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.load(response)
        finally:
            connection.close()

    def status(self, path: str) -> int:
        """Return the status, or 0 if nothing listens."""
        try:
            return self.get(path)[0]
        except OSError:
            return 0

    def wait_for(self, path: str, status: int, seconds: float) -> float:
        """Wait for a response with this status. Returns the seconds it took."""
        start = time.monotonic()
        while (answered := self.status(path)) != status:
            assert time.monotonic() - start < seconds, f"{path} answers {answered}"
            time.sleep(0.05)
        return time.monotonic() - start


@contextmanager
def serving(project: Project) -> Iterator[Served]:
    """Run `uv run main.py`, and press Ctrl-C at the end."""
    port = free_port()
    process = subprocess.Popen(
        [UV, "run", "main.py"],
        cwd=project.path,
        env=project.environment | {"PORT": str(port)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C reaches exactly its processes
    )
    try:
        served = Served(port)
        served.wait_for("/health", 200, seconds=60)
        yield served
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def served(project: Project) -> Iterator[Served]:
    with serving(project) as served:
        yield served


def postgres(project: Project, command: str) -> Outcome:
    return project.run("uv", "run", "manage.py", "postgres", command)


def test_every_step_is_shown_with_its_time(generated: Outcome) -> None:
    shown = re.findall(r"^✓ (.+) \(\d+\.\d s\)$", generated.output, re.MULTILINE)

    assert shown == STEPS


def test_the_output_ends_with_commands(generated: Outcome) -> None:
    _, _, end = generated.output.partition("It is ready. Type:")

    lines = [line.strip() for line in end.splitlines() if line.startswith("    ")]
    assert [line for line in lines if not line.startswith(("#", "python3"))] == [
        f"cd {generated.project.path}",
        "uv run main.py",
        "uv run pytest",
    ]


def test_the_output_is_plain_if_it_is_not_a_terminal(generated: Outcome) -> None:
    assert re.findall(r"[^\n -~✓✗…-]", generated.output) == []


def test_the_embedded_server_runs_after_generation(project: Project) -> None:
    assert postgres(project, "status").code == 0


def test_only_its_owner_can_read_the_env_file(project: Project) -> None:
    assert stat.S_IMODE((project.path / ".env").stat().st_mode) == 0o600


def test_each_project_gets_its_own_secret(project: Project) -> None:
    secret = re.search(r"^BETTER_AUTH_SECRET=(\S{64})$", project.read(".env"), re.MULTILINE)

    assert secret is not None
    assert secret[1] not in project.read(".env.example")


def test_the_first_commit_contains_the_lock_file_but_not_the_settings(project: Project) -> None:
    committed = project.git("ls-tree", "-r", "--name-only", "HEAD").splitlines()

    assert "uv.lock" in committed
    assert ".env" not in committed
    assert ".env.example" in committed


def test_nothing_is_left_to_commit(project: Project) -> None:
    assert project.git("status", "--porcelain") == ""
    assert project.git("rev-list", "--count", "HEAD").strip() == "1"


def test_the_projects_types_fit(project: Project, mypy_lock: FileLock) -> None:
    with mypy_lock:
        outcome = project.run("uv", "run", "mypy", ".")

    assert outcome.code == 0, outcome.output


@pytest.mark.timeout(660)
def test_the_projects_tests_pass_with_new_hypothesis_examples(project: Project) -> None:
    """In a project, Hypothesis always tries the same examples. Here it looks for new ones."""
    seed = secrets.randbelow(2**32)
    search = f"--hypothesis-profile=random --hypothesis-seed={seed}"

    # Two workers, not the usual four: each imports the app and collects all tests.
    command = ("uv", "run", "pytest", "--quiet", "-n", "2", *search.split())
    outcome = project.run(*command, seconds=600)

    assert outcome.code == 0, f"uv run pytest {search}\n{outcome.output}"


def test_health_reports_app_and_version(served: Served) -> None:
    assert served.get("/health") == (
        200,
        {"status": "ok", "app": "Todo Backend", "version": "0.1.0"},
    )


def test_ready_follows_the_database(project: Project, served: Served) -> None:
    served.wait_for("/ready", 200, seconds=10)

    postgres(project, "stop")
    away_after = served.wait_for("/ready", 503, seconds=10)
    postgres(project, "start")

    assert away_after < 2
    served.wait_for("/ready", 200, seconds=10)


def test_main_starts_a_stopped_embedded_server(project: Project) -> None:
    postgres(project, "stop")

    with serving(project) as served:
        served.wait_for("/ready", 200, seconds=10)
