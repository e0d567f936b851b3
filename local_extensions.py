"""Check each answer at its question. Cookiecutter loads this file and renders `__checked_…`."""

import difflib
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import click
from cookiecutter.config import get_user_config
from cookiecutter.prompt import read_user_variable
from jinja2 import Environment
from jinja2.ext import Extension

Answers = MutableMapping[str, Any]


# The hook applies the same rules, also to answers from a replay file.
rules = SimpleNamespace(**run_path(str(Path(__file__).parent / "hooks" / "pre_gen_project.py")))

*_, LAST = rules.RULES  # in the order of the questions


class AnswerChecks(Extension):
    """Adds `ready()` and the `checked` filter to the templates in cookiecutter.json."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        environment.globals["ready"] = ready
        environment.filters["checked"] = checked


def ready() -> str:
    """Exit before the first question if a project cannot be set up. Returns an empty string."""
    command = click.get_current_context(silent=True)
    problems = list(find_mistakes(command.params)) if command else []
    if problem := rules.find_uv_problem():
        problems = [problem]
    if problems:
        raise SystemExit("\n".join(problems))
    return ""


def find_mistakes(options: dict[str, Any]) -> Iterator[str]:
    """Yield mistakes that Cookiecutter ignores, or reports as a traceback after the questions."""
    for name in options.get("extra_context") or ():
        if name not in rules.RULES:
            near = difflib.get_close_matches(name, rules.RULES, n=1)
            advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(rules.RULES)}"
            # Do not show a connection string: "?sslmode=" turns it into a name and a value.
            shown = name if name.isidentifier() and name.isascii() else "an argument"
            yield f"{shown} is not one of the answers: {advice}"
    config = get_user_config(options.get("config_file"), options.get("default_config") or False)
    place = Path(config["replay_dir"])
    while not place.exists() and place != place.parent:
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        yield (
            f"{config['replay_dir']} is not writable, and cookiecutter saves answers there:"
            " type `export HOME=FOLDER` with a folder of yours, then the same command again"
        )


def checked(answers: Answers, name: str) -> str:
    """Ask again until the answer is valid. With --no-input, exit and list all problems."""
    command = click.get_current_context(silent=True)
    if command is None or command.params.get("no_input", True):
        problems = rules.find_problems(answers) if name == LAST else []
        if problems:
            raise SystemExit("\n".join([*problems, "Nothing was created."]))
        return ""
    while problem := rules.find_problem(answers, name):
        answers[name] = read_user_variable(name, ..., {name: f"        {problem}"})
    return ""
