"""Compile the packages of generated projects once, not in each environment.

uv fills an environment with hard links to its cache, and links all files that it finds there.
Bytecode beside them is valid in every environment: the modules have the same size and time.
"""

from contextlib import suppress
from pathlib import Path

from machine import Project, ask_uv


def give_bytecode_to_uv(project: Project) -> None:
    """Add the bytecode of a project's packages to uv's cache, for packages hard-linked from it."""
    cache = Path(ask_uv("cache", "dir"))
    cached = {identity(file): file for file in cache.glob("archive-*/*/*.dist-info/METADATA")}
    for metadata in project.path.glob(".venv/lib/python*/site-packages/*.dist-info/METADATA"):
        if found := cached.get(identity(metadata)):
            give(metadata.parent.parent, found.parent.parent, metadata.with_name("RECORD"))


def identity(file: Path) -> tuple[int, int]:
    """Return what all hard links to a file have in common."""
    status = file.lstat()
    return status.st_dev, status.st_ino


def give(packages: Path, archive: Path, record: Path) -> None:
    """Link the bytecode of one distribution from an environment into its archive.

    record: the distribution's list of files.
    """
    for line in record.read_text("utf-8").splitlines():
        name = line.partition(",")[0]
        if name.endswith(".py") and not name.startswith(".."):
            module = packages / name
            for bytecode in module.parent.glob(f"__pycache__/{module.stem}.*.pyc"):
                link = archive / bytecode.relative_to(packages)
                link.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):  # from an earlier run, or one at the same time
                    link.hardlink_to(bytecode)
