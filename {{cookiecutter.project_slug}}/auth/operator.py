"""What `uv run manage.py account` does to our own accounts.

It needs the database, but no running app. Addresses, names and passwords follow the API's rules.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, TypeAdapter, ValidationError
from sqlalchemy import Connection, NullPool, create_engine, delete, func, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col
from uuid_utils.compat import uuid7

from auth.links import INVITATION_SECONDS, invitation_message, reset_token
from auth.passwords import Passwords
from auth.refresh_tokens import LAST_USED, end_all
from config import Settings, is_loopback
from mail import MailError, deliver
from models import RefreshToken, User, delete_owned
from postgres import connect
from postgres.connect import TimeBudget
from postgres.console import Waiting
from schemas.auth import OWN_ADDRESS, Email, Name, NewPassword, is_own_address
from schemas.text import Utc

TRANSACTION_SECONDS = 60.0  # including the wait for a sleeping compute

NOTHING_CHANGED = "nothing was changed"
CHANGED = "the change was made"
MAYBE_CHANGED = "the change may have been made: uv run manage.py account list"
SEND_AGAIN = "to send another link: uv run manage.py account invite {} --again"

SESSIONS = (
    select(func.count().label("sessions"), func.max(LAST_USED).label("last_used_at"))
    .where(col(RefreshToken.user_id) == col(User.id), col(RefreshToken.expires_at) > func.now())
    .lateral("sessions")
)
ACCOUNTS = select(
    col(User.id),
    col(User.email),
    col(User.name),
    col(User.email_verified_at),
    col(User.created_at),
    SESSIONS.c.sessions,
    SESSIONS.c.last_used_at,
).join(SESSIONS, true())
HEADER = ("address", "verified", "created", "sessions", "last used (UTC)", "name")


class Refused(Exception):
    """What cannot be done, and why. advice: what to do."""

    def __init__(self, problem: str, *, advice: str = "") -> None:
        super().__init__(problem)
        self.advice = advice


class Account(BaseModel):
    """An account, as the operator sees it. sessions: how many login sessions have not ended."""

    id: UUID
    email: str
    name: str
    email_verified_at: Utc | None
    created_at: Utc
    sessions: int
    last_used_at: Utc | None


class Invitation(Account):
    """link: what was not mailed, because no mail can be sent; a secret until it has been used.

    page_link: the same on the page at /, in development, where there may be no front end yet.
    """

    link: str | None
    page_link: str | None


class Deletion(Account):
    """deleted: how many rows the account owned, by table."""

    deleted: dict[str, int]


class Accounts:
    """The accounts in the database of the settings.

    Methods raise Refused, and the errors of a database: sqlalchemy.exc.DBAPIError, psycopg2.Error,
    TimeoutError. outcome: what is true of the accounts if one is raised, or after Ctrl-C.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection: connect.Connection | None = None
        self.outcome = NOTHING_CHANGED

    @property
    def links_lead_here(self) -> bool:
        """Whether links lead to this machine, although users are elsewhere."""
        settings = self._settings
        return not settings.in_development and is_loopback(settings.frontend_url[0])

    def newest(self, limit: int) -> list[Account]:
        """Return the accounts, the newest first."""
        query = ACCOUNTS.order_by(col(User.created_at).desc(), col(User.id).desc()).limit(limit)
        return self._run(lambda connection: [as_account(row) for row in connection.execute(query)])

    def find(self, email: str) -> Account:
        return self._run(lambda connection: find(connection, email))

    def invite(self, email: str, name: str | None, *, again: bool) -> Invitation:
        """Create an account without a usable password, and mail a link that sets one.

        name: what is before the "@" if None. again: the account exists, only mail another link.
        """
        new = insert(User).values(
            id=uuid7(),
            email=email,
            name=name or email.partition("@")[0],
            password_hash=Passwords.HASHER.hash(secrets.token_urlsafe(32)),  # nobody knows it
        )
        new = new.on_conflict_do_nothing(index_elements=[col(User.email)])

        def create(connection: Connection) -> tuple[Account, str]:
            if not again and not connection.execute(new).rowcount:
                raise Refused(f"{email} has an account", advice=SEND_AGAIN.format(email))
            account = find(connection, email)
            if account.email_verified_at or account.sessions:
                raise Refused(
                    f"{email} is in use, and needs no invitation",
                    advice=f"to set a new password: uv run manage.py account password {email}",
                )
            stored = select(col(User.password_hash)).where(col(User.id) == account.id)
            return account, connection.execute(stored).scalar_one()

        exists = f"{email} has an account, but perhaps no message: {SEND_AGAIN.format(email)}"
        account, password_hash = self._run(create, then=exists)
        settings, server = self._settings, self._settings.mail_url
        token = reset_token(settings, account.id, email, password_hash, INVITATION_SECONDS)
        message = invitation_message(settings, email, token)
        if server is None:
            page = f"http://127.0.0.1:{settings.port}/#reset={token}"
            page_link = page if settings.in_development else None
            return Invitation(**account.model_dump(), link=message.link, page_link=page_link)
        try:
            asyncio.run(deliver(server, message.as_email(settings.app_name, server.sender)))
        except MailError as error:
            problem = f"{email} has an account, but the invitation was not sent: {error}"
            raise Refused(problem, advice=SEND_AGAIN.format(email)) from None
        return Invitation(**account.model_dump(), link=None, page_link=None)

    def set_password(self, email: str, text: str) -> Account:
        """Set a new password, and end all login sessions."""
        new_hash = Passwords.HASHER.hash(read_password(text, email))

        def change(connection: Connection) -> Account:
            account = find(connection, email)
            # In this order, a login at the same time is ended too, or fails.
            of_account = col(User.id) == account.id
            connection.execute(update(User).where(of_account).values(password_hash=new_hash))
            connection.execute(end_all(account.id))
            return find(connection, email)

        return self._run(change, then=CHANGED)

    def verify(self, email: str) -> Account:
        """Mark the address as verified. An earlier date stays."""
        now = func.coalesce(col(User.email_verified_at), func.now())

        def change(connection: Connection) -> Account:
            of_account = col(User.email) == email
            connection.execute(update(User).where(of_account).values(email_verified_at=now))
            return find(connection, email)

        return self._run(change, then=CHANGED)

    def delete(self, email: str) -> Deletion:
        """Delete an account with all that it owns and its login sessions."""

        def change(connection: Connection) -> Deletion:
            account = find(connection, email)
            # ON DELETE CASCADE deletes its login sessions.
            connection.execute(delete(User).where(col(User.id) == account.id))
            deleted = {
                table: connection.execute(rows).rowcount
                for table, rows in delete_owned(str(account.id)).items()
            }
            return Deletion(**account.model_dump(), deleted=deleted)

        return self._run(change, then=CHANGED)

    def _run[T](self, work: Callable[[Connection], T], *, then: str = NOTHING_CHANGED) -> T:
        """Do work in a transaction on a new connection. then: the outcome once it is committed."""
        url = self._settings.database_url

        def log_in() -> connect.Connection:
            self._connection = connect.log_in(url)
            return self._connection

        def transact() -> T:
            engine = create_engine(url.for_sqlalchemy(), creator=log_in, poolclass=NullPool)
            with engine.begin() as connection:
                result = work(connection)
                self.outcome = MAYBE_CHANGED  # until the server has answered the COMMIT
            self.outcome = then
            return result

        try:
            with Waiting("waiting for the database") as waiting:
                budget = TimeBudget(url, waiting, TRANSACTION_SECONDS)
                return budget.run(transact, TRANSACTION_SECONDS)
        except (TimeoutError, KeyboardInterrupt):
            if self._connection is not None:
                connect.abort(self._connection)  # a thread may still wait for it
            raise


def find(connection: Connection, email: str) -> Account:
    """Return an account. Raises Refused if there is none."""
    row = connection.execute(ACCOUNTS.where(col(User.email) == email)).first()
    if row is None:
        raise Refused(f"{email} has no account", advice="uv run manage.py account list")
    return as_account(row)


def as_account(row: Any) -> Account:
    return Account(**row._mapping)


def read(kind: str, text: str) -> str:
    """Return an "email" or a "name" as it is stored. Raises ValueError."""
    value: str = checked({"email": Email, "name": Name}[kind], text)
    return value


def read_password(text: str, email: str) -> str:
    """Return a new password in the spelling in which it is hashed. Raises Refused."""
    try:
        password: str = checked(NewPassword, text).get_secret_value()
    except ValueError as error:
        raise Refused(f"this password is refused: {error}") from None
    if is_own_address(password, email):
        raise Refused(f"this password is refused: {OWN_ADDRESS}")
    return password


def checked(kind: Any, text: str) -> Any:
    """Check a text as the API does. Raises ValueError with a message that leaves it out."""
    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        message = error.errors(include_input=False, include_url=False)[0]["msg"]
    raise ValueError(message.removeprefix("Value error, "))


def as_table(accounts: Sequence[Account]) -> str:
    """Return lines for a terminal. Names come from users: what cannot be printed is replaced."""
    rows = [HEADER, *map(cells, accounts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def cells(account: Account) -> tuple[str, ...]:
    return (
        account.email,
        shown(account.email_verified_at, "%Y-%m-%d"),
        shown(account.created_at, "%Y-%m-%d"),
        str(account.sessions),
        shown(account.last_used_at, "%Y-%m-%d %H:%M"),
        "".join(
            letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}"
            for letter in account.name
        ),
    )


def shown(moment: datetime | None, form: str) -> str:
    return moment.strftime(form) if moment else "-"
