"""The five questions, as a person sees them on a terminal."""

import tomllib

from machine import Machine


def test_the_questions_explain_themselves(offline: Machine) -> None:
    terminal = offline.type(TERM="dumb")
    terminal.expect("as people read it")
    terminal.sendline("Ada's list")
    terminal.expect("folder's and the package's name")
    terminal.expect(r"\(ada-s-list\)")
    terminal.sendline("adas-list")
    terminal.expect("in one line")
    terminal.sendline('Says "hi"')
    terminal.expect(r"Which Python.*3\.13 .*3\.14 ")
    terminal.sendline("3.13")
    terminal.expect("Which PostgreSQL.*local .*no account.*neon .*hidden")
    terminal.sendline("neon")
    terminal.read()

    pyproject = tomllib.loads(offline.project("adas-list").read("pyproject.toml"))
    assert pyproject["tool"]["todo"]["title"] == "Ada's list"
    assert pyproject["project"]["description"] == 'Says "hi"'


def test_pressing_return_five_times_accepts_the_defaults(offline: Machine) -> None:
    terminal = offline.type()
    for question in ("as people", "folder's", "one line", "Which Python", "Which PostgreSQL"):
        terminal.expect(question)
        terminal.sendline("")
    terminal.read()

    assert offline.project().read(".python-version") == "3.13\n"


def test_an_invalid_answer_is_asked_for_again_at_once(offline: Machine) -> None:
    terminal = offline.type("description=x", "python_version=3.13", "database=local")
    terminal.expect("as people")
    terminal.sendline("My list")
    terminal.expect("folder's")
    terminal.sendline("My list")
    terminal.expect("project_slug takes lowercase letters .* write, for example, todo-backend")
    terminal.sendline("json")
    terminal.expect("is a standard library module: write, for example, json-api")
    terminal.sendline("my-list")
    for question in ("one line", "Which Python"):
        terminal.expect(question)
        terminal.sendline("")
    terminal.expect("Which PostgreSQL")
    terminal.sendline("2")
    terminal.expect("database must be local or neon")
    terminal.sendline("local")
    terminal.read()

    assert 'name = "my-list"' in offline.project("my-list").read("pyproject.toml")


def test_ctrl_c_at_a_question_leaves_nothing(offline: Machine) -> None:
    terminal = offline.type()
    terminal.expect("as people")
    terminal.sendline("")
    terminal.expect("folder's")

    output = offline.press_ctrl_c(terminal)

    assert "Traceback" not in output
    assert list(offline.work.iterdir()) == []
    assert offline.left_in_temp() == []


def test_typed_braces_are_not_rendered(offline: Machine) -> None:
    terminal = offline.type("project_slug=braces")
    terminal.expect("as people")
    terminal.sendline("{{ 7 * 7 }}")
    for question in ("folder's", "one line", "Which Python", "Which PostgreSQL"):
        terminal.expect(question)
        terminal.sendline("")
    terminal.read()

    pyproject = tomllib.loads(offline.project("braces").read("pyproject.toml"))
    assert pyproject["tool"]["todo"]["title"] == "{{ 7 * 7 }}"
