"""The app. `uv run main.py` serves it, in development anew after each change of a file."""

import errno
import gc
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from auth import OwnTokens, document_bearer_tokens
from availability import Availability, look_once
from better_auth import BetterAuth
from config import ENV_FILE, PROJECT_DIR, VERSION, Settings, get_settings
from db import open_engine, refuse_threads
from errors import add_error_handlers
from logs import RequestLog, configure_logging
from pacing import Pacing
from paging import Cursors
from passwords import Passwords, Throttle
from routes import auth, docs, health, home, tasks

# No request takes longer than 15 s, and platforms kill what has not ended 30 s after SIGTERM.
SHUTDOWN_SECONDS = 20
# Longer than proxies keep idle connections (60 s): a request could meet a close of ours.
KEEP_ALIVE_SECONDS = 75
# A worker imports the app before it answers uvicorn for the first time. After 5 s, uvicorn's own
# limit, a slow or busy machine would have it killed, and the next one, and none would ever serve.
WORKER_SECONDS = 60


def create_app(settings: Settings) -> FastAPI:
    """Build the app. The database is reached when the first request needs it, not before."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        refuse_threads(app)
        async with AsyncExitStack() as at_the_end:
            engine = await at_the_end.enter_async_context(
                open_engine(
                    settings.database_url,
                    pool_size=settings.db_pool_size,
                    queue_size=settings.db_queue_size,
                    queue_seconds=settings.db_queue_seconds,
                    echo=settings.debug,
                )
            )
            availability = Availability(settings.database_url)
            availability.listen_to(engine)
            passwords = Passwords()
            at_the_end.callback(passwords.close)
            app.state.availability = availability
            app.state.engine = engine
            app.state.readiness = health.Readiness(engine)
            app.state.passwords = passwords
            app.state.throttle = Throttle()
            app.state.cursors = Cursors(settings.better_auth_secret)
            if settings.better_auth_url:
                verifier = BetterAuth(settings.better_auth_url)
                at_the_end.push_async_callback(verifier.aclose)
                app.state.verifier = verifier
            else:
                app.state.verifier = OwnTokens(settings)
            spare_garbage_collector()
            yield

    app = FastAPI(
        title=settings.app_name,
        version=VERSION,
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.serves_docs else None,
        docs_url=None,  # routes.docs has these two, without files from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect loses the body of some clients' requests
        # Client generators make function names of these: get_health, getHealth.
        generate_unique_id_function=lambda route: route.name,
    )
    app.include_router(tasks.router)  # first: the routers are looked through in this order
    app.include_router(health.router)
    if settings.better_auth_url:
        document_bearer_tokens(app)
    else:
        app.include_router(auth.router)
    if settings.serves_docs:
        docs.add_docs(app)
    if settings.environment == "development":
        app.state.settings = settings
        app.include_router(home.router)

    # The last one added is the outermost: the log sees all that the others answer.
    add_error_handlers(app)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.frontend_url,
        allow_credentials=True,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["Link", "Location", "Retry-After", "X-Request-ID"],
    )
    app.add_middleware(Pacing)
    app.add_middleware(RequestLog)
    return app


def spare_garbage_collector() -> None:
    """Leave what lives as long as the app out of each collection, and collect more rarely.

    A request makes thousands of objects, nearly all of which go without a collection: by default
    it would look through them after each few requests, for up to a tenth of the processor's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def serve() -> None:
    """Serve the app: in WEB_CONCURRENCY processes, or in one that starts anew after each change."""
    settings = get_settings()
    if settings.database_url.is_embedded:
        try:
            import local_postgres  # noqa: PLC0415  (a development dependency)
        except ModuleNotFoundError:
            raise SystemExit(
                "DATABASE_URL is that of the embedded PostgreSQL, which is for development only"
            ) from None
        try:
            local_postgres.ensure_running(ENV_FILE)
            get_settings.cache_clear()  # its port may have changed
        except local_postgres.LocalPostgresError as error:
            raise SystemExit(f"Cannot start the embedded PostgreSQL: {error}") from None
    reload = settings.environment == "development"
    if reload:
        import migrations  # noqa: PLC0415  (the app itself has no need of Alembic)

        look_once(get_settings().database_url, migrations.history)
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


configure_logging(get_settings())
app = create_app(get_settings())

if __name__ == "__main__":
    serve()
