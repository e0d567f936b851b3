"""The generated project accepts tokens of a real Better Auth server, and no others."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path
from typing import Any

import pytest

from machine import Project
from postgres_server import free_port

PACKAGE = "better-auth@1.7.25"
SERVER = Path(__file__).with_name("better_auth_server.mjs")
PASSWORD = "correct horse"
SECONDS = 60  # timeout of an operation
# The function in docs/frontend.md, up to the brace below its first word.
HOOK = re.compile(r"(?ms)^(?P<indent> +)beforeDelete: (?P<code>async .+?^(?P=indent)\})")

pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="needs Node.js and npm"
)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: HTTPMessage
    body: Any


@dataclass(frozen=True)
class Server:
    """A server on a local port."""

    process: "subprocess.Popen[str]"
    port: int

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else "", headers)
            response = connection.getresponse()
            text = response.read()
            return Answer(response.status, response.headers, json.loads(text) if text else None)
        finally:
            connection.close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(SECONDS)


class AuthServer(Server):
    """Better Auth."""

    def sign_up(self, name: str) -> "User":
        account = {"name": name, "email": f"{name}@example.com", "password": PASSWORD}
        answer = self.request("POST", "/api/auth/sign-up/email", account, Origin=self.origin)
        assert answer.status == 200, answer.body
        cookie = answer.headers["Set-Cookie"].partition(";")[0]
        return User(self, answer.body["user"]["id"], cookie)


@dataclass(frozen=True)
class User:
    """A user with a session cookie of a Better Auth server."""

    auth_server: AuthServer
    id: str
    cookie: str

    def token(self) -> str:
        answer = self.auth_server.request("GET", "/api/auth/token", Cookie=self.cookie)
        assert answer.status == 200, answer.body
        token: str = answer.body["token"]
        return token

    def delete_account(self) -> int:
        """Return the status of the answer."""
        headers = {"Cookie": self.cookie, "Origin": self.auth_server.origin}
        body = {"password": PASSWORD}
        return self.auth_server.request("POST", "/api/auth/delete-user", body, **headers).status

    def is_logged_in(self) -> bool:
        answer = self.auth_server.request("GET", "/api/auth/get-session", Cookie=self.cookie)
        return answer.body is not None


class Api(Server):
    """The generated project."""

    def tasks(self, token: str) -> Answer:
        return self.request("GET", "/tasks", Authorization=f"Bearer {token}")

    def add_task(self, title: str, token: str) -> Answer:
        return self.request("POST", "/tasks", {"title": title}, Authorization=f"Bearer {token}")


@contextmanager
def running(
    command: list[str], folder: Path, environment: dict[str, str], *, stdout: int | None = None
) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=stdout, encoding="utf-8"
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


class Starter:
    """Starts servers that are stopped at the end of the test."""

    def __init__(self, package: Path, project: Project, running_until: ExitStack) -> None:
        self._package = package
        self._project = project
        self._stack = running_until
        self._api_port = free_port()

    def auth_server(self, **jwt_options: object) -> AuthServer:
        """Start Better Auth. jwt_options: of its JWT plugin."""
        command = ["node", SERVER.name, json.dumps(jwt_options)]
        environment = os.environ | {"API_URL": f"http://127.0.0.1:{self._api_port}"}
        node = running(command, self._package, environment, stdout=subprocess.PIPE)
        process = self._stack.enter_context(node)
        assert process.stdout
        origin = process.stdout.readline().strip()
        assert origin, "Better Auth did not start"
        return AuthServer(process, int(origin.rpartition(":")[2]))

    def api(self, auth_server: AuthServer) -> Api:
        """Start the project, configured for tokens of `auth_server`."""
        port, self._api_port = self._api_port, free_port()
        command = [str(self._project.python), "-m", "uvicorn", "main:app", f"--port={port}"]
        environment = self._project.environment | {"BETTER_AUTH_URL": auth_server.origin}
        uvicorn = running(command, self._project.path, environment)
        process = self._stack.enter_context(uvicorn)
        deadline = time.monotonic() + SECONDS
        while not answers(port):
            assert process.poll() is None, "the project did not start"
            assert time.monotonic() < deadline, "the project does not answer"
            time.sleep(0.05)
        return Api(process, port)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def package(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Better Auth installed, and the server script beside it."""
    folder = tmp_path_factory.mktemp("better-auth")
    (folder / "package.json").write_text('{"private": true}', "utf-8")
    npm = shutil.which("npm") or "npm"  # a script on Windows, found only by its full name
    options = ["--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run([npm, "install", *options, PACKAGE], cwd=folder, check=True, timeout=240)
    shutil.copy(SERVER, folder)
    hook = re.search(HOOK, project.read("docs/frontend.md"))
    assert hook
    code = f"export const beforeDelete = {hook['code']};"
    (folder / "before_delete.mjs").write_text(code, "utf-8")
    return folder


@pytest.fixture(scope="module")
def ready_project(project: Project) -> Project:
    """The project with its PostgreSQL running, whatever other tests did."""
    outcome = project.run("uv", "run", "manage.py", "postgres", "start")
    assert outcome.code == 0, outcome.output
    return project


@pytest.fixture
def start(package: Path, ready_project: Project) -> Iterator[Starter]:
    with ExitStack() as stack:
        yield Starter(package, ready_project, stack)


def changed(token: str, **claims: object) -> str:
    """Change claims but keep the signature."""
    header, payload, signature = token.split(".")
    known = json.loads(base64.urlsafe_b64decode(payload + "=="))
    text = json.dumps(known | claims).encode()
    return f"{header}.{base64.urlsafe_b64encode(text).decode().rstrip('=')}.{signature}"


def key_id(token: str) -> str:
    header = json.loads(base64.urlsafe_b64decode(token.partition(".")[0] + "=="))
    return str(header["kid"])


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "ES512", "RS256", "PS256"])
def test_tokens_of_every_algorithm_are_accepted_and_tampered_ones_rejected(
    algorithm: str, start: Starter
) -> None:
    auth_server = start.auth_server(jwks={"keyPairConfig": {"alg": algorithm}})
    api = start.api(auth_server)
    ada, bob = auth_server.sign_up("ada"), auth_server.sign_up("bob")

    created = api.add_task("Ada's", ada.token())
    forged = api.tasks(changed(bob.token(), sub=ada.id))

    assert created.status == 201, created.body
    assert [task["title"] for task in api.tasks(ada.token()).body] == ["Ada's"]
    assert api.tasks(bob.token()).body == []
    assert forged.status == 401
    assert forged.headers["WWW-Authenticate"].startswith("Bearer")


def test_an_expired_token_is_rejected(start: Starter) -> None:
    auth_server = start.auth_server(jwt={"expirationTime": "2s"})
    api = start.api(auth_server)
    token = auth_server.sign_up("ada").token()

    assert api.tasks(token).status == 200
    time.sleep(2 + 5 + 1)  # 5: the project's LEEWAY_SECONDS
    assert api.tasks(token).status == 401


@pytest.mark.parametrize("claim", ["audience", "issuer"])
def test_a_token_with_another_audience_or_issuer_is_rejected(claim: str, start: Starter) -> None:
    auth_server = start.auth_server(jwt={claim: "https://elsewhere.example.com"})
    api = start.api(auth_server)

    assert api.tasks(auth_server.sign_up("ada").token()).status == 401


def test_a_token_of_another_better_auth_server_is_rejected(start: Starter) -> None:
    auth_server, stranger = start.auth_server(), start.auth_server()
    api = start.api(auth_server)
    token = stranger.sign_up("ada").token()

    assert api.tasks(token).status == 401
    assert api.tasks(changed(token, iss=auth_server.origin, aud=auth_server.origin)).status == 401


def test_a_new_key_is_accepted_within_seconds_and_a_withdrawn_one_rejected(start: Starter) -> None:
    # 8 seconds, so that a key is not withdrawn at the moment when the project fetches it, after 10.
    auth_server = start.auth_server(jwks={"rotationInterval": 8, "gracePeriod": 0})
    api = start.api(auth_server)
    ada = auth_server.sign_up("ada")
    old = ada.token()
    assert api.tasks(old).status == 200

    deadline = time.monotonic() + 8 + 10 + 10  # the project's COOLDOWN_SECONDS, and some slack
    while key_id(new := ada.token()) == key_id(old) or api.tasks(new).status != 200:
        assert time.monotonic() < deadline, "the new key was not accepted"
        time.sleep(0.2)

    assert api.tasks(old).status == 401


def test_tokens_with_a_known_key_are_accepted_while_the_auth_server_is_down(start: Starter) -> None:
    auth_server = start.auth_server()
    api = start.api(auth_server)
    token = auth_server.sign_up("ada").token()
    assert api.tasks(token).status == 200

    auth_server.stop()
    newcomer = start.api(auth_server).tasks(token)

    assert api.tasks(token).status == 200
    assert newcomer.status == 503
    assert int(newcomer.headers["Retry-After"]) > 0


def test_a_deleted_account_takes_its_tasks_along(start: Starter) -> None:
    auth_server = start.auth_server()
    api = start.api(auth_server)
    ada, bob = auth_server.sign_up("ada"), auth_server.sign_up("bob")
    api.add_task("Ada's", token := ada.token())
    api.add_task("Bob's", bob.token())

    status = ada.delete_account()

    assert (status, ada.is_logged_in()) == (200, False)
    assert api.tasks(token).body == []
    assert len(api.tasks(bob.token()).body) == 1


def test_an_account_stays_while_its_tasks_cannot_be_deleted(start: Starter) -> None:
    auth_server = start.auth_server()
    api = start.api(auth_server)
    ada = auth_server.sign_up("ada")
    api.add_task("Ada's", ada.token())

    api.stop()

    assert ada.delete_account() >= 400
    assert ada.is_logged_in()
