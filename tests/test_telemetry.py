"""Traces and metrics, as a collector receives them after docs/observing.md was followed exactly."""

import gzip
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import psycopg2
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app_server import PASSWORD, Answer, AppServer, app_server
from machine import Project
from postgres_server import Server, free_port
from test_extending import Step, read_steps, take

TITLE = "Quinquagesima"
EMAIL = "ada@example.com"
SECRET = "of all workers and replicas, for tests only"
SAMPLE = "http://127.0.0.1:4318"  # the address of a collector in the page
PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter", "prometheus_client", "sentry_sdk")
# Starts the app and ends it, without a request but with a span, and prints which of the packages it
# imported.
START = f"""
import asyncio, sys, main
async def start():
    async with main.app.router.lifespan_context(main.app):
        print("imported:", [name for name in {PACKAGES} if name in sys.modules])
        main.telemetry.trace.get_tracer("test").start_span("test").end()
asyncio.run(start())
"""
# An error that is nobody's mistake but the developer's, with an address in its text.
FAILING = f"""
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'no task for {EMAIL}' USING DETAIL = NEW.title; END $$;
CREATE TRIGGER fail BEFORE INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION fail();
"""
WAITING = "db.client.connection.pending_requests"
WAIT = "wait for a connection"  # the span of a wait that takes longer than a millisecond
TRACE = "0af7651916cd43dd8448eb211c80319c"  # of a caller, and its span
PARENT = "b7ad6b7169203331"


@dataclass
class Collector:
    """Takes OTLP over HTTP, as protobuf. bodies: as they came, by their path."""

    url: str = ""
    bodies: list[tuple[str, bytes]] = field(default_factory=list)

    def messages(self, path: str, kind: type[Any]) -> list[Any]:
        return [kind.FromString(body) for to, body in self.bodies if to == path]

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for message in self.messages("/v1/traces", ExportTraceServiceRequest)
            for resource in message.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def metrics(self) -> dict[str, list[Any]]:
        """The data points of the last message, by the metric's name."""
        messages = self.messages("/v1/metrics", ExportMetricsServiceRequest)
        return {
            metric.name: list(getattr(metric, metric.WhichOneof("data")).data_points)
            for message in messages[-1:]
            for resource in message.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    @property
    def services(self) -> set[str]:
        return {
            attributes(resource.resource)["service.name"]
            for message in self.messages("/v1/traces", ExportTraceServiceRequest)
            for resource in message.resource_spans
        }


def attributes(thing: Any) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in thing.attributes
    }


@contextmanager
def new_collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.bodies.append((self.path, body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield collector
        server.shutdown()


@pytest.fixture(scope="module")
def steps(project: Project) -> list[Step]:
    return read_steps(project.read("docs/observing.md"))


@pytest.fixture(scope="module")
def equipped(
    project: Project, steps: list[Step], tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """A copy of the project with the packages that the page installs."""
    folder = tmp_path_factory.mktemp("equipped") / "project"
    ignored = shutil.ignore_patterns(".git", ".postgres", ".venv")
    shutil.copytree(project.path, folder, ignore=ignored)
    copy = replace(project, path=folder)
    for step in steps:
        if step.language in {"shell", "diff"}:
            take(step, copy)
    return copy


def variables(steps: list[Step], section: str, changes: dict[str, str]) -> dict[str, str]:
    """Return the environment of a section, with other addresses than those of the page."""
    (text,) = [step.code for step in steps if (step.section, step.language) == (section, "ini")]
    for sample, ours in changes.items():
        assert sample in text
        text = text.replace(sample, ours)
    return dict(line.split("=", 1) for line in text.splitlines())


@dataclass
class Run:
    """What a collector, and the log, got from an app."""

    collector: Collector
    lines: list[dict[str, Any]]
    spans: dict[str, list[Any]]  # by trace
    token: str


@pytest.fixture(scope="module")
def run(
    equipped: Project,
    steps: list[Step],
    server: Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Run]:
    database = server.new_database()
    url = server.url(database=database)
    with new_collector() as collector:
        settings = variables(steps, "Traces", {SAMPLE: collector.url})
        settings |= {"DB_POOL_SIZE": "1", "OTEL_METRIC_EXPORT_INTERVAL": "100"}
        migrate(equipped, url)
        log = tmp_path_factory.mktemp("log") / "app.log"
        with app_server(equipped, url, log, settings) as app:
            token = use(app)
            queue(app, url, collector)
            app.stop()
        spans: dict[str, list[Any]] = {}
        for span in collector.spans:
            spans.setdefault(span.trace_id.hex(), []).append(span)
        yield Run(collector, app.lines(), spans, token)


def migrate(project: Project, url: str) -> None:
    operator = replace(project, environment={**project.environment, "DATABASE_URL": url})
    outcome = operator.run(str(project.python), "manage.py", "migrate")
    assert outcome.code == 0, outcome.output


def use(app: AppServer) -> str:
    """Send requests of each kind, also such as fail."""
    token = app.register(EMAIL.partition("@")[0])
    created = app.request("POST", "/tasks", {"title": TITLE}, token=token)
    assert created.status == 201
    traced = {"traceparent": f"00-{TRACE}-{PARENT}-01", "Authorization": f"Bearer {token}"}
    url = f"http://127.0.0.1:{app.port}/tasks?q={quote(TITLE)}"
    with urlopen(Request(url, headers=traced), timeout=20) as response:
        assert response.status == 200
    path = f"/tasks/{created.body['id']}"
    assert app.request("GET", path, token=token).status == 200
    assert app.request("PATCH", path, {"completed": True}, token=token).status == 200
    assert app.request("GET", "/tasks/1", token=token).status == 422
    assert app.request("GET", f"/{EMAIL}").status == 404
    assert app.delete_account(token).status == 204
    assert app.request("GET", "/ready").status == 200
    assert app.request("GET", "/health").status == 200
    return token


def queue(app: AppServer, url: str, collector: Collector) -> None:
    """Let one request keep the only connection while another waits for it."""
    with closing(psycopg2.connect(url)) as connection, ThreadPoolExecutor() as clients:
        connection.cursor().execute("LOCK TABLE users")
        answers = [clients.submit(log_in_in_vain, app) for _ in range(2)]
        limit = time.monotonic() + 10
        while [point.as_int for point in collector.metrics.get(WAITING, ())] != [1]:
            assert time.monotonic() < limit
            time.sleep(0.02)
        connection.rollback()
        assert [answer.result().status for answer in answers] == [401, 401]


def log_in_in_vain(app: AppServer) -> Answer:
    return app.request("POST", "/auth/login", f"username=nobody@example.com&password={PASSWORD}")


def of_request(run: Run, name: str) -> list[Any]:
    """Return the spans of the one trace whose request has this name, and a status below 400."""
    (trace,) = [
        spans
        for spans in run.spans.values()
        if any(
            span.name == name and attributes(span)["http.response.status_code"] < 400
            for span in spans
        )
    ]
    return trace


def test_a_request_is_a_trace_with_its_one_statement(run: Run) -> None:
    spans = {span.name: span for span in of_request(run, "GET /tasks/{task_id}")}

    assert spans.keys() - {WAIT} == {"GET /tasks/{task_id}", "SELECT tasks"}
    request, statement = attributes(spans["GET /tasks/{task_id}"]), spans["SELECT tasks"]
    assert (request["http.route"], request["http.response.status_code"]) == (
        "/tasks/{task_id}",
        200,
    )
    assert statement.parent_span_id == spans["GET /tasks/{task_id}"].span_id
    assert attributes(statement)["db.system.name"] == "postgresql"
    assert attributes(statement)["server.address"] == "127.0.0.1"
    assert "WHERE tasks.id = %(task_id)s" in attributes(statement)["db.query.text"]
    assert statement.end_time_unix_nano > statement.start_time_unix_nano
    assert run.collector.services == {"todo"}


def test_a_request_that_is_traced_is_one_round_trip_as_before(equipped: Project) -> None:
    """The project's own test says so, which counts what goes over the wire."""
    test = ("tests/test_round_trips.py", "-k", "test_a_request_is_one_round_trip")
    with new_collector() as collector:
        traced = {**equipped.environment, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        copy = replace(equipped, environment=traced)
        outcome = copy.run(str(equipped.python), "-m", "pytest", "-n0", "--quiet", *test)

    assert outcome.code == 0, outcome.output
    assert "SELECT tasks" in {span.name for span in collector.spans}


def test_the_time_until_a_connection_was_there_is_a_span(run: Run) -> None:
    names = [span.name for span in of_request(run, "POST /auth/register")]

    assert WAIT in names  # for the connection, which this request opened


def test_the_time_in_the_queue_is_a_span_of_the_request_that_waited(run: Run) -> None:
    login, statement = "POST /auth/login", "SELECT refresh_tokens"
    traces = [{span.name: span for span in spans} for spans in run.spans.values()]
    refused = [
        spans
        for spans in traces
        if login in spans and attributes(spans[login])["http.response.status_code"] == 401
    ]
    first, second = sorted(refused, key=lambda spans: spans[statement].end_time_unix_nano)

    # On a busy machine, the first one may have waited for a moment, too.
    wait = second[WAIT]
    assert wait.parent_span_id == second[login].span_id
    assert wait.start_time_unix_nano < first[statement].end_time_unix_nano
    assert wait.end_time_unix_nano >= first[statement].end_time_unix_nano


def test_a_transaction_has_a_span_for_its_end(run: Run) -> None:
    names = [span.name for span in of_request(run, "DELETE /auth/me")]

    assert names.count("COMMIT") == 1


def test_a_request_belongs_to_its_callers_trace(run: Run) -> None:
    (request,) = [span for span in run.spans[TRACE] if span.name == "GET /tasks"]

    assert request.parent_span_id.hex() == PARENT


def test_lines_of_the_log_name_the_trace(run: Run) -> None:
    (line,) = [line for line in run.lines if line.get("trace_id") == TRACE]

    assert line["event"] == "request"
    assert line["span_id"] in {span.span_id.hex() for span in run.spans[TRACE]}


def test_probes_have_no_trace(run: Run) -> None:
    assert {"GET /health", "GET /ready"}.isdisjoint(span.name for span in run.collector.spans)
    roots = {span.name for span in run.collector.spans if not span.parent_span_id}
    assert roots == {  # and of those spans of the database that no request caused
        "DELETE /auth/me",
        "GET",
        "GET /tasks/{task_id}",
        "POST /auth/login",
        "POST /auth/register",
        "POST /tasks",
        "PATCH /tasks/{task_id}",
    }


def test_nothing_that_is_sent_has_a_secret_an_address_or_a_title(run: Run, server: Server) -> None:
    sent = b"".join(body for _, body in run.collector.bodies)

    assert b"/tasks/{task_id}" in sent
    for private in (TITLE, EMAIL, "Ada", PASSWORD, SECRET, server.password, run.token):
        assert private.encode() not in sent, private


def test_metrics_count_requests_by_route_and_status(run: Run) -> None:
    points = run.collector.metrics["http.server.request.duration"]

    counts = {
        (labels.get("http.route"), labels["http.response.status_code"]): point.count
        for point in points
        if (labels := attributes(point))["http.request.method"] == "GET"
    }
    assert counts == {
        ("/tasks", 200): 1,
        ("/tasks/{task_id}", 200): 1,
        ("/tasks/{task_id}", 422): 1,
        (None, 404): 1,
    }


def test_metrics_have_the_connections_the_queue_and_the_statements(run: Run) -> None:
    metrics = run.collector.metrics
    statements = metrics["db.client.operation.duration"]
    connections = metrics["db.client.connection.count"]

    summaries = {attributes(point)["db.query.summary"] for point in statements}
    assert {"INSERT tasks", "SELECT tasks", "UPDATE tasks", "COMMIT"} <= summaries
    assert not any(summary.startswith("WITH") for summary in summaries)
    assert {
        attributes(point)["db.client.connection.state"]: point.as_int for point in connections
    } == {
        "used": 0,
        "idle": 1,
    }
    assert metrics["db.client.connection.max"][0].as_int == 1
    assert metrics[WAITING][0].as_int == 0
    assert metrics["db.client.connection.wait_time"][0].count > 5


def test_a_finding_is_counted_and_prometheus_can_scrape_it(
    equipped: Project, steps: list[Step], tmp_path: Path
) -> None:
    port = free_port()
    settings = variables(steps, "Metrics", {"9464": str(port)})
    nothing = f"postgresql://ada@127.0.0.1:{free_port()}/nothing?sslmode=disable"
    with app_server(equipped, nothing, tmp_path / "app.log", settings) as app:
        assert app.request("GET", "/ready").status == 503
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
            text = response.read().decode()

    assert re.search(
        r'^database_findings_total\{.*finding="nothing-listens".*\} [1-9]', text, re.MULTILINE
    )


def test_an_unexpected_exception_is_reported_to_sentry_without_user_data(
    equipped: Project, steps: list[Step], server: Server, tmp_path: Path
) -> None:
    database = server.new_database()
    url = server.url(database=database)
    migrate(equipped, url)
    server.ask(FAILING, database=database)
    with new_collector() as sentry:
        address = {"https://key@127.0.0.1:9000": sentry.url.replace("//", "//key@")}
        settings = variables(steps, "Errors", address)
        with app_server(equipped, url, tmp_path / "app.log", settings) as app:
            token = app.register("ada")
            answer = app.request("POST", "/tasks", {"title": TITLE}, token=token)
            app.stop()

    assert answer.status == 500
    reports = [
        gzip.decompress(body).decode() for path, body in sentry.bodies if path == "/api/1/envelope/"
    ]
    (report,) = [text for text in reports if "RaiseException" in text]
    assert answer.body["request_id"] in report
    for private in (TITLE, EMAIL, PASSWORD, SECRET, server.password, token):
        assert private not in report


def start(project: Project, **variables: str) -> str:
    """Start and end the app, in production. Returns its output."""
    needed = {
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
        "BETTER_AUTH_SECRET": SECRET,
        "ENVIRONMENT": "production",
    }
    environment = {**project.environment, **needed, **variables}
    outcome = replace(project, environment=environment).run(str(project.python), "-c", START)
    assert outcome.code == 0, outcome.output
    return outcome.output


def test_without_its_variables_nothing_is_imported(equipped: Project) -> None:
    assert "imported: []\n" in start(equipped)


def test_missing_packages_are_reported_and_the_app_starts(project: Project) -> None:
    output = start(project, OTEL_TRACES_EXPORTER="otlp")  # to the default address

    assert "no telemetry is sent" in output
    assert "install its packages: uv sync --group telemetry" in output


def test_traces_are_sent_without_the_port_for_prometheus(equipped: Project) -> None:
    """Another process of the app has it."""
    with new_collector() as collector:
        port = collector.url.rpartition(":")[2]
        output = start(
            equipped,
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
            OTEL_METRICS_EXPORTER="prometheus",
            OTEL_EXPORTER_PROMETHEUS_HOST="127.0.0.1",
            OTEL_EXPORTER_PROMETHEUS_PORT=port,
        )

    assert "no metrics are served" in output
    assert [span.name for span in collector.spans] == ["test"]
