"""The commands of manage.py."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

import config
import manage
import migrations
from config import PROJECT_DIR
from postgres import connect
from postgres.check import STEPS
from postgres.console import Waiting
from postgres.env_file import get_value, set_value
from postgres.findings import Retry
from postgres.tests.scripted_server import error, scripted_server
from postgres.tests.servers import connected, create_database
from postgres.url import DatabaseUrl

NOWHERE = {"host": "127.0.0.1", "port": 1, "options": ()}
SECRET = "correct-horse-battery-staple-0123456789"


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The .env that the commands use instead of the developer's."""
    path = tmp_path / ".env"
    shutil.copy(PROJECT_DIR / ".env.example", tmp_path)
    monkeypatch.setattr(config, "ENV_FILE", path)
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


def test_env_accepts_a_pasted_string_and_hides_its_password(env_file: Path) -> None:
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


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("DATABASE_URL_DIRECT", "migrations go there"),
        ("READ_DATABASE_URL", "lists come from there"),
    ],
)
@pytest.mark.parametrize(
    ("place", "remedy"),
    [("shell", "unset it in the shell"), (".env", "change or remove that line in .env")],
)
def test_env_warns_if_another_setting_still_names_another_database(
    env_file: Path, monkeypatch: pytest.MonkeyPatch, place: str, remedy: str, name: str, use: str
) -> None:
    run("env", "--local")
    old = "postgresql://me:pass-word@old.example.com/todo"
    if place == "shell":
        monkeypatch.setenv(name, old)
    else:
        set_value(env_file, name, old)

    code, output = run("env", answer="postgresql://me:pass-word@db.example.com/todo")

    assert code == 0
    assert f"! {name} still names another database: {use}; {remedy}\n" in output
    assert "pass-word" not in output


def test_env_does_not_warn_about_the_direct_host_of_the_same_database(env_file: Path) -> None:
    run("env", "--local")
    host = "ep-quiet-river-12345678{}.eu-central-1.aws.neon.tech"
    direct = f"postgresql://me:pw@{host.format('')}/todo"
    set_value(env_file, "DATABASE_URL_DIRECT", direct)

    code, output = run("env", answer=f"postgresql://me:pw@{host.format('-pooler')}/todo")

    assert code == 0, output
    assert "DATABASE_URL_DIRECT" not in output


def test_env_can_replace_only_the_secret(env_file: Path) -> None:
    run("env", "--local")
    before = {name: get_value(env_file, name) for name in ("DATABASE_URL", "BETTER_AUTH_SECRET")}

    run("env", "--new-secret")

    assert get_value(env_file, "DATABASE_URL") == before["DATABASE_URL"]
    assert get_value(env_file, "BETTER_AUTH_SECRET") != before["BETTER_AUTH_SECRET"]


def test_env_rejects_an_invalid_connection_string(env_file: Path) -> None:
    run("env", "--local")
    before = env_file.read_bytes()

    code, output = run("env", answer="mysql://me:pass-word@db.example.com/todo")

    assert code == 1
    assert "✗ DATABASE_URL: " in output
    assert "pass-word" not in output
    assert env_file.read_bytes() == before


@pytest.mark.parametrize("nothing", ["", " \n"])
def test_env_without_a_terminal_refuses_an_empty_answer(env_file: Path, nothing: str) -> None:
    run("env", answer="postgresql://me:pass-word@db.example.com/todo")
    before = env_file.read_bytes()

    code, output = run("env", answer=nothing)

    assert code == 1
    assert "✗ DATABASE_URL: the text is empty" in output
    assert env_file.read_bytes() == before


def test_check_passes_on_a_healthy_database(
    use: Callable[[DatabaseUrl], None], database_url: DatabaseUrl
) -> None:
    use(database_url)

    code, output = run("check")

    assert code == 0
    found = re.findall(r"^✓ (\S+) ", output, re.MULTILINE)
    assert found == ["settings", *STEPS]
    assert database_url.password not in output


def test_check_can_report_as_json(
    use: Callable[[DatabaseUrl], None], database_url: DatabaseUrl
) -> None:
    use(database_url)

    code, output = run("check", "--json")

    report = json.loads(output)
    assert (code, report["ok"], report["finding"]) == (0, True, None)
    assert [check["name"] for check in report["checks"]] == ["settings", *STEPS]
    assert database_url.password not in output


@pytest.mark.parametrize(
    ("change", "failing", "finding", "advice"),
    [
        ({**NOWHERE, "user": "me"}, "TCP", "nothing-listens", "DATABASE_URL"),
        ({**NOWHERE, "user": "embedded"}, "TCP", "nothing-listens", "manage.py postgres start"),
        ({**NOWHERE, "host": "no-such.invalid"}, "DNS", "host-unknown", "compare the host"),
        ({"password": "wrong-one", "user": "me"}, "login", "login-refused", "manage.py env"),
        ({"database": "nothing"}, "database", "database-missing", ""),
    ],
)
def test_check_shows_the_failing_step_and_what_to_do(
    use: Callable[[DatabaseUrl], None],
    database_url: DatabaseUrl,
    change: dict[str, Any],
    failing: str,
    finding: str,
    advice: str,
) -> None:
    use(database_url.replace(**change))

    code, output = run("check")
    report = json.loads(CliRunner().invoke(manage.app, ["check", "--json"]).stdout)

    assert code == 1
    assert re.findall(r"^✗ (\S+)", output, re.MULTILINE) == [failing]
    assert re.search(rf"^ +→ .*{advice}", output, re.MULTILINE)
    assert report["finding"] == finding
    assert database_url.password not in output
    assert "wrong-one" not in output


def test_check_has_a_line_for_the_replica(
    embedded_url: DatabaseUrl, use: Callable[[DatabaseUrl], None], env_file: Path
) -> None:
    use(embedded_url)
    read_only = embedded_url.replace(options=(("options", "-c default_transaction_read_only=on"),))
    set_value(env_file, "READ_DATABASE_URL", read_only.for_libpq())
    passed = run("check")
    set_value(env_file, "READ_DATABASE_URL", embedded_url.replace(database="gone").for_libpq())
    failed = run("check")

    assert passed[0] == 0, passed[1]
    assert f"✓ replica   lists come from {embedded_url.address}\n" in passed[1]
    assert failed[0] == 1
    assert re.search(r"✗ replica   database: .*\n +→ correct READ_DATABASE_URL", failed[1])
    assert embedded_url.password not in failed[1]


def test_check_shows_the_servers_error(use: Callable[[DatabaseUrl], None]) -> None:
    with scripted_server(error("the flux capacitor is out of tune")) as server:
        use(DatabaseUrl("me", "pass-word", "127.0.0.1", server.port, "todo"))
        code, output = run("check")

    assert code == 1
    assert re.search(r"^✗ login .*\n +→ .*\n +error: .*flux capacitor", output, re.MULTILINE)
    assert output.endswith("- not reached: database, endpoint, schema\n")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between attempts."""
    monkeypatch.setattr(connect, "PAUSES", dict.fromkeys(Retry, (0.05, 0.05, 0.05)))


def test_a_migration_may_be_applied_although_the_connection_broke(
    use: Callable[[DatabaseUrl], None],
    new_database: Callable[[], DatabaseUrl],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hang_up(_url: DatabaseUrl, connection: Any) -> None:
        connection.cursor().execute("SELECT pg_terminate_backend(pg_backend_pid())")

    use(new_database())
    monkeypatch.setattr(migrations, "upgrade", hang_up)

    code, output = run("migrate")

    assert code == 1
    assert "migrations may have been applied" in output


@pytest.mark.usefixtures("hurried")
def test_standard_output_is_only_json_while_a_compute_wakes_up(
    use: Callable[[DatabaseUrl], None],
) -> None:
    with scripted_server(error("Couldn't connect to compute node")) as server:
        use(DatabaseUrl("me", "pass-word", "127.0.0.1", server.port, "todo"))
        result = CliRunner().invoke(manage.app, ["check", "--json"])

    assert result.exit_code == 1
    assert json.loads(result.stdout)["retry"] == "yes"
    assert "waiting for the database" in result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_seconds_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    with Waiting("waiting") as waiting:
        for seconds in range(1, 13):
            waiting(seconds)

    text = terminal.getvalue()
    assert "\n" not in text
    assert "\r  waiting, 12 s so far" in text
    assert re.fullmatch(r" +", text.split("\r")[-2])  # erased at the end


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_log_shows_the_seconds_on_a_few_plain_lines(
    monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    log = Terminal() if term == "dumb" else io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setenv("TERM", term)

    with Waiting("waiting") as waiting:
        for seconds in range(1, 13):
            waiting(seconds)

    assert log.getvalue().splitlines() == [
        "  waiting, 1 s so far",
        "  waiting, 6 s so far",
        "  waiting, 11 s so far",
    ]


def test_check_reports_migrations_that_have_not_run(
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


def test_check_reports_a_migration_that_has_not_been_written(
    new_database: Callable[[], DatabaseUrl], use: Callable[[DatabaseUrl], None]
) -> None:
    url = new_database()
    migrations.upgrade(url)
    with connected(url) as cursor:  # as if the model were ahead by this column
        cursor.execute("ALTER TABLE tasks DROP COLUMN completed")
    use(url)

    code, output = run("check")

    assert code == 1
    assert "no migration creates the column tasks.completed" in output
    assert "uv run alembic revision --autogenerate" in output


def test_check_reports_every_setting_that_is_wrong(env_file: Path) -> None:
    env_file.write_text("FRONTEND_URL=*\nTHROTTLE_URL=redis://[\n", "utf-8")

    code, output = run("check")

    assert code == 1
    found = re.findall(r"^✗ settings +(\w+)", output, re.MULTILINE)
    assert found == ["BETTER_AUTH_SECRET", "DATABASE_URL", "FRONTEND_URL", "THROTTLE_URL"]
    assert "is missing\n            → run: uv run manage.py env --new-secret\n" in output
    assert "→ encode special characters, such as @ as %40\n" in output


def test_migrate_says_why_it_failed(
    use: Callable[[DatabaseUrl], None], server: DatabaseUrl
) -> None:
    use(server.replace(host="127.0.0.1", port=1, user="me", options=()))

    code, output = run("migrate")

    assert code == 1
    assert "127.0.0.1:1: nothing listens" in output
    assert "no migration was applied" in output
    assert "→ " in output
    assert "Traceback" not in output


@pytest.mark.usefixtures("hurried")
def test_migrate_waits_for_a_server_that_wakes_up(
    use: Callable[[DatabaseUrl], None], plain: DatabaseUrl
) -> None:
    waking = error("Couldn't connect to compute node")
    with scripted_server(waking, waking, behind=plain) as server:
        use(plain.replace(port=server.port))
        code, output = run("migrate")

    assert code == 0, output
    assert server.log_ins == 3


@pytest.fixture(scope="module")
def plain(embedded_server: DatabaseUrl) -> DatabaseUrl:
    """A database without TLS, so that a scripted server can be in front of it."""
    return create_database(embedded_server)


def test_migrate_gives_up_on_a_server_that_freezes(
    use: Callable[[DatabaseUrl], None], plain: DatabaseUrl
) -> None:
    with scripted_server(behind=plain) as server:
        server.freezes_at = b"alembic_version"
        use(plain.replace(port=server.port))
        code, output = run("migrate", "--timeout", "1")

    assert code == 1
    assert "gave up after 1 s" in output
    assert "Traceback" not in output


def test_migrate_reports_a_database_that_is_newer_than_the_code(
    use: Callable[[DatabaseUrl], None], new_database: Callable[[], DatabaseUrl]
) -> None:
    url = new_database()
    with connected(url) as cursor:
        cursor.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
        cursor.execute("INSERT INTO alembic_version VALUES ('9999')")
    use(url)

    code, output = run("migrate")

    assert code == 1
    assert "the code is older" in output
    assert "9999" in output


@pytest.mark.skipif(sys.platform == "win32", reason="sends Ctrl-C as a signal")
def test_ctrl_c_while_a_command_imports_its_modules_shows_no_traceback(tmp_path: Path) -> None:
    # Short sleeps: a signal just before a sleep waits for its end.
    slow = "import time\nprint('importing', flush=True)\nwhile True: time.sleep(0.1)\n"
    (tmp_path / "typer.py").write_text(slow, "utf-8")
    with subprocess.Popen(
        [sys.executable, "manage.py", "check"],
        cwd=PROJECT_DIR,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]

    assert process.returncode == 130
    assert output == "stopped\n"


@pytest.mark.parametrize("option", ["--local", "--new-secret"])
def test_a_damaged_env_file_is_left_unchanged(env_file: Path, option: str) -> None:
    env_file.write_bytes(b"PORT=8000\n\xdd\xfe")

    code, output = run("env", option)

    assert code == 1
    assert "save it as UTF-8, or start again: mv .env .env.old" in output
    assert env_file.read_bytes() == b"PORT=8000\n\xdd\xfe"


@pytest.mark.parametrize("command", ["start", "stop", "status", "psql"])
def test_without_the_embedded_server_the_commands_say_so(
    use: Callable[[DatabaseUrl], None], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    use(DatabaseUrl("embedded", "", "127.0.0.1", 1, "todo", ()))
    monkeypatch.setitem(sys.modules, "postgres.embedded", None)

    code, output = run("postgres", command)

    assert code == 1
    assert output == (
        "✗ the embedded PostgreSQL is for development only, and is not installed here\n"
        "  → in development: uv sync\n"
        "  → on a server: use another database\n"
    )


@pytest.mark.usefixtures("env_file")
@pytest.mark.parametrize("environment", ["development", "production"])
def test_openapi_prints_the_schema_without_any_settings(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, environment: str
) -> None:
    monkeypatch.setenv("ENVIRONMENT", environment)

    result = CliRunner().invoke(manage.app, ["openapi"])

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == client.get("/openapi.json").json()


def test_openapi_writes_a_file(env_file: Path, tmp_path: Path) -> None:
    env_file.write_text("APP_NAME=Ⓣodo\nDATABASE_URL=\n", "utf-8")
    file = tmp_path / "openapi.json"

    printed = run("openapi", "--output", str(file))

    assert printed == (0, "")
    assert json.loads(file.read_text("utf-8"))["info"]["title"] == "Ⓣodo"


def test_openapi_says_why_it_cannot_write(env_file: Path) -> None:
    file = env_file.parent / "nothing" / "openapi.json"

    code, output = run("openapi", "--output", str(file))

    assert code == 1
    assert output == f"✗ {file} cannot be written: No such file or directory\n"
