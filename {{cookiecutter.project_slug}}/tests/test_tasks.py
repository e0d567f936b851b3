"""Tasks of two owners, who never see each other's."""

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from itsdangerous import URLSafeSerializer
from sqlalchemy import Connection, Engine, create_engine, insert, text
from sqlmodel import Session, col, select
from uuid_utils.compat import uuid7

import migrations
from config import Settings
from db import StatementDep
from main import create_app
from models import Priority, Task
from postgres.tests.servers import run_alone
from postgres.url import DatabaseUrl
from routes import new_tasks
from routes.new_tasks import Quota
from routes.tasks import TaskSort
from tests.conftest import add_account

type ClientOf = Callable[[str], TestClient]

MOMENT = "2030-01-31T12:00:00Z"


def create(client: TestClient, **fields: object) -> dict[str, Any]:
    answer = client.post("/tasks", json={"title": "Write a test", **fields})
    assert answer.status_code == 201, answer.text
    task: dict[str, Any] = answer.json()
    return task


def titles(client: TestClient, **query: object) -> list[str]:
    answer = client.get("/tasks", params={name: str(value) for name, value in query.items()})
    assert answer.status_code == 200, answer.text
    return [task["title"] for task in answer.json()]


def pages(client: TestClient, **query: object) -> Iterator[list[dict[str, Any]]]:
    """Follow the Link headers from the first page to the last."""
    answer = client.get("/tasks", params={name: str(value) for name, value in query.items()})
    while True:
        assert answer.status_code == 200, answer.text
        yield answer.json()
        if "next" not in answer.links:
            return
        answer = client.get(answer.links["next"]["url"])


def test_a_new_task_has_defaults_and_an_address(ada: TestClient) -> None:
    answer = ada.post("/tasks", json={"title": "Write a test"})

    task = answer.json()
    assert answer.status_code == 201
    assert task == {
        "id": task["id"],
        "url": f"http://testserver/tasks/{task['id']}",
        "title": "Write a test",
        "description": None,
        "completed": False,
        "order": None,
        "priority": "medium",
        "due_at": None,
        "created_at": task["created_at"],
        "updated_at": task["created_at"],
    }
    assert answer.headers["Location"] == task["url"]
    assert ada.get(task["url"]).json() == task


def test_every_field_is_kept(ada: TestClient) -> None:
    fields = {
        "title": "Παρα\u0301δειγμα 👩‍💻 \\ % _ ' \"",
        "description": "first line\nsecond line",
        "completed": True,
        "order": -7,
        "priority": "high",
        "due_at": MOMENT,
    }

    task = create(ada, **fields)

    assert {name: ada.get(task["url"]).json()[name] for name in fields} == fields


def test_a_whole_number_may_have_a_zero_fraction(ada: TestClient) -> None:
    body = b'{"title": "seventh", "order": 7.0}'

    answer = ada.post("/tasks", content=body, headers={"Content-Type": "application/json"})

    assert answer.json()["order"] == 7


def test_a_date_comes_back_in_utc(ada: TestClient) -> None:
    assert create(ada, due_at="2030-01-31T12:00:00+05:30")["due_at"] == "2030-01-31T06:30:00Z"


@pytest.fixture
def client_of_database(
    server: DatabaseUrl,
    new_database: Callable[[], DatabaseUrl],
    settings_for: Callable[..., Settings],
    token_for: Callable[[str], str],
) -> Iterator[Callable[..., TestClient]]:
    """Return a client, with a new account, of an app on a new database with settings of its own."""
    with ExitStack() as stack:

        def start(**parameters: str) -> TestClient:
            url = new_database()
            for name, value in parameters.items():
                run_alone(server, f"ALTER DATABASE {url.database} SET {name} = '{value}'")
            migrations.upgrade(url)
            engine = create_engine(url.for_sqlalchemy())
            user_id = str(uuid4())
            add_account(engine, user_id)
            engine.dispose()
            client = stack.enter_context(TestClient(create_app(settings_for(url))))
            client.headers["Authorization"] = f"Bearer {token_for(user_id)}"
            return client

        yield start


def test_a_date_is_in_utc_regardless_of_the_databases_time_zone(
    client_of_database: Callable[..., TestClient],
) -> None:
    client = client_of_database(timezone="Asia/Tokyo")

    task = create(client, due_at=MOMENT)

    assert task["due_at"] == MOMENT
    assert task["created_at"].endswith("Z")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("title", "Something else"),
        ("description", "More on it"),
        ("description", None),
        ("completed", True),
        ("order", 95),
        ("order", None),
        ("priority", "low"),
        ("due_at", MOMENT),
        ("due_at", None),
    ],
)
def test_a_patch_changes_what_is_sent_and_nothing_else(
    ada: TestClient, field: str, value: object
) -> None:
    before = create(ada, description="d", order=1, due_at="2031-01-01T00:00:00Z")

    answer = ada.patch(before["url"], json={field: value})

    after = answer.json()
    assert answer.status_code == 200
    assert after == before | {field: value, "updated_at": after["updated_at"]}
    assert ada.get(before["url"]).json() == after


def test_an_empty_patch_changes_nothing(ada: TestClient) -> None:
    task = create(ada)

    assert ada.patch(task["url"], json={}).json() == task


@pytest.mark.parametrize("field", ["title", "completed", "priority"])
def test_a_patch_cannot_empty_a_required_field(ada: TestClient, field: str) -> None:
    task = create(ada)

    answer = ada.patch(task["url"], json={field: None})

    assert answer.status_code == 422
    assert ada.get(task["url"]).json() == task


def test_a_put_replaces_all_fields_that_a_client_can_set(ada: TestClient) -> None:
    before = create(ada, description="d", completed=True, order=1, priority="high", due_at=MOMENT)

    after = ada.put(before["url"], json={"title": "All new"}).json()

    assert after == before | {
        "title": "All new",
        "description": None,
        "completed": False,
        "order": None,
        "priority": "medium",
        "due_at": None,
        "updated_at": after["updated_at"],
    }


def test_a_put_creates_a_task_under_an_id_of_the_clients(ada: TestClient) -> None:
    url = f"http://testserver/tasks/{uuid4()}"

    answer = ada.put(url, json={"title": "Write a test", "order": 7})

    task = answer.json()
    assert (answer.status_code, answer.headers["Location"], task["url"]) == (201, url, url)
    assert (task["title"], task["order"], task["priority"]) == ("Write a test", 7, "medium")
    assert ada.get(url).json() == task
    assert ada.get("/tasks").json() == [task]


def test_a_put_that_is_sent_again_creates_nothing_more(ada: TestClient) -> None:
    url = f"/tasks/{uuid4()}"

    answers = [ada.put(url, json={"title": "Write a test"}) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [201, 200, 200]
    assert "Location" not in answers[1].headers
    assert len(ada.get("/tasks").json()) == 1


def test_a_put_that_creates_only_replaces_nothing(ada: TestClient) -> None:
    url = f"/tasks/{uuid4()}"
    only_new = {"If-None-Match": "*"}

    first = ada.put(url, json={"title": "first"}, headers=only_new)
    second = ada.put(url, json={"title": "second"}, headers=only_new)

    assert (first.status_code, second.status_code) == (201, 412)
    assert "already" in second.json()["detail"]
    assert ada.get(url).json() == first.json()


def test_one_of_many_puts_at_once_creates_the_task(ada: TestClient) -> None:
    url = f"/tasks/{uuid4()}"

    def put(title: str) -> int:
        headers = {"If-None-Match": "*"}
        return ada.put(url, json={"title": title}, headers=headers).status_code

    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(put, map(str, range(8))))

    assert sorted(statuses) == [201, *[412] * 7]


def delete_account(connection: Connection, user_id: str) -> None:
    """Delete an account the way the API does: first the account, then its tasks."""
    connection.execute(text("DELETE FROM users WHERE id = CAST(:id AS uuid)"), {"id": user_id})
    connection.execute(text("DELETE FROM tasks WHERE owner_id = :id"), {"id": user_id})


def count_tasks(engine: Engine, user_id: str) -> int:
    with Session(engine) as session:
        return len(session.exec(select(Task.id).where(Task.owner_id == user_id)).all())


def new_task(method: str) -> tuple[str, str]:
    return method, "/tasks" if method == "POST" else f"/tasks/{uuid4()}"


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_token_of_a_deleted_account_creates_nothing(
    client_of: ClientOf, engine: Engine, method: str
) -> None:
    client = client_of(user_id := str(uuid4()))
    with engine.begin() as connection:
        delete_account(connection, user_id)

    answer = client.request(*new_task(method), json={"title": "x"})

    assert (answer.status_code, answer.json()) == (401, {"detail": "the account does not exist"})
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert count_tasks(engine, user_id) == 0


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_task_waits_for_the_deletion_of_its_owners_account(
    client_of: ClientOf, engine: Engine, method: str
) -> None:
    client = client_of(user_id := str(uuid4()))
    with ThreadPoolExecutor(1) as thread:
        with engine.begin() as connection:
            delete_account(connection, user_id)
            answer = thread.submit(client.request, *new_task(method), json={"title": "x"})
            time.sleep(0.3)
            waits = not answer.done()

        assert answer.result().status_code == 401
    assert waits
    assert count_tasks(engine, user_id) == 0


def test_no_task_outlives_its_owners_account(client_of: ClientOf, engine: Engine) -> None:
    def create_until_refused(client: TestClient, method: str) -> int:
        while True:
            answer = client.request(*new_task(method), json={"title": "x"})
            if answer.status_code != 201:
                return answer.status_code

    for _ in range(15):
        client = client_of(user_id := str(uuid4()))
        with ThreadPoolExecutor(4) as threads:
            creations = [
                threads.submit(create_until_refused, client, method)
                for method in ("POST", "PUT", "POST", "PUT")
            ]
            time.sleep(0.02)
            with engine.begin() as connection:
                delete_account(connection, user_id)

        assert [creation.result() for creation in creations] == [401] * 4
        assert count_tasks(engine, user_id) == 0


def etag_of(client: TestClient, url: str) -> str:
    answer = client.get(url)
    assert answer.headers["ETag"] == f'"{answer.json()["updated_at"]}"'
    return answer.headers["ETag"]


def test_every_answer_with_one_task_has_its_etag(ada: TestClient) -> None:
    url = f"/tasks/{uuid4()}"

    answers = [
        ada.post("/tasks", json={"title": "x"}),
        ada.put(url, json={"title": "x"}),
        ada.put(url, json={"title": "y"}),
        ada.patch(url, json={"title": "z"}),
        ada.patch(url, json={}),
        ada.get(url),
    ]

    etags = [answer.headers["ETag"] for answer in answers]
    assert etags == [f'"{answer.json()["updated_at"]}"' for answer in answers]
    assert len(set(etags)) == 4


def test_no_two_versions_have_the_same_etag(session: Session) -> None:
    task = Task(owner_id="someone", title="first")
    session.add(task)
    session.flush()
    session.refresh(task)
    seen = [task.updated_at]
    for title in ("second", "third"):  # in one transaction, whose clock stands still
        task.title = title
        session.flush()
        session.refresh(task)
        seen.append(task.updated_at)

    assert seen == sorted(set(seen))


@pytest.mark.parametrize("method", ["PATCH", "PUT", "DELETE"])
def test_a_change_of_an_outdated_task_is_refused(ada: TestClient, method: str) -> None:
    url = create(ada)["url"]
    outdated = etag_of(ada, url)
    body = {"title": "Mine"} if method != "DELETE" else None
    newer = ada.patch(url, json={"title": "Changed meanwhile"}).json()

    refused = ada.request(method, url, json=body, headers={"If-Match": outdated})
    kept = ada.get(url).json()
    accepted = ada.request(method, url, json=body, headers={"If-Match": etag_of(ada, url)})

    assert (refused.status_code, kept) == (412, newer)
    assert "read it again" in refused.json()["detail"]
    assert accepted.is_success


def test_of_many_changes_at_once_that_know_the_same_version_one_is_made(ada: TestClient) -> None:
    url = create(ada)["url"]
    headers = {"If-Match": etag_of(ada, url)}

    def change(title: str) -> int:
        return ada.patch(url, json={"title": title}, headers=headers).status_code

    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(change, map(str, range(8))))

    assert sorted(statuses) == [200, *[412] * 7]


NOW = "{etag}"  # stands for the task's ETag


@pytest.mark.parametrize(
    ("method", "header", "value", "status"),
    [
        ("GET", "If-None-Match", NOW, 304),
        ("GET", "If-None-Match", f"W/{NOW}", 304),  # compared weakly
        ("GET", "If-None-Match", f'"x", W/"y" ,{NOW}', 304),
        ("GET", "If-None-Match", "*", 304),
        ("GET", "If-None-Match", '"x"', 200),
        ("GET", "If-Match", NOW, 200),
        ("GET", "If-Match", '"x"', 412),
        ("PATCH", "If-Match", f'"x",{NOW}', 200),
        ("PATCH", "If-Match", "*", 200),
        ("PATCH", "If-Match", f"W/{NOW}", 412),  # compared strongly
        ("PATCH", "If-Match", "", 412),
        ("PATCH", "If-Match", "no ETag", 412),
        ("PATCH", "If-None-Match", NOW, 412),
        ("PATCH", "If-None-Match", "*", 412),
        ("PATCH", "If-None-Match", '"x"', 200),
        ("PUT", "If-Match", "*", 200),
        ("PUT", "If-Match", f"W/{NOW}", 412),
        ("PUT", "If-None-Match", NOW, 412),
        ("PUT", "If-None-Match", '"x"', 200),
        ("DELETE", "If-Match", "*", 204),
        ("DELETE", "If-None-Match", "*", 412),
        ("DELETE", "If-None-Match", '"x"', 204),
    ],
)
def test_preconditions_mean_what_http_says(
    ada: TestClient, method: str, header: str, value: str, status: int
) -> None:
    url = create(ada)["url"]
    headers = {header: value.replace(NOW, etag_of(ada, url))}
    body = {"title": "Changed"} if method in {"PATCH", "PUT"} else None

    answer = ada.request(method, url, json=body, headers=headers)

    assert answer.status_code == status, answer.text
    if status == 304:
        assert (answer.content, answer.headers["ETag"]) == (b"", etag_of(ada, url))


def test_an_empty_patch_keeps_its_precondition(ada: TestClient) -> None:
    url = create(ada)["url"]

    assert ada.patch(url, json={}, headers={"If-Match": '"x"'}).status_code == 412


def test_an_etag_of_another_spelling_is_another_etag(ada: TestClient) -> None:
    task = create(ada)
    other = task["updated_at"].replace("Z", "+00:00")

    answer = ada.patch(task["url"], json={"title": "x"}, headers={"If-Match": f'"{other}"'})

    assert answer.status_code == 412


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
def test_several_headers_are_one_list(ada: TestClient, header: str) -> None:
    url = create(ada)["url"]
    both = [(header, '"x"'), (header, etag_of(ada, url))]

    assert ada.get(url, headers=both).status_code == (200 if header == "If-Match" else 304)


def test_the_database_fills_in_defaults(session: Session) -> None:
    task = Task(owner_id="someone", title="Write a test")
    session.add(task)
    session.commit()
    session.refresh(task)

    assert (task.completed, task.priority, task.order) == (False, Priority.MEDIUM, None)
    assert task.created_at == task.updated_at
    assert task.created_at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - task.created_at) < timedelta(minutes=5)


def test_ids_sort_by_creation_time(session: Session) -> None:
    titles = [str(number) for number in range(50)]
    for title in titles:
        session.add(Task(owner_id="in-order", title=title))
        session.commit()

    own = select(Task.title).where(Task.owner_id == "in-order")
    assert session.exec(own.order_by(col(Task.id))).all() == titles


def test_priorities_sort_by_weight_not_by_name(session: Session) -> None:
    for priority in (Priority.MEDIUM, Priority.HIGH, Priority.LOW):
        session.add(Task(owner_id="by-weight", title="x", priority=priority))
    session.commit()

    own = select(Task.priority).where(Task.owner_id == "by-weight")

    assert session.exec(own.order_by(col(Task.priority))).all() == [
        Priority.LOW,
        Priority.MEDIUM,
        Priority.HIGH,
    ]


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_every_change_moves_updated_at(ada: TestClient, method: str) -> None:
    before = create(ada)

    after = ada.request(method, before["url"], json={"title": "Changed"}).json()

    assert after["updated_at"] > before["updated_at"]
    assert after["created_at"] == before["created_at"]


def test_a_deleted_task_is_gone(ada: TestClient) -> None:
    kept, gone = create(ada), create(ada)

    answer = ada.delete(gone["url"])

    assert (answer.status_code, answer.content) == (204, b"")
    assert ada.get(gone["url"]).status_code == 404
    assert ada.get("/tasks").json() == [kept]


@pytest.mark.parametrize(("completed", "left"), [("true", ["open"]), ("false", ["done"])])
def test_deletion_can_be_limited_to_completed_or_open_tasks(
    ada: TestClient, completed: str, left: list[str]
) -> None:
    create(ada, title="open")
    create(ada, title="done", completed=True)

    ada.delete("/tasks", params={"completed": completed})

    assert titles(ada) == left


@pytest.mark.parametrize(
    ("query", "value", "changed"),
    [
        ({}, True, {"open", "another"}),
        ({"completed": "false"}, True, {"open", "another"}),
        ({"completed": "true"}, False, {"done"}),
        ({}, False, {"done"}),
        ({"completed": "true"}, True, set()),
    ],
)
def test_all_tasks_of_a_filter_are_completed_at_once(
    ada: TestClient, bob: TestClient, query: dict[str, str], value: bool, changed: set[str]
) -> None:
    for title, completed in (("open", False), ("another", False), ("done", True)):
        create(ada, title=title, completed=completed)
    others = [create(bob), create(bob, completed=True)]
    before = {task["title"]: task for task in ada.get("/tasks").json()}

    answer = ada.patch("/tasks", params=query, json={"completed": value})

    after = {task["title"]: task for task in ada.get("/tasks").json()}
    assert (answer.status_code, answer.json()) == (200, {"changed": len(changed)})
    assert {title for title in after if after[title] != before[title]} == changed
    assert all(after[title]["completed"] is value for title in changed)
    assert all(after[title]["updated_at"] > before[title]["updated_at"] for title in changed)
    assert bob.get("/tasks?sort=created_at").json() == others


def test_changes_of_all_tasks_at_once_wait_for_each_other(
    client_of_database: Callable[..., TestClient],
) -> None:
    # So that statements lock rows in the order in which they lie on the disk.
    client = client_of_database(enable_indexscan="off", enable_bitmapscan="off")
    app = client.app
    assert isinstance(app, FastAPI)
    engine = create_engine(app.state.resources.settings.database_url.for_sqlalchemy())
    lock = text("SELECT 1 FROM tasks WHERE title = :title FOR UPDATE")
    waiting = text(
        "SELECT count(DISTINCT pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE NOT granted AND datname = current_database()"
    )

    def wait_until_waiting(number: int) -> None:
        deadline = time.monotonic() + 10
        while watcher.scalar(waiting) != number:
            assert time.monotonic() < deadline
            watcher.rollback()  # in a transaction, it would always see the same
            time.sleep(0.01)

    with ExitStack() as stack:
        watcher, first, last = (stack.enter_context(engine.connect()) for _ in range(3))
        threads = stack.enter_context(ThreadPoolExecutor(2))
        create(client, title="first")
        moved = create(client, title="second", completed=True)
        for title in ("third", "last"):
            create(client, title=title, completed=True)
        first.execute(lock, {"title": "first"})
        last.execute(lock, {"title": "last"})

        deletion = threads.submit(client.delete, "/tasks")
        wait_until_waiting(1)
        client.patch(moved["url"], json={"title": "now behind the last"})
        change = threads.submit(client.patch, "/tasks", json={"completed": False})
        wait_until_waiting(2)
        first.rollback()
        wait_until_waiting(2)
        last.rollback()

        assert (deletion.result().status_code, change.result().status_code) == (204, 200)
    engine.dispose()


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ({"complete": "false"}, {"completed": True}),
        ({}, {}),
        ({}, {"completed": None}),
        ({}, {"completed": True, "title": "x"}),
    ],
)
def test_a_mistyped_change_of_all_tasks_changes_none(
    ada: TestClient, query: dict[str, str], body: dict[str, object]
) -> None:
    task = create(ada)

    assert ada.patch("/tasks", params=query, json=body).status_code == 422

    assert ada.get("/tasks").json() == [task]


@pytest.mark.parametrize("headers", [{}, {"If-Match": "*"}, {"If-Match": '"x"'}], ids=str)
@pytest.mark.parametrize(
    ("method", "body"), [("GET", None), ("PATCH", {"title": "Mine now"}), ("DELETE", None)]
)
def test_another_owners_task_is_a_404(
    ada: TestClient, bob: TestClient, method: str, body: object, headers: dict[str, str]
) -> None:
    task = create(ada)

    others = bob.request(method, task["url"], json=body, headers=headers)
    nobodys = bob.request(method, f"/tasks/{uuid4()}", json=body, headers=headers)

    assert others.status_code == nobodys.status_code == 404
    assert others.content == nobodys.content
    assert ada.get(task["url"]).json() == task


@pytest.mark.parametrize(
    "headers", [{}, {"If-Match": "*"}, {"If-None-Match": "*"}, {"If-None-Match": '"x"'}], ids=str
)
def test_a_put_never_reaches_another_owners_task(
    ada: TestClient, bob: TestClient, headers: dict[str, str]
) -> None:
    task = create(ada)

    answer = bob.put(task["url"], json={"title": "Mine"}, headers=headers)

    assert answer.status_code == 404
    assert ada.get(task["url"]).json() == task


def test_an_empty_patch_does_not_show_another_owners_task(ada: TestClient, bob: TestClient) -> None:
    assert bob.patch(create(ada)["url"], json={}).status_code == 404


def test_lists_and_deletions_affect_only_the_callers_tasks(
    ada: TestClient, bob: TestClient
) -> None:
    adas, bobs = create(ada, title="ada's"), create(bob, title="bob's")

    assert (titles(ada), titles(bob)) == (["ada's"], ["bob's"])
    assert titles(bob, q="ada") == []
    bob.delete("/tasks")

    assert ada.get("/tasks").json() == [adas]
    assert bob.get(bobs["url"]).status_code == 404


def test_a_mistyped_filter_deletes_nothing(ada: TestClient) -> None:
    task = create(ada)

    assert ada.delete("/tasks", params={"complete": "true"}).status_code == 422

    assert ada.get("/tasks").json() == [task]


@pytest.fixture(scope="module")
def animals(engine: Engine) -> str:
    """An owner of three tasks."""
    owner_id = str(uuid4())
    six, noon = "It has six legs", datetime(2030, 1, 31, 12, tzinfo=UTC)
    later = noon.replace(year=2031)
    low, high = Priority.LOW, Priority.HIGH
    for task in (
        Task(title="ant", owner_id=owner_id, order=2, due_at=noon, priority=low, description=six),
        Task(title="bee", owner_id=owner_id, order=1, due_at=later, priority=high, description=six),
        Task(title="cow", owner_id=owner_id, completed=True),
    ):
        with Session(engine) as session:  # one each, for a time of creation each
            session.add(task)
            session.commit()
    return owner_id


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"completed": "true"}, ["cow"]),
        ({"completed": "false"}, ["bee", "ant"]),
        ({"priority": "high"}, ["bee"]),
        ({"due_before": "2030-06-01T00:00:00Z"}, ["ant"]),
        ({"due_after": "2030-06-01T00:00:00Z"}, ["bee"]),
        ({"due_after": "2030-01-01T00:00:00Z", "due_before": MOMENT}, []),
        ({"q": "ANT"}, ["ant"]),
        ({"q": "six legs"}, ["bee", "ant"]),
        ({"priority": "low", "q": "six legs"}, ["ant"]),
        ({"sort": "created_at"}, ["ant", "bee", "cow"]),
        ({"sort": "due_at"}, ["ant", "bee", "cow"]),
        ({"sort": "-due_at"}, ["cow", "bee", "ant"]),
        ({"sort": "order"}, ["bee", "ant", "cow"]),
        ({"sort": "-order"}, ["cow", "ant", "bee"]),
        ({"sort": "priority"}, ["ant", "cow", "bee"]),
        ({"sort": "-priority"}, ["bee", "cow", "ant"]),
        ({"limit": "2"}, ["cow", "bee"]),
    ],
)
def test_a_list_is_filtered_sorted_and_cut(
    client_of: ClientOf, animals: str, query: dict[str, str], expected: list[str]
) -> None:
    assert titles(client_of(animals), **query) == expected


@pytest.fixture(scope="module")
def odd_titles(engine: Engine) -> str:
    """An owner of tasks with titles in which a search may err."""
    owner_id = str(uuid4())
    with Session(engine) as session:
        for title in (
            "100% done", "snake_case", "back\\slash", "привет, мир", "你好，世界", "مرحبا يا عالم",
            "👩‍💻 at work", "cet été", "plain",
        ):  # fmt: skip
            session.add(Task(owner_id=owner_id, title=title))
        session.commit()
    return owner_id


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("100%", ["100% done"]),
        ("0% ", ["100% done"]),
        ("%do", []),
        ("e_c", ["snake_case"]),
        ("k_c", []),
        ("k\\s", ["back\\slash"]),
        ("k\\%", []),
        ("'; DROP TABLE tasks; --", []),
        ("ПРИВЕТ", ["привет, мир"]),
        ("，世界", ["你好，世界"]),
        ("عالم", ["مرحبا يا عالم"]),
        ("👩‍💻", ["👩‍💻 at work"]),
        ("ÉTÉ", ["cet été"]),
    ],
)
def test_search_has_no_wildcards(
    client_of: ClientOf, odd_titles: str, text: str, found: list[str]
) -> None:
    assert titles(client_of(odd_titles), q=text) == found


@pytest.mark.parametrize("text", ["", "a", "zz", "世界", "   ", "\u200b" * 3])
def test_a_search_for_less_than_three_characters_is_refused(ada: TestClient, text: str) -> None:
    answer = ada.get("/tasks", params={"q": text})

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", "q"]


@pytest.mark.parametrize(
    "title",
    [" ", "   ", "\t\n", "\xa0", "\u3000", "\u200b", "\u2060\ufeff", "\u3164", "\u2800", "\xad"],
)
def test_a_title_that_nobody_can_see_is_refused(ada: TestClient, title: str) -> None:
    task = create(ada)

    answers = [
        ada.post("/tasks", json={"title": title}),
        ada.patch(task["url"], json={"title": title}),
        ada.put(task["url"], json={"title": title}),
    ]

    assert [answer.status_code for answer in answers] == [422] * 3
    assert answers[0].json()["detail"] == [
        {
            "type": "value_error",
            "loc": ["body", "title"],
            "msg": "write at least one visible character",
        }
    ]


@pytest.mark.parametrize("title", ["x", " x ", "\u200bx", "।", "👩‍💻", "…", "0", "中"])
def test_a_title_may_be_one_character(ada: TestClient, title: str) -> None:
    assert create(ada, title=title)["title"] == title


@pytest.fixture(scope="module")
def many_tasks(engine: Engine) -> str:
    """An owner of 300 tasks."""
    owner_id = str(uuid4())
    add_many(engine, owner_id, 300)
    return owner_id


def add_many(engine: Engine, owner_id: str, count: int) -> set[str]:
    """Add tasks whose dates, orders and priorities repeat and are missing. Returns their ids."""
    pick = random.Random(1)  # noqa: S311  (the same tasks each time)
    start = datetime(2030, 1, 1, tzinfo=UTC)
    tasks = [
        {
            "id": uuid7(),
            "owner_id": owner_id,
            "title": f"Task {number}",
            "completed": pick.random() < 0.3,
            "priority": pick.choice(list(Priority)),
            "order": pick.choice([None, *range(20)]),
            "due_at": pick.choice([None, *(start + timedelta(days=n) for n in range(30))]),
        }
        for number in range(count)
    ]
    with Session(engine) as session:
        session.execute(insert(Task), tasks)
        session.commit()
    return {str(task["id"]) for task in tasks}


def sort_value(task: dict[str, Any], sort: TaskSort) -> tuple[Any, str]:
    """Return what a task is sorted by, the way the API promises it."""
    field = sort.removeprefix("-")
    value = task[field]
    if field == "priority":
        value = (list(Priority).index(Priority(value)), task["created_at"])
    return ((value is None, value if value is not None else 0), task["id"])


@pytest.mark.parametrize("sort", get_args(TaskSort))
def test_pages_show_every_task_once_and_in_order(
    client_of: ClientOf, many_tasks: str, sort: TaskSort
) -> None:
    client = client_of(many_tasks)

    tasks = list(itertools.chain.from_iterable(pages(client, sort=sort, limit=40)))

    assert len(tasks) == len({task["id"] for task in tasks}) == 300
    backwards = sort.startswith("-")
    assert tasks == sorted(tasks, key=lambda task: sort_value(task, sort), reverse=backwards)


@pytest.mark.parametrize(
    "query",
    [{"completed": "true"}, {"priority": "high", "sort": "due_at"}, {"q": "k 2", "sort": "-order"}],
)
def test_pages_of_a_filtered_list_are_complete(
    client_of: ClientOf, many_tasks: str, query: dict[str, str]
) -> None:
    client = client_of(many_tasks)

    small = list(itertools.chain.from_iterable(pages(client, limit=20, **query)))
    large = list(itertools.chain.from_iterable(pages(client, limit=50, **query)))

    assert small == large
    assert 50 < len(small) < 300


@pytest.mark.parametrize("sort", get_args(TaskSort))
def test_pages_neither_skip_nor_repeat_while_tasks_are_added(
    client_of: ClientOf, engine: Engine, sort: TaskSort
) -> None:
    owner_id = str(uuid4())
    client = client_of(owner_id)
    before = add_many(engine, owner_id, 120)
    pick = random.Random(2)  # noqa: S311  (the same each time)

    seen = []
    for page in pages(client, sort=sort, limit=20):
        seen += [task["id"] for task in page]
        if len(seen) < 150:
            create(client, order=pick.randrange(20), priority=pick.choice(list(Priority)))

    assert len(seen) == len(set(seen))
    assert before <= set(seen)


def test_the_last_page_has_no_next(ada: TestClient) -> None:
    for _ in range(4):
        create(ada)

    first, second = pages(ada, limit=2)

    assert (len(first), len(second)) == (2, 2)


def test_an_empty_list_has_one_empty_page(ada: TestClient) -> None:
    answer = ada.get("/tasks")

    assert (answer.json(), "Link" in answer.headers) == ([], False)


def test_the_next_page_keeps_the_filters(ada: TestClient) -> None:
    for n in range(4):
        create(ada, title=f"a&b {n}", completed=n % 2 == 0)

    answer = ada.get("/tasks", params={"q": "a&b", "completed": "true", "limit": 1})
    following = ada.get(answer.links["next"]["url"])

    assert [task["title"] for task in following.json()] == ["a&b 0"]


@pytest.mark.parametrize("mangle", ["cut", "longer", "changed", "empty", "foreign", "binary"])
def test_a_changed_cursor_is_rejected(ada: TestClient, mangle: str) -> None:
    create(ada)
    create(ada)
    link = ada.get("/tasks", params={"limit": 1}).links["next"]["url"]
    cursor = parse_qs(urlsplit(link).query)["cursor"][0]
    mangled = {
        "cut": cursor[:-1],
        "longer": f"{cursor}x",
        "changed": f"{'B' if cursor[0] == 'A' else 'A'}{cursor[1:]}",
        "empty": "x",
        "foreign": URLSafeSerializer("another secret", salt="cursor").dumps(["-created_at", "x"]),
        "binary": "\xff\x00",
    }[mangle]

    answer = ada.get("/tasks", params={"cursor": mangled})

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", "cursor"]


def test_a_cursor_of_another_order_is_refused(ada: TestClient) -> None:
    create(ada)
    create(ada)
    link = ada.get("/tasks", params={"limit": 1}).links["next"]["url"]

    assert ada.get(f"{link}&sort=order").status_code == 422


def test_a_cursor_of_another_owner_shows_the_callers_tasks(
    ada: TestClient, bob: TestClient
) -> None:
    create(bob, title="bob's")
    create(ada)
    create(ada)
    link = ada.get("/tasks", params={"limit": 1}).links["next"]["url"]

    assert [task["title"] for task in bob.get(link).json()] == ["bob's"]


@pytest.mark.parametrize("name", ["limit", "completed", "priority", "due_before", "sort", "typo"])
def test_an_invalid_filter_is_rejected(ada: TestClient, name: str) -> None:
    answer = ada.get("/tasks", params={name: "-1x"})

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", name]


@pytest.fixture
def client_with(
    database_url: DatabaseUrl, settings_for: Callable[..., Settings], client_of: ClientOf
) -> Iterator[Callable[..., TestClient]]:
    """Return a client of an app with other settings, logged in to a new account."""
    with ExitStack() as stack:

        def start(**changes: object) -> TestClient:
            app = create_app(settings_for(database_url, **changes))
            client = stack.enter_context(TestClient(app))
            client.headers["Authorization"] = client_of(str(uuid4())).headers["Authorization"]
            return client

        yield start


def test_an_account_with_all_its_tasks_gets_no_more(client_with: Callable[..., TestClient]) -> None:
    client = client_with(tasks_per_user=3)
    tasks = [create(client) for _ in range(3)]

    for method in ("POST", "PUT"):
        refused = client.request(*new_task(method), json={"title": "one too many"})
        replaced = client.put(tasks[0]["url"], json={"title": "Replaced"})
        client.delete(tasks.pop()["url"])
        created = client.request(*new_task(method), json={"title": "in its place"})

        assert refused.status_code == 409
        assert "delete some first" in refused.json()["detail"]
        assert replaced.status_code == 200
        assert created.status_code == 201
        assert len(client.get("/tasks").json()) == 3


def limit_tasks(client: TestClient, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Have the shared app allow each account so many tasks."""
    app = client.app
    assert isinstance(app, FastAPI)
    monkeypatch.setattr(app.state.resources.quota, "most", most)


def test_the_number_of_tasks_can_be_unlimited(
    ada: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_tasks(ada, monkeypatch, 0)

    assert [create(ada)["title"] for _ in range(3)]


def test_tasks_are_counted_again_when_a_tenth_of_the_room_is_used() -> None:
    quota = Quota(100)

    def creations_without_count(tasks: int) -> int:
        assert quota.must_count("ada")
        quota.counted("ada", tasks)
        return len(list(itertools.takewhile(lambda _: not quota.must_count("ada"), range(99))))

    assert [creations_without_count(tasks) for tasks in (0, 50, 89, 95, 100)] == [10, 5, 1, 0, 0]
    assert quota.must_count("bob")


def test_tasks_are_counted_again_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    quota = Quota(100)
    quota.counted("ada", 0)
    later = time.monotonic() + 61

    monkeypatch.setattr(time, "monotonic", lambda: later)

    assert quota.must_count("ada")


def test_many_creations_at_once_do_not_exceed_the_quota(
    ada: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_tasks(ada, monkeypatch, 9)  # so few that all are counted

    with ThreadPoolExecutor(30) as threads:
        sent = [
            threads.submit(ada.request, *new_task(method), json={"title": "x"})
            for method in ["POST", "PUT"] * 15
        ]

    assert Counter(each.result().status_code for each in sent) == {201: 9, 409: 21}
    assert len(ada.get("/tasks").json()) == 9


def test_many_creations_at_once_wait_for_one_count(
    ada: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    counted = Quota.counted

    def record(quota: Quota, owner_id: str, tasks: int) -> None:
        counts.append(tasks)
        counted(quota, owner_id, tasks)

    monkeypatch.setattr(Quota, "counted", record)
    limit_tasks(ada, monkeypatch, 1000)

    with ThreadPoolExecutor(30) as threads:
        sent = [threads.submit(create, ada) for _ in range(30)]

    assert len([each.result() for each in sent]) == 30
    assert counts == [0]


@contextmanager
def locked_tasks(engine: Engine) -> Iterator[None]:
    """Have every list wait."""
    with engine.begin() as connection:
        connection.execute(text("LOCK TABLE tasks"))
        yield


def test_what_touches_all_tasks_of_a_user_takes_a_third_of_the_connections(
    client_with: Callable[..., TestClient], engine: Engine
) -> None:
    requests = (
        ("GET", "/tasks?completed=true", None),
        ("GET", "/tasks?q=milk", None),
        ("PATCH", "/tasks", {"completed": True}),
        ("DELETE", "/tasks?completed=true", None),
    )
    client = client_with(db_pool_size=3)
    app = client.app
    assert isinstance(app, FastAPI)
    with ThreadPoolExecutor(4) as threads:
        with locked_tasks(engine):
            sent = [
                threads.submit(client.request, method, url, json=body)
                for method, url, body in requests
            ]
            refused = next(as_completed(sent, timeout=30)).result()
            pool = app.state.resources.engine.pool
            while not pool.checkedout():
                time.sleep(0.01)
            time.sleep(0.3)  # the others would have their connections now, too
            taken = pool.checkedout()
        succeeded = [each.result().is_success for each in sent]

    assert taken == 1
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 0
    assert succeeded.count(True) == 3
    assert client.get("/tasks?q=milk").status_code == 200


def test_counts_of_an_owners_tasks_take_one_connection(
    client_with: Callable[..., TestClient], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_tasks, "USE_SECONDS", 0.5)
    client = client_with(tasks_per_user=1)
    create(client)
    app = client.app
    assert isinstance(app, FastAPI)
    with ThreadPoolExecutor(5) as threads:
        with locked_tasks(engine):
            sent = [
                threads.submit(client.request, *new_task(method), json={"title": "x"})
                for method in ("POST", "PUT", "POST", "PUT", "POST")
            ]
            refused = list(itertools.islice(as_completed(sent, timeout=30), 4))
            taken = app.state.resources.engine.pool.checkedout()
        answers = [each.result() for each in sent]

    assert taken == 1
    assert [each.result().status_code for each in refused] == [429] * 4
    assert sorted(answer.status_code for answer in answers) == [409, *[429] * 4]
    assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 429)


def test_a_list_that_takes_too_long_is_given_up(ada: TestClient, engine: Engine) -> None:
    with locked_tasks(engine):
        answer = ada.get("/tasks")

    assert answer.status_code == 503
    assert "with other filters" in answer.json()["detail"]
    assert int(answer.headers["Retry-After"]) > 0
    assert ada.get("/tasks").json() == []


def test_a_second_statement_needs_a_session(
    database_url: DatabaseUrl, app_with: Callable[..., FastAPI]
) -> None:
    app = app_with(database_url)

    @app.get("/two-statements")
    async def two_statements(statement: StatementDep) -> None:
        await statement.all(text("SELECT 1"))
        await statement.all(text("SELECT 2"))

    with TestClient(app) as client, pytest.raises(RuntimeError, match="SessionDep"):
        client.get("/two-statements")
