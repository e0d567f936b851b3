"""The last hook, as a module: what its steps promise beside what the command line shows."""

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from repository import REPOSITORY, load_hook

ANSWERS = {"project_name": "Todo Backend", "project_slug": "todo-backend", "database": "local"}


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook, at work in a folder that holds what it reads."""
    example = REPOSITORY / "{{cookiecutter.project_slug}}" / ".env.example"
    (tmp_path / ".env.example").write_bytes(example.read_bytes())
    monkeypatch.chdir(tmp_path)
    return load_hook("post_gen_project")


def test_nothing_is_done_where_cruft_renders_in_passing(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passing = tmp_path / "tmp1234abcd" / "todo-backend"
    passing.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(passing)

    hook.main(ANSWERS)

    assert list(passing.iterdir()) == []


@pytest.mark.parametrize("name", ["mine", "tmp.5Sp97ueuu5", "tmp-of-mine"])
def test_a_folder_of_ones_own_in_the_temp_folder_is_not_taken_for_that(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    own = tmp_path / name / "todo-backend"
    own.mkdir(parents=True)
    (own / ".env.example").write_bytes(Path(".env.example").read_bytes())
    taken: list[dict[str, str]] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(hook, "take_all", lambda to_do, _answers: taken.append(to_do))
    monkeypatch.chdir(own)

    hook.main(ANSWERS)

    assert [*taken[0]] == [*hook.COMMANDS]


def test_a_commit_of_somebody_elses_is_not_to_be_amended(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hook, "take_all", lambda to_do, _answers: to_do.clear())
    hook.run("git", "init", "--quiet")
    hook.main(ANSWERS)
    ours = capsys.readouterr().out
    name = ("-c", "user.name=Ada", "-c", "user.email=ada@example.com")
    hook.run("git", *name, "commit", "--quiet", "--allow-empty", "--message", "Theirs")

    hook.main(ANSWERS)

    assert hook.AFTER_CRUFT in ours
    assert "--amend" not in capsys.readouterr().out


def test_a_command_that_takes_too_long_is_stopped(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "LONGEST", 0.5)

    with pytest.raises(hook.StepFailed, match="too long"):
        hook.run(
            *(sys.executable, "-c"),
            "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)",
        )

    assert not psutil.pid_exists(int(Path("pid").read_text("utf-8")))


def test_a_daemon_that_keeps_the_output_open_is_not_waited_for(hook: ModuleType) -> None:
    start = time.monotonic()

    hook.run("sh", "-c", "sleep 5 & echo started")

    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    "name",
    [
        "APP_NAME",
        "DATABASE_URL",
        "FORCE_COLOR",
        "NEON_DATABASE_URL",
        "PORT",
        "PYENV_VERSION",
        "PYTHONPATH",
        "VIRTUAL_ENV",
    ],
)
def test_a_step_sees_no_setting_of_another_program(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "other")

    assert name not in hook.environment()


def test_a_step_sees_the_rest_of_the_environment(hook: ModuleType) -> None:
    assert hook.environment()["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "error: No interpreter found for Python >=3.14 in search path",
            "the Python of .python-version is not installed, and uv could not download it",
        ),
        (
            "cause: Failed to download `https://…/python-build-standalone/…`\ncause: dns error",
            "the Python of .python-version is not installed, and uv could not download it",
        ),
        (
            "cause: error sending request for url (https://…)",
            "the package index cannot be reached",
        ),
        (
            "hint: Packages were unavailable because the network was disabled.",
            "the package index cannot be reached",
        ),
        (
            "Network connectivity is disabled, but the requested data wasn't found in the cache",
            "the package index cannot be reached",
        ),
        ("cause: No space left on device (os error 28)", "the disk is full"),
    ],
)
def test_words_of_uv_are_told_in_one_line(hook: ModuleType, output: str, reason: str) -> None:
    assert hook.reason(output) == reason


def test_what_has_no_meaning_yet_is_passed_on_as_it_ends(hook: ModuleType) -> None:
    output = "\n".join(f"line {number}" for number in range(9))

    assert hook.reason(output).split("\n    ") == [f"line {number}" for number in range(3, 9)]


def test_what_the_check_found_is_told_without_the_steps_that_passed(hook: ModuleType) -> None:
    output = """\
✓ settings  complete; DATABASE_URL comes from .env
✓ TCP       203.0.113.7:5432 answers after 21 ms
  waiting for the database, 1 s so far
✗ log-in    the plan's compute time is used up
          → wait for the next month
            error: ERROR: Your account or project has exceeded the compute time quota.
- not reached: database, endpoint, schema
"""

    assert hook.reason(output).split("\n    ") == [
        "log-in the plan's compute time is used up",
        "→ wait for the next month",
        "error: ERROR: Your account or project has exceeded the compute time quota.",
    ]


def test_a_full_disk_of_the_server_is_not_taken_for_one_of_this_machine(hook: ModuleType) -> None:
    output = "✗ 203.0.113.7:5432: the server's disk is full\n  error: No space left on device"

    assert hook.reason(output).startswith("203.0.113.7:5432: the server's disk")


def test_commands_of_one_process_are_told_one_after_the_other(hook: ModuleType) -> None:
    script = f"print('one', {hook.DONE!r}); print('✗ two: is broken'); raise SystemExit(1)"
    turns = hook.run_in_turn(sys.executable, "-X", "utf8", "-c", script)

    next(turns)

    with pytest.raises(hook.StepFailed, match=r"^two: is broken$"):
        next(turns)


def test_a_process_that_nobody_waits_for_any_more_is_ended(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "PATIENCE", 0.1)
    script = f"import os, time; print(os.getpid(), file=open('pid', 'w')); print({hook.DONE!r})"
    turns = hook.run_in_turn(sys.executable, "-u", "-c", f"{script}; time.sleep(60)")
    next(turns)
    process = psutil.Process(int(Path("pid").read_text("utf-8")))

    turns.close()

    process.wait(10)
    assert not process.is_running()


def test_packages_that_were_cut_short_are_installed_anew(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv would take half a package for a whole one."""
    package = Path(".venv", "half a package")
    package.mkdir(parents=True)
    Path(".venv.unfinished").touch()
    monkeypatch.setattr(hook, "run", lambda *_command: Path(".venv").mkdir())

    hook.install()

    assert Path(".venv").is_dir()
    assert not package.exists()
    assert not Path(".venv.unfinished").exists()


def test_packages_that_are_cut_short_now_are_taken_away(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_command: str) -> None:
        Path(".venv", "half a package").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(hook, "run", fail)

    with pytest.raises(KeyboardInterrupt):
        hook.install()

    assert not Path(".venv").exists()


def test_packages_that_were_there_stay_however_often_their_update_fails(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever installed them: this hook, or its user by hand."""
    package = Path(".venv", "package")
    package.mkdir(parents=True)

    def fail(*_command: str) -> None:
        raise hook.StepFailed("no network")

    monkeypatch.setattr(hook, "run", fail)
    for _ in range(2):
        with pytest.raises(hook.StepFailed, match="no network"):
            hook.install()

    assert package.exists()


def test_a_program_that_cannot_start_or_answer_is_no_error(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "uv"
    program.write_bytes(b"\x7fELF of another machine")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert hook.ask(str(program), "--version") is None
    assert not hook.finds_uv()


def test_a_repository_that_git_does_not_open_is_left_alone(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook.run("git", "init", "--quiet")
    lock = Path(".git", "index.lock")
    lock.touch()
    assert hook.is_unborn()
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text("#!/bin/sh\necho dubious ownership >&2\nexit 128\n", "utf-8")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}{os.pathsep}{os.environ['PATH']}")

    note = hook.commit()

    assert note == "left out, the folder is a repository already"
    assert lock.exists()


@pytest.mark.parametrize(
    ("embedded", "names"), [(True, {"PORT"}), (False, {"PGOPTIONS", "PGSERVICE", "PORT"})]
)
def test_what_another_server_is_told_by_is_to_be_unset_where_the_project_does_not_drop_it(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, *, embedded: bool, names: set[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    for name in ("PGOPTIONS", "PGSERVICE", "PORT"):
        monkeypatch.setenv(name, "other")

    way = dict(hook.find_way(embedded=embedded))

    assert way[f"unset {' '.join(sorted(names))}"] == hook.FOREIGN
    assert {"PGOPTIONS", "PGSERVICE", "PORT"}.isdisjoint(hook.environment())


def test_the_way_into_a_folder_of_any_name_can_be_typed(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd = tmp_path / "O'Brien$x `id`"
    odd.mkdir()
    (odd / ".env.example").write_bytes(Path(".env.example").read_bytes())
    monkeypatch.chdir(odd)
    monkeypatch.delenv("PWD", raising=False)

    command, _reason = hook.find_way(embedded=True)[0]

    assert hook.ask("sh", "-c", f"cd / && {command} && pwd") == str(odd)


def test_a_placeholder_in_env_is_replaced_by_the_next_try(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(hook.Path, "cwd", lambda: REPOSITORY / "{{cookiecutter.project_slug}}")
    monkeypatch.delenv("NEON_DATABASE_URL", raising=False)
    answers = ANSWERS | {"database": "neon"}
    for _ in range(2):
        with pytest.raises(hook.StepFailed, match="placeholder"):
            hook.write_env(answers)
    (secret,) = re.findall(
        "^BETTER_AUTH_SECRET=.{20}", Path(".env").read_text("utf-8"), re.MULTILINE
    )
    monkeypatch.setenv("NEON_DATABASE_URL", "postgresql://me:pw@db.example.com/todo")

    assert hook.write_env(answers) is None

    text = Path(".env").read_text("utf-8")
    assert "postgresql://me:pw@db.example.com:5432/todo" in text
    assert secret in text
    assert hook.write_env(answers) == "there is a .env already, and it stays"


def test_a_first_commit_that_was_killed_is_made_by_the_next_try(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"):
        monkeypatch.setenv(name, "Ada")
    for name in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "ada@example.com")
    hook.run("git", "init", "--quiet")
    Path(".git", "index.lock").touch()

    assert hook.commit() is None

    assert hook.succeeds("git", "rev-parse", "--verify", "HEAD")
    assert hook.commit() == "left out, the folder is a repository already"
