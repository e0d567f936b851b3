"""What every response has, whatever its route: headers, HEAD, and the prefix of a proxy."""

import re
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from fastapi import FastAPI, Response
from fastapi.testclient import TestClient

from config import Settings
from main import create_app
from postgres.url import DatabaseUrl

type Build = Callable[..., Settings]

PREFIX = "/api/v1"


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/ready",
        "/tasks?limit=1",
        "/tasks/{task}",
        "/tasks/{unknown}",
        "/auth/me",
        "/auth/login",
        "/nowhere",
        "/",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/docs/files/swagger-ui.css",
    ],
)
def test_head_answers_as_get_does_without_the_body(ada: TestClient, path: str) -> None:
    url = ada.post("/tasks", json={"title": "x"}).json()["url"]
    path = path.replace("{task}", url.rsplit("/", 1)[1]).replace("{unknown}", str(uuid4()))

    get, head = ada.get(path), ada.head(path)

    for answer in (get, head):
        answer.headers.pop("X-Request-ID")
    assert (head.status_code, head.headers, head.content) == (get.status_code, get.headers, b"")


def test_head_of_a_task_of_another_owner_tells_nothing(ada: TestClient, bob: TestClient) -> None:
    url = ada.post("/tasks", json={"title": "x"}).json()["url"]

    assert bob.head(url).status_code == 404


def test_head_is_not_documented(client: TestClient) -> None:
    paths: dict[str, Any] = client.get("/openapi.json").json()["paths"]

    assert not any("head" in path for path in paths.values())


@pytest.mark.parametrize("path", ["/health", "/tasks", "/nowhere", "/docs", "/openapi.json"])
def test_every_response_has_safe_headers(ada: TestClient, path: str) -> None:
    headers = ada.get(path).headers

    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"


def test_a_route_may_say_otherwise(nowhere: DatabaseUrl, app_with: Callable[..., FastAPI]) -> None:
    app = app_with(nowhere)

    @app.get("/etag")
    async def etag(response: Response) -> None:
        response.headers["ETag"] = '"1"'

    @app.get("/own")
    async def own(response: Response) -> None:
        response.headers["Cache-Control"] = "public, max-age=60"
        response.headers["Referrer-Policy"] = "same-origin"

    with TestClient(app) as client:
        assert client.get("/etag").headers["Cache-Control"] == "private, no-cache"
        headers = client.get("/own").headers

    assert headers.get_list("Cache-Control") == ["public, max-age=60"]
    assert headers.get_list("Referrer-Policy") == ["same-origin"]


def test_hsts_is_for_production_behind_tls(nowhere: DatabaseUrl, settings_for: Build) -> None:
    with TestClient(create_app(settings_for(nowhere, environment="production"))) as client:
        behind_tls = client.get("https://api.example.com/nowhere").headers
        without = client.get("http://api.example.com/nowhere").headers

    assert behind_tls["Strict-Transport-Security"] == "max-age=31536000"
    assert "Strict-Transport-Security" not in without


def test_hsts_is_not_for_development(client: TestClient) -> None:
    """It would hold for all apps on localhost."""
    headers = client.get("https://localhost/nowhere").headers

    assert "Strict-Transport-Security" not in headers


@pytest.fixture(scope="module")
def prefixed(database_url: DatabaseUrl, settings_for: Build) -> FastAPI:
    return create_app(settings_for(database_url, root_path=PREFIX))


@pytest.mark.parametrize("passed_on", ["", PREFIX], ids=["stripped", "kept"])
def test_addresses_have_the_prefix_under_which_a_proxy_serves_the_app(
    prefixed: FastAPI, ada: TestClient, passed_on: str
) -> None:
    headers = {"Authorization": ada.headers["Authorization"]}

    with TestClient(prefixed, headers=headers) as client:
        created = [client.post(f"{passed_on}/tasks", json={"title": "x"}) for _ in range(2)]
        page = client.get(f"{passed_on}/tasks", params={"limit": 1})
        home = client.get(f"{passed_on}/")
        docs = client.get(f"{passed_on}/docs")
        schema = client.get(f"{passed_on}/openapi.json")

    start = f"http://testserver{PREFIX}/tasks"
    assert {answer.json()["url"].startswith(f"{start}/") for answer in created} == {True}
    assert created[0].headers["Location"] == created[0].json()["url"]
    assert page.headers["Link"].startswith(f"<{start}?")
    assert f'"{PREFIX}/openapi.json"' in docs.text or f"'{PREFIX}/openapi.json'" in docs.text
    assert schema.json()["servers"] == [{"url": PREFIX}]
    assert home.status_code == 200
    assert not re.search(r"""(href=|src=|fetch\()["'`]/""", home.text)  # relative to the prefix
