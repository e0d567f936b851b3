"""Read the files of a rendered project, each with a parser for its format."""

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
    """Return tag and plain text of each block. Other inline elements appear as their type."""
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
    """The text of each heading and paragraph in HTML, including the text of links."""

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
    """Return tag and plain text of headings and paragraphs according to GitHub's parser."""
    reader = PlainText()
    reader.feed(cmarkgfm.github_flavored_markdown_to_html(markdown))
    return [(tag, text.strip("\n")) for tag, text in reader.blocks]


def read_dockerfile(text: str) -> list[tuple[str, ...]]:
    """Return the instructions of a Dockerfile: command, flags and arguments."""
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
    """Return the parsed content of a file, or its lines if there is no parser for its format.

    Raises the parser's exceptions.
    """
    text = file.read_bytes().decode("utf-8")
    for pattern, reader in READERS.items():
        if re.fullmatch(pattern, file.name):
            return reader(text)
    return read_lines(text)


def has_format(file: Path) -> bool:
    """Return whether there is a parser for the file. Other files cannot contain arbitrary text."""
    return any(re.fullmatch(pattern, file.name) for pattern in READERS)


def replace(value: Any, texts: dict[str, str]) -> Any:
    """Replace texts in all strings of a parsed value."""
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
    """Return the paths of all files of a project, with `/` as separator."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix()


def lint(folder: Path) -> str:
    """Return the complaints of ruff about a project, as linter and as formatter."""
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
