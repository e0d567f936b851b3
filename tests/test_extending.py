"""Documentation for developers of a project, with docs/extending.md followed exactly.

A step is a code block in docs/extending.md. The sentence before it says where the code goes. In a
diff, "@@" starts another place in the same file.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from markdown_it import MarkdownIt

from app_server import app_server
from machine import Project

SECTIONS = [
    "A table",
    "A field of a task",
    "A route",
    "A route with a session",
    "A setting",
    "Another name",
    "A migration by hand",
]
PLACE = re.compile(r"(?P<how>[Ii]n|a new file|at the end of) `(?P<path>[\w./]+)`")
# The project's tests that the additions affect.
TOUCHED = (
    "every_field or a_new_task or effort or summary or duplicate or support or every_setting"
    " or openapi or operator or test_lists or test_models or test_errors"
)


@dataclass(frozen=True)
class Step:
    """A code block. where: the sentence before it."""

    section: str
    where: str
    language: str
    code: str


def read_steps(page: str) -> list[Step]:
    steps, section, heading, where = [], "", False, ""
    for token in MarkdownIt().parse(page):
        if token.type == "heading_open":
            heading = token.tag == "h2"
        elif token.type == "inline" and heading:
            section, heading = token.content, False
        elif token.type == "inline":
            where = token.content
        elif token.type == "fence":
            steps.append(Step(section, where, token.info, token.content))
    return steps


def apply(difference: str, text: str) -> str:
    """Apply a diff without line numbers. Each hunk must match exactly once."""
    for hunk in filter(None, re.split(r"(?m)^@@.*\n", difference)):
        lines = hunk.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        assert text.count(before) == 1, f"found {text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    return text


def take(step: Step, project: Project) -> None:
    """Carry out a step."""
    if step.language == "shell":
        for line in step.code.splitlines():
            outcome = project.run(*shlex.split(line, comments=True))
            assert outcome.code == 0, outcome.output
        return
    *_, place = PLACE.finditer(step.where)
    file = project.path / place["path"]
    if file.is_dir():
        file = max(file.glob("*.py"), key=lambda path: path.stat().st_mtime)
    if step.language == "diff":
        file.write_text(apply(step.code, file.read_text("utf-8")), "utf-8")
    elif place["how"] == "a new file":
        assert not file.exists()
        file.write_text(step.code, "utf-8")
    else:
        assert place["how"] == "at the end of"
        file.write_text(f"{file.read_text('utf-8')}\n\n{step.code}", "utf-8")


@pytest.fixture(scope="module")
def steps(project: Project) -> list[Step]:
    return read_steps(project.read("docs/extending.md"))


@pytest.fixture(scope="module")
def extended(
    project: Project, steps: list[Step], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """A copy of the project with its own database, after all steps."""
    copy = project.copy(tmp_path_factory.mktemp("extended") / "project", ".git")
    assert copy.run("uv", "run", "manage.py", "env", "--local").code == 0
    try:
        for step in steps:
            if step.section:
                take(step, copy)
        copy.run("uv", "run", "poe", "fix")  # as the page says
        yield copy
    finally:
        copy.run("uv", "run", "manage.py", "postgres", "stop")


def test_the_page_covers_every_kind_of_addition(steps: list[Step]) -> None:
    assert list(dict.fromkeys(step.section for step in steps if step.section)) == SECTIONS


def test_every_module_is_in_the_map_in_agents_md(project: Project) -> None:
    named = set(re.findall(r"`(\w+(?:\.py|/))`", project.read("AGENTS.md")))

    modules = {file.name for file in project.path.glob("*.py")}
    packages = {f"{file.parent.name}/" for file in project.path.glob("[a-z]*/__init__.py")}
    assert {"main.py", "postgres/"} <= modules | packages
    assert (modules | packages) - named == set()


def test_the_root_has_at_most_ten_modules(project: Project) -> None:
    assert 5 < len(list(project.path.glob("*.py"))) <= 10


def test_every_task_in_the_documentation_exists(project: Project) -> None:
    tasks = tomllib.loads(project.read("pyproject.toml"))["tool"]["poe"]["tasks"]
    places = ["README.md", "AGENTS.md", "docs/extending.md", ".pre-commit-config.yaml"]
    places += [".github/workflows/ci.yml"]

    named = {
        place: re.findall(r"(?:run|·|directory \.) poe (\w+)", project.read(place))
        for place in places
    }

    assert all(named.values())
    assert {task for names in named.values() for task in names} <= tasks.keys()


def test_claude_md_imports_an_existing_page(project: Project) -> None:
    (page,) = re.findall(r"^@(\S+)$", project.read("CLAUDE.md"), re.MULTILINE)

    assert (project.path / page).is_file()


@pytest.mark.parametrize("task", ["lint", "types", "migrations"])
def test_the_checks_pass(extended: Project, task: str, mypy_lock: FileLock) -> None:
    with mypy_lock if task == "types" else nullcontext():
        outcome = extended.run("uv", "run", "poe", task)

    assert outcome.code == 0, outcome.output


def test_the_tests_pass(extended: Project) -> None:
    outcome = extended.run("uv", "run", "pytest", "--quiet", "-k", TOUCHED)

    assert outcome.code == 0, outcome.output
    assert re.search(r"^\d+ passed, ", outcome.output, re.MULTILINE), outcome.output


def test_the_api_serves_the_additions(extended: Project, tmp_path: Path) -> None:
    url = re.search(r"^DATABASE_URL=(\S+)$", extended.read(".env"), re.MULTILINE)
    assert url is not None

    with app_server(extended, url[1], tmp_path / "log") as app:
        token = app.register()
        created = app.request("POST", "/tasks", {"title": "Paint", "effort": 90}, token=token)
        listed = app.request("GET", "/tasks", token=token)
        summary = app.request("GET", "/summary", token=token)
        duplicate = app.request("POST", f"/tasks/{created.body['id']}/duplicate", token=token)

    assert created.status == 201, created.body
    assert [task["effort"] for task in listed.body] == [90]
    assert summary.body == {"tasks": 1, "completed": 0}
    assert duplicate.status == 201, duplicate.body
    assert duplicate.body["effort"] == 90
