"""Refresh tokens: each works once; using one again ends its login session.

A login session is one row, which stores the hash of its newest refresh token. Each token contains
the id of its session, so earlier tokens are recognized too. Statements that change a row wait for
its lock, so a session that has ended never yields another token.
"""

import hashlib
import secrets
from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy import (
    ColumnElement,
    Delete,
    Executable,
    Exists,
    delete,
    exists,
    func,
    literal,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from models import RefreshToken, User

LIFETIME = timedelta(days=30)  # of each token: a session that is not used for longer ends
# Two tabs of a browser may use one token at the same time. The second one gets a 401, but does not
# end the session as a thief would.
SAME_TIME = timedelta(seconds=5)
MAX_SESSIONS = 100  # of one user
MAX_ADDRESS = 64  # the width of its column: an address of IPv6 has fewer characters


def new_token(login: UUID | None = None) -> str:
    """Return a refresh token of a login session, or of a new one if None.

    The id is random, not a UUIDv7: anybody who knows it can end the session.
    """
    return f"{(login or uuid4()).hex}.{secrets.token_urlsafe(32)}"


def login_of(token: str) -> UUID:
    try:
        return UUID(hex=token.partition(".")[0])
    except ValueError:
        return UUID(int=0)  # no session has this id


def hash_token(token: str) -> bytes:
    """Return what is stored. A fast hash is enough: nobody can guess 256 random bits."""
    return hashlib.sha256(token.encode()).digest()


def start(token: str, user_id: UUID, verified: ColumnElement[bool], client: str) -> Executable:
    """Return a statement that stores a new session and deletes the user's expired ones.

    It returns a row if `verified` still holds for the user. If the password is being changed at the
    same time, it waits for that change and sees it. A session too many ends the one that has not
    been used for the longest time.
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
    surplus = kept.order_by(col(RefreshToken.expires_at).desc()).offset(MAX_SESSIONS - 1)
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


def replace(token: str, successor: str) -> Executable:
    """Return a statement that replaces the newest token of a session with its successor.

    It returns the user's id if the token was the newest. If two requests use the same token, the
    second one waits for the first, and its token is no longer the newest.
    """
    return (
        update(RefreshToken)
        .where(
            col(RefreshToken.id) == login_of(token),
            col(RefreshToken.token_hash) == hash_token(token),
            col(RefreshToken.expires_at) > func.now(),
        )
        .values(
            token_hash=hash_token(successor),
            replaced_at=func.now(),
            expires_at=func.now() + LIFETIME,
        )
        .returning(col(RefreshToken.user_id))
    )


def end_if_reused(token: str) -> Executable:
    """Return a statement that ends a session if the token is one of its earlier ones.

    It returns the user's id if the session was ended.
    """
    return (
        end(token)
        .where(
            col(RefreshToken.token_hash) != hash_token(token),
            col(RefreshToken.replaced_at) <= func.now() - SAME_TIME,
        )
        .returning(col(RefreshToken.user_id))
    )


def end(token: str) -> Delete:
    """Return a statement that ends the session of a token, which need not be its newest."""
    return delete(RefreshToken).where(col(RefreshToken.id) == login_of(token))
