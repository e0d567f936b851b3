"""Pacing: a burst of requests begins a few at a time, and a probe in its middle is answered.

The event loop runs all that is ready before it looks for what is new. When 2,000 clients ask at
once, that is half a second in which nobody else is heard, and a platform may take the process for
dead. Nothing is refused here, or held up that could go on: a request waits for turns of the loop,
not for other requests to end.
"""

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

from logs import PROBES

AT_ONCE = 4  # requests that begin in one turn; uvloop also takes one new connection in each


class Pacing:
    """Let at most AT_ONCE requests begin in one turn of the event loop, in order; probes pass."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._begun = 0  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
            await self._turn()
        await self.app(scope, receive, send)

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        if self._begun == 0 and not self._waiting:
            loop.call_soon(self._next_turn)
        if self._begun < AT_ONCE and not self._waiting:
            self._begun += 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_turn(self) -> None:
        self._begun = 0
        while self._waiting and self._begun < AT_ONCE:
            turn = self._waiting.popleft()
            if not turn.done():  # it is, where the client has gone
                turn.set_result(None)
                self._begun += 1
        if self._begun:
            asyncio.get_running_loop().call_soon(self._next_turn)
