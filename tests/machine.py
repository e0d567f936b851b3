"""An isolated machine for a test: home, temp and work folders, environment, and its processes."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from io import StringIO
from pathlib import Path

import pexpect
import psutil

UV = os.environ.get("UV") or shutil.which("uv") or "uv"
UVX = "uvx"
COOKIECUTTER = (sys.executable, "-m", "cookiecutter")  # installed with the tests, starts without uv
# Environment variables of the real machine that programs inherit.
PASSED_ON = {"LANG", "LC_ALL", "PYENV_ROOT", "SYSTEMROOT", "TZ", "HTTP_PROXY", "HTTPS_PROXY"}
PASSED_ON |= {"NO_PROXY", "SSL_CERT_DIR", "SSL_CERT_FILE", "UV_DEFAULT_INDEX", "UV_INDEX"}
PASSED_ON |= {"MYPY_CACHE_DIR"}  # of the tests
NOT_OURS = re.compile(r"uv-[\da-f]+\.lock")  # uv leaves these in the temp folder


@cache
def ask_uv(*question: str) -> str:
    done = subprocess.run([UV, *question], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def usual_path() -> list[str]:
    """Return the PATH of a terminal, without the entries that `uv run` and pyenv prepend."""
    versions = Path(os.environ.get("PYENV_ROOT", os.devnull), "versions")
    return [
        entry
        for entry in os.get_exec_path()
        if Path(entry) != Path(sys.executable).parent and versions not in Path(entry).parents
    ]


@dataclass(frozen=True)
class Project:
    """A generated project, and the environment for its commands."""

    path: Path
    environment: dict[str, str] = field(repr=False)

    @property
    def python(self) -> Path:
        folder = "Scripts" if os.name == "nt" else "bin"
        return self.path / ".venv" / folder / "python"

    @property
    def data(self) -> Path:
        """The data folder of the embedded PostgreSQL."""
        return self.path / ".postgres" / "data"

    def run(self, *command: str, seconds: float = 120) -> "Outcome":
        """Run a command in the project. `uv` is the real one, even if a shim hides it."""
        return run([UV if command[0] == "uv" else command[0], *command[1:]], self, seconds=seconds)

    def git(self, *arguments: str) -> str:
        outcome = self.run("git", *arguments)
        assert outcome.code == 0, outcome.output
        return outcome.output

    def read(self, name: str) -> str:
        return (self.path / name).read_text("utf-8")

    def copy(self, folder: Path, *left_out: str) -> "Project":
        """Copy the project without its database. left_out: names of files not to copy."""
        ignored = shutil.ignore_patterns(".postgres", ".venv", *left_out)
        copy = replace(self, path=Path(shutil.copytree(self.path, folder, ignore=ignored)))
        outcome = copy.run("uv", "sync")
        assert outcome.code == 0, outcome.output
        return copy


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    code: int
    output: str
    project: Project


def run(
    command: list[str], project: Project, *, folder: Path | None = None, seconds: float
) -> Outcome:
    """Run a command in the project or another folder, with empty standard input."""
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
    """A machine without generated projects. It uses the real, warm package cache."""

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
        """Disable network and cache, so that `uv sync` fails at once."""
        self.environment |= {"UV_OFFLINE": "1", "UV_CACHE_DIR": str(self.root / "empty")}

    def project(self, slug: str = "todo-backend", /, **variables: str | None) -> Project:
        """Return the project with that name, existing or not. None unsets a variable."""
        environment = {**self.environment, **variables}
        known = {name: value for name, value in environment.items() if value is not None}
        return Project(self.work / slug, known)

    def generate(
        self,
        *arguments: str,
        slug: str = "todo-backend",
        program: tuple[str, ...] = COOKIECUTTER,
        flags: tuple[str, ...] = ("--no-input",),
        seconds: float = 120,
        **variables: str | None,
    ) -> Outcome:
        """Generate a project without questions. slug: the project's folder."""
        command = [*program, str(self.template), *flags, *arguments]
        return run(command, self.project(slug, **variables), folder=self.work, seconds=seconds)

    def type(
        self, *arguments: str, columns: int = 200, **variables: str | None
    ) -> "pexpect.spawn[str]":
        """Generate a project on a terminal that a test can type on."""
        # As in a real shell, programs may go on after Ctrl-C: press_ctrl_c() waits for them.
        script = 'trap stopped=1 INT; "$@"; code=$?; [ -z "$stopped" ] || read line; exit $code'
        terminal = pexpect.spawn(
            "/bin/sh",
            ["-c", script, "sh", *COOKIECUTTER, str(self.template), *arguments],
            cwd=self.work,
            env=self.project(**variables).environment,
            encoding="utf-8",
            timeout=60,
            dimensions=(50, columns),
        )
        self.terminals.append(terminal)
        return terminal

    def path_without(self, program: str) -> str:
        """Return a PATH with everything except one program."""
        folder = self.root / f"without-{program}"
        folder.mkdir()
        for entry in usual_path():
            for file in Path(entry).iterdir() if Path(entry).is_dir() else ():
                if file.name != program:
                    with suppress(FileExistsError):  # the first one wins
                        (folder / file.name).symlink_to(file)
        return str(folder)

    def path_with(self, program: str, script: str) -> str:
        """Return a PATH with a shell script that hides a program. "$REAL" is the real program."""
        folder = self.root / f"with-{program}"
        folder.mkdir(exist_ok=True)
        # A shim would look for the program on the PATH, and start this script again.
        real = UV if program == "uv" else shutil.which(program, path=self.environment["PATH"])
        (folder / program).write_text(f"#!/bin/sh\nREAL='{real}'\n{script}\n", "utf-8")
        (folder / program).chmod(0o755)
        return os.pathsep.join([str(folder), self.environment["PATH"]])

    def fake_uv(self, script: str) -> str:
        """Return the path of a shell script to use as uv. In it, "$UV" is the real one."""
        program = self.root / "uv"
        program.write_text(f"#!/bin/sh\nUV='{UV}'\n{script}\n", "utf-8")
        program.chmod(0o755)
        return str(program)

    def press_ctrl_c(self, terminal: "pexpect.spawn[str]") -> str:
        """Press Ctrl-C, wait for all programs to end, and return the screen's text.

        Text up to the last expected match is left out.
        """
        terminal.sendintr()
        self.orphans(terminal.pid)
        with suppress(OSError):  # it has already ended
            terminal.sendline()
        return str(terminal.read())

    def interrupt(self, moment: Callable[[], bool], *arguments: str) -> Outcome:
        """Generate a project on a terminal, and press Ctrl-C when `moment()` is true."""
        terminal = self.type("--no-input", *arguments)
        terminal.logfile_read = screen = StringIO()
        self.wait_for(moment, lambda: terminal.expect([pexpect.TIMEOUT, pexpect.EOF], 0.01) == 0)
        self.press_ctrl_c(terminal)
        terminal.close()
        output = screen.getvalue().replace("\r\n", "\n")
        return Outcome(terminal.exitstatus or 0, output, self.project())

    def switch_off(self, moment: Callable[[], bool], *arguments: str) -> Outcome:
        """Generate a project, and kill everything on this machine when `moment()` is true."""
        project = self.project()
        log = self.root / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*COOKIECUTTER, str(self.template), "--no-input", *arguments],
                cwd=self.work,
                env=project.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                self.wait_for(moment, lambda: process.poll() is None)
            finally:
                self.kill_all()
                process.wait(10)
        text = log.read_text("utf-8")
        log.unlink()
        return Outcome(process.returncode, text, project)

    def wait_for(self, moment: Callable[[], bool], goes_on: Callable[[], bool]) -> None:
        """Wait until `moment()` is true. goes_on: returns whether the program still runs."""
        limit = time.monotonic() + 60
        while not moment():
            assert goes_on(), "the program ended before that moment"
            assert time.monotonic() < limit, "the moment did not come"
            time.sleep(0.01)

    def kill_all(self) -> None:
        """Kill everything that runs here, like a power cut."""
        seen = 3
        while seen:  # others may start meanwhile; one that starts has no environment for a moment
            running = self.processes()
            seen = 3 if running else seen - 1
            for process in running:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        """Return the processes of this machine: those that have its HOME. Linux only."""
        mine = f"HOME={self.home}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, psutil.NoSuchProcess):
                if mine in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(int(folder.name)))
        return found

    def programs(self) -> set[str]:
        """Return the names of the programs that run here."""
        names = set()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                names.add(process.name())
        return names

    def orphans(self, terminal: int | None = None, *, seconds: float = 10) -> list[str]:
        """Return programs that keep running, except each project's PostgreSQL. Linux only.

        terminal: the pid of a terminal to ignore. seconds: time that programs have to end.
        """
        limit = time.monotonic() + seconds
        while True:
            running = []
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    if process.pid != terminal and not self.is_to_go_on(process):
                        running.append(" ".join(process.cmdline()))
            if not running or time.monotonic() > limit:
                return running
            time.sleep(0.05)

    def is_to_go_on(self, process: psutil.Process) -> bool:
        """Return whether it is the PostgreSQL server of a project here, or a child of one."""
        data = Path(process.cwd())
        if not (data.is_relative_to(self.work) and data.parts[-2:] == (".postgres", "data")):
            return False
        with suppress(FileNotFoundError, IndexError):  # it is starting, or has ended
            server = int((data / "postmaster.pid").read_text("utf-8").split()[0])
            return process.name().startswith("postgres") and server in {process.pid, process.ppid()}
        return False

    def left_in_temp(self) -> list[str]:
        """Return what is in the temp folder but should not be."""
        return sorted(
            path.name
            for path in self.temp.iterdir()
            if not (NOT_OURS.fullmatch(path.name) and is_empty(path))
        )

    def shut_down(self) -> None:
        """End all terminals, PostgreSQL servers and other processes of this machine."""
        for terminal in self.terminals:
            terminal.close(force=True)
        for pid_file in self.work.glob("**/.postgres/data/postmaster.pid"):
            pid = int(pid_file.read_text("utf-8").split()[0])
            with suppress(psutil.NoSuchProcess):
                server = psutil.Process(pid)
                if Path(server.cwd()) == pid_file.parent:  # not another process with the same pid
                    server.terminate()
                    server.wait(10)
        self.kill_all()


def is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


@contextmanager
def new_machine(root: Path, template: Path) -> Iterator[Machine]:
    """Create a machine, and stop all its processes at the end."""
    machine = Machine(root, template)
    try:
        yield machine
    finally:
        machine.shut_down()
