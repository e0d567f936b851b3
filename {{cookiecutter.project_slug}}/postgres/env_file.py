"""Creates and changes `.env`, which holds the project's secrets: mode 0600, comments kept."""

import os
import secrets
from pathlib import Path

import dotenv

from postgres.url import PLACEHOLDER, DatabaseUrl

# The value in `.env.example`: config.py refuses it.
EXAMPLE_SECRET = "change-me-to-at-least-32-random-characters"  # noqa: S105  (not a secret)

# The line of `.env.example` on ENVIRONMENT, and the one of a new `.env`.
DEVELOPMENT = ("# ENVIRONMENT=production", "ENVIRONMENT=development")


def complete(path: Path, example: Path) -> bool:
    """Create the file, or add what it lacks: a BETTER_AUTH_SECRET. Returns whether it is new."""
    is_new = not os.path.lexists(path)
    if is_new:
        create(path, example)
    elif get_value(path, "BETTER_AUTH_SECRET") in {None, "", EXAMPLE_SECRET}:
        set_value(path, "BETTER_AUTH_SECRET", new_secret())
    return is_new


def create(path: Path, example: Path) -> None:
    """Copy the example to a file that only its owner can read, with a new BETTER_AUTH_SECRET.

    The file is for development, which nothing else turns on. Raises FileExistsError.
    """
    path.touch(0o600, exist_ok=False)
    try:
        path.write_text(example.read_text("utf-8").replace(*DEVELOPMENT), "utf-8")
        set_value(path, "BETTER_AUTH_SECRET", new_secret())
    except BaseException:
        path.unlink()
        raise


def set_value(path: Path, name: str, value: str) -> None:
    """Change the line that sets `name`, or append one, in one step; the rest stays as it is.

    value: without quotes, blanks and `$`, so that `docker run --env-file` reads it too.
    """
    path = path.resolve()  # a link to a file elsewhere stays a link
    path.chmod(0o600)  # dotenv keeps the mode
    dotenv.set_key(path, name, value, quote_mode="never")


def get_value(path: Path, name: str) -> str | None:
    """Return what the file sets, without `${…}` filled in. None: it does not set this name."""
    return dotenv.dotenv_values(path, interpolate=False).get(name)


def has_database_url(path: Path) -> bool:
    return get_value(path, "DATABASE_URL") not in {None, "", PLACEHOLDER}


def set_database_url(path: Path, url: DatabaseUrl) -> None:
    set_value(path, "DATABASE_URL", url.for_libpq())


def new_secret() -> str:
    """Return 64 random characters."""
    return secrets.token_urlsafe(48)
