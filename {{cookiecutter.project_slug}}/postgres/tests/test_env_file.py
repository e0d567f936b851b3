"""`.env`: what is written is read back, by its owner only, and nothing else in it changes."""

import io
import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dotenv import dotenv_values
from hypothesis import given, settings
from hypothesis import strategies as st

from postgres import env_file
from postgres.url import DatabaseUrl, DatabaseUrlError, parse

EXAMPLE = """\
# Required: `uv run manage.py env` asks for it.
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


def test_a_new_file_is_the_example_with_values_filled_in(env: Path, example: Path) -> None:
    env_file.create(env, example, {"DATABASE_URL": PASTED, "DB_POOL_SIZE": "5"})

    expected = EXAMPLE.replace("postgresql://USER:PASSWORD@HOST/DATABASE", PASTED)
    assert env.read_text("utf-8") == expected.replace("# DB_POOL_SIZE=10", "DB_POOL_SIZE=5")


def test_a_name_that_the_example_lacks_is_appended(env: Path, example: Path) -> None:
    env_file.create(env, example, {"EXTRA": "1"})

    assert env.read_text("utf-8") == f"{EXAMPLE}EXTRA=1\n"


def test_an_existing_file_is_never_overwritten(env: Path, example: Path) -> None:
    env.write_text("MINE=1\n", "utf-8")

    with pytest.raises(FileExistsError):
        env_file.create(env, example, {})
    assert env.read_text("utf-8") == "MINE=1\n"


@needs_modes
@pytest.mark.usefixtures("open_umask")
def test_others_cannot_read_it_at_any_time(
    env: Path, example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def look(descriptor: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))

    monkeypatch.setattr("postgres.env_file.os.fsync", look)

    env_file.create(env, example, {"DATABASE_URL": PASTED})

    assert [*modes, mode_of(env)] == [0o600, 0o600]


@needs_modes
@pytest.mark.usefixtures("open_umask")
def test_a_change_closes_a_file_that_others_could_read(env: Path) -> None:
    env.write_text("A=1\n", "utf-8")

    env_file.set_value(env, "A", "2")

    assert mode_of(env) == 0o600


def test_a_failure_leaves_the_file_as_it_was_and_nothing_else(
    env: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("postgres.env_file.os.fsync", fail)
    env.write_text("A=1\n", "utf-8")

    with pytest.raises(OSError, match="no space"):
        env_file.set_value(env, "A", "2")
    assert env.read_text("utf-8") == "A=1\n"
    assert list(env.parent.iterdir()) == [env]


def test_the_draft_of_a_write_that_was_killed_is_removed_by_the_next(env: Path) -> None:
    old, new = env.with_name(".env.0a1b.tmp"), env.with_name(".env.2c3d.tmp")
    for draft in (old, new):
        draft.write_text(PASTED, "utf-8")
    os.utime(old, (0, 0))
    env.write_text("A=1\n", "utf-8")

    env_file.set_value(env, "A", "2")

    assert not old.exists()
    assert new.exists()  # another process may be writing it


@needs_modes
def test_a_link_stays_a_link(env: Path, tmp_path: Path) -> None:
    target = tmp_path / "shared"
    target.write_text("A=1\n", "utf-8")
    env.symlink_to(target)

    env_file.set_value(env, "A", "2")

    assert env.is_symlink()
    assert target.read_text("utf-8") == "A=2\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b"A=new\n"),
        (b"A=1\nB=2\n", b"A=new\nB=2\n"),
        (b"A=1\r\n# caf\xe9\r\n\r\nB=2\r\n", b"A=new\r\n# caf\xe9\r\n\r\nB=2\r\n"),
        (b"B=2\r\n", b"B=2\r\nA=new\r\n"),
        (b"B=2", b"B=2\nA=new\n"),
        (b"\xef\xbb\xbfA=1\n", b"\xef\xbb\xbfA=new\n"),
        (b"export A = '1'  # one\n", b"export A =new  # one\n"),
        (b'A="1 # one"\n', b"A=new\n"),
        (b"A= # none yet\n", b"A=new # none yet\n"),
        (b"A=1#2\n", b"A=new\n"),
        (b"A='1'#2\n", b"A=new\n"),
        (b"A=1\nA=2\n", b"A=1\nA=new\n"),
        (b"# A=1\nBA=2\nA_B=3\n", b"# A=1\nBA=2\nA_B=3\nA=new\n"),
        (b"KEY='begin\nA=1\nend'\nA=2\n", b"KEY='begin\nA=1\nend'\nA=new\n"),
    ],
)
def test_one_value_changes_and_every_other_byte_stays(
    env: Path, before: bytes, after: bytes
) -> None:
    env.write_bytes(before)

    env_file.set_value(env, "A", "new")

    assert env.read_bytes() == after
    assert env_file.get_value(env, "A") == "new"


def test_a_name_without_a_value_is_none(env: Path, example: Path) -> None:
    env_file.create(env, example, {"DATABASE_URL": ""})

    assert env_file.get_value(env, "DATABASE_URL") == ""
    assert env_file.get_value(env, "DB_POOL_SIZE") is None


special = st.text(st.sampled_from(" '\"\\#$={}`abcé"))
printable = st.text(st.characters(exclude_categories=["C", "Z"]))


@given((special | printable).filter(lambda value: "${" not in value))
@settings(deadline=None, max_examples=200)
def test_python_dotenv_reads_back_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, value: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.env"
    path.write_text("BEFORE=1\nNAME=old # comment\nAFTER=2\n", "utf-8")

    env_file.set_value(path, "NAME", value)

    assert dotenv_values(path) == {"BEFORE": "1", "NAME": value, "AFTER": "2"}
    assert env_file.get_value(path, "NAME") == value


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
@settings(deadline=None)
def test_a_connection_string_needs_no_quotes_and_docker_reads_it_too(text: str) -> None:
    url = DatabaseUrl(text, text, "::1", 5432, text, (("options", text),)).for_libpq()

    line = env_file.with_value("", "DATABASE_URL", url)

    assert line == f"DATABASE_URL={url}\n"
    assert dotenv_values(stream=io.StringIO(line)) == {"DATABASE_URL": url}


@pytest.mark.parametrize(
    "value", ["s3cr3t\nB=2", "s3cr3t\r", "s3cr3t\0", "s3cr3t\x1b", "${s3cr3t}"]
)
def test_a_value_that_no_line_can_hold_is_refused_unseen(env: Path, value: str) -> None:
    env.write_text("A=1\n", "utf-8")

    with pytest.raises(ValueError, match=r"^A: the value holds") as refusal:
        env_file.set_value(env, "A", value)
    assert "s3cr3t" not in str(refusal.value)
    assert env.read_text("utf-8") == "A=1\n"


def test_secrets_are_long_and_never_the_same() -> None:
    secrets = {env_file.new_secret() for _ in range(10)}

    assert len(secrets) == 10
    assert {len(secret) for secret in secrets} == {64}


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        taken = busy.getsockname()[1]
        free = env_file.free_port()
        draws = iter([taken, free])
        monkeypatch.setattr("postgres.env_file.secrets.choice", lambda _ports: next(draws))

        assert env_file.free_port() == free
    assert 20_000 <= free < 30_000


def test_no_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            "postgres.env_file.secrets.choice", lambda _ports: busy.getsockname()[1]
        )

        with pytest.raises(OSError, match="no free port"):
            env_file.free_port()


def test_the_embedded_server_gets_a_url_of_its_own() -> None:
    url = env_file.embedded_url("your_host")

    assert url.is_embedded
    assert parse(url.for_libpq()) == url
    assert url.password != env_file.embedded_url("your_host").password


class Terminal:
    """Gives prepared answers, and keeps what is said."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.said = io.StringIO()

    def read(self, _prompt: str) -> str:
        if not self.answers:
            raise EOFError
        return self.answers.pop(0)

    def ask(self) -> DatabaseUrl | None:
        return env_file.ask_database_url(self.read, self.said)


def test_a_good_answer_is_taken_without_a_word() -> None:
    terminal = Terminal(PASTED, "never read")

    assert terminal.ask() == parse(PASTED)
    assert terminal.said.getvalue() == ""


def test_what_was_mended_is_said() -> None:
    terminal = Terminal(f"psql '{PASTED}'")

    assert terminal.ask() == parse(PASTED)
    assert "took the connection string out of the text" in terminal.said.getvalue()


def test_what_is_pasted_as_lines_is_one_answer() -> None:
    terminal = Terminal("\nPGHOST=localhost\nPGUSER=ann\nPGPASSWORD=s3cr3t\nPGDATABASE=todo\n")

    assert terminal.ask() == parse(PASTED)
    assert terminal.said.getvalue() == "  Mended: put the single settings together\n"


def test_a_wrong_answer_is_explained_and_asked_for_again() -> None:
    terminal = Terminal("mysql://ann:s3cr3t@localhost", "postgresql://ann:s3cr3t", PASTED)

    assert terminal.ask() == parse(PASTED)
    assert "Once more: the text starts with mysql://" in terminal.said.getvalue()
    assert "Once more: postgresql://[…]: this has no" in terminal.said.getvalue()
    assert "s3cr3t" not in terminal.said.getvalue()


def test_three_wrong_answers_are_enough() -> None:
    terminal = Terminal("one", "two", "three", PASTED)

    with pytest.raises(DatabaseUrlError, match="no connection string"):
        terminal.ask()


@pytest.mark.parametrize("answers", [[], [""], ["  "], ["wrong"], ["wrong", ""]])
def test_an_empty_answer_or_the_end_of_input_is_none(answers: list[str]) -> None:
    terminal = Terminal(*answers)

    assert terminal.ask() is None
    assert terminal.said.getvalue().count("Once more") == answers.count("wrong")


def test_ctrl_c_goes_through() -> None:
    def interrupt(_prompt: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        env_file.ask_database_url(interrupt)


def test_a_text_from_elsewhere_is_taken_with_the_same_words() -> None:
    said = io.StringIO()

    assert env_file.take_database_url(f"psql '{PASTED}'", said) == parse(PASTED)
    assert said.getvalue() == "  Mended: took the connection string out of the text around it\n"
