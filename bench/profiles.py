"""Profile list, get and create requests with py-spy.

Only one Python thread runs at a time: the one that holds the global interpreter lock (GIL). Each
sample looks at that thread. C code that releases the lock, such as libpq while it waits for the
database, appears in no sample, and does not block other requests.
"""

import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from .load import Run, require_wrk, send
from .measure import Display, measure_once, prepared, warm_up
from .plan import Cell, Plan
from .processes import App, BenchError, run
from .project import generate
from .report import table
from .subjects import World

OPERATIONS = ("list", "get", "create")
CLIENTS = 16
ROUNDS, ROUND_SECONDS = 3, 3  # without py-spy, for the CPU time per response
SAMPLED_SECONDS = 20
SAMPLES_A_SECOND = 97  # a prime, so that no periodic work runs in step with it
NOW = "now"

FRAMEWORK, OURS = "FastAPI and Starlette", "our routes and dependencies"
STATEMENTS = "our database modules"
LOOP, THREADS, CHECKS = "uvicorn and the event loop", "threads", "validation and JSON"
ORM, DRIVER, LOGS = "SQLAlchemy", "psycopg2", "logs"
PARTS = (LOOP, FRAMEWORK, CHECKS, OURS, STATEMENTS, THREADS, ORM, DRIVER, LOGS)
# A frame reads `Class.function (/path/of/file.py:12)`. The first pattern that matches decides.
PATTERNS = (
    (DRIVER, r"\b(do_execute|do_rollback|do_commit|fetch\w+) \(.*/sqlalchemy/"),  # they call it
    (DRIVER, r"/site-packages/psycopg2/|/todo-backend/postgres/(dialect|deadline)\.py"),
    (ORM, r"/site-packages/sql(alchemy|model)/"),
    (CHECKS, r"/site-packages/(pydantic\w*/|fastapi/_compat/v2\.py)"),
    (CHECKS, r"\b(render|json|serialize\w*) \(.*/site-packages/(fastapi|starlette)/"),
    (FRAMEWORK, r"/site-packages/(fastapi|starlette|opentelemetry|anyio)/"),
    (LOOP, r"/site-packages/uv(icorn|loop)/"),
    (LOGS, r"/site-packages/structlog/|/todo-backend/logs\.py"),
    (STATEMENTS, r"/todo-backend/(db|postgres/(engine|statements))\.py"),
    (OURS, r"/site-packages/|/todo-backend/(?!\.venv/)"),  # and what they call
    (THREADS, r"/concurrent/futures/|/threading\.py|/queue\.py|/asyncio/futures\.py"),
    (LOOP, r"/asyncio/|/bench/serve\.py"),
)
TITLE = re.compile(r'(<text id="title"[^>]*>)[^<]*')  # py-spy writes its command line there


@dataclass(frozen=True)
class Profile:
    """The cost of an operation in one version of the template."""

    version: str
    operation: str
    cpu_us: float  # of the app's process, per response, without py-spy
    samples: int
    shares: dict[str, float]  # percentage of samples by part

    @property
    def name(self) -> str:
        """File name of the flame graph."""
        version = "" if self.version == NOW else "-before"
        return f"profile-{self.operation}{version}.svg"


def seconds(before: str | None) -> float:
    """Return the total time under load."""
    once = ROUNDS * ROUND_SECONDS + 2 * SAMPLED_SECONDS
    return once * len(OPERATIONS) * (2 if before else 1)


def take(folder: Path, display: Display, before: str | None = None) -> list[Profile]:
    """Profile the project, and that of the commit `before` if given.

    Writes flame graphs to `folder`, which must be empty. Raises BenchError.
    """
    require_wrk()
    require_py_spy()
    commits = {NOW: None} | ({before: before} if before else {})
    with ExitStack() as stack:
        subjects = {}
        for number, (version, commit) in enumerate(commits.items()):
            display.say(f"generating a project, {version}")
            place = folder / str(number)
            place.mkdir()
            project, _ = generate(place, commit)
            url = stack.enter_context(project.postgres())
            world = stack.enter_context(prepared(project, url, Plan((), 0, 0), display))
            world.data.settle()
            apps = stack.enter_context(world.apps(url, place, ["ours"]))
            warm_up(apps["ours"], world)
            subjects[version] = world, apps["ours"]
        return [
            profile
            for operation in OPERATIONS
            for profile in compare(operation, subjects, folder, display)
        ]


def compare(
    operation: str, subjects: dict[str, tuple[World, App]], folder: Path, display: Display
) -> Iterable[Profile]:
    """Profile all versions in turn."""
    cell = Cell("speed", operation, CLIENTS, seconds=ROUND_SECONDS)
    runs: dict[str, list[Run]] = {version: [] for version in subjects}
    for number in range(ROUNDS):
        for version, (world, app) in subjects.items():
            display.say(f"{operation}, {version}: {number + 1} of {ROUNDS} without py-spy")
            runs[version].append(measure_once(app, world.requests("ours", cell), cell))
            display.advance(ROUND_SECONDS)
    for version, (world, app) in subjects.items():
        display.say(f"{operation}, {version}: with py-spy")
        requests = world.requests("ours", cell)
        raw = folder / "stacks"
        record(app, requests, raw, "--format=raw", "--full-filenames")
        stacks = read(raw.read_text("utf-8"))
        display.advance(SAMPLED_SECONDS)
        cpu_us = statistics.median(run.cpu_us for run in runs[version])
        profile = Profile(version, operation, cpu_us, sum(stacks.values()), shares(stacks))
        record(app, requests, folder / profile.name, "--format=flamegraph")
        display.advance(SAMPLED_SECONDS)
        yield profile


def record(app: App, requests: Sequence[bytes], file: Path, *options: str) -> None:
    """Record an app under load with py-spy."""
    with ThreadPoolExecutor(1) as thread:
        load = thread.submit(send, app.port, requests, CLIENTS, SAMPLED_SECONDS + 2)
        time.sleep(0.5)
        run(
            *(require_py_spy(), "record", "--gil", "--function", f"--pid={app.pid}"),
            *(f"--duration={SAMPLED_SECONDS}", f"--rate={SAMPLES_A_SECOND}"),
            *(f"--output={file}", *options),
            cwd=file.parent,
        )
        load.result()


def require_py_spy() -> str:
    """Return py-spy's path. Raises BenchError."""
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        raise BenchError("py-spy is not installed: uv sync")
    return program


def read(text: str) -> dict[str, int]:
    """Return the number of samples by stack. Frames are separated by ";", outermost first.

    Source: py-spy's format "raw", as read by flamegraph.pl.
    """
    stacks: dict[str, int] = {}
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        stacks[stack] = stacks.get(stack, 0) + int(count)
    return stacks


def shares(stacks: dict[str, int]) -> dict[str, float]:
    """Return the percentage of samples in each part."""
    counts = dict.fromkeys(PARTS, 0)
    for stack, count in stacks.items():
        counts[part_of(stack)] += count
    total = sum(counts.values()) or 1
    return {part: 100 * count / total for part, count in counts.items()}


def part_of(stack: str) -> str:
    """Return the part of the innermost frame.

    Frames of the standard library count for their caller.
    """
    for frame in reversed(stack.split(";")):
        for part, pattern in PATTERNS:
            if re.search(pattern, frame):
                return part
    return LOOP


def markdown(profiles: Sequence[Profile]) -> str:
    """Return one table per operation, with one column per version."""
    text = (
        "Where the time of a request goes: the share of samples by the part of the program that the"
        f" innermost frame belongs to, at {CLIENTS} clients. py-spy sampled {SAMPLES_A_SECOND}"
        f" times per second for {SAMPLED_SECONDS} s, always the thread that held the GIL. Processor"
        " time is that of the app's process, measured without py-spy.\n"
    )
    tables = []
    for operation in dict.fromkeys(profile.operation for profile in profiles):
        found = [profile for profile in profiles if profile.operation == operation]
        found.sort(key=lambda profile: profile.version == NOW)
        titles = [one.version if one.version == NOW else f"at {one.version}" for one in found]
        rows = [
            [part, *(f"{one.shares[part]:.1f} %" for one in found)]
            for part in sorted(PARTS, key=lambda part: -found[0].shares[part])
        ]
        rows.append(["processor time per response, µs", *(f"{one.cpu_us:,.0f}" for one in found)])
        rows.append(["samples", *(f"{one.samples:,}" for one in found)])
        rows.append(["flame graph", *(f"[svg]({one.name})" for one in found)])
        tables.append(f"## {operation}\n\n{table(['part', *titles], rows)}")
    return "\n".join(["# Profiles\n", text, *tables])


def write(profiles: Sequence[Profile], graphs: Path, folder: Path) -> str:
    """Write the tables, and copy the flame graphs from `graphs`. Returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(profiles)
    (folder / "profiles.md").write_text(text, "utf-8")
    for profile in profiles:
        svg = (graphs / profile.name).read_text("utf-8")
        title = f"{profile.operation}, {profile.version}"
        (folder / profile.name).write_text(TITLE.sub(rf"\g<1>{title}", svg), "utf-8")
    return text
