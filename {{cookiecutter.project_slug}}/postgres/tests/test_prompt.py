"""The prompt for a connection string, on a pseudo-terminal."""

import sys
import time
from collections.abc import Iterator

import pytest

from postgres.tests.terminal import Terminal, on_terminal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")

# Asks, and prints the answer and whether the terminal's settings are restored.
PROGRAM = """
import termios
from postgres.prompt import read_pasted
before = termios.tcgetattr(0)
try:
    print("got", ascii(read_pasted("Paste: ")))
except (EOFError, KeyboardInterrupt) as error:
    print("got", type(error).__name__)
print("terminal", "as before" if termios.tcgetattr(0) == before else "changed")
print("next", ascii(input()))
"""


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with on_terminal(PROGRAM) as terminal:
        terminal.wait_for("Paste: ")
        yield terminal


def test_typed_text_is_read_and_not_shown(terminal: Terminal) -> None:
    terminal.type("s3cr3t\n")

    terminal.wait_for("got 's3cr3t\\n'")
    terminal.wait_for("terminal as before")
    assert terminal.screen.count("s3cr3t") == 1


@pytest.mark.parametrize("text", ["one\ntwo\nthree\n", "\none\n", "\n\n", "xyz\n" * 25_000])
def test_lines_that_are_pasted_at_once_are_one_answer(terminal: Terminal, text: str) -> None:
    terminal.type(text)

    terminal.wait_for("terminal as before")
    assert f"got {text!r}" in terminal.screen.replace("\r\n", "")


def test_a_line_that_is_longer_than_a_terminal_keeps_is_read_whole(terminal: Terminal) -> None:
    line = "x" * 100_000

    terminal.type(f"{line}\n")

    terminal.wait_for("terminal as before")
    assert f"got '{line}\\n'" in terminal.screen


def test_a_paste_with_its_marks_and_carriage_returns_is_one_answer(terminal: Terminal) -> None:
    terminal.type("\x1b[200~one\r\ntwo\r\x1b[201~\r")

    terminal.wait_for("terminal as before")
    assert r"got '\x1b[200~one\n\ntwo\n\x1b[201~\n'" in terminal.screen


@pytest.mark.parametrize("keys", ["early\n", "early", "\n"])
def test_what_was_typed_ahead_of_the_prompt_is_not_used(keys: str) -> None:
    with on_terminal(PROGRAM, typed=keys) as terminal:
        terminal.wait_for("is not used.\r\nPaste: ")
        terminal.type("later\n")
        terminal.wait_for("terminal as before")

    assert "got 'later\\n'" in terminal.screen


def test_a_last_line_that_does_not_end_waits_for_enter(terminal: Terminal) -> None:
    terminal.type("one\ns3cr3t")
    time.sleep(1)  # longer than the maximum pause in a paste
    assert "got" not in terminal.screen
    terminal.type("\n")

    terminal.wait_for("got 'one\\ns3cr3t\\n'")
    terminal.wait_for("terminal as before")
    assert terminal.screen.count("s3cr3t") == 1


@pytest.mark.parametrize("keys", ["abx\x7fc\n", "\x7fwrong\x15abc\n"])
def test_backspace_and_ctrl_u_delete(terminal: Terminal, keys: str) -> None:
    terminal.type(keys)

    terminal.wait_for("got 'abc\\n'")


@pytest.mark.parametrize(
    ("keys", "error"),
    [("\x04", "EOFError"), ("\x03", "KeyboardInterrupt"), ("a\nb\x03", "Keyboard")],
)
def test_ctrl_d_and_ctrl_c_restore_the_terminal(terminal: Terminal, keys: str, error: str) -> None:
    terminal.type(keys)

    terminal.wait_for(f"got {error}")
    terminal.wait_for("terminal as before")


def test_no_part_of_a_paste_reaches_the_next_prompt(terminal: Terminal) -> None:
    terminal.type("one\ntwo\nthree\n")
    terminal.wait_for("terminal as before")
    terminal.type("later\n")

    terminal.wait_for("next 'later'")
