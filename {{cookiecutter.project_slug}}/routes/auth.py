"""Our own accounts. With Better Auth, which has its own, main.py does not include these routes.

Access tokens of a login session that has ended stay valid for up to 15 minutes: revoking them would
need a lookup in the database for each request.
"""

from typing import Annotated
from uuid import UUID

import structlog
from fastapi import APIRouter, Form, HTTPException, Request, status
from sqlalchemy import update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col
from uuid_utils.compat import uuid7

from auth import refresh_tokens, unauthorized
from auth.accounts import (
    COLUMNS,
    AccountId,
    LoginId,
    OwnTokensDep,
    SeparateStatementDep,
    changed_meanwhile,
    credentials,
    refuse_own_address,
    token_pair,
)
from auth.passwords import PasswordGuardDep
from db import StatementDep
from errors import found
from models import User
from resources import resources
from routes.mail_links import mail_verification
from schemas.auth import (
    LoginForm,
    LoginSession,
    RefreshRequest,
    Registration,
    TokenPair,
    UserPublic,
)
from schemas.problem import BODY, problems

router = APIRouter(prefix="/auth", tags=["auth"])


@router.post(
    "/register",
    status_code=status.HTTP_201_CREATED,
    responses=problems(403, 409, 429, 503, *BODY),
)
async def register(
    body: Registration, request: Request, statement: StatementDep, guard: PasswordGuardDep
) -> UserPublic:
    """Create an account, if registration is open, and mail a link that verifies its address.

    The password must not be one that many people use, nor the e-mail address or its part
    before the `@`.
    """
    if not resources(request).settings.is_registration_open:
        structlog.get_logger().warning("registration refused: closed", client=guard.client)
        raise HTTPException(status.HTTP_403_FORBIDDEN, "registration is closed")
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
    if resources(request).mailer.can_send:
        mail_verification(request, user["id"], body.email)
    return UserPublic(**user)


@router.post("/login", responses=problems(401, 403, 429, 503, *BODY))
async def login(
    form: Annotated[LoginForm, Form()],
    request: Request,
    find_user: SeparateStatementDep,
    store_new_hash: SeparateStatementDep,
    start_login: SeparateStatementDep,
    guard: PasswordGuardDep,
    tokens: OwnTokensDep,
) -> TokenPair:
    """Log in with e-mail and password."""
    user = await find_user.first(credentials(col(User.email) == form.username, guard.client))
    password = form.password.get_secret_value()
    valid, new_hash = await guard.verify(form.username, password, user)
    if not valid or user is None:
        raise unauthorized("wrong e-mail address or password")
    require_verified = resources(request).settings.require_verified_email
    if require_verified and user["email_verified_at"] is None:
        detail = "verify your e-mail address first: open the link that was mailed to it"
        raise HTTPException(status.HTTP_403_FORBIDDEN, detail)
    verified = (col(User.id) == user["id"]) & (col(User.password_hash) == user["password_hash"])
    if new_hash:
        await store_new_hash.all(update(User).where(verified).values(password_hash=new_hash))
        verified = (col(User.id) == user["id"]) & (col(User.password_hash) == new_hash)
    token = refresh_tokens.new_token()
    start = refresh_tokens.start(token, user["id"], verified, guard.client)
    if not await start_login.all(start):
        raise changed_meanwhile()
    structlog.get_logger().info("logged in", user_id=str(user["id"]), client=guard.client)
    return token_pair(tokens, user["id"], token)


@router.post("/refresh", responses=problems(401, 503, *BODY))
async def refresh_token(
    body: RefreshRequest,
    request: Request,
    replace: SeparateStatementDep,
    end_if_reused: SeparateStatementDep,
    guard: PasswordGuardDep,
    tokens: OwnTokensDep,
) -> TokenPair:
    """Exchange a refresh token for the next pair of tokens.

    If the response is lost, send the token again within a minute: the response has the same new
    refresh token. Sending it later, or after the new one was used, ends the login session, because
    somebody else may have stolen it.
    """
    token = body.refresh_token.get_secret_value()
    successor = refresh_tokens.next_token(token, tokens.refresh_key)
    verified_only = resources(request).settings.require_verified_email
    replacement = refresh_tokens.replace(token, successor, verified_only=verified_only)
    if row := await replace.first(replacement):
        return token_pair(tokens, row["user_id"], successor)
    if row := await end_if_reused.first(refresh_tokens.end_if_reused(token, successor)):
        event = "refresh token reused, login session ended"
        structlog.get_logger().warning(event, user_id=str(row["user_id"]), client=guard.client)
    raise unauthorized("the refresh token is invalid, has expired or was used before")


@router.post("/logout", status_code=status.HTTP_204_NO_CONTENT, responses=problems(503, *BODY))
async def logout(body: RefreshRequest, statement: StatementDep) -> None:
    """End a login session. Its refresh tokens stop working; its access token expires by itself."""
    await statement.all(refresh_tokens.end(body.refresh_token.get_secret_value()))


@router.get("/sessions", responses=problems(401, 503))
async def list_sessions(
    user_id: AccountId, login: LoginId, statement: StatementDep
) -> list[LoginSession]:
    """List the login sessions of the account, the one that was used last first."""
    rows = await statement.all(refresh_tokens.sessions_of(user_id, login))
    return [LoginSession(**row) for row in rows]


@router.delete("/sessions", status_code=status.HTTP_204_NO_CONTENT, responses=problems(401, 503))
async def end_other_sessions(user_id: AccountId, login: LoginId, statement: StatementDep) -> None:
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
