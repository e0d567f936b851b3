"""Plots of the results as SVG. Text stays text, and is readable on white and on black."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .measure import Results
from .plan import APPS, MAIN, POOLS
from .report import apps_of, by_latency, round_trips

COLORS = {
    "ours": "#2f81f7",
    "textbook": "#d4762c",
    "floor": "#8b949e",
    "async floor": "#57ab5a",
}
DISTANCES = ("#7cc4f8", "#2f81f7", "#8250df", "#d4762c")  # from low to high latency
GREY = "#7d858e"  # contrast: 3.8 on white, 4.9 on GitHub's black
LEGEND: dict[str, Any] = {
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.06),
    "ncols": 4,
    "frameon": False,
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bench",  # makes the output reproducible
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
    """Draw the plots for which there are figures. Returns the files."""
    drawn = []
    with mpl.rc_context(STYLE):
        for name, plot in PLOTS.items():
            figure = plot(results)
            if figure is not None:
                path = folder / f"{name}.svg"
                # Without a date, the same figures give the same file.
                figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
                drawn.append(path)
    return drawn


def bars(axes: Axes, groups: Sequence[str], values: dict[str, list[float]], form: str) -> None:
    """Draw a bar for each app in each group, labelled with its value."""
    width = 0.8 / len(values)
    for number, (app, heights) in enumerate(values.items()):
        places = [place + (number - (len(values) - 1) / 2) * width for place in range(len(groups))]
        drawn = axes.bar(places, heights, width * 0.92, label=app, color=COLORS[app])
        labels = [format(height, form) for height in heights]
        axes.bar_label(drawn, labels=labels, fontsize=7, padding=2, rotation=90)
    axes.margins(y=0.15)  # room for the labels above the bars
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")


def panels(number: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(6.5, 4.2 * number), 3.2))
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def speed(results: Results) -> Figure | None:
    """Throughput at 16 clients, one panel per latency."""
    found = by_latency([one for one in results.of("speed") if one.cell.clients == 16])
    if not found:
        return None
    figure, all_axes = panels(len(found))
    for axes, (latency, measured) in zip(all_axes, found, strict=True):
        operations = [one.cell.operation for one in measured]
        rates = {app: [one.rate(app) for one in measured] for app in apps_of(measured)}
        bars(axes, operations, rates, ",.0f")
        axes.set_title(f"database at {latency} ms", fontsize=9)
    all_axes[0].set_ylabel("responses per second, 16 clients")
    all_axes[len(all_axes) // 2].legend(**LEGEND)
    return figure


def trips(results: Results) -> Figure | None:
    """Round trips to the database per response."""
    found = round_trips(results)
    if not found:
        return None
    figure, (axes,) = panels(1)
    values = {app: [trips_of[app] for _, trips_of in found] for app in found[0][1]}
    bars(axes, [operation for operation, _ in found], values, ".1f")
    axes.set_ylabel("median response time, in round trips of 10 ms")
    axes.legend(**LEGEND)
    return figure


def crowd(results: Results) -> Figure | None:
    """Throughput by number of clients: one row per latency, one column per operation."""
    measured = [one for one in results.measurements if one.cell.chapter in {"speed", "crowd"}]
    measured = [one for one in measured if {*APPS} <= {*one.cell.apps}]
    measured = [one for one in measured if one.cell.operation in MAIN]
    latencies = sorted({one.cell.latency_ms for one in results.of("crowd")})
    operations = [name for name in MAIN if any(one.cell.operation == name for one in measured)]
    crowds = sorted({one.cell.clients for one in measured})
    if not (latencies and operations):
        return None
    figure = Figure(figsize=(max(6.5, 2.4 * len(operations)), 0.8 + 1.8 * len(latencies)))
    grid = figure.subplots(
        len(latencies), len(operations), squeeze=False, sharex=True, sharey="row"
    )
    for row, latency in enumerate(latencies):
        for column, operation in enumerate(operations):
            place = (latency, operation)
            found = [one for one in measured if (one.cell.latency_ms, one.cell.operation) == place]
            found.sort(key=lambda one: one.cell.clients)
            clients = [one.cell.clients for one in found]
            axes = grid[row, column]
            for app in APPS:
                rates = [one.rate(app) for one in found]
                axes.plot(clients, rates, marker="o", ms=3, color=COLORS[app], label=app)
            axes.set_xscale("log")
            axes.set_xticks(crowds, [short(number) for number in crowds], fontsize=8)
            axes.minorticks_off()
            axes.grid()
            if not row:
                axes.set_title(operation, fontsize=10)
        grid[row, 0].set_ylim(bottom=0)  # now that all of the row is drawn
        grid[row, 0].set_ylabel(f"per second,\ndatabase at {latency} ms")
    grid[-1, len(operations) // 2].set_xlabel("concurrent clients")
    figure.tight_layout()
    legend = LEGEND | {"bbox_to_anchor": (0.5, 0.98)}
    figure.legend(*grid[0, 0].get_legend_handles_labels(), **legend)
    return figure


def short(number: int) -> str:
    return f"{number // 1000}k" if number >= 1000 else str(number)


def pool(results: Results) -> Figure | None:
    """Throughput and 99th percentile by number of connections, one column per operation."""
    found = results.of("pool")
    operations = sorted({one.cell.operation for one in found}, reverse=True)
    if not found:
        return None
    figure = Figure(figsize=(max(6.5, 4.2 * len(operations)), 5.2))
    grid = figure.subplots(2, len(operations), squeeze=False, sharex=True, sharey="row")
    sizes = list(POOLS.values())
    for column, operation in enumerate(operations):
        measured = [one for one in found if one.cell.operation == operation]
        for number, one in enumerate(measured):
            label = f"database at {one.cell.latency_ms} ms"
            color = DISTANCES[number % len(DISTANCES)]
            for axes, figure_of_run in zip(grid[:, column], ("rate", "p99_ms"), strict=True):
                values = [one.median(name, figure_of_run) for name in POOLS]
                axes.plot(sizes, values, marker="o", ms=4, color=color, label=label)
        top, bottom = grid[:, column]
        top.set_title(operation, fontsize=10)
        bottom.set_yscale("log")
        bottom.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bottom.yaxis.set_major_formatter("{x:,.0f}")
        bottom.set_xscale("log")
        bottom.set_xticks(sizes, [str(size) for size in sizes])
        bottom.minorticks_off()
        bottom.set_xlabel("connections in the pool")
        for axes in (top, bottom):
            axes.grid()
    grid[0, 0].set_ylim(bottom=0)  # now that all of the row is drawn
    grid[0, 0].set_ylabel(f"responses per second, {found[0].cell.clients} clients")
    grid[1, 0].set_ylabel("99th percentile, ms")
    figure.tight_layout()
    legend = LEGEND | {"bbox_to_anchor": (0.5, 0.98), "fontsize": 9}
    figure.legend(*grid[0, 0].get_legend_handles_labels(), **legend)
    return figure


def growth(results: Results) -> Figure | None:
    """Response time of a page by the owner's number of tasks."""
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
    axes.set_ylabel("median response time of a page, ms")
    axes.grid()
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


PLOTS: dict[str, Callable[[Results], Figure | None]] = {
    "speed": speed,
    "trips": trips,
    "crowd": crowd,
    "growth": growth,
    "pool": pool,
}
