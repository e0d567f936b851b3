"""Answers that cannot work are refused before anything is written, with one that would do."""

import sys
import tomllib

import pytest

from machine import Machine, Project
from repository import load_hook

GOOD = {
    "project_name": "Todo Backend",
    "project_slug": "todo-backend",
    "description": "A todo API",
    "python_version": "3.13",
    "database": "local",
}
INVISIBLE = {
    "a line end": "one\ntwo",
    "a tab": "one\ttwo",
    "a null": "one\0two",
    "an escape": "one\x1b[31mtwo",
    "a direction override": "one\u202etwo",
    "a zero-width space": "one\u200btwo",
    "a no-break space": "one\u00a0two",
    "half a character": "one\ud800two",
}


hook = load_hook("pre_gen_project")


def problems(**answers: str) -> list[str]:
    return [problem for rule in hook.RULES if (problem := rule(GOOD | answers))]


def problem(**answers: str) -> str:
    (only,) = problems(**answers)
    assert isinstance(only, str)
    return only


def test_the_default_answers_are_accepted() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    "text", ["x", "O'Brien", 'say "hi" \\', "👩‍💻", "תזכורות", "می‌خواهم", "x" * 60]
)
def test_any_text_that_can_be_seen_is_a_name(text: str) -> None:
    assert problems(project_name=text) == []


@pytest.mark.parametrize("answer", ["project_name", "description"])
@pytest.mark.parametrize("text", ["", " ", "\u3000"])
def test_a_text_is_not_empty(answer: str, text: str) -> None:
    assert problem(**{answer: text}).startswith(f"{answer} is empty: write ")


@pytest.mark.parametrize("answer", ["project_name", "description"])
@pytest.mark.parametrize("text", [" x", "x "])
def test_a_text_does_not_begin_or_end_with_a_blank(answer: str, text: str) -> None:
    assert problem(**{answer: text}).startswith(f"{answer} begins or ends with a blank: write ")


@pytest.mark.parametrize("answer", ["project_name", "description"])
@pytest.mark.parametrize("text", INVISIBLE.values(), ids=INVISIBLE)
def test_a_text_holds_nothing_that_cannot_be_seen(answer: str, text: str) -> None:
    message = problem(**{answer: text})

    assert message.startswith(f"{answer} holds U+")
    assert "which cannot be seen: write " in message
    assert message.isprintable()


@pytest.mark.parametrize(("answer", "longest"), [("project_name", 60), ("description", 200)])
def test_a_text_has_a_longest_length(answer: str, longest: int) -> None:
    assert problems(**{answer: "x" * longest}) == []
    assert problem(**{answer: "x" * (longest + 1)}).startswith(
        f"{answer} has {longest + 1} characters, {longest} is the most: write "
    )


@pytest.mark.parametrize("slug", ["x", "todo", "my-todo-2", "2do", "a" * 60])
def test_small_letters_digits_and_hyphens_make_a_slug(slug: str) -> None:
    assert problems(project_slug=slug) == []


@pytest.mark.parametrize(
    "slug",
    ["", "Todo", "my_todo", "my todo", "-todo", "todo-", "my--todo", "../x", "/x", "a/b", "a\\b",
     ".", "todo\n", "tödo", "٣", "{{x}}", "\ud800"],
)  # fmt: skip
def test_anything_else_makes_none(slug: str) -> None:
    message = problem(project_slug=slug)

    assert message.startswith("project_slug takes small letters")
    assert message.endswith("write for example todo-backend")
    assert message.isprintable()


def test_a_slug_has_a_longest_length() -> None:
    assert "project_slug has 61 characters, 60 is the most" in problem(project_slug="x" * 61)


@pytest.mark.parametrize(
    ("slug", "meaning"),
    [
        ("fastapi", "a package that the project depends on"),
        ("types-psutil", "a package that the project depends on"),
        ("json", "a module of Python's own"),
        ("concurrent", "a module of Python's own"),
        ("con", "a device name on Windows"),
        ("com1", "a device name on Windows"),
    ],
)
def test_a_slug_that_means_something_else_is_refused(slug: str, meaning: str) -> None:
    assert problem(project_slug=slug) == (
        f'project_slug "{slug}" is {meaning}: write for example {slug}-api'
    )


@pytest.mark.parametrize("slug", ["fastapi", "json", "com1"])
def test_the_slug_that_is_advised_would_do(slug: str) -> None:
    assert problems(project_slug=f"{slug}-api") == []


def test_every_package_of_a_new_project_is_known(project: Project) -> None:
    locked = {package["name"] for package in tomllib.loads(project.read("uv.lock"))["package"]}

    unknown = sorted(locked - {"todo-backend"} - hook.PACKAGES)
    assert not unknown, f"add to PACKAGES in hooks/pre_gen_project.py: {' '.join(unknown)}"


def test_every_module_of_python_is_known() -> None:
    slugs = [name for name in sys.stdlib_module_names if name.isalnum() and name.islower()]

    assert [slug for slug in slugs if not problems(project_slug=slug)] == []


@pytest.mark.parametrize("version", ["", "3.12", "3.13.1", "4"])
def test_other_pythons_are_refused(version: str) -> None:
    assert problem(python_version=version).endswith("is not offered: write 3.13 or 3.14")


def test_a_connection_string_is_no_answer_and_is_not_shown() -> None:
    message = problem(database="postgresql://ada:s3cr3t@example.com/app")

    assert message.startswith("database is one of local and neon")
    assert "s3cr3t" not in message


def test_all_problems_are_told_at_once() -> None:
    found = problems(project_name="", project_slug="", description="", python_version="2.7")

    assert [text.split()[0] for text in found] == [
        "project_name",
        "project_slug",
        "description",
        "python_version",
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("project_slug=Todo", "project_slug takes small letters"),
        ("project_slug=../outside", "project_slug takes small letters"),
        ("project_slug=fastapi", "write for example fastapi-api"),
        ("project_name=one\ntwo", "project_name holds U+000A"),
        ("description= ", "description is empty: write one line"),
    ],
)
def test_the_command_line_refuses_and_leaves_nothing(
    machine: Machine, answer: str, message: str
) -> None:
    outcome = machine.generate(answer)

    assert outcome.code == 1
    assert message in outcome.output
    assert "Nothing was created." in outcome.output
    assert list(machine.work.iterdir()) == []
    assert not (machine.root / "outside").exists()


@pytest.mark.parametrize(
    ("name", "slug"),
    [("O'Brien & Søn", "o-brien-son"), ("可愛い", "ke-ai-i"), ("👩‍💻", "todo-backend")],
)
def test_every_name_leads_to_a_slug(offline: Machine, name: str, slug: str) -> None:
    outcome = offline.generate(f"project_name={name}", slug=slug)

    assert (outcome.project.path / "README.md").exists(), outcome.output


def test_an_empty_slug_harms_no_folder(machine: Machine) -> None:
    (machine.work / "mine.txt").write_text("mine", "utf-8")

    outcome = machine.generate("project_slug=")

    assert outcome.code == 1
    assert [file.name for file in machine.work.iterdir()] == ["mine.txt"]
