"""Access tokens of a Better Auth server, verified with the public keys that it publishes (JWKS).

The keys are kept in memory: a request costs one signature check and no I/O.

- A token with an unknown key starts a fetch of the keys; all requests that need one wait for the
  same fetch. After it, unknown keys start no other for COOLDOWN_SECONDS: otherwise anybody could
  make this app flood the server. If the only key has no id, only a wrong signature can show that a
  token has another key.
- The first request after REFRESH_SECONDS starts a fetch in the background. A request after
  STALE_SECONDS waits for it: no key that the server has withdrawn is accepted for longer. There is
  no timer, so an idle app stays idle.
- If a fetch fails, the old keys stay. Tokens with a known key are still accepted, others get a
  503 and start the next fetch after FETCH_RETRY_SECONDS.
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

from auth import CACHED_TOKENS, AuthUnavailable, InvalidToken

JWKS_PATH = "/api/auth/jwks"
ALGORITHMS = ("EdDSA", "ES256", "ES512", "RS256", "PS256")  # what Better Auth can sign with

LEEWAY_SECONDS = 5.0  # how far the clocks of the two servers may be apart
MAX_TOKEN_CHARACTERS = 8192  # about what proxies allow in one header
MAX_USER_ID_CHARACTERS = 255  # the width of tasks.owner_id

COOLDOWN_SECONDS = 10.0  # at most six fetches a minute; under attack, a new key works this late
REFRESH_SECONDS = 300.0
STALE_SECONDS = 600.0
FETCH_RETRY_SECONDS = 2.0  # after one that failed
FETCH_SECONDS = 3.0  # for the whole fetch, even if the answer comes in small pieces
MAX_JWKS_BYTES = 262_144  # hundreds of keys; Better Auth usually has one or two

# A key's id, None for a key without one, and the algorithm of a signature.
type KeyName = tuple[str | None, str]
type Keys = dict[KeyName, jwt.PyJWK]

logger = logging.getLogger(__name__)


class WrongSignature(InvalidToken):
    """The token was signed with another key."""


class BetterAuth:
    """Verifies the access tokens that the Better Auth server at `origin` issues."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._url = httpx2.URL(origin + JWKS_PATH)
        # No redirects, and no compression: the size would be known too late.
        self._client = httpx2.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            timeout=FETCH_SECONDS,
        )
        self._keys: Keys = {}
        # A client sends the same token for some minutes: its signature is checked once, and again
        # after each fetch of the keys.
        self._verified = lru_cache(CACHED_TOKENS)(self._verify)
        self._is_away = False  # as of the last fetch
        self._has_logged_issuer = False
        self._fetched_at = -math.inf  # when the last fetch ended, successful or not
        self._fetch: asyncio.Task[None] | None = None  # the current one

    async def user_id(self, token: str) -> str:
        """Return the user's id, at most 255 characters. Raises InvalidToken, AuthUnavailable."""
        name = read_key_name(token)
        key = await self._key(name)
        try:
            user_id, expires_at = self._verified(token, key)
        except WrongSignature:
            if key.key_id is not None:
                raise
            user_id, expires_at = self._verified(token, await self._key(name, other_than=key))
        if expires_at + LEEWAY_SECONDS <= time.time():
            raise InvalidToken("the token has expired")
        return user_id

    def _verify(self, token: str, key: jwt.PyJWK) -> tuple[str, float]:
        """Return the user's id and when the token expires. Raises InvalidToken, WrongSignature."""
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
        except jwt.InvalidIssuerError:  # the signature is right
            issuer = jwt.decode(token, options={"verify_signature": False})["iss"]
            self._log_issuer(issuer)
            raise InvalidToken("the issuer is another one") from None
        except jwt.InvalidSignatureError as error:
            raise WrongSignature(str(error)) from None
        except jwt.PyJWTError as error:
            raise InvalidToken(str(error)) from None
        user_id: str = claims["sub"]
        if not 0 < len(user_id) <= MAX_USER_ID_CHARACTERS or not user_id.isprintable():
            raise InvalidToken("the user's id cannot be stored")
        return user_id, float(claims["exp"])

    def _log_issuer(self, issuer: Any) -> None:
        """Log once that the two servers know Better Auth by different addresses."""
        if not self._has_logged_issuer:
            self._has_logged_issuer = True
            logger.warning(
                "tokens of the issuer %.200r are refused: BETTER_AUTH_URL is %r. Set it to the"
                " baseURL of the Better Auth server",
                issuer,
                self._origin,
            )

    async def aclose(self) -> None:
        """Cancel the current fetch and close the connections."""
        if self._fetch is not None:
            self._fetch.cancel()
        await self._client.aclose()

    async def _key(self, name: KeyName, *, other_than: jwt.PyJWK | None = None) -> jwt.PyJWK:
        """Return a key, after a fetch if needed. Raises InvalidToken, AuthUnavailable."""
        age = time.monotonic() - self._fetched_at
        if self._known_key(name) not in (None, other_than):
            waits_from = STALE_SECONDS
        else:
            waits_from = FETCH_RETRY_SECONDS if self._is_away else COOLDOWN_SECONDS
        if age >= min(waits_from, REFRESH_SECONDS):
            self._fetch = self._fetch or asyncio.create_task(self._fetch_keys())
            if age >= waits_from:
                # Shielded: other requests may still wait for it if this client disconnects.
                await asyncio.shield(self._fetch)
        key = self._known_key(name)
        if key is not None and key is not other_than:
            return key
        if self._is_away:
            raise AuthUnavailable("the Better Auth server does not answer")
        raise InvalidToken("the key that signed it is unknown")

    def _known_key(self, name: KeyName) -> jwt.PyJWK | None:
        _, algorithm = name
        return self._keys.get(name) or self._keys.get((None, algorithm))

    async def _fetch_keys(self) -> None:
        """Replace the keys with the published ones; if that fails, log why and keep them."""
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
        """Return the body of the response. Raises httpx2.HTTPError, ValueError."""
        body = bytearray()
        async with self._client.stream("GET", self._url) as response:
            if response.status_code != httpx2.codes.OK:
                raise ValueError(f"the response has the status {response.status_code}")
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_JWKS_BYTES:
                    raise ValueError(f"the response is larger than {MAX_JWKS_BYTES} bytes")
        return bytes(body)


def read_key_name(token: str) -> KeyName:
    """Return the key and algorithm that a token says it is signed with. Raises InvalidToken."""
    if len(token) > MAX_TOKEN_CHARACTERS or not token.isascii():
        raise InvalidToken("it is not a token")
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError as error:
        raise InvalidToken(str(error)) from None
    algorithm, key_id = header.get("alg"), header.get("kid")
    if algorithm not in ALGORITHMS or key_id == "":
        raise InvalidToken("it is not a token of Better Auth")  # no reason to fetch the keys
    return key_id, algorithm


def read_keys(body: bytes) -> Keys:
    """Return the usable keys of a JWKS.

    Raises ValueError or RecursionError if the body is not a JWKS.
    """
    match json.loads(body):
        case {"keys": [*jwks]}:
            found = [read_key(jwk, is_only_one=len(jwks) == 1) for jwk in jwks]
        case _:
            raise ValueError("the response is not a JWKS")
    if not all(found):
        usable = [keys for keys in found if keys]
        logger.warning("of the %d keys of Better Auth, %d can be used", len(jwks), len(usable))
    return {name: key for keys in found for name, key in keys.items()}


def read_key(jwk: Any, *, is_only_one: bool) -> Keys:
    """Return a public key by each algorithm that it is for; nothing if it cannot be used.

    The members `kid`, `alg` and `use` are optional (RFC 7517). Without `alg`, the key's type and
    curve decide, which leaves RSA keys two algorithms. Without `kid`, it must be the only key.
    """
    if not isinstance(jwk, dict) or "d" in jwk:  # a private key, which anybody could have read
        return {}
    key_id = jwk.get("kid")
    if not isinstance(key_id, str) and ("kid" in jwk or not is_only_one):
        return {}
    algorithms = [jwk["alg"]] if "alg" in jwk else ALGORITHMS
    return {(key_id, name): key for name in algorithms if (key := load_key(jwk, name))}


def load_key(jwk: Any, algorithm: Any) -> jwt.PyJWK | None:
    """Return a public key for an algorithm; None if it is not one."""
    try:
        if algorithm not in ALGORITHMS:
            return None
        if jwk.get("use") not in (None, "sig") or "verify" not in jwk.get("key_ops", ["verify"]):
            return None
        key = jwt.PyJWK(jwk, algorithm)
        public_key = key.Algorithm.prepare_key(key.key)  # refuses another algorithm's curve
        complaint = key.Algorithm.check_key_length(public_key)
        return None if complaint else key
    except (jwt.PyJWTError, UnsupportedAlgorithm, LookupError, TypeError, ValueError):
        return None
