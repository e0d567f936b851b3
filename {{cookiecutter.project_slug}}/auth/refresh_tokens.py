"""Refresh tokens: each yields its successor; using an earlier one again ends its login session.

A login session is one row, which stores the hash of its newest refresh token. Each token contains
the id of its session, so earlier tokens are recognized too. Statements that change a row wait for
its lock, so a session that has ended never yields another token.

A client may send a token again, because the response was lost or a second tab refreshed too. For
REPEATABLE, and until the successor is used, it gets the same successor. The successor is computed
from the token with a key of the app's, so nobody else can compute it, and it need not be stored.
"""

import hashlib
import hmac
import secrets
from base64 import urlsafe_b64encode
from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy import (
    ColumnElement,
    Delete,
    Executable,
    Exists,
    UpdateBase,
    case,
    delete,
    exists,
    func,
    literal,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from models import RefreshToken, User

LIFETIME = timedelta(days=30)  # of each token: a session that is not used for longer ends
MAX_SESSION_AGE = timedelta(days=90)  # of a session, however often it is used
REPEATABLE = timedelta(seconds=60)
MAX_SESSIONS = 100  # for each user
LAST_USED = func.coalesce(col(RefreshToken.replaced_at), col(RefreshToken.created_at))
MAX_ADDRESS = 64  # the width of its column: an address of IPv6 has fewer characters


def new_token() -> str:
    """Return the first refresh token of a new login session.

    The id is random, not a UUIDv7: anybody who knows it can end the session, by logging out or with
    a wrong token. Only its owner sees it, in access tokens and in the list of sessions.
    """
    return f"{uuid4().hex}.{secrets.token_urlsafe(32)}"


def next_token(token: str, key: bytes) -> str:
    """Return the one successor of a token."""
    digest = hmac.digest(key, token.encode(), "sha256")
    return f"{login_of(token).hex}.{urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def login_of(token: str) -> UUID:
    try:
        return UUID(hex=token.partition(".")[0])
    except ValueError:
        return UUID(int=0)  # no session has this id


def hash_token(token: str) -> bytes:
    """Return what is stored. A fast hash is enough: nobody can guess 256 random bits."""
    return hashlib.sha256(token.encode()).digest()


def start(token: str, user_id: UUID, verified: ColumnElement[bool], client: str) -> UpdateBase:
    """Return a statement that stores a new session and deletes the user's expired ones.

    It returns a row if `verified` still holds for the user. If the password is being changed at the
    same time, it waits for that change and sees it. If the user then has too many sessions, the
    least recently used one ends.
    """
    values = {
        "id": literal(login_of(token)),
        "user_id": col(User.id),
        "token_hash": literal(hash_token(token)),
        "expires_at": func.now() + LIFETIME,
        "address": literal(client[:MAX_ADDRESS]),
    }
    owner = select(*values.values()).where(verified).with_for_update(read=True)
    of_user = col(RefreshToken.user_id) == user_id
    kept = select(col(RefreshToken.id)).where(of_user)
    surplus = kept.order_by(LAST_USED.desc()).offset(MAX_SESSIONS - 1)
    old = (col(RefreshToken.expires_at) <= func.now()) | col(RefreshToken.id).in_(surplus)
    return (
        insert(RefreshToken)
        .from_select(list(values), owner)
        .add_cte(delete(RefreshToken).where(of_user, old).cte("old"))
        .returning(col(RefreshToken.id))
    )


def has_login_from(client: str) -> Exists:
    """Return whether a user, of an outer query, has a session that began at this client."""
    return exists().where(
        col(RefreshToken.user_id) == col(User.id),
        col(RefreshToken.address) == client[:MAX_ADDRESS],
    )


def has_login(login: UUID | None) -> Exists:
    """Return whether a user, of an outer query, has the login session with an id."""
    return exists().where(
        col(RefreshToken.user_id) == col(User.id),
        col(RefreshToken.id) == login,
        col(RefreshToken.expires_at) > func.now(),
    )


def replace(token: str, successor: str, *, verified_only: bool) -> Executable:
    """Return a statement that replaces the newest token of a session with its successor.

    It returns the user's id if the token was the newest, or is repeated. If two requests use the
    same token, the second one waits for the first, and is a repetition.
    verified_only: whether the user's address must have been verified.
    """
    is_newest = col(RefreshToken.token_hash) == hash_token(token)
    is_verified = exists().where(
        col(User.id) == col(RefreshToken.user_id), col(User.email_verified_at).is_not(None)
    )
    return (
        update(RefreshToken)
        .where(
            col(RefreshToken.id) == login_of(token),
            is_newest | is_repeated(successor),
            col(RefreshToken.expires_at) > func.now(),
            is_verified if verified_only else true(),
        )
        .values(
            token_hash=hash_token(successor),
            # The minute begins when the token is used for the first time.
            replaced_at=case((is_newest, func.now()), else_=col(RefreshToken.replaced_at)),
            expires_at=func.least(
                func.now() + LIFETIME, col(RefreshToken.created_at) + MAX_SESSION_AGE
            ),
        )
        .returning(col(RefreshToken.user_id))
    )


def is_repeated(successor: str) -> ColumnElement[bool]:
    """Return whether the predecessor of a token may still be used again."""
    return (col(RefreshToken.token_hash) == hash_token(successor)) & (
        col(RefreshToken.replaced_at) > func.now() - REPEATABLE
    )


def end_if_reused(token: str, successor: str) -> Executable:
    """Return a statement that ends a session if the token is one of its earlier ones.

    It returns the user's id if the session was ended.
    """
    return (
        end(token)
        .where(col(RefreshToken.token_hash) != hash_token(token), ~is_repeated(successor))
        .returning(col(RefreshToken.user_id))
    )


def sessions_of(user_id: UUID, current: UUID | None) -> Executable:
    """Return a query for a user's sessions, the one that was used last first.

    current: the id of the session that `is_current`.
    """
    return (
        select(
            col(RefreshToken.id),
            col(RefreshToken.created_at),
            col(RefreshToken.address),
            LAST_USED.label("last_used_at"),
            col(RefreshToken.id).is_not_distinct_from(current).label("is_current"),
        )
        .where(col(RefreshToken.user_id) == user_id, col(RefreshToken.expires_at) > func.now())
        .order_by(LAST_USED.desc())
        .limit(MAX_SESSIONS)
    )


def end_one(user_id: UUID, login: UUID) -> Executable:
    """Return a statement that ends a session of a user. It returns a row if there was one."""
    return end_all(user_id).where(col(RefreshToken.id) == login).returning(col(RefreshToken.id))


def end_others(user_id: UUID, current: UUID | None) -> Executable:
    """Return a statement that ends all sessions of a user but the current one."""
    return end_all(user_id).where(col(RefreshToken.id).is_distinct_from(current))


def end_all(user_id: UUID) -> Delete:
    """Return a statement that ends all sessions of a user."""
    return delete(RefreshToken).where(col(RefreshToken.user_id) == user_id)


def end(token: str) -> Delete:
    """Return a statement that ends the session of a token, which need not be its newest."""
    return delete(RefreshToken).where(col(RefreshToken.id) == login_of(token))
