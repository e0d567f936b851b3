"""The prompt for a connection string, on a pseudo-terminal."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("Windows has no pseudo-terminals", allow_module_level=True)

import pty

PROJECT = Path(__file__).parents[2]
# Asks, and prints the answer and whether the terminal's settings are restored.
PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from postgres.prompt import read_pasted
before = termios.tcgetattr(0)
try:
    print("got", ascii(read_pasted("Paste: ")))
except (EOFError, KeyboardInterrupt) as error:
    print("got", type(error).__name__)
print("terminal", "as before" if termios.tcgetattr(0) == before else "changed")
print("next", ascii(input()))
"""
SECONDS = 20  # timeout, only to detect a hang


class Terminal:
    def __init__(self) -> None:
        self.end, other = pty.openpty()
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", PROGRAM],
            cwd=PROJECT,
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while text not in self.screen:
            ready, _, _ = select.select([self.end], [], [], deadline - time.monotonic())
            assert ready, self.screen
            self.screen += os.read(self.end, 4096).decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(SECONDS)
        os.close(self.end)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    terminal.wait_for("Paste: ")
    yield terminal
    terminal.close()


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
    terminal = Terminal()
    try:
        terminal.type(keys)
        terminal.wait_for("is not used.\r\nPaste: ")
        terminal.type("later\n")
        terminal.wait_for("terminal as before")
    finally:
        terminal.close()

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
