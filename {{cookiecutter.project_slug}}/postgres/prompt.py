"""Asks for a connection string on a terminal, without showing it.

A paste may have several lines. getpass takes the first and leaves the rest to the shell.
"""

import getpass
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from postgres import url as urls
from postgres.url import DatabaseUrl, DatabaseUrlError

ATTEMPTS = 3
PAUSE = 0.3  # seconds without another line after which a paste has ended
ENDS = (b"\n", b"\r", b"\x04")  # the last is Ctrl-D

if sys.platform == "win32":
    import msvcrt

    def read_pasted(prompt: str) -> str:
        """Read a line and what was pasted with it, without echo. Raises EOFError."""
        text = getpass.getpass(prompt)
        rest = []
        while msvcrt.kbhit():
            rest.append(msvcrt.getwch())
        return "\n".join([text, "".join(rest).replace("\r", "\n")]).strip("\n")

else:
    import select
    import termios

    def read_pasted(prompt: str) -> str:
        """Read a line and what was pasted with it, without echo. Raises EOFError."""
        try:
            terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError:
            return getpass.getpass(prompt)
        before = termios.tcgetattr(terminal)
        hidden = termios.tcgetattr(terminal)
        hidden[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, hidden)
            os.write(terminal, prompt.encode())
            pasted = read_some(terminal)  # up to the end of the line
            # What follows may end without a line end, which only Enter would let through.
            hidden[3] &= ~termios.ICANON
            hidden[6][termios.VMIN], hidden[6][termios.VTIME] = 1, 0
            termios.tcsetattr(terminal, termios.TCSANOW, hidden)
            while pasted and (
                not pasted.endswith(ENDS) or select.select([terminal], [], [], PAUSE)[0]
            ):
                pasted += read_some(terminal)
        finally:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
            os.write(terminal, b"\n")
            os.close(terminal)
        if not pasted:
            raise EOFError
        return pasted.rstrip(b"\x04").decode("utf-8", "surrogateescape")

    def read_some(terminal: int) -> bytes:
        """Wait for input. A read that blocks would miss a Ctrl-C that came just before it."""
        while True:
            if select.select([terminal], [], [], PAUSE)[0]:
                with suppress(BlockingIOError):
                    return os.read(terminal, 4096)


def ask_database_url(
    read: Callable[[str], str] = read_pasted, out: TextIO | None = None, *, empty: str
) -> DatabaseUrl | None:
    """Ask for a connection string. None: the answer was empty, which means `empty`.

    Raises DatabaseUrlError if the last attempt is as wrong as those before it.
    """
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            answer = read(f"Connection string (hidden; empty: {empty}): ")
        except EOFError:
            return None
        if not answer.strip():
            return None
        try:
            return take_database_url(answer, out)
        except DatabaseUrlError as error:
            if not attempts_left:
                raise
            print(f"  Try again: {error}", file=out or sys.stderr)
    return None


def take_database_url(text: str, out: TextIO | None = None) -> DatabaseUrl:
    """Read a pasted text, and say what was fixed in it. Raises DatabaseUrlError."""
    reading = urls.read(text)
    for change in reading.changes:
        print(f"  Fixed: {change}", file=out or sys.stderr)
    return reading.url


def find_database_url(*, empty: str) -> DatabaseUrl | None:
    """Return what NEON_DATABASE_URL holds, or what is typed. None: nothing was typed.

    empty: what an empty answer means. Raises DatabaseUrlError.
    """
    if given := os.environ.get("NEON_DATABASE_URL"):
        return take_database_url(given)
    if sys.stdin.isatty():
        return ask_database_url(empty=empty)
    raise DatabaseUrlError(
        "there is no connection string yet, and no terminal to ask for it: set NEON_DATABASE_URL, "
        "or use the embedded PostgreSQL with --local"
    )
