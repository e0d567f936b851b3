"""The benchmark's own machinery: what it counts, computes and writes. No speed is asserted here."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bench import __main__ as command
from bench import load, report
from bench.load import Run
from bench.measure import Measurement, Results, measure_at, prepared
from bench.plan import APPS, Cell, Plan, full_plan, quick_plan, select
from bench.processes import BenchError, distant
from bench.project import Project as Measured
from bench.report import TIMES

from machine import Project

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
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
    cpu_seconds=0.2,
)


class Stub(BaseHTTPRequestHandler):
    """Answers with the status that the path names, to /0 never."""

    protocol_version = "HTTP/1.1"
    received: set[str]
    closing: threading.Event

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length", "0"))
        self.received.add(
            f"{self.command} {self.headers['Authorization']} {self.rfile.read(size)!r}"
        )
        status = int(self.path.removeprefix("/"))
        if not status:
            self.closing.wait()
            return
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = answer  # noqa: N815  (as the base class wants them named)

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
    """A display that nobody looks at."""

    def say(self, text: str) -> None: ...

    def advance(self, seconds: float) -> None: ...

    def found(self, measurement: Measurement) -> None: ...


def results_of(*cells: Cell) -> Results:
    slow = replace(RUN, in_time=40, p50_ms=10)
    runs = {"ours": [RUN, RUN, replace(RUN, in_time=8)], "textbook": [slow], "floor": [RUN]}
    machine = {"processor": "an abacus"}
    measurements = [Measurement(cell, runs) for cell in cells]
    return Results(machine, measurements, {0: 0.1, 10: 10.0}, [{"whole": 3.0, "uv sync": 2.0}])


@needs_wrk
def test_answers_are_counted_by_status(stub: ThreadingHTTPServer) -> None:
    requests = [load.prepare("GET", f"/{status}", "t") for status in (200, 503, 200)]

    run = load.send(stub.server_port, requests, clients=2, seconds=0.5)

    assert run.statuses.keys() == {"200", "503"}
    assert sum(run.statuses.values()) == run.answered == run.sent
    assert run.succeeded == run.statuses["200"] >= run.in_time > 0
    assert run.unanswered == run.broken == 0


@needs_wrk
def test_requests_that_are_never_answered_are_counted(
    stub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "GRACE_SECONDS", 1)
    requests = [load.prepare("GET", "/200", "t"), load.prepare("GET", "/0", "t")]

    run = load.send(stub.server_port, requests, clients=3, seconds=0.5)

    assert run.unanswered == 3
    assert run.answered > 0


@needs_wrk
def test_bodies_and_tokens_are_sent(stub: ThreadingHTTPServer) -> None:
    request = load.prepare("POST", "/201", "secret", {"title": "Buy milk"})

    load.send(stub.server_port, [request], clients=1, seconds=0.2)

    assert Stub.received == {"POST Bearer secret " + repr(b'{"title": "Buy milk"}')}


def test_without_wrk_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(BenchError, match="apt-get install wrk"):
        load.require_wrk()


def test_the_database_can_be_moved_away() -> None:
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


def test_ratios_are_between_medians() -> None:
    (found,) = results_of(Cell("speed", "list", 16)).measurements

    assert found.median("ours", "rate") == 40
    assert found.ratio("ours", "textbook") == 2
    assert found.total("ours", "unanswered") == 3
    assert found.statuses("ours") == {"200": 270, "503": 30}


def test_an_app_that_answers_nothing_has_no_ratio() -> None:
    nothing = replace(RUN, in_time=0)
    found = Measurement(Cell("crowd", "list", 200), {"ours": [RUN], "textbook": [nothing]})

    assert found.ratio("ours", "textbook") is None


def test_every_chapter_gets_its_table() -> None:
    cells = [Cell("speed", "list", 1, 10), Cell("crowd", "create", 200), Cell("growth", "list", 1)]

    text = report.markdown(results_of(*cells))

    assert f"| list | 1 | 10 ms | 40 | 20 | 40 | 2.00 {TIMES} | 1.00 {TIMES} |" in text
    assert f"| create | 200 | 0 ms | ours | 270 of 303 | 30 {TIMES} 503 | 3 |" in text
    assert "| first page | 1,000 | 1 | 5.00 | 10.00 | 5.00 |" in text
    assert f"| 2.00 | 2.00 | 3.00 | 1.50 {TIMES} |" in text


def test_table_plots_and_figures_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [Cell("speed", "list", 16), Cell("speed", "list", 1, 10), Cell("crowd", "list", 200)]
    cells += [Cell("growth", "list", 1, tasks=tasks) for tasks in (20, 1000)]

    command.write(results_of(*cells), tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {
        *("results.json", "results.md"),
        *("speed.svg", "trips.svg", "crowd.svg", "growth.svg"),
    }
    data = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert data["measurements"][0]["runs"]["ours"][0]["statuses"] == {"200": 90, "503": 10}
    assert ">textbook</text>" in (tmp_path / "speed.svg").read_text("utf-8")
    assert "### Speed" in capsys.readouterr().out


@pytest.mark.parametrize("plan", [full_plan(), quick_plan()])
def test_parts_of_a_plan_can_be_chosen(plan: Plan) -> None:
    part = select(plan, ["speed", "create"])

    assert part.generations == 0
    assert {(cell.chapter, cell.operation) for cell in part.cells} == {("speed", "create")}
    assert select(plan, []) == plan


@needs_wrk
def test_all_three_apps_answer_the_same_and_are_measured(project: Project, tmp_path: Path) -> None:
    operations = ("list", "last page", "get", "create", "change", "delete", "mixed")
    cells = [Cell("speed", name, 2, rounds=1, seconds=0.1) for name in operations]
    measured, results = Measured(project.path), Results({})

    with (
        measured.postgres() as url,
        prepared(measured, url, Plan(tuple(cells), 0, 1), Silent()) as world,
    ):
        measure_at(url, world, cells, results, tmp_path, Silent())

    assert [found.cell.operation for found in results.measurements] == [*operations]
    for found in results.measurements:
        for app in APPS:
            assert found.total(app, "succeeded") == found.total(app, "sent") > 0, found
