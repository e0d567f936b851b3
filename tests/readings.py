"""What the files of a rendered project say, each read by a parser of its format."""

import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import cmarkgfm
import dockerfile
import yaml
from markdown_it import MarkdownIt
from ruff import find_ruff_bin

Block = tuple[str, str]  # the tag of a block of Markdown, and its plain text

MARKDOWN = MarkdownIt("gfm-like", {"linkify": False})


def read_markdown(text: str) -> list[Block]:
    """Return tag and plain text of each block; what is not text shows as its type."""
    tokens = MARKDOWN.parse(text)
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


class PlainText(HTMLParser):
    """The text of each heading and paragraph in HTML; that of a link belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag in {"h1", "p"}:
            self.blocks.append((tag, ""))

    def handle_data(self, data: str) -> None:
        if self.blocks:
            tag, text = self.blocks[-1]
            self.blocks[-1] = (tag, text + data)


def read_as_on_github(markdown: str) -> list[Block]:
    """Return tag and plain text of headings and paragraphs as GitHub's own parser has them."""
    reader = PlainText()
    reader.feed(cmarkgfm.github_flavored_markdown_to_html(markdown))
    return [(tag, text.strip("\n")) for tag, text in reader.blocks]


def read_dockerfile(text: str) -> list[tuple[str, ...]]:
    """Return the instructions of a Dockerfile: the command, its flags, and what it is given."""
    return [(each.cmd, *each.flags, *each.value) for each in dockerfile.parse_string(text)]


def read_lines(text: str) -> list[str]:
    return text.split("\n")


READERS: dict[str, Callable[[str], Any]] = {
    r".*\.toml": tomllib.loads,
    r".*\.ya?ml": lambda text: list(yaml.safe_load_all(text)),
    r".*\.json": json.loads,
    r".*\.md": read_markdown,
    r"(.*\.)?Dockerfile(\..*)?": read_dockerfile,
}


def read(file: Path) -> Any:
    """Return what a file says: values of its format, or its lines where it has none that we know.

    Raises what the parser of the format raises.
    """
    text = file.read_bytes().decode("utf-8")
    for pattern, reader in READERS.items():
        if re.fullmatch(pattern, file.name):
            return reader(text)
    return read_lines(text)


def has_format(file: Path) -> bool:
    """Tell whether there is a parser for the file: other files cannot hold any text."""
    return any(re.fullmatch(pattern, file.name) for pattern in READERS)


def replace(value: Any, texts: dict[str, str]) -> Any:
    """Replace texts in all strings of a value of TOML, YAML or JSON, or in blocks."""
    match value:
        case str():
            for old, new in texts.items():
                value = value.replace(old, new)
            return value
        case dict():
            return {replace(key, texts): replace(inner, texts) for key, inner in value.items()}
        case list() | tuple():
            return type(value)(replace(inner, texts) for inner in value)
    return value


def files(folder: Path) -> Iterator[str]:
    """Return the names of all files of a project, `/` between folders."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix()


def lint(folder: Path) -> str:
    """Return what ruff says against a project, as linter and as formatter."""
    complaints = ""
    for command in ("check --no-cache", "format --check --no-cache"):
        done = subprocess.run(
            [find_ruff_bin(), *command.split()],
            check=False,
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        complaints += done.stdout + done.stderr if done.returncode else ""
    return complaints
