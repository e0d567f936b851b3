"""How the app is served: its port, its processes, and the order in which requests begin."""

import asyncio
import errno
import socket
import sys
from collections import deque
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import STARTUP_FAILURE

from config import ENV_FILE, PROJECT_DIR, get_settings
from logs import PROBES
from postgres.outage_log import look_once
from server.protocol import LimitedProtocol
from server.shutdown import Server

# With the default DB_QUEUE_SECONDS, requests take at most 15 s from when their body has arrived.
# Platforms kill a process 30 s after SIGTERM.
SHUTDOWN_SECONDS = 20
# Longer than proxies keep idle connections (60 s): otherwise a proxy could send a request just as
# the app closes the connection.
KEEP_ALIVE_SECONDS = 75
# A worker first imports the app, and only then answers uvicorn's health check. With uvicorn's
# default, 5 s, a slow or busy machine would kill every worker before it could serve.
WORKER_SECONDS = 60
REQUESTS_PER_TURN = 4  # of the event loop
# uvloop accepts one connection per turn. While they come, a request begins only in every fourth
# turn: otherwise the last of 1,000 clients would connect after some seconds.
TURNS_PER_REQUEST = 4


def serve() -> None:
    """Serve the app: in WEB_CONCURRENCY processes, or in development in one that reloads."""
    settings = get_settings()
    if settings.database_url.is_embedded:
        try:
            from postgres.embedded import (  # noqa: PLC0415  (a development dependency)
                LocalPostgresError,
                ensure_running,
            )
        except ModuleNotFoundError:
            raise SystemExit(
                "DATABASE_URL is the embedded PostgreSQL, which is only for development: set it to"
                " the URL of another server"
            ) from None
        try:
            ensure_running(ENV_FILE)
            get_settings.cache_clear()  # the server's port may have changed
        except LocalPostgresError as error:
            raise SystemExit(f"Cannot start the embedded PostgreSQL: {error}") from None
    reload = settings.environment == "development"
    if reload:
        import migrations  # noqa: PLC0415  (the app itself does not need Alembic)

        look_once(get_settings().database_url, migrations.history, migrations.columns)
    refuse_port_in_use(settings.host, settings.port)
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "log_level": settings.log_level.lower(),
        "reload": reload,
        "reload_dirs": [str(PROJECT_DIR)] if reload else None,
        "reload_includes": ["*.py", ".env"] if reload else None,
        # On Windows, the only event loop that can watch psycopg2's sockets.
        "loop": "asyncio:SelectorEventLoop" if sys.platform == "win32" else "auto",
        "http": LimitedProtocol,
        "log_config": None,  # configure_logging() does that
        "server_header": False,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": SHUTDOWN_SECONDS,
        "timeout_worker_healthcheck": WORKER_SECONDS,
    }
    # A Config that reloads logs what it watches, and uvicorn.run() makes one of its own.
    config = None if reload else uvicorn.Config("main:app", **options)
    if config is None or config.workers > 1:
        uvicorn.run("main:app", app_dir=str(PROJECT_DIR), **options)
        return
    server = Server(config)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def refuse_port_in_use(host: str, port: int) -> None:
    """Exit with a message that says what to do; uvicorn's own does not name the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SystemExit(
                f"Port {port} is taken by another program: end it, or set another PORT in .env"
            ) from None


class Pacing:
    """Let requests begin in order, at most REQUESTS_PER_TURN of the event loop; probes do not wait.

    The event loop runs everything that is ready before it accepts anything new. When 2,000 requests
    come at once, that takes half a second in which no probe is answered, and a platform may
    consider the process dead. Nothing is refused here, and a request does not wait for others to
    finish: it only waits for its turn to begin.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._begun = 0  # in this turn
        self._allowed = REQUESTS_PER_TURN  # in this turn
        self._accepted = 0  # connections, until the last turn
        self._accepting = 0  # turns with a new connection
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
            await self._turn()
        await self.app(scope, receive, send)

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        if self._begun == 0 and not self._waiting:
            self._allowed = REQUESTS_PER_TURN
            loop.call_soon(self._next_turn)
        if self._begun < self._allowed and not self._waiting:
            self._begun += 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_turn(self) -> None:
        self._begun = 0
        self._allowed = self._allowance()
        while self._waiting and self._begun < self._allowed:
            turn = self._waiting.popleft()
            if not turn.done():  # it is, if the client has disconnected
                turn.set_result(None)
                self._begun += 1
        if self._begun or self._waiting:
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _allowance(self) -> int:
        """Return how many requests may begin in this turn."""
        if LimitedProtocol.accepted == self._accepted:
            return REQUESTS_PER_TURN
        self._accepted = LimitedProtocol.accepted
        self._accepting += 1
        return 1 if self._accepting % TURNS_PER_REQUEST == 0 else 0
