"""Password hashing with bounded concurrency, and rate limits on logging in and registering.

Attempts are counted in this process's memory: N processes allow up to N times as many, and a
restart forgets them. With THROTTLE_URL, all processes share their counts: see shared_counts.py.
"""

import asyncio
import math
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import structlog
from fastapi import Depends, HTTPException, Request, status
from limits import (
    RateLimitItem,
    RateLimitItemPerDay,
    RateLimitItemPerHour,
    RateLimitItemPerMinute,
)
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from structlog.contextvars import bound_contextvars

from auth.client import client_of
from db import Row
from errors import unavailable
from resources import resources
from schemas.problem import RETRY_AFTER_SECONDS


def read_common_passwords() -> frozenset[str]:
    lines = (Path(__file__).parent / "common_passwords.txt").read_text("utf-8").splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))


COMMON = read_common_passwords()  # at least 8 characters each, in lower case


def normalize(password: str) -> str:
    """Return the spelling in which a password is hashed.

    Devices send the same letters in different ways, such as "é" as one character or as two.
    """
    return unicodedata.normalize("NFKC", password)


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
    PER_CLIENT = 5  # of them, so that one client leaves room for the others

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(self.THREADS, thread_name_prefix="passwords")
        self._pending: Counter[str] = Counter()  # by client

    def require_room(self, client: str) -> None:
        """Raise HTTPException: a 429 if the client has its share of the queue, a 503 if it is full.

        client: what the client is counted by, as in `client_key`.
        """
        if self._pending[client] >= self.PER_CLIENT:
            raise too_many("pending", client, RETRY_AFTER_SECONDS)
        if self._pending.total() >= self.THREADS + self.QUEUE:
            raise unavailable("too many logins at once")

    async def hash(self, password: str, client: str) -> str:
        """Return what to store for a normalized password. Raises as `require_room` does."""
        return await self._in_thread(client, lambda: self.HASHER.hash(password))

    async def verify(
        self, password: str, stored: str | None, client: str
    ) -> tuple[bool, str | None]:
        """Return whether the password is right, and a new hash to store if the old one is weaker.

        stored: the hash of the password; None if there is no such account, which takes as long as
        a wrong password. Raises HTTPException as `require_room` does.
        """
        return await self._in_thread(client, lambda: self._verify(password, stored))

    def _verify(self, password: str, stored: str | None) -> tuple[bool, str | None]:
        normal = normalize(password)
        if stored is None:
            for spelling in {normal, password}:
                self.HASHER.hash(spelling)
            return False, None
        valid, new_hash = self.HASHER.verify_and_update(normal, stored)
        # Hashes made before passwords were normalized are of the password as it was sent.
        if not valid and normal != password and self.HASHER.verify(password, stored):
            return True, self.HASHER.hash(normal)
        return valid, new_hash

    async def _in_thread[T](self, client: str, work: Callable[[], T]) -> T:
        self.require_room(client)
        self._pending[client] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._pending -= Counter([client])  # keeps no zeros

    def close(self) -> None:
        """End the threads, without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Throttle:
    """Limits logins, registrations and mail: past a limit, a 429 until its window ends.

    Nobody can lock out the owner of an account: guesses are counted per client, and the
    limit for all clients together does not apply where the owner has logged in before.
    The windows are fixed: the moving window of `limits` makes a call in a thread for each key in
    memory.
    """

    # Ten: each of several logins at the same moment counts until the first one succeeds.
    PER_ACCOUNT = RateLimitItemPerMinute(10, multiples=15, namespace="account")
    # More: an office may share one address.
    PER_ADDRESS = RateLimitItemPerMinute(100, multiples=15, namespace="address")
    # Guesses at one account from all addresses where it has not logged in.
    ELSEWHERE = RateLimitItemPerHour(100, namespace="account from all addresses")
    # Logins of one account that succeed, from one address.
    LOGINS = RateLimitItemPerHour(60, namespace="logins")
    # From one address. Those that fail count too: they reveal which e-mail addresses are taken.
    REGISTRATIONS = RateLimitItemPerHour(20, namespace="registrations")
    # Messages that one client asks for, and those of one kind to one address.
    MAIL_REQUESTS = RateLimitItemPerHour(20, namespace="mail requests")
    MAILS = RateLimitItemPerHour(5, namespace="mails to an address")
    # Not a limit: reached where an account has logged in during the last 30 days.
    KNOWN = RateLimitItemPerDay(1, multiples=30, namespace="known")

    def __init__(self, storage: Storage) -> None:
        self._limiter = FixedWindowRateLimiter(storage)

    async def require_below_limit(self, client: str) -> None:
        """Raise HTTPException, a 429, after too many failures of this client."""
        if not await self._limiter.test(self.PER_ADDRESS, client):
            raise await self._too_many(client, self.PER_ADDRESS, client)

    async def begin(self, account: str, client: str, *, is_known: bool) -> None:
        """Count a guess before its result is known: otherwise many at once would all pass.

        is_known: whether the account has logged in from there. Raises HTTPException, a 429.
        """
        await self.require_below_limit(client)
        if not await self._limiter.test(self.LOGINS, account, client):
            raise await self._too_many(client, self.LOGINS, account, client)
        await self._count(client, self.PER_ACCOUNT, account, client)
        if not is_known and await self._limiter.test(self.KNOWN, account, client):
            await self._count(client, self.ELSEWHERE, account)

    async def begin_registration(self, client: str) -> None:
        """Count a registration. Raises HTTPException, a 429."""
        await self.require_below_limit(client)
        await self._count(client, self.REGISTRATIONS, client)

    async def begin_mail_request(self, client: str) -> None:
        """Count a message that a client asks for. Raises HTTPException, a 429."""
        await self.require_below_limit(client)
        await self._count(client, self.MAIL_REQUESTS, client)

    async def may_mail(self, purpose: str, address: str, client: str, *, is_due: bool) -> bool:
        """Count a message, and return whether the address may get it. The client must not learn it.

        is_due: whether there is something to send. If not, this takes the same time, but does not
        use up the limit of the address.
        """
        may = await self._limiter.hit(self.MAILS, purpose, address if is_due else "nobody")
        if not is_due:
            return False
        if not may:
            log_limit(self.MAILS.namespace, client)
        return may

    async def fail(self, client: str) -> None:
        await self._limiter.hit(self.PER_ADDRESS, client)

    async def succeed(self, account: str, client: str) -> None:
        """Reset the account's count. The client's stays: a guesser may have an account too."""
        await self.prove(account, client)
        await self._limiter.hit(self.LOGINS, account, client)

    async def prove(self, account: str, client: str) -> None:
        """Note that the owner uses this client: earlier guesses from it do not count any more."""
        await self._limiter.clear(self.PER_ACCOUNT, account, client)
        # The 30 days start again. Between these two calls, Redis does not know the client.
        await self._limiter.clear(self.KNOWN, account, client)
        await self._limiter.hit(self.KNOWN, account, client)

    async def _count(self, client: str, limit: RateLimitItem, *key: str) -> None:
        if not await self._limiter.hit(limit, *key):
            raise await self._too_many(client, limit, *key)

    async def _too_many(self, client: str, limit: RateLimitItem, *key: str) -> HTTPException:
        stats = await self._limiter.get_window_stats(limit, *key)
        seconds = max(1, math.ceil(stats.reset_time - time.time()))
        return too_many(limit.namespace, client, seconds)


def log_limit(limit: str, client: str) -> None:
    structlog.get_logger().warning("rate limit reached", limit=limit, client=client)


def too_many(limit: str, client: str, seconds: int) -> HTTPException:
    """Log that a client has reached a limit, and return a 429."""
    log_limit(limit, client)
    return HTTPException(
        status.HTTP_429_TOO_MANY_REQUESTS,
        "too many attempts, try again later",
        headers={"Retry-After": str(seconds)},
    )


class PasswordGuard:
    """Checks and hashes the passwords of one request, within the limits for its client."""

    def __init__(self, passwords: Passwords, throttle: Throttle, client: str) -> None:
        self._passwords = passwords
        self._throttle = throttle
        self.client = client

    async def verify(self, email: str, password: str, user: Row | None) -> tuple[bool, str | None]:
        """Do the same as `Passwords.verify`, for the account with an e-mail address.

        user: its `id`, `password_hash` and `is_known`, whether it has logged in from this client;
        None if there is no such account. Raises HTTPException, a 429 or a 503.
        """
        with bound_contextvars(user_id=str(user["id"]) if user else None):
            self._passwords.require_room(self.client)  # first: it does not count as a guess
            is_known = user is not None and user["is_known"]
            await self._throttle.begin(email, self.client, is_known=is_known)
            stored = user["password_hash"] if user else None
            valid, new_hash = await self._passwords.verify(password, stored, self.client)
            if valid:
                await self._throttle.succeed(email, self.client)
            else:
                await self._throttle.fail(self.client)
                structlog.get_logger().warning("wrong password", client=self.client)
            return valid, new_hash

    async def begin_registration(self) -> None:
        """Count a registration. Raises HTTPException, a 429 or a 503."""
        self._passwords.require_room(self.client)  # first: it does not count
        await self._throttle.begin_registration(self.client)

    async def require_below_limit(self) -> None:
        """Do the same as `Throttle.require_below_limit`."""
        await self._throttle.require_below_limit(self.client)

    async def begin_mail_request(self) -> None:
        """Do the same as `Throttle.begin_mail_request`."""
        await self._throttle.begin_mail_request(self.client)

    async def may_mail(self, purpose: str, address: str, *, is_due: bool = True) -> bool:
        """Do the same as `Throttle.may_mail`."""
        return await self._throttle.may_mail(purpose, address, self.client, is_due=is_due)

    async def prove(self, email: str) -> None:
        """Do the same as `Throttle.prove`."""
        await self._throttle.prove(email, self.client)

    async def hash(self, password: str) -> str:
        """Return what to store. Raises HTTPException, a 429 or a 503."""
        await self._throttle.require_below_limit(self.client)
        return await self._passwords.hash(password, self.client)

    async def fail(self) -> None:
        """Count a failed registration, which reveals that an address is taken, or a wrong link."""
        await self._throttle.fail(self.client)


async def get_password_guard(request: Request) -> PasswordGuard:
    app = resources(request)
    return PasswordGuard(app.passwords, app.throttle, client_of(request.scope))


PasswordGuardDep = Annotated[PasswordGuard, Depends(get_password_guard)]
