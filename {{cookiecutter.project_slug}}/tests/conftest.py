"""A PostgreSQL of the tests' own, migrated like the real one, and an app on it.

Nothing here reads .env, or reaches the database that is developed on. To try another server, or a
pooler, set TEST_DATABASE_URL: the tests create databases there, and drop them at the end.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, create_engine, text
from sqlmodel import Session

import config

# What the developer has set must not reach the tests.
for name in config.Settings.model_fields:
    os.environ.pop(name.upper(), None)
if "TEST_DATABASE_URL" not in os.environ:
    config.forget_other_servers()
config.ENV_FILE = None  # type: ignore[assignment]
# main.py builds an app as it is imported; this one is never served.
os.environ["DATABASE_URL"] = "postgresql://nobody@127.0.0.1:1/nothing"
os.environ["BETTER_AUTH_SECRET"] = secrets.token_urlsafe(48)

import migrations
from config import Settings
from database_url import DatabaseUrl, parse
from local_postgres import temporary_server
from main import create_app


@pytest.fixture(scope="session")
def embedded_server() -> Iterator[DatabaseUrl]:
    """A server that ends with the tests."""
    with temporary_server() as url:
        yield url


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> DatabaseUrl:
    """The server that most tests use: the embedded one, or that of TEST_DATABASE_URL."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        return parse(given)
    url: DatabaseUrl = request.getfixturevalue("embedded_server")
    return url


def create_database(server: DatabaseUrl) -> DatabaseUrl:
    name = f"test_{secrets.token_hex(8)}"
    run_alone(server, f"CREATE DATABASE {name}")
    return server.replace(database=name)


def run_alone(server: DatabaseUrl, statement: str) -> None:
    """Run a statement that no transaction may hold."""
    engine = create_engine(server.for_sqlalchemy())
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.fixture(scope="session")
def new_database(server: DatabaseUrl) -> Iterator[Callable[[], DatabaseUrl]]:
    """Create an empty database, and return where it is."""
    created = []

    def create() -> DatabaseUrl:
        created.append(create_database(server))
        return created[-1]

    yield create
    if "TEST_DATABASE_URL" in os.environ:  # the embedded server goes with all that is on it
        for url in created:
            run_alone(server, f"DROP DATABASE {url.database} WITH (FORCE)")


@pytest.fixture(scope="session")
def database_url(new_database: Callable[[], DatabaseUrl]) -> DatabaseUrl:
    """The database that most tests share, with the schema that the migrations give it."""
    url = new_database()
    migrations.upgrade(url)
    return url


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
    """Return settings with the given database, and the defaults for the rest."""

    def build(url: DatabaseUrl, **changes: object) -> Settings:
        required = {"database_url": url, "better_auth_secret": secrets.token_urlsafe(48)}
        return Settings.model_validate(required | changes)

    return build


@pytest.fixture(scope="session")
def settings(database_url: DatabaseUrl, settings_for: Callable[..., Settings]) -> Settings:
    return settings_for(database_url)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def client_of(client: TestClient) -> Callable[[str], TestClient]:
    """Return a client that is logged in as the user of an id."""

    def log_in(user_id: str) -> TestClient:
        app = client.app
        assert isinstance(app, FastAPI)
        token = app.state.verifier.issue(user_id)
        # The app runs already: a second lifespan would give it a second engine.
        user = TestClient(app, headers={"Authorization": f"Bearer {token}"})
        user.portal = client.portal  # the same event loop
        return user

    return log_in


@pytest.fixture
def ada(client_of: Callable[[str], TestClient]) -> TestClient:
    return client_of(str(uuid4()))


@pytest.fixture
def bob(client_of: Callable[[str], TestClient]) -> TestClient:
    return client_of(str(uuid4()))
