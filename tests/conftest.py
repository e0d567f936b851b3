"""Shared fixtures: the template as git would distribute it, and isolated machines."""

import os
import shutil
import signal
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from bytecode import give_bytecode_to_uv
from machine import UVX, Machine, Outcome, Project, new_machine
from postgres_server import Server, postgres_server
from repository import REPOSITORY

# A background job of a shell ignores Ctrl-C, and the programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Accepted reasons for skipping a test. In CI, where everything that tests need is installed, any
# other reason is a failure.
EXCUSES = {
    "a Python 3.14 is installed here",
    "no Python 3.14 is installed here",
    "is about root on Linux",
    "mounts a disk",
    "sends POSIX signals",
    "the history of this clone does not reach back to 0.1.0",
}

# The files that take longest, in the order in which they start. The others follow, so that no
# worker is left with a long file at the end. Those that wait run beside those that use all cores.
LONG_FILES = [
    "test_neon",
    "test_hostile_answers",  # these two generate other projects, while test_neon compiles
    "test_surroundings",
    "test_default_answers",
    "test_frontend",
    "test_faults",
    "test_accounts_taken_out",
    "test_pgbouncer",
    "test_cluster",
    "test_better_auth",
    "test_api_contract",
    "test_secrets",
    "test_bench",
    "test_failures",
    "test_extending",
    "test_page",
    "test_interrupting",
    "test_telemetry",
    "test_life",
]

# The thousands of clients of the last one need the processors. The two before it mostly wait.
LAST_FILES = ["test_container", "test_local_postgres", "test_overload"]

# The files of `pytest -m quick`: answers, rendered files, workflows, documentation.
QUICK_FILES = {"test_answers", "test_documentation", "test_prompts", "test_rendering"}
QUICK_FILES |= {"test_workflows"}


@pytest.hookimpl(tryfirst=True)  # before -m picks tests by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first: with --no-loadscope-reorder, xdist keeps this order."""
    order = {name: number for number, name in enumerate(LONG_FILES)}
    order |= {name: len(LONG_FILES) + number for number, name in enumerate(LAST_FILES, 1)}
    for item in items:
        if item.path.stem in QUICK_FILES:
            item.add_marker("quick")
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG_FILES)))


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers: one more than cores, because tests wait a third of the time."""
    return min((os.cpu_count() or 1) + 1, 4)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if os.environ.get("CI") and report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason not in EXCUSES:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} must not be skipped in CI ({call.when}): {reason}"
    return report


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that all xdist workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def mypy_lock(shared: Path) -> Iterator[FileLock]:
    """Let all projects share one mypy cache. Hold this lock while mypy runs.

    The first check fills the cache and takes ten times as long as later ones. mypy compares
    packages by hash, so the cache serves every environment.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPY_CACHE_DIR", str(shared / "types"))
        yield FileLock(shared / "types.lock", timeout=240)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as git would distribute it. Caches in the working tree would be rendered too."""
    copy = tmp_path_factory.mktemp("template")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listing, check=True, cwd=REPOSITORY, capture_output=True, text=True)
    for name in filter(None, done.stdout.split("\0")):
        if (REPOSITORY / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def bare_template(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template without the post_gen_project hook: it only renders."""
    copy = tmp_path_factory.mktemp("bare") / "template"
    return shutil.copytree(template, copy, ignore=shutil.ignore_patterns("post_gen_project.py"))


@pytest.fixture
def machine(tmp_path: Path, template: Path) -> Iterator[Machine]:
    with new_machine(tmp_path / "machine", template) as machine:
        yield machine


@pytest.fixture
def offline(machine: Machine) -> Machine:
    """A machine without network or cache, where generating a project takes a second."""
    machine.go_offline()
    return machine


@pytest.fixture(scope="session")
def generated(
    template: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcome]:
    """The outcome of the README's command with the default answers; its tests are compiled.

    The first process puts the packages' bytecode into uv's cache. The others wait for that.
    """
    marker = shared / "bytecode-is-cached"
    with new_machine(tmp_path_factory.mktemp("default") / "machine", template) as machine:

        def generate() -> Outcome:
            # A terminal does not set UV: uvx does.
            outcome = machine.generate(program=(UVX, "cookiecutter"), UV=None)
            assert outcome.code == 0, outcome.output
            compile_tests(outcome.project)
            return outcome

        with FileLock(shared / "bytecode.lock", timeout=240):
            outcome = None
            if not marker.exists():
                outcome = generate()
                give_bytecode_to_uv(outcome.project)
                marker.touch()
        yield outcome or generate()


def compile_tests(project: Project) -> None:
    """Compile the tests once, for this project and its copies: each pytest process would do it."""
    command = (str(project.python), "-m", "pytest", "-n0", "--quiet", "--collect-only")
    outcome = project.run(*command, "-p", "no:cacheprovider")
    assert outcome.code == 0, outcome.output


@pytest.fixture(scope="session")
def project(generated: Outcome) -> Project:
    return generated.project


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A PostgreSQL server with TLS, like a provider's."""
    with postgres_server(tls=True) as server:
        yield server
