"""How the app is served: on which port, in how many processes, and in what order requests begin."""

import asyncio
import errno
import socket
import sys
from collections import deque

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from config import ENV_FILE, PROJECT_DIR, get_settings
from logs import PROBES
from postgres.outage_log import look_once

# No request takes longer than 15 s, and platforms kill what has not ended 30 s after SIGTERM.
SHUTDOWN_SECONDS = 20
# Longer than proxies keep idle connections (60 s): a request could meet a close of ours.
KEEP_ALIVE_SECONDS = 75
# A worker imports the app before it answers uvicorn for the first time. After 5 s, uvicorn's own
# limit, a slow or busy machine would have it killed, and the next one, and none would ever serve.
WORKER_SECONDS = 60
AT_ONCE = 4  # requests that begin in one turn; uvloop also takes one new connection in each


def serve() -> None:
    """Serve the app: in WEB_CONCURRENCY processes, or in one that starts anew after each change."""
    settings = get_settings()
    if settings.database_url.is_embedded:
        try:
            from postgres.embedded import (  # noqa: PLC0415  (a development dependency)
                LocalPostgresError,
                ensure_running,
            )
        except ModuleNotFoundError:
            raise SystemExit(
                "DATABASE_URL is that of the embedded PostgreSQL, which is for development only"
            ) from None
        try:
            ensure_running(ENV_FILE)
            get_settings.cache_clear()  # its port may have changed
        except LocalPostgresError as error:
            raise SystemExit(f"Cannot start the embedded PostgreSQL: {error}") from None
    reload = settings.environment == "development"
    if reload:
        import migrations  # noqa: PLC0415  (the app itself has no need of Alembic)

        look_once(get_settings().database_url, migrations.history, migrations.columns)
    refuse_port_in_use(settings.host, settings.port)
    uvicorn.run(
        "main:app",
        app_dir=str(PROJECT_DIR),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level.lower(),
        reload=reload,
        reload_dirs=[str(PROJECT_DIR)] if reload else None,
        reload_includes=["*.py", ".env"] if reload else None,
        # The only loop on Windows that can watch psycopg2's sockets.
        loop="asyncio:SelectorEventLoop" if sys.platform == "win32" else "auto",
        log_config=None,  # configure_logging() has done that
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        timeout_worker_healthcheck=WORKER_SECONDS,
    )


def refuse_port_in_use(host: str, port: int) -> None:
    """Say what to type: uvicorn would say neither which port it is nor what helps."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SystemExit(
                f"Port {port} is taken by another program: end it, or write another PORT into .env"
            ) from None


class Pacing:
    """Let at most AT_ONCE requests begin in one turn of the event loop, in order; probes pass.

    A burst of requests begins a few at a time, and a probe in its middle is answered.

    The event loop runs all that is ready before it looks for what is new. When 2,000 clients ask at
    once, that is half a second in which nobody else is heard, and a platform may take the process
    for dead. No request is refused here, and none waits for another one to end: it waits for turns
    of the loop only.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._begun = 0  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
            await self._turn()
        await self.app(scope, receive, send)

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        if self._begun == 0 and not self._waiting:
            loop.call_soon(self._next_turn)
        if self._begun < AT_ONCE and not self._waiting:
            self._begun += 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_turn(self) -> None:
        self._begun = 0
        while self._waiting and self._begun < AT_ONCE:
            turn = self._waiting.popleft()
            if not turn.done():  # it is, where the client has gone
                turn.set_result(None)
                self._begun += 1
        if self._begun:
            asyncio.get_running_loop().call_soon(self._next_turn)
