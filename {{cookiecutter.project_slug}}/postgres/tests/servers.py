"""A PostgreSQL of the tests' own: a plugin of pytest, for the tests beside it and for the app's.

It never reaches the database that is developed on. To try another server, or a pooler, set
TEST_DATABASE_URL: the tests create databases there, and drop them at the end.
"""

import asyncio
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from sqlalchemy import create_engine, text

from postgres.embedded import temporary_server
from postgres.url import DatabaseUrl, parse

if sys.platform == "win32":  # whose default event loop cannot watch psycopg2's sockets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # without another way for TestClient
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())

# A project searches with a fixed seed: a test that fails, fails because of what was changed.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

# What libpq would read from the environment is meant for another server.
if "TEST_DATABASE_URL" not in os.environ:
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


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
