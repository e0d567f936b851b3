"""The operator's commands."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import manage
from database_url import DatabaseUrl
from env_file import get_value

SECRET = "correct-horse-battery-staple-0123456789"


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The .env that the commands use in place of the developer's own."""
    path = tmp_path / ".env"
    monkeypatch.setattr(manage, "ENV_FILE", path)
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.delenv("BETTER_AUTH_SECRET")
    return path


def run(*arguments: str, answer: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(manage.app, arguments, input=answer)
    return result.exit_code, result.output


@pytest.fixture
def use(env_file: Path) -> Callable[[DatabaseUrl], None]:
    """Write a .env with the given database."""

    def write(url: DatabaseUrl) -> None:
        lines = f"DATABASE_URL={url.for_libpq()}\nBETTER_AUTH_SECRET={SECRET}\n"
        env_file.write_text(lines, "utf-8")

    return write


def test_env_writes_settings_that_only_the_owner_can_read(env_file: Path) -> None:
    code, output = run("env", "--local")

    assert code == 0, output
    assert env_file.stat().st_mode & 0o077 == 0
    assert len(get_value(env_file, "BETTER_AUTH_SECRET") or "") >= 32


def test_env_takes_a_pasted_string_and_hides_its_password(env_file: Path) -> None:
    code, output = run("env", answer="psql 'postgres://me:pass-word@db.example.com/todo'\n")

    assert code == 0, output
    assert get_value(env_file, "DATABASE_URL") == (
        "postgresql://me:pass-word@db.example.com:5432/todo"
    )
    assert "pass-word" not in output


def test_env_keeps_the_other_settings(env_file: Path) -> None:
    run("env", "--local")
    secret = get_value(env_file, "BETTER_AUTH_SECRET")

    run("env", answer="postgresql://me:pw@db.example.com/todo")

    assert get_value(env_file, "BETTER_AUTH_SECRET") == secret


def test_env_replaces_the_secret_alone(env_file: Path) -> None:
    run("env", "--local")
    before = {name: get_value(env_file, name) for name in ("DATABASE_URL", "BETTER_AUTH_SECRET")}

    run("env", "--new-secret")

    assert get_value(env_file, "DATABASE_URL") == before["DATABASE_URL"]
    assert get_value(env_file, "BETTER_AUTH_SECRET") != before["BETTER_AUTH_SECRET"]


def test_env_refuses_what_is_no_connection_string(env_file: Path) -> None:
    run("env", "--local")
    before = env_file.read_bytes()

    code, output = run("env", answer="mysql://me:pass-word@db.example.com/todo")

    assert code == 1
    assert "✗ DATABASE_URL: " in output
    assert "pass-word" not in output
    assert env_file.read_bytes() == before


def test_check_finds_nothing_wrong(
    use: Callable[[DatabaseUrl], None], database_url: DatabaseUrl
) -> None:
    use(database_url)

    code, output = run("check", "--json")

    report = json.loads(output)
    assert (code, report["ok"]) == (0, True)
    names = ["settings", "network", "TLS", "log-in", "query", "endpoint", "schema"]
    assert [check["name"] for check in report["checks"]] == names
    assert database_url.password not in output


@pytest.mark.parametrize(
    ("change", "failing", "advice"),
    [
        ({"port": 1}, "network", "postgres start"),
        ({"host": "no-such-host.invalid", "user": "me"}, "network", "compare the host"),
        ({"options": (("sslmode", "require"),)}, "TLS", "sslmode"),
        ({"password": "wrong-one"}, "log-in", "manage.py env"),
        ({"database": "nothing"}, "log-in", "CREATE DATABASE"),
    ],
)
def test_check_tells_the_step_that_fails_and_what_to_do(
    use: Callable[[DatabaseUrl], None],
    database_url: DatabaseUrl,
    change: dict[str, object],
    failing: str,
    advice: str,
) -> None:
    use(database_url.replace(**change))

    code, output = run("check")

    assert code == 1
    assert re.findall(r"^✗ (\S+)", output, re.MULTILINE) == [failing]
    assert advice in output
    assert database_url.password not in output
    assert "wrong-one" not in output


def test_check_asks_for_the_migrations_that_are_missing(
    use: Callable[[DatabaseUrl], None], new_database: Callable[[], DatabaseUrl]
) -> None:
    use(new_database())

    before = run("check")
    migrated = run("migrate")
    after = run("check")

    assert before[0] == 1
    assert "uv run manage.py migrate" in before[1]
    assert migrated[0] == 0, migrated[1]
    assert after[0] == 0, after[1]


def test_check_names_every_setting_that_is_wrong(env_file: Path) -> None:
    env_file.write_text("FRONTEND_URL=*\n", "utf-8")

    code, output = run("check")

    assert code == 1
    found = re.findall(r"^✗ settings +(\w+)", output, re.MULTILINE)
    assert found == ["BETTER_AUTH_SECRET", "DATABASE_URL", "FRONTEND_URL"]


def test_migrate_tells_why_it_cannot(
    use: Callable[[DatabaseUrl], None], server: DatabaseUrl
) -> None:
    use(server.replace(port=1, user="me"))

    code, output = run("migrate")

    assert code == 1
    assert "nothing listens" in output
    assert "Traceback" not in output
