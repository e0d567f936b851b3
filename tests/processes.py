"""Run programs that refuse to run as root; freeze and end programs."""

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
    """Return arguments for subprocess that run a program as nobody if we are root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}


@contextmanager
def folder() -> Iterator[Path]:
    """Create a temporary folder owned by `account()`."""
    with tempfile.TemporaryDirectory() as name:
        if account():
            os.chown(name, account()["user"], account()["group"])
        yield Path(name)


def end(process: "subprocess.Popen[bytes]", with_signal: int = signal.SIGTERM) -> None:
    """End a program, even if it is frozen or has already ended."""
    with suppress(psutil.NoSuchProcess):
        thaw(process.pid)
    process.send_signal(with_signal)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def family(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants, the parent first."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def thaw(pid: int) -> None:
    for process in family(pid):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop a process and its descendants (SIGSTOP), like a hanging machine."""
    for process in family(pid):  # the parent first, so that it starts no more children
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            thaw(pid)
