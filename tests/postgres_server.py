"""The system's PostgreSQL, with password authentication and optional TLS."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest

import processes

START_SECONDS = 30
USER = "ada"
CONFIGURATION = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
}
TLS = {"ssl": "on", "ssl_cert_file": "server.crt", "ssl_key_file": "server.key"}
STOP = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


@dataclass
class Server:
    """A server, running or stopped. data: its data folder."""

    port: int
    password: str
    data: Path
    tls: bool = False
    wrapper: Sequence[str] = ()
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def url(
        self, password: str | None = None, *, port: int | None = None, database: str = "postgres"
    ) -> str:
        """Return a URL with the percent-encoded password.

        password: default: the right one. port: of a proxy or pooler in front of the server.
        """
        login = f"{USER}:{quote(password or self.password, safe='')}"
        sslmode = "require" if self.tls else "disable"
        return f"postgresql://{login}@127.0.0.1:{port or self.port}/{database}?sslmode={sslmode}"

    def ask(self, sql: str, *values: object, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement, with values for its `%s`. Returns its rows, if it has any."""
        url = self.url(database=database)
        with closing(psycopg2.connect(url, connect_timeout=10)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql, values or None)
                return cursor.fetchall() if cursor.description else []

    def new_database(self, template: str = "template1", tablespace: str = "pg_default") -> str:
        """Create a database, empty or as a copy of another one. Returns its name."""
        name = f"test_{secrets.token_hex(8)}"
        self.ask(f"CREATE DATABASE {name} TEMPLATE {template} TABLESPACE {tablespace}")
        return name

    def count_clients(self, database: str) -> int:
        """Return how many connections to a database there are."""
        ((number,),) = self.ask(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = %s AND backend_type = 'client backend'",
            database,
        )
        return int(number)

    def terminate_backends(self, database: str) -> int:
        """End all connections to a database. Returns how many there were."""
        # With a timeout, the function returns when the backend has ended, not when it is signalled.
        return len(
            self.ask(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = %s AND backend_type = 'client backend'"
                " AND pid <> pg_backend_pid()",
                database,
            )
        )

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        with (self.data.parent / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.wrapper, find_programs() / "postgres", "-D", self.data],
                cwd=self.data.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **processes.account(),
            )
        limit = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, f"the server has ended:\n{self.log}"
            try:
                self.ask("SELECT 1")
            except psycopg2.OperationalError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.1)
            else:
                return

    def stop(self, mode: str = "fast") -> None:
        """Stop the server. mode: of pg_ctl: "smart", "fast", or "immediate" like a crash."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(STOP[mode])
            self.process.wait(processes.END_SECONDS)

    def frozen(self) -> AbstractContextManager[None]:
        """Freeze the server (SIGSTOP) until the end of the block (SIGCONT)."""
        assert self.process is not None
        return processes.frozen(self.process.pid)

    @contextmanager
    def replica(self) -> Iterator["Server"]:
        """Start a server that follows this one and answers queries, and stop it at the end."""
        with processes.folder() as folder:
            replica = replace(self, port=free_port(), data=folder / "data", process=None)
            subprocess.run(
                [find_programs() / "pg_basebackup", "--host=127.0.0.1", f"--port={self.port}",
                 f"--username={USER}", "--checkpoint=fast", "--no-sync", "--write-recovery-conf",
                 "--pgdata", replica.data],
                check=True, cwd=folder, capture_output=True, timeout=START_SECONDS,
                env={**os.environ, "PGPASSWORD": self.password}, **processes.account(),
            )  # fmt: skip
            with (replica.data / "postgresql.conf").open("a", encoding="utf-8") as file:
                file.write(f"port = '{replica.port}'\n")
            try:
                replica.start()
                yield replica
            finally:
                if replica.process:
                    processes.end(replica.process)

    @property
    def log(self) -> str:
        return (self.data.parent / "log").read_text("utf-8", "replace")


def new_password() -> str:
    """Return a password that needs percent-encoding and is easy to search for."""
    return f"s3cr3t-{secrets.token_hex(8)}/@:é %"


def own_ports() -> Iterator[int]:
    """Return the ports of this process, over and over: other test processes have others.

    They are below those that projects choose for embedded servers, and below the ephemeral ones,
    which a client could take before the server starts.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = range(15_000, 20_000)[number :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    start = secrets.randbelow(len(own))
    return cycle([*own[start:], *own[:start]])


PORTS = own_ports()


def free_port() -> int:
    """Return a free port that no other test gets until long after."""
    while True:
        port = next(PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def find_programs() -> Path:
    """Return the folder of the newest initdb and postgres."""
    debian = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    installed = sorted(debian, key=lambda program: int(program.parent.parent.name))
    found = installed[-1] if installed else shutil.which("postgres")
    if not found:
        pytest.skip("no PostgreSQL is installed on the system")
    return Path(found).parent


@contextmanager
def postgres_server(
    *,
    tls: bool = False,
    settings: Mapping[str, object] | None = None,
    wrapper: Sequence[str] = (),
) -> Iterator[Server]:
    """Start a server with an empty database, and stop it at the end.

    tls: require it. settings: for postgresql.conf. wrapper: a command that runs the server's
    command, which is appended to it.
    """
    programs = find_programs()
    with processes.folder() as folder:
        server = Server(free_port(), new_password(), folder / "data", tls, wrapper)
        password_file = folder / "password"
        password_file.write_text(server.password, "utf-8")
        password_file.chmod(0o644)

        def run(*command: str | Path) -> None:
            subprocess.run(
                command, check=True, cwd=folder, capture_output=True, **processes.account()
            )

        run(programs / "initdb", "--auth=scram-sha-256", f"--username={USER}", "--encoding=UTF8",
            "--no-sync", f"--pwfile={password_file}", server.data)  # fmt: skip
        configuration = {**CONFIGURATION, "port": server.port, **(settings or {})}
        if tls:
            configuration |= TLS
            run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj",
                "/CN=localhost", "-keyout", server.data / "server.key",
                "-out", server.data / "server.crt")  # fmt: skip
        with (server.data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in configuration.items())
        kind = "hostssl" if tls else "host"
        rules = [
            f"{kind} {what} all 127.0.0.1/32 scram-sha-256\n" for what in ("all", "replication")
        ]
        (server.data / "pg_hba.conf").write_text("".join(rules), "utf-8")

        try:
            server.start()
            yield server
        finally:
            if server.process:
                # Not SIGTERM, with which it waits for its clients.
                processes.end(server.process, STOP["fast"])
