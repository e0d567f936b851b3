"""`uv run python -m bench --help`."""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from . import plots, report
from .measure import Measurement, Results, measure, require_results
from .plan import APPS, CHAPTERS, OPERATIONS, Plan, full_plan, quick_plan, select
from .processes import BenchError

RESULTS = Path(__file__).parent / "results"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure a generated project, the textbook app and the floor, in turn.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="about 3 minutes in place of about 22, and less exact"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=(*CHAPTERS, *OPERATIONS),
        metavar="WORD",
        help=f"chapters ({', '.join(CHAPTERS)}) and operations ({', '.join(OPERATIONS)})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="where table, plots and figures go: bench/results after a full run, else a new"
        " temporary folder, so that what the README shows is always a full run",
    )
    return parser.parse_args()


class Screen:
    """Shows how far a run is: a bar on a terminal, a line for each step in a log."""

    def __init__(self, seconds: float) -> None:
        description = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True))
        self.progress = Progress(
            description, BarColumn(bar_width=20), TimeElapsedColumn(), transient=True, expand=True
        )
        self._task = self.progress.add_task("", total=seconds or None)

    def say(self, text: str) -> None:
        if self.progress.console.is_terminal:
            self.progress.update(self._task, description=text)
        else:
            print(text, flush=True)

    def advance(self, seconds: float) -> None:
        self.progress.advance(self._task, seconds)

    def found(self, measurement: Measurement) -> None:
        line = report.line(measurement)
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


def run(plan: Plan) -> Results:
    """Carry out a plan, and show how far it is."""
    screen = Screen(sum(cell.rounds * cell.seconds * len(APPS) for cell in plan.cells))
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder,
        screen.progress,
    ):
        return measure(plan, Path(folder), screen)


def write(results: Results, folder: Path) -> None:
    """Write figures, table and plots, and show the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = report.markdown(results)
    data = json.dumps(results.as_data(), indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(data + "\n", "utf-8")
    (folder / "results.md").write_text(text, "utf-8")
    drawn = plots.draw(results, folder)
    print(text)
    print(f"In {folder}: results.json, results.md, {', '.join(path.name for path in drawn)}")


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="bench-results-"))


def end_orderly(number: int, _frame: object) -> None:
    """Have all programs ended that were started: as after Ctrl-C."""
    sys.exit(128 + number)


def main() -> None:
    arguments = read_arguments()
    plan = quick_plan() if arguments.quick else full_plan()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if a script put us behind it
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_orderly)
    try:
        results = run(select(plan, arguments.only))
        require_results(results)
        partial = arguments.quick or arguments.only
        write(results, arguments.output or (new_folder() if partial else RESULTS))
    except BenchError as error:
        sys.exit(f"✗ {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped; nothing was written, and nothing runs any more.")


if __name__ == "__main__":
    main()
