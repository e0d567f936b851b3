"""What the routes of our own accounts share: who is calling, and whether a password is right."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import Secret
from sqlalchemy import ColumnElement, Select, select
from sqlmodel import col

from auth import CurrentUserId, account_id, no_account, refresh_tokens
from auth.passwords import PasswordGuard
from auth.tokens import ACCESS_TOKEN_SECONDS, OwnTokens
from db import OneStatement, Row, get_statement
from errors import unavailable
from models import User
from resources import resources
from schemas.auth import OWN_ADDRESS, TokenPair, UserPublic, is_own_address

COLUMNS = [col(getattr(User, name)) for name in UserPublic.model_fields]


async def get_own_tokens(request: Request) -> OwnTokens:
    verifier = resources(request).verifier
    assert isinstance(verifier, OwnTokens)  # noqa: S101  (otherwise main.py includes no routes here)
    return verifier


OwnTokensDep = Annotated[OwnTokens, Depends(get_own_tokens)]


async def get_account_id(user_id: CurrentUserId) -> UUID:
    return account_id(user_id)


AccountId = Annotated[UUID, Depends(get_account_id)]


async def get_login(request: Request, _: AccountId, tokens: OwnTokensDep) -> UUID | None:
    """Return the id of the login session that the access token was issued in."""
    _scheme, token = get_authorization_scheme_param(request.headers["Authorization"])
    return tokens.login(token)


# Some routes hash a password between two statements. They hold no connection meanwhile, so these
# statements are separate on purpose: each has a parameter, and a name, of its own.
SeparateStatementDep = Annotated[OneStatement, Depends(get_statement, use_cache=False)]
LoginId = Annotated[UUID | None, Depends(get_login)]


def credentials(
    of: ColumnElement[bool], client: str, login: UUID | None = None
) -> Select[*tuple[Any, ...]]:
    """Return a query for what `PasswordGuard.verify` needs to know of an account.

    login: the id of a login session; `is_logged_in` says whether it has not ended.
    """
    return select(
        col(User.id),
        col(User.email),
        col(User.password_hash),
        col(User.email_verified_at),
        refresh_tokens.has_login_from(client).label("is_known"),
        refresh_tokens.has_login(login).label("is_logged_in"),
    ).where(of)


def token_pair(tokens: OwnTokens, user_id: UUID, refresh: str) -> TokenPair:
    return TokenPair(
        access_token=tokens.issue(str(user_id), refresh_tokens.login_of(refresh)),
        expires_in=ACCESS_TOKEN_SECONDS,
        refresh_token=refresh,
    )


async def require_password(guard: PasswordGuard, password: Secret[str], user: Row | None) -> Row:
    """Return an account whose password is right. Raises HTTPException, RequestValidationError."""
    if user is None:
        raise no_account()
    valid, _ = await guard.verify(user["email"], password.get_secret_value(), user)
    if not valid:
        raise wrong_password()
    return user


def refuse_own_address(password: Secret[str], email: str, field: str) -> None:
    """Raise RequestValidationError if a new password is the e-mail address, or its first part."""
    if is_own_address(password.get_secret_value(), email):
        raise mistake("own_address", field, OWN_ADDRESS)


def changed_meanwhile() -> HTTPException:
    """Return a 503: after the check of the password, another request changed or rehashed it."""
    return unavailable("the account is being changed, try again")


def wrong_password() -> RequestValidationError:
    return mistake("wrong_password", "current_password", "The current password is wrong")


def mistake(rule: str, field: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"type": rule, "loc": ("body", field), "msg": message}])
