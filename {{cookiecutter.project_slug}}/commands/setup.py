"""What `manage.py setup` does, step by step; other commands use some of the steps."""

import os

import typer

import config
from commands.check import run_checks
from commands.settings import settings_or_fail
from postgres import choose, embedded_commands, env_file
from postgres.connect import reach
from postgres.console import Waiting, fail, timed_step
from postgres.url import DatabaseUrl

PROJECT: str = config.PYPROJECT["project"]["name"]


def complete_settings(*, local: bool) -> DatabaseUrl:
    """Return the DATABASE_URL in .env, which is added if it is missing."""
    new_url = choose.missing_url(config.ENV_FILE, PROJECT, local=local)
    with timed_step("settings"):
        if new_url:
            env_file.set_database_url(config.ENV_FILE, new_url)
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
    """Start the embedded server if it is used, migrate, and check the connection."""
    if url.is_embedded:
        with timed_step("database"), embedded_commands.embedded_server() as embedded:
            embedded.ensure_running(config.ENV_FILE)
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
    import migrations  # with SQLAlchemy and Alembic, which not all commands need
    from postgres.migrate import bring_up_to_date

    settings = settings_or_fail()
    url, named = settings.migration_url, settings.database_url
    bring_up_to_date(url, migrations.upgrade, timeout, named=named)


def start_embedded_server() -> None:
    """Start the embedded server, if migrations go there and it is not running."""
    url = settings_or_fail().migration_url
    if url.is_embedded:
        try:
            reach(url)
        except OSError:
            with embedded_commands.embedded_server() as embedded:
                typer.echo(f"✓ PostgreSQL is running at {embedded.ensure_running(config.ENV_FILE)}")
