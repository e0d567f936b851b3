"""An imitation of Neon: its proxy in front of PostgreSQL, and PgBouncer for pooled hosts.

The proxy supports TLS, SNI, SCRAM with channel binding, scale to zero, and Neon's errors. It runs
in a separate process, so that tests do not slow it down. That process ends with the tests, even if
they are killed. Clients connect to an endpoint by its real host name, `ep-….neon.tech`, together
with `hostaddr=127.0.0.1`.
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
    """The running imitation.

    port: for clients. authority: the file of the certificate authority. pooler: None if PgBouncer
    is not installed; pooled hosts then lead to the server.
    """

    port: int
    authority: Path
    server: Server
    pooler: PgBouncer | None
    controls: socket.socket = field(repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def call(self, method: str, name: str, **arguments: Any) -> Any:
        """Call a method of Controls in the process. Returns its result."""
        with self.lock, self.controls.makefile("rw", encoding="utf-8") as stream:
            stream.write(json.dumps({"method": method, "name": name, **arguments}) + "\n")
            stream.flush()
            return json.loads(stream.readline())

    def new_endpoint(self, database: str | None = None, *, wake_seconds: float = 0) -> "Endpoint":
        """Create a compute with its own role and password.

        database: an existing one; default: a new, empty one. wake_seconds: if not 0, the compute
        sleeps, and takes this long to wake.
        """
        name = f"ep-cool-name-{secrets.token_hex(4)}"
        endpoint = Endpoint(self, name, database or self.server.new_database())
        asleep = wake_seconds > 0
        roles = {endpoint.user: endpoint.password}
        self.call("add", name, roles=roles, wake_seconds=wake_seconds, asleep=asleep)
        return endpoint


@dataclass
class Endpoint:
    """A compute: its addresses, and how a test controls it."""

    proxy: NeonProxy
    name: str
    database: str
    user: str = USER
    # As long as a password of Neon, and easy to search for.
    password: str = field(default_factory=lambda: f"npg_{secrets.token_hex(8)}", repr=False)

    def host(self, *, pooled: bool = True) -> str:
        return f"{self.name}{'-pooler' if pooled else ''}.{REGION}"

    def url(self, **changes: str | None) -> str:
        """Return the connection string that the console shows, plus `hostaddr`.

        It has the pooled host. changes: user, password, host, port, database, or a parameter of
        libpq; None removes a part.
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
        """Return the connection string without the pooler."""
        return self.url(**{"host": self.host(pooled=False), **changes})

    def reply(self, *replies: Reply) -> None:
        """Set the replies to the next connection attempts, in order."""
        self.proxy.call("reply", self.name, replies=[asdict(reply) for reply in replies])

    def suspend(self, way: Way = "fatal", *, wake_seconds: float = 0.5) -> None:
        """Scale to zero: disconnect all clients, and make the next one wait `wake_seconds`."""
        self.proxy.call("suspend", self.name, way=way, wake_seconds=wake_seconds)

    def hang_up(self, way: Way) -> int:
        """Disconnect all clients. Returns how many there were."""
        clients: int = self.proxy.call("hang_up", self.name, way=way)
        return clients

    def show(self) -> dict[str, Any]:
        """Return `asleep`, the number of `clients`, `connections` and `statements`.

        connections: attempts that named the endpoint, each with `at` (a timestamp), `host`,
        `pooled` and `parameters`. statements: each as a timestamp and the SQL.
        """
        state: dict[str, Any] = self.proxy.call("show", self.name)
        return state


@contextmanager
def neon_proxy() -> Iterator[NeonProxy]:
    """Start an imitation with the servers it needs, and stop them at the end."""
    with ExitStack() as stack:
        server = stack.enter_context(postgres_server(settings={"max_connections": 300}))
        # The proxy checks passwords. The server behind it trusts all clients.
        rule = "host all all 127.0.0.1/32 trust\n"
        (server.data / "pg_hba.conf").write_text(rule, "utf-8")
        server.ask("SELECT pg_reload_conf()")
        pooler = None
        with suppress(pytest.skip.Exception):
            pooler = stack.enter_context(
                pgbouncer(server.port, {USER: server.password}, server_idle_timeout=5)
            )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = (server.port, (pooler or server).port)
        process = subprocess.Popen(
            [sys.executable, "-m", "neon_proxy", str(folder), *map(str, ports)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(end, process)
        assert process.stdout is not None
        port, controls = map(int, process.stdout.readline().split())
        connection = socket.create_connection((LOOPBACK, controls), LIMIT_SECONDS)
        stack.enter_context(connection)
        yield NeonProxy(port, folder / "ca.pem", server, pooler, connection)


def end(process: "subprocess.Popen[str]") -> None:
    """End the process by closing its standard input."""
    try:
        process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
