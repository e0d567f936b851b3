"""What was measured, as tables in Markdown."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby

from .load import SILENCE_SECONDS, Health
from .measure import Measurement, Results
from .plan import APPS, POOLS

TIMES = "\N{MULTIPLICATION SIGN}"


def markdown(results: Results) -> str:
    """Return all tables, each under a heading, with what one has to know to read it."""
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


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first hold numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def apps_of(found: Iterable[Measurement]) -> list[str]:
    """Return which apps were measured: in runs of other versions, they may be others."""
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
        "What sessions cost, used as tutorials use them: a transaction for each request, a count"
        " beside each page, commit and refresh. *session* does that with the project's `SessionDep`"
        " and `CurrentUserId`, where *ours* sends one statement by `StatementDep`. *textbook*"
        " (psycopg2, threads) and *async textbook* (asyncpg, event loop) have a session of their"
        " own, look up the user, and try each connection before use (`pool_pre_ping`): one round"
        " trip with psycopg2, three with asyncpg, whose dialect puts a transaction around it.\n"
    )
    return f"### Sessions\n\n{text}\n{comparison(found, pairs)}"


def comparison(found: Sequence[Measurement], pairs: Iterable[tuple[str, str]]) -> str:
    """Return a table of apps side by side. pairs: the apps whose ratios it shows."""
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
        "Answers a second (2xx; medians of the rounds), the times of answers in ms, and the app's "
        f"processor time for an answer in µs ({' / '.join(apps)}).\n"
    )
    return f"{text}\n{table(head, rows)}\n{failures(found)}"


def failures(found: Sequence[Measurement]) -> str:
    """Tell what did not get a 2xx."""
    lines = [
        f"- {one.cell}: {app}: {not_good:,} of {one.total(app, 'sent'):,}\n"
        for one in found
        for app in one.cell.apps
        if (not_good := one.total(app, "sent") - one.total(app, "succeeded"))
    ]
    if not lines:
        return "Every request of this chapter was answered by a 2xx.\n"
    return f"Not answered by a 2xx:\n\n{''.join(lines)}"


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
    text = "The median answer to one client, as a multiple of the database's round trip of 10 ms.\n"
    return f"### Round trips\n\n{text}\n{table(['operation', *apps], rows)}"


def crowd(found: list[Measurement]) -> str:
    if not found:
        return ""
    head = ["operation", "clients", "database at", "app", "answered 2xx", "503, Retry-After"]
    head += ["errors", "never answered", "2xx a second", "p50 / p99 ms"]
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
        "All clients at once. After the last request they wait for what is missing, until nothing"
        f" has come for {SILENCE_SECONDS} s; rates are 2xx a second until the last answer. A 503"
        " with Retry-After is how a busy app refuses, and no error. Of the requests called log-ins,"
        " one in ten is one; the rest are lists, single tasks and new ones. Health: p50 / p99 /"
        " longest time of `/health`, asked meanwhile on a connection that was there before, and on"
        " new ones.\n"
    )
    return f"### Crowds\n\n{text}\n{table(head, rows)}"


def errors(one: Measurement, app: str) -> str:
    """Return what was answered but 2xx and a 503 with Retry-After, by status, and what broke."""
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
    text = f"Ours at {found[0].cell.clients} clients: answers a second, and their p99.\n"
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
        "The median time of an answer in ms, one client, all owners in one table. A page has 20"
        " tasks.\n"
    )
    head = ["operation", "tasks of an owner", "owners in turn", *APPS]
    return f"### Growth\n\n{text}\n{table(head, rows)}\n{failures(found)}"


def medians(found: list[dict[str, float]]) -> tuple[dict[str, float], float]:
    """Return the seconds of each part of a generation, and those of the whole."""
    parts = {part: statistics.median(one[part] for one in found) for part in found[0]}
    whole = parts.pop("whole")
    return parts, whole


def generation(found: list[dict[str, float]]) -> str:
    if not found:
        return ""
    parts, whole = medians(found)
    alone = sum(parts.values())
    row = [*[f"{seconds:.2f}" for seconds in (*parts.values(), alone, whole)], times(whole / alone)]
    text = "`cookiecutter --no-input` with warm caches, next to what it cannot do without, in s.\n"
    head = [*parts, "these alone", "the whole", "ratio"]
    return f"### Generation\n\n{text}\n{table(head, [row])}"


def connections(seconds: dict[str, float]) -> str:
    if not seconds:
        return ""
    text = (
        f"A first connection and a query on it: {seconds['connect']:.2f} s. A session with its"
        f" connection, taken and given back: {1000 * seconds['session']:.2f} ms, median of 200.\n"
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
    return f"### Where\n\n{'; '.join(facts)}.\n"


def line(one: Measurement) -> str:
    """Return a measurement in one line, for the progress display."""
    rates = ", ".join(f"{app} {one.rate(app):,.0f}/s" for app in one.cell.apps)
    if "textbook" not in one.cell.apps:
        return f"{one.cell}: {rates}"
    return f"{one.cell}: {rates}; ours ÷ textbook {times(one.ratio('ours', 'textbook'))}"


def by_latency(found: list[Measurement]) -> list[tuple[int, list[Measurement]]]:
    return [
        (latency, list(group))
        for latency, group in groupby(found, key=lambda one: one.cell.latency_ms)
    ]
