"""The five questions, as a person meets them on a terminal."""

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
    terminal.expect("Which Python")
    terminal.expect("1 - 3.13 .*2 - 3.14 ")
    terminal.sendline("1")
    terminal.expect("Which PostgreSQL")
    terminal.expect("1 - local .*no account.*2 - neon .*hidden")
    terminal.sendline("2")
    terminal.expect("Connection string .hidden")
    terminal.sendline("")
    terminal.read()

    pyproject = tomllib.loads(offline.project("adas-list").read("pyproject.toml"))
    assert pyproject["tool"]["todo"]["title"] == "Ada's list"
    assert pyproject["project"]["description"] == 'Says "hi"'


def test_five_times_return_gives_the_defaults(offline: Machine) -> None:
    terminal = offline.type()
    for question in ("as people", "folder's", "one line", "Which Python", "Which PostgreSQL"):
        terminal.expect(question)
        terminal.sendline("")
    terminal.read()

    project = offline.project()
    assert project.read(".python-version") == "3.13\n"
    assert "@127.0.0.1:" in project.read(".env")


def test_braces_that_are_typed_stay_what_they_are(offline: Machine) -> None:
    terminal = offline.type("project_slug=braces")
    terminal.expect("as people")
    terminal.sendline("{{ 7 * 7 }}")
    for question in ("folder's", "one line", "Which Python", "Which PostgreSQL"):
        terminal.expect(question)
        terminal.sendline("")
    terminal.read()

    pyproject = tomllib.loads(offline.project("braces").read("pyproject.toml"))
    assert pyproject["tool"]["todo"]["title"] == "{{ 7 * 7 }}"
