"""Variables of the user's shell: which ones the hook's steps inherit, and what those can do.

test_surroundings.py generates a project with all of those that no step inherits.
"""

import os
import re
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from machine import UV, ask_uv
from repository import load_hook
from variables import DROPPED, INHERITED_BY_GIT, INHERITED_BY_UV, NAMED

ANSWERS = {"project_name": "Todo Backend", "project_slug": "todo", "database": "local"}


def write_project(folder: Path, *dependencies: str, index: str = "") -> None:
    lines = ["[project]", 'name = "todo"', 'version = "1"', 'requires-python = ">=3.11"']
    lines.append(f"dependencies = {list(dependencies)}")
    lines += ["[[tool.uv.index]]", f'url = "{index}"', "default = true"] if index else []
    (folder / "pyproject.toml").write_text("\n".join(lines), "utf-8")


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook, in the folder of a small project."""
    folder = tmp_path / "work" / "todo"
    folder.mkdir(parents=True)
    write_project(folder)
    home = tmp_path / "home"
    home.mkdir()
    identity = "[user]\n\tname = Ada\n\temail = ada@example.com\n"
    (home / ".gitconfig").write_text(identity, "utf-8")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "UV": UV,
        "UV_CACHE_DIR": ask_uv("cache", "dir"),
        "UV_PYTHON_INSTALL_DIR": ask_uv("python", "dir"),
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.chdir(folder)
    return load_hook("post_gen_project")


@pytest.fixture
def index(tmp_path: Path) -> str:
    """The URL of an index with one package, `tiny`."""
    folder = tmp_path / "index" / "tiny"
    folder.mkdir(parents=True)
    wheel, metadata = "tiny-1-py3-none-any.whl", "Metadata-Version: 2.1\nName: tiny\nVersion: 1"
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        archive.writestr("tiny-1.dist-info/METADATA", metadata)
        archive.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr("tiny-1.dist-info/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>', "utf-8")
    return folder.parent.as_uri()


def names_of_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_step_inherits_only_variables_that_cannot_lead_it_astray(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    inherited = INHERITED_BY_GIT.keys() | INHERITED_BY_UV.keys()
    for name in DROPPED | NAMED | inherited:
        monkeypatch.setitem(os.environ, name, "other")
    monkeypatch.setattr(hook, "install", lambda: hook.run("/bin/sh", "-c", "/usr/bin/env > seen"))
    monkeypatch.setattr(hook, "commit", lambda: "none")
    monkeypatch.setattr(hook, "run", lambda *command, run=hook.run, **_: run(*command[-3:]))

    hook.main(ANSWERS)

    seen = dict(line.split("=", 1) for line in Path("seen").read_text("utf-8").splitlines())
    assert {name for name, value in seen.items() if value == "other"} == inherited
    assert {*re.findall(r"^    unset (\w+)$", capfd.readouterr().out, re.MULTILINE)} == NAMED


def test_a_variable_of_git_and_uv_that_is_in_no_table_is_not_inherited(
    hook: ModuleType,
) -> None:
    pages = [ask_uv("help", page) for page in ("run", "sync", "lock", "venv")]
    documented = {*re.findall(r"env: (UV_\w+)", "".join(pages))}
    documented |= {*hook.ask("git", "rev-parse", "--local-env-vars").split()}
    assert len(documented) > 50

    kept = {name for name in documented if not hook.HIDDEN.match(name)}

    assert kept <= INHERITED_BY_UV.keys()


@pytest.fixture
def needs_tiny(hook: ModuleType, index: str) -> None:  # noqa: ARG001  (the hook's folder)
    """The project needs the package of the index, which it names."""
    write_project(Path(), "tiny", index=index)


@pytest.mark.usefixtures("needs_tiny")
@pytest.mark.parametrize("variable", INHERITED_BY_UV.items())
def test_an_inherited_variable_of_uv_leaves_the_project_right_or_is_reported(
    hook: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    variable: tuple[str, str],
) -> None:
    name, value = variable
    monkeypatch.setitem(os.environ, name, value)
    around = names_of_files(tmp_path / "home")

    try:
        hook.install()
    except hook.subprocess.SubprocessError:
        output = capfd.readouterr().err
        assert value in output or name in output
    else:
        assert len([*Path(".venv").rglob("tiny-1.dist-info")]) == 1
        assert 'name = "tiny"' in Path("uv.lock").read_text("utf-8")
    assert names_of_files(tmp_path / "home") == around
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["todo"]


@pytest.mark.parametrize("variable", INHERITED_BY_GIT.items())
def test_an_inherited_variable_of_git_leaves_the_commit_right_or_is_reported(
    hook: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    variable: tuple[str, str],
) -> None:
    name, value = variable
    monkeypatch.setitem(os.environ, name, value)
    around = names_of_files(tmp_path / "home")

    try:
        note = hook.commit()
    except hook.subprocess.SubprocessError as error:
        told = capfd.readouterr().err or str(error)
        assert re.search(f"{name}|ident|who you are", told)
    else:
        assert note is None
        monkeypatch.delitem(os.environ, name)
        assert hook.ask("git", "ls-tree", "--name-only", "HEAD") == "pyproject.toml"
    assert names_of_files(tmp_path / "home") == around


def test_an_error_of_git_is_not_taken_for_a_missing_name(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("config").write_text("no configuration", "utf-8")
    monkeypatch.setitem(os.environ, "GIT_CONFIG_GLOBAL", str(Path("config").absolute()))

    with pytest.raises(hook.subprocess.SubprocessError, match="see above"):
        hook.commit()

    assert "bad config line 1" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_INDEX"])
def test_a_lock_file_with_another_index_is_reported(
    hook: ModuleType,
    index: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    write_project(Path(), "tiny")
    monkeypatch.setitem(os.environ, name, index)

    hook.install()

    assert f"! uv.lock follows your uv.toml or {name}: " in capfd.readouterr().out


def test_a_lock_file_with_the_index_of_a_uv_toml_is_reported(
    hook: ModuleType, index: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_project(Path(), "tiny")
    settings = Path.home() / ".config" / "uv" / "uv.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text(f'[[index]]\nurl = "{index}"\ndefault = true\n', "utf-8")

    hook.install()

    assert "! uv.lock follows your uv.toml: " in capfd.readouterr().out


def test_an_index_that_no_package_comes_from_is_not_reported(
    hook: ModuleType,
    index: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(os.environ, "UV_DEFAULT_INDEX", index)

    hook.install()

    assert "!" not in capfd.readouterr().out
