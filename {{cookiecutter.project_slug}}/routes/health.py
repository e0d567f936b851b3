"""Is it alive, and is it ready? Questions that load balancers and platforms ask."""

import asyncio
import time

from fastapi import APIRouter, Request
from sqlalchemy.ext.asyncio import AsyncEngine

from config import VERSION
from db import DatabaseBusy, Deadline, ping, time_limit
from resources import resources
from schemas.health import Health, Ready
from schemas.problem import problems

ANSWER_SECONDS = 2.0  # the longest that /ready takes
PING_SECONDS = 1.8  # of these, for the database itself: then it is lost, and not only busy
SHARED_SECONDS = 1.5  # how long an answer serves all who ask; nothing asks on a timer

router = APIRouter(tags=["health"])


class Readiness:
    """Asks the database once for all who ask at the same time or shortly after."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._question: asyncio.Task[float] | None = None
        self._asked_at = 0.0

    async def latency(self) -> float:
        """Return the database's latency in seconds. Raises DatabaseBusy and DBAPIError."""
        question = self._question
        age = time.monotonic() - self._asked_at
        if question is None or (question.done() and age > SHARED_SECONDS):
            question = self._question = asyncio.create_task(self._ask())
            self._asked_at = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await asyncio.shield(question)
        except TimeoutError:
            raise DatabaseBusy("all connections are in use") from None

    async def _ask(self) -> float:
        with time_limit(Deadline(PING_SECONDS)):
            return await ping(self._engine)


@router.get("/health")
async def get_health(request: Request) -> Health:
    """Liveness: the process answers. The database is not asked."""
    return Health(app=request.app.title, version=VERSION)


@router.get("/ready", responses=problems(503))
async def get_ready(request: Request) -> Ready:
    """Readiness: the database answers too."""
    latency = await resources(request).readiness.latency()
    return Ready(database_ms=round(latency * 1000, 1))
