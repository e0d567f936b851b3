"""Unit tests of the post_gen_project hook, for what does not show on the command line."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from repository import REPOSITORY, load_hook

ANSWERS = {"project_name": "Todo Backend", "project_slug": "todo-backend", "database": "local"}


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook, in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the hook removes variables from it
    return load_hook("post_gen_project")


@pytest.fixture
def taken(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that ran, with each replaced by a stub."""
    taken: list[str] = []
    for name in ("install", "run", "commit"):
        monkeypatch.setattr(hook, name, lambda *_, name=name, **_options: taken.append(name))
    return taken


def test_the_hook_is_short() -> None:
    hook = REPOSITORY / "hooks" / "post_gen_project.py"

    assert len(hook.read_text("utf-8").splitlines()) <= 130


def test_the_hook_does_nothing_when_cruft_renders_to_compare(
    hook: ModuleType, taken: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passing = tmp_path / "tmp1234abcd" / "todo-backend"
    passing.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(passing)

    hook.main(ANSWERS)

    assert taken == []


@pytest.mark.parametrize("name", ["mine", "tmp.5Sp97ueuu5", "tmp-of-mine"])
def test_a_project_in_the_users_own_temporary_folder_is_set_up(
    hook: ModuleType,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
) -> None:
    own = tmp_path / name / "todo-backend"
    own.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(own)

    hook.main(ANSWERS)

    assert taken == ["install", "run"]


def test_a_command_that_takes_too_long_is_stopped(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = subprocess.Popen.wait

    def wait_less(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        return wait(process, timeout and timeout / 600)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_less)
    script = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"

    with pytest.raises(subprocess.TimeoutExpired):
        hook.run(sys.executable, "-c", script)

    assert not psutil.pid_exists(int(Path("pid").read_text("utf-8")))


@pytest.fixture
def sync(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    """A uv that fails while installing packages."""

    def fail(*_command: str) -> None:
        Path(".venv", "half a package").mkdir(parents=True)
        raise subprocess.SubprocessError

    monkeypatch.setattr(hook, "run", fail)
    return subprocess.SubprocessError


def test_an_interrupted_installation_starts_again_from_scratch(
    hook: ModuleType, sync: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv would accept a half-installed package."""
    with pytest.raises(sync):
        hook.install()
    assert Path(".venv", "half a package").exists()
    monkeypatch.setattr(hook, "run", lambda *_command: Path(".venv").mkdir())

    hook.install()

    assert list(Path(".venv").iterdir()) == []
    assert not Path(".venv.unfinished").exists()


def test_installed_packages_are_kept_however_often_an_update_fails(
    hook: ModuleType, sync: type[Exception]
) -> None:
    """It does not matter who installed them: the hook, or the user by hand."""
    package = Path(".venv", "package")
    package.mkdir(parents=True)

    with pytest.raises(sync):
        hook.install()
    Path(".venv", "half a package").rmdir()
    with pytest.raises(sync):
        hook.install()

    assert package.exists()


def test_a_program_that_cannot_start_is_not_an_error(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "uv"
    program.write_bytes(b"\x7fELF of another machine")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert hook.ask(str(program), "--version") is None
    assert hook.find_way({})[-1] == "python3 -m pip install uv"


def test_a_repository_that_git_cannot_open_is_left_unchanged(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook.run("git", "init", "--quiet")
    lock = Path(".git", "index.lock")
    lock.touch()
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text("#!/bin/sh\necho dubious ownership >&2\nexit 128\n", "utf-8")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}{os.pathsep}{os.environ['PATH']}")

    note = hook.commit()

    assert note == "the folder is already a repository"
    assert lock.exists()


def test_the_cd_command_works_for_any_folder_name(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd = tmp_path / "O'Brien$x `id`"
    odd.mkdir()
    monkeypatch.chdir(odd)

    command = hook.find_way({})[0]

    assert hook.ask("sh", "-c", f"cd / && {command} && pwd") == str(odd)


@pytest.mark.parametrize("line", load_hook("post_gen_project").NO_IDENTITY.splitlines()[1:])
def test_the_commands_that_set_an_identity_fail_if_pasted_unchanged(
    line: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": str(tmp_path / "mine")}

    done = subprocess.run(["sh", "-c", line], check=False, env=environment, capture_output=True)

    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_a_first_commit_that_was_killed_is_made_by_the_next_attempt(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"):
        monkeypatch.setenv(name, "Ada")
    for name in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "ada@example.com")
    Path("file").touch()
    hook.run("git", "init", "--quiet")
    Path(".git", "index.lock").touch()

    assert hook.commit() is None

    assert hook.ask("git", "rev-parse", "--verify", "HEAD")
    assert hook.commit() == "the folder is already a repository"
