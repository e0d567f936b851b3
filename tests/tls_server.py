"""A PostgreSQL of the system's own that insists on TLS and a password, as a provider's does."""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest

CONFIGURATION = """
listen_addresses = '127.0.0.1'
port = {port}
ssl = on
ssl_cert_file = 'server.crt'
ssl_key_file = 'server.key'
unix_socket_directories = ''
fsync = off
"""


@dataclass(frozen=True)
class Server:
    port: int
    password: str

    def url(self, password: str | None = None) -> str:
        """Return a URL, with the password or another one in it, percent-encoded."""
        login = f"ada:{quote(password or self.password, safe='')}"
        return f"postgresql://{login}@127.0.0.1:{self.port}/postgres?sslmode=require"

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(psycopg2.connect(self.url())) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()


def new_password() -> str:
    """Return a password that has to be percent-encoded, and is easy to search for."""
    return f"s3cr3t-{secrets.token_hex(8)}/@:é %"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def find_programs() -> Path:
    """Return the folder of initdb and postgres, the newest ones."""
    debian = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    installed = sorted(debian, key=lambda program: int(program.parent.parent.name))
    found = installed[-1] if installed else shutil.which("postgres")
    if not found:
        pytest.skip("no PostgreSQL is installed on the system")
    return Path(found).parent


@contextmanager
def tls_server() -> Iterator[Server]:
    """Start a server with an empty database, and stop it at the end."""
    programs, password, port = find_programs(), new_password(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        account: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses root
            nobody = pwd.getpwnam("nobody")
            account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        password_file = Path(folder, "password")
        password_file.write_text(password, "utf-8")
        password_file.chmod(0o644)

        def run(*command: str | Path) -> None:
            subprocess.run(command, check=True, cwd=folder, capture_output=True, **account)

        run(programs / "initdb", "--auth=scram-sha-256", "--username=ada", "--encoding=UTF8",
            "--no-sync", f"--pwfile={password_file}", data)  # fmt: skip
        run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
            "-keyout", data / "server.key", "-out", data / "server.crt")  # fmt: skip
        with (data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write(CONFIGURATION.format(port=port))
        (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n", "utf-8")

        process = subprocess.Popen(
            [programs / "postgres", "-D", data],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **account,
        )
        try:
            server = Server(port, password)
            wait_for(server, process)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_for(server: Server, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(100):
        assert process.poll() is None, "the server has ended"
        try:
            server.ask("SELECT 1")
        except psycopg2.OperationalError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the server does not start")
