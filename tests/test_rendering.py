"""Rendered files are well-formed, whatever the answers."""

import hashlib
import re
import stat
import tomllib
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from urllib.parse import unquote

import pytest
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename
from pytest_cookies.plugin import Cookies

from machine import Machine, Project
from readings import files, lint
from test_failures import python_is_installed

PYTHONS = ["3.13", "3.14"]
DATABASES = ["local", "neon"]

Bake = Callable[..., Path]
Tree = dict[str, tuple[int, bytes]]  # mode and content of each file


@pytest.fixture(scope="module")
def bake(cookies_session: Cookies, bare_template: Path) -> Bake:
    """Render a project with some answers."""

    def bake(**answers: str) -> Path:
        result = cookies_session.bake(extra_context=answers, template=str(bare_template))
        assert result.exception is None
        path: Path = result.project_path
        return path

    return bake


@pytest.fixture(scope="module", params=product(PYTHONS, DATABASES), ids="-".join)
def answers(request: pytest.FixtureRequest) -> dict[str, str]:
    """Every combination of choices."""
    return dict(zip(("python_version", "database"), request.param, strict=True))


@pytest.fixture(scope="module")
def path(answers: dict[str, str], bake: Bake) -> Path:
    """A project for every combination."""
    return bake(**answers)


def tree(path: Path) -> Tree:
    return {
        name: (stat.S_IMODE((path / name).stat().st_mode), (path / name).read_bytes())
        for name in files(path)
    }


def texts(path: Path) -> Iterable[tuple[str, str]]:
    """Return the names and texts of all files."""
    names = list(files(path))
    assert len(names) > 20
    return [(name, (path / name).read_bytes().decode("utf-8")) for name in names]


def test_no_jinja_is_left(path: Path) -> None:
    # ${{ … }} is GitHub's. Python files are copied unchanged, and may contain braces.
    jinja = re.compile(r"\{%|\{#|(?<!\$)\{\{")

    assert [
        name
        for name, text in texts(path)
        if "cookiecutter" in text or (not name.endswith((".py", ".mako")) and jinja.search(text))
    ] == []


def test_no_line_ends_with_whitespace(path: Path) -> None:
    assert [name for name, text in texts(path) if re.search(r"[^\S\n]$", text, re.MULTILINE)] == []


def test_every_file_ends_with_one_newline(path: Path) -> None:
    assert [name for name, text in texts(path) if text and not re.search(r"\S\n\Z", text)] == []


def test_no_blank_lines_are_doubled(path: Path) -> None:
    def is_doubled(name: str, text: str) -> bool:
        if name.endswith((".py", ".py.mako")):
            return "\n\n\n\n" in text  # PEP 8 wants two
        blocks_of_code = re.compile(r"(?ms)^( *)```.*?^\1```$")
        return "\n\n\n" in blocks_of_code.sub("code", text)

    assert [name for name, text in texts(path) if is_doubled(name, text)] == []


def test_no_file_starts_with_a_blank_line(path: Path) -> None:
    assert [name for name, text in texts(path) if text.startswith("\n")] == []


def test_the_project_uses_the_chosen_python_version(answers: dict[str, str], path: Path) -> None:
    version = answers["python_version"]
    pyproject = tomllib.loads((path / "pyproject.toml").read_text("utf-8"))

    assert (path / ".python-version").read_text("utf-8") == f"{version}\n"
    assert pyproject["project"]["requires-python"] == f">={version}"


def test_rendering_is_reproducible(answers: dict[str, str], path: Path, bake: Bake) -> None:
    assert tree(bake(**answers)) == tree(path)


# So checking one project is enough. The choice of database affects only .env.
@pytest.mark.parametrize("python", PYTHONS)
def test_the_database_changes_no_file(bake: Bake, python: str) -> None:
    local, neon = (tree(bake(python_version=python, database=each)) for each in DATABASES)

    assert local == neon


def test_the_python_version_changes_only_version_numbers(bake: Bake) -> None:
    old, new = (tree(bake(python_version=python)) for python in PYTHONS)

    assert old != new
    image = re.compile(rb"(?<=FROM python:)3\.\d+\.\d+(.*)@sha256:\w+")
    assert {
        name: (mode, image.sub(rb"\1", re.sub(rb"\b(py)?3(\.?)14\b", rb"\g<1>3\g<2>13", content)))
        for name, (mode, content) in new.items()
    } == {name: (mode, image.sub(rb"\1", content)) for name, (mode, content) in old.items()}


def test_the_first_commit_contains_the_rendered_files_and_the_lock_file(
    project: Project, bake: Bake
) -> None:
    listed = (line.split() for line in project.git("ls-tree", "-r", "HEAD").splitlines())
    committed = {name: blob for _mode, _type, blob, name in listed}

    assert set(committed) - {"uv.lock"} == set(rendered := tree(bake()))
    assert [name for name in rendered if committed[name] != git_id(rendered[name][1])] == []


def git_id(content: bytes) -> str:
    """Return git's object id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


# Checks for another Python version that do not need it installed


@pytest.mark.parametrize("python", PYTHONS)
def test_ruff_passes_for_every_python_version(bake: Bake, python: str) -> None:
    assert lint(bake(python_version=python)) == ""


def test_every_package_has_a_wheel_for_the_newest_python(project: Project) -> None:
    version = [int(part) for part in PYTHONS[-1].split(".")]
    abi = [f"cp{version[0]}{version[1]}"]
    tags = [*cpython_tags(version, abi, ["any"]), *compatible_tags(version, abi[0], ["any"])]
    fitting = {(tag.interpreter, tag.abi) for tag in tags}
    packages = tomllib.loads(project.read("uv.lock"))["package"]

    without = [
        package["name"]
        for package in packages
        if "registry" in package["source"]
        and not any(
            (tag.interpreter, tag.abi) in fitting
            and re.fullmatch(r"any|manylinux.*_x86_64", tag.platform)
            for wheel in package["wheels"]
            for tag in parse_wheel_filename(unquote(wheel["url"].rpartition("/")[2]))[3]
        )
    ]

    assert len(packages) > 50
    assert without == []


@pytest.mark.timeout(720)
@pytest.mark.skipif(not python_is_installed(PYTHONS[-1]), reason="no Python 3.14 is installed here")
def test_a_project_on_the_newest_python_passes_its_checks(machine: Machine) -> None:
    outcome = machine.generate(f"python_version={PYTHONS[-1]}")

    assert "It is ready." in outcome.output
    for command in ("ruff check", "ruff format --check", "mypy .", "pytest --quiet"):
        checked = outcome.project.run("uv", "run", *command.split(), seconds=600)
        assert checked.code == 0, checked.output
