"""The process of the imitation. It ends when its standard input closes, so with its parent.

Arguments: the folder for the authority's certificate, the server's port, the pooler's port. It
prints two ports: one for clients, and one to control it. A line to the latter is a JSON object with
a method of Controls and its arguments. The response is a line with the result.
"""

import asyncio
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import trustme

from neon_proxy.front import LOOPBACK, Endpoint, Front, Reply, Way

BACKLOG = 1000


class Controls:
    """Controls for tests. Arguments and results are JSON values."""

    def __init__(self, front: Front) -> None:
        self.front = front

    async def add(self, name: str, **settings: Any) -> None:
        self.front.endpoints[name] = Endpoint(name, **settings)

    async def reply(self, name: str, replies: list[dict[str, Any]]) -> None:
        self.front.endpoints[name].replies = [Reply(**reply) for reply in replies]

    async def suspend(self, name: str, way: Way, wake_seconds: float) -> None:
        endpoint = self.front.endpoints[name]
        endpoint.asleep, endpoint.wake_seconds = True, wake_seconds
        await endpoint.hang_up(way)

    async def hang_up(self, name: str, way: Way) -> int:
        return await self.front.endpoints[name].hang_up(way)

    async def show(self, name: str) -> dict[str, Any]:
        endpoint = self.front.endpoints[name]
        return {
            "asleep": endpoint.asleep,
            "clients": len(endpoint.clients),
            "connections": endpoint.connections,
            "statements": endpoint.statements,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):  # the process ends
            while line := await reader.readline():
                call = json.loads(line)
                result = await getattr(self, call.pop("method"))(**call)
                writer.write(json.dumps(result).encode() + b"\n")
                await writer.drain()
        writer.close()


async def main() -> None:
    folder, server_port, pooler_port = sys.argv[1:]
    authority = trustme.CA()
    authority.cert_pem.write_to_path(Path(folder, "ca.pem"))
    hosts = ("*.us-east-2.aws.neon.tech", "*.c-2.us-east-2.aws.neon.tech")
    front = Front(authority.issue_cert(*hosts), int(server_port), int(pooler_port))
    clients = await asyncio.start_server(front.serve, LOOPBACK, 0, backlog=BACKLOG)
    controls = await asyncio.start_server(Controls(front).serve, LOOPBACK, 0)
    print(*(server.sockets[0].getsockname()[1] for server in (clients, controls)), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
