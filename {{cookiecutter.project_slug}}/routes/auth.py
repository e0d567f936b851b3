"""Our own accounts. With Better Auth, which has its own, main.py does not include these routes.

Access tokens of a login session that has ended stay valid for up to 15 minutes: to revoke them,
each request would need a lookup. What destroys the account looks it up.
"""

from typing import Annotated
from uuid import UUID

import structlog
from fastapi import APIRouter, Depends, Form, HTTPException, Request, Response, status
from fastapi.exceptions import RequestValidationError
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import Secret
from sqlalchemy import ColumnElement, Executable, delete, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col
from uuid_utils.compat import uuid7

from auth import (
    CurrentUserId,
    account_id,
    no_account,
    refresh_tokens,
    unauthorized,
    unavailable,
)
from auth.passwords import PasswordGuard, PasswordGuardDep, normalize
from auth.tokens import ACCESS_TOKEN_SECONDS, OwnTokens
from db import OneStatement, Row, SessionDep, StatementDep, get_statement
from errors import found
from models import User, owned_tables
from resources import resources
from schemas.auth import (
    AccountDeletion,
    LoginForm,
    LoginSession,
    PasswordChange,
    RefreshRequest,
    Registration,
    TokenPair,
    UserPublic,
)
from schemas.problem import BODY, problems

COLUMNS = [col(getattr(User, name)) for name in UserPublic.model_fields]

router = APIRouter(prefix="/auth", tags=["auth"])


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
Login = Annotated[UUID | None, Depends(get_login)]


def credentials(of: ColumnElement[bool], client: str, login: UUID | None = None) -> Executable:
    """Return a query for what `PasswordGuard.verify` needs to know of an account.

    login: the id of a login session; `is_logged_in` says whether it has not ended.
    """
    return select(
        col(User.id),
        col(User.email),
        col(User.password_hash),
        refresh_tokens.has_login_from(client).label("is_known"),
        refresh_tokens.has_login(login).label("is_logged_in"),
    ).where(of)


def token_pair(tokens: OwnTokens, user_id: UUID, refresh: str, response: Response) -> TokenPair:
    response.headers["Cache-Control"] = "no-store"  # required by RFC 6749, 5.1
    return TokenPair(
        access_token=tokens.issue(str(user_id), refresh_tokens.login_of(refresh)),
        expires_in=ACCESS_TOKEN_SECONDS,
        refresh_token=refresh,
    )


@router.post(
    "/register",
    status_code=status.HTTP_201_CREATED,
    responses=problems(409, 429, 503, *BODY),
)
async def register(
    body: Registration, statement: StatementDep, guard: PasswordGuardDep
) -> UserPublic:
    """Create an account.

    The password must not be one that many people use, nor the e-mail address.
    """
    refuse_own_address(body.password, body.email, "password")
    await guard.begin_registration()
    # Hashed even if the address is taken, so that the response time does not reveal it.
    password_hash = await guard.hash(body.password.get_secret_value())
    new = insert(User).values(
        id=uuid7(), email=body.email, name=body.name, password_hash=password_hash
    )
    # An error instead of "do nothing" would write the address into PostgreSQL's log.
    new = new.on_conflict_do_nothing(index_elements=[col(User.email)])
    user = await statement.first(new.returning(*COLUMNS))
    if user is None:
        await guard.fail()
        structlog.get_logger().warning("registration refused: address taken", client=guard.client)
        raise HTTPException(status.HTTP_409_CONFLICT, "this e-mail address is taken")
    structlog.get_logger().info("account created", user_id=str(user["id"]), client=guard.client)
    return UserPublic(**user)


@router.post("/login", responses=problems(401, 429, 503, *BODY))
async def login(
    form: Annotated[LoginForm, Form()],
    find_user: SeparateStatementDep,
    store_new_hash: SeparateStatementDep,
    start_login: SeparateStatementDep,
    guard: PasswordGuardDep,
    tokens: OwnTokensDep,
    response: Response,
) -> TokenPair:
    """Log in with e-mail and password."""
    user = await find_user.first(credentials(col(User.email) == form.username, guard.client))
    password = form.password.get_secret_value()
    valid, new_hash = await guard.verify(form.username, password, user)
    if not valid or user is None:
        raise unauthorized("wrong e-mail address or password")
    verified = (col(User.id) == user["id"]) & (col(User.password_hash) == user["password_hash"])
    if new_hash:
        await store_new_hash.all(update(User).where(verified).values(password_hash=new_hash))
        verified = (col(User.id) == user["id"]) & (col(User.password_hash) == new_hash)
    token = refresh_tokens.new_token()
    start = refresh_tokens.start(token, user["id"], verified, guard.client)
    if not await start_login.all(start):
        raise changed_meanwhile()
    structlog.get_logger().info("logged in", user_id=str(user["id"]), client=guard.client)
    return token_pair(tokens, user["id"], token, response)


@router.post("/refresh", responses=problems(401, 503, *BODY))
async def refresh_token(
    body: RefreshRequest,
    replace: SeparateStatementDep,
    end_if_reused: SeparateStatementDep,
    guard: PasswordGuardDep,
    tokens: OwnTokensDep,
    response: Response,
) -> TokenPair:
    """Exchange a refresh token for the next pair of tokens.

    If the response is lost, send the token again within a minute: the response has the same new
    refresh token. Sending it later, or after the new one was used, ends the login session, because
    somebody else may have stolen it.
    """
    token = body.refresh_token.get_secret_value()
    successor = refresh_tokens.next_token(token, tokens.refresh_key)
    if login := await replace.first(refresh_tokens.replace(token, successor)):
        return token_pair(tokens, login["user_id"], successor, response)
    if login := await end_if_reused.first(refresh_tokens.end_if_reused(token, successor)):
        event = "refresh token reused, login session ended"
        structlog.get_logger().warning(event, user_id=str(login["user_id"]), client=guard.client)
    raise unauthorized("the refresh token is invalid, has expired or was used before")


@router.post("/logout", status_code=status.HTTP_204_NO_CONTENT, responses=problems(503, *BODY))
async def logout(body: RefreshRequest, statement: StatementDep) -> None:
    """End a login session. Its refresh tokens stop working; its access token expires by itself."""
    await statement.all(refresh_tokens.end(body.refresh_token.get_secret_value()))


@router.post("/password", responses=problems(401, 429, 503, *BODY))
async def change_password(
    body: PasswordChange,
    user_id: AccountId,
    statement: StatementDep,
    session: SessionDep,
    guard: PasswordGuardDep,
    tokens: OwnTokensDep,
    response: Response,
) -> TokenPair:
    """Change the password. This ends all login sessions and begins a new one for the caller."""
    account = await statement.first(credentials(col(User.id) == user_id, guard.client))
    user = await require_password(guard, body.current_password, account)
    refuse_own_address(body.new_password, user["email"], "new_password")
    new_hash = await guard.hash(body.new_password.get_secret_value())

    same = (col(User.id) == user_id) & (col(User.password_hash) == user["password_hash"])
    new = update(User).where(same).values(password_hash=new_hash).returning(col(User.id))
    # In this order, a login at the same time is ended too, or fails because of the new hash.
    if (await session.exec(new)).first() is None:
        raise changed_meanwhile()
    await session.exec(refresh_tokens.end_all(user_id))
    token = refresh_tokens.new_token()
    changed = col(User.id) == user_id
    await session.exec(refresh_tokens.start(token, user_id, changed, guard.client))
    await session.commit()
    return token_pair(tokens, user_id, token, response)


@router.get("/me", responses=problems(401, 503))
async def get_me(user_id: AccountId, statement: StatementDep) -> UserPublic:
    """Read the account."""
    user = await statement.first(select(*COLUMNS).where(col(User.id) == user_id))
    if user is None:
        raise no_account()
    return UserPublic(**user)


@router.delete(
    "/me",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(401, 429, 503, *BODY),
)
async def delete_me(
    body: AccountDeletion,
    user_id: AccountId,
    login: Login,
    statement: StatementDep,
    session: SessionDep,
    guard: PasswordGuardDep,
) -> None:
    """Delete the account with all that it owns and its login sessions.

    The access token must belong to a login session that has not ended.
    """
    account = await statement.first(credentials(col(User.id) == user_id, guard.client, login))
    if account is not None and not account["is_logged_in"]:
        raise unauthorized("the login session of this token has ended: log in again")
    user = await require_password(guard, body.current_password, account)
    same = (col(User.id) == user_id) & (col(User.password_hash) == user["password_hash"])
    # ON DELETE CASCADE deletes its login sessions.
    if (await session.exec(delete(User).where(same).returning(col(User.id)))).first() is None:
        raise changed_meanwhile()
    for table in owned_tables():
        await session.exec(delete(table).where(table.c.owner_id == str(user_id)))
    await session.commit()
    structlog.get_logger().info("account deleted", user_id=str(user_id), client=guard.client)


@router.get("/sessions", responses=problems(401, 503))
async def list_sessions(
    user_id: AccountId, login: Login, statement: StatementDep
) -> list[LoginSession]:
    """List the login sessions of the account, the one that was used last first."""
    rows = await statement.all(refresh_tokens.sessions_of(user_id, login))
    return [LoginSession(**row) for row in rows]


@router.delete("/sessions", status_code=status.HTTP_204_NO_CONTENT, responses=problems(401, 503))
async def end_other_sessions(user_id: AccountId, login: Login, statement: StatementDep) -> None:
    """End all login sessions of the account but the one that the access token belongs to."""
    await statement.all(refresh_tokens.end_others(user_id, login))


@router.delete(
    "/sessions/{session_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(401, 404, 422, 503),
)
async def end_session(session_id: UUID, user_id: AccountId, statement: StatementDep) -> None:
    """End a login session of the account."""
    row = await statement.first(refresh_tokens.end_one(user_id, session_id))
    found(row, "login session")


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
    text = password.get_secret_value().casefold()
    if text in {normalize(part).casefold() for part in (email, email.partition("@")[0])}:
        raise mistake("own_address", field, "choose a password other than the e-mail address")


def changed_meanwhile() -> HTTPException:
    """Return a 503: after the check of the password, another request changed or rehashed it."""
    return unavailable("the account is being changed, try again")


def wrong_password() -> RequestValidationError:
    return mistake("wrong_password", "current_password", "The current password is wrong")


def mistake(rule: str, field: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"type": rule, "loc": ("body", field), "msg": message}])
