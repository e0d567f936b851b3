"""A pytest plugin that starts a PostgreSQL server for the tests of this package and of the app.

Tests never use the development database. To test with another server or a pooler, set
TEST_DATABASE_URL: the tests create databases there, and drop them at the end.

Whole folders run in several processes with pytest-xdist. Each has its own databases, on one server.
A selection, such as a single file, runs in one process, which starts faster.
"""

import _thread
import asyncio
import gc
import os
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg2
import pytest
from hypothesis import settings
from psycopg2 import sql
from sqlalchemy import create_engine, text

from postgres.embedded import temporary_server
from postgres.url import DatabaseUrl, parse

if sys.platform == "win32":  # the default event loop there cannot watch psycopg2's sockets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TestClient has no other way
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())

# Hypothesis uses a fixed seed and measures no time, so that a test fails only because of a change.
# To try other examples: pytest --hypothesis-profile=random --hypothesis-seed=NUMBER
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", derandomize=False, deadline=None, print_blob=True)
settings.load_profile("fixed")

# Remove variables that libpq would read: they are meant for another server.
if "TEST_DATABASE_URL" not in os.environ:
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]

gc.disable()  # while pytest imports and collects: nearly all of that stays

GRACE_SECONDS = 2  # for the test that runs when Ctrl-C is pressed
TIMER = pytest.StashKey[threading.Timer]()


def end_soon(session: pytest.Session, number: int, frame: FrameType | None) -> None:
    """Let Ctrl-C end the run after the current test, or during it if it takes long.

    An exception at any moment could leave a test's event loop running, which the test would then
    wait for. A command that handles Ctrl-C itself would hide it from pytest.
    """
    if session.shouldstop:
        signal.default_int_handler(number, frame)
    session.shouldstop = "Ctrl-C"
    timer = session.config.stash[TIMER] = threading.Timer(GRACE_SECONDS, press_ctrl_c)
    timer.daemon = True
    timer.start()


def stop_timer(config: pytest.Config) -> None:
    if timer := config.stash.get(TIMER, None):
        timer.cancel()
        timer.join()  # it may be pressing Ctrl-C at this moment


def press_ctrl_c() -> None:
    if sys.platform == "win32":
        _thread.interrupt_main()
    else:  # also ends what the main thread waits for
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    # Collect garbage from here on, and leave out what was there before: it takes the longest.
    gc.freeze()
    gc.enable()
    has_workers = session.config.pluginmanager.hasplugin("dsession")  # they run the tests
    if has_workers or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return (yield)
    signal.signal(signal.SIGINT, partial(end_soon, session))
    try:
        return (yield)
    finally:
        stop_timer(session.config)
        signal.signal(signal.SIGINT, signal.default_int_handler)


MOST_WORKERS = 6
SHARED_SERVER = pytest.StashKey[str]()


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of worker processes, or 0 to run all tests in this one."""
    is_all = all(Path(argument).is_dir() for argument in config.args)
    picks = (config.getoption(name, None) for name in ("keyword", "markexpr", "lf", "stepwise"))
    if not is_all or any(picks) or config.getoption("capture") == "no":  # -s shows output
        return 0
    return min(2 * (os.process_cpu_count() or 1), MOST_WORKERS)  # tests wait half the time


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the shared server to a worker. Start it for the first one."""
    config: pytest.Config = node.config
    if SHARED_SERVER not in config.stash:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        server = stack.enter_context(temporary_server(max_connections="200"))
        config.stash[SHARED_SERVER] = server.for_libpq()
    node.workerinput["embedded_server"] = config.stash[SHARED_SERVER]


@pytest.fixture(scope="session")
def embedded_server(request: pytest.FixtureRequest) -> Iterator[DatabaseUrl]:
    """A server that stops at the end of the tests."""
    if shared := getattr(request.config, "workerinput", {}).get("embedded_server"):
        yield parse(shared)
        return
    with temporary_server() as url:
        yield url
        stop_timer(request.config)  # stopping the server may take longer than a test


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
    """Run a statement that is not allowed in a transaction."""
    engine = create_engine(server.for_sqlalchemy())
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(statement))
    engine.dispose()


@contextmanager
def connected(url: DatabaseUrl) -> Iterator[Any]:
    """Yield a cursor, and commit at the end."""
    with closing(psycopg2.connect(url.direct.for_libpq())) as connection:
        with connection.cursor() as cursor:
            yield cursor
        connection.commit()


def rows(url: DatabaseUrl, tables: Iterable[str]) -> dict[str, list[tuple[Any, ...]]]:
    """Return all rows of tables, in the order of their ids."""
    with connected(url) as cursor:
        found = {}
        for table in tables:
            cursor.execute(sql.SQL("SELECT * FROM {} ORDER BY id").format(sql.Identifier(table)))
            found[table] = cursor.fetchall()
        return found


@pytest.fixture(scope="session")
def new_database(server: DatabaseUrl) -> Iterator[Callable[[], DatabaseUrl]]:
    """A function that creates an empty database, and returns its URL."""
    created = []

    def create() -> DatabaseUrl:
        created.append(create_database(server))
        return created[-1]

    yield create
    if "TEST_DATABASE_URL" in os.environ:  # the embedded server is deleted as a whole
        for url in created:
            run_alone(server, f"DROP DATABASE {url.database} WITH (FORCE)")
