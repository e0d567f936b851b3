"""The benchmark itself: what it counts, computes and writes. No test asserts a speed."""

import json
import shutil
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bench import __main__ as command
from bench import goals, load, measure, profiles, readme, report, scaling
from bench.load import Health, Run
from bench.measure import Measurement, Results, measure_at, prepared
from bench.plan import POOLS, SESSION_APPS, SPEED_APPS, Cell, Plan, full_plan, quick_plan, select
from bench.processes import BenchError, distant
from bench.profiles import NOW, PARTS, Profile
from bench.project import Project as Measured
from bench.pulse import Pulse, pulse
from bench.report import TIMES
from bench.scaling import Scale
from bench.subjects import url_for

from machine import Project

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
HEALTH = Health(asked=40, failed=0, p50_ms=3, p99_ms=8, max_ms=9)
RUN = Run(
    seconds=2,
    sent=101,
    answered=100,
    in_time=80,
    statuses={"200": 90, "503": 10},
    broken=0,
    p50_ms=5,
    p99_ms=9,
    max_ms=12,
    refused=7,
    took=3,
    cpu_seconds=0.2,
    health=HEALTH,
    probe=replace(HEALTH, failed=1, max_ms=150),
)
MACHINE = {"processor": "an abacus", "date": "2030-01-30"}


class Stub(BaseHTTPRequestHandler):
    """Responds with the status in the path; never to /0, late to /200?slow."""

    protocol_version = "HTTP/1.1"
    received: set[str]
    closing: threading.Event

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length", "0"))
        self.received.add(
            f"{self.command} {self.headers['Authorization']} {self.headers['Content-Type']}"
            f" {self.rfile.read(size)!r}"
        )
        path, _, manner = self.path.removeprefix("/").partition("?")
        if not int(path):
            self.closing.wait()
            return
        if manner == "slow":
            time.sleep(0.6)
        self.send_response(int(path))
        if manner == "retry":
            self.send_header("Retry-After", "2")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = answer  # noqa: N815  (names of the base class)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[ThreadingHTTPServer]:
    Stub.received, Stub.closing = set(), threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever).start()
        yield server
        Stub.closing.set()
        server.shutdown()


class Silent:
    """A display that shows nothing."""

    def say(self, text: str) -> None: ...

    def advance(self, seconds: float) -> None: ...

    def found(self, measurement: Measurement) -> None: ...


def results_of(*cells: Cell) -> Results:
    """Return results in which ours is twice as fast as textbook, and as fast as the floor."""
    slow = replace(RUN, in_time=40, p50_ms=10)
    runs = {"ours": [RUN, RUN, replace(RUN, in_time=8)], "textbook": [slow], "floor": [RUN]}
    measurements = [
        Measurement(cell, {app: runs.get(app, [RUN]) for app in cell.apps}) for cell in cells
    ]
    generations = [{"whole": 3.0, "uv sync": 2.0}]
    return Results(
        MACHINE, measurements, {0: 0.1, 10: 10.0}, generations, {"connect": 0.1, "session": 0.001}
    )


@needs_wrk
def test_responses_are_counted_by_status(stub: ThreadingHTTPServer) -> None:
    requests = [load.prepare("GET", f"/{path}", "t") for path in ("200", "503", "503?retry", "200")]

    run = load.send(stub.server_port, requests, clients=2, seconds=0.5)

    assert run.statuses.keys() == {"200", "503"}
    assert sum(run.statuses.values()) == run.answered == run.sent
    assert run.succeeded == run.statuses["200"] >= run.in_time > 0
    assert run.unanswered == run.broken == 0


@needs_wrk
def test_a_503_with_retry_after_is_not_a_failure(stub: ThreadingHTTPServer) -> None:
    requests = [load.prepare("GET", f"/{path}", "t") for path in ("503", "503?retry", "500?retry")]

    run = load.send(stub.server_port, requests, clients=1, seconds=1)

    assert run.refused >= 1
    assert run.failed == run.sent - run.refused
    assert abs(run.statuses["503"] - 2 * run.refused) <= 1


@needs_wrk
def test_requests_that_are_never_answered_are_counted(
    stub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "SILENCE_SECONDS", 1)
    requests = [load.prepare("GET", "/200", "t"), load.prepare("GET", "/0", "t")]

    run = load.send(stub.server_port, requests, clients=3, seconds=1)

    assert run.unanswered == 3
    assert run.answered > 0


@needs_wrk
def test_a_run_waits_for_late_responses(stub: ThreadingHTTPServer) -> None:
    request = load.prepare("GET", "/200?slow", "t")

    run = load.send(stub.server_port, [request], clients=3, seconds=0.2)

    assert (run.succeeded, run.unanswered, run.in_time) == (3, 0, 0)
    assert run.took >= 0.6
    assert run.throughput == run.succeeded / run.took


@needs_wrk
def test_requests_carry_bodies_forms_and_tokens(stub: ThreadingHTTPServer) -> None:
    body = load.prepare("POST", "/201", "secret", {"title": "Buy milk"})
    form = load.prepare_form("/201", "192.0.2.1", username="ada@example.com", password="a b")

    load.send(stub.server_port, [body, form], clients=1, seconds=1)

    assert Stub.received == {
        "POST Bearer secret application/json " + repr(b'{"title": "Buy milk"}'),
        "POST None application/x-www-form-urlencoded "
        + repr(b"username=ada%40example.com&password=a+b"),
    }


def test_health_is_checked_during_a_run(stub: ThreadingHTTPServer) -> None:
    with pulse(stub.server_port, "/200") as beats, pulse(stub.server_port, "/500") as failing:
        time.sleep(1)

    assert beats.health().asked > 0
    assert beats.probe().asked > 0
    assert beats.health().failed == beats.probe().failed == 0
    assert 0 < beats.health().p50_ms <= beats.health().p99_ms <= beats.health().max_ms
    assert failing.health().failed == failing.health().asked > 0
    assert failing.probe().failed == failing.probe().asked > 0


def test_a_long_wait_counts_for_every_check_that_was_due() -> None:
    beats = Pulse()
    beats.kept = [1.0, 120.0, None]

    health = beats.health()

    assert (health.asked, health.failed) == (5, 1)  # 120 ms adds 70 and 20
    assert (health.p50_ms, health.max_ms) == (45, 120)


def test_without_wrk_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(BenchError, match="apt-get install wrk"):
        load.require_wrk()


def test_the_proxy_adds_latency() -> None:
    with socket.create_server(("127.0.0.1", 0)) as echo, ExitStack() as stack:
        url = f"postgresql://ada@127.0.0.1:{echo.getsockname()[1]}/test"

        far_url = stack.enter_context(distant(url, milliseconds=50))
        port = int(far_url.rpartition(":")[2].partition("/")[0])
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        server = stack.enter_context(echo.accept()[0])
        start = time.monotonic()
        client.sendall(b"question")
        question = server.recv(100)
        server.sendall(b"answer")
        answer = client.recv(100)

        assert (question, answer) == (b"question", b"answer")
        assert time.monotonic() - start >= 0.05


def test_ratios_compare_medians() -> None:
    (found,) = results_of(Cell("speed", "list", 16)).measurements

    assert found.median("ours", "rate") == 40
    assert found.ratio("ours", "textbook") == 2
    assert found.total("ours", "unanswered") == 3
    assert found.statuses("ours") == {"200": 270, "503": 30}


def test_there_is_no_ratio_to_an_app_that_serves_nothing() -> None:
    nothing = replace(RUN, statuses={"500": 100}, in_time=0)
    found = Measurement(Cell("crowd", "list", 200), {"ours": [RUN], "textbook": [nothing]})

    assert found.ratio("ours", "textbook") is None


def test_every_chapter_has_a_table() -> None:
    cells = [Cell("speed", "list", 1, 10, apps=SPEED_APPS)]
    cells += [Cell("session", "get", 16, apps=SESSION_APPS)]
    cells += [Cell("crowd", "create", 200), Cell("growth", "list", 1)]
    pools = Cell("pool", "list", 64, 50, apps=tuple(POOLS))

    text = report.markdown(results_of(*cells, pools))

    ratios = f"2.00 {TIMES} | 1.00 {TIMES} | 1.00 {TIMES}"
    assert f"| list | 1 | 10 ms | 40 | 20 | 40 | 40 | {ratios} |" in text
    assert "| list | 0.50 | 1.00 | 0.50 | 0.50 |" in text
    ratios = f"1.00 {TIMES} | 1.00 {TIMES} | 2.00 {TIMES}"
    assert f"| get | 16 | 0 ms | 40 | 40 | 40 | 20 | {ratios} |" in text
    assert text.count("| 2,000 / 2,000 / 2,000 / 2,000 |") == 2
    assert f"| create | 200 | 0 ms | ours | 270 of 303 | 21 | 9 {TIMES} 503 | 3 | 30 |" in text
    assert "| 3 / 8 / 9 | 3 / 8 / 150, 3 of 120 failed |" in text
    assert "| first page | 1,000 | 1 | 5.00 | 10.00 | 5.00 |" in text
    assert "| list | 50 ms |" + " 40 / 9 ms |" * len(POOLS) in text
    assert "- list, 64 clients, 50 ms: pool of 4: 11 of 101\n" in text
    assert f"| 2.00 | 2.00 | 3.00 | 1.50 {TIMES} |" in text
    assert "its connection: 1.00 ms" in text


def test_an_app_that_was_not_measured_is_not_mentioned() -> None:
    results = results_of(Cell("speed", "list", 16), Cell("speed", "list", 1, 10))

    text = report.markdown(results) + goals.markdown(results)

    assert "ours ÷ floor" in text
    assert "- *floor*: Starlette" in text
    assert "async floor" not in text


def test_each_goal_says_whether_it_holds() -> None:
    cells = [Cell("speed", "list", 16), Cell("speed", "get", 16, 10), Cell("speed", "list", 1, 10)]
    cells += [Cell("crowd", "list", 200), Cell("growth", "list", 1)]
    cells += [Cell("growth", "list", 1, tasks=1_000_000)]

    found = [(goal.measured, goal.holds) for goal in goals.goals(results_of(*cells))]

    assert found == [
        ("0 ms: list 2.00; 10 ms: get 2.00", "no"),
        ("0 ms: list 1.00; 10 ms: get 1.00", "yes"),
        ("0 ms: list 2,000 / 2,000 / 2,000; 10 ms: get 2,000 / 2,000 / 2,000", ""),
        ("list 0.50", "yes"),
        ("ours 89 %, floor 89 %, textbook 89 %", "no"),
        (f"303 requests, 21 {TIMES} 503, 12 failed", "no"),
        ("median 3 ms, p99 at most 8 ms, longest 9 ms", "yes"),
        ("median 3 ms, p99 at most 8 ms, longest 150 ms, 3 failed", "in 0 of 1 crowds"),
        (f"first page 1.00 {TIMES}", "yes"),
        (f"1.50 {TIMES}, 3.0 s", "no"),
        ("0.10 s; 1.0 ms", "yes"),
    ]


def test_a_goal_that_holds_only_at_some_latencies_says_where() -> None:
    results = results_of(Cell("speed", "list", 16), Cell("speed", "list", 16, 10))
    fast = {"ours": [replace(RUN, in_time=400)], "textbook": [RUN], "floor": [RUN]}
    results.measurements[1] = replace(results.measurements[1], runs=fast)

    goal = goals.goals(results)[0]

    assert goal.holds == "at 10 ms"


@pytest.mark.parametrize(("statuses", "share"), [({"200": 90}, "89 %"), ({}, "none")])
def test_the_share_of_the_textbook_app_is_shown_in_words_if_it_is_none(
    statuses: dict[str, int], share: str
) -> None:
    results = results_of(Cell("crowd", "list", 200))
    results.measurements[0].runs["textbook"] = [replace(RUN, statuses=statuses)]

    text = readme.glance(results)

    assert f" With 200 clients, {share} of the textbook app's requests succeed.\n" in text


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary repository that a full run writes to. Returns its README."""
    path = tmp_path / "README.md"
    path.write_text(f"Before\n\n{readme.BEGIN}\nof another run\n{readme.END}\n\nAfter\n", "utf-8")
    monkeypatch.setattr(command, "README", path)
    monkeypatch.setattr(command, "REPOSITORY", tmp_path)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "bench" / "results")
    return path


def run_of(
    monkeypatch: pytest.MonkeyPatch, *words: str, quick: bool = False, fails: bool = False
) -> None:
    """Run the command with a fake measurement."""

    def instead(_plan: Plan, _folder: Path, _display: object, results: Results) -> None:
        results.machine |= MACHINE
        results.measurements += results_of(Cell("speed", "list", 16)).measurements
        if fails:
            raise BenchError("the lights went out")

    monkeypatch.setattr(command, "measure", instead)
    command.run(Namespace(quick=quick, only=words, output=None))


def test_a_full_run_updates_the_readme_and_the_results(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(monkeypatch)

    text = published.read_text("utf-8")
    assert text.startswith(f"Before\n\n{readme.BEGIN}\n")
    assert text.endswith(f"{readme.END}\n\nAfter\n")
    assert "of another run" not in text
    assert "- **2.0 to 2.0 times** the responses per second" in text
    assert "](bench/results/speed.svg)" in text
    assert "[results](bench/results/results.md)" in text
    folder = published.parent / "bench" / "results"
    assert (folder / "speed.svg").exists()
    tables = (folder / "results.md").read_text("utf-8")
    assert tables.startswith("### Goals\n")
    assert "| at least 3.5 × (list, get), 5 × (create) | 0 ms: list 2.00 | no |" in tables
    assert "](speed.svg)" in tables


def test_a_partial_run_leaves_published_files_unchanged(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = published.read_text("utf-8")

    run_of(monkeypatch, quick=True)
    run_of(monkeypatch, "speed")

    assert published.read_text("utf-8") == before
    assert [*published.parent.iterdir()] == [published]


def test_results_before_a_failure_are_kept(
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setattr(command, "new_folder", lambda: kept)

    with pytest.raises(BenchError, match="lights"):
        run_of(monkeypatch, fails=True)

    assert len(json.loads((kept / "results.json").read_text("utf-8"))["measurements"]) == 1
    assert str(kept) in capsys.readouterr().out
    assert "of another run" in published.read_text("utf-8")


def test_a_readme_without_markers_is_left_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"{readme.END} {readme.BEGIN}", "utf-8")

    with pytest.raises(BenchError, match="no lines"):
        readme.write(path, "text")

    assert path.read_text("utf-8") == f"{readme.END} {readme.BEGIN}"


def test_a_run_writes_tables_plots_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [Cell("speed", "list", clients, 10, apps=SPEED_APPS) for clients in (1, 16)]
    cells += [Cell("session", "list", 16, apps=SESSION_APPS), Cell("crowd", "list", 200, 10)]
    cells += [Cell("growth", "list", 1, tasks=tasks) for tasks in (20, 1000)]
    cells += [Cell("pool", "list", 64, latency, apps=tuple(POOLS)) for latency in (0, 10)]
    results = results_of(*cells)

    command.write(results, tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {
        *("results.json", "results.md"),
        *("speed.svg", "trips.svg", "crowd.svg", "growth.svg", "pool.svg"),
    }
    figures = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert Results.from_data(figures) == results
    assert ">async floor</text>" in (tmp_path / "speed.svg").read_text("utf-8")
    assert ">async floor</text>" in (tmp_path / "trips.svg").read_text("utf-8")
    assert "### Speed" in capsys.readouterr().out


def test_tables_and_plots_can_be_written_again_from_figures(tmp_path: Path) -> None:
    command.write(results_of(Cell("speed", "list", 16)), tmp_path / "old")
    arguments = Namespace(figures=tmp_path / "old" / "results.json", output=tmp_path / "new")

    command.render(arguments)

    old, new = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("old", "new")
    )
    assert new == old


def test_a_file_without_figures_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"machine": {}}', "utf-8")

    with pytest.raises(BenchError, match="no figures"):
        command.render(Namespace(figures=path, output=None))


@pytest.mark.parametrize("plan", [full_plan(), quick_plan()])
def test_parts_of_a_plan_can_be_selected(plan: Plan) -> None:
    part = select(plan, ["speed", "create"])

    assert part.generations == 0
    assert {(cell.chapter, cell.operation) for cell in part.cells} == {("speed", "create")}
    assert select(plan, []) == plan


@pytest.mark.parametrize("plan", [full_plan(), quick_plan()])
def test_sessions_are_measured_under_load(plan: Plan) -> None:
    part = select(plan, ["session"])

    assert {cell.operation for cell in part.cells} == {"list", "get", "create"}
    assert {(cell.clients, cell.apps) for cell in part.cells} == {(16, SESSION_APPS)}


@pytest.mark.parametrize(
    ("app", "expected"),
    [
        ("floor", "postgresql://ada@127.0.0.1:1/test?sslmode=disable"),
        ("textbook", "postgresql+psycopg2://ada@127.0.0.1:1/test?sslmode=disable"),
        ("async textbook", "postgresql+asyncpg://ada@127.0.0.1:1/test?ssl=disable"),
    ],
)
def test_an_app_gets_a_url_for_its_driver(app: str, expected: str) -> None:
    url = url_for(app, "postgresql://ada@127.0.0.1:1/test?sslmode=disable")

    assert url == expected


LIB, HOME = "/usr/lib/python3.13", "/home/ada/todo-backend"
SITE = f"{HOME}/.venv/lib/python3.13/site-packages"
STACKS = f"""\
main (/home/ada/bench/serve.py:22);Runner.run ({LIB}/asyncio/runners.py:86) 4
RequestLog.__call__ ({HOME}/logs.py:100);encode ({LIB}/json/encoder.py:1) 3
app ({SITE}/fastapi/routing.py:4);JSONResponse.render ({SITE}/starlette/responses.py:180) 2
list_tasks ({HOME}/routes/tasks.py:7) 5
list_tasks ({HOME}/routes/tasks.py:7);sign ({SITE}/itsdangerous/signer.py:9) 1
run ({HOME}/db.py:3);Connection.execute ({SITE}/sqlalchemy/engine/base.py:1) 2
execute ({SITE}/sqlalchemy/a.py:1);Dialect.do_execute ({SITE}/sqlalchemy/b.py:1) 1
run ({HOME}/db.py:3);submit ({LIB}/concurrent/futures/thread.py:8) 1
send ({HOME}/db.py:9);connect ({HOME}/postgres/engine.py:5) 3
send ({HOME}/db.py:9);wait ({HOME}/postgres/dialect.py:7) 2
<module> (<string>:1) 1
"""


def test_samples_count_for_the_innermost_known_part() -> None:
    shares = profiles.shares(profiles.read(STACKS))

    assert shares.keys() == set(PARTS)
    assert {part: share for part, share in shares.items() if share} == {
        profiles.LOOP: 20,
        profiles.LOGS: 12,
        profiles.CHECKS: 8,
        profiles.OURS: 24,
        profiles.STATEMENTS: 12,
        profiles.ORM: 8,
        profiles.DRIVER: 12,
        profiles.THREADS: 4,
    }


def test_profiles_contain_no_local_paths(tmp_path: Path) -> None:
    shares = dict.fromkeys(PARTS, 11.1)
    found = [Profile(version, "list", 900, 2000, shares) for version in (NOW, "61d64d5")]
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    for profile in found:
        (graphs / profile.name).write_text(
            '<text id="title" x="1">/home/ada/py-spy</text>', "utf-8"
        )

    text = profiles.write(found, graphs, tmp_path)

    assert "| part | at 61d64d5 | now |" in text
    assert "| psycopg2 | 11.1 % | 11.1 % |" in text
    graph = (tmp_path / "profile-list-before.svg").read_text("utf-8")
    assert graph == '<text id="title" x="1">list, 61d64d5</text>'
    assert (tmp_path / "profile-list.svg").exists()


def test_scaling_compares_processes_within_one_run() -> None:
    cpu = dict.fromkeys(scaling.PROGRAMS, 0.01)
    rounds = [(1, 50), (1, 100), (2, 300), (1, 200), (2, 180)]
    usual = replace(RUN, answered=100, refused=0, took=1)
    found = [
        Scale("list", processes, replace(usual, sent=number, statuses={"200": number}), cpu)
        for processes, number in rounds
    ]

    text = scaling.markdown(found)

    assert "| 1 | 100 | 1.00 × | 100 | 100 | 100 | 100 | 100 | 100 | 0.05 |" in text
    assert "| 2 | 240 | 2.40 × | 120 |" in text


@needs_wrk
@pytest.mark.weekly
def test_all_apps_give_the_same_responses_and_are_measured(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.1)
    apps = tuple(dict.fromkeys((*SPEED_APPS, *SESSION_APPS)))
    operations = ("list", "last page", "get", "create", "change", "delete", "mixed")
    cells = [Cell("speed", name, 2, rounds=1, seconds=0.1, apps=apps) for name in operations]
    waiting = Cell("speed", "list", 50, rounds=1, seconds=0.1, apps=("floor", "async floor"))
    cells += [waiting, Cell("session", "list", 2, rounds=1, seconds=0.1, apps=SESSION_APPS)]
    cells.append(Cell("crowd", "log-ins", 20, rounds=1, seconds=0.5, apps=("ours",)))
    cells.append(Cell("growth", "create", 1, tasks=30, rounds=1, seconds=0.1))
    pools = [Cell("pool", "list", 8, rounds=1, seconds=0.1, apps=(*POOLS,)[:1])]
    measured, results = Measured(project.path), Results({})

    with (
        measured.postgres() as url,
        prepared(measured, url, Plan((*cells, *pools), 0, 1), Silent()) as world,
    ):
        measure_at(url, world, cells, results, tmp_path, Silent())
        measure_at(url, world, pools, results, tmp_path, Silent())
        seconds = measured.time_sessions(url)

    assert [found.cell for found in results.measurements] == [*cells, *pools]
    for found in results.measurements:
        for app in found.cell.apps:
            assert found.total(app, "succeeded") == found.total(app, "sent") > 0, found
    assert results.left_out == []
    assert results.of("crowd")[0].runs["ours"][0].health is not None
    assert seconds.keys() == {"connect", "session"}
    assert ", asyncpg " in world.software
    assert not [*measured.path.rglob("asyncpg")]  # only one app needs it
