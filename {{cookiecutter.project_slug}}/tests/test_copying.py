"""`manage.py copy` moves all data to another database, or nothing."""

import io
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pytest
import sqlalchemy as sa
import typer
from alembic.config import Config
from sqlmodel import SQLModel
from typer.testing import CliRunner

import config
import manage
import migrations
from config import PROJECT_DIR
from models import Task
from postgres import check, connect, copy_data
from postgres.env_file import get_value
from postgres.tests.scripted_server import error, scripted_server
from postgres.tests.servers import connected, create_database, rows
from postgres.url import DatabaseUrl

SECRET = "correct-horse-battery-staple-0123456789"
TABLES = [table.name for table in SQLModel.metadata.sorted_tables]
NASTY = ["\\N", "\\.", "tab\there", "line\nend\r", "👩‍💻 'quoted' \"twice\"", "%s {} $1", "back\\"]


class Copy(Protocol):
    def __call__(
        self, source: DatabaseUrl, target: DatabaseUrl, *options: str
    ) -> tuple[int, str]: ...


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The .env that the command uses instead of the developer's."""
    path = tmp_path / ".env"
    monkeypatch.setattr(config, "ENV_FILE", path)
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.delenv("BETTER_AUTH_SECRET")
    return path


@pytest.fixture
def copy(env_file: Path) -> Copy:
    """Run the copy command. Returns exit code and output."""

    def run(source: DatabaseUrl, target: DatabaseUrl, *options: str) -> tuple[int, str]:
        lines = f"DATABASE_URL={source.for_libpq()}\nBETTER_AUTH_SECRET={SECRET}\n"
        env_file.write_text(lines, "utf-8")
        result = CliRunner().invoke(manage.app, ["copy", *options], input=target.for_libpq())
        return result.exit_code, result.output

    return run


@pytest.fixture(scope="module")
def filled(new_database: Callable[[], DatabaseUrl]) -> DatabaseUrl:
    """A database with rows. Their texts contain everything that a copy could misread."""
    url = new_database()
    migrations.upgrade(url)
    engine = sa.create_engine(url.direct.for_sqlalchemy())
    now = datetime.now(UTC)
    with engine.begin() as connection:
        tasks = [
            {
                "owner_id": owner,
                "title": text,
                "description": None if number % 2 else text,
                "due_at": now if number % 3 else None,
                "priority": "high",
            }
            for owner in NASTY
            for number, text in enumerate(NASTY * 20)
        ]
        connection.execute(sa.insert(Task), [{"id": uuid4(), **task} for task in tasks])
    engine.dispose()
    return url


END_OTHERS = """
SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


def drop_everything(url: DatabaseUrl) -> None:
    """Make a database as new. To create another takes longer: its folder has 300 files."""
    with connected(url) as cursor:
        cursor.execute(END_OTHERS)  # which a copy may have left frozen
        cursor.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")


@pytest.fixture(scope="module")
def target(new_database: Callable[[], DatabaseUrl]) -> DatabaseUrl:
    return new_database()


@pytest.fixture
def empty(target: DatabaseUrl) -> DatabaseUrl:
    """A database that was never migrated."""
    drop_everything(target)
    return target


@pytest.fixture
def migrated(empty: DatabaseUrl) -> DatabaseUrl:
    migrations.upgrade(empty)
    return empty


def test_all_rows_are_copied_unchanged(
    copy: Copy, filled: DatabaseUrl, empty: DatabaseUrl, env_file: Path
) -> None:
    code, output = copy(filled, empty)

    assert code == 0, output
    assert rows(empty, TABLES) == rows(filled, TABLES)
    assert rows(empty, TABLES)[str(Task.__tablename__)]
    assert "✓ tasks" in output
    assert "980 rows" in output
    assert "uv run manage.py env" in output
    assert get_value(env_file, "DATABASE_URL") == filled.for_libpq()


def test_no_password_is_shown(copy: Copy, filled: DatabaseUrl) -> None:
    target = filled.replace(database="other", user="nobody", password="pass-word")

    _, output = copy(filled, target)

    assert "pass-word" not in output
    assert not filled.password or filled.password not in output


def test_env_names_the_new_database_if_switch_is_given(
    copy: Copy, filled: DatabaseUrl, empty: DatabaseUrl, env_file: Path
) -> None:
    code, output = copy(filled, empty, "--switch")

    assert code == 0, output
    assert get_value(env_file, "DATABASE_URL") == empty.for_libpq()


class Terminal(io.StringIO):
    """Standard input on a terminal. The end of the text acts like Ctrl-D or Ctrl-C."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(
    filled: DatabaseUrl, empty: DatabaseUrl, env_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], int]:
    """Copy to `empty`, and answer the question about .env. Returns the exit code."""
    lines = f"DATABASE_URL={filled.for_libpq()}\nBETTER_AUTH_SECRET={SECRET}\n"
    env_file.write_text(lines, "utf-8")
    monkeypatch.setattr("postgres.prompt.ask_on_terminal", lambda **_: empty)

    def run(answer: str) -> int:
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        try:
            manage.copy()
        except typer.Exit as end:
            return end.exit_code
        return 0

    return run


@pytest.mark.parametrize("answer", ["y", "n"])
def test_on_a_terminal_the_user_chooses_the_database_in_env(
    on_terminal: Callable[[str], int],
    filled: DatabaseUrl,
    empty: DatabaseUrl,
    env_file: Path,
    answer: str,
) -> None:
    code = on_terminal(f"{answer}\n")

    named = empty if answer == "y" else filled
    assert code == 0
    assert get_value(env_file, "DATABASE_URL") == named.for_libpq()


def test_ctrl_c_at_that_question_says_that_all_rows_were_copied(
    on_terminal: Callable[[str], int],
    filled: DatabaseUrl,
    empty: DatabaseUrl,
    env_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = on_terminal("")

    output = capsys.readouterr().err
    assert code == 130
    assert f"stopped: all rows are at {empty}; .env names the old database" in output
    assert rows(empty, TABLES) == rows(filled, TABLES)
    assert get_value(env_file, "DATABASE_URL") == filled.for_libpq()


def test_the_new_database_can_come_from_the_environment_without_any_question(
    on_terminal: Callable[[str], int],
    filled: DatabaseUrl,
    empty: DatabaseUrl,
    env_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TARGET_DATABASE_URL", empty.for_libpq())
    monkeypatch.delattr("postgres.prompt.ask_on_terminal")

    code = on_terminal("")

    assert code == 0
    assert rows(empty, TABLES) == rows(filled, TABLES)
    assert get_value(env_file, "DATABASE_URL") == filled.for_libpq()


def test_a_second_copy_is_refused(copy: Copy, filled: DatabaseUrl, empty: DatabaseUrl) -> None:
    copy(filled, empty)

    code, output = copy(filled, empty)

    assert code == 1
    assert "has rows already" in output
    assert rows(empty, TABLES) == rows(filled, TABLES)


def test_a_database_is_not_copied_into_itself(copy: Copy, filled: DatabaseUrl) -> None:
    code, output = copy(filled, filled)

    assert code == 1
    assert "the same database" in output


def test_an_empty_answer_copies_nothing(env_file: Path, filled: DatabaseUrl) -> None:
    lines = f"DATABASE_URL={filled.for_libpq()}\nBETTER_AUTH_SECRET={SECRET}\n"
    env_file.write_text(lines, "utf-8")

    result = CliRunner().invoke(manage.app, ["copy"], input="\n")

    assert result.exit_code == 1
    assert "nothing was copied" in result.output


def test_a_source_with_an_old_schema_must_be_migrated_first(
    copy: Copy, migrated: DatabaseUrl, new_database: Callable[[], DatabaseUrl]
) -> None:
    with connected(migrated) as cursor:
        cursor.execute("DELETE FROM alembic_version")

    code, output = copy(migrated, new_database())

    assert code == 1
    assert "uv run manage.py migrate" in output


@pytest.fixture
def reader(embedded_url: DatabaseUrl) -> Iterator[DatabaseUrl]:
    """A migrated database, with a role that may read only the models' tables.

    It is on the embedded server, because a pooler would not know the role.
    """
    role = f"test_{secrets.token_hex(8)}"
    with connected(embedded_url) as cursor:
        cursor.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'pass-word'")
        cursor.execute(f"GRANT SELECT ON {', '.join(TABLES)} TO {role}")
    yield embedded_url.replace(user=role, password="pass-word")
    with connected(embedded_url) as cursor:
        cursor.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_role_that_may_not_read_the_revision_gets_an_error(
    copy: Copy, reader: DatabaseUrl, empty: DatabaseUrl
) -> None:
    code, output = copy(reader, empty)

    assert code == 1
    assert f"{reader.address}/{reader.database}: " in output
    assert "permission denied for table alembic_version" in output
    assert "nothing was copied" in output


def test_the_advice_of_a_passing_step_is_shown(
    copy: Copy, filled: DatabaseUrl, migrated: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = check.Check("endpoint", ok=True, detail="direct", advice="uv run manage.py env")
    monkeypatch.setattr(copy_data, "check_connection", lambda *_: iter([step]))

    _, output = copy(filled, migrated)

    assert "→ uv run manage.py env" in output


def test_other_connections_to_the_source_are_reported(
    copy: Copy, filled: DatabaseUrl, empty: DatabaseUrl
) -> None:
    with connected(filled):
        code, output = copy(filled, empty)

    assert code == 0, output
    assert "1 other connection\n" in output
    assert "→ stop the app" in output


# A migration that inserts rows, such as roles, plans or countries.
SEEDS = """
from alembic import op

revision = "seeds"
down_revision = "{}"

def upgrade():
    op.execute("INSERT INTO tasks (id, owner_id, title) VALUES (gen_random_uuid(), '', 'seed')")
"""
ANOTHERS = "INSERT INTO tasks (id, owner_id, title) VALUES (gen_random_uuid(), '', 'another''s')"


@pytest.fixture
def seeded(
    tmp_path: Path, new_database: Callable[[], DatabaseUrl], monkeypatch: pytest.MonkeyPatch
) -> DatabaseUrl:
    """A database with two rows, one of them inserted by the newest migration."""
    (tmp_path / "seeds.py").write_text(SEEDS.format(migrations.head()), "utf-8")
    alembic_config = migrations.alembic_config
    folders = os.pathsep.join([str(PROJECT_DIR / "migrations" / "versions"), str(tmp_path)])

    def config(url: DatabaseUrl | None = None) -> Config:
        config = alembic_config(url)
        config.set_main_option("path_separator", "os")
        config.set_main_option("version_locations", folders.replace("%", "%%"))
        return config

    monkeypatch.setattr(migrations, "alembic_config", config)
    url = new_database()
    migrations.upgrade(url)
    with connected(url) as cursor:
        cursor.execute(ANOTHERS)
    return url


def test_rows_that_a_migration_inserts_are_replaced(
    copy: Copy, seeded: DatabaseUrl, empty: DatabaseUrl
) -> None:
    code, output = copy(seeded, empty)

    assert code == 0, output
    assert rows(empty, TABLES) == rows(seeded, TABLES)
    assert len(rows(empty, TABLES)["tasks"]) == 2


def test_a_target_with_rows_is_refused_before_it_is_migrated(
    copy: Copy, migrated: DatabaseUrl, seeded: DatabaseUrl
) -> None:
    with connected(migrated) as cursor:
        cursor.execute(ANOTHERS)
        cursor.execute("SELECT version_num FROM alembic_version")
        revision = cursor.fetchone()
    before = rows(migrated, TABLES)

    code, output = copy(seeded, migrated)

    with connected(migrated) as cursor:
        cursor.execute("SELECT version_num FROM alembic_version")
        assert cursor.fetchone() == revision
    assert code == 1
    assert "has rows already, in tasks" in output
    assert rows(migrated, TABLES) == before


@pytest.mark.parametrize("statement", [ANOTHERS, "UPDATE tasks SET title = 'another''s'"])
def test_a_copy_is_refused_if_others_write_rows_meanwhile(
    copy: Copy,
    seeded: DatabaseUrl,
    empty: DatabaseUrl,
    monkeypatch: pytest.MonkeyPatch,
    statement: str,
) -> None:
    upgrade = migrations.upgrade

    def be_overtaken(*arguments: Any) -> None:
        upgrade(*arguments)
        with connected(empty) as cursor:
            cursor.execute(statement)

    monkeypatch.setattr(migrations, "upgrade", be_overtaken)
    code, output = copy(seeded, empty)

    assert code == 1
    assert "has rows already, in tasks" in output
    with connected(empty) as cursor:
        cursor.execute("SELECT count(*) FROM tasks WHERE title = 'another''s'")
        assert cursor.fetchone() == (1,)


def test_a_row_that_a_migration_inserts_into_an_existing_table_is_refused(
    copy: Copy, migrated: DatabaseUrl, seeded: DatabaseUrl
) -> None:
    code, output = copy(seeded, migrated)

    assert code == 1
    assert "has rows already, in tasks" in output
    assert [row[2] for row in rows(migrated, TABLES)["tasks"]] == ["seed"]


def test_an_error_of_the_target_is_explained(copy: Copy, filled: DatabaseUrl) -> None:
    with scripted_server(error("password authentication failed for user 'me'")) as server:
        target = DatabaseUrl("me", "pass-word", "127.0.0.1", server.port, "todo")
        code, output = copy(filled, target)

    assert code == 1
    assert "✗ login" in output
    assert "then type: uv run manage.py copy" in output


# Failures in the middle: the trigger fires for the last tasks, after others were copied.
TRIGGER = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} RETURN NEW; END $$;
CREATE TRIGGER fail BEFORE INSERT ON tasks FOR EACH ROW
WHEN (NEW.title = 'back\\') EXECUTE FUNCTION fail()
"""


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("RAISE EXCEPTION 'no more room';", "nothing was copied"),
        ("PERFORM pg_terminate_backend(pg_backend_pid());", "nothing was copied"),
        ("RETURN NULL;", "look for a trigger"),
    ],
)
def test_a_copy_that_fails_in_the_middle_leaves_no_rows(
    copy: Copy, filled: DatabaseUrl, migrated: DatabaseUrl, action: str, message: str
) -> None:
    with connected(migrated) as cursor:
        cursor.execute(TRIGGER.format(action))

    code, output = copy(filled, migrated)

    assert code == 1
    assert message in output
    assert "Traceback" not in output
    assert rows(migrated, TABLES) == {table: [] for table in TABLES}


@pytest.fixture(scope="module")
def plain_target(embedded_server: DatabaseUrl) -> DatabaseUrl:
    return create_database(embedded_server)


@pytest.fixture
def plain(plain_target: DatabaseUrl) -> DatabaseUrl:
    """A migrated database without TLS, so that a scripted server can be in front of it."""
    drop_everything(plain_target)
    migrations.upgrade(plain_target)
    return plain_target


@pytest.mark.parametrize("end", ["source", "target"])
def test_a_server_that_freezes_ends_the_copy_in_time(
    copy: Copy, filled: DatabaseUrl, plain: DatabaseUrl, embedded_url: DatabaseUrl, end: str
) -> None:
    frozen = embedded_url if end == "source" else plain
    with scripted_server(behind=frozen) as server:
        server.freezes_at = b"COPY"
        behind = frozen.replace(port=server.port)
        code, output = copy(
            *((behind, plain) if end == "source" else (filled, behind)), "--timeout", "1"
        )

    assert code == 1
    assert "gave up after 1 s" in output
    assert rows(plain, TABLES) == {table: [] for table in TABLES}


def test_a_source_that_freezes_before_the_copy_gets_no_timeout_advice(
    copy: Copy, embedded_url: DatabaseUrl, plain: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_source = copy_data.check_source
    with scripted_server(behind=embedded_url) as server:

        def freeze(*arguments: Any) -> None:
            server.freezes_at = b"alembic_version"
            monkeypatch.setattr(check, "QUERY_SECONDS", 0.3)
            check_source(*arguments)

        monkeypatch.setattr(copy_data, "check_source", freeze)
        code, output = copy(embedded_url.replace(port=server.port), plain)

    assert code == 1
    assert f"127.0.0.1:{server.port}/" in output
    assert ": no answer in time" in output
    assert "nothing was copied" in output
    assert "--timeout" not in output


def test_if_a_commit_gets_no_answer_the_output_says_that_rows_may_have_been_copied(
    copy: Copy, filled: DatabaseUrl, plain: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_rows = vars(copy_data)["copy_rows"]
    with scripted_server(behind=plain) as server:

        def freeze_at_commit(*arguments: Any) -> Any:
            left_out = copy_rows(*arguments)
            server.freezes_at = b"COMMIT"
            monkeypatch.setattr(connect, "TOTAL_SECONDS", 0.3)
            return left_out

        monkeypatch.setattr(copy_data, "copy_rows", freeze_at_commit)
        code, output = copy(filled, plain.replace(port=server.port))

    assert code == 1
    assert f"127.0.0.1:{server.port}/" in output
    assert ": no answer in time" in output
    assert "all rows may have been copied: type the same command again" in output
    assert "nothing was copied" not in output
    assert "--timeout" not in output


def test_ctrl_c_during_the_commit_says_that_rows_may_have_been_copied(
    copy: Copy, filled: DatabaseUrl, empty: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_end: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("postgres.copy_tables.End.commit", interrupt)
    code, output = copy(filled, empty)

    assert code == 130
    assert "stopped: all rows may have been copied" in output


def test_ctrl_c_during_the_checks_says_that_nothing_was_copied(
    copy: Copy, filled: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(connect, "wait", interrupt)  # where the main thread waits for another
    code, output = copy(filled, filled.replace(database="other"))

    assert code == 130
    assert "stopped: nothing was copied" in output


@contextmanager
def copying_process(
    source: DatabaseUrl, target: DatabaseUrl, *, until: str
) -> Iterator["subprocess.Popen[str]"]:
    """Run the command in a separate process. Yields it when its output contains `until`."""
    urls = {"DATABASE_URL": source.for_libpq(), "TARGET_DATABASE_URL": target.for_libpq()}
    with subprocess.Popen(
        [sys.executable, "manage.py", "copy"],
        cwd=PROJECT_DIR,
        env=os.environ | urls,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    ) as process:
        assert process.stdout
        output = ""
        while until not in output:
            line = process.stdout.readline()
            assert line, output
            output += line
        yield process


@pytest.mark.skipif(sys.platform == "win32", reason="sends Ctrl-C as a signal")
def test_ctrl_c_ends_the_copy_and_leaves_no_rows(filled: DatabaseUrl, plain: DatabaseUrl) -> None:
    with scripted_server(behind=plain) as server:
        server.freezes_at = b"COPY"
        target = plain.replace(port=server.port)
        with copying_process(filled, target, until="copying ") as process:
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=60)[0]

    assert process.returncode == 130
    assert "nothing was copied" in output
    assert "Traceback" not in output
    assert rows(plain, TABLES) == {table: [] for table in TABLES}


def test_a_table_without_a_model_is_reported(
    copy: Copy, filled: DatabaseUrl, empty: DatabaseUrl
) -> None:
    with connected(filled) as cursor:
        cursor.execute('CREATE TABLE "Better Auth" (id integer)')

    _, output = copy(filled, empty)

    with connected(filled) as cursor:
        cursor.execute('DROP TABLE "Better Auth"')
    assert 'public."Better Auth"' in output
