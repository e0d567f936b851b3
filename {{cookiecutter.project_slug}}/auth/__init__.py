"""Who is calling: the `CurrentUserId` that routes ask for.

tokens, passwords and refresh_tokens are for accounts of our own, better_auth for those of a Better
Auth server.
"""

from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, status
from fastapi.requests import HTTPConnection
from fastapi.security import OAuth2PasswordBearer

from auth.tokens import AuthUnavailable, InvalidToken, TokenVerifier

RETRY_SECONDS = 2
SCHEME = "bearer"  # the name of the security scheme in the OpenAPI


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


class CurrentUser(OAuth2PasswordBearer):
    """Gives a route the id of the user whose token came with the request; 401 without a valid one.

    It is one dependency and not two, the token and then its user: each costs every request time.
    """

    async def __call__(self, request: HTTPConnection) -> str:
        token = await super().__call__(request)
        verifier: TokenVerifier = request.app.state.verifier
        try:
            user_id = await verifier.user_id(token or "")
        except InvalidToken:
            raise unauthorized("the token is not valid, or not any more") from None
        except AuthUnavailable as error:
            raise unavailable(str(error)) from None
        request.state.user_id = user_id  # for the log
        return user_id


current_user = CurrentUser(
    "auth/login", scheme_name=SCHEME, description="Log in with e-mail and password."
)
CurrentUserId = Annotated[str, Depends(current_user)]


def unauthorized(detail: str) -> HTTPException:
    return HTTPException(
        status.HTTP_401_UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"}
    )


def unavailable(detail: str) -> HTTPException:
    return HTTPException(
        status.HTTP_503_SERVICE_UNAVAILABLE, detail, headers={"Retry-After": str(RETRY_SECONDS)}
    )
