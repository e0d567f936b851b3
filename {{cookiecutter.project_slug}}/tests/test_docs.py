"""/docs and /redoc: there in development, complete without internet, and not in production."""

import re
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from config import Settings
from main import create_app
from pages.docs import FILES, LOGO
from pages.policy import hashes_of
from postgres.url import DatabaseUrl

type Build = Callable[..., Settings]

DOCS = ["/docs", "/redoc", "/openapi.json", f"{FILES}/swagger-ui-bundle.js"]
PAGES = ["/docs", "/redoc"]


def addresses_in(html: str) -> list[str]:
    """Return what a page loads."""
    return re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", html)


@pytest.mark.parametrize("path", PAGES)
def test_all_that_a_page_loads_is_here(client: TestClient, path: str) -> None:
    page = client.get(path)

    addresses = addresses_in(page.text)
    assert len(addresses) >= 3
    for address in addresses:
        assert address.startswith("/")
        assert client.get(address).status_code == 200


@pytest.mark.parametrize("path", PAGES)
def test_a_page_may_load_from_here_only(client: TestClient, path: str) -> None:
    page = client.get(path)

    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; ")
    assert f"script-src 'self' {hashes_of('script', page.text)}".strip() in policy.split("; ")
    assert not re.search(r"https?:|\*|unsafe-eval", policy)


def test_redoc_does_not_fetch_its_logo(client: TestClient) -> None:
    script = client.get(f"{FILES}/redoc.standalone.js")

    assert script.headers["Content-Type"].startswith("text/javascript")
    assert len(script.content) > 100_000
    assert LOGO not in script.content


@pytest.mark.parametrize("path", DOCS)
def test_the_documentation_is_there_in_development(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"api_docs": False}, 404),
        ({"environment": "production"}, 404),
        ({"environment": "production", "api_docs": True}, 200),
    ],
)
def test_settings_decide_whether_the_documentation_is_there(
    settings: dict[str, object], status: int, nowhere: DatabaseUrl, settings_for: Build
) -> None:
    with TestClient(create_app(settings_for(nowhere, **settings))) as client:
        answers = {path: client.get(path).status_code for path in DOCS}

    assert answers == dict.fromkeys(DOCS, status)


@pytest.fixture(scope="module")
def unusual(nowhere: DatabaseUrl, settings_for: Build) -> TestClient:
    """A client of an app behind a prefix, whose name is a script."""
    name = "</title><script>alert(1)</script>"
    return TestClient(create_app(settings_for(nowhere, app_name=name, root_path="/api/v1")))


@pytest.mark.parametrize("path", PAGES)
def test_the_apps_name_is_text(unusual: TestClient, path: str) -> None:
    page = unusual.get(path).text

    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


@pytest.mark.parametrize("path", PAGES)
def test_behind_a_proxys_prefix_all_addresses_have_it(unusual: TestClient, path: str) -> None:
    page = unusual.get(path).text

    assert {address.startswith("/api/v1/") for address in addresses_in(page)} == {True}
