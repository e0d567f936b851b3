"""Refresh tokens: each works once, and one that comes again ends the log-in it belongs to.

A log-in, with the family of all its tokens, is one row, which holds the hash of the newest; each
token tells which row is its own. Whatever changes a row waits for its lock, so that a log-in that
has been ended never yields another token.
"""

import hashlib
import secrets
from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, Delete, Executable, delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from models import RefreshToken, User

LIFE = timedelta(days=30)  # of each token, and so the longest pause of a log-in
# Two tabs of a browser may use one token at the same moment. The second gets no new one, but is
# not taken for a thief, who would come later or earlier.
SAME_MOMENT = timedelta(seconds=5)


def new_token(login: UUID | None = None) -> str:
    """Return a token of a log-in, or the first one of a new log-in.

    Clients need not know what it is made of. The id is random, not by time, since whoever knows
    it can end the log-in.
    """
    return f"{(login or uuid4()).hex}.{secrets.token_urlsafe(32)}"


def login_of(token: str) -> UUID:
    try:
        return UUID(hex=token.partition(".")[0])
    except ValueError:
        return UUID(int=0)  # no log-in has it


def hash_token(token: str) -> bytes:
    """A fast hash will do: nobody guesses 256 random bits."""
    return hashlib.sha256(token.encode()).digest()


def start(token: str, user_id: UUID, verified: ColumnElement[bool]) -> Executable:
    """Store a new log-in, if `verified` still holds for its user, and remove those that expired.

    Returns a statement that yields a row if it did. Who changes the password meanwhile holds a
    lock on the user: the statement waits for it, and sees the change.
    """
    login = literal(login_of(token))
    owner = select(login, col(User.id), literal(hash_token(token)), func.now() + LIFE)
    expired = delete(RefreshToken).where(
        col(RefreshToken.user_id) == user_id, col(RefreshToken.expires_at) <= func.now()
    )
    return (
        insert(RefreshToken)
        .from_select(
            ["id", "user_id", "token_hash", "expires_at"],
            owner.where(verified).with_for_update(read=True),
        )
        .add_cte(expired.cte("expired"))
        .returning(col(RefreshToken.id))
    )


def replace(token: str, successor: str) -> Executable:
    """Put another token in the place of a log-in's newest.

    Returns a statement that yields the user's id if the token was that. Of two requests with one
    token, the second waits for the first, and finds another token to be the newest.
    """
    return (
        update(RefreshToken)
        .where(
            col(RefreshToken.id) == login_of(token),
            col(RefreshToken.token_hash) == hash_token(token),
            col(RefreshToken.expires_at) > func.now(),
        )
        .values(
            token_hash=hash_token(successor), replaced_at=func.now(), expires_at=func.now() + LIFE
        )
        .returning(col(RefreshToken.user_id))
    )


def end_if_reused(token: str) -> Executable:
    """End a log-in if this is an earlier one of its tokens.

    Returns a statement that yields the user's id if it was.
    """
    return (
        end(token)
        .where(
            col(RefreshToken.token_hash) != hash_token(token),
            col(RefreshToken.replaced_at) <= func.now() - SAME_MOMENT,
        )
        .returning(col(RefreshToken.user_id))
    )


def end(token: str) -> Delete:
    """Return a statement that ends a log-in, by whichever of its tokens."""
    return delete(RefreshToken).where(col(RefreshToken.id) == login_of(token))
