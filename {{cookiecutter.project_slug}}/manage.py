"""The operator's commands: `uv run manage.py --help`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated

import typer

import env_file
from config import ENV_FILE, PROJECT_DIR, PYPROJECT, Settings, SettingsError, load_settings
from database_url import DatabaseUrl, DatabaseUrlError, read

if TYPE_CHECKING:
    from diagnosis import Check

app = typer.Typer(help="Run this project.", no_args_is_help=True, add_completion=False)
postgres = typer.Typer(help="The embedded PostgreSQL of this project.", no_args_is_help=True)
app.add_typer(postgres, name="postgres")


def fail(*lines: str) -> typer.Exit:
    """Say what is wrong. The result is to be raised."""
    for line in lines:
        typer.secho(f"✗ {line}", fg="red", err=True)
    return typer.Exit(1)


def settings_or_fail() -> Settings:
    try:
        return load_settings(ENV_FILE)
    except SettingsError as error:
        raise fail(*str(error).splitlines()) from None


@contextmanager
def failing_plainly() -> Iterator[None]:
    """Turn what can go wrong with the embedded server into a message and exit code 1."""
    import local_postgres

    try:
        yield
    except local_postgres.LocalPostgresError as error:
        raise fail(str(error)) from None


@app.command()
def env(
    *,
    local: Annotated[bool, typer.Option("--local", help="Use the embedded PostgreSQL.")] = False,
    new_secret: Annotated[
        bool, typer.Option("--new-secret", help="Replace BETTER_AUTH_SECRET, nothing else.")
    ] = False,
) -> None:
    """Create .env, or change the DATABASE_URL in it.

    Asks for a connection string without showing it, or reads it from standard input where that is
    not a terminal. An empty answer chooses the embedded PostgreSQL.
    """
    if not ENV_FILE.exists():
        secret = {"BETTER_AUTH_SECRET": env_file.new_secret()}
        env_file.create(ENV_FILE, PROJECT_DIR / ".env.example", secret)
        typer.echo("✓ .env is new, with a BETTER_AUTH_SECRET of its own")
        if new_secret:
            return
    elif new_secret:
        env_file.set_value(ENV_FILE, "BETTER_AUTH_SECRET", env_file.new_secret())
        typer.echo("✓ BETTER_AUTH_SECRET is new: whoever was logged in has to log in again")
        return
    url = None if local else ask_database_url()
    if url is None:
        url = env_file.embedded_url(PYPROJECT["project"]["name"].replace("-", "_"))
    env_file.set_value(ENV_FILE, "DATABASE_URL", url.for_libpq())
    typer.echo(f"✓ DATABASE_URL is {url}")
    if "DATABASE_URL" in os.environ:
        typer.echo("! The shell sets DATABASE_URL too, and the shell goes first: unset it there.")
    typer.echo("  next: uv run manage.py migrate")


def ask_database_url() -> DatabaseUrl | None:
    """Return what was pasted, None for an empty answer."""
    try:
        if sys.stdin.isatty():
            return env_file.ask_database_url(empty="the embedded PostgreSQL")
        text = sys.stdin.read()
        if not text.strip():
            return None
        reading = read(text)
    except DatabaseUrlError as error:
        raise fail(f"DATABASE_URL: {error}") from None
    for change in reading.changes:
        typer.echo(f"  {change}")
    return reading.url


@app.command()
def check(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Try every step on the way to the database, and say what to do about the one that fails."""
    results = []
    for step in run_checks():
        results.append(step)
        if not as_json:
            show(step)
    ok = all(step.ok for step in results)
    if as_json:
        checks = [asdict(step) for step in results]
        typer.echo(json.dumps({"ok": ok, "checks": checks}, ensure_ascii=False, indent=2))
    raise typer.Exit(0 if ok else 1)


def run_checks() -> Iterator["Check"]:
    import migrations
    from diagnosis import Check, check_connection

    try:
        settings = load_settings(ENV_FILE)
    except SettingsError as error:
        for line in str(error).splitlines():
            problem, _, advice = line.partition("; ")
            yield Check("settings", ok=False, detail=problem, advice=advice)
        return
    source = "the environment" if "DATABASE_URL" in os.environ else ".env"
    yield Check("settings", ok=True, detail=f"complete; DATABASE_URL comes from {source}")
    yield from check_connection(settings.database_url, migrations.head, on_wait=show_wait)


def show(step: "Check") -> None:
    mark, color = {True: ("✓", "green"), False: ("✗", "red"), None: ("-", None)}[step.ok]
    typer.echo(f"{typer.style(mark, fg=color)} {step.name:<9} {step.detail}")
    if step.advice:
        typer.echo(f"  {'':<9} → {step.advice}")


def show_wait(seconds: float) -> None:
    typer.echo(f"  waiting for the database, {seconds:.0f} s so far", err=True)


@app.command()
def migrate() -> None:
    """Bring the schema up to date: all of it, or nothing. Starts the embedded server."""
    import psycopg2
    from sqlalchemy.exc import DBAPIError

    import migrations
    from diagnosis import explain, reach

    url = settings_or_fail().migration_url
    if url.is_embedded:
        try:
            reach(url).close()
        except OSError:
            start()
            url = settings_or_fail().migration_url  # the port may have changed
    try:
        migrations.upgrade(url)
    except DBAPIError as error:
        cause = error.orig if isinstance(error.orig, psycopg2.Error) else error
        finding = explain(cause, url)
        raise fail(
            f"{url.address}: {finding.cause}; nothing was changed\n  → {finding.advice}"
        ) from None
    typer.echo(f"✓ the schema is at {migrations.head()}")


@postgres.command()
def start() -> None:
    """Create the server on first use, and start it where it does not run."""
    import local_postgres

    before = settings_or_fail().database_url
    with failing_plainly():
        url = local_postgres.ensure_running(ENV_FILE)
    typer.echo(f"✓ PostgreSQL runs at {url}")
    if url.port != before.port:
        typer.echo(f"! Port {before.port} was taken; .env names the new one: restart the app")


@postgres.command()
def stop() -> None:
    """Stop the server; its data stays."""
    import local_postgres

    with failing_plainly():
        stopped = local_postgres.stop()
    typer.echo("✓ PostgreSQL has stopped" if stopped else "✓ PostgreSQL was not running")


@postgres.command()
def status() -> None:
    """Say whether the server runs; exit 0 when it does, 3 when it does not."""
    import local_postgres

    with failing_plainly():
        state = local_postgres.status()
    if not state.running:
        typer.echo(f"- PostgreSQL does not run; its data is in {state.folder}")
        raise typer.Exit(3)
    typer.echo(f"✓ PostgreSQL runs on port {state.port}, pid {state.pid}, log {state.log}")


@postgres.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context) -> None:
    """Open psql on the embedded server; further arguments go to psql."""
    import local_postgres

    url = settings_or_fail().database_url
    if not url.is_embedded:
        raise fail(f"DATABASE_URL is not the embedded server but {url}: use your own psql")
    with failing_plainly():
        program = local_postgres.binaries() / "psql"
        url = local_postgres.ensure_running(ENV_FILE)
    login = ["--host", url.host, "--port", str(url.port), "--username", url.user]
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("PG")}
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is psql's own: it cancels a query
    done = subprocess.run(  # noqa: S603
        [str(program), *login, *context.args, url.database],
        # The password goes by the environment: a command line can be read by everybody.
        env=environment | {"PGPASSWORD": url.password, "PGSSLMODE": "disable"},
        check=False,
    )
    raise typer.Exit(done.returncode)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has no ✓ shows a ?
    app()
