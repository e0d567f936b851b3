"""Traces and metrics by OpenTelemetry, and errors to Sentry: on if their variables are set.

FastAPI makes the spans and metrics of requests, this module those of the database. It wraps the
functions that reach the database when the app starts, so telemetry that is off costs nothing. The
packages that send it are in the dependency group `telemetry`, and imported only when it is on.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache, wraps
from importlib.metadata import entry_points
from os import environ
from typing import Any

import structlog
from fastapi.telemetry import TelemetryConfig
from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import SpanKind, StatusCode
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS
from sqlalchemy import ExceptionContext, event
from sqlalchemy.ext.asyncio import AsyncEngine
from structlog.contextvars import get_contextvars

from config import PYPROJECT, VERSION, Settings
from logs import PROBES, SECRETS
from postgres.dialect import Connection, Cursor
from postgres.engine import DatabaseBusy, OrderedPool
from postgres.outage_log import Availability

type Attributes = dict[str, str | int]
type Wrapped = Callable[..., Any]
type Wrapper = Callable[[Wrapped], Wrapped]

INSTALL = "install its packages: uv sync --group telemetry"
TIMEOUT_SECONDS = "4"  # for a batch, with all attempts; OpenTelemetry's default is 10
WAIT = "wait for a connection"
WAIT_SECONDS = 0.001  # getting a connection has a span only if it takes longer
LONGEST_STATEMENT = 4000  # characters; the rest of its text is left out
DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
# The first word of a statement, and its first table.
SUMMARY = re.compile(r"\s*(?=(\w+))(?:.*?\b(?:FROM|INTO|UPDATE)\s+\"?([\w.]+))?", re.DOTALL)
# Of a statement that begins with WITH: what precedes its last change, or else its first query.
PREFIX = re.compile(
    r"\s*WITH\b(?:.*\b(?=INSERT\s|DELETE\s|UPDATE\s+\S+\s+SET\b)|.*?\b(?=SELECT\b))", re.DOTALL
)


def destination(signal: str) -> str:
    """Return where TRACES or METRICS go, by the standard variables: otlp, prometheus or none."""
    wanted = environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower()
    urls = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    return wanted or ("otlp" if any(environ.get(name) for name in urls) else "none")


def has_traces() -> bool:
    return destination("TRACES") != "none"


def options() -> TelemetryConfig:
    """Return what FastAPI has to know before it uses the providers that `observing` sets.

    Its log records would contain the texts of errors, and so user data: the app's own log has the
    same without them. Its spans of dependencies, the endpoint and the serialization would take as
    much processor time again as the others. What is off is not looked up for each request.
    """
    return {
        "auto_configure": False,
        "tracing": has_traces(),
        "metrics": destination("METRICS") != "none",
        "logs": False,
        "operation_spans": False,
        "exclude": is_probe,
    }


def is_probe(scope: Any) -> bool:
    return scope.get("path") in PROBES


def report_errors(settings: Settings) -> None:
    """Send unexpected exceptions to Sentry, if there is a SENTRY_DSN."""
    if not environ.get("SENTRY_DSN"):
        return
    try:
        import sentry_sdk  # noqa: PLC0415
    except ImportError as error:
        structlog.get_logger().warning("no errors are reported", error=str(error), advice=INSTALL)
        return
    # What uvicorn logs is reported: the exceptions that were answered with a 500. The SDK's
    # integrations would add requests with their query strings, and variables with their values.
    sentry_sdk.init(
        environment=environ.get("SENTRY_ENVIRONMENT") or settings.environment,
        release=environ.get("SENTRY_RELEASE") or VERSION,
        auto_enabling_integrations=False,
        include_local_variables=False,
        max_breadcrumbs=0,
        send_default_pii=False,
        before_send=redact_report,
    )


def redact_report(report: Any, _hint: Any) -> Any:
    """Remove secrets from the texts of errors, and name the request, which the log has too."""
    for error in report.get("exception", {}).get("values", ()):
        error["value"] = SECRETS.sub("***", str(error.get("value")))
    if message := report.get("logentry"):
        report["logentry"] = {"message": SECRETS.sub("***", str(message.get("message")))}
    report.setdefault("tags", {})["request_id"] = get_contextvars().get("request_id", "")
    return report


@asynccontextmanager
async def observing(
    engines: Sequence[AsyncEngine], availability: Availability
) -> AsyncIterator[None]:
    """Send the traces and metrics of the app, and of its engines, until the block ends."""
    if destination("TRACES") == destination("METRICS") == "none":
        yield
        return
    try:
        providers = set_providers()
    except (ImportError, ValueError, OSError) as error:
        advice = INSTALL if isinstance(error, ImportError) else "correct the OTEL_… variables"
        structlog.get_logger().warning("no telemetry is sent", error=str(error), advice=advice)
        yield
        return
    try:
        with observing_database(engines, availability):
            yield
    finally:
        ends = (asyncio.to_thread(provider.shutdown) for provider in providers)
        for outcome in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(outcome, BaseException):
                structlog.get_logger().warning("some telemetry is lost", error=str(outcome))


def set_providers() -> list[Any]:
    """Have OpenTelemetry send what it is given. Raises ImportError, ValueError and OSError."""
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import (  # noqa: PLC0415
        OTLPMetricExporter,
    )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader  # noqa: PLC0415
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    for signal in ("TRACES", "METRICS"):
        names = (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        name = next(filter(environ.get, names), None)  # the first that is set
        if destination(signal) == "otlp" and name and environ[name] != "http/protobuf":
            raise ValueError(f"{name}: write http/protobuf, or remove it")
    # While the app ends, it waits as long for a collector that is away.
    environ.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", TIMEOUT_SECONDS)
    defaults = {"service.name": PYPROJECT["project"]["name"], "service.version": VERSION}
    resource = Resource.create(defaults).merge(OTELResourceDetector().detect())
    providers: list[Any] = []
    readers: list[Any] = []
    match destination("METRICS"):
        case "otlp":
            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
        case "prometheus":  # serves them on a port of its own, as its variables say
            import opentelemetry.exporter.prometheus  # noqa: F401, PLC0415  (or ImportError)

            (prometheus,) = entry_points(group="opentelemetry_metrics_exporter", name="prometheus")
            try:
                readers.append(prometheus.load()())
            except OSError as error:  # another process of the app has the port: traces go on
                advice = "with several processes, set OTEL_METRICS_EXPORTER=otlp"
                structlog.get_logger().warning(
                    "no metrics are served", error=str(error), advice=advice
                )
        case "none":
            pass
        case _:
            raise ValueError("OTEL_METRICS_EXPORTER: write otlp, prometheus or none")
    match destination("TRACES"):
        case "otlp":
            tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
            redactor = type("Redactor", (SpanProcessor,), {"on_start": redact})
            tracers.add_span_processor(redactor())
            tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            trace.set_tracer_provider(tracers)
            providers.append(tracers)
        case "none":
            pass
        case _:
            raise ValueError("OTEL_TRACES_EXPORTER: write otlp or none")
    if readers:
        meters = MeterProvider(readers, resource=resource, shutdown_on_exit=False)
        metrics.set_meter_provider(meters)
        providers.append(meters)
    return providers


def redact(_processor: Any, span: Any, parent_context: Any = None) -> None:  # noqa: ARG001
    """Remove what clients write into URLs: what they search for, cursors, perhaps an address."""
    if "url.query" in span.attributes:
        span.set_attribute("url.query", "REDACTED")
    if "url.path" in span.attributes:
        span.set_attribute("url.path", SECRETS.sub("***", span.attributes["url.path"]))


@contextmanager
def observing_database(
    engines: Sequence[AsyncEngine], availability: Availability
) -> Iterator[None]:
    """Wrap the functions that wait for a connection, or for the server, inside the block."""
    meter = metrics.get_meter("database")
    observe_pools(engines, meter)
    count_findings(engines, availability, meter)
    wrap_execute, wrap_commit = statement_wrappers(meter)
    with (
        wrapped(Cursor, "execute", wrap_execute),
        wrapped(Connection, "commit", wrap_commit),
        wrapped(OrderedPool, "connect", connect_wrapper(meter)),
    ):
        yield


def statement_wrappers(meter: metrics.Meter) -> tuple[Wrapper, Wrapper]:
    """Return what makes spans and metrics of statements, and of the ends of transactions."""
    tracer = trace.get_tracer("database")
    durations = meter.create_histogram(
        "db.client.operation.duration",
        unit="s",
        description="The time of statements in the database, and on the way there.",
        explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
    )

    def observe(
        connection: Connection, query: str, send: Callable[..., None], *arguments: Any
    ) -> None:
        """Send a statement. Its span has the placeholders of values, and no text of an error."""
        name = summarize(query)
        attributes: Attributes = {
            "db.system.name": "postgresql",
            "db.namespace": connection.info.dbname or "",  # None if it is closed already
            "server.address": connection.info.host or "",
            "server.port": connection.info.port or 5432,
            "db.query.summary": name,
        }
        span: trace.Span = trace.INVALID_SPAN
        if trace.get_current_span().is_recording():
            span = tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
            span.set_attribute("db.query.text", query[:LONGEST_STATEMENT])
        start = time.perf_counter()
        try:
            send(*arguments)
        except BaseException as error:
            attributes["error.type"] = getattr(error, "pgcode", None) or type(error).__name__
            span.set_attribute("error.type", attributes["error.type"])
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            durations.record(time.perf_counter() - start, attributes)
            span.end()

    def wrap_execute(execute: Wrapped) -> Wrapped:
        def observed(self: Cursor, query: Any, vars: Any = None) -> None:  # noqa: A002
            text = query if isinstance(query, str) else ""
            observe(self.connection, text, execute, self, query, vars)

        return observed

    def wrap_commit(commit: Wrapped) -> Wrapped:
        def observed(self: Connection) -> None:
            if self.get_transaction_status() == TRANSACTION_STATUS_INTRANS:
                observe(self, "COMMIT", commit, self)
            else:  # it sends nothing
                commit(self)

        return observed

    return wrap_execute, wrap_commit


def connect_wrapper(meter: metrics.Meter) -> Wrapper:
    """Return what makes spans and metrics of the wait for a connection."""
    tracer = trace.get_tracer("database")
    waits = meter.create_histogram(
        "db.client.connection.wait_time",
        unit="s",
        description="How long requests waited for a connection.",
        explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
    )
    timeouts = meter.create_counter(
        "db.client.connection.timeouts",
        unit="{timeout}",
        description="Requests that got no connection: the queue was full, or they waited too long.",
    )

    def wrap_connect(connect: Wrapped) -> Wrapped:
        def observed(self: OrderedPool) -> Any:
            start = time.perf_counter()
            try:
                return connect(self)
            except DatabaseBusy:
                timeouts.add(1, name_of(self))
                raise
            finally:
                seconds = time.perf_counter() - start
                waits.record(seconds, name_of(self))
                if seconds > WAIT_SECONDS and trace.get_current_span().is_recording():
                    end = time.time_ns()
                    begin = end - int(seconds * 1e9)
                    tracer.start_span(WAIT, start_time=begin, attributes=name_of(self)).end(end)

        return observed

    return wrap_connect


def name_of(pool: OrderedPool) -> Attributes:
    return {"db.client.connection.pool.name": pool.logging_name or ""}


def observe_pools(engines: Sequence[AsyncEngine], meter: metrics.Meter) -> None:
    """Report the connections and the queues whenever metrics are collected."""

    def pools() -> list[OrderedPool]:
        return [engine.pool for engine in engines if isinstance(engine.pool, OrderedPool)]

    def count(_: CallbackOptions) -> list[Observation]:
        return [
            Observation(number, name_of(pool) | {"db.client.connection.state": state})
            for pool in pools()
            for state, number in (("used", pool.checkedout()), ("idle", pool.checkedin()))
        ]

    meter.create_observable_up_down_counter(
        "db.client.connection.count",
        [count],
        unit="{connection}",
        description="Connections to the database.",
    )
    meter.create_observable_up_down_counter(
        "db.client.connection.max",
        [lambda _: [Observation(pool.size(), name_of(pool)) for pool in pools()]],
        unit="{connection}",
        description="The most connections that this process opens.",
    )
    meter.create_observable_up_down_counter(
        "db.client.connection.pending_requests",
        [lambda _: [Observation(pool.waiting, name_of(pool)) for pool in pools()]],
        unit="{request}",
        description="Requests that wait for a connection.",
    )


def count_findings(
    engines: Sequence[AsyncEngine], availability: Availability, meter: metrics.Meter
) -> None:
    findings = meter.create_counter(
        "database.findings",
        unit="{failure}",
        description="Failures of the database, by the name that `manage.py check` gives them.",
    )

    def count(context: ExceptionContext) -> None:
        if finding := availability.explain(context.original_exception):
            findings.add(1, {"finding": finding.name})

    for engine in engines:
        event.listen(engine.sync_engine, "handle_error", count)


@contextmanager
def wrapped(owner: type, name: str, wrapper: Wrapper) -> Iterator[None]:
    """Replace a method inside the block."""
    method = getattr(owner, name)
    setattr(owner, name, wraps(method)(wrapper(method)))
    try:
        yield
    finally:
        setattr(owner, name, method)


@lru_cache
def summarize(query: str) -> str:
    """Return the kind of a statement, and its first table: SELECT tasks."""
    prefix = PREFIX.match(query)
    match = SUMMARY.match(query, prefix.end() if prefix else 0)
    return " ".join(filter(None, match.groups())) if match else "SQL"
