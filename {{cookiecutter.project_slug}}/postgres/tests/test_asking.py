"""Asking for a connection string: answers and messages."""

import io

import pytest

from postgres.prompt import ask_on_terminal, from_environment_or_ask, parse_pasted
from postgres.url import DatabaseUrl, DatabaseUrlError, parse

PASTED = "postgresql://ann:s3cr3t@localhost:5432/todo"


class Terminal:
    """Gives prepared answers, and records the output."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.output = io.StringIO()

    def read(self, _prompt: str) -> str:
        if not self.answers:
            raise EOFError
        return self.answers.pop(0)

    def ask(self) -> DatabaseUrl | None:
        return ask_on_terminal(self.read, self.output, empty="later")


def test_a_valid_answer_is_accepted_silently() -> None:
    terminal = Terminal(PASTED, "never read")

    assert terminal.ask() == parse(PASTED)
    assert terminal.output.getvalue() == ""


def test_fixes_are_reported() -> None:
    terminal = Terminal(f"psql '{PASTED}'")

    assert terminal.ask() == parse(PASTED)
    assert "ignored the text around the connection string" in terminal.output.getvalue()


def test_pasted_lines_are_one_answer() -> None:
    terminal = Terminal("\nPGHOST=localhost\nPGUSER=ann\nPGPASSWORD=s3cr3t\nPGDATABASE=todo\n")

    assert terminal.ask() == parse(PASTED)
    assert terminal.output.getvalue() == "  Fixed: combined the separate settings\n"


def test_after_an_invalid_answer_the_question_is_repeated_with_an_explanation() -> None:
    terminal = Terminal("mysql://ann:s3cr3t@localhost", "postgresql://ann:s3cr3t", PASTED)

    assert terminal.ask() == parse(PASTED)
    assert "Try again: the text is for another database (mysql)" in terminal.output.getvalue()
    assert "Try again: there is no HOST/DATABASE" in terminal.output.getvalue()
    assert "s3cr3t" not in terminal.output.getvalue()


def test_three_invalid_answers_end_the_prompt() -> None:
    terminal = Terminal("one", "two", "three", PASTED)

    with pytest.raises(DatabaseUrlError, match="not a connection string"):
        terminal.ask()


@pytest.mark.parametrize("answers", [[""], ["\n"], ["wrong", "\n"]])
def test_only_enter_is_none(answers: list[str]) -> None:
    terminal = Terminal(*answers)

    assert terminal.ask() is None
    assert terminal.output.getvalue().count("Try again") == answers.count("wrong")


@pytest.mark.parametrize("blank", ["  ", "\n \n", "\x1b[200~\x1b[201~\n", "\ufeff\n"])
def test_a_blank_paste_is_asked_for_again(blank: str) -> None:
    terminal = Terminal(blank, PASTED)

    assert terminal.ask() == parse(PASTED)
    assert "Try again: the text is empty" in terminal.output.getvalue()


def test_ctrl_d_is_no_answer() -> None:
    with pytest.raises(EOFError):
        Terminal().ask()


def test_ctrl_c_is_not_caught() -> None:
    def interrupt(_prompt: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_on_terminal(interrupt, empty="later")


def test_a_string_from_another_source_gets_the_same_messages() -> None:
    output = io.StringIO()

    assert parse_pasted(f"psql '{PASTED}'", output) == parse(PASTED)
    assert output.getvalue() == "  Fixed: ignored the text around the connection string\n"


def test_without_a_terminal_the_error_says_how_to_set_the_string(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NEON_DATABASE_URL", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PASTED}\n"))

    with pytest.raises(DatabaseUrlError, match=r"set NEON_DATABASE_URL, or .* --local"):
        from_environment_or_ask(empty="stop")


def test_the_variable_takes_precedence_over_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEON_DATABASE_URL", f"psql '{PASTED}'")

    assert from_environment_or_ask(empty="stop") == parse(PASTED)
