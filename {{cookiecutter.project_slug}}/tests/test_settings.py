"""Settings that cannot work end the process at start, with a line for each mistake."""

import errno
import os
import re
import runpy
from pathlib import Path

import pytest

import config
from config import (
    PROJECT_DIR,
    Settings,
    SettingsError,
    clear_libpq_variables,
    get_settings,
    load_settings,
)
from postgres import env_file
from postgres.embedded import APP_SECRETS
from postgres.env_file import EXAMPLE_SECRET
from postgres.url import PLACEHOLDER

SECRET = "correct-horse-battery-staple-0123456789"
URL = "postgresql://me:pass-word@127.0.0.1:5432/todo"
REQUIRED = {"DATABASE_URL": URL, "BETTER_AUTH_SECRET": SECRET}


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def load(tmp_path: Path, **changes: str) -> Settings:
    """Load settings from a file that has the required ones, and these."""
    values = REQUIRED | changes
    env_file = tmp_path / ".env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in values.items()), "utf-8")
    return load_settings(env_file)


def test_the_required_settings_are_enough(tmp_path: Path) -> None:
    settings = load(tmp_path)

    assert settings.database_url.host == "127.0.0.1"
    assert settings.frontend_url == ("http://localhost:3000",)
    assert settings.environment == "production"  # development is asked for


def test_the_environment_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT", "9000")

    settings = load(tmp_path, PORT="8001")

    assert settings.port == 9000


def test_pg_variables_of_another_server_do_not_affect_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"PGHOSTADDR", "PGSERVICE", "PGSSLROOTCERT"}
    for name in names:
        monkeypatch.setenv(name, "other")
    remote = URL.replace("127.0.0.1", "db.example.com")
    embedded = URL.replace("//me:", "//embedded:")

    clear_libpq_variables(load(tmp_path, DATABASE_URL=remote))
    assert names & os.environ.keys() == {"PGSSLROOTCERT"}

    clear_libpq_variables(load(tmp_path, DATABASE_URL=embedded))
    assert not names & os.environ.keys()


def test_several_front_ends_are_separated_by_commas(tmp_path: Path) -> None:
    origins = "https://App.example.com:443/, http://localhost:3000"

    settings = load(tmp_path, FRONTEND_URL=origins)

    assert settings.frontend_url == ("https://app.example.com", "http://localhost:3000")


def test_migrations_go_past_the_pooler(tmp_path: Path) -> None:
    pooled = "postgresql://me:pw@ep-calm-sky-a1b2c3d4-pooler.eu-central-1.aws.neon.tech/todo"

    settings = load(tmp_path, DATABASE_URL=pooled)

    assert settings.migration_url.host == "ep-calm-sky-a1b2c3d4.eu-central-1.aws.neon.tech"


@pytest.mark.parametrize(
    ("environment", "origin"),
    [
        ("production", "http://localhost:3000"),
        ("production", "http://127.0.0.1:3000"),
        ("production", "http://[::1]:3000"),
        ("production", "https://auth.example.com"),
        ("development", "http://auth.example.com"),
    ],
)
def test_a_better_auth_server_without_tls_is_for_this_machine_or_development(
    tmp_path: Path, environment: str, origin: str
) -> None:
    settings = load(tmp_path, ENVIRONMENT=environment, BETTER_AUTH_URL=origin)

    assert settings.better_auth_url == origin


@pytest.mark.parametrize(("value", "path"), [("", ""), ("/", ""), ("/api/v1/", "/api/v1")])
def test_the_prefix_of_a_proxy_has_no_slash_at_its_end(
    tmp_path: Path, value: str, path: str
) -> None:
    assert load(tmp_path, ROOT_PATH=value).root_path == path


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("DATABASE_URL", "", "DATABASE_URL: is missing"),
        ("DATABASE_URL", PLACEHOLDER, "DATABASE_URL: "),
        ("DATABASE_URL", "mysql://me:pass-word@host/db", "DATABASE_URL: "),
        ("READ_DATABASE_URL", "mysql://me:pass-word@host/db", "READ_DATABASE_URL: "),
        ("BETTER_AUTH_SECRET", "", "BETTER_AUTH_SECRET: is missing"),
        ("BETTER_AUTH_SECRET", "sh0rt-one", "BETTER_AUTH_SECRET: is too short"),
        ("BETTER_AUTH_SECRET", EXAMPLE_SECRET, "BETTER_AUTH_SECRET: is the one from .env.example"),
        ("FRONTEND_URL", "*", 'FRONTEND_URL: "*" is refused'),
        ("FRONTEND_URL", "https://*.example.com", 'FRONTEND_URL: "*" is refused'),
        ("FRONTEND_URL", "app.example.com", "FRONTEND_URL: write an origin"),
        ("FRONTEND_URL", "https://example.com/app", "FRONTEND_URL: write an origin"),
        ("FRONTEND_URL", " , ", "FRONTEND_URL: is empty"),
        ("FRONTEND_URL", "https://bücher.example", "FRONTEND_URL: write an origin"),
        ("BETTER_AUTH_URL", "auth.example.com", "BETTER_AUTH_URL: write an origin"),
        ("BETTER_AUTH_URL", "http://auth.example.com", "BETTER_AUTH_URL: begins with http"),
        ("BETTER_AUTH_URL", "http://10.0.0.1:3000", "BETTER_AUTH_URL: begins with http"),
        ("BETTER_AUTH_URL", "http://localhost.example.com", "BETTER_AUTH_URL: begins with http"),
        ("ENVIRONMENT", "staging", "ENVIRONMENT: "),
        ("MAIL_URL", "mail.example.com", "MAIL_URL: is not a URL such as smtp://"),
        ("REGISTRATION", "yes", "REGISTRATION: Input should be 'open' or 'closed'"),
        ("REQUIRE_VERIFIED_EMAIL", "true", "REQUIRE_VERIFIED_EMAIL: needs MAIL_URL"),
        ("THROTTLE_URL", "http://:pass-word@cache", "THROTTLE_URL: is not the URL of a Redis"),
        ("THROTTLE_URL", "redis://:pass-word/@cache", "THROTTLE_URL: is not a URL: write redis://"),
        ("THROTTLE_URL", "redis://cache?db=1", "THROTTLE_URL: may have only"),
        ("FRONTEND_RESET_PATH", "reset", "FRONTEND_RESET_PATH: write a path"),
        ("ROOT_PATH", "api", "ROOT_PATH: write a path"),
        ("ROOT_PATH", "/api?x", "ROOT_PATH: write a path"),
        ("ROOT_PATH", "//api", "ROOT_PATH: write a path"),
        ("API_DOCS", "perhaps", "API_DOCS: "),
        ("LOG_LEVEL", "chatty", "LOG_LEVEL: "),
        ("DB_POOL_SIZE", "0", "DB_POOL_SIZE: "),
        ("DB_QUEUE_SIZE", "-1", "DB_QUEUE_SIZE: "),
        ("DB_QUEUE_SECONDS", "0", "DB_QUEUE_SECONDS: "),
        ("DB_QUEUE_SECONDS", "nan", "DB_QUEUE_SECONDS: "),
        ("TASKS_PER_USER", "-1", "TASKS_PER_USER: "),
        ("PORT", "http", "PORT: "),
    ],
)
def test_an_invalid_setting_is_reported_in_one_line_without_its_value(
    tmp_path: Path, name: str, value: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, **{name: value})

    message = str(caught.value)
    assert message.startswith(expected)
    assert "\n" not in message
    for secret in ("pass-word", "sh0rt-one", SECRET):
        assert secret not in message


def test_advice_for_a_value_in_the_file_is_a_command_that_changes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BETTER_AUTH_SECRET", "")  # counts as not set

    with pytest.raises(SettingsError, match=r"; run: uv run manage\.py env --new-secret$"):
        load(tmp_path, BETTER_AUTH_SECRET=EXAMPLE_SECRET)


@pytest.mark.parametrize("has_file", [True, False])
def test_advice_for_a_value_in_the_environment_is_to_set_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_file: bool
) -> None:
    monkeypatch.setenv("DATABASE_URL", "mysql://me:pass-word@host/db")
    monkeypatch.setenv("BETTER_AUTH_SECRET", EXAMPLE_SECRET)

    with pytest.raises(SettingsError) as caught:
        load(tmp_path) if has_file else load_settings(tmp_path / ".env")

    secret, url = str(caught.value).splitlines()
    assert secret.endswith("everybody knows; set it to the output of: openssl rand -hex 32")
    assert url.endswith("; set it in the environment")
    assert "pass-word" not in url


def test_without_a_file_a_single_missing_setting_is_one_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", URL)

    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / ".env")

    advice = "set it to the output of: openssl rand -hex 32"
    assert str(caught.value) == f"BETTER_AUTH_SECRET: is missing; {advice}"


def test_a_missing_file_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / ".env")

    assert str(caught.value) == (
        "DATABASE_URL and BETTER_AUTH_SECRET are not set; in development, run: uv run manage.py"
        " setup; on a server, see docs/deploying.md"
    )


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(f"DATABASE_URL={URL}\n", "utf-16")

    with pytest.raises(SettingsError, match="save it as UTF-8"):
        load_settings(env_file)


def test_a_file_that_cannot_be_opened_is_reported_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("dotenv.main.open", refuse, raising=False)

    with pytest.raises(SettingsError) as caught:
        load(tmp_path)

    assert str(caught.value) == f"{tmp_path / '.env'} cannot be read: Permission denied"


def test_the_app_exits_at_startup_and_lists_all_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "DATABASE_URL": "mysql://me:pass-word@host/db",
        "BETTER_AUTH_SECRET": "sh0rt-one",
        "FRONTEND_URL": "*",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(config, "get_settings", get_settings.__wrapped__)  # without its cache

    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(PROJECT_DIR / "main.py"))

    message = exit_.value.code  # Python prints a text, without a traceback, and fails
    assert isinstance(message, str)
    assert [name for name in wrong if f"{name}: " in message] == list(wrong)
    assert "pass-word" not in message
    assert "sh0rt-one" not in message


def test_the_file_that_setup_writes_is_for_development(tmp_path: Path) -> None:
    env_file.complete(tmp_path / ".env", PROJECT_DIR / ".env.example")

    assert env_file.get_value(tmp_path / ".env", "ENVIRONMENT") == "development"


def test_every_setting_has_its_line_in_the_example() -> None:
    example = (PROJECT_DIR / ".env.example").read_text("utf-8")

    names = re.findall(r"^(?:# )?([A-Z_]+)=", example, re.MULTILINE)

    assert sorted(names) == sorted(name.upper() for name in Settings.model_fields)


def test_every_setting_is_explained_in_the_readme() -> None:
    readme = (PROJECT_DIR / "README.md").read_text("utf-8")

    assert [name for name in Settings.model_fields if f"| `{name.upper()}` |" not in readme] == []


def test_the_embedded_server_gets_no_secret_from_the_environment() -> None:
    secret = {
        name.upper()
        for name, field in Settings.model_fields.items()
        if re.search("SecretStr|DatabaseUrl|MailUrl", str(field.annotation))
    }

    assert "DATABASE_URL" in secret
    assert secret <= APP_SECRETS
