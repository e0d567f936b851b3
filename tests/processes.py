"""Programs that a test starts: as whom they run, how they are frozen, and that they end."""

import os
import pwd
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

END_SECONDS = 20


def account() -> dict[str, Any]:
    """Return what subprocess wants for a program that refuses to run as root: it is nobody then."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}


@contextmanager
def folder() -> Iterator[Path]:
    """Make a temporary folder that belongs to the account."""
    with tempfile.TemporaryDirectory() as name:
        if account():
            os.chown(name, account()["user"], account()["group"])
        yield Path(name)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a program that may be frozen, or has ended already."""
    with suppress(psutil.NoSuchProcess):
        thaw(process.pid)
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all that descend from it, the eldest first."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def thaw(pid: int) -> None:
    for process in family(pid):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop a process and all that descend from it, as a machine that hangs would."""
    for process in family(pid):  # the eldest first: it has no more children then
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            thaw(pid)
