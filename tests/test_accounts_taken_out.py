"""Follow docs/accounts.md exactly, and run the checks of the resulting project.

A step is a code block, as in tests/test_extending.py, or a sentence that says what to delete.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from markdown_it import MarkdownIt

from machine import Project
from test_extending import Step, take

SECTIONS = ["Remove our own accounts", "Remove Better Auth"]
TEST_SECONDS = 360
# Words in the names of the tests about what a section changes. All tests run once a week.
AFFECTED = {
    "Remove our own accounts": "account or auth or migration or owner or test_openapi.py"
    " or test_settings.py or the_page or token or user",
    "Remove Better Auth": "auth_logs or deleted_account or good_token or log_in or mailbox"
    " or operator or owners_account or test_openapi.py or test_settings.py or the_page",
}
DELETION = re.compile(
    r"[Ii]n\s`(?P<path>[\w./]+)`,\sdelete\sthe\s(?P<names>(?:class|function)[^.;]+)"
)
LEFT_BEHIND = {
    "Remove our own accounts": r"auth\.passwords|Passwords|refresh_token|RefreshToken|OwnTokens",
    "Remove Better Auth": r"settings\.better_auth_url|BetterAuth\b|import httpx2",
}


@dataclass(frozen=True)
class Deletion:
    """A class or function to delete, named in a sentence."""

    path: str
    name: str


def read_instructions(page: str, section: str) -> Iterator[Step | Deletion]:
    """Yield the instructions of a section, in order."""
    heading, current, where = False, "", ""
    for token in MarkdownIt().parse(page):
        if token.type == "heading_open":
            heading = token.tag == "h3"
        elif token.type == "inline" and heading:
            current, heading = token.content, False
        elif token.type == "inline" and current == section:
            where = token.content
            for deletion in DELETION.finditer(where):
                for name in re.findall(r"`(\w+)`", deletion["names"]):
                    yield Deletion(deletion["path"], name)
        elif token.type == "fence" and current == section:
            yield Step(section, where, token.info, token.content)


def delete(name: str, file: Path) -> None:
    """Delete a class or a function of a module, whose Python may be newer than this one."""
    lines = file.read_text("utf-8").splitlines(keepends=True)
    header = re.compile(rf"(async def|class|def) {name}\b")
    (start,) = (number for number, line in enumerate(lines) if header.match(line))
    end = start + 1
    while end < len(lines) and re.match(r"\s|\)", lines[end]):
        end += 1
    while re.match(r"@|\)|    ", lines[start - 1]) and lines[start - 1].strip():
        start -= 1  # its decorators
    file.write_text("".join(lines[:start] + lines[end:]), "utf-8")


@pytest.fixture(scope="module", params=SECTIONS)
def section(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def reduced(
    project: Project, section: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """A copy of the project with its own database, after following a section."""
    copy = project.copy(tmp_path_factory.mktemp("reduced") / "project")
    assert copy.run("uv", "run", "manage.py", "env", "--local").code == 0
    try:
        assert copy.run("uv", "run", "manage.py", "migrate").code == 0
        for instruction in read_instructions(copy.read("docs/accounts.md"), section):
            if isinstance(instruction, Deletion):
                delete(instruction.name, copy.path / instruction.path)
            else:
                take(instruction, copy)
        yield copy
    finally:
        copy.run("uv", "run", "manage.py", "postgres", "stop")


def test_the_page_has_a_section_for_each_kind(project: Project) -> None:
    page = project.read("docs/accounts.md")

    assert re.findall(r"^### (.+)$", page, re.MULTILINE) == SECTIONS
    for section in SECTIONS:
        kinds = [type(instruction) for instruction in read_instructions(page, section)]
        assert kinds.count(Deletion) >= 2
        assert kinds.count(Step) > 5


@pytest.mark.parametrize("task", ["lint", "types"])
def test_the_checks_pass(reduced: Project, task: str, mypy_lock: FileLock) -> None:
    with mypy_lock if task == "types" else nullcontext():
        outcome = reduced.run("uv", "run", "poe", task)

    assert outcome.code == 0, outcome.output


@pytest.mark.timeout(TEST_SECONDS + 60)
@pytest.mark.parametrize("chosen", ["affected", pytest.param("all", marks=pytest.mark.weekly)])
def test_the_tests_pass(reduced: Project, section: str, chosen: str) -> None:
    keywords = AFFECTED[section] if chosen == "affected" else ""
    command = ("uv", "run", "pytest", "--quiet", "-k", keywords, "tests")
    outcome = reduced.run(*command, seconds=TEST_SECONDS)

    assert outcome.code == 0, outcome.output
    assert re.search(r"^\d+ passed", outcome.output, re.MULTILINE), outcome.output


def test_the_app_no_longer_uses_the_removed_accounts(reduced: Project, section: str) -> None:
    modules = [*reduced.path.glob("*.py"), *reduced.path.glob("[a-z]*/*.py")]
    apps = [module for module in modules if module.parent.name != "tests"]

    found = [
        f"{module.relative_to(reduced.path)}: {line.strip()}"
        for module in apps
        for line in module.read_text("utf-8").splitlines()
        if re.search(LEFT_BEHIND[section], line)
    ]

    assert len(apps) > 10
    assert found == []
