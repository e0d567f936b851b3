"""Chooses the database that `.env` names: what is pasted, or the embedded server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from postgres import env_file, prompt
from postgres.console import fail
from postgres.embedded_commands import embedded_server
from postgres.url import DatabaseUrl, DatabaseUrlError, parse

EMBEDDED = "the embedded PostgreSQL"
OTHER_URLS = {
    "DATABASE_URL_DIRECT": "migrations go there",
    "READ_DATABASE_URL": "lists come from there",
}


def complete_env_file(path: Path) -> bool:
    """Create `.env`, or add what it lacks. Returns whether it is new."""
    try:
        return env_file.complete(path, path.with_name(".env.example"))
    except UnicodeDecodeError:
        again = f"mv {path.name} {path.name}.old, then the same command"
        advice = f"save it as UTF-8, or start again: {again}"
        fail(f"{path} is damaged, or not saved as UTF-8", advice=advice)


def embedded_url(project: str) -> DatabaseUrl:
    """Return a URL for a new embedded server, with a database named after the project."""
    with embedded_server() as embedded:
        url: DatabaseUrl = embedded.new_url(project.replace("-", "_"))
    return url


def missing_url(path: Path, project: str, *, local: bool) -> DatabaseUrl | None:
    """Return the URL that `.env` lacks. None: it has one."""
    if env_file.has_database_url(path):
        return None
    with valid_url("settings"):
        url = None if local else prompt.from_environment_or_ask(empty=EMBEDDED)
    return url or embedded_url(project)


def another_url(path: Path, project: str, *, local: bool) -> DatabaseUrl | None:
    """Return the URL that takes the place of the one in `.env`. None: it stays."""
    if local:
        return embedded_url(project)
    is_set = env_file.has_database_url(path)
    with valid_url("DATABASE_URL"):
        url = prompt.ask_or_read_stdin(empty="no change" if is_set else EMBEDDED)
    return url if url or is_set else embedded_url(project)


def ask_target_url() -> DatabaseUrl:
    """Return the database to copy to: TARGET_DATABASE_URL, or what is pasted."""
    given = os.environ.get("TARGET_DATABASE_URL")
    with valid_url("nothing was copied: TARGET_DATABASE_URL"):
        url = prompt.parse_pasted(given) if given else prompt.ask_or_read_stdin(empty="stop")
    if url is None:
        fail("no connection string was given: nothing was copied")
    return url


@contextmanager
def valid_url(name: str) -> Iterator[None]:
    """End the command with a message if a connection string is refused. name: what it is for."""
    try:
        yield
    except DatabaseUrlError as error:
        fail(f"{name}: {error}")


def use_database(path: Path, url: DatabaseUrl) -> None:
    """Write it into `.env`, and say what overrides it."""
    env_file.set_database_url(path, url)
    typer.echo(f"✓ DATABASE_URL is {url}")
    if "DATABASE_URL" in os.environ:
        typer.echo("! This shell sets DATABASE_URL too, which overrides .env: unset it there")
    for name, use in OTHER_URLS.items():
        remedies = {
            "unset it in the shell": os.environ.get(name),
            "change or remove that line in .env": env_file.get_value(path, name),
        }
        for remedy, value in remedies.items():
            if value and not is_same_place(value, url):
                typer.echo(f"! {name} still names another database: {use}; {remedy}")


def is_same_place(text: str, url: DatabaseUrl) -> bool:
    try:
        return url.is_same_database(parse(text))
    except DatabaseUrlError:
        return False


def ignore_in_shell(names: set[str]) -> None:
    """Ignore variables of the shell that override `.env`: they may be for another program."""
    for name in sorted(names & os.environ.keys()):
        del os.environ[name]
        typer.echo(
            f"! This shell sets {name}. Setup ignores it, the app does not. Type: unset {name}"
        )
