"""Access tokens of our own accounts: what they contain, how they are signed and checked."""

import hmac
import secrets
import time
from functools import lru_cache
from uuid import UUID

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
        # A client sends the same token many times: its signature is checked once.
        self._verified = lru_cache(CACHED_TOKENS)(self._verify)

    def issue(self, user_id: str, login: UUID | None = None) -> str:
        """Return a token for the user, valid for ACCESS_TOKEN_SECONDS.

        login: the id of the login session that it is issued in.
        """
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": ISSUER,
            "sub": user_id,
            "iat": now,
            "exp": now + ACCESS_TOKEN_SECONDS,
            "jti": secrets.token_urlsafe(16),
        }
        if login is not None:
            claims["sid"] = str(login)
        return jwt.encode(claims, self._key, ALGORITHM)

    async def user_id(self, token: str) -> str:
        """Return the user's id. Raises InvalidToken."""
        user_id, expires_at, _ = self._verified(token)
        if expires_at + LEEWAY_SECONDS <= time.time():
            raise InvalidToken("the token has expired")
        return user_id

    def login(self, token: str) -> UUID | None:
        """Return the id of the login session that a token was issued in. Raises InvalidToken."""
        _, _, login = self._verified(token)
        return UUID(login) if login else None

    def _verify(self, token: str) -> tuple[str, int, str | None]:
        """Return the user's id, when the token expires, and the id of its login session.

        Raises InvalidToken.
        """
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
        return claims["sub"], claims["exp"], claims.get("sid")
