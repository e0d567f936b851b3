"""Passwords: hashed few at a time, and not for guessing.

Guesses are counted in this process's memory: N processes allow up to N times as many, and a
restart forgets them. Where that matters, hand `Throttle` a storage that all processes share:
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


class Passwords:
    """Hashes passwords in threads of its own, and refuses work rather than let it pile up.

    A hash costs memory and time on purpose: without a limit, a storm of log-ins would take all of
    both. Here it takes one core and 19 MiB, and other requests go on.
    """

    # What OWASP's Password Storage Cheat Sheet recommends for Argon2id: 19 MiB and two passes,
    # about 20 ms. After a change, each password is hashed anew when its owner logs in.
    HASHER = PasswordHash((Argon2Hasher(memory_cost=19_456, time_cost=2, parallelism=1),))
    THREADS = 1  # memory is this many times 19 MiB
    QUEUE = 50  # about a second's work

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(self.THREADS, thread_name_prefix="passwords")
        self._pending = 0

    def require_room(self) -> None:
        """Raise HTTPException, a 503, while the queue is full."""
        if self._pending >= self.THREADS + self.QUEUE:
            raise unavailable("too many log-ins at once")

    async def hash(self, password: str) -> str:
        """Return what to store. Raises as `require_room`."""
        return await self._in_thread(lambda: self.HASHER.hash(password))

    async def verify(self, password: str, stored: str | None) -> tuple[bool, str | None]:
        """Return whether it is the password, and if so, a better hash to store, where there is one.

        Nothing stored, for want of an account, takes as long as a wrong password.
        Raises as `require_room`.
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
        """Give back the threads; nothing is waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Throttle:
    """Counts guesses at passwords. Who made too many gets a 429 until the window, 15 minutes, ends.

    An account is closed to the address that guessed, not to its owner elsewhere: else anybody
    could lock out anybody. It is the fixed window of `limits`, since its moving one costs a
    hop into a thread for each key in memory.
    """

    # Ten, since log-ins of one account at the same moment count until the first has succeeded.
    PER_ACCOUNT = RateLimitItemPerMinute(10, 15, "account")
    # More, since an office has one address, and many who mistype.
    PER_ADDRESS = RateLimitItemPerMinute(100, 15, "address")

    def __init__(self, storage: Storage | None = None) -> None:
        self._limiter = FixedWindowRateLimiter(storage or MemoryStorage())

    async def require_patience(self, address: str) -> None:
        """Raise HTTPException, a 429, after too many failures at this address."""
        if not await self._limiter.test(self.PER_ADDRESS, address):
            raise await self._too_many(self.PER_ADDRESS, address)

    async def begin(self, account: str, address: str) -> None:
        """Count a guess before it is known to be wrong, or many at once would all pass.

        Raises HTTPException, a 429.
        """
        await self.require_patience(address)
        if not await self._limiter.hit(self.PER_ACCOUNT, account, address):
            raise await self._too_many(self.PER_ACCOUNT, account, address)

    async def fail(self, address: str) -> None:
        await self._limiter.hit(self.PER_ADDRESS, address)

    async def succeed(self, account: str, address: str) -> None:
        """Forget this account's failures. Those of the address stay: it may own one account."""
        await self._limiter.clear(self.PER_ACCOUNT, account, address)

    async def _too_many(self, limit: RateLimitItem, *key: str) -> HTTPException:
        stats = await self._limiter.get_window_stats(limit, *key)
        seconds = max(1, math.ceil(stats.reset_time - time.time()))
        return HTTPException(
            status.HTTP_429_TOO_MANY_REQUESTS,
            "too many tries, wait a while",
            headers={"Retry-After": str(seconds)},
        )


def guesser(host: str) -> str:
    """Return what stands for one client: an address, or for IPv6, where each has 2⁶⁴, its network.

    `host` is what uvicorn found out, with the help of a proxy that it trusts.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if isinstance(address, IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or IPv6Network((int(address), 64), strict=False))


class PasswordGuard:
    """What a request that comes with a password asks: is it right, and may it be asked at all?"""

    def __init__(self, passwords: Passwords, throttle: Throttle, address: str) -> None:
        self._passwords = passwords
        self._throttle = throttle
        self._address = address

    async def verify(
        self, account: str, password: str, stored: str | None
    ) -> tuple[bool, str | None]:
        """Return what `Passwords.verify` does. Raises HTTPException, a 429 or a 503."""
        self._passwords.require_room()  # a refusal for want of room is not counted as a guess
        await self._throttle.begin(account, self._address)
        valid, better = await self._passwords.verify(password, stored)
        if valid:
            await self._throttle.succeed(account, self._address)
        else:
            await self._throttle.fail(self._address)
        return valid, better

    async def hash(self, password: str) -> str:
        """Return what to store. Raises HTTPException, a 429 or a 503."""
        await self._throttle.require_patience(self._address)
        return await self._passwords.hash(password)

    async def fail(self) -> None:
        """Count what tells as much as a guess: that an e-mail address has an account."""
        await self._throttle.fail(self._address)


async def get_password_guard(request: Request) -> PasswordGuard:
    state = request.app.state
    address = guesser(request.client.host if request.client else "")
    return PasswordGuard(state.passwords, state.throttle, address)


PasswordGuardDep = Annotated[PasswordGuard, Depends(get_password_guard)]
