"""The public Todo-Backend contract, https://todobackend.com, for a client that sends a token."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

ROOT = "/tasks"


def post(client: TestClient, **fields: object) -> dict[str, Any]:
    todo: dict[str, Any] = client.post(ROOT, json=fields).raise_for_status().json()
    return todo


def get(client: TestClient, url: str) -> Any:
    return client.get(url).raise_for_status().json()


def patch(client: TestClient, url: str, **fields: object) -> dict[str, Any]:
    todo: dict[str, Any] = client.patch(url, json=fields).raise_for_status().json()
    return todo


def test_the_root_answers_a_get(ada: TestClient) -> None:
    assert ada.get(ROOT).is_success


def test_the_root_answers_a_post_with_the_todo(ada: TestClient) -> None:
    assert post(ada, title="a todo")["title"] == "a todo"


def test_the_root_answers_a_delete(ada: TestClient) -> None:
    assert ada.delete(ROOT).is_success


def test_after_a_delete_of_the_root_the_list_is_empty(ada: TestClient) -> None:
    post(ada, title="a todo")

    ada.delete(ROOT)

    assert get(ada, ROOT) == []


def test_a_posted_todo_is_in_the_list(ada: TestClient) -> None:
    post(ada, title="walk the dog")

    assert [todo["title"] for todo in get(ada, ROOT)] == ["walk the dog"]


def test_a_new_todo_is_not_completed(ada: TestClient) -> None:
    posted = post(ada, title="blah")

    assert posted["completed"] is False
    assert get(ada, ROOT)[0]["completed"] is False


def test_a_new_todo_has_a_url(ada: TestClient) -> None:
    posted = post(ada, title="blah")

    assert posted["url"].startswith("http")
    assert get(ada, ROOT)[0]["url"].startswith("http")


def test_the_url_of_a_new_todo_answers_with_it(ada: TestClient) -> None:
    posted = post(ada, title="my todo")

    assert get(ada, posted["url"])["title"] == "my todo"


def test_todos_of_the_list_can_be_reached_by_url(ada: TestClient) -> None:
    post(ada, title="one")
    post(ada, title="two")

    reached = [get(ada, todo["url"])["title"] for todo in get(ada, ROOT)]

    assert sorted(reached) == ["one", "two"]


def test_a_title_can_be_patched(ada: TestClient) -> None:
    assert patch(ada, post(ada, title="before")["url"], title="after")["title"] == "after"


def test_completed_can_be_patched(ada: TestClient) -> None:
    assert patch(ada, post(ada, title="x")["url"], completed=True)["completed"] is True


def test_a_patch_stays(ada: TestClient) -> None:
    url = post(ada, title="before")["url"]

    patch(ada, url, title="after", completed=True)

    for todo in (get(ada, url), get(ada, ROOT)[0]):
        assert (todo["title"], todo["completed"]) == ("after", True)


def test_a_deleted_todo_is_out_of_the_list(ada: TestClient) -> None:
    url = post(ada, title="x")["url"]

    assert ada.delete(url).is_success

    assert get(ada, ROOT) == []


def test_a_todo_can_be_posted_with_an_order(ada: TestClient) -> None:
    assert post(ada, title="x", order=523)["order"] == 523


def test_an_order_can_be_patched(ada: TestClient) -> None:
    assert patch(ada, post(ada, title="x", order=10)["url"], order=95)["order"] == 95


def test_a_patched_order_stays(ada: TestClient) -> None:
    url = post(ada, title="x", order=10)["url"]

    patch(ada, url, order=95)

    assert get(ada, url)["order"] == 95


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "PUT", "DELETE"])
def test_a_browser_of_the_front_end_may_send_everything(client: TestClient, method: str) -> None:
    answer = client.options(
        ROOT,
        headers={
            "Origin": "http://localhost:3000",
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "authorization,content-type",
        },
    )

    assert answer.is_success
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert method in answer.headers["Access-Control-Allow-Methods"]
    allowed = answer.headers["Access-Control-Allow-Headers"].lower()
    assert {"authorization", "content-type"} <= set(allowed.replace(" ", "").split(","))


def test_a_browser_of_another_origin_may_not(client: TestClient) -> None:
    answer = client.get("/health", headers={"Origin": "https://evil.example"})

    assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_browser_may_read_the_headers_that_matter(ada: TestClient) -> None:
    answer = ada.get(ROOT, headers={"Origin": "http://localhost:3000"})

    exposed = answer.headers["Access-Control-Expose-Headers"].replace(" ", "").split(",")
    assert {"ETag", "Link", "Location", "Retry-After"} <= set(exposed)


def test_urls_are_those_of_the_proxy_in_front(ada: TestClient) -> None:
    app: Any = ada.app
    behind_uvicorn: Any = ProxyHeadersMiddleware(app, trusted_hosts="*")
    proxied = TestClient(behind_uvicorn, base_url="http://api.example.com")
    proxied.headers |= ada.headers | {"X-Forwarded-Proto": "https"}

    url = post(proxied, title="x")["url"]

    assert url.startswith("https://api.example.com/tasks/")
