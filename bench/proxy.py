"""A TCP proxy that adds latency, as if the local database were in a data centre.

`python proxy.py PORT MILLISECONDS` prints the port it listens on, and adds that time to each round
trip to 127.0.0.1:PORT. It ends when its standard input closes, so it does not outlive its parent.
It limits neither bandwidth nor connections, and no data queues behind earlier data.
"""

import asyncio
import selectors
import sys
from typing import cast


class End(asyncio.Protocol):
    """One end of a proxied connection: forwards what it receives after `delay` seconds.

    The delay is the same for all data of a connection, so the order is kept.
    """

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.other: End | None = None
        self.transport: asyncio.Transport | None = None
        self.early = b""  # received before the other end was connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def join(self, other: "End") -> None:
        self.other, other.other = other, self
        self.data_received(self.early)

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self.early += data
        elif self.delay:
            asyncio.get_running_loop().call_later(self.delay, self.other.transport.write, data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, _error: Exception | None) -> None:
        if self.other and self.other.transport:
            asyncio.get_running_loop().call_later(self.delay, self.other.transport.close)


class ClientEnd(End):
    """The client's end. It adds the whole round trip's latency to the way to the database.

    An app sends one message and waits for its answer, so it makes no difference which way is
    delayed, and one timer is more precise than two.
    """

    def __init__(self, delay: float, port: int) -> None:
        super().__init__(delay)
        self.port = port
        self.connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.connecting = asyncio.create_task(self.connect())

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, server_end = await loop.create_connection(lambda: End(0), "127.0.0.1", self.port)
        self.join(server_end)


async def serve(port: int, delay: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: ClientEnd(delay, port), "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    port, milliseconds = int(sys.argv[1]), float(sys.argv[2])
    # select() has a resolution of microseconds; epoll and uvloop's timers round up to milliseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(serve(port, milliseconds / 1000))


if __name__ == "__main__":
    main()
