"""What is measured, for how long, and how often."""

from collections.abc import Iterable
from dataclasses import dataclass

APPS = ("ours", "textbook", "floor")
MAIN = ("list", "get", "create", "mixed")
OPERATIONS = (*MAIN, "change", "delete", "last page")
CHAPTERS = ("speed", "crowd", "growth", "generation")
USUAL_TASKS = 1_000  # of the owner whose tasks are read, where nothing else is said


@dataclass(frozen=True)
class Cell:
    """One measurement, of all apps in turn: `rounds` times `seconds` for each of them."""

    chapter: str
    operation: str
    clients: int
    latency_ms: int = 0  # of the database, for a round trip
    tasks: int = USUAL_TASKS  # of the owner whose tasks are read
    owners: int = 1  # who read in turn
    rounds: int = 3
    seconds: float = 2

    def __str__(self) -> str:
        text = f"{self.operation}, {count(self.clients, 'client')}, {self.latency_ms} ms"
        if self.chapter == "growth":
            text += f", {count(self.tasks, 'task')} of {count(self.owners, 'owner')}"
        return text


@dataclass(frozen=True)
class Plan:
    cells: tuple[Cell, ...]
    generations: int  # how often a project is generated, and its parts timed
    minutes: float  # after which no further measurement begins


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def full_plan() -> Plan:
    """About 22 minutes on two cores."""
    cells = [
        Cell("speed", operation, clients, latency_ms)
        for latency_ms in (0, 1, 10)
        for clients in (1, 16)
        for operation in MAIN
    ]
    cells += [Cell("speed", operation, 1, 10) for operation in ("change", "delete")]
    cells += [
        Cell("crowd", operation, clients, latency_ms, rounds=2, seconds=3)
        for latency_ms, operations in ((0, MAIN), (10, ("list", "create")))
        for clients in (200, 1000)
        for operation in operations
    ]
    cells += growth((20, 1_000, 100_000, 1_000_000), rounds=3, seconds=1.5)
    cells.append(Cell("growth", "list", 1, tasks=100, owners=10_000, seconds=1.5))
    return Plan(tuple(cells), generations=3, minutes=25)


def quick_plan() -> Plan:
    """About 3 minutes: the figures that matter most, with less certainty."""
    cells = [Cell("speed", operation, 16, seconds=1) for operation in MAIN]
    cells += [
        Cell("speed", operation, 1, 10, rounds=1, seconds=1)
        for operation in ("list", "get", "create", "change", "delete")
    ]
    cells += [Cell("crowd", "list", clients, rounds=1) for clients in (200, 1000)]
    cells += growth((1_000, 1_000_000), rounds=2, seconds=1)
    return Plan(tuple(cells), generations=1, minutes=5)


def growth(sizes: Iterable[int], rounds: int, seconds: float) -> list[Cell]:
    return [
        Cell("growth", operation, 1, tasks=tasks, rounds=rounds, seconds=seconds)
        for operation in ("list", "last page")
        for tasks in sizes
    ]


def select(plan: Plan, words: Iterable[str]) -> Plan:
    """Keep what the words name: of chapters and of operations, all where none is named."""
    chapters = set(words) & set(CHAPTERS) or set(CHAPTERS)
    operations = set(words) & set(OPERATIONS) or set(OPERATIONS)
    cells = tuple(c for c in plan.cells if c.chapter in chapters and c.operation in operations)
    generations = plan.generations if "generation" in chapters else 0
    return Plan(cells, generations, plan.minutes)
