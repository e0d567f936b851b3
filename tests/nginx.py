"""nginx with the configuration of a page of the project's docs."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection

import pytest

import processes

START_SECONDS = 20


def listens(port: int) -> bool:
    try:
        create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@contextmanager
def nginx(blocks: str, port: int, folder: Path) -> Iterator[None]:
    """Run nginx until the end of the block.

    blocks: what is inside `http`. port: where it listens. folder: for its files.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if not program:
        pytest.skip("nginx is not installed")
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"daemon off; pid {folder}/pid; events {{}} http {{ access_log off; {blocks} }}", "utf-8"
    )
    with (folder / "nginx.log").open("ab") as log:
        process = subprocess.Popen(
            [program, "-e", "stderr", "-p", str(folder), "-c", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        limit = time.monotonic() + START_SECONDS
        while not listens(port):
            assert process.poll() is None, (folder / "nginx.log").read_text("utf-8")
            assert time.monotonic() < limit
            time.sleep(0.05)
        yield
    finally:
        processes.end(process)
