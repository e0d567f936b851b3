"""Shut down without resetting connections that clients have made already."""

import asyncio
import os
import socket
import sys
from contextlib import suppress

import uvicorn

ARRIVAL_SECONDS = 0.1  # until what was sent on new connections has been read


class Server(uvicorn.Server):
    """uvicorn's server, which also serves the connections that it has not accepted yet.

    The kernel accepts connections before the event loop does, and resets those that are left when
    the socket is closed. A proxy that has sent a POST on one of them does not repeat it.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        waiting = []
        for server in self.servers:
            for listener in server.sockets:
                waiting += accept_all(listener.fileno())
            server.close()  # in the same turn of the event loop: none comes in between
        loop = asyncio.get_running_loop()
        await asyncio.gather(
            *(loop.connect_accepted_socket(self._new_protocol, each) for each in waiting),
            return_exceptions=True,
        )
        await asyncio.sleep(ARRIVAL_SECONDS)
        await super().shutdown(sockets)

    def _new_protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def accept_all(listener: int) -> list[socket.socket]:
    """Return the connections that wait at a non-blocking socket, given by its descriptor."""
    found: list[socket.socket] = []
    if sys.platform != "win32":  # where a socket has no descriptor
        with socket.socket(fileno=os.dup(listener)) as ours, suppress(OSError):
            while True:
                found.append(ours.accept()[0])
    return found
