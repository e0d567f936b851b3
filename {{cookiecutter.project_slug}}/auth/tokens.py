"""Access tokens: what they say, how they are signed, and how those of ours are checked."""

import hmac
import secrets
import time
from functools import lru_cache
from typing import Protocol

import jwt

from config import PYPROJECT, Settings

ACCESS_TOKEN_SECONDS = 15 * 60
LEEWAY_SECONDS = 5  # how far the clocks of replicas may be apart
KEPT_TOKENS = 4096  # some megabytes
ALGORITHM = "HS256"
# Who issues tokens, and whom for: this project. Not APP_NAME, which is for people to read, and
# whose change would log everybody out.
ISSUER: str = PYPROJECT["project"]["name"]
CLAIMS = ["iss", "aud", "sub", "iat", "exp", "jti"]


class InvalidToken(Exception):
    """The token is not one that was made for this app, or is one no longer."""


class AuthUnavailable(Exception):
    """Whether the token is valid cannot be told for the moment: worth another try later."""


class TokenVerifier(Protocol):
    """Whoever can tell what user a token stands for: `OwnTokens`, or `BetterAuth`."""

    async def user_id(self, token: str) -> str:
        """Return the user's id. Raises InvalidToken, AuthUnavailable."""


def signing_key(settings: Settings) -> bytes:
    """Return the key that signs access tokens, and nothing else.

    It is derived, because the secret serves other purposes too: what is signed for one of them
    can never pass for a token.
    """
    secret = settings.better_auth_secret.get_secret_value().encode()
    return hmac.digest(secret, b"access token", "sha256")


class OwnTokens:
    """Issues and verifies the access tokens of users who log in with us."""

    def __init__(self, settings: Settings) -> None:
        self._key = signing_key(settings)
        # A client sends the same token for 15 minutes: its signature is checked once.
        self._verified = lru_cache(KEPT_TOKENS)(self._verify)

    def issue(self, user_id: str) -> str:
        """Return a token that stands for the user for ACCESS_TOKEN_SECONDS."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": ISSUER,
            "sub": user_id,
            "iat": now,
            "exp": now + ACCESS_TOKEN_SECONDS,
            "jti": secrets.token_urlsafe(16),
        }
        return jwt.encode(claims, self._key, ALGORITHM)

    async def user_id(self, token: str) -> str:
        """Return the user's id. Raises InvalidToken. The database is not asked."""
        user_id, expires_at = self._verified(token)
        if expires_at + LEEWAY_SECONDS <= time.time():
            raise InvalidToken("the token has expired")
        return user_id

    def _verify(self, token: str) -> tuple[str, int]:
        """Return the user's id, and when the token expires. Raises InvalidToken."""
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[ALGORITHM],  # never the one that the token names
                issuer=ISSUER,
                audience=ISSUER,
                leeway=LEEWAY_SECONDS,
                options={"require": CLAIMS},
            )
        except jwt.PyJWTError as error:
            raise InvalidToken(str(error)) from None
        return claims["sub"], claims["exp"]
