"""What was measured, as tables in Markdown."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby

from .measure import Measurement, Results
from .plan import APPS

TIMES = "\N{MULTIPLICATION SIGN}"


def markdown(results: Results) -> str:
    """Return all tables, each under a heading, with what one has to know to read it."""
    parts = [
        speed(results.of("speed")),
        trips(results),
        crowd(results.of("crowd")),
        growth(results.of("growth")),
        generation(results.generations),
        left_out(results.left_out),
        about(results),
    ]
    return "\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first hold numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def speed(found: list[Measurement]) -> str:
    if not found:
        return ""
    head = ["operation", "clients", "database at", *APPS, "ours ÷ textbook", "ours ÷ floor"]
    head += [f"p50 / p99 {app}" for app in APPS]
    head += ["processor time"]
    rows = [
        [
            one.cell.operation,
            str(one.cell.clients),
            f"{one.cell.latency_ms} ms",
            *[f"{one.median(app, 'rate'):,.0f}" for app in APPS],
            times(one.ratio("ours", "textbook")),
            times(one.ratio("ours", "floor")),
            *[percentiles(one, app) for app in APPS],
            " / ".join(f"{one.median(app, 'cpu_us'):,.0f}" for app in APPS),
        ]
        for one in found
    ]
    text = (
        "Answers a second (2xx; medians of the rounds), the times of answers in ms, and the app's "
        f"processor time for an answer in µs ({' / '.join(APPS)}).\n"
    )
    return f"### Speed\n\n{text}\n{table(head, rows)}"


def times(ratio: float | None) -> str:
    return "∞" if ratio is None else f"{ratio:.2f} {TIMES}"


def percentiles(one: Measurement, app: str) -> str:
    return f"{one.median(app, 'p50_ms'):.1f} / {one.median(app, 'p99_ms'):.1f}"


def round_trips(results: Results) -> list[tuple[str, dict[str, float]]]:
    """Return for each operation how many of the database's round trips its median answer takes."""
    return [
        (
            one.cell.operation,
            {
                app: one.median(app, "p50_ms") / results.round_trips_ms[one.cell.latency_ms]
                for app in APPS
            },
        )
        for one in results.of("speed")
        if one.cell.clients == 1 and one.cell.latency_ms >= 10
    ]


def trips(results: Results) -> str:
    found = round_trips(results)
    if not found:
        return ""
    rows = [[operation, *[f"{trips_of[app]:.2f}" for app in APPS]] for operation, trips_of in found]
    text = "The median answer to one client, as a multiple of the database's round trip of 10 ms.\n"
    return f"### Round trips\n\n{text}\n{table(['operation', *APPS], rows)}"


def crowd(found: list[Measurement]) -> str:
    if not found:
        return ""
    head = ["operation", "clients", "database at", "app", "answered 2xx", "other answers"]
    head += ["never answered", "2xx a second", "p50 / p99 ms"]
    rows = []
    for one in found:
        for app in APPS:
            others = {s: n for s, n in one.statuses(app).items() if not s.startswith("2")}
            sent = one.total(app, "sent")
            rows.append(
                [
                    one.cell.operation,
                    f"{one.cell.clients:,}",
                    f"{one.cell.latency_ms} ms",
                    app,
                    f"{one.total(app, 'succeeded'):,} of {sent:,}",
                    ", ".join(f"{number:,} {TIMES} {status}" for status, number in others.items()),
                    f"{one.total(app, 'unanswered'):,}",
                    f"{one.median(app, 'rate'):,.0f}",
                    percentiles(one, app) if one.total(app, "answered") else "",
                ]
            )
    text = "All clients at once. After the last request they wait 8 s for what is missing.\n"
    return f"### Crowds\n\n{text}\n{table(head, rows)}"


def growth(found: list[Measurement]) -> str:
    if not found:
        return ""
    rows = [
        [
            "first page" if one.cell.operation == "list" else one.cell.operation,
            f"{one.cell.tasks:,}",
            f"{one.cell.owners:,}",
            *[f"{one.median(app, 'p50_ms'):.2f}" for app in APPS],
        ]
        for one in found
    ]
    text = "The median time of a page of 20 tasks in ms, one client, all owners in one table.\n"
    head = ["page", "tasks of an owner", "owners in turn", *APPS]
    return f"### Growth\n\n{text}\n{table(head, rows)}"


def generation(found: list[dict[str, float]]) -> str:
    if not found:
        return ""
    medians = {part: statistics.median(one[part] for one in found) for part in found[0]}
    parts = [part for part in medians if part != "whole"]
    alone = sum(medians[part] for part in parts)
    values = [*[medians[part] for part in parts], alone, medians["whole"]]
    row = [*[f"{seconds:.2f}" for seconds in values], times(medians["whole"] / alone)]
    text = "`cookiecutter --no-input` with warm caches, next to what it cannot do without, in s.\n"
    head = [*parts, "these alone", "the whole", "ratio"]
    return f"### Generation\n\n{text}\n{table(head, [row])}"


def left_out(cells: list[str]) -> str:
    lines = "".join(f"- {cell}\n" for cell in cells)
    return f"### Left out, for want of time\n\n{lines}" if lines else ""


def about(results: Results) -> str:
    facts = [f"{name}: {value}" for name, value in results.machine.items()]
    trips_ms = (f"{wanted} → {ms:.2f}" for wanted, ms in results.round_trips_ms.items())
    if results.round_trips_ms:
        facts.append(f"round trip to the database in ms, wanted → measured: {', '.join(trips_ms)}")
    return f"### Where\n\n{'; '.join(facts)}.\n"


def line(one: Measurement) -> str:
    """Return a measurement in one line, for the progress display."""
    rates = ", ".join(f"{app} {one.median(app, 'rate'):,.0f}/s" for app in APPS)
    return f"{one.cell}: {rates}; ours ÷ textbook {times(one.ratio('ours', 'textbook'))}"


def by_latency(found: list[Measurement]) -> list[tuple[int, list[Measurement]]]:
    return [
        (latency, list(group))
        for latency, group in groupby(found, key=lambda one: one.cell.latency_ms)
    ]
