"""A PgBouncer of the system's own in front of a PostgreSQL, as providers' pooled hosts have one."""

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extras import RealDictCursor

import processes
from postgres_server import free_port

START_SECONDS = 20
CONSOLE = "console"  # who may ask the pooler about itself
SETTINGS: dict[str, object] = {
    "listen_addr": "127.0.0.1",
    "unix_socket_dir": "",
    "auth_type": "trust",
    "auth_file": "users.txt",
    "admin_users": CONSOLE,
    "client_tls_sslmode": "disable",
    "server_tls_sslmode": "disable",
    "pool_mode": "transaction",
    "max_client_conn": 1000,
    "default_pool_size": 20,
    "logfile": "pgbouncer.log",
}


@dataclass(frozen=True)
class PgBouncer:
    """A pooler that runs. `port`: where clients reach it, on 127.0.0.1."""

    port: int
    process: "subprocess.Popen[bytes]"
    folder: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        file = self.folder / "pgbouncer.log"
        return file.read_text("utf-8", "replace") if file.exists() else ""

    def show(self, what: str) -> list[dict[str, Any]]:
        """Return what the console shows: POOLS, STATS, SERVERS, CLIENTS, …, by column."""
        address = f"host=127.0.0.1 port={self.port} dbname=pgbouncer user={CONSOLE} password=x"
        with closing(psycopg2.connect(address, connect_timeout=10)) as console:
            console.autocommit = True  # it knows no BEGIN
            with console.cursor(cursor_factory=RealDictCursor) as cursor:
                cursor.execute(f"SHOW {what}")
                return [dict(row) for row in cursor.fetchall()]

    def frozen(self) -> AbstractContextManager[None]:
        """Stop it (SIGSTOP), and let it go on at the end (SIGCONT)."""
        return processes.frozen(self.pid)


def find_program() -> str:
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")  # Debian's
    return found or pytest.skip("no PgBouncer is installed on the system")


def quote(text: str) -> str:
    return '"{}"'.format(text.replace('"', '""'))


@contextmanager
def pgbouncer(
    server_port: int, users: Mapping[str, str], *, port: int | None = None, **settings: object
) -> Iterator[PgBouncer]:
    """Start a PgBouncer in front of a server on this machine, and stop it at the end.

    users: passwords by user; it lets each in without asking, and tells the server the password.
    port: where it listens, any if None. settings: of pgbouncer.ini, in place of SETTINGS or beside.
    """
    program, port = find_program(), port or free_port()
    pooling = SETTINGS | {"listen_port": port} | settings
    configuration = [
        "[databases]",
        f"* = host=127.0.0.1 port={server_port}",
        "[pgbouncer]",
        *(f"{name} = {value}" for name, value in pooling.items()),
    ]
    logins = [f"{quote(user)} {quote(word)}" for user, word in {**users, CONSOLE: "x"}.items()]
    with processes.folder() as folder:
        for name, lines in {"pgbouncer.ini": configuration, "users.txt": logins}.items():
            (folder / name).write_text("\n".join([*lines, ""]), "utf-8")
            (folder / name).chmod(0o644)  # the folder itself is closed to others
        process = subprocess.Popen(
            [program, "--quiet", "pgbouncer.ini"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **processes.account(),
        )
        pooler = PgBouncer(port, process, folder)
        try:
            wait_for(pooler)
            yield pooler
        finally:
            processes.end(process)


def wait_for(pooler: PgBouncer) -> None:
    limit = time.monotonic() + START_SECONDS
    while True:
        assert pooler.process.poll() is None, f"PgBouncer has ended:\n{pooler.log}"
        try:
            pooler.show("VERSION")
        except psycopg2.OperationalError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.05)
        else:
            return
