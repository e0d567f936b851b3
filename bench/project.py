"""Generate the project to measure, and time the generation."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from .processes import BenchError, Command, end_of, environment, fed_by_pipe, run

REPOSITORY = Path(__file__).parent.parent
HERE = Path(__file__).parent
SLUG = "todo-backend"
UV = os.environ.get("UV") or shutil.which("uv") or "uv"
# For equal conditions, no checkpoint or vacuum runs during a measurement: bench.data does both
# before. The embedded server does not wait for the disk on commit.
POSTGRES_SETTINGS = (
    "autovacuum=off",
    "checkpoint_timeout=1h",
    "max_connections=200",
    "max_wal_size=8GB",
    "shared_buffers=512MB",
)


def timed(*command: str | Path, cwd: Path, expect: str = "") -> float:
    """Run a command and return its seconds. Raises BenchError if its output lacks `expect`."""
    start = time.perf_counter()
    output = run(*command, cwd=cwd)
    if expect not in output:
        raise BenchError(f"{' '.join(map(str, command))} did not finish:\n{end_of(output)}")
    return time.perf_counter() - start


@dataclass(frozen=True)
class Project:
    """A generated project."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / ".venv" / "bin" / "python"

    def install(self, package: str, folder: Path) -> str:
        """Install a package into `folder`, not into the project. Returns its name and version."""
        options = ("--quiet", "--python", self.python, "--target", folder)
        run(UV, "pip", "install", *options, package, cwd=folder)
        (found,) = distributions(name=package, path=[str(folder)])
        return f"{package} {found.version}"

    def ask_for_world(
        self, url: str, users: Sequence[str], tasks: Mapping[str, datetime], password: str
    ) -> dict[str, Any]:
        """Return the `world` of bench/insider.py. tasks: creation times by id."""
        created = {task: moment.isoformat() for task, moment in tasks.items()}
        return self._ask("world", url, {"users": users, "tasks": created, "password": password})

    def time_sessions(self, url: str) -> dict[str, float]:
        """Return the `sessions` of bench/insider.py, in seconds."""
        return self._ask("sessions", url, {})

    def _ask(self, word: str, url: str, question: dict[str, Any]) -> dict[str, Any]:
        done = subprocess.run(
            [self.python, "-P", HERE / "insider.py", word],
            check=False,
            cwd=self.path,
            env=environment(DATABASE_URL=url, PYTHONPATH=str(self.path)),
            input=json.dumps(question),
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        if done.returncode:
            raise BenchError(f"bench/insider.py does not fit the project:\n{end_of(done.stderr)}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def stop_postgres(self) -> None:
        """Stop the server that generation started, if it got that far."""
        if self.python.exists():
            run(self.python, "manage.py", "postgres", "stop", cwd=self.path)

    @contextmanager
    def postgres(self) -> Iterator[str]:
        """Run an empty, migrated database until the end of the block. Yields its URL."""
        settings = [f"--set={setting}" for setting in POSTGRES_SETTINGS]
        command: Command = [self.python, "-X", "utf8", "-m", "postgres.embedded", *settings]
        with fed_by_pipe(command, cwd=self.path, stdout=subprocess.PIPE) as process:
            output = ""
            for line in process.stdout or ():
                if line.startswith("postgresql://"):
                    break
                output += line
            else:
                raise BenchError(f"PostgreSQL did not start:\n{end_of(output)}")
            url = line.strip()
            # Not `manage.py migrate`, which would start and migrate the project's own server.
            run(self.python, "-m", "alembic", "upgrade", "head", cwd=self.path, DATABASE_URL=url)
            yield url


def copy_template(target: Path, commit: str | None = None) -> Path:
    """Copy the files of the template that git knows or would add, without caches.

    commit: an earlier commit, or None for the working tree.
    """
    try:
        if commit:
            archive = git("archive", "--format=tar", commit)
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(target, filter="data")
            return target
        listing = git("ls-files", "--cached", "--others", "--exclude-standard", "-z").decode()
    except OSError:
        raise BenchError("git is not installed; it lists the template's files") from None
    except subprocess.CalledProcessError as error:
        text = end_of(error.stderr.decode("utf-8", "replace"))
        raise BenchError(f"git could not list the template's files:\n{text}") from None
    for name in filter(None, listing.split("\0")):
        with suppress(FileNotFoundError):  # deleted but not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)
    return target


def git(*arguments: str) -> bytes:
    return subprocess.run(
        ["git", *arguments], check=True, cwd=REPOSITORY, capture_output=True
    ).stdout


def generate(folder: Path, commit: str | None = None) -> tuple[Project, float]:
    """Generate a project and stop its server. Returns the project and the seconds it took.

    folder: must be empty. commit: see `copy_template`.
    """
    template = copy_template(folder / "template", commit)
    project = Project(folder / SLUG)
    cookiecutter = (sys.executable, "-m", "cookiecutter", template, "--no-input")
    try:
        # The hook never fails: it prints what is left to do.
        seconds = timed(*cookiecutter, "--output-dir", folder, cwd=folder, expect="It is ready")
    finally:
        project.stop_postgres()
    return project, seconds


def time_parts(project: Project, folder: Path) -> dict[str, float]:
    """Time the steps that no generator could skip, in a fresh copy of the project.

    Returns the seconds of each step. The copy has nothing installed or compiled, no lock file and
    no data.
    """
    leave_out = shutil.ignore_patterns(".venv", ".postgres", ".git", "__pycache__", "uv.lock")
    bare = Project(Path(shutil.copytree(project.path, folder, ignore=leave_out)))
    try:
        return {
            "uv sync": timed(UV, "sync", cwd=bare.path),
            "initdb and start": timed(bare.python, "manage.py", "postgres", "start", cwd=bare.path),
            "migrate": timed(bare.python, "manage.py", "migrate", cwd=bare.path),
        }
    finally:
        bare.stop_postgres()
