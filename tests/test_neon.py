"""The generated project on an imitation of Neon: its commands, its generation and its app.

Slow scenarios, which wait for a timeout or a waking compute, run in parallel.
"""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, get_args

import pexpect
import pytest

from app_server import LIMIT_SECONDS, Answer, AppServer, app_server
from machine import Outcome, Project, new_machine
from neon_proxy import Endpoint, NeonProxy, Reply, Way, neon_proxy
from neon_proxy.mishaps import ALLOW_LIST, MISHAPS, QUOTA, Mishap
from visitors import wait_for

T = TypeVar("T")

CHECK_SECONDS = 100  # timeout of a check, on a busy machine
OWN_SECONDS = 600  # timeout of the project's own tests
SIDE_BY_SIDE = 16
CORES = 2
SHARED_SECONDS = 1.5  # how long the app caches the result of /ready


@pytest.fixture(scope="module")
def neon() -> Iterator[NeonProxy]:
    with neon_proxy() as neon:
        yield neon


@pytest.fixture(scope="module")
def migrated(neon: NeonProxy, project: Project) -> str:
    """A database with the project's schema."""
    endpoint = neon.new_endpoint()
    run = manage(project, endpoint.url(), "migrate")
    assert run.code == 0, run.output
    return endpoint.database


@pytest.fixture
def endpoint(neon: NeonProxy, migrated: str) -> Endpoint:
    return neon.new_endpoint(migrated)


@dataclass(frozen=True)
class Run:
    """The result of a command of the project."""

    code: int
    output: str
    seconds: float


def manage(
    project: Project, url: str | None, *arguments: str, folder: Path | None = None, typed: str = ""
) -> Run:
    """Run `manage.py`. url: of the database; default: from .env. folder: of another project."""
    environment = {**project.environment, **({"DATABASE_URL": url} if url else {})}
    start = time.monotonic()
    done = subprocess.run(
        [project.python, "manage.py", *arguments],
        check=False,
        cwd=folder or project.path,
        env=environment,
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=CHECK_SECONDS * 2,
    )
    return Run(done.returncode, done.stdout, time.monotonic() - start)


def side_by_side(works: Iterable[Callable[[], T]]) -> list[T]:
    """Run functions in parallel. Returns their results in order."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as executor:
        return [future.result() for future in [executor.submit(work) for work in works]]


# Diagnosis


@dataclass(frozen=True)
class Meeting:
    """The run of a check during a mishap. attempts: connections that named the endpoint."""

    run: Run
    attempts: int
    password: str


Meetings = dict[tuple[Mishap, str], Meeting]


Checking = dict[tuple[Mishap, str], Future[Meeting]]


@pytest.fixture(scope="module")
def checking(project: Project, neon: NeonProxy, migrated: str) -> Iterator[Checking]:
    """The check's runs for all mishaps, with text and with JSON output, while other tests run."""

    def meet(mishap: Mishap, *options: str) -> Meeting:
        endpoint = neon.new_endpoint(migrated)
        run = manage(project, mishap.meet(endpoint), "check", *options)
        return Meeting(run, len(endpoint.show()["connections"]), endpoint.password)

    cases = [(mishap, option) for mishap in MISHAPS for option in ("", "--json")]
    with ThreadPoolExecutor(len(cases)) as patient, ThreadPoolExecutor(CORES) as busy:
        yield {
            (mishap, option): (patient if mishap.retry == "yes" else busy).submit(
                meet, mishap, *filter(None, [option])
            )
            for mishap, option in cases
        }


@pytest.mark.usefixtures("own_tests")  # they start now
def test_a_healthy_database_passes_each_step(project: Project, endpoint: Endpoint) -> None:
    run = manage(project, endpoint.url(), "check")

    assert run.code == 0, run.output
    assert set(re.findall(r"^(\S) ", run.output, re.MULTILINE)) == {"✓"}
    assert f"migrations go to {endpoint.host(pooled=False)}" in run.output


def test_a_database_with_an_old_schema_is_reported(project: Project, neon: NeonProxy) -> None:
    run = manage(project, neon.new_endpoint().url(), "check", "--json")

    assert run.code == 1
    assert json.loads(run.output)["finding"] == "schema-behind"
    assert "uv run manage.py migrate" in run.output


def test_the_check_waits_for_a_waking_compute_and_counts_the_seconds(
    project: Project, neon: NeonProxy, migrated: str
) -> None:
    endpoint = neon.new_endpoint(migrated, wake_seconds=8)

    run = manage(project, endpoint.url(), "check")

    counted = [int(seconds) for seconds in re.findall(r"(\d+) s so far", run.output)]
    assert run.code == 0, run.output
    assert len(counted) >= 2
    assert counted == sorted(set(counted))


def test_a_terminal_shows_each_second_of_the_wait(
    project: Project, neon: NeonProxy, migrated: str
) -> None:
    url = neon.new_endpoint(migrated, wake_seconds=6).url()
    terminal = pexpect.spawn(
        str(project.python),
        ["manage.py", "check"],
        cwd=project.path,
        env={**project.environment, "DATABASE_URL": url},
        encoding="utf-8",
        timeout=CHECK_SECONDS,
    )

    output = terminal.read()
    terminal.close()

    counted = [int(seconds) for seconds in re.findall(r"\r[^\r\n]*?(\d+) s so far", output)]
    assert terminal.exitstatus == 0, output
    assert len(counted) >= 3
    assert counted == sorted(counted)


def test_the_check_retries_after_temporary_errors(project: Project, endpoint: Endpoint) -> None:
    endpoint.reply(
        Reply("Couldn't connect to compute node", times=1),
        Reply("Control plane request failed", times=1),
    )

    run = manage(project, endpoint.url(), "check")

    assert run.code == 0, run.output
    assert len(endpoint.show()["connections"]) == 3


# Migrations and settings


def test_migrations_bypass_the_pooler(project: Project, neon: NeonProxy) -> None:
    endpoint = neon.new_endpoint()

    run = manage(project, endpoint.url(), "migrate")

    assert run.code == 0, run.output
    connections = endpoint.show()["connections"]
    assert {connection["host"] for connection in connections} == {endpoint.host(pooled=False)}


def test_migrations_wait_for_a_waking_compute(project: Project, neon: NeonProxy) -> None:
    run = manage(project, neon.new_endpoint(wake_seconds=5).url(), "migrate")

    assert run.code == 0, run.output


@pytest.mark.parametrize("text", [QUOTA, "password authentication failed for user 'ada'"])
def test_a_migration_that_cannot_connect_says_why(
    project: Project, endpoint: Endpoint, text: str
) -> None:
    endpoint.reply(Reply(text))

    run = manage(project, endpoint.url(), "migrate")

    assert run.code == 1
    assert "→ " in run.output
    assert "Traceback" not in run.output
    assert endpoint.password not in run.output


def test_the_consoles_connection_string_can_be_pasted(
    project: Project, endpoint: Endpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(project.path, folder, ignore=shutil.ignore_patterns(".venv", ".postgres"))

    env = manage(project, None, "env", folder=folder, typed=f"psql '{endpoint.url()}'\n")
    check = manage(project, None, "check", folder=folder)

    assert env.code == 0, env.output
    assert endpoint.password not in env.output
    assert f"DATABASE_URL={endpoint.url()}\n" in (folder / ".env").read_text("utf-8")
    assert check.code == 0, check.output


# What the check says


@pytest.fixture(scope="module")
def meetings(checking: Checking) -> Meetings:
    return {case: future.result() for case, future in checking.items()}


def names(mishap: Mishap) -> str:
    return mishap.text[:60]


@pytest.mark.parametrize("mishap", MISHAPS, ids=names)
def test_the_check_says_what_is_wrong_and_what_to_do(meetings: Meetings, mishap: Mishap) -> None:
    report = meetings[mishap, "--json"].run
    text = meetings[mishap, ""].run

    found = json.loads(report.output[report.output.index("{") :])
    (failed,) = [step for step in found["checks"] if step["ok"] is False]
    assert (report.code, text.code) == (1, 1)
    assert (found["ok"], found["finding"], failed["finding"]) == (False, *[mishap.finding] * 2)
    assert f"✗ {failed['name']:<9} {failed['detail']}\n" in text.output
    assert failed["advice"]
    assert f"→ {failed['advice']}\n" in text.output


@pytest.mark.parametrize("mishap", MISHAPS, ids=names)
def test_the_check_retries_only_if_that_can_help(meetings: Meetings, mishap: Mishap) -> None:
    meeting = meetings[mishap, ""]

    if mishap.counted:
        assert meeting.attempts in {"no": {1}, "once": {2}, "yes": range(2, 20)}[mishap.retry]
    assert meeting.run.seconds < CHECK_SECONDS


@pytest.mark.parametrize("mishap", MISHAPS, ids=names)
def test_the_check_shows_no_secret(meetings: Meetings, mishap: Mishap) -> None:
    shown = [meetings[mishap, option] for option in ("", "--json")]

    assert all(meeting.password not in meeting.run.output for meeting in shown)


# The generator, and the command with which it sets a project up


STATES = {
    "healthy": [],
    "waking": [],
    "unsteady": [Reply("Couldn't connect to compute node", times=1)],
    "wrong password": [Reply("password authentication failed for user 'ada'")],
    "quota": [Reply(QUOTA)],
    "not allowed": [Reply(ALLOW_LIST, before_login=True)],
}
GENERATED = {"healthy", "quota"}
Setups = dict[str, tuple[Endpoint, Outcome]]


@pytest.fixture(scope="module")
def setups(
    project: Project, template: Path, neon: NeonProxy, tmp_path_factory: pytest.TempPathFactory
) -> Setups:
    """Projects set up on databases in different states, by state.

    Those in GENERATED are generated. The others are copies in which `manage.py setup` ran.
    """

    def set_up(state: str) -> tuple[Endpoint, Outcome]:
        endpoint = neon.new_endpoint(wake_seconds=5 if state == "waking" else 0)
        endpoint.reply(*STATES[state])
        url = endpoint.url()
        folder = tmp_path_factory.mktemp("setup")
        if state in GENERATED:
            with new_machine(folder / "machine", template) as machine:
                answer = "database=neon"
                return endpoint, machine.generate(answer, NEON_DATABASE_URL=url, seconds=240)
        not_copied = shutil.ignore_patterns(".env", ".git", ".postgres", ".venv")
        shutil.copytree(project.path, folder / "copy", ignore=not_copied)
        copy = Project(folder / "copy", {**project.environment, "NEON_DATABASE_URL": url})
        return endpoint, copy.run(str(project.python), "manage.py", "setup", seconds=240)

    found = side_by_side([partial(set_up, state) for state in STATES])
    return dict(zip(STATES, found, strict=True))


@pytest.mark.parametrize("state", ["healthy", "waking", "unsteady"])
def test_a_project_is_set_up_on_neon(setups: Setups, state: str) -> None:
    endpoint, outcome = setups[state]

    assert outcome.code == 0, outcome.output
    assert "✓ schema" in outcome.output
    assert "✓ connection" in outcome.output
    assert ("It is ready" in outcome.output) == (state in GENERATED)
    assert endpoint.password not in outcome.output
    assert f"DATABASE_URL={endpoint.url()}\n" in outcome.project.read(".env")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("wrong password", "uv run manage.py env"),
        ("quota", "quota"),
        ("not allowed", "not allowed"),
    ],
)
def test_if_the_database_refuses_the_output_says_what_to_do(
    setups: Setups, state: str, message: str
) -> None:
    endpoint, outcome = setups[state]

    assert outcome.code == (0 if state in GENERATED else 1)
    assert re.search(r"✗ ep-.*\n  → .*\n  error: .*\n  → to use another .*: uv run", outcome.output)
    assert message in outcome.output
    assert "migrations use the direct host" in outcome.output
    assert endpoint.password not in outcome.output
    assert f"DATABASE_URL={endpoint.url()}\n" in outcome.project.read(".env")


def test_if_the_database_refuses_a_new_project_is_complete(setups: Setups) -> None:
    _, outcome = setups["quota"]

    assert re.search(r"✗ setup: .*\n    again: uv run manage.py setup\n", outcome.output)
    assert "\n    uv run manage.py setup\n" in outcome.output


# Scale to zero


@dataclass(frozen=True)
class Night:
    """Responses after a night in which the compute slept: the first ones, and later ones."""

    answers: list[Answer]
    health: Answer
    ready: Answer
    later: Answer
    ready_later: Answer


POOL_SIZE = 4
CLIENTS = 6  # two more than connections, so that two have to wait
# Seconds to wake up in each night of one app. 20 comes first: its test expects a 503 from /ready,
# which may still repeat an earlier 200 in a later night.
NIGHTS: dict[Way, list[float]] = {"fatal": [20, 0.5, 5], "close": [0.5, 5], "reset": [0.5, 5]}


def spend_a_night(app: AppServer, endpoint: Endpoint, way: Way, wake_seconds: float) -> Night:
    token = app.register()
    read = partial(app.request, "GET", "/tasks", token=token)
    write = partial(app.request, "POST", "/tasks", {"title": "first thing"}, token=token)
    health, ready = (partial(app.request, "GET", path) for path in ("/health", "/ready"))
    side_by_side([read] * CLIENTS)  # opens several connections

    endpoint.suspend(way, wake_seconds=wake_seconds)

    *answers, alive, able = side_by_side([*[read] * (CLIENTS - 1), write, health, ready])
    seconds = wake_seconds + 20
    later = [wait_for(partial(succeed, request), seconds) for request in (read, ready)]
    return Night(answers, alive, able, *filter(None, later))


def succeed(request: Callable[[], Answer]) -> Answer | None:
    answer = request()
    return answer if answer.status == 200 else None


@pytest.fixture(scope="module")
def nights(
    project: Project, neon: NeonProxy, migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Way, float], Night]:
    folder = tmp_path_factory.mktemp("nights")

    def spend(way: Way) -> dict[tuple[Way, float], Night]:
        endpoint = neon.new_endpoint(migrated)
        log, settings = folder / f"{endpoint.name}.log", {"DB_POOL_SIZE": str(POOL_SIZE)}
        with app_server(project, endpoint.url(), log, settings=settings) as app:
            return {
                (way, seconds): spend_a_night(app, endpoint, way, seconds)
                for seconds in NIGHTS[way]
            }

    apps = side_by_side([partial(spend, way) for way in NIGHTS])
    return {name: night for found in apps for name, night in found.items()}


@pytest.mark.parametrize("wake_seconds", [0.5, 5])
@pytest.mark.parametrize("way", get_args(Way))
def test_the_first_requests_after_a_night_succeed(
    nights: dict[tuple[Way, float], Night], way: Way, wake_seconds: float
) -> None:
    night = nights[way, wake_seconds]

    assert [answer.status for answer in night.answers] == [200] * (CLIENTS - 1) + [201]
    assert night.health.status == 200


def test_if_a_compute_wakes_too_slowly_requests_get_a_503_and_the_app_recovers(
    nights: dict[tuple[Way, float], Night],
) -> None:
    night = nights["fatal", 20]

    assert {answer.status for answer in night.answers} == {503}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in night.answers)
    assert all(answer.seconds < LIMIT_SECONDS for answer in night.answers)
    assert (night.health.status, night.ready.status) == (200, 503)
    assert (night.later.status, night.ready_later.status) == (200, 200)


@pytest.fixture(scope="module")
def idle(
    project: Project, neon: NeonProxy, migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[AppServer, Endpoint]]:
    """An app with its own endpoint."""
    endpoint = neon.new_endpoint(migrated)
    log = tmp_path_factory.mktemp("idle") / "log"
    with app_server(project, endpoint.url(), log) as app:
        yield app, endpoint


def test_an_idle_app_sends_no_queries(idle: tuple[AppServer, Endpoint]) -> None:
    app, endpoint = idle
    app.register()
    before = len(endpoint.show()["statements"])

    time.sleep(6)

    assert before > 0
    assert len(endpoint.show()["statements"]) == before


def test_readiness_sends_at_most_one_query_per_cache_period(
    idle: tuple[AppServer, Endpoint],
) -> None:
    app, endpoint = idle
    before = len(endpoint.show()["statements"])
    start = time.monotonic()

    statuses = []
    while time.monotonic() - start < 6:
        statuses.append(app.request("GET", "/ready").status)
        time.sleep(0.25)
    asked = len(endpoint.show()["statements"]) - before

    assert set(statuses) == {200}
    assert 2 <= asked <= (time.monotonic() - start) / SHARED_SECONDS + 1


def test_a_temporary_error_is_retried_within_the_requests_time_limit(
    idle: tuple[AppServer, Endpoint],
) -> None:
    app, endpoint = idle
    token = app.register()
    endpoint.hang_up("fatal")
    endpoint.reply(Reply("Couldn't connect to compute node", times=1))

    answer = app.request("GET", "/tasks", token=token)

    assert answer.status == 200


def test_an_app_can_start_while_the_compute_sleeps(
    project: Project, neon: NeonProxy, migrated: str, tmp_path: Path
) -> None:
    endpoint = neon.new_endpoint(migrated, wake_seconds=3)
    with app_server(project, endpoint.url(), tmp_path / "log") as app:
        token = app.register()

        assert app.request("GET", "/tasks", token=token).status == 200


# The project's own tests


# Whose statements, transactions and connections differ most from each other.
ON_THE_POOLED_HOST = [
    *(f"postgres/tests/test_{name}.py" for name in ("copy_tables", "engine", "statements")),
    *(f"tests/test_{name}.py" for name in ("account", "db", "tasks")),
]


def run_own_tests(project: Project, endpoint: Endpoint, *arguments: str) -> Outcome:
    """Run the project's tests on a pooled host."""
    environment = {**project.environment, "TEST_DATABASE_URL": endpoint.url()}
    # Two workers, not the usual four: each imports the app and collects the tests.
    command = ["uv", "run", "pytest", "--quiet", "-p", "no:cacheprovider", "-n", "2", *arguments]
    return Project(project.path, environment).run(*command, seconds=OWN_SECONDS)


@pytest.fixture(scope="module")
def own_tests(
    project: Project, neon: NeonProxy, migrated: str, checking: Checking
) -> Iterator[tuple[Endpoint, Future[Outcome]]]:
    """Some of the project's tests on a pooled host, running while other tests wait."""
    wait(future for (mishap, _), future in checking.items() if mishap.retry != "yes")
    endpoint = neon.new_endpoint(migrated)
    with ThreadPoolExecutor(1) as executor:
        yield endpoint, executor.submit(run_own_tests, project, endpoint, *ON_THE_POOLED_HOST)


@pytest.mark.timeout(OWN_SECONDS + 60)
def test_the_projects_tests_pass_on_the_pooled_host(
    own_tests: tuple[Endpoint, Future[Outcome]],
) -> None:
    endpoint, future = own_tests

    outcome = future.result(OWN_SECONDS)

    assert outcome.code == 0, outcome.output
    assert re.search(r"^\d+ passed in ", outcome.output, re.MULTILINE), outcome.output
    assert any(connection["pooled"] for connection in endpoint.show()["connections"])


@pytest.mark.weekly
@pytest.mark.timeout(OWN_SECONDS + 60)
def test_all_of_the_projects_tests_pass_on_the_pooled_host(
    project: Project, endpoint: Endpoint
) -> None:
    outcome = run_own_tests(project, endpoint)

    assert outcome.code == 0, outcome.output
