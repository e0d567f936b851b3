"""`manage.py setup` leads from a fresh clone to a checked database, and can be repeated."""

import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import config
import manage
from config import PROJECT_DIR
from postgres import embedded, env_file
from postgres.env_file import EXAMPLE_SECRET, get_value, set_value
from postgres.tests.scripted_server import error, scripted_server
from postgres.tests.servers import connected, create_database, run_alone
from postgres.url import PLACEHOLDER, DatabaseUrl, parse


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the .env in a fresh clone, where it does not exist yet."""
    shutil.copy(PROJECT_DIR / ".env.example", tmp_path)
    monkeypatch.setattr(config, "ENV_FILE", tmp_path / ".env")
    for name in ("DATABASE_URL", "BETTER_AUTH_SECRET", "NEON_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".env"


@pytest.fixture(scope="module")
def provider(embedded_server: DatabaseUrl) -> DatabaseUrl:
    """A server that is not the project's own: it has another user."""
    user, password = f"test_{secrets.token_hex(8)}", secrets.token_hex(8)
    run_alone(embedded_server, f"CREATE ROLE {user} LOGIN SUPERUSER PASSWORD '{password}'")
    return embedded_server.replace(user=user, password=password)


@pytest.fixture
def new_url(provider: DatabaseUrl, clone: Path, monkeypatch: pytest.MonkeyPatch) -> DatabaseUrl:
    """An empty database, with its connection string in NEON_DATABASE_URL."""
    assert not clone.exists()
    url = create_database(provider)
    monkeypatch.setenv("NEON_DATABASE_URL", url.for_libpq())
    return url


@pytest.fixture
def local_server(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where `setup` creates its embedded server."""
    folder = clone.parent / ".postgres"
    start = embedded.start
    monkeypatch.setattr(embedded, "start", lambda url: start(url, folder))
    yield folder
    embedded.stop(folder)


def setup(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(manage.app, ["setup", *options])
    return result.exit_code, result.output


def done(output: str) -> list[str]:
    return re.findall(r"^✓ (\w+) \(\d+\.\d s\)$", output, re.MULTILINE)


def test_setup_reads_the_string_from_the_variable_and_migrates(
    clone: Path, new_url: DatabaseUrl
) -> None:
    code, output = setup()

    assert code == 0, output
    assert done(output) == ["settings", "schema", "connection"]
    assert parse(get_value(clone, "DATABASE_URL") or "") == new_url
    assert new_url.password not in output


@pytest.mark.usefixtures("new_url")
def test_repeating_setup_keeps_existing_settings(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup()
    before = clone.read_text("utf-8")
    monkeypatch.setenv("NEON_DATABASE_URL", "postgresql://me:pw@another.example.com/todo")

    code, output = setup()

    assert code == 0, output
    assert clone.read_text("utf-8") == before
    assert "! NEON_DATABASE_URL names another database, and is ignored; to change" in output


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("key", [EOFError, KeyboardInterrupt])
def test_ctrl_c_and_ctrl_d_say_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, key: type[BaseException]
) -> None:
    def press(**_empty: str) -> None:
        raise key

    monkeypatch.setattr("postgres.prompt.from_environment_or_ask", press)

    code, output = setup()

    assert code == 130
    assert "stopped: finished steps stay; to continue: uv run manage.py setup" in output


@pytest.mark.usefixtures("new_url")
@pytest.mark.parametrize(
    ("name", "unusable"),
    [("DATABASE_URL", PLACEHOLDER), ("BETTER_AUTH_SECRET", EXAMPLE_SECRET)],
)
def test_setup_completes_settings_that_were_copied_by_hand(
    clone: Path, name: str, unusable: str
) -> None:
    shutil.copy(PROJECT_DIR / ".env.example", clone)
    set_value(clone, "PORT", "8001")

    code, output = setup()

    assert code == 0, output
    assert get_value(clone, name) not in {unusable, None}
    assert get_value(clone, "PORT") == "8001"
    assert clone.stat().st_mode & 0o077 == 0


def test_local_starts_an_embedded_server_without_a_question(
    clone: Path, local_server: Path
) -> None:
    code, output = setup("--local")

    assert code == 0, output
    assert done(output) == ["settings", "database", "schema", "connection"]
    assert parse(get_value(clone, "DATABASE_URL") or "").is_embedded
    assert embedded.status(local_server).ready


def test_without_a_terminal_setup_says_how_to_choose_a_database(clone: Path) -> None:
    code, output = setup()

    assert code == 1
    assert "✗ settings: there is no connection string yet, and no terminal to ask" in output
    assert "NEON_DATABASE_URL" in output
    assert "--local" in output
    assert get_value(clone, "DATABASE_URL") == PLACEHOLDER


def test_an_invalid_string_is_rejected_and_not_shown(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEON_DATABASE_URL", "mysql://ada:s3cr3t@h/d")

    code, output = setup()

    assert code == 1
    assert "✗ settings: the text is for another database (mysql)" in output
    assert "s3cr3t" not in output
    assert get_value(clone, "DATABASE_URL") == PLACEHOLDER


def test_a_damaged_env_file_is_left_unchanged(clone: Path) -> None:
    clone.write_bytes(b"PORT=8000\n\xdd\xfe")

    code, output = setup("--local")

    assert code == 1
    assert "save it as UTF-8, or start again: mv .env .env.old" in output
    assert clone.read_bytes() == b"PORT=8000\n\xdd\xfe"


def test_local_neither_replaces_nor_changes_another_database(
    clone: Path, new_url: DatabaseUrl
) -> None:
    env_file.complete(clone, PROJECT_DIR / ".env.example")
    env_file.set_database_url(clone, new_url)
    before = clone.read_text("utf-8")

    code, output = setup("--local")

    assert code == 1
    assert "✗ --local was given, but DATABASE_URL in .env names another server" in output
    assert "to use the embedded PostgreSQL instead: uv run manage.py env --local" in output
    assert clone.read_text("utf-8") == before
    assert done(output) == ["settings"]
    with connected(new_url) as cursor:
        cursor.execute("SELECT to_regclass('alembic_version')")
        assert cursor.fetchone() == (None,)


def test_setup_ignores_the_shells_database_and_warns(
    clone: Path, new_url: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://other:s3cr3t@192.0.2.1/other")

    code, output = setup()

    assert code == 0, output
    assert "! This shell sets DATABASE_URL. Setup ignores it, the app does not." in output
    assert parse(get_value(clone, "DATABASE_URL") or "") == new_url
    assert "s3cr3t" not in output


@pytest.mark.parametrize(
    ("direct", "reason"),
    [
        ("", "migrations use the direct host, because a transaction pooler does not keep"),
        ("db.example.com", "→ correct DATABASE_URL_DIRECT, or remove it\n"),
    ],
)
def test_a_migration_that_fails_says_why_it_uses_another_host(
    clone: Path, monkeypatch: pytest.MonkeyPatch, direct: str, reason: str
) -> None:
    host = "ep-quiet-river-12345678-pooler.eu-central-1.aws.neon.tech"
    with scripted_server(error("password authentication failed for user 'me'")) as server:
        options = (("hostaddr", "127.0.0.1"), ("sslmode", "disable"))
        url = parse(f"postgresql://me:pass-word@{host}/todo")
        url = url.replace(port=server.port, options=options)
        monkeypatch.setenv("NEON_DATABASE_URL", url.for_libpq())
        if direct:
            shutil.copy(clone.parent / ".env.example", clone)
            set_value(clone, "DATABASE_URL_DIRECT", url.replace(host=direct).for_libpq())
        code, output = setup()

    assert code == 1
    assert (direct or host.replace("-pooler", "")) in output
    assert reason in output
    assert "→ to use another connection string: uv run manage.py env" in output
    assert "pass-word" not in output
    assert done(output) == ["settings"]
