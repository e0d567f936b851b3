"""A project of version 0.1.0 becomes one of today, as docs/upgrading.md says."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from machine import Project, new_machine, run
from postgres_server import Server
from repository import REPOSITORY
from stage import Stage

PAGE = (REPOSITORY / "docs" / "upgrading.md").read_text("utf-8")
OLD = "1ba71e6b4a8e3b01b9b80004fe17ed0e018e79d9"  # 0.1.0
NO_HISTORY = "the history of this clone does not reach back to 0.1.0"
DATABASE = (REPOSITORY / "tests" / "database_0_1_0.sql").read_text("utf-8")
REFRESH_TOKEN = "df458025c1b247f2a11fa086597c9269.WerrniCs9w4SoN-_hl6JkDjv5Zma7Dvt_EbCjyZpQZc"
# What a user has changed: a field, and a limit in a file that is elsewhere now.
FIELD = ("    due_at:", "    estimate: int | None = None\n    due_at:")
LIMIT = ("PER_ACCOUNT = RateLimitItemPerMinute(10,", "PER_ACCOUNT = RateLimitItemPerMinute(5,")


def test_a_database_of_0_1_0_keeps_accounts_tasks_and_login_sessions(
    project: Project, server: Server, tmp_path: Path
) -> None:
    stage = Stage(project, server, server.new_database(), tmp_path)
    stage.ask(DATABASE)

    migrated = stage.migrate()
    environment = {**project.environment, "DATABASE_URL": stage.url()}
    compared = Project(project.path, environment).run(str(project.python), "-m", "alembic", "check")
    with stage.app("app") as app:
        refreshed = app.request("POST", "/auth/refresh", {"refresh_token": REFRESH_TOKEN})
        tasks = app.request("GET", "/tasks?sort=created_at", token=app.log_in("ada@example.com"))

    assert migrated.code == 0, migrated.output
    assert compared.code == 0, compared.output
    assert refreshed.status == 200
    assert [task["title"] for task in tasks.body] == ["Buy milk", "買い物", " "]


@pytest.fixture(scope="module")
def updated(
    bare_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Project, str]]:
    """A project of 0.1.0 with a user's changes, updated as the page says; and what was printed."""
    command = ["git", "archive", OLD]
    archive = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True)
    if archive.returncode:
        pytest.skip(NO_HISTORY)
    with new_machine(tmp_path_factory.mktemp("upgrading") / "machine", bare_template) as machine:
        machine.environment["PATH"] = machine.path_with("uvx", f'exec {sys.executable} -m "$@"')
        template, project = machine.project("template"), machine.project()
        template.path.mkdir()
        subprocess.run(["tar", "-x"], check=True, cwd=template.path, input=archive.stdout)
        (template.path / "hooks" / "post_gen_project.py").unlink()
        commit(template, first=True)
        create = ["uvx", "cruft", "create", str(template.path), "--no-input"]
        outcome = run(create, project, folder=machine.work, seconds=60)
        assert outcome.code == 0, outcome.output
        commit(project, first=True)
        change(project.path / "models.py", FIELD)
        change(project.path / "passwords.py", LIMIT)
        commit(project)
        template.git("rm", "-rq", ".")
        shutil.copytree(bare_template, template.path, dirs_exist_ok=True)
        commit(template)

        (commands,) = re.findall(r"```shell\n(git switch.*?git merge .*?)```", PAGE, re.DOTALL)
        yield project, project.run("sh", "-c", commands).output


def commit(project: Project, *, first: bool = False) -> None:
    if first:
        project.git("init", "--quiet")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message", "Change")


def change(path: Path, words: tuple[str, str]) -> None:
    text = path.read_text("utf-8")
    assert words[0] in text
    path.write_text(text.replace(*words, 1), "utf-8")


def test_a_project_of_0_1_0_is_merged_with_its_users_changes(
    updated: tuple[Project, str],
) -> None:
    project, output = updated

    status = project.git("status", "--porcelain").splitlines()
    conflicts = [line for line in status if "U" in line[:2] or line[:2] in {"AA", "DD"}]

    assert conflicts == ["UD passwords.py"], output
    assert FIELD[1] in project.read("models.py")
    assert LIMIT[0] in project.read("auth/passwords.py")


def test_the_page_says_where_each_module_of_0_1_0_is(updated: tuple[Project, str]) -> None:
    project, _ = updated
    (section,) = re.findall(r"### Where modules are now\n(.*?)\n#", PAGE, re.DOTALL)
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    old = {name for before, _ in rows for name in re.findall(r"`([\w./]+)`", before)}
    new = {name for _, after in rows for name in re.findall(r"`([\w./]+)`", after)}

    only_gone = ("--no-renames", "--diff-filter=D", "--name-only")
    gone = project.git("diff", *only_gone, "HEAD~1", "template")

    assert {name for name in gone.split() if not name.startswith("tests/")} <= old
    assert [name for name in new if not (project.path / name).exists()] == []
