"""Documentation of the template and of a project: links, and what must match the code."""

import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from tools.findings import PAGE, with_table

from machine import Project
from repository import REPOSITORY

README_LINES = 130


def inline(page: Path) -> list[Token]:
    """Return all inline elements: text, links, pictures, code."""
    blocks = MarkdownIt().enable("table").parse(page.read_text("utf-8"))
    return [token for block in blocks for token in block.children or ()]


def targets(page: Path) -> list[str]:
    """Return the targets of links and pictures in a page, except those on other sites."""
    found = [str(token.attrs.get("href") or token.attrs.get("src") or "") for token in inline(page)]
    return [unquote(target) for target in found if target and not re.match(r"\w+:", target)]


def pictures(page: Path) -> dict[str, str]:
    """Return the targets of the pictures in a page, and the texts that stand for them."""
    images = [token for token in inline(page) if token.type == "image"]
    return {unquote(str(image.attrs["src"])): image.content for image in images}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    tokens = MarkdownIt().parse(page.read_text("utf-8"))
    headings = [text.content for token, text in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_broken(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    return not file.exists() or (bool(anchor) and anchor not in anchors(file))


@pytest.fixture(scope="module")
def pages(project: Project) -> list[Path]:
    names = (".", "docs", "docs/decisions", "bench/results")
    folders = [*(REPOSITORY / name for name in names), project.path, project.path / "docs"]
    return [page for folder in folders for page in folder.glob("*.md")]


def test_no_link_is_broken(pages: list[Path]) -> None:
    links = [(page, target) for page in pages for target in targets(page)]

    assert len(links) > 50
    assert [f"{page.name}: {target}" for page, target in links if is_broken(page, target)] == []


def test_every_picture_is_shown_by_a_page(pages: list[Path]) -> None:
    shown = {(page.parent / target).resolve() for page in pages for target in pictures(page)}
    drawn = list((REPOSITORY / "docs" / "pictures").iterdir())

    assert len(drawn) > 5
    assert [picture.name for picture in drawn if picture not in shown] == []


def test_every_picture_has_a_text_for_those_who_cannot_see_it(pages: list[Path]) -> None:
    texts = {target: text for page in pages for target, text in pictures(page).items()}

    assert len(texts) > 5
    assert [target for target, text in texts.items() if not text] == []


def test_every_page_of_a_project_is_linked_from_its_readme(project: Project) -> None:
    linked = {(project.path / target).resolve() for target in targets(project.path / "README.md")}

    assert [page.name for page in project.path.glob("docs/*.md") if page not in linked] == []


def test_the_readme_of_a_project_is_short(project: Project) -> None:
    assert len(project.read("README.md").splitlines()) <= README_LINES


def test_what_the_map_of_a_project_names_is_there(project: Project) -> None:
    found = re.findall(r"((?:`\w+`(?: and )?)+) in `([\w/]*\.\w+)`", project.read("AGENTS.md"))
    places = [(name, file) for names, file in found for name in re.findall(r"\w{4,}", names)]

    assert len(places) > 8
    assert [place for place in places if place[0] not in project.read(place[1])] == []


def test_the_findings_page_matches_the_code() -> None:
    page = PAGE.read_text("utf-8")

    assert with_table(page) == page, "type: uv run python -m tools.findings"
