"""Logs: one line a request, JSON in production, readable in development, and no secret in them.

Log with `structlog.get_logger().info("task imported", count=3)`: a constant text, and values by
name. The request's id is added to every line that is written while the request is answered.
"""

import io
import json
import logging
import random
import re
import sys
import time

import structlog
from pydantic_core import PydanticSerializationError, to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars, merge_contextvars
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from config import Settings

# Probes come every few seconds: they get a line only when the answer is bad, or at level DEBUG.
PROBES = {"/health", "/ready"}
REQUEST_ID = re.compile(rb"[\w.:+/=-]{1,128}", re.ASCII)  # one of a proxy's, not just any text

# What may stand in the texts of errors. Lengths are bounded, so that the search is linear.
SECRETS = re.compile(
    r"""
    (?<=://) [^\s/@]{0,256} : [^\s@]{0,256} (?=@)      # user:password@ in a URL
    | \b eyJ [\w-]{4,} (?: \. [\w-]* ){1,2}            # a JSON Web Token
    | (?i: \b (?: bearer | basic ) [ ] ) [\w.~+/=-]+   # the Authorization header
    | (?<= DETAIL: ) .*                                # PostgreSQL quotes the row at fault
    | (?i: \b (?: password | secret ) = ) [^\s&]+      # libpq's way to write a connection
    | [\w.+-]{1,64} @ [\w-]{1,63} (?: \. [\w-]{1,63} ){1,8}  # an e-mail address
    """,
    re.VERBOSE,
)


def as_json(event: EventDict, **_: object) -> str:
    """Write a line as JSON; what UTF-8 cannot hold is escaped, which takes three times as long."""
    try:
        return to_json(event, fallback=str).decode()
    except PydanticSerializationError:
        return json.dumps(event, default=str)


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Take secrets out of texts that we did not write: exceptions, and other people's lines."""
    for key in ("event", "exception", "error"):
        if key in event:
            event[key] = SECRETS.sub("***", str(event[key]))
    return event


def redact_errors(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return redact(logger, method, event) if "exception" in event or "error" in event else event


def configure_logging(settings: Settings) -> None:
    """Send our lines, uvicorn's and SQLAlchemy's to standard output, in one format."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # no text makes a line, or its route, fail
        sys.stdout.reconfigure(errors="backslashreplace")
    level = logging.getLevelNamesMapping()[settings.log_level]
    common: list[Processor] = [
        merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,  # as Python prints it: without variables' values
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
        # Straight to the stream: through the standard library's logging it takes twice as long.
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *common, redact],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):  # came with handlers of their own
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    # They would tell of each plugin, pool that closes, request that is sent, file that changes.
    for name in ("alembic", "httpx2", "postgres.engine", "watchfiles"):
        logging.getLogger(name).setLevel(logging.WARNING)
    access = logging.getLogger("uvicorn.access")  # RequestLog tells more
    access.handlers.clear()
    access.propagate = False
    # Where DEBUG has its engine echo statements, it would add a handler, and say all twice.
    logging.getLogger("sqlalchemy.engine.Engine").addHandler(logging.NullHandler())


class RequestLog:
    """Give each request an id, and write one line about it.

    The id is the `X-Request-ID` that came, or a new one, and goes back in the same header. What a
    route adds with `structlog.contextvars.bind_contextvars` stands in the line too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.log: FilteringBoundLogger = structlog.get_logger().bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = None
        request_id = read_request_id(scope)
        header = (b"x-request-id", request_id.encode())
        clear_contextvars()  # a connection's requests may run in one context
        bind_contextvars(request_id=request_id)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            # The path as the route spells it: no ids, no tokens, and few different ones. None
            # where no route matched. A prefix belongs into `APIRouter(prefix=…)` to be seen here.
            path = getattr(scope.get("route"), "path", None)
            if status is None or status >= 500:
                write = self.log.error
            elif path in PROBES:
                write = self.log.debug
            else:
                write = self.log.info
            write(
                "request",
                method=scope["method"],
                path=path,
                status=status,  # None: the client hung up, or the server had to stop
                duration_ms=round((time.perf_counter() - start) * 1000, 2),
                user_id=scope.get("state", {}).get("user_id"),
            )


def read_request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return f"{random.getrandbits(128):032x}"
