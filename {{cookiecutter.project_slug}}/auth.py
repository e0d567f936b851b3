"""Who is calling: access tokens, and the `CurrentUserId` that routes ask for."""

import hmac
import secrets
import time
from typing import Annotated, Any, Protocol

import jwt
from fastapi import Depends, FastAPI, HTTPException, Request, status
from fastapi.security import OAuth2PasswordBearer

from config import PYPROJECT, Settings

ACCESS_TOKEN_SECONDS = 15 * 60
LEEWAY_SECONDS = 5  # how far the clocks of replicas may be apart
ALGORITHM = "HS256"
# Who issues tokens, and whom for: this project. Not APP_NAME, which is for people to read, and
# whose change would log everybody out.
ISSUER: str = PYPROJECT["project"]["name"]
CLAIMS = ["iss", "aud", "sub", "iat", "exp", "jti"]

RETRY_SECONDS = 2
SCHEME = "bearer"  # the name of the security scheme in the OpenAPI


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
        user_id: str = claims["sub"]
        return user_id


bearer_token = OAuth2PasswordBearer(
    "auth/login", scheme_name=SCHEME, description="Log in with e-mail and password."
)


def document_bearer_tokens(app: FastAPI) -> None:
    """Have /docs ask for a token, not for a password: with Better Auth, nobody logs in with us."""
    openapi = app.openapi

    def openapi_with_bearer_tokens() -> dict[str, Any]:
        schema = openapi()
        schema["components"]["securitySchemes"][SCHEME] = {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "A token of the Better Auth server.",
        }
        return schema

    app.openapi = openapi_with_bearer_tokens  # type: ignore[method-assign]


async def get_current_user_id(
    request: Request, token: Annotated[str, Depends(bearer_token)]
) -> str:
    """Return the id of the user whose token came with the request; 401 without a valid one."""
    verifier: TokenVerifier = request.app.state.verifier
    try:
        user_id = await verifier.user_id(token)
    except InvalidToken:
        raise unauthorized("the token is not valid, or not any more") from None
    except AuthUnavailable as error:
        raise unavailable(str(error)) from None
    request.state.user_id = user_id  # for the log
    return user_id


CurrentUserId = Annotated[str, Depends(get_current_user_id)]


def unauthorized(detail: str) -> HTTPException:
    return HTTPException(
        status.HTTP_401_UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"}
    )


def unavailable(detail: str) -> HTTPException:
    return HTTPException(
        status.HTTP_503_SERVICE_UNAVAILABLE, detail, headers={"Retry-After": str(RETRY_SECONDS)}
    )
