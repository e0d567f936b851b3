"""Asking for a connection string: what is answered, and what is said about it."""

import io

import pytest

from postgres.prompt import ask_database_url, find_database_url, take_database_url
from postgres.url import DatabaseUrl, DatabaseUrlError, parse

PASTED = "postgresql://ann:s3cr3t@localhost:5432/todo"


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
        return ask_database_url(self.read, self.said, empty="later")


def test_a_good_answer_is_taken_without_a_word() -> None:
    terminal = Terminal(PASTED, "never read")

    assert terminal.ask() == parse(PASTED)
    assert terminal.said.getvalue() == ""


def test_what_was_mended_is_said() -> None:
    terminal = Terminal(f"psql '{PASTED}'")

    assert terminal.ask() == parse(PASTED)
    assert "ignored the text around the connection string" in terminal.said.getvalue()


def test_what_is_pasted_as_lines_is_one_answer() -> None:
    terminal = Terminal("\nPGHOST=localhost\nPGUSER=ann\nPGPASSWORD=s3cr3t\nPGDATABASE=todo\n")

    assert terminal.ask() == parse(PASTED)
    assert terminal.said.getvalue() == "  Fixed: combined the separate settings\n"


def test_a_wrong_answer_is_explained_and_asked_for_again() -> None:
    terminal = Terminal("mysql://ann:s3cr3t@localhost", "postgresql://ann:s3cr3t", PASTED)

    assert terminal.ask() == parse(PASTED)
    assert "Try again: the text starts with mysql://" in terminal.said.getvalue()
    assert "Try again: postgresql://[…]: this has no" in terminal.said.getvalue()
    assert "s3cr3t" not in terminal.said.getvalue()


def test_three_wrong_answers_are_enough() -> None:
    terminal = Terminal("one", "two", "three", PASTED)

    with pytest.raises(DatabaseUrlError, match="not a connection string"):
        terminal.ask()


@pytest.mark.parametrize("answers", [[], [""], ["  "], ["wrong"], ["wrong", ""]])
def test_an_empty_answer_or_the_end_of_input_is_none(answers: list[str]) -> None:
    terminal = Terminal(*answers)

    assert terminal.ask() is None
    assert terminal.said.getvalue().count("Try again") == answers.count("wrong")


def test_ctrl_c_goes_through() -> None:
    def interrupt(_prompt: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_database_url(interrupt, empty="later")


def test_a_text_from_elsewhere_is_taken_with_the_same_words() -> None:
    said = io.StringIO()

    assert take_database_url(f"psql '{PASTED}'", said) == parse(PASTED)
    assert said.getvalue() == "  Fixed: ignored the text around the connection string\n"


def test_without_a_terminal_it_says_where_a_string_may_come_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NEON_DATABASE_URL", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PASTED}\n"))

    with pytest.raises(DatabaseUrlError, match=r"set NEON_DATABASE_URL, or .* --local"):
        find_database_url(empty="stop")


def test_the_variable_is_read_before_anyone_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEON_DATABASE_URL", f"psql '{PASTED}'")

    assert find_database_url(empty="stop") == parse(PASTED)
