"""Access tokens of our own accounts: what they contain, how they are signed and checked."""

import hmac
import secrets
import time
from functools import lru_cache

import jwt

from auth import CACHED_TOKENS, InvalidToken
from config import PYPROJECT, Settings

ACCESS_TOKEN_SECONDS = 15 * 60
LEEWAY_SECONDS = 5  # how far the clocks of replicas may be apart
ALGORITHM = "HS256"
# Issuer and audience of our tokens: the project's name. APP_NAME is only for display: if tokens
# depended on it, a change would log everybody out.
ISSUER: str = PYPROJECT["project"]["name"]
CLAIMS = ["iss", "aud", "sub", "iat", "exp", "jti"]


def signing_key(settings: Settings, purpose: str = "access token") -> bytes:
    """Return the key for one purpose: by default, to sign access tokens.

    It is derived from the app's secret, which has other uses too: nothing that is signed for one
    of those can pass as a token.
    """
    secret = settings.better_auth_secret.get_secret_value().encode()
    return hmac.digest(secret, purpose.encode(), "sha256")


class OwnTokens:
    """Issues the access tokens of our own accounts, and verifies them without the database."""

    def __init__(self, settings: Settings) -> None:
        self._key = signing_key(settings)
        self.refresh_key = signing_key(settings, "refresh token")
        # A client sends the same token for 15 minutes: its signature is checked once.
        self._verified = lru_cache(CACHED_TOKENS)(self._verify)

    def issue(self, user_id: str) -> str:
        """Return a token for the user, valid for ACCESS_TOKEN_SECONDS."""
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
        """Return the user's id. Raises InvalidToken."""
        user_id, expires_at = self._verified(token)
        if expires_at + LEEWAY_SECONDS <= time.time():
            raise InvalidToken("the token has expired")
        return user_id

    def _verify(self, token: str) -> tuple[str, int]:
        """Return the user's id and when the token expires. Raises InvalidToken."""
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
