"""A program on a pseudo-terminal, and somebody who types there. Not on Windows."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[2]
# Without a controlling terminal, Ctrl-C would reach nobody.
TAKE_CONTROL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
SECONDS = 20  # timeout, only to detect a hang


@dataclass
class Terminal:
    """screen: all text that the program wrote. seen: how much of it was waited for."""

    process: subprocess.Popen[bytes]
    end: int
    screen: str = ""
    seen: int = 0

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, text: str) -> None:
        """Wait until a text appears, after the one that was waited for before."""
        deadline = time.monotonic() + SECONDS
        while (found := self.screen.find(text, self.seen)) == -1:
            ready, _, _ = select.select([self.end], [], [], deadline - time.monotonic())
            assert ready, self.screen
            self.screen += os.read(self.end, 4096).decode()
        self.seen = found + len(text)

    def wait(self) -> tuple[int, str]:
        """Return the exit code, and all text with plain line ends."""
        code = self.process.wait(SECONDS)
        while select.select([self.end], [], [], 0)[0]:
            try:
                self.screen += os.read(self.end, 4096).decode()
            except OSError:  # Linux, at the end
                break
        return code, self.screen.replace("\r\n", "\n")


@contextmanager
def on_terminal(program: str, typed: str = "") -> Iterator[Terminal]:
    """Run Python code in the project's folder, and end it after the block.

    typed: before the program starts.
    """
    import pty  # noqa: PLC0415  (Windows has none)

    end, other = pty.openpty()
    os.write(end, typed.encode())
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", TAKE_CONTROL + program],
        cwd=PROJECT,
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
    )
    os.close(other)
    try:
        yield Terminal(process, end)
    finally:
        process.kill()
        process.wait(SECONDS)
        os.close(end)
