"""Liveness and readiness, for load balancers and platforms."""

import asyncio
import time

from fastapi import APIRouter, Request
from sqlalchemy.ext.asyncio import AsyncEngine

from config import VERSION
from db import DatabaseBusy, Deadline, ping, time_limit
from resources import resources
from schemas.health import Health, Ready
from schemas.problem import problems

READY_SECONDS = 2.0  # the longest that /ready takes
PING_SECONDS = 1.8  # the part of it for the query: if that takes longer, the database is down
SHARED_SECONDS = 1.5  # how long a result is shared; there is no timer

router = APIRouter(tags=["health"])


class Readiness:
    """Sends one query for all requests that come at the same time or shortly after."""

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
            async with asyncio.timeout(READY_SECONDS):
                return await asyncio.shield(question)
        except TimeoutError:
            raise DatabaseBusy("all connections are in use") from None

    async def _ask(self) -> float:
        with time_limit(Deadline(PING_SECONDS)):
            return await ping(self._engine)


@router.get("/health")
async def get_health(request: Request) -> Health:
    """Liveness: the process responds. This does not use the database."""
    return Health(app=request.app.title, version=VERSION)


@router.get("/ready", responses=problems(503))
async def get_ready(request: Request) -> Ready:
    """Readiness: the database responds too."""
    latency = await resources(request).readiness.latency()
    return Ready(database_ms=round(latency * 1000, 1))
