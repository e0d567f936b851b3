"""How PostgreSQL finds a page: by an index, whatever is asked for, and never by reading all."""

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, get_args
from uuid import uuid4

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event, text

from models import Priority
from routes.tasks import TaskSort

TASKS = 30_000
WORDS = ["buy", "call", "write", "mend", "read", "paint", "sell", "cook"]


# One transaction would give them all the same created_at.
FILL = """
INSERT INTO tasks
    (id, owner_id, title, description, completed, priority, "order", due_at, created_at)
SELECT
    gen_random_uuid(),
    (:owners)[CASE number % 3 WHEN 0 THEN 1 ELSE 1 + floor(random() * 10) END],
    concat_ws(' ', one.word, two.word, number),
    CASE number % 3 WHEN 0 THEN concat_ws(' ', two.word, 'it', number) END,
    random() < 0.3,
    (CAST(:priorities AS task_priority[]))[1 + floor(random() * 3)],
    CASE WHEN random() < 0.999 THEN floor(random() * 1000) END,
    CASE WHEN random() < 0.5 THEN :start + random() * interval '347 days' END,
    :start + number * interval '1 second'
FROM generate_series(0, :last) number,
LATERAL (SELECT (:words)[1 + floor(random() * 8)] AS word WHERE number >= 0) one,
LATERAL (SELECT (:words)[1 + floor(random() * 8)] AS word WHERE number >= 0) two
"""


@pytest.fixture(scope="module")
def owner_id(engine: Engine) -> str:
    """The busiest of ten owners in a table that is large enough for indexes to matter."""
    owners = [str(uuid4()) for _ in range(10)]
    values = {
        "owners": owners,
        "priorities": [priority.value for priority in Priority],
        "words": WORDS,
        "start": datetime(2030, 1, 1, tzinfo=UTC),
        "last": TASKS - 1,
    }
    with engine.begin() as connection:
        connection.execute(text("SELECT setseed(0.1)"))  # the same tasks each time
        connection.execute(text(FILL), values)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE) tasks"))  # as autovacuum does after a while
    return owners[0]


@pytest.fixture
def plan_of(
    client_of: Callable[[str], TestClient], owner_id: str, engine: Engine
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Return how PostgreSQL did what a request had it do."""
    client = client_of(owner_id)
    app = client.app
    assert isinstance(app, FastAPI)
    sent: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((re.sub(r"^SET LOCAL [^;]*; ", "", statement), parameters))

    def plan(url: str) -> dict[str, Any]:
        sent.clear()
        client.get(url).raise_for_status()
        ((statement, parameters),) = sent
        with engine.connect() as connection:
            explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
            (explained,) = connection.exec_driver_sql(explain, parameters).one()
        node: dict[str, Any] = explained[0]["Plan"]
        return node

    event.listen(app.state.resources.engine.sync_engine, "before_cursor_execute", note)
    yield plan
    event.remove(app.state.resources.engine.sync_engine, "before_cursor_execute", note)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


def rows_read(plan: dict[str, Any]) -> int:
    """Return how many rows were looked at, kept or not."""
    return sum(
        int(node["Actual Rows"] * node["Actual Loops"] + node.get("Rows Removed by Filter", 0))
        for node in nodes(plan)
        if "Scan" in node["Node Type"]
    )


def link_of(client: TestClient, url: str, pages: int) -> str:
    """Return the address of a page further back."""
    for _ in range(pages):
        url = client.get(url).links["next"]["url"]
    return url


@pytest.mark.parametrize("pages", [0, 5])
@pytest.mark.parametrize("sort", get_args(TaskSort))
def test_a_page_reads_no_more_than_it_shows(
    plan_of: Callable[[str], dict[str, Any]],
    client_of: Callable[[str], TestClient],
    owner_id: str,
    sort: TaskSort,
    pages: int,
) -> None:
    url = link_of(client_of(owner_id), f"/tasks?limit=100&sort={sort}", pages)

    plan = plan_of(url)

    kinds = {node["Node Type"] for node in nodes(plan)}
    assert kinds <= {"Limit", "Index Scan"}, json.dumps(plan, indent=1)
    assert rows_read(plan) <= 101


@pytest.mark.parametrize("pages", [0, 10])
@pytest.mark.parametrize("query", ["completed=true", "completed=false", "priority=high"])
def test_a_filtered_page_reads_little_more_than_it_shows(
    plan_of: Callable[[str], dict[str, Any]],
    client_of: Callable[[str], TestClient],
    owner_id: str,
    query: str,
    pages: int,
) -> None:
    url = link_of(client_of(owner_id), f"/tasks?limit=100&{query}", pages)

    plan = plan_of(url)

    kinds = {node["Node Type"] for node in nodes(plan)}
    assert "Seq Scan" not in kinds
    assert rows_read(plan) <= 1000, json.dumps(plan, indent=1)


@pytest.mark.parametrize(
    "query",
    [
        "q=cook it 123",
        "q=paint 1234",
        "due_before=2030-01-02T00:00:00Z",
        "due_after=2030-12-12T00:00:00Z",
    ],
)
def test_a_rare_match_is_found_without_reading_all(
    plan_of: Callable[[str], dict[str, Any]], query: str
) -> None:
    plan = plan_of(f"/tasks?{query}")

    assert "Seq Scan" not in {node["Node Type"] for node in nodes(plan)}
    assert rows_read(plan) <= 2000, json.dumps(plan, indent=1)


def test_one_task_is_found_by_its_id(
    plan_of: Callable[[str], dict[str, Any]],
    client_of: Callable[[str], TestClient],
    owner_id: str,
) -> None:
    task = client_of(owner_id).get("/tasks?limit=1").json()[0]

    plan = plan_of(f"/tasks/{task['id']}")

    assert plan["Node Type"] == "Index Scan"
    assert plan["Index Name"] == "pk_tasks"
