"""URL, port and locale of a new embedded server."""

import socket
import sys
from pathlib import Path

import psutil
import pytest
from sqlalchemy import create_engine, text

from postgres import embedded
from postgres.tests.servers import create_database
from postgres.url import DatabaseUrl, parse


@pytest.mark.parametrize("slug", ["your_host", "xxxx", "database"])
def test_a_new_server_gets_its_own_url(slug: str) -> None:
    url = embedded.new_url(slug)

    assert url.is_embedded
    assert parse(url.for_libpq()) == url
    assert url.password != embedded.new_url(slug).password


def test_a_port_in_use_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        free = embedded.free_port()
        draws = iter([taken, free])
        monkeypatch.setattr("postgres.embedded.secrets.choice", lambda _ports: next(draws))

        assert embedded.free_port() == free
    assert free in embedded.SERVER_PORTS


def test_no_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        monkeypatch.setattr("postgres.embedded.secrets.choice", lambda _ports: taken)

        with pytest.raises(embedded.LocalPostgresError, match="no free port"):
            embedded.free_port()


@pytest.mark.skipif(sys.platform == "win32", reason="no locale there is known to work")
@pytest.mark.parametrize("word", ["milk", "молоко", "γάλα", "牛奶豆浆", "حليب"])
def test_letters_of_all_scripts_make_trigrams(embedded_server: DatabaseUrl, word: str) -> None:
    engine = create_engine(create_database(embedded_server).for_sqlalchemy())
    with engine.begin() as connection:
        connection.execute(text("CREATE EXTENSION pg_trgm"))
        trigrams = connection.scalar(text("SELECT cardinality(show_trgm(:word))"), {"word": word})
    engine.dispose()

    assert trigrams == len(word) + 1


def test_a_system_without_such_a_locale_has_letters_of_ascii(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "CTYPES", ("xx_XX.UTF-8",))

    assert embedded._ctype() == "C"


@pytest.mark.skipif(sys.platform == "win32", reason="has no sessions")
def test_a_program_that_takes_too_long_ends_with_those_that_it_started(tmp_path: Path) -> None:
    """They would go on writing files, and hold its output open."""
    script = "sleep 60 & echo $! > child; wait"

    with pytest.raises(embedded.LocalPostgresError, match="took longer"):
        embedded._run(tmp_path, Path("/bin/sh"), "-c", script, timeout=2)

    child = int((tmp_path / "child").read_text("ascii"))
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
