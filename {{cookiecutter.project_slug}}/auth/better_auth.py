"""Tokens of a Better Auth server, verified with the public keys that it publishes (its JWKS).

The keys are kept in memory: a request costs one signature check, and no I/O. How they are kept:

- A key that nobody knows is fetched for at once, by one fetch for all who wait; then no unknown
  key causes another one for COOLDOWN_SECONDS, or strangers could have us flood the server.
- Requests have the keys fetched anew in the background after REFRESH_SECONDS. When none came for
  STALE_SECONDS, the next one waits: a key that the server withdrew is refused after that, at the
  latest. No timer does it, so an idle app stays idle.
- A fetch that fails leaves the keys as they are: users with a known key go on, others get a 503,
  and cause the next fetch after RETRY_SECONDS.
"""

import asyncio
import json
import logging
import math
import time
from functools import lru_cache
from typing import Any

import httpx2
import jwt
from cryptography.exceptions import UnsupportedAlgorithm

from auth import RETRY_SECONDS
from auth.tokens import KEPT_TOKENS, AuthUnavailable, InvalidToken

JWKS_PATH = "/api/auth/jwks"
ALGORITHMS = ("EdDSA", "ES256", "ES512", "RS256", "PS256")  # all that Better Auth can sign with

LEEWAY_SECONDS = 5.0  # how far the two servers' clocks may be apart
MAX_TOKEN_CHARACTERS = 8192  # about as much as proxies let through in one header
MAX_USER_ID_CHARACTERS = 255  # the width of tasks.owner_id

COOLDOWN_SECONDS = 10.0  # six fetches a minute at most; and a new key, in a flood, is this late
REFRESH_SECONDS = 300.0
STALE_SECONDS = 600.0
FETCH_SECONDS = 3.0  # for the whole fetch, however slowly the answer drips
MAX_JWKS_BYTES = 262_144  # hundreds of keys; Better Auth usually has one or two

logger = logging.getLogger(__name__)


class BetterAuth:
    """A TokenVerifier for the tokens that the Better Auth server at `origin` makes."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._url = httpx2.URL(origin + JWKS_PATH)
        # Redirects are not followed, and nothing is unpacked: its size would be known too late.
        self._client = httpx2.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            timeout=FETCH_SECONDS,
        )
        self._keys: dict[str, jwt.PyJWK] = {}
        # A client sends the same token for some minutes: its signature is checked once for each
        # key, and so anew when the keys were fetched anew.
        self._verified = lru_cache(KEPT_TOKENS)(self._verify)
        self._is_away = False  # so the last fetch found
        self._fetched_at = -math.inf  # when the last fetch ended, whether it succeeded or not
        self._fetch: asyncio.Task[None] | None = None  # the one under way

    async def user_id(self, token: str) -> str:
        """Return the user's id, of at most 255 characters. Raises InvalidToken, AuthUnavailable."""
        key = await self._key(read_key_id(token))
        user_id, expires_at = self._verified(token, key)
        if expires_at + LEEWAY_SECONDS <= time.time():
            raise InvalidToken("the token has expired")
        return user_id

    def _verify(self, token: str, key: jwt.PyJWK) -> tuple[str, float]:
        """Return the user's id, and when the token expires. Raises InvalidToken."""
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],  # the key's own, whatever the token says
                issuer=self._origin,
                audience=self._origin,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "sub", "iss", "aud"]},
            )
        except jwt.PyJWTError as error:
            raise InvalidToken(str(error)) from None
        user_id: str = claims["sub"]
        if not 0 < len(user_id) <= MAX_USER_ID_CHARACTERS or not user_id.isprintable():
            raise InvalidToken("the user's id is not one that can be stored")
        return user_id, float(claims["exp"])

    async def aclose(self) -> None:
        """Give up a fetch under way, and close the connections."""
        if self._fetch is not None:
            self._fetch.cancel()
        await self._client.aclose()

    async def _key(self, key_id: str) -> jwt.PyJWK:
        """Return a key, fetching if it must. Raises InvalidToken, AuthUnavailable."""
        age = time.monotonic() - self._fetched_at
        if key_id in self._keys:
            waits_from = STALE_SECONDS
        else:
            waits_from = RETRY_SECONDS if self._is_away else COOLDOWN_SECONDS
        if age >= min(waits_from, REFRESH_SECONDS):
            self._fetch = self._fetch or asyncio.create_task(self._fetch_keys())
            if age >= waits_from:
                # Shielded, since others may wait for it too when this client hangs up.
                await asyncio.shield(self._fetch)
        if key := self._keys.get(key_id):
            return key
        if self._is_away:
            raise AuthUnavailable("the Better Auth server does not answer")
        raise InvalidToken("the key that signed it is not known")

    async def _fetch_keys(self) -> None:
        """Replace the keys by the ones published now; keep them, and log why, where that fails."""
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                body = await self._download()
                self._keys = await asyncio.to_thread(read_keys, body)
            self._is_away = False
        except (httpx2.HTTPError, TimeoutError, ValueError, RecursionError) as error:
            self._is_away = True
            logger.warning("cannot read the keys at %s: %r", self._url, error)
        finally:
            self._fetched_at = time.monotonic()
            self._fetch = None

    async def _download(self) -> bytes:
        """Return the body of the answer. Raises httpx2.HTTPError, and ValueError for a bad one."""
        body = bytearray()
        async with self._client.stream("GET", self._url) as answer:
            if answer.status_code != httpx2.codes.OK:
                raise ValueError(f"the answer has the status {answer.status_code}")
            async for chunk in answer.aiter_raw():
                body += chunk
                if len(body) > MAX_JWKS_BYTES:
                    raise ValueError(f"the answer is larger than {MAX_JWKS_BYTES} bytes")
        return bytes(body)


def read_key_id(token: str) -> str:
    """Return the id of the key that a token says it is signed with. Raises InvalidToken."""
    if len(token) > MAX_TOKEN_CHARACTERS or not token.isascii():
        raise InvalidToken("it is not a token")
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError as error:
        raise InvalidToken(str(error)) from None
    if header.get("alg") not in ALGORITHMS or not header.get("kid"):
        raise InvalidToken("it is not a token of Better Auth")  # not worth a fetch
    key_id: str = header["kid"]
    return key_id


def read_keys(body: bytes) -> dict[str, jwt.PyJWK]:
    """Return the keys of a JWKS by their ids, without those that cannot be used.

    Raises ValueError or RecursionError for a body that is no JWKS.
    """
    match json.loads(body):
        case {"keys": [*jwks]}:
            keys = {jwk["kid"]: key for jwk in jwks if (key := read_key(jwk))}
        case _:
            raise ValueError("the answer is not a JWKS")
    if len(keys) < len(jwks):
        logger.warning("of %d keys of Better Auth %d can be used", len(jwks), len(keys))
    return keys


def read_key(jwk: Any) -> jwt.PyJWK | None:
    """Return a public key that signs by the algorithm it names; None where it is not such a key."""
    try:
        if jwk["alg"] not in ALGORITHMS or not isinstance(jwk["kid"], str) or "d" in jwk:
            return None  # "d": a private key, which everybody may have read
        if jwk.get("use") not in (None, "sig") or "verify" not in jwk.get("key_ops", ["verify"]):
            return None
        key = jwt.PyJWK(jwk)
        public_key = key.Algorithm.prepare_key(key.key)  # refuses another algorithm's curve
        complaint = key.Algorithm.check_key_length(public_key)
        return None if complaint else key
    except (jwt.PyJWTError, UnsupportedAlgorithm, LookupError, TypeError, ValueError):
        return None
