"""Odd answers at the question for a connection string, on a terminal and with the real commands."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from machine import Project

QUESTION = "Connection string"
PLACEHOLDER = "\nDATABASE_URL=postgresql://USER:PASSWORD@HOST/DATABASE\n"
PASTED = "postgresql://ann:s3cr3t@127.0.0.1:1/todo"  # nothing listens there
STOPPED = {
    "setup": "stopped: finished steps stay; to continue: uv run manage.py setup",
    "env": "stopped: DATABASE_URL is unchanged; to change it: uv run manage.py env",
    "copy": "stopped: nothing was copied",
}

Start = Callable[[str], "pexpect.spawn[str]"]


@pytest.fixture
def clone(project: Project, tmp_path: Path) -> Project:
    """A fresh clone, as a colleague makes it."""
    project.git("clone", "--quiet", ".", str(tmp_path / "clone"))
    return Project(tmp_path / "clone", project.environment)


@pytest.fixture
def start(project: Project, clone: Project) -> Iterator[Start]:
    """Run a command of manage.py in the clone, with the project's packages."""
    terminals = []

    def run(command: str) -> "pexpect.spawn[str]":
        terminal = pexpect.spawn(
            str(project.python),
            ["manage.py", command],
            cwd=clone.path,
            env=clone.environment | {"TERM": "dumb"},
            encoding="utf-8",
            timeout=30,
        )
        terminals.append(terminal)
        return terminal

    yield run
    for terminal in terminals:
        terminal.close(force=True)


def finish(terminal: "pexpect.spawn[str]") -> int | None:
    terminal.expect(pexpect.EOF)
    terminal.close()
    return terminal.exitstatus


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("setup", "\x04"),
        ("setup", "\x03"),
        ("setup", f"{PASTED}\n{PASTED[:9]}\x03"),
        ("env", "\x04"),
        ("copy", "\x04"),
    ],
    ids=[
        "setup, Ctrl-D",
        "setup, Ctrl-C",
        "setup, Ctrl-C in a paste",
        "env, Ctrl-D",
        "copy, Ctrl-D",
    ],
)
def test_ctrl_d_and_ctrl_c_lose_nothing_and_say_how_to_go_on(
    start: Start, project: Project, clone: Project, command: str, keys: str
) -> None:
    if command == "copy":
        (clone.path / ".env").write_text(project.read(".env"), "utf-8")
    terminal = start(command)
    terminal.expect(QUESTION)
    before = clone.read(".env")

    terminal.send(keys)
    terminal.expect_exact(STOPPED[command])

    assert finish(terminal) == 130
    assert clone.read(".env") == before


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("   \r", "the text is empty"),
        ("\x1b[200~\x1b[201~\r", "the text is empty"),
        (f"{PASTED}?application_name={'x' * 100_000}\r", "the text is too long"),
    ],
    ids=["blanks", "an empty paste", "a line of 100 kB"],
)
def test_what_cannot_be_an_answer_is_asked_for_again(
    start: Start, clone: Project, keys: str, problem: str
) -> None:
    terminal = start("setup")
    terminal.expect(QUESTION)

    terminal.send(keys)
    terminal.expect_exact(f"Try again: {problem}")
    terminal.expect(QUESTION)
    terminal.send("\x04")

    assert finish(terminal) == 130
    assert PLACEHOLDER in clone.read(".env")
    assert "s3cr3t" not in (terminal.before or "")


@pytest.mark.parametrize(
    "keys",
    [
        f"{PASTED[:30]}\r{PASTED[30:]}?sslmode=disable\r",
        f"\x1b[200~\r\nDATABASE_URL={PASTED}\r\nPORT=8000\r\n\r\n\x1b[201~\r",
    ],
    ids=["a line end in its middle", "a whole .env with marks and carriage returns"],
)
def test_a_paste_in_several_pieces_is_one_answer(start: Start, clone: Project, keys: str) -> None:
    terminal = start("setup")
    terminal.expect(QUESTION)

    terminal.send(keys)
    terminal.expect_exact("127.0.0.1:1: nothing listens")

    assert finish(terminal) == 1
    assert re.search(
        rf"^DATABASE_URL={PASTED}(\?sslmode=disable)?$", clone.read(".env"), re.MULTILINE
    )


def test_what_was_typed_ahead_of_the_question_is_not_an_answer(
    start: Start, clone: Project
) -> None:
    terminal = start("setup")
    terminal.send("\r")  # alone, it would choose the embedded server
    terminal.expect_exact("What you typed before this question may be visible, and is not used.")
    terminal.expect(QUESTION)
    terminal.send("\x04")

    assert finish(terminal) == 130
    assert PLACEHOLDER in clone.read(".env")


def test_only_enter_keeps_the_string_that_env_finds(start: Start, clone: Project) -> None:
    (clone.path / ".env").write_text(f"DATABASE_URL={PASTED}\nBETTER_AUTH_SECRET={'x' * 32}\n")
    before = clone.read(".env")
    terminal = start("env")
    terminal.expect("Enter: no change")

    terminal.send("\r")
    terminal.expect_exact("DATABASE_URL is unchanged")

    assert finish(terminal) == 0
    assert clone.read(".env") == before
