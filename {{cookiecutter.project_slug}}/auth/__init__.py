"""Who is calling: `CurrentUserId`, which routes ask for.

Access tokens come from our own accounts (tokens, passwords, refresh_tokens) or from a Better Auth
server (better_auth). docs/accounts.md says how to remove the one that you do not use.
"""

from typing import Annotated, Any, Protocol
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException, status
from fastapi.requests import HTTPConnection
from fastapi.security import OAuth2PasswordBearer

from errors import unavailable
from resources import resources

CACHED_TOKENS = 4096  # verified tokens that are kept in memory: a few megabytes
SECURITY_SCHEME = "bearer"  # the name of the security scheme in the OpenAPI


class InvalidToken(Exception):
    """The token was not made for this app, or has expired."""


class AuthUnavailable(Exception):
    """The token cannot be checked at the moment; a later attempt may succeed."""


class TokenVerifier(Protocol):
    """Finds the user that an access token belongs to."""

    async def user_id(self, token: str) -> str:
        """Return the user's id. Raises InvalidToken, AuthUnavailable."""


class CurrentUser(OAuth2PasswordBearer):
    """Return the id of the user whose access token came with the request; 401 without a valid one.

    One dependency does both, reading the token and finding its user: each dependency adds time to
    every request.
    """

    async def __call__(self, request: HTTPConnection) -> str:
        token = await super().__call__(request)
        try:
            user_id = await resources(request).verifier.user_id(token or "")
        except InvalidToken:
            raise unauthorized("the token is invalid or has expired") from None
        except AuthUnavailable as error:
            raise unavailable(str(error)) from None
        request.state.user_id = user_id  # for the log
        return user_id


current_user = CurrentUser(
    "auth/login", scheme_name=SECURITY_SCHEME, description="Log in with e-mail and password."
)
CurrentUserId = Annotated[str, Depends(current_user)]


def document_bearer_tokens(app: FastAPI) -> None:
    """Have /docs ask for a token instead of a password, which only the Better Auth server takes."""
    openapi = app.openapi

    def openapi_with_bearer_tokens() -> dict[str, Any]:
        schema = openapi()
        schema["components"]["securitySchemes"][SECURITY_SCHEME] = {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "An access token of the Better Auth server.",
        }
        return schema

    app.openapi = openapi_with_bearer_tokens  # type: ignore[method-assign]


def account_id(user_id: str) -> UUID:
    """Return the id of an account of ours. Raises HTTPException, 401, if it cannot be one."""
    try:
        return UUID(user_id)
    except ValueError:
        raise no_account() from None


def no_account() -> HTTPException:
    return unauthorized("the account does not exist")


def unauthorized(detail: str) -> HTTPException:
    return HTTPException(
        status.HTTP_401_UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"}
    )
