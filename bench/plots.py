"""What was measured, as SVG: text stays text, and can be read on white and on black."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measure import Results
from .plan import APPS
from .report import by_latency, round_trips

COLORS = {"ours": "#2f81f7", "textbook": "#d4762c", "floor": "#8b949e"}
GREY = "#7d858e"  # a contrast of 3.8 on white, of 4.9 on GitHub's black
LEGEND: dict[str, Any] = {
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.06),
    "ncols": 3,
    "frameon": False,
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bench",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.25,
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what there are figures for. Returns the files."""
    drawn = []
    with mpl.rc_context(STYLE):
        for name, plot in PLOTS.items():
            figure = plot(results)
            if figure is not None:
                path = folder / f"{name}.svg"
                # Without a date, a run with the same figures changes no file.
                figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
                drawn.append(path)
    return drawn


def bars(axes: Axes, groups: Sequence[str], values: dict[str, list[float]], form: str) -> None:
    """Draw a bar for each app in each group, with its value above it."""
    width = 0.8 / len(values)
    for number, (app, heights) in enumerate(values.items()):
        places = [place + (number - (len(values) - 1) / 2) * width for place in range(len(groups))]
        drawn = axes.bar(places, heights, width * 0.92, label=app, color=COLORS[app])
        axes.bar_label(drawn, labels=[format(v, form) for v in heights], fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")


def panels(number: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(6.5, 4.2 * number), 3.2))
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def speed(results: Results) -> Figure | None:
    """Throughput at 16 clients: a panel for each latency."""
    found = by_latency([one for one in results.of("speed") if one.cell.clients == 16])
    if not found:
        return None
    figure, all_axes = panels(len(found))
    for axes, (latency, measured) in zip(all_axes, found, strict=True):
        operations = [one.cell.operation for one in measured]
        rates = {app: [one.median(app, "rate") for one in measured] for app in APPS}
        bars(axes, operations, rates, ",.0f")
        axes.set_title(f"database at {latency} ms", fontsize=9)
    all_axes[0].set_ylabel("answers a second, 16 clients")
    all_axes[len(all_axes) // 2].legend(**LEGEND)
    return figure


def trips(results: Results) -> Figure | None:
    """Round trips to the database that an answer takes."""
    found = round_trips(results)
    if not found:
        return None
    figure, (axes,) = panels(1)
    values = {app: [trips_of[app] for _, trips_of in found] for app in APPS}
    bars(axes, [operation for operation, _ in found], values, ".1f")
    axes.set_ylabel("median answer, in round trips of 10 ms")
    axes.legend(**LEGEND)
    return figure


def crowd(results: Results) -> Figure | None:
    """The share of requests that were answered by a 2xx."""
    found = results.of("crowd")
    if not found:
        return None
    figure, (axes,) = panels(1)
    figure.set_figwidth(max(6.5, 1.1 * len(found)))
    groups = [
        f"{one.cell.operation}\n{one.cell.clients:,}\n{one.cell.latency_ms} ms" for one in found
    ]
    shares = {
        app: [100 * one.total(app, "succeeded") / one.total(app, "sent") for one in found]
        for app in APPS
    }
    bars(axes, groups, shares, ".0f")
    axes.set_ylabel("% of requests answered, 2xx")
    axes.set_xlabel("operation, clients at once, database at")
    axes.legend(**LEGEND)
    return figure


def growth(results: Results) -> Figure | None:
    """The time of a page by the number of tasks its owner has."""
    found = [one for one in results.of("growth") if one.cell.owners == 1]
    if len({one.cell.tasks for one in found}) < 2:
        return None
    figure, (axes,) = panels(1)
    for operation, line, name in (("list", "-", "first page"), ("last page", "--", "last page")):
        measured = [one for one in found if one.cell.operation == operation]
        for app in APPS if measured else ():
            times = [one.median(app, "p50_ms") for one in measured]
            sizes = [one.cell.tasks for one in measured]
            label = f"{app}, {name}"
            axes.plot(sizes, times, line, marker="o", ms=4, color=COLORS[app], label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tasks of one owner")
    axes.set_ylabel("median time of a page, ms")
    axes.grid()
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


PLOTS: dict[str, Callable[[Results], Figure | None]] = {
    "speed": speed,
    "trips": trips,
    "crowd": crowd,
    "growth": growth,
}
