"""Life after generation: updates from the template with cruft, and other ways to generate."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from machine import COOKIECUTTER, UV, Machine, Outcome, Project, new_machine, run

CRUFT = (sys.executable, "-m", "cruft")
# Changes to lines of pyproject.toml: one in the template, and two by the user, elsewhere in that
# file and in the same line.
NEWS = ('version = "0.1.0"', 'version = "0.2.0"')
BESIDE = ("line-length = 100", "line-length = 90")
ACROSS = ('version = "0.1.0"', 'version = "1.0.0"')


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Ada", "-c", "user.email=ada@example.com")
    return subprocess.run(
        ["git", *identity, *arguments], check=True, cwd=folder, capture_output=True, text=True
    ).stdout


def change(folder: Path, words: tuple[str, str]) -> None:
    """Change pyproject.toml in a folder, and commit the change."""
    path = folder / "pyproject.toml"
    text = path.read_text("utf-8")
    assert words[0] in text
    path.write_text(text.replace(*words), "utf-8")
    git(folder, "commit", "--quiet", "--all", "--message", f"Write {words[1]}")


@dataclass(frozen=True)
class Linked:
    """A project that cruft created from a repository. uv logs its arguments to `notes`."""

    template: Path
    project: Project
    creation: Outcome
    notes: Path

    def cruft(self, *arguments: str) -> Outcome:
        return run([*CRUFT, *arguments], self.project, seconds=60)

    def change_template(self) -> None:
        change(self.template / "{{cookiecutter.project_slug}}", NEWS)

    def asked_of_uv(self) -> list[str]:
        asked = self.notes.read_text("utf-8").splitlines()
        return [words for words in asked if words != "--version"]  # every hook runs that


@pytest.fixture(scope="module")
def created(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Linked]:
    """The result of `cruft create`."""
    root = tmp_path_factory.mktemp("life")
    published = Path(shutil.copytree(template, root / "template"))
    git(published, "init", "--quiet")
    git(published, "add", "--all")
    git(published, "commit", "--quiet", "--message", "The template")
    with new_machine(root / "machine", published) as machine:
        notes = root / "notes"
        recorder = machine.fake_uv(f'echo "$*" >> "{notes}"; exec "$UV" "$@"')
        project = machine.project(UV=recorder)
        command = [*CRUFT, "create", str(published), "--no-input"]
        creation = run(command, project, folder=machine.work, seconds=120)
        assert creation.code == 0, creation.output
        yield Linked(published, project, creation, notes)


@pytest.fixture
def linked(created: Linked, tmp_path: Path) -> Linked:
    """A copy of template and project, committed as the output says."""
    template = shutil.copytree(created.template, tmp_path / "template")
    installed = shutil.ignore_patterns(".venv", ".postgres")
    path = shutil.copytree(created.project.path, tmp_path / "todo-backend", ignore=installed)
    state = json.loads((path / ".cruft.json").read_text("utf-8"))
    (path / ".cruft.json").write_text(json.dumps(state | {"template": str(template)}), "utf-8")
    git(path, "init", "--quiet")
    git(path, "add", "--all")
    git(path, "commit", "--quiet", "--message", "First commit")
    return replace(created, template=template, project=replace(created.project, path=path))


def test_cruft_create_sets_up_a_new_project(created: Linked) -> None:
    assert "run manage.py setup --local" in created.asked_of_uv()
    assert "✓ connection" in created.creation.output
    assert (created.project.path / ".env").exists()


def test_the_output_says_how_to_commit_the_file_that_cruft_writes_last(
    created: Linked, tmp_path: Path
) -> None:
    installed = shutil.ignore_patterns(".venv", ".postgres")
    path = shutil.copytree(created.project.path, tmp_path / "copy", ignore=installed)
    project = replace(created.project, path=path)
    (command,) = re.findall(r"^    (git init .*)$", created.creation.output, re.MULTILINE)

    outcome = project.run("sh", "-c", command)

    assert outcome.code == 0, outcome.output
    assert project.git("status", "--porcelain") == ""
    assert ".cruft.json" in project.git("ls-files")


def test_the_answers_stored_by_cruft_contain_no_secret(created: Linked) -> None:
    settings = dict(re.findall(r"^(\w+)=(.*)$", created.project.read(".env"), re.MULTILINE))
    password = re.search(r":([^:@]+)@", settings["DATABASE_URL"])
    assert password is not None

    remembered = created.project.read(".cruft.json")

    assert settings["BETTER_AUTH_SECRET"] not in remembered
    assert password[1] not in remembered


def test_cruft_check_reports_whether_the_template_changed(linked: Linked) -> None:
    before = linked.cruft("check")

    linked.change_template()
    after = linked.cruft("check")

    assert (before.code, after.code) == (0, 1)


def test_a_new_project_does_not_differ_from_its_template(linked: Linked) -> None:
    outcome = linked.cruft("diff", "--exit-code")

    assert (outcome.code, outcome.output) == (0, "")


def test_an_update_is_merged_with_the_users_changes(linked: Linked) -> None:
    change(linked.project.path, BESIDE)
    linked.change_template()

    outcome = linked.cruft("update", "--skip-apply-ask")

    assert outcome.code == 0, outcome.output
    text = linked.project.read("pyproject.toml")
    assert NEWS[1] in text
    assert BESIDE[1] in text
    assert linked.cruft("check").code == 0


def test_an_update_that_collides_with_the_users_changes_is_shown_as_a_conflict(
    linked: Linked,
) -> None:
    change(linked.project.path, ACROSS)
    linked.change_template()

    linked.cruft("update", "--skip-apply-ask")

    text = linked.project.read("pyproject.toml")
    assert re.search(rf"<<<<<<< .*\n{ACROSS[1]}\n=======\n{NEWS[1]}\n>>>>>>> ", text)
    assert "UU pyproject.toml" in linked.project.git("status", "--porcelain")


def test_an_update_does_not_run_the_setup(linked: Linked) -> None:
    linked.change_template()
    temp = Path(linked.project.environment["TMPDIR"])
    before = linked.project.read(".env"), linked.asked_of_uv(), sorted(temp.iterdir())
    head = linked.project.git("rev-parse", "HEAD")

    outcome = linked.cruft("update", "--skip-apply-ask")

    assert "settings" not in outcome.output
    assert (linked.project.read(".env"), linked.asked_of_uv(), sorted(temp.iterdir())) == before
    assert linked.project.git("rev-parse", "HEAD") == head
    changed = linked.project.git("status", "--porcelain").splitlines()
    assert [line[3:] for line in changed] == [".cruft.json", "pyproject.toml"]


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return mode and content of each file in a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def rendered(
    bare_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[int, bytes]]]:
    """The files that the installed Cookiecutter renders, without setup."""
    with new_machine(tmp_path_factory.mktemp("rendered") / "machine", bare_template) as machine:
        outcome = machine.generate(program=COOKIECUTTER)
        assert outcome.code == 0, outcome.output
        yield tree(outcome.project.path)


@pytest.mark.parametrize(
    "program",
    [
        ("--from", "cookiecutter==2.6.0", "cookiecutter"),  # the oldest supported version
        ("cookiecutter@latest",),
        ("pipx", "run", "cookiecutter"),
    ],
    ids=["oldest", "newest", "pipx"],
)
def test_every_cookiecutter_version_renders_the_same(
    program: tuple[str, ...],
    rendered: dict[str, tuple[int, bytes]],
    machine: Machine,
    bare_template: Path,
) -> None:
    machine.template = bare_template
    command = (UV, "tool", "run", *program)
    there = run([*command, "--version"], machine.project(), folder=machine.work, seconds=120)
    if re.search("error sending request|dns error|network|NewConnectionError", there.output):
        pytest.skip("the package registry cannot be reached")
    assert there.code == 0, there.output

    outcome = machine.generate(program=command)

    assert outcome.code == 0, outcome.output
    assert tree(outcome.project.path) == rendered
