"""After rendering: from files to a project that runs, in steps that can be typed again.

Whatever goes wrong here can be mended later, so it never ends in an error: cookiecutter would
delete the project.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path

Answers = dict[str, str]

LONGEST = 900  # seconds that a command may take
UV = os.environ.get("UV") or shutil.which("uv") or "uv"
# What uv's words mean; the first that fits. Its own words follow where none does.
MEANINGS = {
    "No interpreter found|Failed to inspect Python|python-build-standalone": (
        "the Python of .python-version is not installed, and uv could not download it"
    ),
    "No space left": "the disk is full",
    "network was disabled|network timeout|error sending request|dns error": (
        "the package index cannot be reached"
    ),
}


class StepFailed(Exception):
    """Why a step failed, without secrets."""


def say(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:  # nobody reads it any more, as in `uvx cookiecutter … | head -1`
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (until the end)


def show(text: str) -> None:
    """Show a line that the next one replaces: on a terminal only, a log wants none of them."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="\r", flush=True)


def environment() -> dict[str, str]:
    """Return the environment without settings that belong to another program."""
    example = Path(".env.example").read_text("utf-8")
    foreign = {*re.findall(r"^(?:# )?([A-Z_]+)=", example, re.MULTILINE), "NEON_DATABASE_URL"}
    # pyenv's uvx tells of its own Python and folder, which hides the Python that is wanted here.
    foreign |= {"PYENV_VERSION", "PYENV_DIR", "VIRTUAL_ENV", "FORCE_COLOR", "CLICOLOR_FORCE"}
    return {name: value for name, value in os.environ.items() if name not in foreign}


def run(*command: str) -> None:
    """Run a command to its end. Raises StepFailed."""
    # A file, since a pipe would end only when the database server does that some commands start.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log = Path(folder, "log")
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        start = time.monotonic()
        try:
            while process.poll() is None and (seconds := time.monotonic() - start) < LONGEST:
                lines = log.read_text("utf-8", "replace").splitlines()
                show(f"  {seconds:.0f} s  {lines[-1].strip() if lines else ''}")
                time.sleep(0.05)
        finally:
            show("")
            process.terminate()  # does nothing to a process that has ended
        if process.returncode is None:
            process.wait(timeout=10)
            raise StepFailed(f"it was stopped, {LONGEST} s are too long")
        if process.returncode:
            raise StepFailed(reason(log.read_text("utf-8", "replace")))


def reason(output: str) -> str:
    """Tell from a command's output why it failed."""
    if told := re.search(r"(?ms)^✗ .*", output):  # manage.py says what is wrong and what to do
        lines = told[0].removeprefix("✗ ").splitlines()
        return "\n    ".join(" ".join(line.split()) for line in lines if not line.startswith("- "))
    for words, meaning in MEANINGS.items():
        if re.search(words, output):
            return meaning
    output = re.sub(r"//[^/@\s]+@", "//***@", output)  # a package index may want a password
    return "\n    ".join(output.strip().splitlines()[-6:])


def write_env(answers: Answers) -> str | None:
    """Write .env before anything slow, so that a pasted connection string is never lost."""
    if Path(".env").exists():
        return "there is a .env already, and it stays"
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path.cwd()))
    # Modules of the project, which is rendered by now.
    import database_url  # noqa: PLC0415
    import env_file  # noqa: PLC0415

    url, problem = None, "no connection string was given, so .env holds a placeholder"
    try:
        if answers["database"] == "local":
            url = env_file.embedded_url(answers["project_slug"].replace("-", "_"))
        elif pasted := os.environ.get("NEON_DATABASE_URL"):
            url = env_file.take_database_url(pasted, sys.stdout)
        elif sys.stdin.isatty():
            url = env_file.ask_database_url()
    except database_url.DatabaseUrlError as error:
        problem = f"{error}; .env holds a placeholder"
    values = {"BETTER_AUTH_SECRET": env_file.new_secret()}
    if url:
        values["DATABASE_URL"] = url.for_libpq()
    env_file.create(Path(".env"), Path(".env.example"), values)
    if not url:
        raise StepFailed(problem)
    return None


def commit(_answers: Answers) -> str | None:
    """Make the first commit. Returns why not, where that is as it should be."""
    if not shutil.which("git"):
        return "left out, git is not installed"
    if succeeds("git", "rev-parse", "--is-inside-work-tree"):
        return "left out, the folder is inside a repository already"
    if not succeeds("git", "var", "GIT_COMMITTER_IDENT"):
        raise StepFailed("git does not know who you are")
    run("git", "init", "--quiet")
    run("git", "add", "--all")
    # A signature may want a passphrase, and nobody could type it here.
    run("git", "-c", "commit.gpgsign=false", "commit", "--quiet", "--message", "First commit")
    return None


def succeeds(*command: str, **variables: str) -> bool:
    """Run a command that only asks."""
    if not shutil.which(command[0]):
        return False
    done = subprocess.run(
        command,
        check=False,
        env=environment() | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    return done.returncode == 0


def uv(arguments: str) -> tuple[Callable[[Answers], None], str]:
    return lambda _answers: run(UV, *arguments.split()), f"uv {arguments}"


STEPS: dict[str, tuple[Callable[[Answers], str | None], str]] = {
    # its name: (what it does, the command that does it again)
    "settings": (write_env, "uv run manage.py env"),
    "dependencies": uv("sync"),
    "database": uv("run manage.py postgres start"),
    "schema": uv("run manage.py migrate"),
    "smoke test": uv("run manage.py check"),
    "git": (commit, 'git init && git add --all && git commit -m "First commit"'),
}
INTRODUCTION = (
    'git config --global user.name "Your Name" && git config --global user.email you@example.com'
)
INDEPENDENT = {"settings", "dependencies", "git"}  # each of the others needs all before it


def take(name: str, again: str, answers: Answers) -> bool:
    """Take one step and tell how it went. Returns whether it succeeded."""
    step, _ = STEPS[name]
    start = time.monotonic()
    try:
        note = step(answers)
    except Exception as error:  # noqa: BLE001  (whatever it is, the project has to stay)
        say(f"✗ {name}: {error or type(error).__name__}\n    again: {again}")
        return False
    say(f"- {name}: {note}" if note else f"✓ {name} ({time.monotonic() - start:.1f} s)")
    return True


def main(answers: Answers) -> None:
    passing = Path(tempfile.gettempdir()).resolve()
    if "_output_dir" not in answers and Path.cwd().parents[1] == passing:
        return  # `cruft update` renders in passing, to compare: nothing is to be set up
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that has no ✓ shows a ?
    to_do = {name: command for name, (_, command) in STEPS.items()}
    if answers["database"] != "local":
        del to_do["database"]
    if not succeeds("git", "var", "GIT_COMMITTER_IDENT"):
        to_do["git"] = f"{INTRODUCTION} && {to_do['git']}"
    way = find_way()  # now, since after Ctrl-C cookiecutter waits a quarter of a second only
    blocked = False
    try:
        say(f"\n{answers['project_name']}, in {Path.cwd()}")
        for name in list(to_do):
            if blocked and name not in INDEPENDENT:
                say(f"- {name}: later, it needs what failed")
            elif take(name, to_do[name], answers):
                del to_do[name]
            else:
                blocked = True
    except KeyboardInterrupt:
        say("\nStopped. What was done stays.")
    advise(way, to_do)


def advise(way: list[str], to_do: dict[str, str]) -> None:
    """Say what to type next."""
    if not to_do:
        say("\nIt is ready. Type:\n")
    elif list(to_do) == ["git"]:
        say("\nIt is ready, but for the first commit. Type:\n")
    else:
        say("\nThe project is whole, but not finished. To finish it, type:\n")
    for command in (*way, *to_do.values(), "uv run main.py", "uv run pytest"):
        say(f"    {command}")
    if len(way) > 1:
        say("\npip is in the list because a terminal in the new folder finds no uv.")
    say("\nuv run main.py serves http://127.0.0.1:8000/docs")
    if (Path(".postgres") / "data").exists():
        say("PostgreSQL goes on running; this ends it: uv run manage.py postgres stop")


def find_way() -> list[str]:
    """Return the commands that lead a terminal into the project, and to uv there."""
    here = Path.cwd()
    near = here.parent == Path(os.environ.get("PWD", os.devnull)).resolve()
    folder = subprocess.list2cmdline(["cd", here.name if near else str(here)])
    return [folder] if finds_uv() else [folder, "python3 -m pip install uv"]


def finds_uv() -> bool:
    """Would a terminal in the new folder find uv? pyenv shows what belongs to one Python only."""
    versions = Path(os.environ.get("PYENV_ROOT", os.devnull), "versions")
    entries = [entry for entry in os.get_exec_path() if versions not in Path(entry).parents]
    path = os.pathsep.join(entries)
    program = shutil.which("uv", path=path)
    return program is not None and succeeds(program, "--version", PATH=path)


if __name__ == "__main__":
    main(json.loads(r"""{{ cookiecutter | tojson }}"""))
