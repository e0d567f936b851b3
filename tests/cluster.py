"""Several processes of the app behind nginx, with poolers in front of a primary and a replica.

nginx is configured by docs/deploying.md of the project.
"""

import itertools
import json
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

import processes
from app_server import REQUEST_SECONDS, AppServer, production, wait_for
from nginx import nginx
from pgbouncer import PgBouncer, pgbouncer
from postgres_server import USER, Server, free_port
from stage import POOL_SIZE, Stage

PROCESSES = 4
POOLING = {
    "default_pool_size": 8,  # fewer than the processes want
    "server_login_retry": 1,  # by default, 15 s after a failure before it connects again
}
CLIENTS = 24
PAUSE_SECONDS = 0.05  # of each client, between two requests
CALM_SECONDS = 0.5  # the same, while a process starts: it needs the processors
STOP_SECONDS = 30  # what the page wants platforms to allow
SERVED_BY = "X-Served-By"  # the processes that nginx tried


@dataclass(frozen=True)
class Failure:
    """A request that got neither a 2xx nor a 503 with Retry-After. by: the process that failed."""

    client: int
    method: str
    by: str
    reason: str


@dataclass
class Crowd:
    """Clients that keep their connections. Each lists, reads and creates tasks of one user."""

    port: int
    token: str
    failures: list[Failure] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)  # of tasks that were reported as created
    served: Counter[str] = field(default_factory=Counter)  # requests that succeeded, by process
    lists: int = 0
    longest: float = 0.0  # seconds until a response was there
    _pause: float = PAUSE_SECONDS
    _over: threading.Event = field(default_factory=threading.Event)

    def go_on(self, client: int) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        path = "/tasks"
        for number in itertools.count():
            if self._over.wait(self._pause):
                break
            turn = number % 3
            title = f"{client}-{number}" if turn == 0 else ""
            method = "POST" if title else "GET"
            by, begun = "", time.monotonic()
            try:
                response = self._send(connection, method, path if turn == 1 else "/tasks", title)
                by = response.headers[SERVED_BY]
                content = json.loads(response.read())
            except (OSError, HTTPException, ValueError) as error:
                self.failures.append(Failure(client, method, by, repr(error)))
                connection.close()
                continue
            self.longest = max(self.longest, time.monotonic() - begun)
            if response.status == 503 and response.headers["Retry-After"]:
                self.refusals.append(f"{method} {by}")
            elif not 200 <= response.status < 300:
                self.failures.append(Failure(client, method, by, f"{response.status} {content}"))
            else:
                self.served[by] += 1
                self.lists += turn == 2
                if title:
                    self.titles.append(title)
                    path = f"/tasks/{content['id']}"
        connection.close()

    def _send(self, connection: HTTPConnection, method: str, path: str, title: str) -> HTTPResponse:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        body = json.dumps({"title": title}) if title else None
        connection.request(method, path, body, headers)
        return connection.getresponse()

    @property
    def answered(self) -> int:
        return self.served.total()

    def wait_for_more(self, number: int = 10 * CLIENTS) -> None:
        """Wait until so many more requests have succeeded. Raises TimeoutError."""
        goal, limit = self.answered + number, time.monotonic() + REQUEST_SECONDS
        while self.answered < goal:
            if time.monotonic() > limit:
                raise TimeoutError(f"{goal - self.answered} answers are missing: {self.failures}")
            time.sleep(0.05)

    @contextmanager
    def calm(self) -> Iterator[None]:
        """Let the clients pause for longer until the block ends."""
        self._pause = CALM_SECONDS
        yield
        self._pause = PAUSE_SECONDS

    def __str__(self) -> str:
        refused, failed = len(self.refusals), len(self.failures)
        return (
            f"{self.answered + refused + failed} sent, {self.answered} 2xx, {refused} 503,"
            f" {failed} failed, longest {self.longest:.2f} s"
        )

    def stop(self) -> None:
        self._over.set()


@dataclass
class Cluster:
    """All of it, running. members: the processes. front: the app, as clients reach it."""

    stage: Stage
    replica: Server
    pooler: PgBouncer
    replica_pooler: PgBouncer
    front: AppServer
    members: list[AppServer]

    @contextmanager
    def crowd(self, token: str) -> Iterator[Crowd]:
        """Let clients send requests until the end of the block."""
        crowd = Crowd(self.front.port, token)
        threads = [threading.Thread(target=crowd.go_on, args=[n]) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            crowd.wait_for_more()
            yield crowd
        finally:
            crowd.stop()
            for thread in threads:
                thread.join()
            print(f"\n{crowd}")  # for `pytest -n0 -sv`

    def replace(self, member: AppServer) -> None:
        """Start a process in place of one that has ended, and wait until it serves."""
        new = start(self.stage, self.pooler, self.replica_pooler, member.port, member.log)
        self.members[self.members.index(member)] = new
        wait_for(new)

    def replica_statements(self) -> int:
        """Return how many statements have gone to the replica."""
        stats = self.replica_pooler.show("STATS_TOTALS")
        return sum(row["query_count"] for row in stats if row["database"] == self.stage.database)

    def told_of_replica(self) -> list[list[tuple[str, str]]]:
        """Return message and finding of each process's lines about the replica."""
        return [
            [
                (line["event"], line.get("finding", ""))
                for line in member.lines()
                if line["event"].startswith("replica ")
            ]
            for member in self.members
        ]


def start(
    stage: Stage, pooler: PgBouncer, replica_pooler: PgBouncer, port: int, log: Path
) -> AppServer:
    """Start a process. It does not serve yet."""
    settings = {
        "READ_DATABASE_URL": stage.url(replica_pooler.port),
        "DB_POOL_SIZE": str(POOL_SIZE),
        "PORT": str(port),
    }
    with log.open("ab") as output:
        process = subprocess.Popen(
            [stage.project.python, "main.py"],
            cwd=stage.project.path,
            env=production(stage.project, stage.url(pooler.port), settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    return AppServer(port, process, log)


def balancer(page: str, port: int, ports: list[int]) -> str:
    """Return the blocks of a page for nginx, with other processes and without TLS."""
    blocks = re.findall(r"^```nginx\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (server,) = [block for block in blocks if "server_name" in block]
    (upstream,) = [block for block in blocks if block.startswith("upstream todo {")]
    printed = re.findall(r"^ *server .*\n", upstream, re.MULTILINE)
    servers = [re.sub(r":\d+", f":{member}", printed[0]) for member in ports]
    upstream = upstream.replace("".join(printed), "".join(servers))
    assert "proxy_pass http://127.0.0.1:8000;" in server
    server = server.replace("http://127.0.0.1:8000", "http://todo")
    server = server.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    server = re.sub(r"^ *ssl_certificate.*\n", "", server, flags=re.MULTILINE)
    return f"add_header {SERVED_BY} $upstream_addr always;\n{upstream}\n{server}"


@contextmanager
def cluster(stage: Stage) -> Iterator[Cluster]:
    """Start everything on a stage, and stop it at the end."""
    project, users = stage.project, {USER: stage.server.password}
    with ExitStack() as stack:
        replica = stack.enter_context(stage.server.replica())
        pooler, replica_pooler = (
            stack.enter_context(pgbouncer(port, users, **POOLING))
            for port in (stage.server.port, replica.port)
        )
        ports = [free_port() for _ in range(PROCESSES)]
        members: list[AppServer] = []
        stack.callback(kill_all, members)
        for port in ports:
            log = stage.folder / f"member-{port}.log"
            members.append(start(stage, pooler, replica_pooler, port, log))
        port = free_port()
        blocks = balancer(project.read("docs/deploying.md"), port, ports)
        stack.enter_context(nginx(blocks, port, stage.folder))
        for member in members:
            wait_for(member)
        front = AppServer(port, members[0].process, stage.folder / "nginx.log")
        yield Cluster(stage, replica, pooler, replica_pooler, front, members)


def kill_all(members: list[AppServer]) -> None:
    for member in members:
        processes.end(member.process)
