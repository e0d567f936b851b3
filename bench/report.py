"""Results as Markdown tables."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby

from .load import SILENCE_SECONDS, Health
from .measure import Measurement, Results
from .plan import APPS, POOLS

TIMES = "\N{MULTIPLICATION SIGN}"
PLOTS = {
    "speed": "Responses per second of each app, by operation and database latency",
    "trips": "Round trips to the database per response",
    "crowd": "Responses per second, by number of concurrent clients",
    "growth": "Response time of a page, by the owner's number of tasks",
    "pool": "Responses per second and their times, by pool size",
}


def markdown(results: Results) -> str:
    """Return all tables, each with a heading and an explanation."""
    parts = [
        speed(results.of("speed")),
        trips(results),
        session(results.of("session")),
        crowd(results.of("crowd")),
        pool(results.of("pool")),
        growth(results.of("growth")),
        generation(results.generations),
        connections(results.sessions),
        left_out(results.left_out),
        about(results),
    ]
    return "\n".join(part for part in parts if part)


def pictures(names: Iterable[str]) -> str:
    """Return the section of plots. names: of those that were drawn."""
    lines = "\n".join(f"![{PLOTS[name]}]({name}.svg)\n" for name in names)
    return f"### Plots\n\n{lines}" if lines else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. All columns except the first hold numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def apps_of(found: Iterable[Measurement]) -> list[str]:
    """Return the apps that were measured; earlier versions measured others."""
    return [*dict.fromkeys(app for one in found for app in one.cell.apps)]


def speed(found: list[Measurement]) -> str:
    if not found:
        return ""
    pairs = [("ours", app) for app in apps_of(found) if app != "ours"]
    return f"### Speed\n\n{comparison(found, pairs)}"


def session(found: list[Measurement]) -> str:
    if not found:
        return ""
    pairs = [("ours", "session"), ("session", "async textbook"), ("session", "textbook")]
    text = (
        "The cost of sessions used as in tutorials: a transaction per request, a count with each"
        " page, commit and refresh. *session* does that with the project's `SessionDep` and"
        " `CurrentUserId`; *ours* sends one statement through `StatementDep`. *textbook* (psycopg2,"
        " threads) and *async textbook* (asyncpg, event loop) have their own session, look up the"
        " user, and test each connection before use (`pool_pre_ping`): one round trip with"
        " psycopg2, three with asyncpg, whose dialect wraps the test in a transaction.\n"
    )
    return f"### Sessions\n\n{text}\n{comparison(found, pairs)}"


def comparison(found: Sequence[Measurement], pairs: Iterable[tuple[str, str]]) -> str:
    """Return a table that compares apps. pairs: the apps whose ratios it shows."""
    apps = apps_of(found)
    head = ["operation", "clients", "database at", *apps]
    head += [f"{app} ÷ {other}" for app, other in pairs]
    head += [f"p50 / p99 {app}" for app in apps]
    head += ["processor time"]
    rows = [
        [
            one.cell.operation,
            str(one.cell.clients),
            f"{one.cell.latency_ms} ms",
            *[f"{one.rate(app):,.0f}" for app in apps],
            *[times(one.ratio(app, other)) for app, other in pairs],
            *[percentiles(one, app) for app in apps],
            " / ".join(f"{one.median(app, 'cpu_us'):,.0f}" for app in apps),
        ]
        for one in found
    ]
    text = (
        "2xx responses per second (medians of the rounds), response times in ms, and the app's "
        f"processor time per response in µs ({' / '.join(apps)}).\n"
    )
    return f"{text}\n{table(head, rows)}\n{failures(found)}"


def failures(found: Sequence[Measurement]) -> str:
    """List the cells in which some requests did not get a 2xx."""
    lines = [
        f"- {one.cell}: {app}: {not_good:,} of {one.total(app, 'sent'):,}\n"
        for one in found
        for app in one.cell.apps
        if (not_good := one.total(app, "sent") - one.total(app, "succeeded"))
    ]
    if not lines:
        return "Every request of this chapter got a 2xx.\n"
    return f"Requests without a 2xx:\n\n{''.join(lines)}"


def times(ratio: float | None) -> str:
    return "∞" if ratio is None else f"{ratio:.2f} {TIMES}"


def percentiles(one: Measurement, app: str) -> str:
    return f"{one.median(app, 'p50_ms'):.1f} / {one.median(app, 'p99_ms'):.1f}"


def round_trips(results: Results) -> list[tuple[str, dict[str, float]]]:
    """Return by operation and app the median response time in round trips to the database."""
    return [
        (
            one.cell.operation,
            {
                app: one.median(app, "p50_ms") / results.round_trips_ms[one.cell.latency_ms]
                for app in one.cell.apps
            },
        )
        for one in results.of("speed")
        if one.cell.clients == 1 and one.cell.latency_ms >= 10
    ]


def trips(results: Results) -> str:
    found = round_trips(results)
    if not found:
        return ""
    apps = [*found[0][1]]
    rows = [[operation, *[f"{trips_of[app]:.2f}" for app in apps]] for operation, trips_of in found]
    text = "Median response time for one client, in round trips to the database (10 ms).\n"
    return f"### Round trips\n\n{text}\n{table(['operation', *apps], rows)}"


def crowd(found: list[Measurement]) -> str:
    if not found:
        return ""
    head = ["operation", "clients", "database at", "app", "2xx", "503 with Retry-After"]
    head += ["errors", "never answered", "2xx per second", "p50 / p99 ms"]
    head += ["health, ms", "on a new connection"]
    rows = [
        [
            one.cell.operation,
            f"{one.cell.clients:,}",
            f"{one.cell.latency_ms} ms",
            app,
            f"{one.total(app, 'succeeded'):,} of {one.total(app, 'sent'):,}",
            f"{one.total(app, 'refused'):,}",
            errors(one, app),
            f"{one.total(app, 'unanswered'):,}",
            f"{one.rate(app):,.0f}",
            percentiles(one, app) if one.total(app, "answered") else "",
            heartbeat(one.health(app)),
            heartbeat(one.health(app, "probe")),
        ]
        for one in found
        for app in one.cell.apps
    ]
    text = (
        "Many concurrent clients. After the last request they wait for missing responses until none"
        f" has come for {SILENCE_SECONDS} s; rates are 2xx per second until the last response. A"
        " 503 with Retry-After is how a busy app refuses a request, so it is not an error. In the"
        " operation log-ins, one request in ten is a login; the rest are list, get and create."
        " Health: p50 / p99 / maximum time of `/health` under that load, on a kept connection and"
        " on new ones.\n"
    )
    return f"### Crowds\n\n{text}\n{table(head, rows)}"


def errors(one: Measurement, app: str) -> str:
    """Return the counts of responses that are errors, by status, and of lost connections."""
    counts = {s: n for s, n in one.statuses(app).items() if not s.startswith("2")}
    if refused := one.total(app, "refused"):
        counts["503"] -= refused
    counts["connections lost"] = one.total(app, "broken")
    found = [f"{number:,} {TIMES} {what}" for what, number in counts.items() if number]
    return ", ".join(found) or "0"


def heartbeat(health: Health | None) -> str:
    if health is None:
        return ""
    text = f"{health.p50_ms:.0f} / {health.p99_ms:.0f} / {health.max_ms:.0f}"
    return f"{text}, {health.failed} of {health.asked} failed" if health.failed else text


def pool(found: list[Measurement]) -> str:
    if not found:
        return ""
    rows = [
        [
            one.cell.operation,
            f"{one.cell.latency_ms} ms",
            *[f"{one.rate(name):,.0f} / {one.median(name, 'p99_ms'):,.0f} ms" for name in POOLS],
        ]
        for one in found
    ]
    head = ["operation", "database at", *[f"{size} connections" for size in POOLS.values()]]
    text = f"Ours at {found[0].cell.clients} clients: responses per second / p99.\n"
    return f"### Pools\n\n{text}\n{table(head, rows)}\n{failures(found)}"


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
    text = (
        "Median response time in ms, with one client and all owners in one table. A page has 20"
        " tasks.\n"
    )
    head = ["operation", "tasks per owner", "owners in turn", *APPS]
    return f"### Growth\n\n{text}\n{table(head, rows)}\n{failures(found)}"


def medians(found: list[dict[str, float]]) -> tuple[dict[str, float], float]:
    """Return the median seconds of each part of a generation, and of the whole."""
    parts = {part: statistics.median(one[part] for one in found) for part in found[0]}
    whole = parts.pop("whole")
    return parts, whole


def generation(found: list[dict[str, float]]) -> str:
    if not found:
        return ""
    parts, whole = medians(found)
    alone = sum(parts.values())
    row = [*[f"{seconds:.2f}" for seconds in (*parts.values(), alone, whole)], times(whole / alone)]
    text = "`cookiecutter --no-input` with warm caches, and the steps it needs at least, in s.\n"
    head = [*parts, "sum of these", "whole", "ratio"]
    return f"### Generation\n\n{text}\n{table(head, [row])}"


def connections(seconds: dict[str, float]) -> str:
    if not seconds:
        return ""
    text = (
        f"A first connection and a query on it: {seconds['connect']:.2f} s. Opening and closing a"
        f" session with its connection: {1000 * seconds['session']:.2f} ms, median of 200.\n"
    )
    return f"### Connections\n\n{text}"


def left_out(cells: list[str]) -> str:
    lines = "".join(f"- {cell}\n" for cell in cells)
    return f"### Left out\n\n{lines}" if lines else ""


def about(results: Results) -> str:
    facts = [f"{name}: {value}" for name, value in results.machine.items()]
    trips_ms = (f"{wanted} → {ms:.2f}" for wanted, ms in results.round_trips_ms.items())
    if results.round_trips_ms:
        facts.append(f"round trip to the database in ms, wanted → measured: {', '.join(trips_ms)}")
    return f"### Environment\n\n{'; '.join(facts)}.\n"


def line(one: Measurement) -> str:
    """Return one line about a measurement for the progress display."""
    rates = ", ".join(f"{app} {one.rate(app):,.0f}/s" for app in one.cell.apps)
    if "textbook" not in one.cell.apps:
        return f"{one.cell}: {rates}"
    return f"{one.cell}: {rates}; ours ÷ textbook {times(one.ratio('ours', 'textbook'))}"


def by_latency(found: list[Measurement]) -> list[tuple[int, list[Measurement]]]:
    return [
        (latency, list(group))
        for latency, group in groupby(found, key=lambda one: one.cell.latency_ms)
    ]
