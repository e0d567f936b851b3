"""What rate limits count, in Redis or Valkey for all processes together (THROTTLE_URL)."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import cast

import structlog
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.storage.redis.redispy import RedispyBridge
from limits.errors import StorageError
from pydantic import SecretStr


class SharedCounts(MemoryStorage):
    """Counts in Redis, and in memory too: that is what counts while Redis does not answer."""

    COUNT_SECONDS = 0.5  # for each question, the wait for a connection included
    PAUSE_SECONDS = 5.0  # after a failure: until then, nothing is asked and no request waits
    CONNECTIONS = 10

    def __init__(self, url: str) -> None:
        super().__init__()
        self._redis = RedisStorage(url, wrap_exceptions=True, implementation="redispy")
        self._free = asyncio.Semaphore(self.CONNECTIONS)
        self._is_away = False
        self._retry_at = 0.0

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        own = await super().incr(key, expiry, amount)
        return await self._ask(lambda: self._redis.incr(key, int(expiry), amount), own)

    async def get(self, key: str) -> int:
        own = await super().get(key)
        return await self._ask(lambda: self._redis.get(key), own)

    async def get_expiry(self, key: str) -> float:
        own = await super().get_expiry(key)
        return await self._ask(lambda: self._redis.get_expiry(key), own)

    async def clear(self, key: str) -> None:
        await super().clear(key)
        await self._ask(lambda: self._redis.clear(key), None)

    async def _ask[T](self, question: Callable[[], Awaitable[T]], own: T) -> T:
        """Return the answer of Redis, or our own. Logs that Redis is away, or back, once."""
        was_away = self._is_away
        if was_away:
            if time.monotonic() < self._retry_at:
                return own
            self._retry_at = time.monotonic() + self.PAUSE_SECONDS  # this question alone tries
        log = structlog.get_logger()
        try:
            async with asyncio.timeout(self.COUNT_SECONDS), self._free:
                answer = await question()
        except (StorageError, OSError) as error:
            self._retry_at = time.monotonic() + self.PAUSE_SECONDS
            if not self._is_away:
                self._is_away = True
                reason = type(error.__cause__ or error).__name__  # its text may quote the URL
                log.warning("rate limits are not shared", reason=reason)
            return own
        if was_away and self._is_away:
            self._is_away = False
            log.info("rate limits are shared again")
        return answer

    async def aclose(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.COUNT_SECONDS):
                await cast("RedispyBridge", self._redis.bridge).storage.aclose()


@asynccontextmanager
async def open_counts(url: SecretStr | None) -> AsyncIterator[Storage]:
    """Count at a URL as `Settings` has checked it, or in the memory of this process."""
    if url is None:
        yield MemoryStorage()
        return
    counts = SharedCounts(url.get_secret_value())
    try:
        yield counts
    finally:
        await counts.aclose()
