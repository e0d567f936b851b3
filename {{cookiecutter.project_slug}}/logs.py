"""Logs: one line per request, JSON in production, readable in development, without secrets.

Log with `structlog.get_logger().info("task imported", count=3)`: a constant text, and values by
name. Every line that is written during a request also gets the request's id.
"""

import io
import json
import logging
import random
import re
import sys
import time
from collections.abc import Iterable

import structlog
from opentelemetry import trace
from pydantic_core import PydanticSerializationError, to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars, merge_contextvars
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from auth.client import client_of
from config import Settings

# Probes come every few seconds: they are logged only if they fail, or at level DEBUG.
PROBES = {"/health", "/ready"}
# What every response has, unless its route says otherwise.
SAFE_HEADERS = {b"x-content-type-options": b"nosniff", b"referrer-policy": b"no-referrer"}
ID_HEADER = b"x-request-id"
NO_STORE = (b"cache-control", b"no-store")
REVALIDATE = (b"cache-control", b"private, no-cache")  # or the ETag would be of no use
HSTS = (b"strict-transport-security", b"max-age=31536000")  # one year, browsers use only TLS
REQUEST_ID = re.compile(rb"[\w.:+/=-]{1,128}", re.ASCII)  # what proxies send

# Secrets that texts of errors may contain. Lengths are bounded, so that the search is linear.
SECRETS = re.compile(
    r"""
    (?<=://) [^\s/@]{0,256} : [^\s@]{0,256} (?=@)      # user:password@ in a URL
    | \b eyJ [\w-]{4,} (?: \. [\w-]* ){1,2}            # a JSON Web Token
    | (?i: \b (?: bearer | basic ) [ ] ) [\w.~+/=-]+   # the Authorization header
    | (?<= DETAIL: ) .*                                # PostgreSQL quotes the row
    | (?i: \b (?: password | secret ) = ) [^\s&]+      # a connection string of libpq
    | [\w.+-]{1,64} @ [\w-]{1,63} (?: \. [\w-]{1,63} ){1,8}  # an e-mail address
    """,
    re.VERBOSE,
)


def as_json(event: EventDict, **_: object) -> str:
    """Return a line as JSON. Text that UTF-8 cannot encode is escaped, which is slower."""
    try:
        return to_json(event, fallback=str).decode()
    except PydanticSerializationError:
        return json.dumps(event, default=str)


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Remove secrets from texts that are not ours: exceptions, and the lines of libraries."""
    for key in ("event", "exception", "error"):
        if key in event:
            event[key] = SECRETS.sub("***", str(event[key]))
    return event


def redact_errors(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return redact(logger, method, event) if "exception" in event or "error" in event else event


def rename_uvicorn(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Write `uvicorn` for the logger that uvicorn uses for everything but its access log."""
    if event["logger"] == "uvicorn.error":
        event["logger"] = "uvicorn"
    return event


def add_trace_ids(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


def configure_logging(settings: Settings, *, has_traces: bool = False) -> None:
    """Send the lines of the app, uvicorn and SQLAlchemy to standard output, in one format.

    has_traces: whether lines that are written during a request get the ids of its trace.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # no text can make a line, or its route, fail
        sys.stdout.reconfigure(errors="backslashreplace")
    level = logging.getLevelNamesMapping()[settings.log_level]
    common: list[Processor] = [
        merge_contextvars,
        *([add_trace_ids] if has_traces else []),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,  # without the values of variables
    ]
    renderer: Processor
    if settings.environment == "production":
        renderer = structlog.processors.JSONRenderer(as_json)
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stdout.isatty(),
            exception_formatter=structlog.dev.plain_traceback,
            sort_keys=False,
        )
    structlog.configure(
        processors=[*common, redact_errors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Directly to the stream: going through the standard library's logging takes twice as long.
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_logger_name,
                rename_uvicorn,
                *common,
                redact,
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):  # they have handlers of their own
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    # They log every plugin, closed pool, sent request and changed file at level INFO.
    for name in ("alembic", "httpx2", "postgres.engine", "watchfiles"):
        logging.getLogger(name).setLevel(logging.WARNING)
    access = logging.getLogger("uvicorn.access")  # RequestLog logs more
    access.handlers.clear()
    access.propagate = False
    # Without a handler here, an engine with echo=True adds its own, and logs every statement twice.
    logging.getLogger("sqlalchemy.engine.Engine").addHandler(logging.NullHandler())


class RequestLog:
    """Give each request an id, log one line about it, and add what all responses have.

    The id is the request's `X-Request-ID`, or a new one; the response has it in the same header.
    The line also has what a route adds with `structlog.contextvars.bind_contextvars`.

    HEAD is answered like GET: the server leaves out the body. It is done here, as the headers are,
    because each further middleware would add time to every request.
    """

    def __init__(self, app: ASGIApp, *, root_path: str = "", hsts: bool = False) -> None:
        self.app = app
        self.root_path = root_path
        self.hsts = hsts
        self.log: FilteringBoundLogger = structlog.get_logger().bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.root_path:
            scope["root_path"] = self.root_path
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":  # the server keeps its scope, which says HEAD
            scope = {**scope, "method": "GET"}
        start = time.perf_counter()
        status = None
        request_id = read_request_id(scope["headers"])
        clear_contextvars()  # the requests of a connection may share a context
        bind_contextvars(request_id=request_id)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (ID_HEADER, request_id.encode())]
                names = dict(headers)
                headers += [pair for pair in SAFE_HEADERS.items() if pair[0] not in names]
                if b"cache-control" not in names:
                    headers.append(REVALIDATE if b"etag" in names else NO_STORE)
                if self.hsts and scope["scheme"] == "https":
                    headers.append(HSTS)
                message["headers"] = headers
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            # The path of the route, without ids: few different values. None if no route matched. It
            # has the prefix of `APIRouter(prefix=…)`, but not that of `include_router(prefix=…)`.
            path = getattr(scope.get("route"), "path", None)
            if status is None or status >= 500:
                write = self.log.error
            elif path in PROBES:
                write = self.log.debug
            else:
                write = self.log.info
            user_id = scope.get("state", {}).get("user_id")
            refused = status is None or status >= 400
            write(
                "request",
                method=method,
                path=path,
                status=status,  # None: the client disconnected, or the server stopped
                duration_ms=round((time.perf_counter() - start) * 1000, 2),
                user_id=user_id,
                client=client_of(scope) if refused or user_id is not None else None,
            )


def read_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id that came with a request, or a new one."""
    for name, value in headers:
        if name == ID_HEADER and REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return f"{random.getrandbits(128):032x}"
