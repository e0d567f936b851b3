"""The project's commands: `uv run manage.py --help`. `postgres/` and `auth/` do their work."""

import os
import signal
import sys

if __name__ == "__main__":  # before the imports, which take a second: Ctrl-C shows no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped\n") and 130))

import json
import secrets
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from commands import account
from config import (
    ENV_FILE,
    PYPROJECT,
    Settings,
    SettingsError,
    clear_libpq_variables,
    load_settings,
)
from postgres import choose, embedded_commands, env_file
from postgres.check import Check, check_connection
from postgres.connect import OnWait, reach
from postgres.console import Waiting, fail, show_checks, stops, timed_step
from postgres.explain import BY_NAME
from postgres.url import DatabaseUrl

app = typer.Typer(help="Run this project.", no_args_is_help=True, add_completion=False)
app.add_typer(account.app, name="account")
app.add_typer(embedded_commands.app, name="postgres")

Local = Annotated[bool, typer.Option("--local", help="Use the embedded PostgreSQL.")]
PROJECT: str = PYPROJECT["project"]["name"]
REPLICA_ADVICE = "correct READ_DATABASE_URL, or remove it; meanwhile, lists come from the primary"


def settings_or_fail() -> Settings:
    try:
        settings = load_settings(ENV_FILE)
    except SettingsError as error:
        fail(*str(error).splitlines())
    clear_libpq_variables(settings)
    return settings


@app.command()
def setup(*, local: Local = False) -> None:
    """Set up this project: .env, embedded PostgreSQL, migrations, connection check.

    Keeps what is there and adds what is missing, so it is safe to repeat. If .env has no connection
    string yet, it uses NEON_DATABASE_URL, or asks for one on a terminal.
    """
    with stops("finished steps stay; to continue: uv run manage.py setup"):
        choose.ignore_in_shell({name.upper() for name in Settings.model_fields})
        choose.complete_env_file(ENV_FILE)
        url = complete_settings(local=local)
        try:
            prepare_database(url)
        except typer.Exit:
            again = "uv run manage.py env, then this command again"
            typer.echo(f"  → to use another connection string: {again}", err=True)
            raise


def complete_settings(*, local: bool) -> DatabaseUrl:
    """Return the DATABASE_URL in .env, which is added if it is missing."""
    new_url = choose.missing_url(ENV_FILE, PROJECT, local=local)
    with timed_step("settings"):
        if new_url:
            env_file.set_database_url(ENV_FILE, new_url)
        url = settings_or_fail().database_url
    typer.echo(f"  DATABASE_URL is {url}")
    given = os.environ.get("NEON_DATABASE_URL")
    if given and not (new_url or local or choose.is_same_place(given, url)):
        remedy = "to change DATABASE_URL: uv run manage.py env"
        typer.echo(f"! NEON_DATABASE_URL names another database, and is ignored; {remedy}")
    if local and not url.is_embedded:
        fail(
            "--local was given, but DATABASE_URL in .env names another server",
            advice="to set up the database on that server: uv run manage.py setup\n"
            "to use the embedded PostgreSQL instead: uv run manage.py env --local",
        )
    return url


def prepare_database(url: DatabaseUrl) -> None:
    if url.is_embedded:
        with timed_step("database"), embedded_commands.embedded_server() as embedded:
            embedded.ensure_running(ENV_FILE)
    else:  # libpq would read them
        choose.ignore_in_shell({name for name in os.environ if name.startswith("PG")})
    with timed_step("schema"):
        run_migrations()
    with timed_step("connection"), Waiting("waiting for the database") as waiting:
        for check in run_checks(waiting):
            if check.ok is False:
                waiting.show(check)
                raise typer.Exit(1)


def run_migrations(timeout: float = 600) -> None:
    """Apply the missing migrations. timeout: seconds."""
    from postgres.migrate import bring_up_to_date

    settings = settings_or_fail()
    url, named = settings.migration_url, settings.database_url
    bring_up_to_date(url, schema().upgrade, timeout, named=named)


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
    if choose.complete_env_file(ENV_FILE):
        typer.echo("✓ .env is new, with its own BETTER_AUTH_SECRET")
    elif new_secret:
        env_file.set_value(ENV_FILE, "BETTER_AUTH_SECRET", env_file.new_secret())
        typer.echo("✓ BETTER_AUTH_SECRET is new: all users have to log in again")
    if new_secret:
        return
    with stops("DATABASE_URL is unchanged; to change it: uv run manage.py env"):
        url = choose.another_url(ENV_FILE, PROJECT, local=local)
    if url is None:
        typer.echo("- DATABASE_URL is unchanged")
        return
    choose.use_database(ENV_FILE, url)
    typer.echo("  next: uv run manage.py migrate")


@app.command()
def check(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Test each step of the connection, and say how to fix the one that fails.

    Waits for a compute that sleeps. Exit code 0: all is well, 1: a step failed.
    """
    with Waiting("waiting for the database") as waiting:
        passed = show_checks(run_checks(waiting), waiting, as_json=as_json)
    raise typer.Exit(0 if passed else 1)


def run_checks(on_wait: OnWait) -> Iterator[Check]:
    try:
        settings = load_settings(ENV_FILE)
    except SettingsError as error:
        for line in str(error).splitlines():
            problem, _, advice = line.partition("; ")
            yield Check("settings", False, problem, advice, BY_NAME["settings-wrong"])
        return
    clear_libpq_variables(settings)
    source = "the environment" if "DATABASE_URL" in os.environ else ".env"
    yield Check("settings", ok=True, detail=f"complete; DATABASE_URL comes from {source}")
    url = settings.database_url
    yield from check_connection(
        url, lambda: schema().history(), on_wait, lambda: schema().columns()
    )
    if settings.read_database_url:
        yield check_replica(settings.read_database_url, on_wait)


def check_replica(url: DatabaseUrl, on_wait: OnWait) -> Check:
    """Return the result of all steps for READ_DATABASE_URL."""
    for check in check_connection(url, lambda: schema().history(), on_wait):
        if check.finding and check.finding.name != "read-only":  # as a replica should be
            detail = f"{check.name}: {check.detail}"
            return replace(check, name="replica", detail=detail, advice=REPLICA_ADVICE)
    return Check("replica", ok=True, detail=f"lists come from {url.address}")


def schema() -> ModuleType:
    import migrations  # loads SQLAlchemy and Alembic, which only the last steps need

    return migrations


@app.command()
def migrate(
    *,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that it may take.")] = 600,
) -> None:
    """Apply the missing migrations: all, or none if one fails. Starts the embedded server.

    Waits for a compute that sleeps.
    """
    start_embedded_server()
    with stops("`uv run manage.py check` says whether the migrations are done"):
        run_migrations(timeout)
    typer.echo(f"✓ the schema is at {schema().head()}")


def start_embedded_server() -> None:
    """Start the embedded server, if migrations go there and it does not run."""
    url = settings_or_fail().migration_url
    if url.is_embedded:
        try:
            reach(url)
        except OSError:
            with embedded_commands.embedded_server() as embedded:
                typer.echo(f"✓ PostgreSQL runs at {embedded.ensure_running(ENV_FILE)}")


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

    import migrations  # and with it the models
    from postgres.copy_data import copy_database

    with stops("nothing was copied"):
        start_embedded_server()
        source, target = settings_or_fail().migration_url, choose.ask_target_url()
    history, upgrade = migrations.history, migrations.upgrade
    copy_database(source, target, SQLModel.metadata, history, upgrade, timeout)
    with stops(f"all rows are at {target}; .env names the old database"):
        if switch is None and sys.stdin.isatty() and not os.environ.get("TARGET_DATABASE_URL"):
            switch = typer.confirm("  Use this database from now on (as DATABASE_URL in .env)?")
    if not switch:
        typer.echo("  .env names the old database; to change that: uv run manage.py env")
        return
    with stops(f"all rows are at {target}; see .env for the database that it names"):
        choose.use_database(ENV_FILE, target)
    typer.echo("  next: uv run manage.py check")


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

        document = create_app(settings).openapi()
    text = json.dumps(document, ensure_ascii=False, indent=2) + "\n"
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
