"""Password hashing with bounded concurrency, and rate limits on guessing passwords.

Wrong guesses are counted in this process's memory: N processes allow up to N times as many, and a
restart forgets them. If that matters to you, give `Throttle` a storage that all processes share:
`limits.storage.storage_from_string("async+redis://…")`, with the package `limits[async-redis]`.
"""

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import Annotated

from fastapi import Depends, HTTPException, Request, status
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher

from auth import unavailable
from resources import resources


class Passwords:
    """Hashes passwords in threads of its own, with a bounded queue.

    A hash costs memory and time on purpose. Without a limit, a storm of logins would use up both.
    With it, the storm takes one core and 19 MiB, and other requests are still answered.
    """

    # What OWASP's Password Storage Cheat Sheet recommends for Argon2id: 19 MiB and two passes,
    # about 20 ms. After a change, each password is rehashed at its owner's next login.
    HASHER = PasswordHash((Argon2Hasher(memory_cost=19_456, time_cost=2, parallelism=1),))
    THREADS = 1  # each needs 19 MiB
    QUEUE = 50  # about one second of work

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(self.THREADS, thread_name_prefix="passwords")
        self._pending = 0

    def require_room(self) -> None:
        """Raise HTTPException, a 503, while the queue is full."""
        if self._pending >= self.THREADS + self.QUEUE:
            raise unavailable("too many logins at once")

    async def hash(self, password: str) -> str:
        """Return what to store. Raises HTTPException, a 503, while the queue is full."""
        return await self._in_thread(lambda: self.HASHER.hash(password))

    async def verify(self, password: str, stored: str | None) -> tuple[bool, str | None]:
        """Return whether the password is right, and a new hash to store if the old one is weaker.

        stored: the hash of the password; None if there is no such account, which takes as long as
        a wrong password. Raises HTTPException, a 503, while the queue is full.
        """
        if stored is None:
            await self.hash(password)
            return False, None
        return await self._in_thread(lambda: self.HASHER.verify_and_update(password, stored))

    async def _in_thread[T](self, work: Callable[[], T]) -> T:
        self.require_room()
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """End the threads, without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Throttle:
    """Limits guesses at passwords: after too many, a client gets a 429 until its 15 minutes end.

    Guesses at an account are counted per client, so that nobody can lock out its owner, who logs
    in from elsewhere. The window is fixed: the moving window of `limits` makes a call in a thread
    for each key in memory.
    """

    # Ten: each of several logins at the same moment counts until the first one succeeds.
    PER_ACCOUNT = RateLimitItemPerMinute(10, 15, "account")
    # More: an office may share one address.
    PER_ADDRESS = RateLimitItemPerMinute(100, 15, "address")

    def __init__(self, storage: Storage | None = None) -> None:
        self._limiter = FixedWindowRateLimiter(storage or MemoryStorage())

    async def require_below_limit(self, client: str) -> None:
        """Raise HTTPException, a 429, after too many failures of this client."""
        if not await self._limiter.test(self.PER_ADDRESS, client):
            raise await self._too_many(self.PER_ADDRESS, client)

    async def begin(self, account: str, client: str) -> None:
        """Count a guess before its result is known: otherwise many at once would all pass.

        Raises HTTPException, a 429.
        """
        await self.require_below_limit(client)
        if not await self._limiter.hit(self.PER_ACCOUNT, account, client):
            raise await self._too_many(self.PER_ACCOUNT, account, client)

    async def fail(self, client: str) -> None:
        await self._limiter.hit(self.PER_ADDRESS, client)

    async def succeed(self, account: str, client: str) -> None:
        """Reset the account's count. The client's stays: a guesser may have an account too."""
        await self._limiter.clear(self.PER_ACCOUNT, account, client)

    async def _too_many(self, limit: RateLimitItem, *key: str) -> HTTPException:
        stats = await self._limiter.get_window_stats(limit, *key)
        seconds = max(1, math.ceil(stats.reset_time - time.time()))
        return HTTPException(
            status.HTTP_429_TOO_MANY_REQUESTS,
            "too many attempts, try again later",
            headers={"Retry-After": str(seconds)},
        )


def client_key(host: str) -> str:
    """Return what a client is counted by: its IPv4 address or its IPv6 network.

    An IPv6 client can use any address of its /64 network.
    host: the client's address, which uvicorn takes from a proxy if it trusts that.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if isinstance(address, IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or IPv6Network((int(address), 64), strict=False))


class PasswordGuard:
    """Checks and hashes the passwords of one request, within the limits for its client."""

    def __init__(self, passwords: Passwords, throttle: Throttle, client: str) -> None:
        self._passwords = passwords
        self._throttle = throttle
        self._client = client

    async def verify(
        self, account: str, password: str, stored: str | None
    ) -> tuple[bool, str | None]:
        """Do the same as `Passwords.verify`. Raises HTTPException, a 429 or a 503."""
        self._passwords.require_room()  # first: a 503 does not count as a guess
        await self._throttle.begin(account, self._client)
        valid, new_hash = await self._passwords.verify(password, stored)
        if valid:
            await self._throttle.succeed(account, self._client)
        else:
            await self._throttle.fail(self._client)
        return valid, new_hash

    async def hash(self, password: str) -> str:
        """Return what to store. Raises HTTPException, a 429 or a 503."""
        await self._throttle.require_below_limit(self._client)
        return await self._passwords.hash(password)

    async def fail(self) -> None:
        """Count a failed registration: it reveals that an e-mail address has an account."""
        await self._throttle.fail(self._client)


async def get_password_guard(request: Request) -> PasswordGuard:
    app = resources(request)
    host = request.client.host if request.client else ""
    return PasswordGuard(app.passwords, app.throttle, client_key(host))


PasswordGuardDep = Annotated[PasswordGuard, Depends(get_password_guard)]
