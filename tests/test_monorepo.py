"""A project in a subfolder of a repository: workflow, dependency updates, git hooks."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from machine import UV, Outcome, Project, new_machine, run

PROGRAMS = Path(sys.executable).parent
SECONDS = 120


@pytest.fixture(scope="module")
def generated_inside(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """A project generated as `backend/`, beside a front end."""
    with new_machine(tmp_path_factory.mktemp("monorepo") / "machine", template) as machine:
        machine.environment["PATH"] = os.pathsep.join(
            [str(Path(UV).parent), machine.environment["PATH"]]
        )
        subprocess.run(["git", "init", "--quiet", machine.work], check=True)
        (machine.work / "frontend").mkdir()
        (machine.work / "frontend" / "package.json").write_text("{}\n", "utf-8")
        outcome = machine.generate("project_slug=backend", slug="backend")
        assert outcome.code == 0, outcome.output
        yield outcome


@pytest.fixture(scope="module")
def backend(generated_inside: Outcome) -> Project:
    return generated_inside.project


@pytest.fixture(scope="module")
def root(backend: Project) -> Project:
    """The repository after running the commands of docs/monorepo.md at its root."""
    root = Project(backend.path.parent, backend.environment)
    script = re.search(r"(?ms)^```shell\n(.*?)^```", backend.read("docs/monorepo.md"))
    assert script is not None
    done = run(["bash", "-euc", script[1]], root, seconds=SECONDS)
    assert done.code == 0, done.output
    root.git("add", "--all")
    root.git("commit", "--quiet", "--no-verify", "--message", "Add the backend")
    return root


def read_yaml(project: Project, name: str) -> Any:
    return yaml.safe_load(project.read(name))


def check_schema(project: Project, schema: str, name: str) -> Outcome:
    command = [str(PROGRAMS / "check-jsonschema"), "--builtin-schema", schema, name]
    return run(command, project, seconds=SECONDS)


def find_risks(project: Project, *names: str) -> Outcome:
    command = [str(PROGRAMS / "zizmor"), "--offline", "--no-progress", "--persona=pedantic", *names]
    return run(command, project, seconds=SECONDS)


def test_no_nested_repository_is_created_and_the_output_says_how_to_commit(
    generated_inside: Outcome,
) -> None:
    assert not (generated_inside.project.path / ".git").exists()
    assert re.search(r"- git: .*git add \. && git commit", generated_inside.output)


def test_the_database_runs_and_the_check_passes(backend: Project) -> None:
    outcome = backend.run("uv", "run", "manage.py", "check")

    assert outcome.code == 0, outcome.output


def test_secrets_and_data_are_not_committed_to_the_outer_repository(root: Project) -> None:
    committed = root.git("ls-files").splitlines()

    assert "backend/uv.lock" in committed
    assert "backend/.env.example" in committed
    kept_out = re.compile(r"backend/(\.env$|\.venv/|\.postgres/|.*_cache/|.*__pycache__/)")
    assert [name for name in committed if kept_out.match(name)] == []
    assert root.git("status", "--porcelain") == ""


def test_the_workflow_at_the_root_runs_in_the_folder(root: Project) -> None:
    workflow = read_yaml(root, ".github/workflows/backend.yml")
    (job,) = workflow["jobs"].values()
    setup = next(step for step in job["steps"] if "setup-uv" in step.get("uses", ""))

    assert workflow["defaults"]["run"]["working-directory"] == "backend"
    assert setup["with"]["working-directory"] == "backend"
    assert "working-directory: ." not in root.read(".github/workflows/backend.yml")


def test_the_workflow_runs_the_same_checks_as_developers(root: Project, backend: Project) -> None:
    (job,) = read_yaml(root, ".github/workflows/backend.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step and "id" not in step]

    assert commands == ["uv sync", "uv run poe ci"]
    listed = backend.run("uv", "run", "poe", "--dry-run", "ci").output
    for program in ("ruff check", "ruff format --check", "mypy .", "pytest"):
        assert program in listed


def test_the_workflow_at_the_root_is_valid(root: Project) -> None:
    outcome = check_schema(root, "vendor.github-workflows", ".github/workflows/backend.yml")

    assert outcome.code == 0, outcome.output


def test_the_dependabot_configuration_is_valid(root: Project) -> None:
    page = root.read("backend/docs/monorepo.md")
    lines = re.search(r"(?ms)^```yaml\n(.*?)^```", page)
    assert lines is not None
    (root.path / ".github" / "dependabot.yml").write_text(
        f"version: 2\nupdates:\n{lines[1]}", "utf-8"
    )

    outcome = check_schema(root, "vendor.dependabot", ".github/dependabot.yml")

    updates = read_yaml(root, ".github/dependabot.yml")["updates"]
    assert outcome.code == 0, outcome.output
    assert [update["package-ecosystem"] for update in updates] == ["uv", "docker", "docker-compose"]
    assert {update["directory"] for update in updates} == {"/backend"}
    assert all(update["cooldown"] == {"default-days": 7} for update in updates)


def test_zizmor_finds_no_risk_at_the_root(root: Project) -> None:
    outcome = find_risks(root, ".github")

    assert outcome.code == 0, outcome.output
    assert "No findings to report" in outcome.output


def test_a_commit_that_fails_ruff_is_rejected(root: Project) -> None:
    file = root.path / "backend" / "hasty.py"
    file.write_text("import os\nx = ( 1)\n", "utf-8")
    root.git("add", "backend/hasty.py")

    refused = root.run("git", "commit", "--message", "Hasty")
    file.write_text('"""Not hasty any more."""\n', "utf-8")
    root.git("add", "backend/hasty.py")
    taken = root.run("git", "commit", "--message", "Less hasty")

    assert refused.code != 0
    assert "F401" in refused.output
    assert taken.code == 0, taken.output


def test_a_commit_of_the_front_end_skips_the_checks(root: Project) -> None:
    (root.path / "frontend" / "index.ts").write_text("export {};\n", "utf-8")
    root.git("add", "frontend")

    taken = root.run("git", "commit", "--message", "Front end")

    assert taken.code == 0, taken.output
    assert "Passed" not in taken.output


def test_a_push_runs_all_checks_and_is_rejected_if_one_fails(root: Project, tmp_path: Path) -> None:
    remote, log, uv = tmp_path / "remote", tmp_path / "log", tmp_path / "bin" / "uv"
    root.git("init", "--quiet", "--bare", str(remote))
    uv.parent.mkdir()
    path = os.pathsep.join([str(uv.parent), root.environment["PATH"]])
    pusher = Project(root.path, root.environment | {"PATH": path})
    push = ("git", "push", str(remote), "HEAD:refs/heads/main")

    outcomes = []
    for code in (1, 0):  # exit codes of the checks
        uv.write_text(f'#!/bin/sh\necho "$*" >> {shlex.quote(str(log))}\nexit {code}\n', "utf-8")
        uv.chmod(0o755)
        outcomes.append(pusher.run(*push))

    refused, taken = outcomes
    assert refused.code != 0
    assert taken.code == 0, taken.output
    assert root.git("ls-remote", str(remote), "main") != ""
    commands = [f"run --directory backend poe {task}" for task in ("types", "test")]
    assert log.read_text("utf-8").splitlines() == 2 * commands


def test_a_project_can_be_a_member_of_a_uv_workspace(root: Project, backend: Project) -> None:
    pyproject = '[tool.uv.workspace]\nmembers = ["backend"]\n'
    (root.path / "pyproject.toml").write_text(pyproject, "utf-8")
    try:
        outcome = backend.run("uv", "run", "manage.py", "check")
    finally:
        (root.path / "pyproject.toml").unlink()

    assert outcome.code == 0, outcome.output
