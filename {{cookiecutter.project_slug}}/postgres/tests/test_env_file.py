"""`.env` files: values are written and read back, privately, and nothing else changes."""

import io
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dotenv import dotenv_values
from hypothesis import given
from hypothesis import strategies as st

from postgres import env_file
from postgres.url import DatabaseUrl, parse

EXAMPLE = """\
# Required: `uv run manage.py setup` asks for it.
DATABASE_URL=postgresql://USER:PASSWORD@HOST/DATABASE
BETTER_AUTH_SECRET=change-me-to-at-least-32-random-characters

# Connections of one process.
# DB_POOL_SIZE=10
# DATABASE_URL=postgresql://ann@localhost/another
"""
PASTED = "postgresql://ann:s3cr3t@localhost:5432/todo"

needs_modes = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / ".env.example"
    path.write_text(EXAMPLE, "utf-8")
    return path


@pytest.fixture
def env(tmp_path: Path) -> Path:
    return tmp_path / ".env"


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def secret_in(path: Path) -> str:
    return env_file.get_value(path, "BETTER_AUTH_SECRET") or ""


def test_a_new_file_is_the_example_with_its_own_secret(env: Path, example: Path) -> None:
    assert env_file.complete(env, example)

    assert len(secret_in(env)) == 64
    assert env.read_text("utf-8") == EXAMPLE.replace(env_file.EXAMPLE_SECRET, secret_in(env))


def test_existing_settings_are_kept(env: Path, example: Path) -> None:
    env.write_text("# mine\nBETTER_AUTH_SECRET=of-my-own\n", "utf-8")

    assert not env_file.complete(env, example)

    assert env.read_text("utf-8") == "# mine\nBETTER_AUTH_SECRET=of-my-own\n"


@pytest.mark.parametrize(
    "before", ["", "BETTER_AUTH_SECRET=\n", f"BETTER_AUTH_SECRET={env_file.EXAMPLE_SECRET}\n"]
)
def test_a_missing_secret_is_added(env: Path, example: Path, before: str) -> None:
    env.write_text(f"PORT=8001\n{before}", "utf-8")

    assert not env_file.complete(env, example)

    assert len(secret_in(env)) == 64
    assert env_file.get_value(env, "PORT") == "8001"


@needs_modes
@pytest.mark.usefixtures("open_umask")
def test_other_users_can_never_read_the_file(
    env: Path, example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    replace = os.replace

    def look(source: str, target: str) -> None:
        modes.extend([mode_of(Path(source)), mode_of(Path(target))])
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)

    env_file.complete(env, example)
    env.chmod(0o644)
    env_file.set_database_url(env, parse(PASTED))

    assert modes == [0o600] * 4
    assert mode_of(env) == 0o600


def test_a_failure_leaves_no_incomplete_file(
    env: Path, example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)

    with pytest.raises(OSError, match="no space"):
        env_file.complete(env, example)
    assert list(env.parent.iterdir()) == [example]


@needs_modes
def test_a_symlink_is_kept(env: Path, tmp_path: Path) -> None:
    target = tmp_path / "shared"
    target.write_text("A=1\n", "utf-8")
    env.symlink_to(target)

    env_file.set_value(env, "A", "2")

    assert env.is_symlink()
    assert target.read_text("utf-8") == "A=2\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "A=new\n"),
        ("A=1\nB=2\n", "A=new\nB=2\n"),
        ("B=2", "B=2\nA=new\n"),
        ('A="1 # one"\n# A=3\n\nBA=2\n', "A=new\n# A=3\n\nBA=2\n"),
        ("KEY='begin\nA=1\nend'\nA=2\n", "KEY='begin\nA=1\nend'\nA=new\n"),
    ],
)
def test_setting_a_value_changes_nothing_else(env: Path, before: str, after: str) -> None:
    env.write_text(before, "utf-8")

    env_file.set_value(env, "A", "new")

    assert env.read_text("utf-8") == after
    assert env_file.get_value(env, "A") == "new"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (f"DATABASE_URL={PASTED}", True),
        ("DATABASE_URL=postgresql://USER:PASSWORD@HOST/DATABASE", False),
        ("DATABASE_URL=", False),
        ("# none", False),
    ],
)
def test_a_placeholder_is_not_a_connection_string(env: Path, line: str, *, found: bool) -> None:
    env.write_text(f"{line}\n", "utf-8")

    assert env_file.has_database_url(env) is found


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_a_connection_string_is_written_without_quotes(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.env"
    path.write_text("BEFORE=1\nDATABASE_URL=old # comment\nAFTER=2\n", "utf-8")
    url = DatabaseUrl(text, text, "::1", 5432, text, (("options", text),))

    env_file.set_database_url(path, url)

    lines = path.read_text("utf-8")
    assert lines == f"BEFORE=1\nDATABASE_URL={url.for_libpq()}\nAFTER=2\n"
    assert dotenv_values(stream=io.StringIO(lines))["DATABASE_URL"] == url.for_libpq()


def test_every_secret_is_different() -> None:
    assert len({env_file.new_secret() for _ in range(10)}) == 10
