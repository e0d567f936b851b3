"""The project's commands: `uv run manage.py --help`. `commands/` has what they do."""

import os
import signal
import sys

if __name__ == "__main__":  # before the imports, which take a second: Ctrl-C shows no traceback

    def stop_at_once(*_: object) -> None:
        os.write(2, b"stopped\n")
        os._exit(130)

    signal.signal(signal.SIGINT, stop_at_once)

import json
import secrets
from contextlib import redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

import config
from commands import account
from commands.check import run_checks
from commands.settings import settings_or_fail
from commands.setup import (
    PROJECT,
    complete_settings,
    prepare_database,
    run_migrations,
    start_embedded_server,
)
from postgres import choose, embedded_commands, env_file
from postgres.console import Waiting, fail, on_stop, show_checks

app = typer.Typer(help="Run this project.", no_args_is_help=True, add_completion=False)
app.add_typer(account.app, name="account")
app.add_typer(embedded_commands.app, name="postgres")

Local = Annotated[bool, typer.Option("--local", help="Use the embedded PostgreSQL.")]


@app.command()
def setup(*, local: Local = False) -> None:
    """Set up this project: .env, embedded PostgreSQL, migrations, connection check.

    Keeps what is there and adds what is missing, so it is safe to repeat. If .env has no connection
    string yet, it uses NEON_DATABASE_URL, or asks for one on a terminal.
    """
    with on_stop("finished steps stay; to continue: uv run manage.py setup"):
        choose.ignore_in_shell({name.upper() for name in config.Settings.model_fields})
        choose.complete_env_file(config.ENV_FILE)
        url = complete_settings(local=local)
        try:
            prepare_database(url)
        except typer.Exit:
            again = "uv run manage.py env, then this command again"
            typer.echo(f"  → to use another connection string: {again}", err=True)
            raise


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
    if choose.complete_env_file(config.ENV_FILE):
        typer.echo("✓ .env is new, with its own BETTER_AUTH_SECRET")
    elif new_secret:
        env_file.set_value(config.ENV_FILE, "BETTER_AUTH_SECRET", env_file.new_secret())
        typer.echo("✓ BETTER_AUTH_SECRET is new: all users have to log in again")
    if new_secret:
        return
    with on_stop("DATABASE_URL is unchanged; to change it: uv run manage.py env"):
        url = choose.another_url(config.ENV_FILE, PROJECT, local=local)
    if url is None:
        typer.echo("- DATABASE_URL is unchanged")
        return
    choose.use_database(config.ENV_FILE, url)
    typer.echo("  next: uv run manage.py migrate")


@app.command()
def check(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Test each step of the connection, and say how to fix the one that fails.

    Waits for a sleeping compute. Exit code 0: all is well, 1: a step failed.
    """
    with Waiting("waiting for the database") as waiting:
        passed = show_checks(run_checks(waiting), waiting, as_json=as_json)
    raise typer.Exit(0 if passed else 1)


@app.command()
def migrate(
    *,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for the migrations.")] = 600,
) -> None:
    """Apply the missing migrations: all, or none if one fails. Starts the embedded server.

    Waits for a sleeping compute.
    """
    from migrations import head

    start_embedded_server()
    with on_stop("`uv run manage.py check` says whether the migrations are done"):
        run_migrations(timeout)
    typer.echo(f"✓ the schema is at {head()}")


@app.command()
def copy(
    *,
    switch: Annotated[
        bool | None,
        typer.Option("--switch/--no-switch", help="Use the new database in .env afterwards."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for the migrations, and again for the rows.")
    ] = 3600,
) -> None:
    """Copy all data into an empty database, such as a new one at Neon: all of it, or nothing.

    Asks for its connection string without showing it, or takes it from TARGET_DATABASE_URL, or from
    standard input where that is not a terminal. Stop the app first: what it writes meanwhile stays
    in the old database.
    """
    from sqlmodel import SQLModel

    import migrations  # and with it the models
    from postgres.copy_data import copy_database

    with on_stop("nothing was copied"):
        start_embedded_server()
        source, target = settings_or_fail().migration_url, choose.ask_target_url()
    history, upgrade = migrations.history, migrations.upgrade
    copy_database(source, target, SQLModel.metadata, history, upgrade, timeout)
    with on_stop(f"all rows are at {target}; .env names the old database"):
        if switch is None and sys.stdin.isatty() and not os.environ.get("TARGET_DATABASE_URL"):
            switch = typer.confirm("  Use this database from now on (as DATABASE_URL in .env)?")
    if not switch:
        typer.echo("  .env names the old database; to change that: uv run manage.py env")
        return
    with on_stop(f"all rows are at {target}; see which database .env names"):
        choose.use_database(config.ENV_FILE, target)
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
