"""Requests about accounts, for the tests."""

import time
from typing import Any
from uuid import uuid4

import pytest
from anyio.from_thread import BlockingPortal
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy import Connection, text
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from auth.passwords import Throttle

PASSWORD = "correct horse battery staple"
NEW_PASSWORD = "Tr0ub4dor&3 is not enough"
FAST = PasswordHash((Argon2Hasher(memory_cost=8, time_cost=1, parallelism=1),))


def behind_proxy(app: FastAPI) -> TestClient:
    """Return a client behind a proxy, whose address is what X-Forwarded-For says."""
    proxied: Any = ProxyHeadersMiddleware(app, trusted_hosts="*")  # type: ignore[arg-type]
    return TestClient(proxied)


def first_client(app: FastAPI, portal: BlockingPortal) -> TestClient:
    """Return a client of a running app, behind a proxy, when no limit has counted anything yet."""
    client = behind_proxy(app)
    client.portal = portal
    portal.call(app.state.resources.throttle._limiter.storage.reset)
    return client


def set_limit(monkeypatch: pytest.MonkeyPatch, limit: str, amount: int) -> None:
    """Change one of the limits of Throttle, such as "LOGINS"."""
    usual = getattr(Throttle, limit)
    monkeypatch.setattr(Throttle, limit, type(usual)(amount, usual.multiples, usual.namespace))


def new_email() -> str:
    return f"ada-{uuid4().hex}@example.com"


def register(
    client: TestClient, email: str, address: str = "192.0.2.1", **changes: Any
) -> Response:
    body = {"email": email, "password": PASSWORD, "name": "Ada"}
    headers = {"X-Forwarded-For": address}
    return client.post("/auth/register", json=body | changes, headers=headers)


def log_in(
    client: TestClient, email: str, password: str = PASSWORD, address: str = "192.0.2.1"
) -> Response:
    form = {"username": email, "password": password}
    return client.post("/auth/login", data=form, headers={"X-Forwarded-For": address})


def refresh(client: TestClient, token: str) -> Response:
    return client.post("/auth/refresh", json={"refresh_token": token})


def log_out(client: TestClient, token: str) -> Response:
    return client.post("/auth/logout", json={"refresh_token": token})


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def get_me(client: TestClient, token: str) -> Response:
    return client.get("/auth/me", headers=bearer(token))


def change_password(client: TestClient, token: str, current: str, new: object) -> Response:
    body = {"current_password": current, "new_password": new}
    return client.post("/auth/password", json=body, headers=bearer(token))


def list_sessions(client: TestClient, token: str) -> list[dict[str, Any]]:
    answer = client.get("/auth/sessions", headers=bearer(token))
    assert answer.status_code == 200
    sessions: list[dict[str, Any]] = answer.json()
    return sessions


def end_session(client: TestClient, token: str, session_id: str) -> Response:
    return client.delete(f"/auth/sessions/{session_id}", headers=bearer(token))


def delete_me(client: TestClient, token: str, password: str = PASSWORD) -> Response:
    body = {"current_password": password}
    return client.request("DELETE", "/auth/me", json=body, headers=bearer(token))


def wait_until_somebody_waits(connection: Connection) -> None:
    """Return as soon as another connection waits for a lock of this one.

    In a transaction, pg_stat_activity would always show the connections that there were first.
    """
    waiting = text(
        "SELECT count(*) FROM pg_locks"
        " WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))"
    )
    deadline = time.monotonic() + 10
    while not connection.scalar(waiting):
        assert time.monotonic() < deadline, "nobody waits"
        time.sleep(0.01)


class Account:
    """A registered user who is logged in."""

    def __init__(self, client: TestClient) -> None:
        self.email = new_email()
        self.id: str = register(client, self.email).json()["id"]
        tokens = log_in(client, self.email).json()
        self.access: str = tokens["access_token"]
        self.refresh: str = tokens["refresh_token"]
