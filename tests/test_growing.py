"""docs/growing.md of a project, followed exactly as far as its steps are code to write."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from machine import Project
from stage import new_stage
from test_extending import read_steps, take
from visitors import visitors

SECTION = "Partitions"
WRITTEN = ("migrations", "models.py", "routes", "tests/test_plans.py", "tests/test_tasks.py")
# The project's tests that would notice if a request needed more than one table or round trip.
TOUCHED = "test_plans or test_round_trips or test_tasks and put"
ROWS = 1_000_000
FILL = """
INSERT INTO tasks (id, owner_id, title)
SELECT gen_random_uuid(), 'owner ' || number %% 5000, 'Task ' || number
FROM generate_series(1, %s) AS number
"""
A_LIST = "EXPLAIN SELECT * FROM tasks WHERE owner_id = 'owner 1' ORDER BY created_at DESC LIMIT 20"


@pytest.fixture(scope="module")
def partitioned(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A copy of the project with its own database, whose tasks are partitioned."""
    copy = project.copy(tmp_path_factory.mktemp("partitioned") / "project", ".git")
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


@pytest.mark.weekly
def test_tasks_can_be_partitioned_by_owner(partitioned: Project) -> None:
    """Each request still sends one statement, which reads one table by one index."""
    style = partitioned.run("uv", "run", "ruff", "check", *WRITTEN)
    tests = partitioned.run("uv", "run", "pytest", "--quiet", "-k", TOUCHED, "tests")

    assert style.code == 0, style.output
    assert tests.code == 0, tests.output
    assert re.search(r"^\d+ passed", tests.output, re.MULTILINE), tests.output


@pytest.mark.weekly
@pytest.mark.timeout(900)
def test_a_large_table_is_partitioned_under_load(
    project: Project, partitioned: Project, tmp_path: Path
) -> None:
    """Clients get a 503 with Retry-After at worst, and no task is lost."""
    with new_stage(project, tmp_path) as stage:
        stage.ask(FILL, ROWS)
        operator = replace(
            partitioned, environment={**partitioned.environment, "DATABASE_URL": stage.url()}
        )
        with stage.app("before") as app:
            token = app.register()
            with visitors(app, token) as crowd:
                begun = time.monotonic()
                command = ("uv", "run", "manage.py", "migrate", "--timeout", "3600")
                outcome = operator.run(*command, seconds=800)
                seconds = time.monotonic() - begun
                meanwhile = len(crowd.visits)
            refused = len(crowd.refusals())
        print(f"{ROWS:,} tasks in {seconds:.0f} s; of {meanwhile} requests, {refused} got a 503")
        assert outcome.code == 0, outcome.output
        assert crowd.faults() == []
        assert stage.ask("SELECT count(*) FROM tasks") == [(ROWS + len(crowd.titles),)]
        plan = "\n".join(str(line) for (line,) in stage.ask(A_LIST))
        assert len(set(re.findall(r"\btasks_\d+\b", plan))) == 1, plan
        with replace(stage, project=partitioned).app("after") as app:
            with visitors(app, token) as crowd:
                crowd.wait_until_well(time.monotonic())
            assert crowd.faults() == []
            assert crowd.refusals() == []
