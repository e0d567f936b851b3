"""The generated app behind a PgBouncer in transaction mode, as providers' pooled hosts have one."""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial

import psycopg2
import pytest
from bench.load import Run, prepare, send

from app_server import Answer, AppServer
from machine import Project
from pgbouncer import PgBouncer, pgbouncer
from postgres_server import USER
from stage import POOL_SIZE, Stage, new_stage
from visitors import at_once, wait_for

REPLICAS = 2
WORKERS = 2
SERVER_POOL_SIZE = 6  # fewer than the apps want, so that requests share
LOAD_SECONDS = 4
CLIENTS = 40  # of each replica
QUEUE_SECONDS = 4
# Statements that leave nothing behind for the next client of a connection.
HARMLESS = {"SELECT", "WITH", "SHOW", "INSERT", "UPDATE", "DELETE", "BEGIN", "COMMIT", "ROLLBACK"}
HARMLESS |= {"SET LOCAL"}  # ends with the transaction


@pytest.fixture(scope="module")
def stage(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    logging = {"log_statement": "all", "log_line_prefix": "%d "}  # the database
    with new_stage(project, tmp_path_factory.mktemp("stage"), **logging) as stage:
        yield stage


@pytest.fixture
def place(stage: Stage) -> Stage:
    """A database of the test's own."""
    return stage.copy()


@pytest.fixture(scope="module")
def app_stage(stage: Stage) -> Stage:
    return stage.copy()


@pytest.fixture(scope="module")
def pooler(app_stage: Stage) -> Iterator[PgBouncer]:
    users = {USER: app_stage.server.password}
    with pgbouncer(app_stage.server.port, users, default_pool_size=SERVER_POOL_SIZE) as pooler:
        yield pooler


@pytest.fixture(scope="module")
def replicas(app_stage: Stage, pooler: PgBouncer) -> Iterator[list[AppServer]]:
    with ExitStack() as at_the_end:
        yield [
            at_the_end.enter_context(
                app_stage.app(f"replica-{number}", pooler.port, workers=WORKERS)
            )
            for number in range(REPLICAS)
        ]


@pytest.fixture(scope="module")
def token(replicas: list[AppServer]) -> str:
    return replicas[0].register()


@dataclass
class Watch:
    """How many connections there were at most, to the pooler and to the server."""

    pooler: PgBouncer
    stage: Stage
    clients: int = 0
    servers: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        while not self._over.wait(0.1):
            here = {"database": self.stage.database}
            clients = [row for row in self.pooler.show("CLIENTS") if here.items() <= row.items()]
            self.clients = max(self.clients, len(clients))
            self.servers = max(self.servers, self.stage.server.count_clients(self.stage.database))

    def __enter__(self) -> "Watch":
        self._thread = threading.Thread(target=self.look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.skipif(not shutil.which("wrk"), reason="needs wrk")
def test_replicas_and_workers_keep_to_their_connections_under_load(
    app_stage: Stage, pooler: PgBouncer, replicas: list[AppServer], token: str
) -> None:
    task = replicas[0].request("POST", "/tasks", {"title": "first"}, token=token).body
    requests = [
        prepare("GET", "/tasks?limit=5", token),
        prepare("POST", "/tasks", token, {"title": "through the pooler"}),
        prepare("PUT", f"/tasks/{task['id']}", token, {"title": "replaced"}),
    ]

    def load(app: AppServer) -> Run:
        return send(app.port, requests, CLIENTS, LOAD_SECONDS)

    with Watch(pooler, app_stage) as watch, ThreadPoolExecutor(REPLICAS) as threads:
        runs = list(threads.map(load, replicas))

    for run in runs:
        assert set(run.statuses) <= {"200", "201"}
        assert run.unanswered == 0
    assert 0 < watch.servers <= SERVER_POOL_SIZE
    assert SERVER_POOL_SIZE < watch.clients <= REPLICAS * WORKERS * POOL_SIZE
    assert [line for app in replicas for line in app.lines() if line["level"] == "error"] == []


def test_the_app_leaves_nothing_on_a_connection(
    app_stage: Stage, replicas: list[AppServer], token: str
) -> None:
    app = replicas[0]
    created = app.request("POST", "/tasks", {"title": "x"}, token=token)
    app.request("PATCH", f"/tasks/{created.body['id']}", {"title": "y"}, token=token)
    app.request("GET", "/ready")
    app.delete_account(app.register())

    said = rf"^{app_stage.database} LOG: +(?:statement|execute \S+): "
    limits = r"(?:(?:SET LOCAL|SELECT set_config\()[^;]*; )*"  # a statement stands behind them
    said += rf"{limits}(SET LOCAL|\w+)"
    words = {word.upper() for word in re.findall(said, app_stage.server.log, re.MULTILINE)}
    assert {"BEGIN", "COMMIT"} <= words <= HARMLESS


def test_no_client_notices_that_idle_connections_behind_the_pooler_were_terminated(
    app_stage: Stage, replicas: list[AppServer], token: str
) -> None:
    def get() -> Answer:
        return replicas[0].request("GET", "/tasks", token=token)

    at_once(*[get] * POOL_SIZE)
    ended = app_stage.server.terminate_backends(app_stage.database)
    answers = at_once(*[get] * 2 * POOL_SIZE)

    assert ended > 0
    assert [answer.status for answer in answers] == [200] * 2 * POOL_SIZE


def test_no_client_notices_that_the_pooler_was_restarted(place: Stage, token: str) -> None:
    users = {USER: place.server.password}
    with ExitStack() as first:
        pooler = first.enter_context(pgbouncer(place.server.port, users))
        with place.app("restart", pooler.port) as app:

            def get() -> Answer:
                return app.request("GET", "/tasks", token=token)

            before = at_once(*[get] * POOL_SIZE)
            first.close()
            with pgbouncer(place.server.port, users, port=pooler.port):
                answers = at_once(*[get] * 2 * POOL_SIZE)

    assert [answer.status for answer in before + answers] == [200] * 3 * POOL_SIZE


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"default_pool_size": 1, "query_wait_timeout": 1}, "query_wait_timeout"),
        ({"max_client_conn": 2}, "no more connections allowed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pooler_that_is_full_costs_a_503(
    place: Stage, limit: dict[str, int], reason: str
) -> None:
    users = {USER: place.server.password}
    with (
        pgbouncer(place.server.port, users, **limit) as pooler,
        place.app("full", pooler.port) as app,
    ):
        # The pooler's first connection may take longer than its clients may wait.
        wait_for(lambda: app.request("GET", "/ready").status == 200)
        token = app.register()

        def create() -> Answer:
            return app.request("POST", "/tasks", {"title": "one of some"}, token=token)

        create()  # counts the owner's tasks, so that none of the others has to
        with ThreadPoolExecutor(POOL_SIZE) as threads, place.locked("tasks"):
            requests = [threads.submit(create) for _ in range(POOL_SIZE)]
            wait_for(lambda: any(request.done() for request in requests))
        answers = [request.result() for request in requests]
        afterwards = create()
        log = pooler.log

    refused = [answer for answer in answers if answer.status != 201]
    assert 0 < len(refused) < POOL_SIZE
    assert all(answer.is_refusal for answer in refused), refused
    assert reason in log
    assert afterwards.status == 201


def test_time_in_the_queue_of_a_full_pooler_counts(place: Stage) -> None:
    users = {USER: place.server.password}
    with (
        pgbouncer(place.server.port, users, default_pool_size=3) as pooler,
        place.app("late", pooler.port, DB_QUEUE_SECONDS="1") as app,
        ExitStack() as holders,
    ):
        token = app.register()
        titles = ["changed", "deleted"]
        created = [app.request("POST", "/tasks", {"title": title}, token=token) for title in titles]
        changed, deleted = [f"/tasks/{answer.body['id']}" for answer in created]
        changes: list[Callable[[], Answer]] = [
            partial(app.request, "POST", "/tasks", {"title": "late"}, token=token),
            partial(app.request, "PATCH", changed, {"title": "late"}, token=token),
            partial(app.request, "DELETE", deleted, token=token),
        ]

        def queue() -> int:
            pools = pooler.show("POOLS")
            return sum(row["cl_waiting"] for row in pools if row["database"] == place.database)

        for _ in changes:  # transactions that take all of the pooler's connections
            holder = holders.enter_context(closing(psycopg2.connect(place.url(pooler.port))))
            holder.cursor().execute("SELECT 1")
        with ThreadPoolExecutor(len(changes)) as threads, place.locked("tasks"):
            requests = [threads.submit(change) for change in changes]
            wait_for(lambda: queue() == len(changes))
            time.sleep(QUEUE_SECONDS)
            holders.close()
            wait_for(lambda: len(place.waiting()) == len(changes))  # for the lock
            answers = [request.result() for request in requests]
        wait_for(lambda: not place.active())

    assert all(answer.is_refusal for answer in answers), answers
    assert sorted(place.titles()) == titles


def test_a_statement_that_waits_too_long_is_given_up_behind_the_pooler_too(
    place: Stage, pooler: PgBouncer, token: str
) -> None:
    with place.app("abandoned", pooler.port) as app, place.locked("tasks"):
        answer = app.request("POST", "/tasks", {"title": "abandoned"}, token=token)
        wait_for(lambda: not place.waiting(), seconds=5)

    assert answer.is_refusal, answer
    assert place.titles() == []
