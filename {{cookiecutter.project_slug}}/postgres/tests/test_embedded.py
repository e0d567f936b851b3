"""URL and port of a new embedded server."""

import socket

import pytest

from postgres import embedded
from postgres.url import parse


def test_a_new_server_gets_its_own_url() -> None:
    url = embedded.new_url("your_host")

    assert url.is_embedded
    assert parse(url.for_libpq()) == url
    assert url.password != embedded.new_url("your_host").password


def test_a_port_in_use_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        free = embedded.free_port()
        draws = iter([taken, free])
        monkeypatch.setattr("postgres.embedded.secrets.choice", lambda _ports: next(draws))

        assert embedded.free_port() == free
    assert free in embedded.PORTS


def test_no_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        monkeypatch.setattr("postgres.embedded.secrets.choice", lambda _ports: taken)

        with pytest.raises(embedded.LocalPostgresError, match="no free port"):
            embedded.free_port()
