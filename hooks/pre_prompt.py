"""Before the first question: can a project be set up from here at all? Not rendered."""

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

OLDEST = (0, 5, 0)  # knows dependency groups and their includes
INSTALL = "python3 -m pip install --upgrade uv"
# Cookiecutter's options that are followed by a value. Short ones may come bundled, as in -fo.
WITH_VALUE = "--checkout|--directory|--output-dir|--replay-file|--config-file|--debug-file"
WITH_VALUE += "|--accept-hooks|-[a-zA-Z]*[co]"


def find_problem(uv: str | None) -> str | None:
    """Tell what keeps this uv from being used, None when nothing does."""
    if uv is None:
        return "uv is missing"
    # It has no need of the connection string that the last hook takes.
    variables = {name: os.environ[name] for name in os.environ if name != "NEON_DATABASE_URL"}
    try:
        done = subprocess.run(
            [uv, "--version"],
            check=False,
            env=variables,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"uv does not start ({uv}: {type(error).__name__})"
    version = re.match(r"uv (\d+)\.(\d+)\.(\d+)", done.stdout)
    if done.returncode or not version:
        return f"uv does not work in this folder ({uv})"
    if tuple(map(int, version.groups())) < OLDEST:
        return f"{version[0]} is too old, {'.'.join(map(str, OLDEST))} is needed"
    return None


def is_home_closed(words: list[str]) -> bool:
    """Tell whether cookiecutter will fail, after all questions, to note the answers in the home."""
    # A configuration may name another place.
    options = (word.partition("=")[0] for word in words)
    if "COOKIECUTTER_CONFIG" in os.environ or "--config-file" in options:
        return False
    place = Path(os.path.expanduser("~/.cookiecutter_replay"))  # noqa: PTH111  (never raises)
    while not place.exists() and place != place.parent:
        place = place.parent
    return not (place.is_dir() and os.access(place, os.W_OK))


def read_command_line() -> list[str]:
    """Return the words of the command that runs this hook; none where the system tells them not."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:  # only Linux tells them word by word
        return []
    return words.rstrip("\0").split("\0")


def find_answers(words: list[str]) -> Iterator[tuple[str, str]]:
    """Find the names and values of answers in a command such as `cookiecutter PLACE name=value`."""
    programs = [Path(word).stem for word in words[:3]]
    if "cookiecutter" not in programs:
        return
    rest = iter(words[programs.index("cookiecutter") + 1 :])
    places = []
    for word in rest:
        if re.fullmatch(WITH_VALUE, word):
            next(rest, None)
        elif not word.startswith("-"):
            places.append(word)
    for word in places[1:]:
        name, _, value = word.partition("=")
        yield name, value


def read_questions() -> dict[str, str | list[str]]:
    """Return the answers that are asked for, with their defaults or choices."""
    template = json.loads(Path("cookiecutter.json").read_text("utf-8"))
    return {name: default for name, default in template.items() if name[0] != "_"}


def find_mistakes(words: list[str], questions: dict[str, str | list[str]]) -> Iterator[str]:
    """Tell which answers cookiecutter would leave out without a word, or meet with a traceback."""
    for name, value in find_answers(words):
        choices = questions.get(name, "")
        if name not in questions:
            near = difflib.get_close_matches(name, questions, n=1)
            advice = f"did you mean {near[0]}?" if near else f"they are {', '.join(questions)}"
            # A connection string, as its "?sslmode=" makes a name of it, is not shown.
            shown = name if re.fullmatch(r"\w+", name, re.ASCII) else "one word"
            yield f"{shown} is not one of the answers: {advice}"
        elif isinstance(choices, list) and value not in choices:
            yield f"{name} takes one of these: {', '.join(choices)}"


def remove_copy() -> None:
    """Remove the copy of the template that this hook works in: cookiecutter does so on success."""
    copy = Path.cwd().parent
    is_in_temp = copy.parent == Path(tempfile.gettempdir()).resolve()
    if is_in_temp and re.fullmatch(r"cookiecutter\w{8}", copy.name):
        shutil.rmtree(copy, ignore_errors=True)


def main() -> None:
    if problem := find_problem(os.environ.get("UV") or shutil.which("uv")):
        remove_copy()
        sys.exit(f"{problem}: type `{INSTALL}`, then the same command again")
    words = read_command_line()
    if is_home_closed(words):
        remove_copy()
        sys.exit(
            f"{Path.home()} cannot be written to, and cookiecutter notes the answers there: type "
            "`export HOME=FOLDER` with a folder of yours, then the same command again"
        )
    if mistakes := list(find_mistakes(words, read_questions())):
        remove_copy()
        sys.exit("\n".join(mistakes))


if __name__ == "__main__":
    main()
