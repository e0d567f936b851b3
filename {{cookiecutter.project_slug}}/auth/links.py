"""The links that our own accounts mail: to choose a new password, to confirm an address.

Their tokens are signed and not stored. Each is bound to the state that it changes. A token that
resets a password or changes an address is bound to the current address and password hash, so it
stops working once either has changed. Each purpose has a key of its own.
"""

import base64
import hmac
import time
from collections.abc import Mapping
from urllib.parse import urlencode
from uuid import UUID

import jwt

from auth.tokens import ALGORITHM, signing_key
from config import Settings
from mail import Message

# The messages, and those of `manage.py account`, say these times in words.
RESET_SECONDS = 60 * 60
INVITATION_SECONDS = 7 * 24 * 60 * 60
VERIFY_SECONDS = 24 * 60 * 60
RESET = "password reset"
VERIFY = "e-mail verification"


class InvalidLink(Exception):
    """The token was not made for this purpose, has expired, or was used before."""


def reset_token(
    settings: Settings, user_id: UUID, email: str, password_hash: str, seconds: int
) -> str:
    """Return a token that lets its owner choose a new password, once, within `seconds`."""
    state = fingerprint(settings, email, password_hash)
    return issue(settings, RESET, {"sub": str(user_id), "state": state}, seconds)


def verify_token(settings: Settings, user_id: UUID, email: str) -> str:
    """Return a token that confirms the address of an account. It may be used again."""
    return issue(settings, VERIFY, {"sub": str(user_id), "email": email}, VERIFY_SECONDS)


def new_address_token(
    settings: Settings, user_id: UUID, email: str, current_email: str, password_hash: str
) -> str:
    """Return a token that confirms a new address, which then replaces the one of the account."""
    state = fingerprint(settings, current_email, password_hash)
    claims = {"sub": str(user_id), "email": email, "state": state}
    return issue(settings, VERIFY, claims, VERIFY_SECONDS)


def fingerprint(settings: Settings, *parts: str) -> str:
    """Return a text that changes with its parts, and tells nothing about them."""
    digest = hmac.digest(signing_key(settings, "link"), "\0".join(parts).encode(), "sha256")
    return base64.urlsafe_b64encode(digest[:16]).decode().rstrip("=")


def issue(settings: Settings, purpose: str, claims: Mapping[str, str], seconds: int) -> str:
    expires = {"exp": int(time.time()) + seconds}
    return jwt.encode(dict(claims) | expires, signing_key(settings, purpose), ALGORITHM)


def read(settings: Settings, purpose: str, token: str) -> tuple[UUID, dict[str, str]]:
    """Return the account's id and the claims of a token. Raises InvalidLink."""
    try:
        claims = jwt.decode(
            token,
            signing_key(settings, purpose),
            algorithms=[ALGORITHM],
            options={"require": ["exp", "sub"]},
        )
    except jwt.PyJWTError as error:
        raise InvalidLink(str(error)) from None
    return UUID(claims["sub"]), claims


def link(settings: Settings, path: str, token: str) -> str:
    return f"{settings.frontend_url[0]}{path}?{urlencode({'token': token})}"


def reset_message(settings: Settings, email: str, token: str) -> Message:
    return Message(
        to=email,
        subject=f"Choose a new password for {settings.app_name}",
        before=("Somebody, probably you, asked to reset the password of your account.",),
        link=link(settings, settings.frontend_reset_path, token),
        label="Choose a new password",
        after=(
            "This link works once, within an hour. A new password logs you out on all devices.",
            "If this was not you, ignore this message: your password stays as it is.",
        ),
    )


def invitation_message(settings: Settings, email: str, token: str) -> Message:
    return Message(
        to=email,
        subject=f"Your account at {settings.app_name}",
        before=(f"An account at {settings.app_name} was created for you.",),
        link=link(settings, settings.frontend_reset_path, token),
        label="Choose a password",
        after=("This link works once, within a week.",),
    )


def verify_message(settings: Settings, email: str, token: str) -> Message:
    return Message(
        to=email,
        subject=f"Confirm your address for {settings.app_name}",
        before=("Please confirm that this is the e-mail address of your account.",),
        link=link(settings, settings.frontend_verify_path, token),
        label="Confirm this address",
        after=("This link works for one day. If the account is not yours, ignore this message.",),
    )


def taken_message(settings: Settings, email: str) -> Message:
    return Message(
        to=email,
        subject=f"Your account at {settings.app_name}",
        before=(
            "Somebody wanted to use this address for another account.",
            "It belongs to your account already, so nothing was changed.",
        ),
    )


def changed_message(settings: Settings, email: str, what: str) -> Message:
    """Return a message to an account's owner. what: `password` or `e-mail address`."""
    return Message(
        to=email,
        subject=f"The {what} of your account at {settings.app_name} has changed",
        before=(
            f"Your account has a new {what}.",
            "If this was not you, somebody else has access to it: contact us at once.",
        ),
    )
