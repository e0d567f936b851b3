"""The commands of `manage.py postgres`, for the embedded server."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import typer

from postgres import env_file
from postgres.console import fail

ENV_FILE = Path(__file__).parents[1] / ".env"

app = typer.Typer(help="The embedded PostgreSQL of this project.", no_args_is_help=True)


@contextmanager
def embedded_server() -> Iterator[ModuleType]:
    """Yield postgres.embedded. Ends the command with a message if that fails."""
    try:
        embedded = import_module("postgres.embedded")
    except ModuleNotFoundError:
        problem = "the embedded PostgreSQL is for development only, and is not installed here"
        fail(problem, advice="in development: uv sync\non a server: use another database")
    try:
        yield embedded
    except embedded.LocalPostgresError as error:
        fail(str(error))


@app.command()
def start() -> None:
    """Create the server on first use, and start it if it is not running."""
    before = env_file.get_value(ENV_FILE, "DATABASE_URL")
    with embedded_server() as embedded:
        url = embedded.ensure_running(ENV_FILE)
    typer.echo(f"✓ PostgreSQL is running at {url}")
    if env_file.get_value(ENV_FILE, "DATABASE_URL") != before:
        typer.echo("! Its port was taken; .env names the new one: restart the app")


@app.command()
def stop() -> None:
    """Stop the server; its data stays."""
    with embedded_server() as embedded:
        stopped = embedded.stop()
    typer.echo("✓ PostgreSQL has stopped" if stopped else "✓ PostgreSQL was not running")


@app.command()
def status() -> None:
    """Say whether the server is running. Exit code 0: it is, 3: it is not."""
    with embedded_server() as embedded:
        state = embedded.status()
    if not state.running:
        typer.echo(f"- PostgreSQL is not running; its data is in {state.folder}")
        raise typer.Exit(3)
    typer.echo(f"✓ PostgreSQL is running on port {state.port}, pid {state.pid}, log {state.log}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context) -> None:
    """Open psql on the embedded server; further arguments go to psql."""
    with embedded_server() as embedded:
        code = embedded.run_psql(embedded.ensure_running(ENV_FILE), *context.args)
    raise typer.Exit(code)
