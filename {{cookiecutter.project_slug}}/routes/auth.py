"""Accounts of users who log in with us; with Better Auth, which has its own, they are not mounted.

A new password, and a deletion, end all log-ins of an account. Access tokens that are out already
go on for their 15 minutes at most: to stop them, each request would need a look-up.
"""

from typing import Annotated
from uuid import UUID

import structlog
from fastapi import APIRouter, Depends, Form, HTTPException, Request, Response, status
from fastapi.exceptions import RequestValidationError
from sqlalchemy import delete, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col
from uuid_utils.compat import uuid7

from auth import CurrentUserId, refresh_tokens, unauthorized, unavailable
from auth.passwords import PasswordGuardDep
from auth.tokens import ACCESS_TOKEN_SECONDS, OwnTokens
from db import OneStatement, SessionDep, StatementDep, get_statement
from models import RefreshToken, User, owned_tables
from schemas.auth import (
    LoginForm,
    PasswordChange,
    RefreshRequest,
    Registration,
    TokenPair,
    UserPublic,
)
from schemas.problem import BODY, problems

COLUMNS = [col(getattr(User, name)) for name in UserPublic.model_fields]

router = APIRouter(prefix="/auth", tags=["auth"])


async def get_tokens(request: Request) -> OwnTokens:
    tokens: OwnTokens = request.app.state.verifier
    return tokens


OwnTokensDep = Annotated[OwnTokens, Depends(get_tokens)]


async def get_account_id(user_id: CurrentUserId) -> UUID:
    try:
        return UUID(user_id)
    except ValueError:
        raise gone() from None  # it was never one of ours


# Between two of their statements, some routes wait for a password to be hashed. No connection is
# held meanwhile, so these are separate statements on purpose, each with a name.
SeparateStatementDep = Annotated[OneStatement, Depends(get_statement, use_cache=False)]
AccountId = Annotated[UUID, Depends(get_account_id)]


def token_pair(tokens: OwnTokens, user_id: UUID, refresh: str, response: Response) -> TokenPair:
    response.headers["Cache-Control"] = "no-store"  # as RFC 6749, 5.1 demands
    return TokenPair(
        access_token=tokens.issue(str(user_id)),
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
    """Open an account."""
    # Hashed before it is known whether the address is taken, so that the time does not tell.
    password_hash = await guard.hash(body.password.get_secret_value())
    new = insert(User).values(
        id=uuid7(), email=body.email, name=body.name, password_hash=password_hash
    )
    # Without a conflict, PostgreSQL does not write the address into its log.
    new = new.on_conflict_do_nothing(index_elements=[col(User.email)])
    user = await statement.first(new.returning(*COLUMNS))
    if user is None:
        await guard.fail()
        raise HTTPException(status.HTTP_409_CONFLICT, "this e-mail address is taken")
    return UserPublic(**user)


@router.post("/login", responses=problems(401, 429, 503, *BODY))
async def login(
    form: Annotated[LoginForm, Form()],
    find_user: SeparateStatementDep,
    store_better_hash: SeparateStatementDep,
    start_login: SeparateStatementDep,
    guard: PasswordGuardDep,
    tokens: OwnTokensDep,
    response: Response,
) -> TokenPair:
    """Log in with e-mail and password."""
    users = select(col(User.id), col(User.password_hash)).where(col(User.email) == form.username)
    user = await find_user.first(users)
    stored: str | None = user["password_hash"] if user else None
    password = form.password.get_secret_value()
    valid, better = await guard.verify(form.username, password, stored)
    if not valid or user is None:
        raise unauthorized("wrong e-mail address or password")
    verified = (col(User.id) == user["id"]) & (col(User.password_hash) == stored)
    if better:
        await store_better_hash.all(update(User).where(verified).values(password_hash=better))
        verified = (col(User.id) == user["id"]) & (col(User.password_hash) == better)
    token = refresh_tokens.new_token()
    if not await start_login.all(refresh_tokens.start(token, user["id"], verified)):
        raise changed_meanwhile()
    return token_pair(tokens, user["id"], token, response)


@router.post("/refresh", responses=problems(401, 503, *BODY))
async def refresh_token(
    body: RefreshRequest,
    replace: SeparateStatementDep,
    end_if_reused: SeparateStatementDep,
    tokens: OwnTokensDep,
    response: Response,
) -> TokenPair:
    """Exchange a refresh token for the next pair of tokens. Each works once.

    One that was used before ends the log-in, because somebody else may have got hold of it.
    """
    token = body.refresh_token.get_secret_value()
    successor = refresh_tokens.new_token(refresh_tokens.login_of(token))
    if login := await replace.first(refresh_tokens.replace(token, successor)):
        return token_pair(tokens, login["user_id"], successor, response)
    if login := await end_if_reused.first(refresh_tokens.end_if_reused(token)):
        user_id = str(login["user_id"])
        structlog.get_logger().warning("refresh token reused, log-in ended", user_id=user_id)
    raise unauthorized("the refresh token is not valid, or not any more")


@router.post("/logout", status_code=status.HTTP_204_NO_CONTENT, responses=problems(503, *BODY))
async def logout(body: RefreshRequest, statement: StatementDep) -> None:
    """End a log-in: none of its refresh tokens works any more. Its access token runs out."""
    await statement.all(refresh_tokens.end(body.refresh_token.get_secret_value()))


@router.post(
    "/password",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(401, 429, 503, *BODY),
)
async def change_password(
    body: PasswordChange,
    user_id: AccountId,
    statement: StatementDep,
    session: SessionDep,
    guard: PasswordGuardDep,
) -> None:
    """Change the password. All log-ins end, this one too."""
    users = select(col(User.password_hash)).where(col(User.id) == user_id)
    user = await statement.first(users)
    if user is None:
        raise gone()
    stored = user["password_hash"]
    valid, _ = await guard.verify(str(user_id), body.current_password.get_secret_value(), stored)
    if not valid:
        raise wrong_password()
    new_hash = await guard.hash(body.new_password.get_secret_value())

    same = (col(User.id) == user_id) & (col(User.password_hash) == stored)
    new = update(User).where(same).values(password_hash=new_hash).returning(col(User.id))
    # In this order, a log-in at the same moment is either ended too, or finds the new hash.
    if (await session.exec(new)).first() is None:
        raise changed_meanwhile()
    await session.exec(delete(RefreshToken).where(col(RefreshToken.user_id) == user_id))
    await session.commit()


@router.get("/me", responses=problems(401, 503))
async def get_me(user_id: AccountId, statement: StatementDep) -> UserPublic:
    """Read the account."""
    user = await statement.first(select(*COLUMNS).where(col(User.id) == user_id))
    if user is None:
        raise gone()
    return UserPublic(**user)


@router.delete("/me", status_code=status.HTTP_204_NO_CONTENT, responses=problems(401, 503))
async def delete_me(user_id: AccountId, session: SessionDep) -> None:
    """Delete the account, with all that it owns and its log-ins."""
    await session.exec(delete(User).where(col(User.id) == user_id))  # log-ins go along
    for table in owned_tables():
        await session.exec(delete(table).where(table.c.owner_id == str(user_id)))
    await session.commit()


def gone() -> HTTPException:
    return unauthorized("the account does not exist any more")


def changed_meanwhile() -> HTTPException:
    """The password that was verified is another one now, or is hashed anew. A retry will tell."""
    return unavailable("the account is being changed, try again")


def wrong_password() -> RequestValidationError:
    return RequestValidationError(
        [
            {
                "type": "wrong_password",
                "loc": ("body", "current_password"),
                "msg": "The current password is another one",
            }
        ]
    )
