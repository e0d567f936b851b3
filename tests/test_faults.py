"""The generated app while its database, network or machine fails.

Scenarios that take long, because they wait for a timeout, start before the first test. They run in
parallel, each with its own app.
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg2
import pytest

import processes
from app_server import LIMIT_SECONDS, PASSWORD, Answer, AppServer
from machine import Project
from network import Network, network
from pgbouncer import pgbouncer
from postgres_server import USER
from stage import POOL_SIZE, Stage, new_stage
from visitors import Visitors, at_once, visitors, wait_for, writers

OUTAGE_SECONDS = 10
WAKE_UP_SECONDS = 5
REVISION = """
revision = "9999"
down_revision = "{head}"

def upgrade():
    from alembic import op

    op.execute("CREATE TABLE half_of_it (id integer)")
    op.execute("ALTER TABLE tasks RENAME TO jobs")
    op.execute("SELECT 1 / 0")
"""
# Mounts a small disk at the first argument, then runs the remaining arguments as a command.
SMALL_DISK = """
mount -t tmpfs -o size=24m,mode=0700 tmpfs "$1"
shift
exec unshare --user --map-user=1000 --map-group=1000 -- "$@"
"""
IN_NEW_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "--")


@pytest.fixture(scope="module")
def stage(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A server that no test breaks."""
    with new_stage(project, tmp_path_factory.mktemp("stage")) as stage:
        yield stage


@pytest.fixture
def place(stage: Stage) -> Stage:
    """A database for one test on the shared server."""
    return stage.copy()


@pytest.fixture(scope="module")
def app_stage(stage: Stage) -> Stage:
    return stage.copy()


@pytest.fixture(scope="module")
def app(app_stage: Stage) -> Iterator[AppServer]:
    """An app shared by several tests."""
    with app_stage.app("shared") as app:
        yield app


@pytest.fixture(scope="module")
def token(app: AppServer) -> str:
    """An access token that is valid for all apps, because they share their secret."""
    return app.register()


# Scenarios that take long


@dataclass(frozen=True)
class Ordeal:
    """The visitors' results."""

    crowd: Visitors
    refused: int  # visits during the failure
    lost: set[str]  # titles of tasks that got a 201 but do not exist


def open_connections(stage: Stage, app: AppServer, token: str) -> None:
    """Make an app open all connections of its pool."""
    no_task = f"/tasks/{uuid4()}"  # which waits for the lock, too: longer than a list may
    with ThreadPoolExecutor(POOL_SIZE) as threads, stage.locked("tasks"):
        for _ in range(POOL_SIZE):
            threads.submit(app.request, "GET", no_task, token=token)
        wait_for(lambda: len(stage.waiting()) == POOL_SIZE)


def suffer(stage: Stage, app: AppServer, fail: Callable[[], None]) -> Ordeal:
    """Send visitors to an app during a failure. fail: breaks something and repairs it."""
    token = app.register()
    open_connections(stage, app, token)
    with visitors(app, token) as crowd:
        crowd.wait_until_well(time.monotonic())
        fail()
        crowd.wait_until_well(time.monotonic())
    return Ordeal(crowd, len(crowd.refusals()), set(crowd.titles) - set(stage.titles()))


def suffer_outage(stage: Stage, mode: str) -> Ordeal:
    """Stop a server, and start it again after OUTAGE_SECONDS."""

    def fail() -> None:
        own.server.stop(mode)
        time.sleep(OUTAGE_SECONDS)
        own.server.start()

    with new_stage(stage.project, stage.folder) as own, own.app(f"{mode}-stop") as app:
        return suffer(own, app, fail)


def suffer_frozen_server(stage: Stage) -> Ordeal:
    def fail() -> None:
        with own.server.frozen():
            time.sleep(LIMIT_SECONDS + 3)

    with new_stage(stage.project, stage.folder) as own, own.app("frozen") as app:
        return suffer(own, app, fail)


def suffer_frozen_pgbouncer(stage: Stage) -> Ordeal:
    def fail() -> None:
        with pooler.frozen():
            time.sleep(LIMIT_SECONDS + 3)

    own = stage.copy()
    with (
        pgbouncer(own.server.port, {USER: own.server.password}) as pooler,
        own.app("frozen-pgbouncer", pooler.port) as app,
    ):
        return suffer(own, app, fail)


def suffer_network(stage: Stage, *changes: Callable[[Network], None]) -> Ordeal:
    def fail() -> None:
        for change in changes:
            change(way)
        time.sleep(LIMIT_SECONDS + 3)
        way.heal()

    own = stage.copy()
    with network(own.server.port) as way, own.app("network", way.port) as app:
        return suffer(own, app, fail)


def wake_up(stage: Stage) -> list[Answer]:
    """Send as many requests as the pool has connections while the database wakes up."""
    own = stage.copy()
    with network(own.server.port) as way, own.app("wake-up", way.port) as app:
        token = app.register()
        way.reset()
        way.delay = WAKE_UP_SECONDS

        def create() -> Answer:
            return app.request("POST", "/tasks", {"title": "first"}, token=token)

        return at_once(*[create] * POOL_SIZE)


def wait_twice(stage: Stage) -> Answer:
    """Log in while the first statement waits for a while, and the next one forever."""
    own = stage.copy()
    with own.app("waiting-twice") as app, ThreadPoolExecutor(1) as thread:
        app.register("ada")
        form = f"username=ada@example.com&password={PASSWORD}"
        with own.locked("refresh_tokens"):
            with own.locked("users"):
                login = thread.submit(app.request, "POST", "/auth/login", form)
                wait_for(own.waiting)
                time.sleep(LIMIT_SECONDS / 2)
            return login.result()


ORDEALS: dict[str, Callable[[Stage], Ordeal]] = {
    "the server is restarted": lambda stage: suffer_outage(stage, "fast"),
    "the server crashes": lambda stage: suffer_outage(stage, "immediate"),
    "the server is frozen": suffer_frozen_server,
    "PgBouncer is frozen": suffer_frozen_pgbouncer,
    "all packets are lost": lambda stage: suffer_network(stage, Network.lose),
    "the host has vanished": lambda stage: suffer_network(stage, Network.lose, Network.ignore),
    "connections are refused": lambda stage: suffer_network(stage, Network.refuse, Network.reset),
}
# Each key is part of the name of the test that checks the result.
LONG_WORK: dict[str, Callable[[Stage], Any]] = {
    **ORDEALS,
    "database_that_wakes_up": wake_up,
    "several_statements": wait_twice,
}


@pytest.fixture(scope="module", autouse=True)
def begun(request: pytest.FixtureRequest, stage: Stage) -> Iterator[dict[str, Future[Any]]]:
    """Start the long scenarios of the selected tests."""
    tests = " ".join(item.name for item in request.session.items)
    with ThreadPoolExecutor(len(LONG_WORK)) as threads:
        yield {
            name: threads.submit(work, stage) for name, work in LONG_WORK.items() if name in tests
        }


# Quick tests


def test_terminated_idle_connections_cause_no_errors(
    app: AppServer, app_stage: Stage, token: str
) -> None:
    def get() -> Answer:
        return app.request("GET", "/tasks", token=token)

    def create() -> Answer:
        return app.request("POST", "/tasks", {"title": "after the end"}, token=token)

    open_connections(app_stage, app, token)
    wait_for(lambda: app_stage.server.count_clients(app_stage.database) == POOL_SIZE)
    ended = app_stage.server.terminate_backends(app_stage.database)
    answers = at_once(*[get, create] * POOL_SIZE)

    assert ended == POOL_SIZE
    assert [answer.status for answer in answers] == [200, 201] * POOL_SIZE


def test_reset_idle_connections_cause_no_errors(place: Stage) -> None:
    with network(place.server.port) as way, place.app("reset", way.port) as app:
        token = app.register()

        def create() -> Answer:
            return app.request("POST", "/tasks", {"title": "after the reset"}, token=token)

        open_connections(place, app, token)
        way.reset()
        answers = at_once(*[create] * POOL_SIZE)

    assert [answer.status for answer in answers] == [201] * POOL_SIZE


def end_in_the_middle(stage: Stage, request: Callable[[], Answer]) -> Answer:
    """Terminate a request's backend while it waits to write into `tasks`."""
    with ThreadPoolExecutor(1) as thread, stage.locked("tasks"):
        answer = thread.submit(request)
        (pid,) = wait_for(stage.waiting)
        stage.ask("SELECT pg_terminate_backend(%s, 10000)", pid)
        return answer.result()


def test_a_terminated_statement_writes_nothing(
    app: AppServer, app_stage: Stage, token: str
) -> None:
    answer = end_in_the_middle(
        app_stage, lambda: app.request("POST", "/tasks", {"title": "ended"}, token=token)
    )

    assert answer.is_refusal, answer
    assert "ended" not in app_stage.titles()


def test_a_terminated_transaction_writes_nothing(app: AppServer, app_stage: Stage) -> None:
    token = app.register("eva")
    app.request("POST", "/tasks", {"title": "Eva's"}, token=token)

    # Deletes the user first, and then her tasks.
    answer = end_in_the_middle(app_stage, lambda: app.delete_account(token))

    assert answer.is_refusal, answer
    assert app.request("GET", "/auth/me", token=token).body["email"] == "eva@example.com"
    assert "Eva's" in app_stage.titles()


def test_on_a_read_only_server_reads_work_and_writes_are_refused(
    app: AppServer, app_stage: Stage, token: str
) -> None:
    setting = f"ALTER DATABASE {app_stage.database} {{}} default_transaction_read_only"
    app_stage.server.ask(setting.format("SET") + " = on")
    app_stage.server.terminate_backends(app_stage.database)

    created = app.request("POST", "/tasks", {"title": "too late"}, token=token)
    deleted = app.delete_account(token)
    listed = app.request("GET", "/tasks", token=token)

    assert created.is_refusal, created
    assert deleted.is_refusal, deleted
    assert listed.status == 200
    assert "read-only" in app.log.read_text("utf-8")

    app_stage.server.ask(setting.format("RESET"))
    # A connection keeps the setting that it started with, and is closed when it refuses a write.
    wait_for(lambda: app.request("POST", "/tasks", {"title": "now"}, token=token).status == 201)


@pytest.fixture(scope="module")
def small_disk(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A database on a disk of 24 MB. The server's other files are elsewhere."""
    tried = subprocess.run(
        [*IN_NEW_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        check=False,
        capture_output=True,
        **processes.account(),
    )
    if tried.returncode:
        pytest.skip("mounts a disk")
    with processes.folder() as disk:
        wrapper = (*IN_NEW_NAMESPACE, "sh", "-ec", SMALL_DISK, "sh", str(disk))
        with new_stage(project, tmp_path_factory.mktemp("small-disk"), wrapper) as stage:
            stage.ask(f"CREATE TABLESPACE small LOCATION '{disk}'")
            yield stage.copy(tablespace="small")


def fill(stage: Stage) -> None:
    """Fill the disk until there is no room for another page of any table."""
    stage.ask("CREATE TABLE filler (text text)")
    rows = 256
    while rows:
        try:
            stage.ask(
                "INSERT INTO filler SELECT repeat('x', 999) FROM generate_series(1, %s)", rows
            )
        except psycopg2.errors.DiskFull:
            rows //= 2


def test_on_a_full_disk_writes_get_a_507_and_reads_and_deletes_work(small_disk: Stage) -> None:
    with small_disk.app("full") as app:
        token = app.register()
        old = app.request("POST", "/tasks", {"title": "old"}, token=token)
        fill(small_disk)

        # The last page of each table and index still has room for some rows.
        body = {"title": "x" * 200, "description": "x" * 5000}
        answers = [app.request("POST", "/tasks", body, token=token) for _ in range(50)]
        listed = app.request("GET", "/tasks?limit=100", token=token)
        deleted = app.request("DELETE", f"/tasks/{old.body['id']}", token=token)
        small_disk.ask("DROP TABLE filler")
        again = app.request("POST", "/tasks", body, token=token)

    assert answers[-1].body == {"detail": "the database has no space left"}
    assert {answer.status for answer in answers} == {201, 507}
    assert len(listed.body) == 1 + [answer.status for answer in answers].count(201)
    assert deleted.status == 204
    assert again.status == 201


@pytest.mark.parametrize("workers", [1, 2])
def test_on_sigterm_the_app_answers_accepted_requests_before_it_exits(
    place: Stage, workers: int
) -> None:
    with place.app("sigterm", workers=workers) as app, writers(app, app.register(), 24) as crowd:
        wait_for(lambda: len(crowd.answered) > 100)
        with place.locked("tasks"):  # so that requests are in progress
            wait_for(lambda: len(place.waiting()) >= POOL_SIZE)  # in one worker or both
            app.process.terminate()
            time.sleep(1)
        code = app.process.wait(LIMIT_SECONDS)

    lines = [line for line in app.lines() if line.get("path") == "/tasks"]
    logged = {line["request_id"]: line["status"] for line in lines}
    assert code in {0, -signal.SIGTERM}
    assert set(crowd.answered.values()) == {201}
    assert crowd.answered == logged
    assert set(place.titles()) == crowd.created
    # These were sent while the connection was being closed: the app never read them.
    assert crowd.unanswered.isdisjoint(logged)


def test_tasks_that_got_a_201_survive_if_the_app_is_killed(place: Stage) -> None:
    with place.app("killed", workers=2) as app, writers(app, app.register(), 16) as crowd:
        wait_for(lambda: len(crowd.answered) > 200)
        app.kill()

    assert len(crowd.created) > 200
    assert crowd.created <= set(place.titles())


def test_replicas_can_start_together_on_an_empty_database(stage: Stage, token: str) -> None:
    empty = stage.empty()
    with empty.app("replica-1") as first, empty.app("replica-2") as second:
        early = first.request("POST", "/tasks", {"title": "first"}, token=token)
        with ThreadPoolExecutor(2) as threads:
            with empty.locked("pg_catalog.pg_class", "EXCLUSIVE"):  # blocks table creation
                migrations = [threads.submit(empty.migrate) for _ in range(2)]
                wait_for(lambda: len(empty.waiting()) == 2, seconds=60)
            outcomes = [migration.result() for migration in migrations]
        own = second.register()
        answers = [
            app.request("POST", "/tasks", {"title": "first"}, token=own) for app in (first, second)
        ]

    assert early.is_refusal, early
    assert "manage.py migrate" in first.log.read_text("utf-8")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert [answer.status for answer in answers] == [201, 201]


def test_a_migration_that_fails_leaves_the_schema_unchanged(
    place: Stage, project: Project, tmp_path: Path
) -> None:
    leave_out = shutil.ignore_patterns(".venv", ".postgres", ".git")
    copy = shutil.copytree(project.path, tmp_path / "changed", ignore=leave_out)
    changed = Project(copy, project.environment)
    ((head,),) = place.ask("SELECT version_num FROM alembic_version")
    revision = changed.path / "migrations" / "versions" / "9999_fails.py"
    revision.write_text(REVISION.format(head=head), "utf-8")
    columns = (
        "SELECT table_name, column_name FROM information_schema.columns"
        " WHERE table_schema = 'public' ORDER BY 1, 2"
    )
    before = place.ask(columns)

    outcome = place.migrate(changed)

    assert outcome.code == 1
    assert "no migration was applied" in outcome.output
    assert "division by zero" in outcome.output
    assert place.ask(columns) == before
    assert place.ask("SELECT version_num FROM alembic_version") == [(head,)]


# The results of long scenarios come last


@pytest.mark.parametrize("name", ORDEALS)
def test_requests_are_answered_in_time_and_the_app_recovers_when(
    begun: dict[str, Future[Ordeal]], name: str
) -> None:
    ordeal = begun[name].result()

    assert ordeal.crowd.faults() == []
    assert ordeal.refused > 0, "nothing failed"
    assert ordeal.lost == set()


def test_requests_wait_for_a_database_that_wakes_up(begun: dict[str, Future[list[Answer]]]) -> None:
    answers = begun["database_that_wakes_up"].result()

    assert [answer.status for answer in answers] == [201] * POOL_SIZE
    assert min(answer.seconds for answer in answers) >= WAKE_UP_SECONDS


def test_a_request_with_several_statements_stays_within_the_time_limit(
    begun: dict[str, Future[Answer]],
) -> None:
    answer = begun["several_statements"].result()

    assert answer.is_refusal, answer
