"""A TCP proxy between an app and its database that simulates network faults."""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SECONDS = 10  # timeout of an operation on the proxy
BACKLOG = 4096


class Link:
    """A proxied connection."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        self.lost = False  # drop all data from now on

    def reset(self) -> None:
        for writer in self.writers:
            with suppress(OSError):  # it is already closed
                linger = struct.pack("ii", 1, 0)  # send RST instead of FIN
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
            writer.transport.abort()


class Network:
    """A proxy in front of a local port. Create it with `network()`.

    delay: seconds before a new connection is served.
    """

    def __init__(self, target: int) -> None:
        self.delay = 0.0
        self.accepted = 0  # connections so far
        self._target = target
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._silent = False
        self._fillers: list[socket.socket] = []
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self._open())

    def lose(self) -> None:
        """Drop all data from now on, in both directions, on existing and new connections."""

        async def lose() -> None:
            self._silent = True
            for link in self._links:
                link.lost = True

        self._do(lose())

    def reset(self) -> None:
        """Reset all connections."""

        async def reset() -> None:
            for link in list(self._links):
                link.reset()

        self._do(reset())

    def refuse(self) -> None:
        """Refuse new connections: stop listening."""

        async def refuse() -> None:
            await self._close()
            self._listener.close()

        self._do(refuse())

    def ignore(self) -> None:
        """Do not answer new connections, not even their first packet."""

        async def ignore() -> None:
            await self._close()
            # Linux drops connections that exceed the backlog, so fill it.
            self._listener.listen(0)
            while True:
                filler = socket.socket()
                filler.setblocking(False)
                self._fillers.append(filler)
                try:
                    async with asyncio.timeout(0.2):
                        await self._loop.sock_connect(filler, ("127.0.0.1", self.port))
                except TimeoutError:
                    return

        self._do(ignore())

    def heal(self) -> None:
        """Serve new connections again. Lost connections stay lost."""

        async def heal() -> None:
            self._silent = False
            for filler in self._fillers:
                filler.close()
            self._fillers.clear()
            if self._listener.fileno() < 0:
                self._listener = self._listen(self.port)
            self._listener.listen(BACKLOG)
            await self._open()

        self._do(heal())

    def close(self) -> None:
        async def close() -> None:
            await self._close()
            for filler in self._fillers:
                filler.close()
            self._listener.close()
            for link in list(self._links):
                link.reset()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._do(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS)
        self._loop.close()

    def _do(self, change: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(change, self._loop).result(SECONDS)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=BACKLOG)
        listener.setblocking(False)
        return listener

    async def _open(self) -> None:
        if self._accepting is None or self._accepting.done():
            self._accepting = self._loop.create_task(self._accept())

    async def _close(self) -> None:
        if self._accepting:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            self.accepted += 1
            task = self._loop.create_task(self._serve(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket) -> None:
        near = await asyncio.open_connection(sock=client)
        link = Link(near[1])
        link.lost = self._silent
        self._links.add(link)
        try:
            await asyncio.sleep(self.delay)
            far = await asyncio.open_connection("127.0.0.1", self._target)
            link.writers = (near[1], far[1])
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(link, near[0], far[1]))
                pumps.create_task(self._pump(link, far[0], near[1]))
        except* OSError:
            pass  # one end broke the connection
        finally:
            self._links.discard(link)
            link.reset()

    async def _pump(
        self, link: Link, source: asyncio.StreamReader, target: asyncio.StreamWriter
    ) -> None:
        while data := await source.read(65536):
            if not link.lost:
                target.write(data)
                await target.drain()
        if link.lost:  # drop the FIN, too
            await asyncio.Event().wait()
        target.write_eof()


@contextmanager
def network(target: int) -> Iterator[Network]:
    """Start a proxy in front of a local port."""
    way = Network(target)
    try:
        yield way
    finally:
        way.close()
