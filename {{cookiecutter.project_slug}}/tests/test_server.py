"""How the app is served: in several processes, and a burst of requests begins a few at a time."""

import asyncio
import http.client
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from starlette.types import Message, Receive, Scope, Send

from config import PROJECT_DIR, Settings
from server import REQUESTS_PER_TURN, TURNS_PER_REQUEST, Pacing
from server.protocol import LimitedProtocol

BURST = 100


async def receive() -> Message:
    raise AssertionError("nothing is received here")


async def send(_message: Message) -> None:
    raise AssertionError("nothing is sent here")


def request(path: str) -> Scope:
    return {"type": "http", "path": path}


def test_a_probe_does_not_wait_for_a_burst_to_begin() -> None:
    begun: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        begun.append(scope["path"])

    async def burst() -> None:
        pacing = Pacing(app)
        requests = [pacing(request(f"/tasks/{number}"), receive, send) for number in range(BURST)]
        await asyncio.gather(*requests, pacing(request("/health"), receive, send))

    asyncio.run(burst())

    assert begun.index("/health") == REQUESTS_PER_TURN
    begun.remove("/health")
    assert begun == [f"/tasks/{number}" for number in range(BURST)]


def test_while_connections_come_few_requests_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LimitedProtocol, "accepted", 0)
    begun: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        begun.append(scope["path"])

    async def burst() -> None:
        pacing = Pacing(app)
        requests = [pacing(request(f"/tasks/{number}"), receive, send) for number in range(BURST)]
        waiting = asyncio.gather(*requests)
        await asyncio.sleep(0)  # the first of them begin
        for _ in range(10 * TURNS_PER_REQUEST + 1):  # it sees the last one in the next turn
            LimitedProtocol.accepted += 1
            await asyncio.sleep(0)
        assert len(begun) == REQUESTS_PER_TURN + 10
        await waiting  # now that no more come

    asyncio.run(burst())

    assert begun == [f"/tasks/{number}" for number in range(BURST)]


def test_a_request_that_was_given_up_costs_no_turn() -> None:
    begun: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        begun.append(scope["path"])

    async def burst() -> None:
        pacing = Pacing(app)
        tasks = [
            asyncio.create_task(pacing(request(f"/tasks/{number}"), receive, send))
            for number in range(BURST)
        ]
        await asyncio.sleep(0)
        for task in tasks[REQUESTS_PER_TURN:-1]:
            task.cancel()
        for _ in range(4):  # turns: many fewer than those that were given up would take
            await asyncio.sleep(0)

    asyncio.run(burst())

    assert begun == [
        *(f"/tasks/{number}" for number in range(REQUESTS_PER_TURN)),
        f"/tasks/{BURST - 1}",
    ]


def test_requests_begin_at_once_while_there_are_few() -> None:
    begun: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        begun.append(scope["path"])

    async def trickle() -> None:
        pacing = Pacing(app)
        for _ in range(3):
            waits = [pacing(request("/tasks"), receive, send) for _ in range(REQUESTS_PER_TURN)]
            for one in waits:
                with suppress(StopIteration):
                    one.send(None)  # runs it as far as it does not wait
                one.close()
            await asyncio.sleep(0)

    asyncio.run(trickle())

    assert len(begun) == 3 * REQUESTS_PER_TURN


def test_every_worker_has_the_limits_of_the_protocol(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    environment = {
        # Never the tests' own server: main.py would start the one of this folder with its password.
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
        "BETTER_AUTH_SECRET": settings.better_auth_secret.get_secret_value(),
        "ENVIRONMENT": "production",
        "PORT": str(port),
        "WEB_CONCURRENCY": "2",
    }
    with subprocess.Popen(
        [sys.executable, "main.py"],
        cwd=PROJECT_DIR,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
    ) as server:
        try:
            answers = [ask(port, {"X": "x" * 70_000}) for _ in range(4)]
            small = ask(port, {})
        finally:
            server.terminate()

    assert [answer.status for answer in answers] == [431] * 4
    assert small.status == 200
    assert small.headers["Server"] is None


def ask(port: int, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Send a request, as soon as the server is there."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", "/health", headers=headers)
            return connection.getresponse()
        except ConnectionRefusedError:
            time.sleep(0.05)
        finally:
            connection.close()
