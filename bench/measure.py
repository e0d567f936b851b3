"""A benchmark run: set up, measure each app in turn, clean up."""

import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, Self

from .data import (
    CROWD,
    CROWD_OWNERS,
    CROWD_TASKS,
    PAGE,
    READER,
    VISITORS,
    WRITER,
    Data,
    Owner,
    owners_of,
)
from .load import Health, Run, require_wrk, send
from .plan import POOLS, Cell, Plan
from .processes import App, BenchError, distant, round_trip
from .project import Project, generate, time_parts
from .pulse import pulse
from .subjects import PASSWORD, World

WARM_UP_SECONDS = 0.5


class Display(Protocol):
    """Progress display of a run."""

    def say(self, text: str) -> None:
        """Show the current step."""

    def advance(self, seconds: float) -> None:
        """Advance by `seconds` of the plan."""

    def found(self, measurement: "Measurement") -> None:
        """Show a result."""


@dataclass(frozen=True)
class Measurement:
    """A cell and the runs of each app, one per round."""

    cell: Cell
    runs: dict[str, list[Run]]

    def median(self, app: str, figure: str) -> float:
        """Return the median of the rounds. figure: an attribute of Run."""
        return float(statistics.median(getattr(run, figure) for run in self.runs[app]))

    def rate(self, app: str) -> float:
        """Return the median of 2xx responses per second."""
        return self.median(app, "throughput" if self.cell.chapter == "crowd" else "rate")

    def ratio(self, app: str, other: str) -> float | None:
        """Return how many times as fast `app` is as `other`, or None if `other` serves nothing."""
        slower = self.rate(other)
        return self.rate(app) / slower if slower else None

    def total(self, app: str, figure: str) -> int:
        return sum(getattr(run, figure) for run in self.runs[app])

    def statuses(self, app: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        for run in self.runs[app]:
            for status, number in run.statuses.items():
                counts[status] = counts.get(status, 0) + number
        return counts

    def health(self, app: str, kind: str = "health") -> Health | None:
        """Return the medians of the rounds' percentiles, and the overall maximum.

        kind: an attribute of Run, `health` or `probe`.
        """
        rounds: list[Health] = [one for run in self.runs[app] if (one := getattr(run, kind))]
        if not rounds:
            return None
        return Health(
            asked=sum(one.asked for one in rounds),
            failed=sum(one.failed for one in rounds),
            p50_ms=statistics.median(one.p50_ms for one in rounds),
            p99_ms=statistics.median(one.p99_ms for one in rounds),
            max_ms=max(one.max_ms for one in rounds),
        )


@dataclass
class Results:
    """All results, in the order of measurement."""

    machine: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)
    round_trips_ms: dict[int, float] = field(default_factory=dict)  # by latency
    generations: list[dict[str, float]] = field(default_factory=list)  # seconds, by part
    sessions: dict[str, float] = field(default_factory=dict)  # seconds: connect, session
    left_out: list[str] = field(default_factory=list)  # and why

    def of(self, chapter: str) -> list[Measurement]:
        return [found for found in self.measurements if found.cell.chapter == chapter]

    def as_data(self) -> dict[str, Any]:
        """Return data that `json.dumps` accepts."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Self:
        """Restore results from `as_data`. Raises TypeError or KeyError for other data."""
        measurements = [
            Measurement(
                Cell(**{**one["cell"], "apps": tuple(one["cell"]["apps"])}),
                {app: [run_of(run) for run in runs] for app, runs in one["runs"].items()},
            )
            for one in data["measurements"]
        ]
        trips = {int(latency): ms for latency, ms in data["round_trips_ms"].items()}
        return cls(**{**data, "measurements": measurements, "round_trips_ms": trips})


def run_of(data: dict[str, Any]) -> Run:
    asked = {kind: Health(**data[kind]) for kind in ("health", "probe") if data[kind]}
    return Run(**{**data, **asked})


def describe_machine() -> dict[str, str]:
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        processor = names[0] if names else processor
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": f"{os.cpu_count()} cores, {processor}",
        "system": f"{platform.system()} {platform.release()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def measure(plan: Plan, folder: Path, display: Display, results: Results) -> None:
    """Run a plan, adding to `results` as it goes. folder: must be empty."""
    require_wrk()
    deadline = time.monotonic() + 60 * plan.minutes
    display.say("generating a project")
    project, seconds = generate(folder)
    measure_generation(results, plan, project, seconds, folder, display)
    if not plan.cells:
        return
    with project.postgres() as url, prepared(project, url, plan, display) as world:
        results.machine["software"] = world.software
        results.sessions = project.time_sessions(url)
        world.data.settle()
        for latency, cells in by_latency(plan.cells):
            with distant(url, latency) as far_url:
                results.round_trips_ms[latency] = round_trip(far_url)
                for together in by_chapter(cells):
                    measure_at(far_url, world, together, results, folder, display, deadline)


def by_latency(cells: Sequence[Cell]) -> Iterator[tuple[int, list[Cell]]]:
    """Group cells by latency, so that the proxy is set up once per group."""
    for latency in sorted({cell.latency_ms for cell in cells}):
        yield latency, [cell for cell in cells if cell.latency_ms == latency]


def by_chapter(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Group cells whose apps run at the same time: pools run apart from the others."""
    for _, together in groupby(sorted(cells, key=is_of_pools), key=is_of_pools):
        yield list(together)


def is_of_pools(cell: Cell) -> bool:
    return cell.chapter == "pool"


def measure_generation(
    results: Results, plan: Plan, project: Project, first: float, folder: Path, display: Display
) -> None:
    """Time project generation and its parts. first: seconds that generating `project` took."""
    for number in range(plan.generations):
        display.say(f"timing project generation and its parts, {number + 1} of {plan.generations}")
        seconds = first
        if number:
            again = folder / f"again-{number}"
            again.mkdir()
            _, seconds = generate(again)
        parts = time_parts(project, folder / f"parts-{number}")
        results.generations.append({"whole": seconds, **parts})


@contextmanager
def prepared(project: Project, url: str, plan: Plan, display: Display) -> Iterator[World]:
    """Fill the database for the plan, and install packages that only one app needs."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-packages-") as packages,
        closing(Data(url)) as data,
    ):
        everybody = add_rows(data, plan, display)
        deep = [owner for owner in everybody if owner.tasks > PAGE]
        # A profile has no cells, and its earlier version of the app has other cursors.
        pages = data.before_last_page(deep) if plan.cells else []
        users = [owner.id for owner in everybody]
        tasks = {task: created_at for created_at, task in pages}
        insider = project.ask_for_world(url, users, tasks, PASSWORD)
        data.set_password(VISITORS, insider.pop("password_hash"))
        insider["software"] += f", PostgreSQL {data.version()}"
        if any("async textbook" in cell.apps for cell in plan.cells):
            display.say("installing asyncpg")
            insider["software"] += f", {project.install('asyncpg', Path(packages))}"
        yield World(project=project, data=data, packages=Path(packages), **insider)


def add_rows(data: Data, plan: Plan, display: Display) -> list[Owner]:
    """Add the rows that the plan needs. Returns all owners, including those without tasks."""
    readers = {owner for cell in plan.cells if cell.owners == 1 for owner in owners_of(cell)}
    owners = sorted(readers | {READER}, key=lambda owner: owner.tasks)
    everybody = [*owners, WRITER]
    data.add_owners([*everybody, *VISITORS])
    many = any(cell.owners > 1 for cell in plan.cells)
    if many:
        data.add_owners(CROWD_OWNERS)
        everybody += CROWD_OWNERS
    with data.without_indexes():
        for owner in owners:
            for left in data.add_tasks([owner], owner.tasks):
                display.say(f"adding tasks of one owner, {left:,} of {owner.tasks:,} left")
        if many:
            for left in data.add_tasks(CROWD_OWNERS, CROWD * CROWD_TASKS):
                display.say(f"adding tasks of {CROWD:,} owners, {left:,} left")
        display.say("creating the indexes")
    return everybody


def measure_at(
    url: str,
    world: World,
    cells: Sequence[Cell],
    results: Results,
    folder: Path,
    display: Display,
    deadline: float = math.inf,
) -> None:
    """Measure cells with the database at `url`. No run starts after `deadline`."""
    names = [*dict.fromkeys(app for cell in cells for app in cell.apps)]
    with world.apps(url, folder, names) as apps:
        world.require_sameness(apps, READER)
        for app in apps.values():
            warm_up(app, world)
        for cell in cells:
            found, given_up = measure_in_turn(cell, apps, world, display, deadline)
            if all(found.runs.values()):
                results.measurements.append(found)
                display.found(found)
            else:
                missing = next(name for name, runs in found.runs.items() if not runs)
                results.left_out.append(f"{cell}: {missing}: {given_up[missing]}")


def measure_in_turn(
    cell: Cell, apps: dict[str, App], world: World, display: Display, deadline: float
) -> tuple[Measurement, dict[str, str]]:
    """Measure a cell in rounds. Returns the measurement, and why an app was given up, by app."""
    found = Measurement(cell, {name: [] for name in cell.apps})
    given_up: dict[str, str] = {}
    turns = [name for _ in range(cell.rounds) for name in cell.apps]
    for number, name in enumerate(turns):
        if time.monotonic() > deadline:
            given_up.setdefault(name, "no time left")
        if name not in given_up:
            display.say(f"{cell}: {name}, {1 + number // len(cell.apps)} of {cell.rounds}")
            try:
                run = measure_once(apps[name], world.requests(name, cell), cell)
            except BenchError as error:
                given_up[name] = str(error)
            else:
                found.runs[name].append(run)
                if run.unanswered:
                    given_up[name] = "it locked up, and would again, which takes long"
            if name in given_up:
                apps[name].restart()
                warm_up(apps[name], world)
        display.advance(cell.seconds)
    return found, given_up


def warm_up(app: App, world: World) -> None:
    """Make an app open all its connections and prepare its statements."""
    clients = POOLS.get(app.name, world.connections)
    for operation in ("list", "create"):
        requests = world.requests(app.name, Cell("speed", operation, clients))
        send(app.port, requests, clients, WARM_UP_SECONDS)


def measure_once(app: App, requests: Sequence[bytes], cell: Cell) -> Run:
    ask = app.health if cell.chapter == "crowd" else None
    used = app.cpu_seconds()
    with pulse(app.port, ask) if ask else nullcontext() as beats:
        run = send(app.port, requests, cell.clients, cell.seconds)
    run = replace(run, cpu_seconds=app.cpu_seconds() - used)
    return replace(run, health=beats.health(), probe=beats.probe()) if beats else run


def require_results(results: Results) -> None:
    if not results.measurements and not results.generations:
        raise BenchError("nothing was measured: no time left")
