"""Move a project with its data from the embedded database to Neon with one command."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pexpect
import pytest

from app_server import app_server
from machine import Project
from neon_proxy import Endpoint, NeonProxy, Reply, neon_proxy
from neon_proxy.mishaps import QUOTA

SECONDS = 60  # timeout of a command


@pytest.fixture(scope="module")
def neon() -> Iterator[NeonProxy]:
    with neon_proxy() as neon:
        yield neon


@pytest.fixture
def endpoint(neon: NeonProxy) -> Endpoint:
    return neon.new_endpoint()


@pytest.fixture(scope="module")
def at_work(project: Project, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An account with a task in the project's embedded database. Returns its name."""
    started = project.run("uv", "run", "manage.py", "postgres", "start")
    assert started.code == 0, started.output
    url = re.search(r"^DATABASE_URL=(\S+)$", project.read(".env"), re.MULTILINE)
    assert url is not None
    name = "mover"
    with app_server(project, url[1], tmp_path_factory.mktemp("before") / "log") as app:
        token = app.register(name)
        assert app.request("POST", "/tasks", {"title": "Move"}, token=token).status == 201
    return name


@pytest.fixture
def moving(project: Project, at_work: str, tmp_path: Path) -> Project:
    """A copy of the project on the same database, with an .env that a test may change."""
    assert at_work
    folder = tmp_path / "moving"
    shutil.copytree(project.path, folder, ignore=shutil.ignore_patterns(".venv", ".postgres"))
    return replace(project, path=folder)


def copy(project: Project, python: Path, *options: str) -> "pexpect.spawn[str]":
    """Type the command on a terminal, up to the question for the connection string."""
    terminal = pexpect.spawn(
        str(python),
        ["manage.py", "copy", *options],
        cwd=project.path,
        env=project.environment,
        encoding="utf-8",
        timeout=SECONDS,
        dimensions=(50, 200),
    )
    terminal.expect_exact("Connection string")
    return terminal


def test_after_the_copy_the_app_runs_on_neon_with_all_its_data(
    project: Project, moving: Project, at_work: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    terminal = copy(moving, project.python)
    terminal.sendline(f"psql '{endpoint.url()}'")
    terminal.expect_exact("Use this database from now on")
    before = terminal.before or ""
    terminal.sendline("y")
    output = before + terminal.read()
    terminal.close()
    check = replace(moving, environment=project.environment)

    assert terminal.exitstatus == 0, output
    assert endpoint.password not in output
    assert re.search(r"✓ tasks +\d+ rows?", output)
    assert f"DATABASE_URL={endpoint.url()}\n" in check.read(".env")
    with app_server(project, endpoint.url(), tmp_path / "log") as app:
        token = app.log_in(f"{at_work}@example.com")
        tasks = app.request("GET", "/tasks", token=token).body
    assert [task["title"] for task in tasks] == ["Move"]


def test_ctrl_c_at_the_last_question_says_that_the_data_was_copied(
    project: Project, moving: Project, endpoint: Endpoint
) -> None:
    before = moving.read(".env")

    terminal = copy(moving, project.python)
    terminal.sendline(endpoint.url())
    terminal.expect_exact("Use this database from now on")
    terminal.sendintr()
    output = terminal.read()
    terminal.close()

    assert terminal.exitstatus == 130, output
    assert "stopped: all rows are at " in output
    assert ".env names the old database" in output
    assert endpoint.password not in output
    assert moving.read(".env") == before


def test_ctrl_c_at_the_first_question_says_that_nothing_was_copied(
    project: Project, moving: Project
) -> None:
    terminal = copy(moving, project.python)
    terminal.sendintr()
    output = terminal.read()
    terminal.close()

    assert terminal.exitstatus == 130, output
    assert "stopped: nothing was copied" in output


def test_the_copy_bypasses_the_pooler(
    project: Project, moving: Project, endpoint: Endpoint
) -> None:
    environment = {**moving.environment, "TARGET_DATABASE_URL": endpoint.url()}

    outcome = replace(moving, environment=environment).run(str(project.python), "manage.py", "copy")

    assert outcome.code == 0, outcome.output
    pooled = {
        connection["pooled"]
        for connection in endpoint.show()["connections"][1:]  # the first one is the check's
    }
    assert pooled == {False}


def test_an_exceeded_quota_is_reported_and_nothing_is_lost(
    project: Project, moving: Project, endpoint: Endpoint
) -> None:
    endpoint.reply(Reply(QUOTA))
    before = moving.read(".env")

    terminal = copy(moving, project.python, "--switch")
    terminal.sendline(endpoint.url())
    output = terminal.read()
    terminal.close()

    assert terminal.exitstatus == 1
    assert "quota" in output
    assert "Traceback" not in output
    assert endpoint.password not in output
    assert moving.read(".env") == before
