"""The account that is logged in, and the ways back to it: its data, its password, its address."""

from functools import partial
from uuid import UUID

import structlog
from fastapi import APIRouter, HTTPException, Request, Response, status
from fastapi.exceptions import RequestValidationError
from pydantic import Secret
from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.orm import aliased
from sqlmodel import col

from auth import links, no_account, refresh_tokens, unauthorized
from auth.accounts import (
    COLUMNS,
    AccountId,
    Login,
    OwnTokensDep,
    SeparateStatementDep,
    changed_meanwhile,
    credentials,
    mistake,
    refuse_own_address,
    require_password,
    token_pair,
)
from auth.passwords import PasswordGuard, PasswordGuardDep
from config import Settings
from db import OneStatement, SessionDep, StatementDep
from mail import Message
from models import User, delete_owned
from resources import resources
from schemas.auth import (
    AccountDeletion,
    AccountUpdate,
    AddressOnly,
    AddressVerification,
    PasswordChange,
    PasswordReset,
    TokenPair,
    UserPublic,
)
from schemas.problem import BODY, problems

router = APIRouter(prefix="/auth", tags=["auth"])


@router.get("/me", responses=problems(401, 503))
async def get_me(user_id: AccountId, statement: StatementDep) -> UserPublic:
    """Read the account."""
    user = await statement.first(select(*COLUMNS).where(col(User.id) == user_id))
    if user is None:
        raise no_account()
    return UserPublic(**user)


@router.patch("/me", responses=problems(401, 429, 503, *BODY))
async def update_me(
    body: AccountUpdate,
    user_id: AccountId,
    request: Request,
    find_user: SeparateStatementDep,
    update_user: SeparateStatementDep,
    guard: PasswordGuardDep,
) -> UserPublic:
    """Change the name, and with the current password the e-mail address.

    A new address counts when the link that is mailed to it was followed: until then, the response
    has the old one.
    """
    changes = body.model_dump(exclude_unset=True, include={"name"})
    if "email" in body.model_fields_set:
        await request_new_address(body, user_id, request, find_user, guard)
    of_user = col(User.id) == user_id
    statement = update(User).where(of_user).values(changes).returning(*COLUMNS)
    user = await update_user.first(statement if changes else select(*COLUMNS).where(of_user))
    if user is None:
        raise no_account()
    return UserPublic(**user)


async def request_new_address(
    body: AccountUpdate,
    user_id: UUID,
    request: Request,
    find_user: OneStatement,
    guard: PasswordGuard,
) -> None:
    """Mail a link to the new address, if the password is right. Raises as `verify` does.

    To an address that has an account, the message says so: the response must not.
    """
    require_mail(request)
    if "current_password" not in body.model_fields_set:
        raise mistake("missing", "current_password", "The current password is required")
    account = credentials(col(User.id) == user_id, guard.client)
    is_taken = exists().where(col(User.email) == body.email).label("is_taken")
    user = await require_password(
        guard, body.current_password, await find_user.first(account.add_columns(is_taken))
    )
    if body.email == user["email"] or not await guard.begin_mail(body.email):
        return
    if user["is_taken"]:
        settings = resources(request).settings
        resources(request).mailer.send(partial(links.taken_message, settings, body.email))
    else:
        mail_verification(request, user_id, body.email, user["email"])


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
    for rows in delete_owned(str(user_id)).values():
        await session.exec(rows)
    await session.commit()
    structlog.get_logger().info("account deleted", user_id=str(user_id), client=guard.client)


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


@router.post(
    "/password/forgot",
    status_code=status.HTTP_202_ACCEPTED,
    response_class=Response,
    responses=problems(429, 503, *BODY),
)
async def forgot_password(
    body: AddressOnly, request: Request, statement: StatementDep, guard: PasswordGuardDep
) -> None:
    """Mail a link to choose a new password, if there is an account with this address.

    The response does not tell whether there is one. The link works once, for an hour.
    """
    require_mail(request)
    may_send = await guard.begin_mail(body.email)
    query = select(col(User.id), col(User.password_hash)).where(col(User.email) == body.email)
    user = await statement.first(query)
    structlog.get_logger().info(
        "password forgotten", user_id=str(user["id"]) if user else None, client=guard.client
    )
    if user is None or not may_send:
        return
    settings = resources(request).settings

    def make() -> Message:
        token = links.reset_token(
            settings, user["id"], body.email, user["password_hash"], links.RESET_SECONDS
        )
        return links.reset_message(settings, body.email, token)

    resources(request).mailer.send(make)


@router.post(
    "/password/reset",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(429, 503, *BODY),
)
async def reset_password(
    body: PasswordReset,
    request: Request,
    statement: StatementDep,
    session: SessionDep,
    guard: PasswordGuardDep,
) -> None:
    """Set a new password with the token of a mailed link. This ends all login sessions.

    It proves the address, too.
    """
    settings = resources(request).settings
    user_id, claims = await read_link(guard, settings, links.RESET, body.token)
    user = await statement.first(credentials(col(User.id) == user_id, guard.client))
    if user is None or claims["state"] != links.fingerprint(
        settings, user["email"], user["password_hash"]
    ):
        raise await wrong_link(guard)
    refuse_own_address(body.new_password, user["email"], "new_password")
    new_hash = await guard.hash(body.new_password.get_secret_value())

    verified_at = func.coalesce(col(User.email_verified_at), func.now())
    new = (
        update(User)
        .where(
            col(User.id) == user_id,
            col(User.email) == user["email"],
            col(User.password_hash) == user["password_hash"],
        )
        .values(password_hash=new_hash, email_verified_at=verified_at)
        .returning(col(User.id))
    )
    if (await session.exec(new)).first() is None:
        raise await wrong_link(guard)
    await session.exec(refresh_tokens.end_all(user_id))
    await session.commit()
    structlog.get_logger().info("password reset", user_id=str(user_id), client=guard.client)


@router.post(
    "/verify/resend",
    status_code=status.HTTP_202_ACCEPTED,
    response_class=Response,
    responses=problems(429, 503, *BODY),
)
async def resend_verification(
    body: AddressOnly, request: Request, statement: StatementDep, guard: PasswordGuardDep
) -> None:
    """Mail another link that verifies an address, if it belongs to an account and is not verified.

    The response does not tell whether it does.
    """
    require_mail(request)
    may_send = await guard.begin_mail(body.email)
    unverified = (col(User.email) == body.email) & col(User.email_verified_at).is_(None)
    user = await statement.first(select(col(User.id)).where(unverified))
    if user is not None and may_send:
        mail_verification(request, user["id"], body.email, body.email)


@router.post(
    "/verify",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(409, 429, 503, *BODY),
)
async def verify_address(
    body: AddressVerification,
    request: Request,
    find_user: SeparateStatementDep,
    update_user: SeparateStatementDep,
    guard: PasswordGuardDep,
) -> None:
    """Verify an e-mail address with the token of a mailed link. A new one replaces the old one."""
    settings = resources(request).settings
    user_id, claims = await read_link(guard, settings, links.VERIFY, body.token)
    of_user = col(User.id) == user_id
    user = await find_user.first(select(col(User.email)).where(of_user))
    old, new = user["email"] if user else "", claims["email"]
    # Repeated, the link of a new address finds it in place.
    if user is None or (old != new and claims["state"] != links.fingerprint(settings, old)):
        raise await wrong_link(guard)

    first = col(User.email_verified_at) if old == new else None
    other = aliased(User)
    # An error of the unique index would write the address into PostgreSQL's log.
    is_free = ~exists().where(col(other.email) == new, col(other.id) != user_id)
    change = (
        update(User)
        .where(of_user, col(User.email) == old, is_free)
        .values(email=new, email_verified_at=func.coalesce(first, func.now()))
        .returning(col(User.id))
    )
    if await update_user.first(change) is None:
        raise HTTPException(status.HTTP_409_CONFLICT, "this e-mail address is taken")
    structlog.get_logger().info("address verified", user_id=str(user_id), client=guard.client)
    if old != new:
        resources(request).mailer.send(partial(links.changed_message, settings, old))


def require_mail(request: Request) -> None:
    """Raise HTTPException, a 503, if no mail can be sent. Waiting would not help."""
    if not resources(request).mailer.can_send:
        detail = "this server cannot send mail"
        raise HTTPException(status.HTTP_503_SERVICE_UNAVAILABLE, detail)


def mail_verification(request: Request, user_id: UUID, email: str, current_email: str) -> None:
    """Mail a link to an address: the account's, or one that is to replace it."""
    settings = resources(request).settings

    def make() -> Message:
        token = links.verify_token(settings, user_id, email, current_email)
        return links.verify_message(settings, email, token)

    resources(request).mailer.send(make)


async def read_link(
    guard: PasswordGuard, settings: Settings, purpose: str, token: Secret[str]
) -> tuple[UUID, dict[str, str]]:
    """Return what the token of a link says. Raises RequestValidationError, HTTPException."""
    await guard.require_below_limit()
    try:
        return links.read(settings, purpose, token.get_secret_value())
    except links.InvalidLink:
        raise await wrong_link(guard) from None


async def wrong_link(guard: PasswordGuard) -> RequestValidationError:
    await guard.fail()
    structlog.get_logger().warning("wrong link", client=guard.client)
    return mistake(
        "wrong_link", "token", "The link has expired or was used before: ask for a new one"
    )
