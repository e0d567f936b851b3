"""The app. `uv run main.py` serves it; in development, it restarts after each change of a file."""

import gc
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing
from functools import partial

import structlog
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from auth import TokenVerifier, document_bearer_tokens
from auth.better_auth import BetterAuth
from auth.passwords import Passwords, Throttle
from auth.shared_counts import open_counts
from auth.tokens import OwnTokens
from config import VERSION, Settings, get_settings, is_loopback
from db import Replica, open_engine, refuse_threads
from errors import add_error_handlers
from logs import RequestLog, configure_logging
from mail import Mailer
from pages import docs, home, mailbox
from pagination import Cursors, UserLimit
from postgres.outage_log import Availability
from resources import Resources
from routes import account, auth, health, mail_links, tasks
from routes.new_tasks import Quota
from server import Pacing, serve, telemetry


def create_app(settings: Settings) -> FastAPI:
    """Build the app. It connects to the database when the first request needs it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        refuse_threads(app)
        async with AsyncExitStack() as stack:
            open_pool = partial(
                open_engine,
                pool_size=settings.db_pool_size,
                queue_size=settings.db_queue_size,
                queue_seconds=settings.db_queue_seconds,
                echo=settings.debug,
            )
            engine = await stack.enter_async_context(open_pool(settings.database_url))
            availability = Availability(settings.database_url, known_schema)
            availability.listen_to(engine)
            engines, replica = [engine], None
            if url := settings.read_database_url:
                engines.append(await stack.enter_async_context(open_pool(url, name="replica")))
                replica = Replica(engines[-1], url)
            await stack.enter_async_context(telemetry.observing(engines, availability))
            verifier: TokenVerifier
            if settings.better_auth_url:
                verifier = await stack.enter_async_context(
                    aclosing(BetterAuth(settings.better_auth_url))
                )
            else:
                verifier = OwnTokens(settings)
                say_what_is_missing(settings)
            share = max(1, settings.db_pool_size // 3)  # connections for each user
            app.state.resources = Resources(
                settings=settings,
                engine=engine,
                replica=replica,
                availability=availability,
                readiness=health.Readiness(engine),
                cursors=Cursors(settings.better_auth_secret),
                user_limit=UserLimit(share, 2 * share, settings.db_queue_seconds),
                quota=Quota(settings.tasks_per_user),
                verifier=verifier,
                passwords=stack.enter_context(closing(Passwords())),
                throttle=Throttle(
                    await stack.enter_async_context(open_counts(settings.throttle_url))
                ),
                mailer=await stack.enter_async_context(aclosing(open_mailer(settings))),
            )
            spare_garbage_collector()
            yield

    app = FastAPI(
        title=settings.app_name,
        version=VERSION,
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.serves_docs else None,
        docs_url=None,  # pages/docs.py serves both, without files from a CDN
        redoc_url=None,
        redirect_slashes=False,  # some clients lose the body in a redirect
        # Client generators name their functions after these: get_health, getHealth.
        generate_unique_id_function=lambda route: route.name,
        telemetry=telemetry.options(),
    )
    app.include_router(tasks.router)  # first: routers are searched in this order
    app.include_router(health.router)
    if settings.better_auth_url:
        document_bearer_tokens(app)
    else:
        app.include_router(auth.router)
        app.include_router(account.router)
        app.include_router(mail_links.router)
    if settings.serves_docs:
        docs.add_docs(app)
    if settings.in_development:
        app.include_router(mailbox.router)
        app.include_router(home.router)

    # The middleware added last is the outermost: the log sees what the others answer.
    add_error_handlers(app)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.frontend_url,
        allow_credentials=True,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["ETag", "Link", "Location", "Retry-After", "X-Request-ID"],
    )
    app.add_middleware(Pacing)
    app.add_middleware(
        RequestLog,
        root_path=settings.root_path,
        hsts=settings.environment == "production",
    )
    return app


def open_mailer(settings: Settings) -> Mailer:
    keeps = settings.in_development and not settings.better_auth_url
    return Mailer(settings.mail_url, settings.app_name, keeps=keeps)


def say_what_is_missing(settings: Settings) -> None:
    """Log what our own accounts cannot do in production with these settings."""
    if settings.in_development:
        return
    if settings.mail_url is None:
        advice = "set MAIL_URL, or nobody can replace a forgotten password"
        structlog.get_logger().warning("no mail is sent", advice=advice)
    if is_loopback(settings.frontend_url[0]):
        advice = "set FRONTEND_URL to the address of your front end"
        structlog.get_logger().warning("links lead to this machine", advice=advice)
    if settings.registration is None:
        advice = "set REGISTRATION to open, or to closed to remove this line"
        structlog.get_logger().warning("registration is closed", advice=advice)


def known_schema() -> tuple[Sequence[str], Collection[str]]:
    """Return the revisions that the code knows, and the columns of its models."""
    import migrations  # noqa: PLC0415  (takes a second, and is needed if one is missing)

    return migrations.history(), migrations.columns()


def spare_garbage_collector() -> None:
    """Exclude what lives as long as the app from garbage collection, and collect less often.

    A request creates thousands of objects, nearly all of which are freed without a collection. With
    Python's defaults, collections after every few requests take up to a tenth of the CPU time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


configure_logging(get_settings(), has_traces=telemetry.has_traces())
telemetry.report_errors(get_settings())
app = create_app(get_settings())

if __name__ == "__main__":
    serve()
