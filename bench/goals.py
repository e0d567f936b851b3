"""The goals of the design: which of them a run meets."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .measure import Measurement, Results
from .report import TIMES, apps_of, by_latency, medians, round_trips

COMPARED = ("list", "get", "create")
INTRODUCTION = """\
All apps return the same responses from the same rows. They were measured in turn, in one run:

{apps}
App, database and clients share {processor}.
"""
WHAT_APPS_ARE = {
    "ours": "a generated project with its defaults",
    "textbook": "the app that tutorials lead to: `def` routes, a `yield` session, a user lookup,"
    " count and offset",
    "floor": "Starlette and bare psycopg2 in threads, the minimum work that Python needs",
    "async floor": "the same on the event loop, on psycopg2's asynchronous connections",
}
CONCLUSION = """\
If a number misses its goal, [this page](../../docs/decisions/0013-what-limits-the-speed.md)
explains why.

Tests hold three more goals: the root of a project has at most 10 modules, and its README and
`hooks/post_gen_project.py` have at most 130 lines each.
"""


@dataclass(frozen=True)
class Goal:
    """A goal and its measurement. holds: "yes", "no", or where it holds."""

    what: str
    wanted: str
    measured: str
    holds: str


def goals(results: Results) -> list[Goal]:
    """Compare a run with the design goals. Goals that were not measured are left out."""
    found = [
        speed(results, "textbook", {"list": 3.5, "get": 3.5, "create": 5}),
        speed(results, "floor", dict.fromkeys(COMPARED, 0.9)),
        processor_time(results),
        trips(results),
        crowd(results),
        overload(results),
        health(results, "health", "one connection", 100),
        health(results, "probe", "new connections", 1000),
        growth(results),
        generation(results),
        sessions(results),
    ]
    return [goal for goal in found if goal]


def markdown(results: Results) -> str:
    """Return the section about the goals, or nothing if the run measured none of them."""
    rows = [[goal.what, goal.wanted, goal.measured, goal.holds] for goal in goals(results)]
    if not rows:
        return ""
    lines = [["", "goal", "measured", "met"], ["---"] * 4, *rows]
    apps = [app for app in apps_of(results.of("speed")) if app in WHAT_APPS_ARE]
    list_of_apps = "".join(f"- *{app}*: {WHAT_APPS_ARE[app]}\n" for app in apps)
    return "\n".join(
        [
            "### Goals\n",
            INTRODUCTION.format(apps=list_of_apps, processor=results.machine["processor"]),
            "".join(f"| {' | '.join(line)} |\n" for line in lines),
            CONCLUSION,
        ]
    )


def yes_if(*facts: bool) -> str:
    return "yes" if all(facts) else "no"


def speed(results: Results, other: str, wanted: dict[str, float]) -> Goal | None:
    """Compare responses per second. wanted: the minimum ratio by operation."""
    measured, held = [], []
    cells = [one for one in results.of("speed") if one.cell.clients == 16]
    latencies = by_latency([one for one in cells if one.cell.operation in COMPARED])
    for latency, group in latencies:
        ratios = {one.cell.operation: one.ratio("ours", other) or 0 for one in group}
        texts = [f"{operation} {ratio:.2f}" for operation, ratio in ratios.items()]
        measured.append(f"{latency} ms: {', '.join(texts)}")
        if all(ratio >= wanted[operation] for operation, ratio in ratios.items()):
            held.append(f"{latency} ms")
    if not measured:
        return None
    return Goal(
        f"responses per second at 16 clients, ours ÷ {other}, by database latency",
        "at least " + grouped(wanted),
        "; ".join(measured),
        "yes" if len(held) == len(latencies) else f"at {' and '.join(held)}" if held else "no",
    )


def grouped(wanted: dict[str, float]) -> str:
    """Return "3.5 × (list, get), 5 × (create)", or one number if all are the same."""
    numbers = sorted(set(wanted.values()))
    if len(numbers) == 1:
        return f"{numbers[0]:g} {TIMES}"
    names = {number: [name for name in wanted if wanted[name] == number] for number in numbers}
    return ", ".join(f"{number:g} {TIMES} ({', '.join(names[number])})" for number in numbers)


def processor_time(results: Results) -> Goal | None:
    """Report CPU time, which varies less than responses per second on a shared machine."""
    cells = [one for one in results.of("speed") if one.cell.clients == 16]
    cells = [one for one in cells if one.cell.operation in COMPARED]
    if not cells:
        return None
    latencies = by_latency(cells)
    measured = [
        f"{latency} ms: "
        + ", ".join(
            f"{one.cell.operation} {one.median('ours', 'cpu_us'):,.0f}"
            f" / {one.median('floor', 'cpu_us'):,.0f} / {one.median('textbook', 'cpu_us'):,.0f}"
            for one in group
        )
        for latency, group in latencies
    ]
    return Goal(
        "processor time per response at 16 clients, µs: ours / floor / textbook",
        "no goal: a steadier figure than the two above",
        "; ".join(measured),
        "",
    )


def trips(results: Results) -> Goal | None:
    found = [(operation, trips_of["ours"]) for operation, trips_of in round_trips(results)]
    found = [(operation, number) for operation, number in found if operation != "mixed"]
    if not found:
        return None
    return Goal(
        "median response time for one client, in round trips of 10 ms",
        "at most 1.3",
        ", ".join(f"{operation} {number:.2f}" for operation, number in found),
        yes_if(*(number <= 1.3 for _, number in found)),
    )


def crowd(results: Results) -> Goal | None:
    found = [
        one
        for one in results.of("crowd")
        if one.cell.clients in {200, 1000} and "textbook" in one.cell.apps
    ]
    if not found:
        return None
    return Goal(
        "requests that get a 2xx, with 200 and 1,000 concurrent clients",
        "all of ours, none of textbook",
        f"ours {shares(found, 'ours')}, floor {shares(found, 'floor')},"
        f" textbook {shares(found, 'textbook')}",
        yes_if(all(share(one, "ours", "succeeded") == 100 for one in found)),
    )


def shares(found: Sequence[Measurement], app: str) -> str:
    """Return the share of requests that got a 2xx, as a range if measurements differ."""
    numbers = sorted({f"{share(one, app, 'succeeded'):.0f}" for one in found}, key=float)
    return f"{numbers[0]} %" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} %"


def share(one: Measurement, app: str, figure: str) -> float:
    sent = one.total(app, "sent")
    return 100 * one.total(app, figure) / sent if sent else 0


def overload(results: Results) -> Goal | None:
    found = results.of("crowd")
    if not found:
        return None
    failed = sum(one.total("ours", "failed") for one in found)
    refused = sum(one.total("ours", "refused") for one in found)
    sent = sum(one.total("ours", "sent") for one in found)
    most = max(one.cell.clients for one in found)
    return Goal(
        f"requests to ours, with up to {most:,} concurrent clients, including logins",
        "each gets a 2xx, or a 503 with Retry-After",
        f"{sent:,} requests, {refused:,} {TIMES} 503, {failed:,} failed",
        yes_if(failed == 0),
    )


def health(results: Results, kind: str, how: str, limit_ms: float) -> Goal | None:
    found = [one for each in results.of("crowd") if (one := each.health("ours", kind))]
    if not found:
        return None
    in_time = [one for one in found if one.p99_ms <= limit_ms and not one.failed]
    failed = sum(one.failed for one in found)
    return Goal(
        f"`/health` of ours under that load, on {how}",
        f"p99 at most {limit_ms:,.0f} ms",
        f"median {median(one.p50_ms for one in found):.0f} ms, p99 at most"
        f" {max(one.p99_ms for one in found):,.0f} ms, longest"
        f" {max(one.max_ms for one in found):,.0f} ms" + (f", {failed} failed" if failed else ""),
        "yes" if in_time == found else f"in {len(in_time)} of {len(found)} crowds",
    )


def growth(results: Results) -> Goal | None:
    times = {
        (one.cell.operation, one.cell.tasks): one.median("ours", "p50_ms")
        for one in results.of("growth")
        if one.cell.owners == 1
    }
    ratios = {
        name: times[operation, 1_000_000] / times[operation, 1_000]
        for operation, name in (("list", "first page"), ("last page", "last page"))
        if {(operation, 1_000), (operation, 1_000_000)} <= times.keys()
    }
    if not ratios:
        return None
    return Goal(
        "a page for an owner with 1,000,000 tasks, compared to one with 1,000",
        f"at most 1.5 {TIMES} the time",
        ", ".join(f"{name} {ratio:.2f} {TIMES}" for name, ratio in ratios.items()),
        yes_if(*(ratio <= 1.5 for ratio in ratios.values())),
    )


def generation(results: Results) -> Goal | None:
    if not results.generations:
        return None
    parts, whole = medians(results.generations)
    alone = sum(parts.values())
    return Goal(
        "generating a project with warm caches, without cloning the template and without the start"
        " of `uvx`, compared to the steps it needs at least",
        f"at most 1.3 {TIMES} the time, and under 10 s",
        f"{whole / alone:.2f} {TIMES}, {whole:.1f} s",
        yes_if(whole <= 1.3 * alone, whole < 10),
    )


def sessions(results: Results) -> Goal | None:
    if not results.sessions:
        return None
    connect, session = results.sessions["connect"], results.sessions["session"]
    return Goal(
        "a first connection; opening and closing a session",
        "under 3 s; under 50 ms",
        f"{connect:.2f} s; {1000 * session:.1f} ms",
        yes_if(connect < 3, session < 0.05),
    )
