"""Invalid answers are rejected before anything is written, with a suggestion."""

import json
import sys
import tomllib
from pathlib import Path

import pytest

from machine import Machine, Project, new_machine
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
    "a letter that is blank": "one\u3164two",
    "two joiners": "one\u200d\u200dtwo",
    "a joiner after a blank": "one \u200dtwo",
    "two choices of a shape": "one\ufe0e\ufe0ftwo",
    "hidden letters": "one\U000e0041\U000e0042two",
}


hook = load_hook("pre_gen_project")


def problems(**answers: str) -> list[str]:
    found: list[str] = hook.find_problems(GOOD | answers)
    return found


def problem(**answers: str) -> str:
    (only,) = problems(**answers)
    assert isinstance(only, str)
    return only


def test_the_default_answers_are_accepted() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    "text",
    ["x", "O'Brien", 'say "hi" \\', "👩‍💻", "❤️‍🔥", "1️⃣", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "תזכורות", "می‌خواهم", "ශ්‍රී", "x" * 60],
)
def test_any_visible_text_is_a_valid_name(text: str) -> None:
    assert problems(project_name=text) == []


@pytest.mark.parametrize("answer", ["project_name", "description"])
@pytest.mark.parametrize("text", ["", " ", "\u3000"])
def test_an_empty_text_is_rejected(answer: str, text: str) -> None:
    assert problem(**{answer: text}).startswith(f"{answer} is empty: write ")


@pytest.mark.parametrize("answer", ["project_name", "description"])
@pytest.mark.parametrize("text", [" x", "x "])
def test_a_text_that_starts_or_ends_with_a_space_is_rejected(answer: str, text: str) -> None:
    assert problem(**{answer: text}).startswith(f"{answer} starts or ends with a space: write ")


@pytest.mark.parametrize("answer", ["project_name", "description"])
@pytest.mark.parametrize("text", INVISIBLE.values(), ids=INVISIBLE)
def test_a_text_with_invisible_characters_is_rejected(answer: str, text: str) -> None:
    message = problem(**{answer: text})

    assert message.startswith(f"{answer} contains U+")
    assert "which is invisible: write " in message
    assert message.isprintable()


@pytest.mark.parametrize("answer", ["project_name", "description"])
def test_a_text_with_unknown_characters_is_rejected(answer: str) -> None:
    assert problem(**{answer: "x\U000e01f0"}).startswith(
        f"{answer} contains U+E01F0, which Python 3.{sys.version_info.minor} does not know: write "
    )


@pytest.mark.parametrize("answer", ["project_name", "description"])
def test_a_text_that_starts_with_a_combining_character_is_rejected(answer: str) -> None:
    assert problem(**{answer: "\u0301x"}).startswith(
        f"{answer} starts with U+0301 (COMBINING ACUTE ACCENT), which belongs to a letter before it"
    )


@pytest.mark.parametrize(("answer", "longest"), [("project_name", 60), ("description", 200)])
def test_a_text_has_a_maximum_length(answer: str, longest: int) -> None:
    assert problems(**{answer: "x" * longest}) == []
    assert problem(**{answer: "x" * (longest + 1)}).startswith(
        f"{answer} has {longest + 1} characters, the maximum is {longest}: write "
    )


@pytest.mark.parametrize("slug", ["x", "todo", "my-todo-2", "2do", "a" * 60])
def test_lowercase_letters_digits_and_hyphens_make_a_slug(slug: str) -> None:
    assert problems(project_slug=slug) == []


@pytest.mark.parametrize(
    "slug",
    ["", "Todo", "my_todo", "my todo", "-todo", "todo-", "my--todo", "../x", "/x", "a/b", "a\\b",
     ".", "todo\n", "tödo", "٣", "{{x}}", "\ud800"],
)  # fmt: skip
def test_a_slug_with_anything_else_is_rejected(slug: str) -> None:
    message = problem(project_slug=slug)

    assert message.startswith("project_slug takes lowercase letters")
    assert message.endswith("write, for example, todo-backend")
    assert message.isprintable()


def test_a_slug_has_a_maximum_length() -> None:
    assert "project_slug has 61 characters, the maximum is 60" in problem(project_slug="x" * 61)


@pytest.mark.parametrize(
    ("slug", "meaning"),
    [
        ("fastapi", "a package that the project depends on"),
        ("types-psutil", "a package that the project depends on"),
        ("json", "a standard library module"),
        ("concurrent", "a standard library module"),
        ("con", "a reserved name on Windows"),
        ("com1", "a reserved name on Windows"),
        ("postgres", "a built-in PostgreSQL database"),
        ("template0", "a built-in PostgreSQL database"),
    ],
)
def test_a_slug_that_has_another_meaning_is_rejected(slug: str, meaning: str) -> None:
    assert problem(project_slug=slug) == (
        f'project_slug "{slug}" is {meaning}: write, for example, {slug}-api'
    )


@pytest.mark.parametrize("slug", ["fastapi", "json", "com1"])
def test_the_suggested_slug_is_accepted(slug: str) -> None:
    assert problems(project_slug=f"{slug}-api") == []


def test_every_package_of_a_new_project_is_known(project: Project) -> None:
    locked = {package["name"] for package in tomllib.loads(project.read("uv.lock"))["package"]}

    unknown = sorted(locked - {"todo-backend"} - hook.PACKAGES)
    assert not unknown, f"add to PACKAGES in hooks/pre_gen_project.py: {' '.join(unknown)}"


def test_every_standard_library_module_is_known() -> None:
    slugs = [name for name in sys.stdlib_module_names if name.isalnum() and name.islower()]

    assert [slug for slug in slugs if not problems(project_slug=slug)] == []


@pytest.mark.parametrize("version", ["", "3.12", "3.13.1", "4"])
def test_other_python_versions_are_rejected(version: str) -> None:
    assert problem(python_version=version).endswith("is not supported: write 3.13 or 3.14")


def test_a_connection_string_is_rejected_as_an_answer_and_not_shown() -> None:
    message = problem(database="postgresql://ada:s3cr3t@example.com/app")

    assert message.startswith("database must be local or neon")
    assert "s3cr3t" not in message


def test_all_problems_are_reported_at_once() -> None:
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
        ("project_slug=Todo", "project_slug takes lowercase letters"),
        ("project_slug=../outside", "not '../outside': write, for example, todo-backend"),
        ("project_slug=a/b/c", "not 'a/b/c': write, for example, todo-backend"),
        ("project_slug=/", "not '/': write, for example, todo-backend"),
        ("project_slug=" + "a" * 10_000, "project_slug has 10000 characters, the maximum is 60"),
        ("project_slug=fastapi", "write, for example, fastapi-api"),
        ("project_name=one\ntwo", "project_name contains U+000A"),
        ("description= ", "description is empty: write one line"),
    ],
)
def test_an_invalid_answer_on_the_command_line_creates_nothing(
    machine: Machine, answer: str, message: str
) -> None:
    outcome = machine.generate(answer)

    assert outcome.code == 1
    assert message in outcome.output
    assert "Nothing was created." in outcome.output
    assert "Traceback" not in outcome.output
    assert list(machine.work.iterdir()) == []
    assert not (machine.root / "outside").exists()


def test_an_empty_slug_leaves_existing_files_unchanged(machine: Machine) -> None:
    (machine.work / "mine.txt").write_text("mine", "utf-8")

    outcome = machine.generate("project_slug=")

    assert outcome.code == 1
    assert "and cannot be empty: write, for example, todo-backend" in outcome.output
    assert [file.name for file in machine.work.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("project_nme=x", "project_nme is not one of the answers: did you mean project_name?"),
        ("databse=neon", "databse is not one of the answers: did you mean database?"),
        ("colour=red", "colour is not one of the answers: choose from project_name, "),
        ("_template=x", "_template is not one of the answers"),
        ("__project_name_toml=x", "__project_name_toml is not one of the answers"),
        ("python_version=3.12", "python_version '3.12' is not supported: write 3.13 or 3.14"),
        ("database=postgresql://ada:s3cr3t@h/db", "database must be local or neon"),
        ("postgresql://ada:s3cr3t@h/db?sslmode=require", "an argument is not one of the answers"),
    ],
)
def test_an_argument_that_cookiecutter_would_ignore_is_rejected(
    machine: Machine, answer: str, message: str
) -> None:
    outcome = machine.generate("project_name=x", answer)

    assert outcome.code == 1
    assert outcome.output.startswith(message)
    assert "s3cr3t" not in outcome.output
    assert "Traceback" not in outcome.output
    assert list(machine.work.iterdir()) == []
    assert list(machine.temp.iterdir()) == []


@pytest.mark.parametrize("name", ["project_name", "description"])
def test_braces_are_rejected_with_cruft_which_would_render_them_again(name: str) -> None:
    answers = GOOD | {name: "lists of {{ x }}"}

    hook.main(answers | {"_output_dir": "."})
    with pytest.raises(SystemExit, match=rf"{name} contains .*cruft"):
        hook.main(answers)


# Answers from files: cookiecutter's configuration and replays


def configure(machine: Machine, **answers: object) -> str:
    """Write answers to a cookiecutter configuration file. Returns its path."""
    config = machine.root / "cookiecutter.yaml"
    yaml = json.dumps({"default_context": answers}, ensure_ascii=False)  # JSON is valid YAML
    config.write_text(yaml, "utf-8")
    return str(config)


def test_answers_can_come_from_a_configuration_file(offline: Machine) -> None:
    config = configure(offline, project_name='Ada\'s "list" \\ 👩‍💻', description=42, colour="red")

    outcome = offline.generate(slug="ada-s-list", COOKIECUTTER_CONFIG=config)

    pyproject = tomllib.loads(outcome.project.read("pyproject.toml"))
    assert pyproject["tool"]["todo"]["title"] == 'Ada\'s "list" \\ 👩‍💻'
    assert pyproject["project"]["description"] == "42"


@pytest.mark.parametrize(
    ("answer", "value", "message"),
    [
        ("project_name", True, "project_name is not text: write it in quotes"),
        ("project_slug", True, "project_slug is not text: write it in quotes"),
        ("description", None, "description is not text: write it in quotes"),
        ("description", {"a": "b"}, "description is not text: write it in quotes"),
    ],
)
def test_a_yaml_value_that_is_not_text_is_rejected(
    machine: Machine, answer: str, value: object, message: str
) -> None:
    outcome = machine.generate(COOKIECUTTER_CONFIG=configure(machine, **{answer: value}))

    assert outcome.code == 1
    assert message in outcome.output
    assert list(machine.work.iterdir()) == []


def test_a_version_that_yaml_reads_as_a_number_is_accepted(offline: Machine) -> None:
    config = configure(offline, python_version=3.14)

    outcome = offline.generate(COOKIECUTTER_CONFIG=config)

    assert outcome.project.read(".python-version") == "3.14\n"


@pytest.fixture(scope="module")
def replay(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The replay file that cookiecutter saves for valid answers."""
    with new_machine(tmp_path_factory.mktemp("replay") / "machine", template) as machine:
        machine.go_offline()
        machine.generate()
        (saved,) = (machine.home / ".cookiecutter_replay").iterdir()
        replayed: dict[str, dict[str, str]] = json.loads(saved.read_text("utf-8"))
        return replayed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"project_slug": "../outside"}, "project_slug takes lowercase letters"),
        ({"project_slug": "a/b/c"}, "project_slug takes lowercase letters"),
        ({"project_name": 'x"\ny = "'}, "project_name contains U+000A"),
        ({"project_name": 'say "hi"'}, "__project_name_toml does not match the answers"),
        ({"__description_toml": '"\n[tool.uv]\nx = "'}, "__description_toml does not match"),
        ({"python_version": "2.7"}, "python_version '2.7' is not supported"),
        ({"database": "postgresql://ada:s3cr3t@h/db"}, "database must be local or neon"),
        ({"description": None}, "description is not text: write it in quotes"),
    ],
)
def test_an_invalid_replay_file_is_rejected(
    machine: Machine,
    replay: dict[str, dict[str, str]],
    changed: dict[str, str | None],
    message: str,
) -> None:
    edited = replay | {"cookiecutter": replay["cookiecutter"] | changed}
    file = machine.root / "replay.json"
    file.write_text(json.dumps(edited), "utf-8")

    outcome = machine.generate("--replay-file", str(file), flags=())

    assert outcome.code == 1
    assert message in outcome.output
    assert "s3cr3t" not in outcome.output
    # Cookiecutter creates the folder that the replay names, and removes only its last part.
    assert [file.name for file in machine.work.rglob("*") if file.name not in {"a", "b"}] == []
    assert not (machine.root / "outside").exists()
