"""docs/growing.md of a project, followed exactly as far as its steps are code to write."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest

from machine import Project
from test_extending import read_steps, take

SECTION = "Partitions"
WRITTEN = ("migrations", "models.py", "routes", "tests/test_plans.py", "tests/test_tasks.py")
# The project's tests that would notice if a request needed more than one table or round trip.
TOUCHED = "test_plans or test_round_trips or test_tasks and put"


@pytest.fixture(scope="module")
def partitioned(compiled: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A copy of the project with its own database, whose tasks are partitioned."""
    folder = tmp_path_factory.mktemp("partitioned") / "project"
    ignored = shutil.ignore_patterns(".git", ".postgres", ".venv")
    shutil.copytree(compiled.path, folder, ignore=ignored)
    copy = replace(compiled, path=folder)
    assert copy.run("uv", "run", "manage.py", "env", "--local").code == 0
    try:
        steps = [
            step for step in read_steps(copy.read("docs/growing.md")) if step.section == SECTION
        ]
        assert len(steps) == 8
        for step in steps:
            take(step, copy)
        yield copy
    finally:
        copy.run("uv", "run", "manage.py", "postgres", "stop")


def test_tasks_can_be_partitioned_by_owner(partitioned: Project) -> None:
    """Each request still sends one statement, which reads one table by one index."""
    style = partitioned.run("uv", "run", "ruff", "check", *WRITTEN)
    tests = partitioned.run("uv", "run", "pytest", "--quiet", "-n", "2", "-k", TOUCHED, "tests")

    assert style.code == 0, style.output
    assert tests.code == 0, tests.output
    assert re.search(r"^\d+ passed", tests.output, re.MULTILINE), tests.output
