"""A server with scripted replies, for imitating errors of proxies and poolers."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

from postgres.url import DatabaseUrl

SSL_REQUEST = b"\x04\xd2\x16\x2f"
SILENCE = b""  # no reply: the client keeps waiting


def error(text: str, severity: str = "ERROR", code: str = "XX000") -> bytes:
    """Return an ErrorResponse of PostgreSQL's protocol, with the fields that proxies send."""
    fields = (f"S{severity}", f"C{code}", f"M{text}", "")
    body = b"".join(field.encode() + b"\0" for field in fields)
    return b"E" + (len(body) + 4).to_bytes(4) + body


class ScriptedServer:
    """Answers the first logins from the script, and connects later ones to a real server.

    Without a real server, it repeats the last reply. log_ins: their number. is_frozen: send no
    replies. freezes_at: stop at messages that contain this text.
    """

    def __init__(self, script: Sequence[bytes], behind: DatabaseUrl | None) -> None:
        self._script = script
        self._behind = behind
        self._streams: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.log_ins = 0
        self.is_frozen = False
        self.freezes_at: bytes | None = None
        self._serve_in_thread(self._accept)

    def _serve_in_thread(self, work: Any, *arguments: Any) -> None:
        def serve() -> None:
            with suppress(OSError):  # one side closed the connection
                work(*arguments)

        Thread(target=serve, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            self._streams.append(client)
            self._serve_in_thread(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        startup = client.recv(10_000)
        if self.is_frozen:
            return
        if startup[4:8] == SSL_REQUEST:
            client.sendall(b"N")
            startup = client.recv(10_000)
        if not startup:
            return
        self.log_ins += 1
        if self.log_ins > len(self._script) and self._behind:
            self._relay(client, startup)
        elif answer := self._script[min(self.log_ins, len(self._script)) - 1]:
            client.sendall(answer)
            client.close()

    def _relay(self, client: socket.socket, startup: bytes) -> None:
        assert self._behind
        server = socket.create_connection((self._behind.host, self._behind.port), timeout=30)
        self._streams.append(server)
        server.sendall(startup)
        self._serve_in_thread(self._pump, server, client)
        self._pump(client, server)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(10_000):
            if self.freezes_at and self.freezes_at in data:
                return
            target.sendall(data)
        target.close()

    def close(self) -> None:
        for stream in (self._listener, *self._streams):
            stream.close()


@contextmanager
def scripted_server(*script: bytes, behind: DatabaseUrl | None = None) -> Iterator[ScriptedServer]:
    server = ScriptedServer(script, behind)
    try:
        yield server
    finally:
        server.close()
