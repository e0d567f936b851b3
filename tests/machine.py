"""A machine of its own for a test: home, temp and work folder, environment, and what runs on it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pexpect
import psutil

UV = os.environ.get("UV") or shutil.which("uv") or "uv"
UVX = "uvx"
COOKIECUTTER = (sys.executable, "-m", "cookiecutter")  # of these tests: it needs no uv to start
# What a program of the machine may know of the one that these tests run on.
PASSED_ON = {"LANG", "LC_ALL", "PYENV_ROOT", "SYSTEMROOT", "TZ", "HTTP_PROXY", "HTTPS_PROXY"}
PASSED_ON |= {"NO_PROXY", "SSL_CERT_DIR", "SSL_CERT_FILE", "UV_DEFAULT_INDEX", "UV_INDEX"}


def ask_uv(*question: str) -> str:
    done = subprocess.run([UV, *question], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def usual_path() -> list[str]:
    """Return the PATH as a terminal has it, without what `uv run` and pyenv put before it."""
    versions = Path(os.environ.get("PYENV_ROOT", os.devnull), "versions")
    return [
        entry
        for entry in os.get_exec_path()
        if Path(entry) != Path(sys.executable).parent and versions not in Path(entry).parents
    ]


@dataclass(frozen=True)
class Project:
    """A generated project, and the environment in which its user types commands."""

    path: Path
    environment: dict[str, str] = field(repr=False)

    @property
    def python(self) -> Path:
        folder = "Scripts" if os.name == "nt" else "bin"
        return self.path / ".venv" / folder / "python"

    @property
    def data(self) -> Path:
        """The embedded PostgreSQL's data."""
        return self.path / ".postgres" / "data"

    def run(self, *command: str, seconds: float = 120) -> "Outcome":
        """Run a command in the project. `uv` is the real one: shims may hide it."""
        return run([UV if command[0] == "uv" else command[0], *command[1:]], self, seconds=seconds)

    def git(self, *arguments: str) -> str:
        outcome = self.run("git", *arguments)
        assert outcome.code == 0, outcome.output
        return outcome.output

    def read(self, name: str) -> str:
        return (self.path / name).read_text("utf-8")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    output: str
    project: Project


def run(
    command: list[str], project: Project, *, folder: Path | None = None, seconds: float
) -> Outcome:
    """Run a command in the project, or in another folder, with nothing on its standard input."""
    done = subprocess.run(
        command,
        check=False,
        cwd=folder or project.path,
        env=project.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=seconds,
    )
    return Outcome(done.returncode, done.stdout, project)


@dataclass
class Machine:
    """A machine where nothing was generated yet. Its packages' cache is the real one, and warm."""

    root: Path
    template: Path
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    terminals: list["pexpect.spawn[str]"] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for folder in (self.home, self.temp, self.work):
            folder.mkdir(parents=True)
        identity = "[user]\n\tname = Ada\n\temail = ada@example.com\n"
        (self.home / ".gitconfig").write_text(identity, "utf-8")
        self.environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self.environment |= {
            "PATH": os.pathsep.join(usual_path()),
            "HOME": str(self.home),
            "USERPROFILE": str(self.home),
            "PWD": str(self.work),
            "TERM": "xterm",
            "TMPDIR": str(self.temp),
            "UV": UV,
            "UV_CACHE_DIR": ask_uv("cache", "dir"),
            "UV_PYTHON_INSTALL_DIR": ask_uv("python", "dir"),
            "GIT_CONFIG_NOSYSTEM": "1",
        }

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def temp(self) -> Path:
        return self.root / "temp"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def go_offline(self) -> None:
        """Take network and cache away: `uv sync` fails at once."""
        self.environment |= {"UV_OFFLINE": "1", "UV_CACHE_DIR": str(self.root / "empty")}

    def project(self, slug: str = "todo-backend", /, **variables: str | None) -> Project:
        """Return the project of that name, there or not. None takes a variable away."""
        environment = {**self.environment, **variables}
        known = {name: value for name, value in environment.items() if value is not None}
        return Project(self.work / slug, known)

    def generate(
        self,
        *arguments: str,
        slug: str = "todo-backend",
        program: tuple[str, ...] = COOKIECUTTER,
        seconds: float = 120,
        **variables: str | None,
    ) -> Outcome:
        """Generate a project without questions. slug: the folder that it will have."""
        command = [*program, str(self.template), "--no-input", *arguments]
        return run(command, self.project(slug, **variables), folder=self.work, seconds=seconds)

    def type(self, *arguments: str, **variables: str | None) -> "pexpect.spawn[str]":
        """Generate a project on a terminal, where a test can type."""
        terminal = pexpect.spawn(
            COOKIECUTTER[0],
            [*COOKIECUTTER[1:], str(self.template), *arguments],
            cwd=self.work,
            env=self.project(**variables).environment,
            encoding="utf-8",
            timeout=60,
            dimensions=(50, 200),
        )
        self.terminals.append(terminal)
        return terminal

    def path_without(self, program: str) -> str:
        """Return a PATH that has everything but one program."""
        folder = self.root / f"without-{program}"
        folder.mkdir()
        for entry in usual_path():
            for file in Path(entry).iterdir() if Path(entry).is_dir() else ():
                if file.name != program:
                    with suppress(FileExistsError):  # the first one counts
                        (folder / file.name).symlink_to(file)
        return str(folder)

    def fake_uv(self, script: str) -> str:
        """Return a uv that is a shell script. In it, "$UV" is the real one."""
        program = self.root / "uv"
        program.write_text(f"#!/bin/sh\nUV='{UV}'\n{script}\n", "utf-8")
        program.chmod(0o755)
        return str(program)

    def shut_down(self) -> None:
        """End every terminal, and every PostgreSQL whose data lies in a project here."""
        for terminal in self.terminals:
            terminal.close(force=True)
        for pid_file in self.work.glob("**/.postgres/data/postmaster.pid"):
            pid = int(pid_file.read_text("utf-8").split()[0])
            with suppress(psutil.NoSuchProcess):
                server = psutil.Process(pid)
                if Path(server.cwd()) == pid_file.parent:  # and not another one with that number
                    server.terminate()
                    server.wait(10)


@contextmanager
def new_machine(root: Path, template: Path) -> Iterator[Machine]:
    """Make a machine on which nothing runs any more when the test is over."""
    machine = Machine(root, template)
    try:
        yield machine
    finally:
        machine.shut_down()
