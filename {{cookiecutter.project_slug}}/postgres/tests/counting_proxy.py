"""A proxy that counts: how often an app goes to the database and back.

It can also hold a query back, as a pooler does whose connections are all in use.
"""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from postgres.url import DatabaseUrl


class CountingProxy:
    """A proxy in front of PostgreSQL that records queries. Each is one round trip."""

    def __init__(self, server: DatabaseUrl) -> None:
        self.queries: list[str] = []
        self._held_back = ""  # a query that contains this waits
        self._released = threading.Event()
        self._server = (server.host, server.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self._answering: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                answering = threading.Thread(
                    target=self._forward, args=(server, client), daemon=True
                )
                self._answering.append(answering)
                answering.start()
                threading.Thread(target=self._read, args=(client, server), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def _read(self, client: socket.socket, server: socket.socket) -> None:
        """Forward the client's messages, and record the queries."""
        stream = client.makefile("rb")
        with suppress(OSError, struct.error):
            (length,) = struct.unpack("!i", stream.read(4))  # the first message has no type
            server.sendall(struct.pack("!i", length) + stream.read(length - 4))
            while kind := stream.read(1):
                (length,) = struct.unpack("!i", stream.read(4))
                body = stream.read(length - 4)
                if kind in b"QP":
                    query = body.decode(errors="replace").rstrip("\0")
                    self.queries.append(query)
                    if self._held_back and self._held_back in query:
                        self._released.wait()
                server.sendall(kind + struct.pack("!i", length) + body)
            server.shutdown(socket.SHUT_WR)

    def wait_for_ends(self) -> None:
        """Wait until the client has all that the server sent before it closed its connections."""
        for thread in self._answering:
            thread.join(20)

    @contextmanager
    def holding_back(self, text: str) -> Iterator[None]:
        """Deliver queries that contain a text only at the end of the block."""
        self._released.clear()
        self._held_back = text
        try:
            yield
        finally:
            self._held_back = ""
            self._released.set()

    def close(self) -> None:
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextmanager
def counting_proxy(server: DatabaseUrl) -> Iterator[CountingProxy]:
    proxy = CountingProxy(server)
    try:
        yield proxy
    finally:
        proxy.close()
