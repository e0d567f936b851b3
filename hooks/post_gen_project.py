"""After rendering: install packages, set up the project, commit, and print the next commands."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable  # noqa: TC003
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from time import monotonic

UV = os.environ.get("UV") or shutil.which("uv") or "uv"
INSTALL_UV = ["# No uv in that folder (pyenv has one per Python):", "python3 -m pip install uv"]
GIT = 'git init && git add --all && git commit -m "First commit"'
# Pasted unchanged, this is a shell syntax error, so it cannot set a wrong identity.
NO_IDENTITY = """git does not know who you are. Type, with your own name and address:
    git config --global user.name <"NAME"> && git config --global user.email <"ADDRESS">"""
# What changes how git, Python and uv work, but not who commits and where packages come from.
MISLEADING = re.compile(r"GIT_(DIR|INDEX_FILE|WORK_TREE)$|PYTHON|UV_(?!INT|NO_PROG|PUB|RUN|TOOL)")
HIDDEN = re.compile(
    r"(?!GIT_((AUTHOR|COMMITTER)_[EN]|CEIL|CONFIG_[GNS]|EXEC)|PYTHON(DO|IO|U[NT])|UV_PYTHON_(DO|PR))"
    r"(?!UV_(LINK|NAT|OFF|REQUEST|.*(CACHE|CERTS|CRED|ENDPOINT|HTTP|IN(DEX|SECURE|STALL_D)|KEY|MIRROR)))"
    r"(GIT_|PYTHON|UV_|PYENV_[DV]|(NEON_DATABASE_URL|VIRTUAL_ENV)$)"
)


def run(*command: str, stdin: int | None = subprocess.DEVNULL, **variables: str) -> None:
    """Run a command with its output on this terminal. Raises SubprocessError if it fails."""
    with subprocess.Popen(command, env=os.environ | variables, stdin=stdin) as process:
        try:
            process.wait(timeout=1800)
        finally:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)  # Ctrl-C reached it too
            process.kill()
    if process.returncode:
        raise subprocess.SubprocessError("see above")


def ask(*command: str, **variables: str) -> str | None:
    """Return the output of a command, or None if it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        env = os.environ | variables
        done = subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
        return done.stdout.decode("utf-8", "replace").strip()
    return None


def install() -> None:
    """Install all packages, from scratch after an interruption: uv accepts half-installed ones."""
    unfinished = Path(".venv.unfinished")
    if unfinished.exists() or not Path(".venv").exists():
        shutil.rmtree(".venv", ignore_errors=True)
        unfinished.touch()
    run(UV, "run", "python", "-c", "")  # like `uv sync`, but without a line for each package
    unfinished.unlink(missing_ok=True)
    indexes = {name: "" for name in os.environ if re.match(r"UV_([DE]\w+_)?INDEX(_URL)?$", name)}
    # With "-f", uv refuses a lock of another index than the default.
    if ask(UV, "lock", "--check", "--offline", "-f", ".", UV_NO_CONFIG="1", **indexes) is None:
        print(f"! uv.lock follows your {' or '.join(['uv.toml', *indexes])}: uv may fail elsewhere")


def commit() -> str | None:
    """Make the first commit, or return why there is none to make."""
    if not shutil.which("git"):
        return "git is not installed"
    if Path(".git").exists() and ask("git", "rev-list", "--max-count=1", "--all") != "":
        return "the folder is already a repository"
    if ask("git", "rev-parse", "--show-prefix"):
        return "the folder is already inside a repository: git add . && git commit"
    name = ("git", "var", "GIT_COMMITTER_IDENT")  # if one of ours helps, only the user's is missing
    if ask(*name) is None and ask(*name, GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a"):
        raise subprocess.SubprocessError(NO_IDENTITY)
    run("git", "init", "--quiet")
    for lock in Path(".git").rglob("*.lock"):  # left by an attempt that was killed
        lock.unlink()
    run("git", "-c", "core.excludesFile=", "add", "--all")  # a global one may name uv.lock
    run("git", "commit", "-q", "--no-gpg-sign", "-m", "First commit")  # it may want a passphrase
    return None


def find_way(hidden: dict[str, str]) -> list[str]:
    """Return commands that enter the project and provide uv, which pyenv has per Python version."""
    way = ["cd " + (f'"{Path.cwd()}"' if os.name == "nt" else shlex.quote(str(Path.cwd())))]
    way += [f"unset {name}" for name in hidden if MISLEADING.match(name)]
    pyenv = Path(os.environ.get("PYENV_ROOT", os.devnull), "versions")
    path = os.pathsep.join(part for part in os.get_exec_path() if pyenv not in Path(part).parents)
    return way if ask("uv", "--version", PATH=path) else [*way, *INSTALL_UV]


def main(answers: dict[str, str]) -> None:
    here, by_cruft = Path.cwd(), "_output_dir" not in answers
    if by_cruft and here.match(f"tmp{'[!-.]' * 8}/*") and here.parents[1].samefile(gettempdir()):
        return  # `cruft update` renders here only to compare
    hidden = {name: os.environ.pop(name) for name in sorted(os.environ) if HIDDEN.match(name)}
    way = find_way(hidden)  # before the steps: after Ctrl-C, Cookiecutter does not wait for this
    setup = "uv run manage.py setup" + (" --local" if answers["database"] == "local" else "")
    commands = {"dependencies": "uv sync --reinstall", "setup": setup, "git": GIT}
    steps: dict[str, Callable[[], str | None]] = {"dependencies": install}
    neon = hidden.get("NEON_DATABASE_URL", "")
    steps["setup"] = lambda: run(UV, *setup.split()[1:], stdin=None, NEON_DATABASE_URL=neon)
    steps |= {} if by_cruft else {"git": commit}  # cruft has yet to write .cruft.json
    print(f"\n{answers['project_name']}, in {here}")
    try:
        for name, step in steps.items():
            if name == "setup" and "dependencies" in commands:
                continue
            start = monotonic()
            try:
                if (why := step()) or name != "setup":  # it shows its own times
                    print(f"- {name}: {why}" if why else f"✓ {name} ({monotonic() - start:.1f} s)")
                del commands[name]
            except Exception as error:  # noqa: BLE001  (keep the project, whatever happens)
                print(f"✗ {name}: {error}\n    again: {commands[name]}")
    except KeyboardInterrupt:
        print("\nStopped. Completed steps are kept. To continue, run the same command with -f.")
    title = "\nTo finish the project, type:\n" if commands else "\nIt is ready. Type:\n"
    print("\n    ".join([title, *way, *commands.values(), "uv run main.py", "uv run pytest"]))


if __name__ == "__main__":
    Path(__file__).unlink()  # Cookiecutter does not delete the rendered hook
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]
    with suppress(BaseException):
        main(json.loads(r"""{{ cookiecutter | tojson }}"""))
    os._exit(0)  # otherwise Cookiecutter would delete the project
