"""A whole run: everything is prepared, measured in turn, and put away again."""

import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from .data import CROWD, CROWD_OWNERS, CROWD_TASKS, PAGE, WRITER, Data, owner_of
from .load import Run, require_wrk, send
from .plan import APPS, USUAL_TASKS, Cell, Plan
from .processes import App, BenchError, distant, round_trip
from .project import Project, generate, time_parts
from .subjects import World

WARM_UP_SECONDS = 0.5


class Display(Protocol):
    """Whoever watches a run."""

    def say(self, text: str) -> None:
        """Show what is done now."""

    def advance(self, seconds: float) -> None:
        """Show that so many of the plan's seconds are over."""

    def found(self, measurement: "Measurement") -> None:
        """Show a result."""


@dataclass(frozen=True)
class Measurement:
    """A cell, and what came out for each app, round by round."""

    cell: Cell
    runs: dict[str, list[Run]]

    def median(self, app: str, figure: str) -> float:
        """Return the median of the rounds. figure: an attribute of Run."""
        return float(statistics.median(getattr(run, figure) for run in self.runs[app]))

    def ratio(self, app: str, other: str) -> float | None:
        """Return how many times as fast an app is as another; None where that does nothing."""
        slower = self.median(other, "rate")
        return self.median(app, "rate") / slower if slower else None

    def total(self, app: str, figure: str) -> int:
        return sum(getattr(run, figure) for run in self.runs[app])

    def statuses(self, app: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        for run in self.runs[app]:
            for status, number in run.statuses.items():
                counts[status] = counts.get(status, 0) + number
        return counts


@dataclass
class Results:
    """All that was found out, in the order in which it was."""

    machine: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)
    round_trips_ms: dict[int, float] = field(default_factory=dict)  # by latency
    generations: list[dict[str, float]] = field(default_factory=list)  # seconds, by part
    left_out: list[str] = field(default_factory=list)  # for want of time

    def of(self, chapter: str) -> list[Measurement]:
        return [found for found in self.measurements if found.cell.chapter == chapter]

    def as_data(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return asdict(self)


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


def measure(plan: Plan, folder: Path, display: Display) -> Results:
    """Carry out a plan. folder: an empty one."""
    require_wrk()
    results = Results(describe_machine())
    deadline = time.monotonic() + 60 * plan.minutes
    display.say("generating a project")
    project, seconds = generate(folder)
    measure_generation(results, plan, project, seconds, folder, display)
    if not plan.cells:
        return results
    with project.postgres() as url, prepared(project, url, plan, display) as world:
        world.data.settle()
        for latency in sorted({cell.latency_ms for cell in plan.cells}):
            cells = [cell for cell in plan.cells if cell.latency_ms == latency]
            with distant(url, latency) as far_url:
                results.round_trips_ms[latency] = round_trip(far_url)
                measure_at(far_url, world, cells, results, folder, display, deadline)
    return results


def measure_generation(
    results: Results, plan: Plan, project: Project, first: float, folder: Path, display: Display
) -> None:
    """Time the generation of projects, and its parts alone. first: seconds, of `project`."""
    for number in range(plan.generations):
        display.say(
            f"generating a project, and its parts alone, {number + 1} of {plan.generations}"
        )
        seconds = first
        if number:
            again = folder / f"again-{number}"
            again.mkdir()
            _, seconds = generate(again)
        parts = time_parts(project, folder / f"parts-{number}")
        results.generations.append({"whole": seconds, **parts})


@contextmanager
def prepared(project: Project, url: str, plan: Plan, display: Display) -> Iterator[World]:
    """Fill the database with what the plan reads."""
    data = Data(url)
    sizes = {cell.tasks for cell in plan.cells if cell.owners == 1} | {USUAL_TASKS}
    owners = [owner_of(tasks) for tasks in sorted(sizes)]
    everybody = [*owners, WRITER]
    data.add_owners(everybody)
    if any(cell.owners > 1 for cell in plan.cells):
        data.add_owners(CROWD_OWNERS)
        everybody += CROWD_OWNERS
    with data.without_indexes():
        for owner in owners:
            for left in data.add_tasks([owner], owner.tasks):
                display.say(f"adding tasks of one owner, {left:,} of {owner.tasks:,} are left")
        if any(cell.owners > 1 for cell in plan.cells):
            for left in data.add_tasks(CROWD_OWNERS, CROWD * CROWD_TASKS):
                display.say(f"adding tasks of {CROWD:,} owners, {left:,} are left")
        display.say("making the indexes")
    users = [owner.id for owner in everybody]
    pages = [data.before_last_page(owner)[1] for owner in owners if owner.tasks > PAGE]
    insider = project.ask_insider(url, users, pages)
    try:
        yield World(project=project, data=data, **insider)
    finally:
        data.close()


def measure_at(
    url: str,
    world: World,
    cells: list[Cell],
    results: Results,
    folder: Path,
    display: Display,
    deadline: float = math.inf,
) -> None:
    """Measure cells with the database at `url`. deadline: for the beginning of the last one."""
    with world.apps(url, folder) as apps:
        world.require_sameness(apps, owner_of(USUAL_TASKS))
        for app in apps.values():
            for operation in ("list", "create"):
                warm_up = Cell("speed", operation, world.connections)
                send(app.port, world.requests(app.name, warm_up), warm_up.clients, WARM_UP_SECONDS)
        for cell in cells:
            found = Measurement(cell, {name: [] for name in APPS})
            for number in range(cell.rounds):
                if time.monotonic() > deadline:
                    break
                for name in APPS:
                    display.say(f"{cell}: {name}, {number + 1} of {cell.rounds}")
                    run = measure_once(apps[name], world.requests(name, cell), cell)
                    found.runs[name].append(run)
                    display.advance(cell.seconds)
                    if run.unanswered:
                        apps[name].restart()
            if found.runs[APPS[0]]:
                results.measurements.append(found)
                display.found(found)
            else:
                results.left_out.append(str(cell))


def measure_once(app: App, requests: Sequence[bytes], cell: Cell) -> Run:
    used = app.cpu_seconds()
    run = send(app.port, requests, cell.clients, cell.seconds)
    return replace(run, cpu_seconds=app.cpu_seconds() - used)


def require_results(results: Results) -> None:
    if not results.measurements and not results.generations:
        raise BenchError("nothing was measured: there was no time")
