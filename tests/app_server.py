"""Serve the generated project's app as in production."""

import json
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil

import processes
from machine import Project
from postgres_server import free_port

START_SECONDS = 60
LIMIT_SECONDS = 15.0  # the app promises that no request takes longer
REQUEST_SECONDS = 60  # far longer, so that tests see what the app does
PASSWORD = "correct horse"


@dataclass(frozen=True)
class Answer:
    """A response. seconds: how long it took."""

    status: int
    headers: Message
    body: Any
    seconds: float

    @property
    def is_refusal(self) -> bool:
        """Whether it is the documented refusal, in time."""
        return self.asks_to_retry and self.seconds < LIMIT_SECONDS

    @property
    def asks_to_retry(self) -> bool:
        """Whether it is a 503 with Retry-After."""
        return self.status == 503 and int(self.headers.get("Retry-After", 0)) > 0


def new_address() -> str:
    """Return an address from which nobody has come."""
    return f"2001:db8:{secrets.token_hex(2)}:{secrets.token_hex(2)}::1"


@dataclass(frozen=True)
class AppServer:
    """A running app, with one or more processes."""

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = None,
        address: str | None = None,
    ) -> Answer:
        """Send a request on a new connection. Raises OSError, HTTPException.

        address: of the client, as a proxy passes it on.
        """
        start = time.monotonic()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if address:
            headers["X-Forwarded-For"] = address
        connection = HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        try:
            if isinstance(body, str):  # a form
                headers["Content-Type"] = "application/x-www-form-urlencoded"
            elif body is not None:
                headers["Content-Type"] = "application/json"
                body = json.dumps(body)
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        content = json.loads(text) if text else None
        return Answer(response.status, response.headers, content, time.monotonic() - start)

    def register(self, name: str = "") -> str:
        """Register an account and log in. Returns the access token."""
        email = f"{name or secrets.token_hex(8)}@example.com"
        account = {"email": email, "password": PASSWORD, "name": "Ada"}
        address = new_address()  # few may register from one address
        answer = self.request("POST", "/auth/register", account, address=address)
        assert answer.status == 201, answer
        return self.log_in(email)

    def log_in(self, email: str) -> str:
        """Log in. Returns the access token."""
        answer = self.request("POST", "/auth/login", f"username={email}&password={PASSWORD}")
        assert answer.status == 200, answer
        token: str = answer.body["access_token"]
        return token

    def delete_account(self, token: str) -> Answer:
        return self.request("DELETE", "/auth/me", {"current_password": PASSWORD}, token=token)

    def lines(self) -> list[dict[str, Any]]:
        """Return the JSON lines of the log."""
        found = []
        for line in self.log.read_text("utf-8", "replace").splitlines():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def stop(self, seconds: float = 30) -> int:
        """Send SIGTERM and wait. Returns the exit code."""
        self.process.terminate()
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Kill the app and its workers (SIGKILL)."""
        for process in processes.family(self.process.pid):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(processes.END_SECONDS)


def production(
    project: Project, url: str, settings: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment of an app in production, the same for all processes and replicas."""
    return {
        **project.environment,
        "DATABASE_URL": url,
        "ENVIRONMENT": "production",
        "REGISTRATION": "open",
        "BETTER_AUTH_SECRET": "of all workers and replicas, for tests only",
        **(settings or {}),
    }


@contextmanager
def app_server(
    project: Project,
    url: str,
    log: Path,
    settings: Mapping[str, str] | None = None,
    *,
    workers: int = 1,
) -> Iterator[AppServer]:
    """Serve the project's app on a database.

    log: a file. settings: additional environment variables.
    """
    port = free_port()
    command: list[str | Path] = [project.python, "-m", "uvicorn", "main:app", f"--port={port}"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, f"--workers={workers}", "--timeout-keep-alive=75"],
            cwd=project.path,
            env=production(project, url, settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    app = AppServer(port, process, log)
    try:
        wait_for(app)
        yield app
    finally:
        if process.poll() is None:
            app.kill()


def wait_for(app: AppServer) -> None:
    """Wait until the app responds."""
    limit = time.monotonic() + START_SECONDS
    while True:
        assert app.process.poll() is None, f"the app has ended:\n{app.log.read_text('utf-8')}"
        try:
            app.request("GET", "/health")
        except (OSError, HTTPException):
            if time.monotonic() > limit:
                raise
            time.sleep(0.05)
        else:
            return
