"""Asks for a connection string on a terminal, without showing it.

A paste may have several lines. getpass takes the first and leaves the rest to the shell.
"""

import getpass
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from postgres import url as urls
from postgres.url import DatabaseUrl, DatabaseUrlError

PASTE_ATTEMPTS = 3
PAUSE = 0.3  # seconds without another line after which a paste has ended
CTRL_D = b"\x04"
ENDS = (b"\n", b"\r", CTRL_D)
TYPED_AHEAD = "! What you typed before this question may be visible, and is not used.\n"

if sys.platform == "win32":
    import msvcrt

    def read_pasted(prompt: str) -> str:
        """Read a line and what was pasted with it, without echo. Raises EOFError for Ctrl-D."""
        if msvcrt.kbhit():
            while msvcrt.kbhit():
                msvcrt.getwch()
            print(TYPED_AHEAD, end="", file=sys.stderr)
        lines = [getpass.getpass(prompt)]
        if lines[0] in {"\x04", "\x1a"}:  # Ctrl-D and Ctrl-Z
            raise EOFError
        while is_key_waiting():
            lines.append(getpass.getpass(""))
        return "\n".join([*lines, ""])

    def is_key_waiting() -> bool:
        """Whether another key was pressed or pasted, or is within a moment."""
        if not msvcrt.kbhit():
            time.sleep(PAUSE)
        return msvcrt.kbhit()

else:
    import select
    import termios

    def read_pasted(prompt: str) -> str:
        """Read a line and what was pasted with it, without echo. Raises EOFError for Ctrl-D."""
        try:
            terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError:
            return getpass.getpass(prompt)
        before = termios.tcgetattr(terminal)
        hidden = termios.tcgetattr(terminal)
        # In canonical mode, a terminal cuts off long lines, at 1,024 or 4,096 bytes.
        hidden[3] &= ~(termios.ECHO | termios.ICANON)
        hidden[6][termios.VMIN], hidden[6][termios.VTIME] = 1, 0
        keys = b""
        try:
            termios.tcsetattr(terminal, termios.TCSANOW, hidden)
            if select.select([terminal], [], [], 0)[0]:
                termios.tcflush(terminal, termios.TCIFLUSH)
                os.write(terminal, TYPED_AHEAD.encode())
            os.write(terminal, prompt.encode())
            while more := read_some(terminal):
                keys += more
                if keys.endswith(ENDS) and not select.select([terminal], [], [], PAUSE)[0]:
                    break
        finally:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
            os.write(terminal, b"\n")
            os.close(terminal)
        if not keys.strip(CTRL_D):
            raise EOFError
        return edit(keys.rstrip(CTRL_D).decode("utf-8", "surrogateescape"))

    def read_some(terminal: int) -> bytes:
        """Wait for input. A read that blocks would miss a Ctrl-C that came just before it."""
        while True:
            if select.select([terminal], [], [], PAUSE)[0]:
                with suppress(BlockingIOError):
                    return os.read(terminal, 4096)


def edit(keys: str) -> str:
    """Apply the keys that delete: Backspace, and Ctrl-U for everything."""
    text: list[str] = []
    for key in keys:
        if key in "\b\x7f":
            del text[-1:]
        elif key == "\x15":
            text.clear()
        else:
            text.append(key)
    return "".join(text)


def ask_on_terminal(
    read: Callable[[str], str] = read_pasted, out: TextIO | None = None, *, empty: str
) -> DatabaseUrl | None:
    """Ask for a connection string. None: only Enter was pressed, which means `empty`.

    Raises EOFError for Ctrl-D, and DatabaseUrlError if the last attempt is as wrong as those
    before it.
    """
    for attempts_left in reversed(range(PASTE_ATTEMPTS)):
        answer = read(f"Connection string (hidden; Enter: {empty}): ")
        if answer in {"", "\n"}:
            return None
        try:
            return parse_pasted(answer, out)
        except DatabaseUrlError as error:
            if not attempts_left:
                raise
            print(f"  Try again: {error}", file=out or sys.stderr)
    return None


def ask_or_read_stdin(*, empty: str) -> DatabaseUrl | None:
    """Ask on a terminal, or read standard input, which must not be empty. See ask_on_terminal."""
    if sys.stdin.isatty():
        return ask_on_terminal(empty=empty)
    return parse_pasted(sys.stdin.buffer.read().decode("utf-8", "surrogateescape"))


def parse_pasted(text: str, out: TextIO | None = None) -> DatabaseUrl:
    """Read a pasted text, and say what was fixed in it. Raises DatabaseUrlError."""
    reading = urls.read(text)
    for change in reading.changes:
        print(f"  Fixed: {change}", file=out or sys.stderr)
    return reading.url


def from_environment_or_ask(*, empty: str) -> DatabaseUrl | None:
    """Return what NEON_DATABASE_URL holds, or what is typed. See ask_on_terminal."""
    if given := os.environ.get("NEON_DATABASE_URL"):
        return parse_pasted(given)
    if sys.stdin.isatty():
        return ask_on_terminal(empty=empty)
    raise DatabaseUrlError(
        "there is no connection string yet, and no terminal to ask for it: set NEON_DATABASE_URL, "
        "or use the embedded PostgreSQL with --local"
    )
