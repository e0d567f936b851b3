"""How the app is served: in several processes, and a burst of requests begins a few at a time."""

import asyncio
import http.client
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

import server
from config import PROJECT_DIR, Settings
from postgres.url import DatabaseUrl
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


def test_a_worker_process_has_the_limits_of_the_protocol(
    settings_for: Callable[..., Settings], nowhere: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    configs: list[uvicorn.Config] = []

    def run(app: str, *, app_dir: str, **options: Any) -> None:
        assert app_dir == str(PROJECT_DIR)
        configs.append(uvicorn.Config(app, **options))

    url = nowhere.replace(user="nobody")  # no embedded server, which this would start
    settings = settings_for(url, environment="production", port=port)
    monkeypatch.setattr(server, "get_settings", lambda: settings)
    monkeypatch.setattr(uvicorn, "run", run)
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    monkeypatch.setenv("ENVIRONMENT", "production")  # of the worker, which imports main.py

    server.serve()
    (config,) = configs
    # uvicorn starts its workers like this one: they get what can be pickled.
    worker = get_context("spawn").Process(target=uvicorn.Server(config).run)
    worker.start()
    try:
        answers = [ask(worker, port, {"X": "x" * 70_000}) for _ in range(2)]
        small = ask(worker, port, {})
    finally:
        worker.terminate()
        worker.join()

    assert config.workers == 2
    assert [answer.status for answer in answers] == [431] * 2
    assert small.status == 200
    assert small.headers["Server"] is None


def ask(worker: BaseProcess, port: int, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Send a request, as soon as the worker listens."""
    while True:
        assert worker.is_alive(), f"the worker ended with exit code {worker.exitcode}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", "/health", headers=headers)
            return connection.getresponse()
        except ConnectionRefusedError:
            time.sleep(0.05)
        finally:
            connection.close()
