"""A database like the real one, on the server of postgres/tests/servers.py, and an app on it.

Nothing here reads .env, or reaches the database that is developed on.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
import uvicorn
from anyio.from_thread import BlockingPortal
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, create_engine
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import Session

import config

# What the developer has set must not reach the tests.
for name in config.Settings.model_fields:
    os.environ.pop(name.upper(), None)
config.ENV_FILE = None  # type: ignore[assignment]
# The settings that are required. main.py builds an app as it is imported; it is never served.
os.environ["DATABASE_URL"] = "postgresql://nobody@127.0.0.1:1/nothing"
os.environ["BETTER_AUTH_SECRET"] = SECRET = secrets.token_urlsafe(48)

import main
import migrations
from auth.tokens import OwnTokens
from config import Settings
from models import User
from postgres.tests.servers import create_database
from postgres.url import DatabaseUrl
from routes import health


@pytest.fixture(scope="session")
def database_url(new_database: Callable[[], DatabaseUrl]) -> DatabaseUrl:
    """The database that most tests share, with the schema that the migrations give it."""
    url = new_database()
    migrations.upgrade(url)
    return url


@pytest.fixture(scope="session")
def nowhere(database_url: DatabaseUrl) -> DatabaseUrl:
    """A database that is away: nothing listens on its port."""
    return database_url.replace(port=1)


@pytest.fixture(scope="session")
def embedded_url(embedded_server: DatabaseUrl) -> DatabaseUrl:
    """Such a database on the embedded server: for tests that a pooler, or TLS, would disturb."""
    url = create_database(embedded_server)
    migrations.upgrade(url)
    return url


@pytest.fixture(scope="session")
def engine(database_url: DatabaseUrl) -> Iterator[Engine]:
    """A synchronous engine of the tests' own, beside the app's."""
    engine = create_engine(database_url.for_sqlalchemy())
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session whose work, commits included, is rolled back after the test."""
    with engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()


@pytest.fixture(scope="session")
def settings_for() -> Callable[..., Settings]:
    """Return settings for development with the given database, and the defaults for the rest."""

    def build(url: DatabaseUrl, **changes: object) -> Settings:
        own: dict[str, Any] = {"database_url": url, "better_auth_secret": SECRET}
        own["environment"] = "development"
        return Settings(**(own | changes))

    return build


@pytest.fixture(scope="session")
def settings(database_url: DatabaseUrl, settings_for: Callable[..., Settings]) -> Settings:
    return settings_for(database_url)


@pytest.fixture(scope="session", autouse=True)
def _usual_garbage_collection() -> Iterator[None]:
    """Leave out what an app does once, at its start: before each test it would take the longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "spare_garbage_collector", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _patient_probes() -> Iterator[None]:
    """Let /ready wait until the database has answered, on a busy machine too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health, "READY_SECONDS", 6.0)
        patch.setattr(health, "PING_SECONDS", 5.0)
        yield


@pytest.fixture(scope="session")
def app(settings: Settings) -> FastAPI:
    """The app that most tests share. Tests that change it use `app_with`, or build their own."""
    return main.create_app(settings)


@pytest.fixture(scope="session")
def app_to_restart(settings: Settings) -> FastAPI:
    """The app behind `app_with`."""
    return main.create_app(settings)


@pytest.fixture
def app_with(
    app_to_restart: FastAPI, settings_for: Callable[..., Settings]
) -> Iterator[Callable[..., FastAPI]]:
    """Return an app with the given database, and with other settings that it reads as it starts.

    FastAPI builds an app's routes at its first start, which takes ten times as long as a later
    start. So all tests get the same app, one after the other. Routes that a test adds to it are
    removed after the test. Settings that it reads as it is built need an app of their own.
    """
    app = app_to_restart
    read_at_start = {"read_database_url", "db_pool_size", "db_queue_size", "db_queue_seconds"}
    routes, lifespan = list(app.routes), app.router.lifespan_context

    def change(url: DatabaseUrl, **changes: object) -> FastAPI:
        others = changes.keys() - read_at_start
        assert not others, f"{others}: use main.create_app(settings_for(…)) for these"
        assert app.router.lifespan_context is lifespan, "only one app_with(…) in a test"
        other = main.create_app(settings_for(url, **changes))
        app.router.lifespan_context = other.router.lifespan_context
        return app

    yield change
    app.router.lifespan_context = lifespan
    app.router.routes[:] = routes
    app.openapi_schema = None
    app.dependency_overrides.clear()


@pytest.fixture(scope="module")
def portal(app: FastAPI) -> Iterator[BlockingPortal]:
    """The event loop on which the shared app runs.

    Each start costs a new connection, whose first statements are the slowest. While the app runs,
    psycopg2 cannot COPY in this process: so it ends with the tests of a file.
    """
    with TestClient(app) as client:
        assert client.portal
        yield client.portal


@pytest.fixture
def client(app: FastAPI, portal: BlockingPortal) -> TestClient:
    """A client of the shared app, with an address that counts against no limit yet."""
    address = f"2001:db8:{secrets.token_hex(2)}:{secrets.token_hex(2)}::1"
    client = TestClient(app, client=(address, 50_000))
    client.portal = portal
    return client


@pytest.fixture(scope="session")
def token_for(settings: Settings) -> Callable[[str], str]:
    """Return an access token of the user with an id, for any app of the tests."""
    return OwnTokens(settings).issue


def holding_connection(app: FastAPI, client: TestClient) -> AbstractContextManager[object]:
    """Hold one of the running app's pooled connections, as a slow request does."""
    assert client.portal
    return client.portal.wrap_async_context_manager(app.state.resources.engine.connect())


@contextmanager
def served(app: FastAPI) -> Iterator[int]:
    """Serve an app on a real socket. Yields the port."""
    config = uvicorn.Config(
        app, port=0, loop="asyncio:SelectorEventLoop", ws="none", log_config=None
    )
    server = uvicorn.Server(config)
    with ThreadPoolExecutor(1) as thread:
        serving = thread.submit(server.run)
        while not (server.started or serving.done()):
            time.sleep(0.01)
        try:
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True


def add_account(engine: Engine, user_id: str) -> None:
    """Add an account that cannot log in, unless it is there: tasks are created for accounts."""
    user = {
        "id": UUID(user_id),
        "email": f"{user_id}@example.com",
        "password_hash": "",
        "name": "Ada",
    }
    with engine.begin() as connection:
        connection.execute(insert(User).values(user).on_conflict_do_nothing())


@pytest.fixture
def client_of(
    client: TestClient, engine: Engine, token_for: Callable[[str], str]
) -> Callable[[str], TestClient]:
    """Return a client that is logged in as the user with an id."""

    def log_in(user_id: str) -> TestClient:
        add_account(engine, user_id)
        # The app runs already: a second lifespan would give it a second engine.
        user = TestClient(client.app, headers={"Authorization": f"Bearer {token_for(user_id)}"})
        user.portal = client.portal
        return user

    return log_in


@pytest.fixture
def ada(client_of: Callable[[str], TestClient]) -> TestClient:
    return client_of(str(uuid4()))


@pytest.fixture
def bob(client_of: Callable[[str], TestClient]) -> TestClient:
    return client_of(str(uuid4()))
