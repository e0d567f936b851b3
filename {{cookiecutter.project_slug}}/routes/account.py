"""The account that is logged in: its data, its password, its address."""

from functools import partial
from uuid import UUID

import structlog
from fastapi import APIRouter, Request, status
from sqlalchemy import delete, exists, select, update
from sqlmodel import col

from auth import links, no_account, refresh_tokens, unauthorized
from auth.accounts import (
    COLUMNS,
    AccountId,
    LoginId,
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
from db import OneStatement, SessionDep, StatementDep
from mail import Message
from models import User, delete_owned
from resources import resources
from routes.mail_links import report_new_password, require_mail
from schemas.auth import (
    AccountDeletion,
    AccountUpdate,
    PasswordChange,
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

    A new address takes effect once the link that is mailed to it is followed: until then, the
    response has the old one.
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

    If the address already has an account, the message says so; the response must not reveal it.
    """
    require_mail(request)
    await guard.begin_mail_request()
    if "current_password" not in body.model_fields_set:
        raise mistake("missing", "current_password", "The current password is required")
    account = credentials(col(User.id) == user_id, guard.client)
    is_taken = exists().where(col(User.email) == body.email).label("is_taken")
    user = await require_password(
        guard, body.current_password, await find_user.first(account.add_columns(is_taken))
    )
    if body.email == user["email"] or not await guard.may_mail("new address", body.email):
        return
    structlog.get_logger().info("new address asked for", user_id=str(user_id), client=guard.client)
    settings, mailer = resources(request).settings, resources(request).mailer
    if user["is_taken"]:
        mailer.send(partial(links.taken_message, settings, body.email))
        return

    def make() -> Message:
        token = links.new_address_token(
            settings, user_id, body.email, user["email"], user["password_hash"]
        )
        return links.verify_message(settings, body.email, token)

    mailer.send(make)


@router.delete(
    "/me",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(401, 429, 503, *BODY),
)
async def delete_me(
    body: AccountDeletion,
    user_id: AccountId,
    login: LoginId,
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
    for deletion in delete_owned(str(user_id)).values():
        await session.exec(deletion)
    await session.commit()
    structlog.get_logger().info("account deleted", user_id=str(user_id), client=guard.client)


@router.post("/password", responses=problems(401, 429, 503, *BODY))
async def change_password(
    body: PasswordChange,
    user_id: AccountId,
    request: Request,
    statement: StatementDep,
    session: SessionDep,
    guard: PasswordGuardDep,
    tokens: OwnTokensDep,
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
    report_new_password(request, user_id, user["email"], guard)
    return token_pair(tokens, user_id, token)
