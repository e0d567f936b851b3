"""What clients notice when parts of a cluster are replaced, fail or change, under load."""

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import processes
from cluster import CLIENTS, STOP_SECONDS, Cluster, cluster
from machine import Project
from stage import new_stage
from visitors import RECOVERY_SECONDS, wait_for

REVISION = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"


def upgrade() -> None:
    op.add_column("tasks", sa.Column("note", sa.String()))
    with op.get_context().autocommit_block():
        op.create_index("ix_tasks_note", "tasks", ["note"], postgresql_concurrently=True)
"""


@pytest.fixture(scope="module")
def running(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with new_stage(project, tmp_path_factory.mktemp("stage")) as stage, cluster(stage) as running:
        yield running


@pytest.fixture
def token(running: Cluster) -> str:
    """The access token of a user without tasks."""
    return running.front.register()


def titles(running: Cluster, token: str) -> list[str]:
    """Return the titles of the user's tasks, from the database."""
    user = running.front.request("GET", "/auth/me", token=token).body
    rows = running.stage.ask("SELECT title FROM tasks WHERE owner_id = %s", user["id"])
    return sorted(str(title) for (title,) in rows)


def test_a_rolling_restart_loses_no_request(running: Cluster, token: str) -> None:
    codes = []
    with running.crowd(token) as crowd:
        for member in list(running.members):
            codes.append(member.stop(STOP_SECONDS))
            with crowd.calm():
                running.replace(member)
            crowd.wait_for_more()

    assert set(codes) <= {0, -signal.SIGTERM}
    assert crowd.failures == []
    assert crowd.refusals == []
    assert titles(running, token) == sorted(crowd.titles)  # none is lost, and none is there twice


def test_a_process_that_is_killed_fails_only_what_it_had_begun(
    running: Cluster, token: str
) -> None:
    victim = running.members[0]
    address = f"127.0.0.1:{victim.port}"
    with running.crowd(token) as crowd:
        with processes.frozen(victim.process.pid):
            time.sleep(0.1)  # some requests are under way
            victim.kill()
        crowd.wait_for_more()
        with crowd.calm():
            running.replace(victim)
        before = crowd.served[address]
        while crowd.served[address] == before:
            crowd.wait_for_more(CLIENTS)

    assert {failure.by for failure in crowd.failures} <= {address}
    repeatable = [failure for failure in crowd.failures if failure.method == "GET"]
    assert all("IncompleteRead" in failure.reason for failure in repeatable)  # half a response
    clients = [failure.client for failure in crowd.failures]
    assert len(clients) == len(set(clients))  # the next request of each went to another process
    assert set(crowd.titles) <= set(titles(running, token))


def test_lists_come_from_the_primary_while_the_replica_is_away(
    running: Cluster, token: str
) -> None:
    earlier = [len(lines) for lines in running.told_of_replica()]

    def told() -> list[list[tuple[str, str]]]:
        found = zip(running.told_of_replica(), earlier, strict=True)
        return [lines[number:] for lines, number in found]

    def latest() -> set[str]:
        return {lines[-1][0] if lines else "" for lines in told()}

    with running.crowd(token) as crowd:
        with_replica = running.replica_statements()
        running.replica.stop()
        wait_for(lambda: latest() == {"replica lost"}, seconds=RECOVERY_SECONDS)
        crowd.wait_for_more()
        without = running.replica_statements()
        crowd.wait_for_more()
        more_without = running.replica_statements() - without
        running.replica.start()
        wait_for(lambda: latest() == {"replica back"}, seconds=RECOVERY_SECONDS)
        again = running.replica_statements()
        crowd.wait_for_more()
        more_again = running.replica_statements() - again

    assert with_replica > 0
    assert more_without == 0
    assert more_again > CLIENTS
    for lines in told():
        assert all(line != following for line, following in pairwise(lines))  # each change once
    assert crowd.failures == []
    assert crowd.refusals == []


def test_a_migration_under_load_fails_no_request(
    running: Cluster, token: str, tmp_path: Path
) -> None:
    project, stage = running.stage.project, running.stage
    leave_out = shutil.ignore_patterns(".venv", ".postgres", ".git")
    changed = replace(
        project, path=shutil.copytree(project.path, tmp_path / "next", ignore=leave_out)
    )
    ((head,),) = stage.ask("SELECT version_num FROM alembic_version")
    revision = changed.path / "migrations" / "versions" / "9999_add_note.py"
    revision.write_text(REVISION.format(head=head), "utf-8")

    with running.crowd(token) as crowd:
        outcome = stage.migrate(changed)
        crowd.wait_for_more()

    assert outcome.code == 0, outcome.output
    index = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_tasks_note'::regclass"
    assert stage.ask(index) == [(True,)]
    assert crowd.failures == []
    assert titles(running, token) == sorted(crowd.titles)
