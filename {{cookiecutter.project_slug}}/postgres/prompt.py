"""Asks on a terminal for something secret that may have several lines.

getpass takes the first line and throws the rest of a paste away, or leaves it to the shell.

Standard library only, for Python 3.10 on: the generator's hook runs this file too.
"""

import getpass
import os
import sys
from contextlib import suppress

PAUSE = 0.3  # seconds without a further line after which a paste has ended
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
