"""The links that are mailed: to choose a new password, and to verify an e-mail address."""

from functools import partial
from uuid import UUID

import structlog
from fastapi import APIRouter, HTTPException, Request, Response, status
from fastapi.exceptions import RequestValidationError
from pydantic import Secret
from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import aliased
from sqlmodel import col

from auth import links, refresh_tokens
from auth.accounts import SeparateStatementDep, credentials, mistake, refuse_own_address
from auth.passwords import PasswordGuard, PasswordGuardDep
from config import Settings
from db import SessionDep, StatementDep
from mail import Message
from models import User
from resources import resources
from schemas.auth import AddressOnly, AddressVerification, PasswordReset
from schemas.problem import BODY, problems

router = APIRouter(prefix="/auth", tags=["auth"])


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
    await guard.begin_mail_request()
    query = select(col(User.id), col(User.password_hash)).where(col(User.email) == body.email)
    user = await statement.first(query)
    structlog.get_logger().info(
        "password forgotten", user_id=str(user["id"]) if user else None, client=guard.client
    )
    may_mail = await guard.may_mail("password", body.email, is_due=user is not None)
    if user is None or not may_mail:
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

    It verifies the address, too.
    """
    settings = resources(request).settings
    user_id, claims = await read_link(guard, settings, links.RESET, body.token)
    user = await statement.first(credentials(col(User.id) == user_id, guard.client))
    if user is None or claims.get("state") != links.fingerprint(
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
    await guard.prove(user["email"])
    report_new_password(request, user_id, user["email"], guard)


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
    await guard.begin_mail_request()
    unverified = (col(User.email) == body.email) & col(User.email_verified_at).is_(None)
    user = await statement.first(select(col(User.id)).where(unverified))
    may_mail = await guard.may_mail("verification", body.email, is_due=user is not None)
    if user is not None and may_mail:
        mail_verification(request, user["id"], body.email)


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
    find_again: SeparateStatementDep,
    guard: PasswordGuardDep,
) -> None:
    """Verify an e-mail address with the token of a mailed link. A new one replaces the old one."""
    settings = resources(request).settings
    user_id, claims = await read_link(guard, settings, links.VERIFY, body.token)
    of_user = col(User.id) == user_id
    query = select(col(User.email), col(User.password_hash)).where(of_user)
    user = await find_user.first(query)
    if user is None:
        raise await wrong_link(guard)
    old, new = user["email"], claims["email"]
    state = links.fingerprint(settings, old, user["password_hash"])
    # The link of a new address that is followed again finds it in place.
    if old != new and claims.get("state") != state:
        raise await wrong_link(guard)

    other = aliased(User)
    # An error of the unique index would write the address into PostgreSQL's log.
    is_free = ~exists().where(col(other.email) == new, col(other.id) != user_id)
    change = update(User).where(of_user, col(User.email) == old, is_free).returning(col(User.id))
    if old == new:
        first_verified_at = func.coalesce(col(User.email_verified_at), func.now())
        change = change.values(email_verified_at=first_verified_at)
    else:
        change = change.where(col(User.password_hash) == user["password_hash"])
        change = change.values(email=new, email_verified_at=func.now())
    if await update_user.first(change) is None:
        # Another request was first, such as that of a double click; or the address is taken.
        present = await find_again.first(query)
        if present == user:
            raise HTTPException(status.HTTP_409_CONFLICT, "this e-mail address is taken")
        if present is None or present["email"] != new:
            raise await wrong_link(guard)
        return
    structlog.get_logger().info("address verified", user_id=str(user_id), client=guard.client)
    if old != new:
        message = partial(links.changed_message, settings, old, "e-mail address")
        resources(request).mailer.send(message)


def require_mail(request: Request) -> None:
    """Raise HTTPException, a 503, if no mail can be sent. Waiting would not help."""
    if not resources(request).mailer.can_send:
        detail = "this server cannot send mail"
        raise HTTPException(status.HTTP_503_SERVICE_UNAVAILABLE, detail)


def mail_verification(request: Request, user_id: UUID, email: str) -> None:
    """Mail a link that verifies the address of an account."""
    settings = resources(request).settings

    def make() -> Message:
        token = links.verify_token(settings, user_id, email)
        return links.verify_message(settings, email, token)

    resources(request).mailer.send(make)


def report_new_password(request: Request, user_id: UUID, email: str, guard: PasswordGuard) -> None:
    """Tell the owner of an account, and the log, that its password has changed."""
    structlog.get_logger().info("password changed", user_id=str(user_id), client=guard.client)
    message = partial(links.changed_message, resources(request).settings, email, "password")
    resources(request).mailer.send(message)


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
