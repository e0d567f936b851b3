"""What the files of a project look like, whatever the answers."""

import re
import tomllib
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from pytest_cookies.plugin import Cookies

PYTHONS = ["3.13", "3.14"]
HOSTILE = [
    "O'Brien",
    'say "hi"',
    'say """hi"""',
    "back\\slash\\",
    "C:\\new\\table",
    "{{ 7 * 7 }} {% raw %}",
    "${HOME} $(id) %(here)s",
    "'; import os; x='",
    "[link](https://example.com) <b>bold</b> &amp; `code`",
    "# no heading, *nor* _emphasis_ ~~at~~ all #",
    "- no list",
    "+ no list",
    "1. no list",
    "12) no list",
    "---",
    "===",
    "> no quotation",
    "a | b",
    "!important",
    "👩‍💻 family 👨‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "תזכורות שלי",
    "مهامي",
    "可愛い",
    "می‌خواهم",
]

Bake = Callable[..., Path]


@pytest.fixture(scope="module")
def bake(cookies_session: Cookies, bare_template: Path) -> Bake:
    """Render a project with some answers."""

    def bake(**answers: str) -> Path:
        # On the command line answers are templates, typed ones are not.
        raw = {name: f"{{% raw %}}{text}{{% endraw %}}" for name, text in answers.items()}
        raw |= {name: answers[name] for name in ("python_version", "database") if name in answers}
        result = cookies_session.bake(extra_context=raw, template=str(bare_template))
        assert result.exception is None
        path: Path = result.project_path
        return path

    return bake


@pytest.fixture(scope="module", params=PYTHONS)
def rendered(request: pytest.FixtureRequest, bake: Bake) -> tuple[str, Path]:
    """A project for each Python."""
    return request.param, bake(python_version=request.param, project_slug=f"on-{request.param[2:]}")


@pytest.fixture(scope="module")
def path(rendered: tuple[str, Path]) -> Path:
    return rendered[1]


def texts(path: Path) -> Iterable[tuple[str, str]]:
    """Return the names and texts of all files."""
    files = [file for file in path.glob("**/*") if file.is_file()]
    assert len(files) > 20
    return [(str(file.relative_to(path)), file.read_bytes().decode("utf-8")) for file in files]


def test_nothing_of_the_template_language_is_left(path: Path) -> None:
    # ${{ … }} is GitHub's; Python files are copied as they are, and may hold braces.
    jinja = re.compile(r"\{%|\{#|(?<!\$)\{\{")

    assert [
        name
        for name, text in texts(path)
        if "cookiecutter" in text or (not name.endswith((".py", ".mako")) and jinja.search(text))
    ] == []


def test_no_line_ends_in_white_space(path: Path) -> None:
    assert [name for name, text in texts(path) if re.search(r"[^\S\n]$", text, re.MULTILINE)] == []


def test_every_file_ends_with_one_line_end(path: Path) -> None:
    assert [name for name, text in texts(path) if text and not re.search(r"\S\n\Z", text)] == []


def test_no_blank_line_is_doubled(path: Path) -> None:
    def too_many(name: str) -> str:
        python = name.endswith((".py", ".py.mako"))
        return "\n\n\n\n" if python else "\n\n\n"  # PEP 8 wants two

    assert [name for name, text in texts(path) if too_many(name) in text] == []


def test_no_file_begins_with_a_blank_line(path: Path) -> None:
    assert [name for name, text in texts(path) if text.startswith("\n")] == []


def test_the_python_version_is_the_one_that_was_chosen(rendered: tuple[str, Path]) -> None:
    version, path = rendered
    pyproject = tomllib.loads((path / "pyproject.toml").read_text("utf-8"))

    assert (path / ".python-version").read_text("utf-8") == f"{version}\n"
    assert pyproject["project"]["requires-python"] == f">={version}"


@pytest.mark.parametrize("text", HOSTILE)
def test_every_name_comes_out_as_it_was_typed(bake: Bake, text: str) -> None:
    path = bake(project_name=text, project_slug="hostile", description=text)

    pyproject = tomllib.loads((path / "pyproject.toml").read_text("utf-8"))
    assert pyproject["tool"]["todo"]["title"] == text
    assert pyproject["project"]["description"] == text
    assert read_markdown(path / "README.md")[:2] == [("h1", text), ("p", text)]


def read_markdown(file: Path) -> list[tuple[str, str]]:
    """Return tag and plain text of each block; what is not text shows as its type."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(file.read_text("utf-8"))
    return [
        (
            before.tag,
            "".join(
                child.content if child.type.startswith("text") else f"<{child.type}>"
                for child in token.children or ()
            ),
        )
        for before, token in pairwise(tokens)
        if token.type == "inline"
    ]
