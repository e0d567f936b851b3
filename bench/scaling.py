"""How throughput grows from one process behind nginx to four, and what limits it.

nginx and PgBouncer are those of the template's tests, configured as the docs of a project say.
"""

import resource
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil

from .load import Run, require_wrk, send
from .measure import Display, describe_machine, prepared, warm_up
from .plan import MAIN, Cell, Plan
from .processes import BenchError
from .project import REPOSITORY, generate
from .report import table

sys.path.append(str(REPOSITORY / "tests"))
from cluster import balancer
from nginx import nginx
from pgbouncer import pgbouncer
from postgres_server import free_port

OPERATIONS = MAIN  # docs/growing.md of a project plans with them
PROCESSES = (1, 2, 3, 4)
CLIENTS = 32
POOL_SIZE = 20  # PgBouncer's connections to the server, its default
ROUNDS, ROUND_SECONDS = 5, 3
QUICK_ROUNDS, QUICK_SECONDS = 1, 1
APP, WRK = "app", "wrk"
PROGRAMS = (APP, "nginx", "pgbouncer", "postgres", WRK)


@dataclass(frozen=True)
class Scale:
    """One round. cpu: seconds of processor time by program."""

    operation: str
    processes: int
    run: Run
    cpu: dict[str, float]


def plan(*, quick: bool) -> tuple[int, float]:
    """Return the number of rounds, and the seconds of each."""
    return (QUICK_ROUNDS, QUICK_SECONDS) if quick else (ROUNDS, ROUND_SECONDS)


def seconds(*, quick: bool) -> float:
    """Return the total time under load."""
    rounds, each = plan(quick=quick)
    return rounds * each * len(OPERATIONS) * len(PROCESSES)


def take(folder: Path, display: Display, *, quick: bool) -> list[Scale]:
    """Measure each number of processes in turn. folder: must be empty. Raises BenchError."""
    require_wrk()
    for program in ("nginx", "pgbouncer"):
        if not shutil.which(program):
            raise BenchError(f"{program} is not installed: sudo apt-get install {program}")
    rounds, each = plan(quick=quick)
    found = []
    with ExitStack() as stack:
        display.say("generating a project")
        project, _ = generate(folder)
        url = stack.enter_context(project.postgres())
        world = stack.enter_context(prepared(project, url, Plan((), 0, 0), display))
        world.data.settle()
        ((backend,),) = world.data.execute("SELECT pg_backend_pid()")
        server = psutil.Process(backend).parent()
        assert server  # noqa: S101  (the postmaster)
        parts = urlsplit(url)
        users = {unquote(parts.username or ""): unquote(parts.password or "")}
        pooler = stack.enter_context(
            pgbouncer(parts.port or 5432, users, default_pool_size=POOL_SIZE)
        )
        pooled = url.replace(f":{parts.port}/", f":{pooler.port}/")
        apps = [stack.enter_context(world.app("ours", pooled, folder)) for _ in PROCESSES]
        ports = {number: free_port() for number in PROCESSES}
        page = (project.path / "docs" / "deploying.md").read_text("utf-8")
        for number, port in ports.items():
            place = folder / f"nginx-{number}"
            place.mkdir()
            blocks = balancer(page, port, [app.port for app in apps[:number]])
            stack.enter_context(nginx(blocks, port, place))
        for app in apps:
            warm_up(app, world)
        for operation in OPERATIONS:
            for turn in range(rounds):
                for number, port in ports.items():
                    display.say(f"{operation}, {number} of {len(apps)}: {turn + 1} of {rounds}")
                    cell = Cell("speed", operation, CLIENTS, seconds=each)
                    requests = world.requests("ours", cell)
                    before = processor_times(server)
                    run = send(port, requests, CLIENTS, each)
                    after = processor_times(server)
                    cpu = {name: after[name] - before[name] for name in PROGRAMS}
                    found.append(Scale(operation, number, run, cpu))
                    display.advance(each)
    return found


def processor_times(server: psutil.Process) -> dict[str, float]:
    """Return the seconds of processor time that the programs have used so far.

    server: PostgreSQL, which is not a child of ours.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)  # wrk, after each run
    times = dict.fromkeys(PROGRAMS, 0.0)
    times[WRK] = ended.ru_utime + ended.ru_stime
    ours = psutil.Process().children(recursive=True)
    for process in [*ours, server, *server.children()]:
        with suppress(psutil.NoSuchProcess):  # such as a worker of autovacuum that has just ended
            name = process.name()
            used = process.cpu_times()
            times[name if name in times else APP] += used.user + used.system
    return times


def markdown(found: Sequence[Scale]) -> str:
    """Return a table for each operation, with the median of the rounds."""
    machine = describe_machine()
    text = (
        "# From one process to four\n\n"
        f"{CLIENTS} clients, nginx, the app, PgBouncer in transaction mode and PostgreSQL on one"
        f" machine: {machine['processor']}, {machine['date']}. Responses a second, in total, over"
        " those of one process, and of each process; the processor time for a response by program,"
        f" in µs; and how many cores were busy with all of that, of {psutil.cpu_count()}.\n"
    )
    head = ("processes", "per second", "gain", "each", *PROGRAMS, "cores")
    for operation in dict.fromkeys(scale.operation for scale in found):
        text += f"\n## {operation.capitalize()}\n\n{table(head, rows(found, operation))}"
    return text


def rows(found: Sequence[Scale], operation: str) -> Iterator[tuple[str, ...]]:
    alone = 0.0
    for number in dict.fromkeys(scale.processes for scale in found):
        own = [s for s in found if (s.operation, s.processes) == (operation, number)]
        rate = statistics.median(scale.run.throughput for scale in own)
        alone = alone or rate
        cpu = [
            statistics.median(1e6 * scale.cpu[name] / max(scale.run.answered, 1) for scale in own)
            for name in PROGRAMS
        ]
        failed = sum(scale.run.failed for scale in own)
        yield (
            f"{number}" + (f", {failed} failed" if failed else ""),
            f"{rate:,.0f}",
            f"{rate / alone:.2f} ×",
            f"{rate / number:,.0f}",
            *(f"{one:,.0f}" for one in cpu),
            f"{rate * sum(cpu) / 1e6:.2f}",
        )


def write(found: Sequence[Scale], folder: Path) -> str:
    """Write the tables, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(found)
    (folder / "scaling.md").write_text(text, "utf-8")
    return text
