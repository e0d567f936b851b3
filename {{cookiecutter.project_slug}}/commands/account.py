"""The commands of `manage.py account`; auth/operator.py does their work."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from commands.settings import settings_or_fail
from postgres.console import end_as_stopped, fail
from postgres.explain import explain

if TYPE_CHECKING:  # they load SQLAlchemy, which other commands do not need
    from auth.operator import Account, Accounts

app = typer.Typer(
    help="Our own accounts: docs/accounts.md. Exit code 0: done, 1: no such account, or refused, 2:"
    " wrong usage, 130: stopped by Ctrl-C.",
    no_args_is_help=True,
)


def read(kind: str) -> Callable[[str | None], str | None]:
    """Return what checks an argument as the API does."""

    def check(text: str | None) -> str | None:
        from auth import operator

        try:
            return None if text is None else operator.read(kind, text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return check


EmailArgument = Annotated[str, typer.Argument(metavar="EMAIL", callback=read("email"))]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@contextmanager
def our_accounts() -> Iterator["Accounts"]:
    """Yield the accounts. Ends the command with a message if that fails."""
    from psycopg2 import Error
    from sqlalchemy.exc import DBAPIError

    from auth.operator import Accounts, Refused

    settings = settings_or_fail()
    if settings.better_auth_url:
        fail(f"accounts are on the Better Auth server at {settings.better_auth_url}, not here")
    accounts = Accounts(settings)
    try:
        yield accounts
    except (KeyboardInterrupt, EOFError, typer.Abort):  # Typer's own questions raise Abort
        end_as_stopped(accounts.outcome)
    except Refused as error:
        fail(str(error), advice=error.advice)
    except (DBAPIError, Error, TimeoutError) as error:
        finding = explain(error, settings.database_url)
        problem = f"{settings.database_url.address}: {finding.cause}; {accounts.outcome}"
        fail(problem, advice=finding.advice, error=finding.message)


def show_account(account: "Account", *lines: str, as_json: bool) -> None:
    if as_json:
        lines = (account.model_dump_json(indent=2),)
    for line in lines:
        typer.echo(line)


@app.command("list")
def list_accounts(
    *,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The most accounts to show.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List the accounts, the newest first."""
    from auth.operator import as_table

    with our_accounts() as accounts:
        found = accounts.newest(limit + 1)
    shown, has_more = found[:limit], len(found) > limit
    if as_json:
        rows = [account.model_dump(mode="json") for account in shown]
        document = {"accounts": rows, "has_more": has_more}
        typer.echo(json.dumps(document, ensure_ascii=False, indent=2))
        return
    typer.echo(as_table(shown) if shown else "- there are no accounts yet")
    if has_more:
        typer.echo("- there are more: --limit shows up to 1000")


@app.command()
def invite(
    email: EmailArgument,
    *,
    name: Annotated[
        str | None, typer.Option(callback=read("name"), help='By default what is before the "@".')
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Send another link to an account that exists.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Create an account, and mail a link to choose its password, which works for 7 days.

    Works if REGISTRATION is closed, too. Without MAIL_URL it prints the link, which is a secret.
    """
    with our_accounts() as accounts:
        invitation = accounts.invite(email, name, again=again)
    lines = [f"✓ {email} has an account; the invitation was mailed, and works for 7 days"]
    if invitation.link:
        lines = [
            f"✓ {email} has an account",
            "! MAIL_URL is not set. Send this link yourself: it works for 7 days, and is a secret",
            invitation.link,
        ]
    if accounts.links_lead_here:
        lines.append("! FRONTEND_URL is not set to your front end: this link leads to this machine")
    if invitation.page_link:
        lines += ["  Without a front end, while the app runs here:", invitation.page_link]
    show_account(invitation, *lines, as_json=as_json)


@app.command()
def password(email: EmailArgument, *, as_json: AsJson = False) -> None:
    """Set a new password, and end all login sessions of the account.

    Asks twice, without showing it, or reads a line of standard input if that is not a terminal.
    """
    from auth.tokens import ACCESS_TOKEN_SECONDS

    with our_accounts() as accounts:
        accounts.find(email)  # before it asks for a password
        changed = accounts.set_password(email, ask_password())
    minutes = ACCESS_TOKEN_SECONDS // 60
    show_account(
        changed,
        f"✓ {email} has a new password, and no login sessions any more",
        f"  older access tokens still work for up to {minutes} minutes",
        as_json=as_json,
    )


def ask_password() -> str:
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline().decode("utf-8", "surrogateescape")
        return line.rstrip("\r\n").removeprefix("\ufeff")  # that of a file from Windows
    answer: str = typer.prompt(
        "New password (hidden)", hide_input=True, confirmation_prompt=True, err=True
    )
    return answer


@app.command()
def verify(email: EmailArgument, *, as_json: AsJson = False) -> None:
    """Mark the e-mail address as verified."""
    with our_accounts() as accounts:
        verified = accounts.verify(email)
    show_account(verified, f"✓ {email} is verified", as_json=as_json)


@app.command()
def delete(
    email: EmailArgument,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete an account with all that it owns. Asks for its address first."""
    with our_accounts() as accounts:
        accounts.find(email)
        if not yes:
            confirm_deletion(email)
        deletion = accounts.delete(email)
    owned = "".join(f", {table}: {number}" for table, number in deletion.deleted.items())
    show_account(deletion, f"✓ {email} is deleted{owned}", as_json=as_json)


def confirm_deletion(email: str) -> None:
    question = "Type the address to delete the account and all that it owns (--yes: do not ask)"
    answer: str = typer.prompt(question, err=True)
    if answer.strip().lower() != email:
        fail(f"the address is not {email}: nothing was changed")
