"""Which module may import which: infrastructure does not know the app, and has a narrow door."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import postgres
from config import PROJECT_DIR

POSTGRES = PROJECT_DIR / "postgres"
APP = {
    path.stem
    for path in PROJECT_DIR.iterdir()
    if path.suffix == ".py" or (path.is_dir() and path.name.isidentifier())
} - {"postgres"}


def modules(folder: Path) -> Iterator[Path]:
    """Yield the project's own Python files: none is in a hidden folder, or behind a link."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.suffix == ".py":
            yield path
        elif path.is_dir():
            yield from modules(path)


def imports(path: Path) -> set[str]:
    """Return what a file imports, as `module` and `module.name`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write the whole name of the module"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_module(name: str) -> bool:
    path = PROJECT_DIR.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def door() -> set[str]:
    """Return the modules that the docstring of `postgres` lists."""
    lists = re.findall(r"^- ([a-z_., ]+):", postgres.__doc__ or "", re.MULTILINE)
    return {f"postgres.{name}" for names in lists for name in names.split(", ")}


def test_postgres_imports_nothing_of_the_app() -> None:
    found = {
        (str(path.relative_to(PROJECT_DIR)), name)
        for path in modules(POSTGRES)
        for name in imports(path)
        if name.partition(".")[0] in APP
    }

    assert {"main", "config", "routes", "migrations", "tests"} <= APP
    assert found == set()


def test_the_app_imports_from_postgres_what_its_docstring_lists() -> None:
    allowed = door()

    found = {
        (str(path.relative_to(PROJECT_DIR)), name)
        for path in modules(PROJECT_DIR)
        if POSTGRES not in path.parents
        for name in imports(path)
        if name.startswith("postgres.")
        and name not in allowed
        and name.rpartition(".")[0] not in allowed
    }

    assert all(is_module(name) for name in allowed)
    assert found == set()
