"""The workflows of the template and of a project: sound by their schema, and by zizmor's audits."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from machine import COOKIECUTTER, new_machine

PROGRAMS = Path(sys.executable).parent
SCHEMAS = {"workflows": "vendor.github-workflows", "dependabot.yml": "vendor.dependabot"}


@pytest.fixture(scope="module", params=["template", "project"])
def folder(
    request: pytest.FixtureRequest,
    template: Path,
    bare_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """The folder `.github` of the template, and of a project."""
    if request.param == "template":
        yield template / ".github"
        return
    with new_machine(tmp_path_factory.mktemp("project") / "machine", bare_template) as machine:
        outcome = machine.generate(program=COOKIECUTTER)
        assert outcome.code == 0, outcome.output
        yield outcome.project.path / ".github"


def audit(folder: Path) -> subprocess.CompletedProcess[str]:
    zizmor = str(PROGRAMS / "zizmor")
    command = [zizmor, "--offline", "--no-progress", str(folder)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_zizmor_finds_nothing(folder: Path) -> None:
    done = audit(folder)

    assert done.returncode == 0, done.stdout + done.stderr


def test_zizmor_would_find_an_action_that_is_not_pinned(folder: Path, tmp_path: Path) -> None:
    loose = shutil.copytree(folder, tmp_path / ".github")
    for workflow in (loose / "workflows").iterdir():
        text = workflow.read_text("utf-8")
        workflow.write_text(re.sub("(uses: .*)@.*", r"\1@v1", text), "utf-8")

    done = audit(loose)

    assert "unpinned-uses" in done.stdout


def test_workflows_fit_their_schema(folder: Path) -> None:
    for name, schema in SCHEMAS.items():
        place = folder / name
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        done = subprocess.run(
            [str(PROGRAMS / "check-jsonschema"), "--builtin-schema", schema, *map(str, files)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )

        assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_stands_beside_each_hash(folder: Path) -> None:
    workflows = (folder / "workflows").glob("*.yml")

    actions = [
        action
        for workflow in workflows
        for action in re.findall(r"uses: (?!\./)(.*)", workflow.read_text("utf-8"))
    ]

    assert actions
    assert [a for a in actions if not re.fullmatch(r"\S+@[0-9a-f]{40} # v?\d+\.\d+\.\d+", a)] == []


def test_actions_and_packages_are_kept_up_to_date_after_a_week(folder: Path) -> None:
    text = (folder / "dependabot.yml").read_text("utf-8")

    updates = text.split("- package-ecosystem: ")[1:]

    assert {"github-actions", "uv"} <= {update.partition("\n")[0] for update in updates}
    assert all("default-days: 7" in update for update in updates)


def workflows(folder: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load(file.read_text("utf-8")) for file in (folder / "workflows").iterdir()]


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: job for workflow in workflows(folder) for name, job in workflow["jobs"].items()}


def test_no_secret_is_there_where_uv_runs(folder: Path) -> None:
    assert not [
        workflow for workflow in workflows(folder) if "secrets." in str(workflow.get("env"))
    ]
    for job in jobs(folder).values():
        assert "secrets." not in str(job.get("env"))
        for step in job["steps"]:
            uses_uv = "uv" in step.get("run", "").split() or "setup-uv" in step.get("uses", "")
            assert not (uses_uv and "secrets." in str(step)), step


def test_uv_is_the_one_of_the_image_and_keeps_to_the_lock(
    folder: Path, template: Path, tmp_path: Path
) -> None:
    (dockerfile,) = template.glob("{{*/Dockerfile")
    (version,) = re.findall(r"^FROM \S+/uv:([\d.]+)@", dockerfile.read_text("utf-8"), re.MULTILINE)
    installing = jobs(folder)
    installing.pop("delete", None)  # calls Neon only
    installing.pop("project", None)  # meets the newest of everything
    for job in installing.values():
        steps = job["steps"]
        assert not any("pip install" in step.get("run", "") for step in steps)
        (found,) = [step["with"]["version"] for step in steps if "setup-uv" in step.get("uses", "")]
        if found != version:  # a project reads it from its Dockerfile
            assert job["env"]["UV_LOCKED"] == "1"
            assert found == "${{ steps.uv.outputs.version }}"
            (command,) = [step["run"] for step in steps if step.get("id") == "uv"]
            output = tmp_path / "output"
            output.unlink(missing_ok=True)
            subprocess.run(
                ["bash", "-e", "-c", command],
                check=True,
                cwd=folder.parent,
                env={"PATH": os.environ["PATH"], "GITHUB_OUTPUT": str(output)},
                timeout=60,
            )
            assert output.read_text("utf-8") == f"version={version}\n"
