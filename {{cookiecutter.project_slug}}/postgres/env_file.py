"""Creates and changes `.env`, which holds this project's secrets.

Standard library only, for Python 3.10 on: the generator's hook runs this file too.
"""

import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from postgres.prompt import read_pasted
from postgres.url import EMBEDDED_USER, DatabaseUrl, DatabaseUrlError, read

# The value of `.env.example` that nobody can work with, as url.PLACEHOLDER: both are refused.
EXAMPLE_SECRET = "change-me-to-at-least-32-random-characters"  # noqa: S105  (no secret at all)
LOOPBACK = "127.0.0.1"
# Below the ports that Linux, macOS and Windows hand out by themselves, so that one stays free.
PORTS = range(20_000, 30_000)
ATTEMPTS = 3
DRAFT_SECONDS = 10  # a write takes far less: an older draft is one that was killed

# A setting as python-dotenv reads it: a quoted value may go on over several lines, and " #" starts
# a comment after another.
SETTING = re.compile(
    r"""(?msx)
    (?:\A\ufeff|^)[ \t]*(?:export[ \t]+)?(?P<name>[^=\#\s'"]+)[ \t]*=
    (?P<value>[ \t]*(?:
        '(?:\\.|[^'\\])*'(?=\s|\Z)
        |"(?:\\.|[^"\\])*"(?=\s|\Z)
        |(?:[^\s\#]|(?<!\s)\#|[^\S\r\n]+(?![\s\#]))+
    )|)"""
)
# These characters mean themselves to python-dotenv, to `docker run --env-file`, which knows no
# quotes, and in `export $(cat .env)`.
PLAIN = re.compile(r"(?a)[\w.,:;/@%?&=+~^!\[\]-]*")


def create(path: Path, example: Path, values: Mapping[str, str]) -> None:
    """Write the text of `example` to `path`, with `values` filled in; its owner alone may read it.

    A line that is commented out (`# NAME=…`) comes into force when it gets a value.
    Raises FileExistsError, and ValueError for a value that no line can hold.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already: change it, or move it away")
    text = read_text(example)
    for name, value in values.items():
        if not find_setting(text, name):
            text = re.sub(rf"(?m)^#[ \t]*(?={re.escape(name)}=)", "", text, count=1)
        text = with_value(text, name, value)
    write_text(path, text)


def set_value(path: Path, name: str, value: str) -> None:
    """Change the line that sets `name`, or append one; everything else stays as it is.

    Raises ValueError for a value that no line can hold.
    """
    write_text(path, with_value(read_text(path), name, value))


def get_value(path: Path, name: str) -> str | None:
    """Return what python-dotenv reads for `name`, but without its ${…} filled in."""
    setting = find_setting(read_text(path), name)
    if setting is None:
        return None
    value = setting["value"].strip()
    if value[:1] in {"'", '"'} and value[-1:] == value[:1]:
        return re.sub(r"\\([\\'])", r"\1", value[1:-1])
    return value


def find_setting(text: str, name: str) -> re.Match[str] | None:
    """Find the setting that counts: the last one."""
    settings = [setting for setting in SETTING.finditer(text) if setting["name"] == name]
    return settings[-1] if settings else None


def with_value(text: str, name: str, value: str) -> str:
    if setting := find_setting(text, name):
        start, end = setting.span("value")
        return text[:start] + quoted(name, value) + text[end:]
    newline = "\r\n" if "\r\n" in text else "\n"
    separator = "" if not text or text.endswith("\n") else newline
    return f"{text}{separator}{name}={quoted(name, value)}{newline}"


def quoted(name: str, value: str) -> str:
    """Write a value so that python-dotenv reads it back. Raises ValueError without showing it."""
    if not value.isprintable():
        raise ValueError(f"{name}: the value holds line ends or control characters")
    if "${" in value:
        raise ValueError(f'{name}: the value holds "${{", which stands for a variable in .env')
    if PLAIN.fullmatch(value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def read_text(path: Path) -> str:
    """Read without loss: line ends, and bytes that are not UTF-8, come through."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step. No other user can read it at any time."""
    path = path.resolve()  # a link to a file elsewhere stays a link
    for draft in path.parent.glob(f"{path.name}.*.tmp"):
        with suppress(OSError):  # another process may finish it now
            if time.time() - draft.stat().st_mtime > DRAFT_SECONDS:
                draft.unlink()  # it may hold a secret
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def new_secret() -> str:
    """Return 64 random characters."""
    return secrets.token_urlsafe(48)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing uses. Raises OSError when there is none."""
    for _ in range(100):
        port = secrets.choice(PORTS)
        with socket.socket() as server:
            try:
                server.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port found on {LOOPBACK} from {PORTS.start} to {PORTS.stop - 1}")


def embedded_url(database: str) -> DatabaseUrl:
    """Return where a new embedded server shall listen, with a new password."""
    # It has no TLS; a PGSSLMODE in the environment, meant for another server, shall not ask for it.
    options = (("sslmode", "disable"),)
    password = secrets.token_urlsafe(24)
    return DatabaseUrl(EMBEDDED_USER, password, LOOPBACK, free_port(), database, options)


def ask_database_url(
    read: Callable[[str], str] = read_pasted, out: TextIO | None = None, *, empty: str = "later"
) -> DatabaseUrl | None:
    """Ask on the terminal, without echo. None: nothing was answered, which means `empty`.

    Raises DatabaseUrlError when the last attempt is as wrong as those before it.
    """
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            answer = read(f"Connection string (hidden; empty: {empty}): ")
        except EOFError:
            return None
        if not answer.strip():
            return None
        try:
            return take_database_url(answer, out)
        except DatabaseUrlError as error:
            if not attempts_left:
                raise
            print(f"  Once more: {error}", file=out or sys.stderr)
    return None


def take_database_url(text: str, out: TextIO | None = None) -> DatabaseUrl:
    """Understand a pasted text, and say what was mended. Raises DatabaseUrlError."""
    reading = read(text)
    for change in reading.changes:
        print(f"  Mended: {change}", file=out or sys.stderr)
    return reading.url
