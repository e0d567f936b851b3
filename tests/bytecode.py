"""Compile the packages of generated projects once, not in each environment.

uv fills an environment with hard links to its cache, and links all files that it finds there.
Bytecode beside them is valid in every environment: the modules have the same size and time.
"""

from pathlib import Path

from machine import Project, ask_uv


def give_bytecode_to_uv(project: Project) -> None:
    """Put the bytecode of a project's packages into uv's cache, as far as they are links to it."""
    cache = Path(ask_uv("cache", "dir"))
    cached = {metadata.stat().st_ino: metadata for metadata in cache.glob("archive-*/*/*/METADATA")}
    environment = project.python.parent.parent
    for metadata in environment.glob("**/site-packages/*.dist-info/METADATA"):
        if found := cached.get(metadata.stat().st_ino):
            give(metadata.parent.parent, found.parent.parent, metadata.with_name("RECORD"))


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
                link.parent.mkdir(exist_ok=True)
                if not link.exists():
                    link.hardlink_to(bytecode)
