"""Benchmark plans: what to measure, for how long and how often."""

from collections.abc import Iterable
from dataclasses import dataclass

APPS = ("ours", "textbook", "floor")  # the default
SPEED_APPS = (*APPS, "async floor")
SESSION_APPS = ("ours", "session", "async textbook", "textbook")
# Ours with pools of different sizes, each a separate app.
POOLS = {f"pool of {size}": size for size in (4, 8, 15, 30, 60)}
MAIN = ("list", "get", "create", "mixed")
OPERATIONS = (*MAIN, "change", "delete", "last page", "log-ins")
CHAPTERS = ("speed", "session", "crowd", "pool", "growth", "generation")
USUAL_TASKS = 1_000  # default number of tasks of the owner who reads


@dataclass(frozen=True)
class Cell:
    """One measurement: each app in turn for `seconds`, `rounds` times."""

    chapter: str
    operation: str
    clients: int
    latency_ms: int = 0  # of a round trip to the database
    tasks: int = USUAL_TASKS  # per owner
    owners: int = 1  # reading in turn
    rounds: int = 3
    seconds: float = 0.8
    apps: tuple[str, ...] = APPS

    def __str__(self) -> str:
        text = f"{self.operation}, {count(self.clients, 'client')}, {self.latency_ms} ms"
        if self.chapter == "growth":
            text += f", {count(self.tasks, 'task')} of {count(self.owners, 'owner')}"
        return text


@dataclass(frozen=True)
class Plan:
    cells: tuple[Cell, ...]
    generations: int  # how often a project is generated, and its parts timed
    minutes: float  # after which no measurement starts

    @property
    def seconds(self) -> float:
        """Total time under load, if no app locks up."""
        return sum(cell.rounds * cell.seconds * len(cell.apps) for cell in self.cells)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def full_plan() -> Plan:
    """About 13 minutes on two cores."""
    cells = [
        Cell("speed", operation, clients, latency_ms, apps=SPEED_APPS)
        for latency_ms, crowds in ((0, (1, 16)), (1, (16,)), (10, (1, 16)))
        for clients in crowds
        for operation in MAIN
    ]
    cells += [
        Cell("speed", operation, 1, 10, apps=SPEED_APPS) for operation in ("change", "delete")
    ]
    cells += sessions((0, 1, 10), rounds=3, seconds=0.7)
    cells += [
        Cell("crowd", operation, clients, latency_ms, rounds=rounds, seconds=2)
        for latency_ms, rounds in ((0, 1), (10, 1))
        for clients in (200, 1000)
        for operation in MAIN
    ]
    cells += [Cell("crowd", name, 2000, rounds=1, seconds=2) for name in ("list", "create")]
    cells += log_ins((200, 1000, 2000), rounds=1, seconds=3)
    cells += pools((0, 10), rounds=3, seconds=0.6)
    cells += growth((20, 1_000, 100_000, 1_000_000), rounds=3, seconds=0.3)
    cells += crowded(("list", "last page"), rounds=3, seconds=0.3)
    return Plan(tuple(cells), generations=2, minutes=14)


def quick_plan() -> Plan:
    """About 5 minutes: the most important figures, less precise."""
    cells = [Cell("speed", operation, 16, seconds=1, apps=SPEED_APPS) for operation in MAIN]
    cells += [
        Cell("speed", operation, 1, 10, rounds=1, seconds=1, apps=SPEED_APPS)
        for operation in ("list", "get", "create", "change", "delete")
    ]
    cells += sessions((0,), rounds=2, seconds=1)
    cells += [Cell("crowd", "list", clients, rounds=1, seconds=2) for clients in (200, 2000)]
    cells += log_ins((1000,), rounds=1, seconds=2)
    cells += pools((0, 10), rounds=1, seconds=1)
    cells += growth((1_000, 1_000_000), rounds=2, seconds=0.7)
    return Plan(tuple(cells), generations=1, minutes=6)


def sessions(latencies: Iterable[int], rounds: int, seconds: float) -> list[Cell]:
    """A session per request, as tutorials write it, against one statement per request."""
    return [
        Cell("session", name, 16, latency, rounds=rounds, seconds=seconds, apps=SESSION_APPS)
        for latency in latencies
        for name in ("list", "get", "create")
    ]


def log_ins(crowds: Iterable[int], rounds: int, seconds: float) -> list[Cell]:
    """Crowds in which one request in ten is a login. Only ours: the other apps have no logins."""
    return [
        Cell("crowd", "log-ins", clients, rounds=rounds, seconds=seconds, apps=APPS[:1])
        for clients in crowds
    ]


def pools(latencies: Iterable[int], rounds: int, seconds: float) -> list[Cell]:
    """Pools of different sizes, with more clients than the largest has connections."""
    return [
        Cell("pool", operation, 64, latency, rounds=rounds, seconds=seconds, apps=tuple(POOLS))
        for latency in latencies
        for operation in ("list", "create")
    ]


def growth(sizes: Iterable[int], rounds: int, seconds: float) -> list[Cell]:
    """One owner, from few tasks to many."""
    return [
        Cell("growth", operation, 1, tasks=tasks, rounds=rounds, seconds=seconds)
        for operation in ("list", "last page", "get", "create")
        for tasks in sizes
    ]


def crowded(operations: Iterable[str], rounds: int, seconds: float) -> list[Cell]:
    """Many owners, reading in turn."""
    return [
        Cell("growth", name, 1, tasks=100, owners=10_000, rounds=rounds, seconds=seconds)
        for name in operations
    ]


def select(plan: Plan, words: Iterable[str]) -> Plan:
    """Keep only the named chapters and operations; naming no chapter (operation) keeps all."""
    chapters = set(words) & set(CHAPTERS) or set(CHAPTERS)
    operations = set(words) & set(OPERATIONS) or set(OPERATIONS)
    cells = tuple(c for c in plan.cells if c.chapter in chapters and c.operation in operations)
    generations = plan.generations if "generation" in chapters else 0
    return Plan(cells, generations, plan.minutes)
