"""After rendering: from files to a project that runs, in steps that can be typed again.

Whatever goes wrong here can be mended later, so it never ends in an error: cookiecutter would
delete the project.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path

Answers = dict[str, str]
Step = Callable[[], str | None]  # returns why it was left out, where that is as it should be

LONGEST = 900  # seconds that a command may take
PATIENCE = 5  # seconds that it may take to end when it is stopped
UV = os.environ.get("UV") or shutil.which("uv") or "uv"
COMMANDS = {  # which take the steps again
    "settings": "uv run manage.py env",
    "dependencies": "uv sync",
    "database": "uv run manage.py postgres start",
    "schema": "uv run manage.py migrate",
    "smoke test": "uv run manage.py check",
    "git": 'git init && git add --all && git commit -m "First commit"',
}
INTRODUCTION = (
    'git config --global user.name "Your Name" && git config --global user.email you@example.com'
)
AFTER_CRUFT = "git add .cruft.json && git commit --amend --no-edit"
FOREIGN = "this terminal sets for another program what would go before .env"
NO_UV = "a terminal in the new folder finds no uv"
INDEPENDENT = {"settings", "dependencies", "git"}  # each of the others needs all before it
DONE = "\x1e"  # a control character that no program says by itself
# As `uv run manage.py …` for each argument in turn, but importing, which is most of the work, is
# done once, and while another process takes the first step: that is, creates the database.
MANAGE = f"""
import signal, subprocess, sys
from contextlib import suppress

for name in ("SIGHUP", "SIGTERM"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.default_int_handler)
first, *others = (argument.split() for argument in sys.argv[1:])
beside = subprocess.Popen([sys.executable, "-X", "utf8", "manage.py", *first])
try:
    with suppress(Exception):  # whoever needs it says what is wrong
        import migrations, models, manage  # what the other one does not need comes first
    if beside.wait():
        sys.exit(1)
finally:
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        beside.wait(3)  # Ctrl-C has reached it too, and it puts its things in order
    beside.terminate()
print({DONE!r}, flush=True)
for command in others:
    try:
        manage.app(command)
    except SystemExit as end:
        if end.code:
            raise
    print({DONE!r}, flush=True)
"""
# What uv's words mean; the first that fits. Its own words follow where none does.
MEANINGS = {
    "No interpreter found|Failed to inspect Python|python-build-standalone": (
        "the Python of .python-version is not installed, and uv could not download it"
    ),
    "No space left": "the disk is full",
    "network was disabled|connectivity is disabled": "the package index cannot be reached",
    "network timeout|error sending request|dns error": "the package index cannot be reached",
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


def find_misleading(*, embedded: bool) -> list[str]:
    """Return what is set for another program, and would go before what this project has.

    embedded: the database is; the project itself then drops what libpq would read.
    """
    example = Path(".env.example").read_text("utf-8")
    names = {*re.findall(r"^(?:# )?([A-Z_]+)=", example, re.MULTILINE)}
    names |= {"PYTHONHOME", "PYTHONPATH", "UV_PROJECT_ENVIRONMENT"}
    if not embedded:
        names |= {name for name in os.environ if name.startswith("PG")}
    return sorted(names & os.environ.keys())


def environment() -> dict[str, str]:
    """Return the environment without settings that belong to another program."""
    foreign = {*find_misleading(embedded=False), "NEON_DATABASE_URL"}
    # pyenv's uvx tells of its own Python and folder, which hides the Python that is wanted here.
    foreign |= {"PYENV_VERSION", "PYENV_DIR", "VIRTUAL_ENV", "FORCE_COLOR", "CLICOLOR_FORCE"}
    return {name: value for name, value in os.environ.items() if name not in foreign}


def run(*command: str) -> None:
    """Run a command to its end. Raises StepFailed."""
    for _ in run_in_turn(*command):
        pass


def run_in_turn(*command: str) -> Generator[None]:
    """Run a command to its end, and yield each time it says DONE. Raises StepFailed."""
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
        start, done, ended = time.monotonic(), 0, False
        try:
            while not ended and (seconds := time.monotonic() - start) < LONGEST:
                ended = ends(process, within=0.05)
                *earlier, output = log.read_text("utf-8", "replace").split(DONE)
                lines = output.splitlines()
                show(f"  {seconds:.0f} s  {lines[-1].strip() if lines else ''}")
                while done < len(earlier):
                    show("")
                    yield
                    start, done = time.monotonic(), done + 1
        finally:
            show("")
            # Ctrl-C has reached it too, and it may have something to put in order.
            if not ends(process, within=PATIENCE):
                process.terminate()
                if not ends(process, within=PATIENCE):
                    process.kill()
        if not ended:
            raise StepFailed(f"it was stopped, {LONGEST} s are too long")
        if process.returncode:
            raise StepFailed(reason(output))


def ends(process: subprocess.Popen[bytes], within: float) -> bool:
    try:
        process.wait(within)
    except subprocess.TimeoutExpired:
        return False
    return True


def reason(output: str) -> str:
    """Tell from a command's output why it failed."""
    if told := re.search(r"(?ms)^✗ .*", output):  # manage.py says what is wrong and what to do
        lines = told[0].removeprefix("✗ ").splitlines()
        return "\n    ".join(" ".join(line.split()) for line in lines if not line.startswith("- "))
    for words, meaning in MEANINGS.items():
        if re.search(words, output):
            return meaning + (through_proxy() if "error sending request" in words else "")
    output = re.sub(r"//[^/@\s]+@", "//***@", output)  # a package index may want a password
    return "\n    ".join(output.strip().splitlines()[-6:])


def through_proxy() -> str:
    """Name the proxy's variable, if there is one: its value may hold a password."""
    schemes = [f"{scheme}_PROXY" for scheme in ("HTTPS", "ALL", "HTTP")]
    names = [name for name in schemes if os.environ.get(name) or os.environ.get(name.lower())]
    return f" through the proxy that {names[0]} names" if names else ""


def write_env(answers: Answers) -> str | None:
    """Write .env before anything slow, so that a pasted connection string is never lost."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path.cwd()))
    # Modules of the project, which is rendered by now.
    from postgres import env_file  # noqa: PLC0415
    from postgres.url import PLACEHOLDER, DatabaseUrlError  # noqa: PLC0415

    file = Path(".env")
    if file.exists() and env_file.get_value(file, "DATABASE_URL") != PLACEHOLDER:
        return "there is a .env already, and it stays"
    url, problem = None, "no connection string was given, so .env holds a placeholder"
    try:
        if answers["database"] == "local":
            url = env_file.embedded_url(answers["project_slug"].replace("-", "_"))
        elif pasted := os.environ.get("NEON_DATABASE_URL"):
            url = env_file.take_database_url(pasted, sys.stdout)
        elif sys.stdin.isatty():
            url = env_file.ask_database_url()
    except DatabaseUrlError as error:
        problem = f"{error}; .env holds a placeholder"
    values = {"DATABASE_URL": url.for_libpq()} if url else {}
    if not file.exists():
        secret = {"BETTER_AUTH_SECRET": env_file.new_secret()}
        env_file.create(file, Path(".env.example"), secret | values)
    elif url:  # a try before this one had no connection string
        env_file.set_value(file, "DATABASE_URL", url.for_libpq())
    if not url:
        raise StepFailed(problem)
    return None


def install() -> None:
    """Install the packages.

    uv takes a package whose installation was cut short for a whole one, and the folder for a good
    one: so what this began and did not finish is made anew, and nothing else is.
    """
    folder, mark = Path(".venv"), Path(".venv.unfinished")
    if mark.exists():
        shutil.rmtree(folder, ignore_errors=True)
    was_there = folder.exists()
    mark.touch()
    try:
        run(UV, "sync")
    except BaseException as error:
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        if not was_there or isinstance(error, StepFailed):
            mark.unlink()
        raise
    mark.unlink()


def commit() -> str | None:
    """Make the first commit."""
    if not shutil.which("git"):
        return "left out, git is not installed"
    if Path(".git").exists() and not is_unborn():
        return "left out, the folder is a repository already"
    if not Path(".git").exists() and succeeds("git", "rev-parse", "--is-inside-work-tree"):
        return "left out, the folder is inside a repository already: git add . && git commit"
    if not succeeds("git", "var", "GIT_COMMITTER_IDENT"):
        raise StepFailed("git does not know who you are")
    run("git", "init", "--quiet")
    for lock in Path(".git").rglob("*.lock"):  # of a try that was killed
        lock.unlink()
    run("git", "add", "--all")
    # A signature may want a passphrase, and nobody could type it here.
    run("git", "-c", "commit.gpgsign=false", "commit", "--quiet", "--message", "First commit")
    return None


def is_unborn() -> bool:
    """Is this a repository of its own without a commit, as a try that was stopped leaves it?"""
    return Path(".git").is_dir() and ask("git", "rev-list", "--max-count=1", "--all") == ""


def succeeds(*command: str, **variables: str) -> bool:
    return ask(*command, **variables) is not None


def ask(*command: str, **variables: str) -> str | None:
    """Run a command that only asks. Returns its answer, None where it has none."""
    try:
        done = subprocess.run(
            command,
            check=False,
            env=environment() | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()


def take(name: str, step: Step, again: str) -> str | None:
    """Take one step and tell how it went. Returns why it failed, None if it succeeded."""
    start = time.monotonic()
    try:
        note = step()
    except Exception as error:  # noqa: BLE001  (whatever it is, the project has to stay)
        why = str(error) or type(error).__name__
        say(f"✗ {name}: {why}\n    again: {again}")
        return why
    say(f"- {name}: {note}" if note else f"✓ {name} ({time.monotonic() - start:.1f} s)")
    return None


def take_all(to_do: dict[str, str], answers: Answers) -> None:
    """Take steps in order, and leave in `to_do` those that are still to be taken."""
    managed = [name for name in to_do if name not in INDEPENDENT]
    arguments = (to_do[name].removeprefix("uv run manage.py ") for name in managed)
    python = (UV, "run", "--no-sync", "python", "-X", "utf8")
    with closing(run_in_turn(*python, "-c", MANAGE, *arguments)) as turns:
        steps: dict[str, Step] = {
            "settings": lambda: write_env(answers),
            "dependencies": install,
            "git": commit,
            **dict.fromkeys(managed, lambda: next(turns)),
        }
        why = ""
        for name in list(to_do):
            if why and name not in INDEPENDENT:
                say(f"- {name}: later, it needs what failed")
            elif failure := take(name, steps[name], to_do[name]):
                why += failure
            else:
                del to_do[name]
    if COMMANDS["settings"] in why:  # the connection string is wrong, and not only missing
        later = dict(to_do)
        to_do.clear()
        to_do.update({"settings": COMMANDS["settings"]} | later)


def main(answers: Answers) -> None:
    by_cruft = "_output_dir" not in answers
    if by_cruft and is_in_passing(Path.cwd()):
        return
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that has no ✓ shows a ?
    if hasattr(signal, "SIGHUP"):  # the terminal was closed: the same as Ctrl-C
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    to_do = dict(COMMANDS)
    if answers["database"] != "local":
        del to_do["database"]
    way: list[tuple[str, str]] = []
    afterwards: list[str] = []
    try:
        # Before the steps, since after Ctrl-C cookiecutter waits a quarter of a second only.
        way = find_way(embedded=answers["database"] == "local")
        if not succeeds("git", "var", "GIT_COMMITTER_IDENT"):
            to_do["git"] = f"{INTRODUCTION} && {to_do['git']}"
        # cruft adds its file after this hook. A commit that was there before is somebody else's.
        if by_cruft and (not Path(".git").exists() or is_unborn()):
            afterwards.append(AFTER_CRUFT)
        say(f"\n{answers['project_name']}, in {Path.cwd()}")
        take_all(to_do, answers)
    except KeyboardInterrupt:
        say("\nStopped. What was done stays. The same command with -f goes on from here.")
        remove_copy(answers)
    advise(way, to_do, afterwards if Path(".git").exists() else [])


def is_in_passing(folder: Path) -> bool:
    """Is this where `cruft update` renders, only to compare? Nothing is to be set up there."""
    temp = Path(tempfile.gettempdir()).resolve()
    return folder.parent.parent == temp and bool(re.fullmatch(r"tmp\w{8}", folder.parent.name))


def remove_copy(answers: Answers) -> None:
    """Remove the copy of the template that cookiecutter made: it does so itself only on success."""
    copy = Path(answers.get("_repo_dir", "")).absolute().parent
    is_in_temp = copy.parent.resolve() == Path(tempfile.gettempdir()).resolve()
    if is_in_temp and re.fullmatch(r"cookiecutter\w{8}", copy.name):
        shutil.rmtree(copy, ignore_errors=True)


def advise(way: list[tuple[str, str]], to_do: dict[str, str], afterwards: list[str]) -> None:
    """Say what to type next. way: commands, each with a reason or without."""
    if not to_do:
        say("\nIt is ready. Type:\n")
    elif list(to_do) == ["git"]:
        say("\nIt is ready, but for the first commit. Type:\n")
    else:
        say("\nThe project is whole, but not finished. To finish it, type:\n")
    first = (command for command, _reason in way)
    for command in (*first, *to_do.values(), *afterwards, "uv run main.py", "uv run pytest"):
        say(f"    {command}")
    for command, reason in way:
        if reason:
            say(f"\n`{command}` is in the list because {reason}.")
    say("\nuv run main.py serves http://127.0.0.1:8000")
    if Path(".postgres", "data", "postmaster.pid").exists():
        say("PostgreSQL goes on running; this ends it: uv run manage.py postgres stop")


def find_way(*, embedded: bool) -> list[tuple[str, str]]:
    """Return the commands that lead a terminal into the project, and to uv there, with reasons."""
    here = Path.cwd()
    near = here.parent == Path(os.environ.get("PWD", os.devnull)).resolve()
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    way = [(join(["cd", here.name if near else str(here)]), "")]
    if names := find_misleading(embedded=embedded):
        unset = [" ".join(["unset", *names])]
        commands = [f"set {name}=" for name in names] if os.name == "nt" else unset
        way += [(command, FOREIGN) for command in commands]
    if not finds_uv():
        way.append(("python3 -m pip install uv", NO_UV))
    return way


def finds_uv() -> bool:
    """Would a terminal in the new folder find uv? pyenv shows what belongs to one Python only."""
    versions = Path(os.environ.get("PYENV_ROOT", os.devnull), "versions")
    entries = [entry for entry in os.get_exec_path() if versions not in Path(entry).parents]
    path = os.pathsep.join(entries)
    program = shutil.which("uv", path=path)
    return program is not None and succeeds(program, "--version", PATH=path)


if __name__ == "__main__":
    if Path(__file__).name != "post_gen_project.py":  # cookiecutter never deletes what it rendered
        Path(__file__).unlink(missing_ok=True)
    main(json.loads(r"""{{ cookiecutter | tojson }}"""))
