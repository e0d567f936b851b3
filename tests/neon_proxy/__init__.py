"""A stand-in for Neon: its proxy before a PostgreSQL, and a PgBouncer for pooled hosts.

The proxy does TLS, SNI, SCRAM with channel binding, scale to zero, and Neon's errors. It has a
process of its own: nothing that a test does slows it down, and it ends with the test, even with one
that was killed. Clients reach an endpoint by its real host name, `ep-….neon.tech`, together with
`hostaddr=127.0.0.1`.
"""

import json
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from neon_proxy.front import LOOPBACK, Reply, Way
from pgbouncer import PgBouncer, pgbouncer
from postgres_server import USER, Server, postgres_server

__all__ = ["Endpoint", "NeonProxy", "Reply", "Way", "neon_proxy"]

REGION = "us-east-2.aws.neon.tech"
LIMIT_SECONDS = 20


@dataclass
class NeonProxy:
    """The stand-in that runs.

    port: where clients reach it. authority: the file of who signed its certificate. pooler: None
    where no PgBouncer is installed; pooled hosts lead to the server then.
    """

    port: int
    authority: Path
    server: Server
    pooler: PgBouncer | None
    knobs: socket.socket = field(repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def call(self, method: str, name: str, **arguments: Any) -> Any:
        """Turn a knob. Returns what the stand-in answers."""
        with self.lock, self.knobs.makefile("rw", encoding="utf-8") as stream:
            stream.write(json.dumps({"method": method, "name": name, **arguments}) + "\n")
            stream.flush()
            return json.loads(stream.readline())

    def new_endpoint(self, database: str | None = None, *, wake_seconds: float = 0) -> "Endpoint":
        """Make a compute with a role and a password of its own.

        database: one that is there; None: an empty one. wake_seconds: it sleeps, and takes that
        long to wake; 0: it is awake.
        """
        name = f"ep-cool-name-{secrets.token_hex(4)}"
        endpoint = Endpoint(self, name, database or self.server.new_database())
        asleep = wake_seconds > 0
        roles = {endpoint.user: endpoint.password}
        self.call("add", name, roles=roles, wake_seconds=wake_seconds, asleep=asleep)
        return endpoint


@dataclass
class Endpoint:
    """One compute: where clients find it, and what a test can do to it."""

    proxy: NeonProxy
    name: str
    database: str
    user: str = USER
    # As long as Neon's, and easy to search for.
    password: str = field(default_factory=lambda: f"npg_{secrets.token_hex(8)}", repr=False)

    def host(self, *, pooled: bool = True) -> str:
        return f"{self.name}{'-pooler' if pooled else ''}.{REGION}"

    def url(self, **changes: str | None) -> str:
        """Return what the console shows, which is the pooled host, and where to find it.

        changes: other parts: user, password, host, port and database; all others are libpq's
        parameters. None: without it.
        """
        parts: dict[str, str | None] = {
            "user": self.user,
            "password": self.password,
            "host": self.host(),
            "port": str(self.proxy.port),
            "database": self.database,
            "sslmode": "require",
            "channel_binding": "require",
            "hostaddr": LOOPBACK,
            **changes,
        }
        known = {name: quote(value, safe="") for name, value in parts.items() if value is not None}
        login = f"{known.pop('user')}:{known.pop('password')}"
        place = f"{known.pop('host')}:{known.pop('port')}/{known.pop('database')}"
        query = "&".join(f"{name}={value}" for name, value in known.items())
        return f"postgresql://{login}@{place}?{query}"

    def direct_url(self, **changes: str | None) -> str:
        """Return the same without the pooler."""
        return self.url(**{"host": self.host(pooled=False), **changes})

    def reply(self, *replies: Reply) -> None:
        """Have the next attempts to connect answered so, one after the other."""
        self.proxy.call("reply", self.name, replies=[asdict(reply) for reply in replies])

    def suspend(self, way: Way = "fatal", *, wake_seconds: float = 0.5) -> None:
        """Scale to zero: hang up on all clients; the next one waits `wake_seconds`."""
        self.proxy.call("suspend", self.name, way=way, wake_seconds=wake_seconds)

    def hang_up(self, way: Way) -> int:
        """Hang up on all clients. Returns how many there were."""
        clients: int = self.proxy.call("hang_up", self.name, way=way)
        return clients

    def show(self) -> dict[str, Any]:
        """Return whether it is `asleep`, how many `clients` it has, and what it was asked so far.

        connections: attempts that named it; of each `at` (a time stamp), `host`, `pooled` and
        `parameters`. statements: of each a time stamp and the SQL.
        """
        state: dict[str, Any] = self.proxy.call("show", self.name)
        return state


@contextmanager
def neon_proxy() -> Iterator[NeonProxy]:
    """Start a stand-in with all that it needs, and end it at the end."""
    with ExitStack() as at_the_end:
        server = at_the_end.enter_context(postgres_server(settings={"max_connections": 300}))
        # The proxy has asked for the password. Behind it, all who come are trusted.
        rule = "host all all 127.0.0.1/32 trust\n"
        (server.data / "pg_hba.conf").write_text(rule, "utf-8")
        server.ask("SELECT pg_reload_conf()")
        pooler = None
        with suppress(pytest.skip.Exception):
            pooler = at_the_end.enter_context(
                pgbouncer(server.port, {USER: server.password}, server_idle_timeout=5)
            )
        folder = Path(at_the_end.enter_context(tempfile.TemporaryDirectory()))
        ports = (server.port, (pooler or server).port)
        process = subprocess.Popen(
            [sys.executable, "-m", "neon_proxy", str(folder), *map(str, ports)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        at_the_end.callback(end, process)
        assert process.stdout is not None
        port, knobs = map(int, process.stdout.readline().split())
        connection = socket.create_connection((LOOPBACK, knobs), LIMIT_SECONDS)
        at_the_end.enter_context(connection)
        yield NeonProxy(port, folder / "ca.pem", server, pooler, connection)


def end(process: "subprocess.Popen[str]") -> None:
    """Close its standard input, and with it the process."""
    try:
        process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
