"""A Valkey or Redis server of the system's own."""

import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

import processes
from postgres_server import free_port

START_SECONDS = 20


@dataclass
class Redis:
    """A server on 127.0.0.1 that keeps nothing on disk."""

    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_hex(16))
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"valkey://:{self.password}@127.0.0.1:{self.port}/1"

    def start(self) -> None:
        options = f"--port {self.port} --bind 127.0.0.1 --requirepass {self.password} --save"
        self.process = subprocess.Popen(
            [find_program(), *options.split(), ""],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **processes.account(),
        )
        limit = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, "the server has ended"
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except OSError:
                assert time.monotonic() < limit, "the server does not answer"
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        if self.process:
            processes.end(self.process)
            self.process = None


def find_program() -> str:
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    return found or pytest.skip("neither Valkey nor Redis is installed on the system")


@contextmanager
def redis_server() -> Iterator[Redis]:
    redis = Redis()
    redis.start()
    try:
        yield redis
    finally:
        redis.stop()
