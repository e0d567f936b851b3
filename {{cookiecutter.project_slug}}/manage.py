"""The project's commands: `uv run manage.py --help`."""

import os
import signal
import sys

if __name__ == "__main__":  # before the imports, which take a second: Ctrl-C shows no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped\n") and 130))

import json
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from config import (
    ENV_FILE,
    PROJECT_DIR,
    PYPROJECT,
    Settings,
    SettingsError,
    clear_libpq_variables,
    load_settings,
)
from postgres import env_file, prompt
from postgres.console import Waiting, fail, report, show_check, stopped, stops, timed_step
from postgres.url import DatabaseUrl, DatabaseUrlError, parse

if TYPE_CHECKING:
    from auth.operator import Account, Accounts
    from postgres.check import Check
    from postgres.connect import OnWait
    from postgres.copy_data import CopyResult

app = typer.Typer(help="Run this project.", no_args_is_help=True, add_completion=False)
postgres = typer.Typer(help="The embedded PostgreSQL of this project.", no_args_is_help=True)
app.add_typer(postgres, name="postgres")

EMBEDDED = "the embedded PostgreSQL"
Local = Annotated[bool, typer.Option("--local", help="Use the embedded PostgreSQL.")]


def settings_or_fail() -> Settings:
    try:
        settings = load_settings(ENV_FILE)
    except SettingsError as error:
        fail(*str(error).splitlines())
    clear_libpq_variables(settings)
    return settings


@contextmanager
def embedded_server() -> Iterator[ModuleType]:
    """Yield postgres.embedded, and end the command with a message where that fails."""
    try:
        from postgres.embedded import LocalPostgresError
    except ModuleNotFoundError:
        fail("the embedded PostgreSQL is for development only, and is not installed here")
    from postgres import embedded

    try:
        yield embedded
    except LocalPostgresError as error:
        fail(str(error))


@app.command()
def setup(*, local: Local = False) -> None:
    """Set up this project: .env, embedded PostgreSQL, migrations, connection check.

    Keeps what is there and adds what is missing, so it is safe to repeat. If .env has no connection
    string yet, it uses NEON_DATABASE_URL, or asks for one on a terminal.
    """
    ignore_in_shell({name.upper() for name in Settings.model_fields})
    complete_env_file()
    with stops("finished steps stay; to continue: uv run manage.py setup"):
        url = complete_settings(local=local)
        try:
            prepare_database(url)
        except typer.Exit:
            again = "uv run manage.py env, then this command again"
            typer.echo(f"  → to use another connection string: {again}", err=True)
            raise


def complete_settings(*, local: bool) -> DatabaseUrl:
    """Return the DATABASE_URL in .env, which is added if it is missing."""
    is_new = not env_file.has_database_url(ENV_FILE)
    new_url = choose_database(local=local) if is_new else None
    with timed_step("settings"):
        if new_url:
            env_file.set_database_url(ENV_FILE, new_url)
        url = settings_or_fail().database_url
    typer.echo(f"  DATABASE_URL is {url}")
    if local and not url.is_embedded:
        fail(
            ".env does not name the embedded PostgreSQL, but this database\n"
            "  → to set it up: uv run manage.py setup\n"
            "  → to use the embedded PostgreSQL instead: uv run manage.py env --local"
        )
    return url


def prepare_database(url: DatabaseUrl) -> None:
    if url.is_embedded:
        with timed_step("database"), embedded_server() as embedded:
            embedded.ensure_running(ENV_FILE)
    else:  # libpq would read them
        ignore_in_shell({name for name in os.environ if name.startswith("PG")})
    with timed_step("schema"):
        bring_up_to_date(settings_or_fail().migration_url)
    with timed_step("connection"), Waiting("waiting for the database") as waiting:
        for check in run_checks(waiting):
            if check.ok is False:
                waiting.clear()
                show_check(check)
                raise typer.Exit(1)


def ignore_in_shell(names: set[str]) -> None:
    """Ignore variables of the shell that override .env: they may be for another program."""
    for name in sorted(names & os.environ.keys()):
        del os.environ[name]
        typer.echo(
            f"! This shell sets {name}. Setup ignores it, the app does not. Type: unset {name}"
        )


def choose_database(*, local: bool) -> DatabaseUrl:
    """Return the connection string for a new .env."""
    try:
        url = None if local else prompt.find_database_url(empty=EMBEDDED)
    except DatabaseUrlError as error:
        fail(f"settings: {error}")
    return url or new_embedded_url()


def new_embedded_url() -> DatabaseUrl:
    with embedded_server() as embedded:
        url: DatabaseUrl = embedded.new_url(PYPROJECT["project"]["name"].replace("-", "_"))
    return url


def complete_env_file() -> bool:
    """Create .env, or add what it lacks. Returns whether it is new."""
    try:
        return env_file.complete(ENV_FILE, PROJECT_DIR / ".env.example")
    except UnicodeDecodeError:
        fail(
            f"{ENV_FILE} is damaged, or not saved as UTF-8\n"
            f"  → save it as UTF-8, or start again: mv {ENV_FILE.name} {ENV_FILE.name}.old, then"
            " the same command"
        )


@app.command()
def env(
    *,
    local: Local = False,
    new_secret: Annotated[
        bool, typer.Option("--new-secret", help="Replace BETTER_AUTH_SECRET, nothing else.")
    ] = False,
) -> None:
    """Change the DATABASE_URL in .env, which is created if it is missing.

    Asks for a connection string without showing it, or reads it from standard input if that is not
    a terminal.
    """
    if complete_env_file():
        typer.echo("✓ .env is new, with its own BETTER_AUTH_SECRET")
    elif new_secret:
        env_file.set_value(ENV_FILE, "BETTER_AUTH_SECRET", env_file.new_secret())
        typer.echo("✓ BETTER_AUTH_SECRET is new: all users have to log in again")
    if new_secret:
        return
    is_set = env_file.has_database_url(ENV_FILE)
    with stops("DATABASE_URL is unchanged; to change it: uv run manage.py env"):
        url = None if local else read_url(empty="no change" if is_set else EMBEDDED)
    if url is None and is_set and not local:
        typer.echo("- DATABASE_URL is unchanged")
        return
    use_database(url or new_embedded_url())
    typer.echo("  next: uv run manage.py migrate")


def read_url(*, empty: str) -> DatabaseUrl | None:
    """Return what was pasted, None for only Enter, which means `empty`."""
    try:
        return prompt.read_database_url(empty=empty)
    except DatabaseUrlError as error:
        fail(f"DATABASE_URL: {error}")


def use_database(url: DatabaseUrl) -> None:
    """Write it into .env, and say what overrides it."""
    env_file.set_database_url(ENV_FILE, url)
    typer.echo(f"✓ DATABASE_URL is {url}")
    if "DATABASE_URL" in os.environ:
        typer.echo("! This shell sets DATABASE_URL too, which overrides .env: unset it there")
    name = "DATABASE_URL_DIRECT"
    remedies = {
        "unset it in the shell": os.environ.get(name),
        "change or remove that line in .env": env_file.get_value(ENV_FILE, name),
    }
    for remedy, value in remedies.items():
        if value and not is_same_place(value, url):
            typer.echo(f"! {name} still names another database: migrations go there; {remedy}")


def is_same_place(text: str, url: DatabaseUrl) -> bool:
    try:
        return url.is_same_database(parse(text))
    except DatabaseUrlError:
        return False


@app.command()
def check(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Test each step of the connection, and say how to fix the one that fails.

    Waits for a compute that sleeps. Exit code 0: all is well, 1: a step failed.
    """
    checks = []
    with Waiting("waiting for the database") as waiting:
        for step in run_checks(waiting):
            checks.append(step)
            waiting.clear()
            if not as_json:
                show_check(step)
    if as_json:
        typer.echo(json.dumps(report(checks), ensure_ascii=False, indent=2))
    elif unreached := [step.name for step in checks if step.ok is None]:
        typer.echo(f"- not reached: {', '.join(unreached)}")
    raise typer.Exit(0 if all(step.ok for step in checks) else 1)


def run_checks(on_wait: "OnWait") -> Iterator["Check"]:
    from postgres.check import Check, check_connection
    from postgres.explain import BY_NAME

    try:
        settings = load_settings(ENV_FILE)
    except SettingsError as error:
        for line in str(error).splitlines():
            problem, run, command = line.partition("run: ")
            yield Check(
                "settings", False, problem.rstrip("; "), run + command, BY_NAME["settings-wrong"]
            )
        return
    clear_libpq_variables(settings)
    source = "the environment" if "DATABASE_URL" in os.environ else ".env"
    yield Check("settings", ok=True, detail=f"complete; DATABASE_URL comes from {source}")
    url = settings.database_url
    yield from check_connection(url, known_revisions, on_wait, known_columns)


def known_revisions() -> Sequence[str]:
    import migrations  # loads SQLAlchemy and Alembic, which only the last step of a check needs

    return migrations.history()


def known_columns() -> Collection[str]:
    import migrations

    return migrations.columns()


@app.command()
def migrate(
    *,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that it may take.")] = 600,
) -> None:
    """Apply the missing migrations: all, or none if one fails. Starts the embedded server.

    Waits for a compute that sleeps.
    """
    import migrations

    with stops("`uv run manage.py check` says whether the migrations are done"):
        bring_up_to_date(running_database(), timeout)
    typer.echo(f"✓ the schema is at {migrations.head()}")


def running_database() -> DatabaseUrl:
    """Return where migrations go, and start the embedded server if that is it."""
    from postgres.connect import reach

    url = settings_or_fail().migration_url
    if url.is_embedded:
        try:
            reach(url)
        except OSError:
            start()
            url = settings_or_fail().migration_url  # the port may have changed
    return url


def bring_up_to_date(url: DatabaseUrl, timeout: float = 600) -> None:
    """Run the migrations that are missing. timeout: seconds."""
    import psycopg2
    from alembic.util import CommandError
    from sqlalchemy.exc import DBAPIError

    import migrations
    from postgres.connect import TOTAL_SECONDS, TimeBudget, abort, log_in

    connection = None
    try:
        with Waiting("waiting for the database") as waiting:
            connection = log_in(url, TimeBudget(url, waiting, TOTAL_SECONDS))
        with Waiting("migrating") as waiting:
            budget = TimeBudget(url, waiting, timeout)
            budget.run(lambda: migrations.upgrade(url, connection), timeout)
    except (CommandError, DBAPIError, psycopg2.Error, TimeoutError) as error:
        if connection is not None and isinstance(error, TimeoutError):
            abort(connection)
            fail(
                f"{url.address}: given up after {timeout:.0f} s\n"
                "  → `uv run manage.py check` says whether it is done; --timeout gives it more time"
            )
        fail_at(url, error, f"no migration was applied{why_direct(url)}")


def why_direct(url: DatabaseUrl) -> str:
    """Say why a host fails that DATABASE_URL does not name."""
    named = load_settings(ENV_FILE).database_url
    if not named.is_pooled or named.direct != url:
        return ""
    return "; migrations use the direct host, because a transaction pooler does not keep sessions"


def fail_at(url: DatabaseUrl, error: Exception, outcome: str) -> NoReturn:
    """Print what an error of a database means, and end the command."""
    from postgres.explain import explain

    finding = explain(error, url)
    problem = f"{url.address}: {finding.cause}; {outcome}"
    fail(with_advice(problem, finding.advice, finding.message))


def with_advice(problem: str, advice: str, message: str) -> str:
    lines = [problem]
    if advice:
        lines.append(f"  → {advice}")
    if message:
        lines.append(f"  error: {message}")
    return "\n".join(lines)


@app.command()
def copy(
    *,
    switch: Annotated[
        bool | None,
        typer.Option("--switch/--no-switch", help="Use the new database in .env afterwards."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that it may take.")] = 3600,
) -> None:
    """Copy all data into an empty database, such as a new one at Neon: all of it, or nothing.

    Asks for its connection string without showing it, or takes it from TARGET_DATABASE_URL, or from
    standard input where that is not a terminal. Stop the app first: what it writes meanwhile stays
    in the old database.
    """
    from sqlmodel import SQLModel

    import migrations
    import models  # noqa: F401  (the tables)
    from postgres.copy_data import MAYBE_COPIED, CopyError, copy_database

    try:
        with stops("nothing was copied"):
            source, target = running_database(), ask_target_url()
        # CopyError knows better than this, but Ctrl-C may come just before or after the call.
        with stops(MAYBE_COPIED), Waiting("waiting for the database") as waiting:
            result = copy_database(
                source,
                target,
                SQLModel.metadata,
                history=migrations.history,
                upgrade=migrations.upgrade,
                on_check=waiting.show,
                on_wait=waiting.update,
                timeout=timeout,
            )
    except CopyError as error:
        if error.is_interrupted:
            stopped(error.outcome)
        fail(with_advice(str(error), error.advice, error.message))
    with stops(f"all rows are at {target}; .env names the old database"):
        show_copied(result, target)
        if switch is None and sys.stdin.isatty() and not os.environ.get("TARGET_DATABASE_URL"):
            switch = typer.confirm("  Use this database from now on (as DATABASE_URL in .env)?")
    if not switch:
        typer.echo("  .env names the old database; to change that: uv run manage.py env")
        return
    with stops(f"all rows are at {target}; see .env for the database that it names"):
        use_database(target)
    typer.echo("  next: uv run manage.py check")


def show_copied(result: "CopyResult", target: DatabaseUrl) -> None:
    if result.left_out:
        typer.echo(f"! not copied, since no model has them: {', '.join(result.left_out)}")
    width = max(map(len, result.rows))
    for table, number in result.rows.items():
        typer.echo(f"✓ {table:<{width}} {number:>9,} {'row' if number == 1 else 'rows'}")
    typer.echo(f"✓ all rows are at {target}")


def ask_target_url() -> DatabaseUrl:
    """Return the database to copy to."""
    given = os.environ.get("TARGET_DATABASE_URL")
    try:
        url = prompt.take_database_url(given) if given else prompt.read_database_url(empty="stop")
    except DatabaseUrlError as error:
        fail(f"TARGET_DATABASE_URL: {error}; nothing was copied")
    if url is None:
        fail("no connection string was given: nothing was copied")
    return url


@postgres.command()
def start() -> None:
    """Create the server on first use, and start it if it does not run."""
    before = settings_or_fail().database_url
    with embedded_server() as embedded:
        url = embedded.ensure_running(ENV_FILE)
    typer.echo(f"✓ PostgreSQL runs at {url}")
    if url.port != before.port:
        typer.echo(f"! Port {before.port} was taken; .env names the new one: restart the app")


@postgres.command()
def stop() -> None:
    """Stop the server; its data stays."""
    with embedded_server() as embedded:
        stopped = embedded.stop()
    typer.echo("✓ PostgreSQL has stopped" if stopped else "✓ PostgreSQL was not running")


@postgres.command()
def status() -> None:
    """Say whether the server runs. Exit code 0: it does, 3: it does not."""
    with embedded_server() as embedded:
        state = embedded.status()
    if not state.running:
        typer.echo(f"- PostgreSQL does not run; its data is in {state.folder}")
        raise typer.Exit(3)
    typer.echo(f"✓ PostgreSQL runs on port {state.port}, pid {state.pid}, log {state.log}")


@postgres.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context) -> None:
    """Open psql on the embedded server; further arguments go to psql."""
    url = settings_or_fail().database_url
    if not url.is_embedded:
        fail(f"DATABASE_URL is not the embedded server but {url}: use your own psql")
    with embedded_server() as embedded:
        code = embedded.run_psql(embedded.ensure_running(ENV_FILE), *context.args)
    raise typer.Exit(code)


account = typer.Typer(
    help="Our own accounts: docs/accounts.md. Exit code 0: done, 1: no such account, or refused, 2:"
    " wrong usage, 130: stopped by Ctrl-C.",
    no_args_is_help=True,
)
app.add_typer(account, name="account")


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
    """Yield the accounts, and end the command with a message where that fails."""
    from psycopg2 import Error
    from sqlalchemy.exc import DBAPIError

    from auth.operator import Accounts, Refused

    settings = settings_or_fail()
    if settings.better_auth_url:
        fail(f"accounts are on the Better Auth server at {settings.better_auth_url}, not here")
    with Waiting("waiting for the database") as waiting:
        accounts = Accounts(settings, waiting)
        try:
            yield accounts
        except (KeyboardInterrupt, EOFError, typer.Abort):  # Typer's own questions raise Abort
            stopped(accounts.outcome)
        except Refused as error:
            fail(str(error))
        except (DBAPIError, Error, TimeoutError) as error:
            fail_at(settings.database_url, error, accounts.outcome)


def show_account(account: "Account", *lines: str, as_json: bool) -> None:
    for line in [account.model_dump_json(indent=2)] if as_json else lines:
        typer.echo(line)


@account.command("list")
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
        typer.echo(f"- there are more: --limit {min(limit * 2, 1000)}")


@account.command()
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
    show_account(invitation, *lines, as_json=as_json)


@account.command()
def password(email: EmailArgument, *, as_json: AsJson = False) -> None:
    """Set a new password, and end all login sessions of the account.

    Asks twice, without showing it, or reads a line of standard input if that is not a terminal.
    """
    with our_accounts() as accounts:
        accounts.find(email)  # first: nobody types a password in vain
        changed = accounts.set_password(email, ask_password())
    show_account(
        changed,
        f"✓ {email} has a new password, and no login sessions any more",
        "  access tokens that were issued before work for up to 15 minutes",
        as_json=as_json,
    )


def ask_password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    answer: str = typer.prompt(
        "New password (hidden)", hide_input=True, confirmation_prompt=True, err=True
    )
    return answer


@account.command()
def verify(email: EmailArgument, *, as_json: AsJson = False) -> None:
    """Mark the e-mail address as verified."""
    with our_accounts() as accounts:
        verified = accounts.verify(email)
    show_account(verified, f"✓ {email} is verified", as_json=as_json)


@account.command()
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
    question = "Type the address to delete it with all that it owns (--yes: without this question)"
    answer: str = typer.prompt(question, err=True)
    if answer.strip().lower() != email:
        fail(f"that is another address than {email}: nothing was changed")


@app.command()
def openapi(
    *,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write it to this file.")
    ] = None,
) -> None:
    """Print the OpenAPI schema of the API, for client generators and CI.

    Needs no server, no database, and neither DATABASE_URL nor BETTER_AUTH_SECRET. With
    BETTER_AUTH_URL it is without the routes of our own accounts.
    """
    os.environ["DATABASE_URL"] = "postgresql://nobody@127.0.0.1/nothing"  # never connected to
    os.environ["BETTER_AUTH_SECRET"] = secrets.token_urlsafe(32)
    settings = settings_or_fail()
    with redirect_stdout(sys.stderr):  # what the app logs as it is built
        from main import create_app

        schema = create_app(settings).openapi()
    text = json.dumps(schema, ensure_ascii=False, indent=2) + "\n"
    if output is None:
        typer.echo(text.encode(), nl=False)
        return
    try:
        output.write_bytes(text.encode())
    except OSError as error:
        fail(f"{output} cannot be written: {error.strerror}")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has no ✓ shows a ?
    for name in ("SIGHUP", "SIGINT", "SIGTERM"):  # from now on, each command cleans up
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    app(color=False if is_plain else None)
