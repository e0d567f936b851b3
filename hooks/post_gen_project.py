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
import threading
import time
from pathlib import Path

LONGEST = 900  # seconds that a command may take
TERMINAL = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
UV = os.environ.get("UV") or shutil.which("uv") or "uv"
INSTALL_UV = "python3 -m pip install uv"
MEANINGS = {
    "No interpreter found|No download found": "this Python is not here, and uv could not get it",
    "No space left": "the disk is full",
    "Network connectivity is disabled|dns error|sending request|Failed to fetch|timed out": (
        "the package index cannot be reached"
    ),
}


class StepFailed(Exception):
    """Why a step failed, without secrets."""


def own_environment():
    """Return the environment without another program's settings, and without secrets."""
    example = Path(".env.example").read_text("utf-8")
    foreign = {*re.findall(r"^(?:# )?([A-Z_]+)=", example, re.MULTILINE), "NEON_DATABASE_URL"}
    # pyenv's uvx sets PYENV_VERSION to its own Python, which hides the one that is wanted here.
    foreign |= {"PYENV_VERSION", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name not in foreign}


def run(*command):
    """Run a command, with a sign of life on a terminal. Raises StepFailed."""
    process = subprocess.Popen(
        command,
        env=own_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    lines, start = [""], time.monotonic()
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    try:
        while reader.is_alive() and time.monotonic() - start < LONGEST:
            reader.join(0.1)
            show(f"  {time.monotonic() - start:.0f} s  {lines[-1].strip()}")
    finally:
        show("")
        if reader.is_alive():
            process.terminate()
    if process.wait(timeout=60):
        output = re.sub(r"//[^/@\s]+@", "//***@", "".join(lines))  # an index may want a password
        meanings = [meaning for text, meaning in MEANINGS.items() if re.search(text, output)]
        raise StepFailed("\n    ".join(meanings[:1] + output.strip().splitlines()[-6:]))


def show(text):
    """Show a line that the next one replaces."""
    if TERMINAL:
        print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="\r", flush=True)


def write_env(answers):
    """Write .env before anything slow, so that a pasted connection string is never lost."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path.cwd()))
    import database_url
    import env_file

    url, reason = None, "no connection string was given"
    try:
        if answers["database"] == "local":
            url = env_file.embedded_url(answers["project_slug"].replace("-", "_"))
        elif pasted := os.environ.get("NEON_DATABASE_URL"):
            url = database_url.parse(pasted)
        elif sys.stdin.isatty():
            url = env_file.ask_database_url()
    except database_url.DatabaseUrlError as error:
        reason = f"NEON_DATABASE_URL: {error}"
    values = {"BETTER_AUTH_SECRET": env_file.new_secret()}
    if url:
        values["DATABASE_URL"] = url.for_libpq()
    env_file.create(Path(".env"), Path(".env.example"), values)
    if not url:
        raise StepFailed(reason)


def commit(_answers):
    """Make the first commit. Returns why not, where that is nobody's mistake."""
    if not shutil.which("git"):
        return "left out, git is not installed"
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60, "check": False}
    if subprocess.run(["git", "rev-parse", "--is-inside-work-tree"], **quiet).returncode == 0:
        return "left out, the folder is inside a repository already"
    if subprocess.run(["git", "var", "GIT_COMMITTER_IDENT"], **quiet).returncode:
        raise StepFailed('git wants to know you: git config --global user.email "you@example.com"')
    run("git", "init", "--quiet")
    run("git", "add", "--all")
    # A signature may want a passphrase, and nobody could type it here.
    run("git", "-c", "commit.gpgsign=false", "commit", "--quiet", "--message", "First commit")
    return None


def uv(*arguments):
    return lambda _answers: run(UV, *arguments)


STEPS = {  # each step's name, what it does, and the command that does it again
    "settings": (write_env, "uv run manage.py env"),
    "dependencies": (uv("sync"), "uv sync"),
    "database": (uv("run", "manage.py", "postgres", "start"), "uv run manage.py postgres start"),
    "schema": (uv("run", "manage.py", "migrate"), "uv run manage.py migrate"),
    "smoke test": (uv("run", "manage.py", "check"), "uv run manage.py check"),
    "git": (commit, 'git init && git add --all && git commit -m "First commit"'),
}
INDEPENDENT = {"settings", "dependencies", "git"}  # the others need all before them


def main(answers):
    if "_output_dir" not in answers and Path.cwd().parents[1] == Path(tempfile.gettempdir()):
        return  # `cruft update` renders in passing, to compare: nothing is to be set up
    print(f"\n{answers['project_name']}, in {Path.cwd()}", flush=True)
    to_do = {name: command for name, (_, command) in STEPS.items()}
    if answers["database"] != "local":
        del to_do["database"]
    failed = False
    try:
        for name in list(to_do):
            if failed and name not in INDEPENDENT:
                print(f"- {name}: later, it needs what failed", flush=True)
                continue
            start = time.monotonic()
            try:
                note = STEPS[name][0](answers)
            except Exception as error:  # noqa: BLE001  (whatever it is, the project must stay)
                failed = True
                print(f"✗ {name}: {error or type(error).__name__}", flush=True)
                print(f"    again: {to_do[name]}", flush=True)
            else:
                del to_do[name]
                done = f"- {name}: {note}" if note else f"✓ {name}"
                print(f"{done} ({time.monotonic() - start:.1f} s)", flush=True)
    except KeyboardInterrupt:
        print("\nStopped. What was done stays.")
    advise(answers["project_slug"], list(to_do.values()))


def advise(folder, to_do):
    """Say what to type next."""
    commands = [f"cd {folder}", *([] if finds_uv() else [INSTALL_UV]), *to_do]
    if to_do:
        print("\nNot finished yet. To finish it, type:")
    else:
        print(f"\nIt runs. Next, type:")
        commands += ["uv run main.py", "uv run pytest"]
    print("".join(f"\n    {command}" for command in commands))
    print("\nuv run main.py serves it at http://127.0.0.1:8000/docs", flush=True)


def finds_uv():
    """Would a terminal in the new folder find uv? pyenv shows what belongs to one Python only."""
    shims = os.path.join(os.environ.get("PYENV_ROOT", os.devnull), "versions")
    path = os.pathsep.join(entry for entry in os.get_exec_path() if not entry.startswith(shims))
    uv = shutil.which("uv", path=path)
    ask = {"env": own_environment() | {"PATH": path}, "capture_output": True, "timeout": 60}
    return uv and subprocess.run([uv, "--version"], check=False, **ask).returncode == 0


if __name__ == "__main__":
    main(json.loads(r"""{{ cookiecutter | tojson }}"""))
