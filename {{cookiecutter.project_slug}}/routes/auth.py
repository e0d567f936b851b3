"""Accounts of users who log in with us. They are not mounted where Better Auth has the accounts.

A log-in is one row of `refresh_tokens`, its family; each refresh replaces the hash in it. Whoever
comes with an earlier token of the family shows that two parties have it, and ends it for both.
"""

import hashlib
import secrets
from datetime import timedelta
from typing import Annotated
from uuid import UUID, uuid4

import structlog
from fastapi import APIRouter, Depends, Form, HTTPException, Request, Response, status
from fastapi.exceptions import RequestValidationError
from sqlalchemy import ColumnElement, Executable, delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import Session, col
from uuid_utils.compat import uuid7

from auth import ACCESS_TOKEN_SECONDS, CurrentUserId, OwnTokens, unauthorized
from db import DatabaseDep, StatementDep
from models import RefreshToken, Task, User
from passwords import PasswordGuardDep
from schemas.auth import (
    LoginForm,
    PasswordChange,
    RefreshRequest,
    Registration,
    TokenPair,
    UserPublic,
)
from schemas.problem import BODY, problems

REFRESH_TOKEN_LIFE = timedelta(days=30)  # from each refresh on
# Two tabs of a browser may come with one token at the same moment, which is no theft.
SAME_MOMENT = timedelta(seconds=5)

COLUMNS = [col(getattr(User, name)) for name in UserPublic.model_fields]

router = APIRouter(prefix="/auth", tags=["auth"])
log = structlog.get_logger()


async def get_tokens(request: Request) -> OwnTokens:
    tokens: OwnTokens = request.app.state.verifier
    return tokens


OwnTokensDep = Annotated[OwnTokens, Depends(get_tokens)]


async def get_account_id(user_id: CurrentUserId) -> UUID:
    return UUID(user_id)


AccountId = Annotated[UUID, Depends(get_account_id)]


def new_refresh_token(family_id: UUID) -> str:
    """Return a token that names its family. Clients need not know that."""
    return f"{family_id.hex}.{secrets.token_urlsafe(32)}"


def family_of(token: str) -> UUID | None:
    family, _, _ = token.partition(".")
    try:
        return UUID(hex=family)
    except ValueError:
        return None


def hash_token(token: str) -> bytes:
    """A fast hash will do for a token: nobody guesses 256 random bits."""
    return hashlib.sha256(token.encode()).digest()


def start_family(token: str, user_id: UUID, verified: ColumnElement[bool]) -> Executable:
    """Return the statement that stores a log-in's first token, and removes those that expired.

    It yields a row if `verified` still holds for the user. Who changes the password at the same
    time holds a lock on that row: this statement waits for it, and then sees the change.
    """
    family_id = literal(family_of(token))
    expires_at = func.now() + REFRESH_TOKEN_LIFE
    owner = select(family_id, family_id, col(User.id), literal(hash_token(token)), expires_at)
    expired = delete(RefreshToken).where(
        col(RefreshToken.user_id) == user_id, col(RefreshToken.expires_at) <= func.now()
    )
    return (
        insert(RefreshToken)
        .from_select(
            ["id", "family_id", "user_id", "token_hash", "expires_at"],
            owner.where(verified).with_for_update(read=True),
        )
        .add_cte(expired.cte("expired"))
        .returning(col(RefreshToken.id))
    )


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
    database: DatabaseDep,
    guard: PasswordGuardDep,
    tokens: OwnTokensDep,
    response: Response,
) -> TokenPair:
    """Log in with e-mail and password."""
    wrong = unauthorized("wrong e-mail address or password")
    users = select(col(User.id), col(User.password_hash)).where(col(User.email) == form.username)
    user = next(iter(await database.statement(users)), None)
    stored: str | None = user["password_hash"] if user else None
    password = form.password.get_secret_value()
    valid, better = await guard.verify(form.username, password, stored)
    if not valid or user is None:
        raise wrong
    verified = (col(User.id) == user["id"]) & (col(User.password_hash) == stored)
    if better:
        await database.statement(update(User).where(verified).values(password_hash=better))
        verified = (col(User.id) == user["id"]) & (col(User.password_hash) == better)
    token = new_refresh_token(uuid4())
    if not await database.statement(start_family(token, user["id"], verified)):
        raise wrong  # the password was changed meanwhile
    return token_pair(tokens, user["id"], token, response)


@router.post("/refresh", responses=problems(401, 503, *BODY))
async def refresh_token(
    body: RefreshRequest, database: DatabaseDep, tokens: OwnTokensDep, response: Response
) -> TokenPair:
    """Exchange a refresh token for the next pair of tokens. Each works once.

    One that was used before ends the log-in, because somebody else may have got hold of it.
    """
    presented = body.refresh_token.get_secret_value()
    invalid = unauthorized("the refresh token is not valid, or not any more")
    family_id = family_of(presented)
    if family_id is None:
        raise invalid
    token = new_refresh_token(family_id)
    # Of two requests with one token, the second waits for the first one's lock, and finds another.
    current = update(RefreshToken).where(
        col(RefreshToken.id) == family_id,
        col(RefreshToken.token_hash) == hash_token(presented),
        col(RefreshToken.expires_at) > func.now(),
    )
    rotated = current.values(
        token_hash=hash_token(token),
        used_at=func.now(),
        expires_at=func.now() + REFRESH_TOKEN_LIFE,
    )
    for family in await database.statement(rotated.returning(col(RefreshToken.user_id))):
        return token_pair(tokens, family["user_id"], token, response)

    reused = delete(RefreshToken).where(
        col(RefreshToken.id) == family_id,
        col(RefreshToken.token_hash) != hash_token(presented),
        col(RefreshToken.used_at) <= func.now() - SAME_MOMENT,
    )
    for family in await database.statement(reused.returning(col(RefreshToken.user_id))):
        log.warning("refresh token reused, log-in ended", user_id=str(family["user_id"]))
    raise invalid


@router.post(
    "/logout", status_code=status.HTTP_204_NO_CONTENT, responses=problems(503, *BODY)
)
async def logout(body: RefreshRequest, statement: StatementDep) -> None:
    """End a log-in: none of its refresh tokens works any more. Its access token runs out."""
    family_id = family_of(body.refresh_token.get_secret_value())
    if family_id is not None:
        await statement.all(delete(RefreshToken).where(col(RefreshToken.id) == family_id))


@router.post(
    "/password",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(401, 429, 503, *BODY),
)
async def change_password(
    body: PasswordChange, user_id: AccountId, database: DatabaseDep, guard: PasswordGuardDep
) -> None:
    """Change the password. All log-ins end, this one too."""
    users = select(col(User.password_hash)).where(col(User.id) == user_id)
    user = next(iter(await database.statement(users)), None)
    if user is None:
        raise gone()
    stored = user["password_hash"]
    valid, _ = await guard.verify(str(user_id), body.current_password.get_secret_value(), stored)
    if not valid:
        raise wrong_password()
    new_hash = await guard.hash(body.new_password.get_secret_value())

    def replace_password(session: Session) -> bool:
        same = (col(User.id) == user_id) & (col(User.password_hash) == stored)
        new = update(User).where(same).values(password_hash=new_hash)
        # In this order, a log-in at the same moment is either ended too, or finds the new hash.
        if session.execute(new.returning(col(User.id))).first() is None:
            return False
        session.execute(delete(RefreshToken).where(col(RefreshToken.user_id) == user_id))
        return True

    if not await database.transaction(replace_password):
        raise wrong_password()  # it was changed meanwhile


@router.get("/me", responses=problems(401, 503))
async def get_me(user_id: AccountId, statement: StatementDep) -> UserPublic:
    """Read the account."""
    user = await statement.first(select(*COLUMNS).where(col(User.id) == user_id))
    if user is None:
        raise gone()
    return UserPublic(**user)


@router.delete("/me", status_code=status.HTTP_204_NO_CONTENT, responses=problems(401, 503))
async def delete_me(user_id: AccountId, database: DatabaseDep) -> None:
    """Delete the account, with its tasks and log-ins."""

    def delete_account(session: Session) -> None:
        session.execute(delete(User).where(col(User.id) == user_id))  # log-ins go along
        session.execute(delete(Task).where(col(Task.owner_id) == str(user_id)))

    await database.transaction(delete_account)


def gone() -> HTTPException:
    return unauthorized("the account does not exist any more")


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
