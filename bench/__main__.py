"""`uv run python -m bench --help`."""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from . import goals, profiles, readme, report
from .measure import Measurement, Results, describe_machine, measure, require_results
from .plan import CHAPTERS, OPERATIONS, full_plan, quick_plan, select
from .processes import BenchError
from .project import REPOSITORY

RESULTS = Path(__file__).parent / "results"
README = REPOSITORY / "README.md"
EPILOG = """\
run      measure, and write tables, plots and figures; a full run also updates the README
render   write them again from the figures of an earlier run: --figures FILE
profile  profile list, get and create requests with py-spy; with --before COMMIT, also those of
         the template at that commit
scale    measure one to four processes behind nginx, with PgBouncer; also with --quick
"""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmark a generated project against other apps.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "task", nargs="?", choices=("run", "render", "profile", "scale"), default="run"
    )
    parser.add_argument(
        "--quick", action="store_true", help="run: 5 minutes instead of 13, less precise"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=(*CHAPTERS, *OPERATIONS),
        metavar="WORD",
        help=f"run: chapters ({', '.join(CHAPTERS)}) and operations ({', '.join(OPERATIONS)})",
    )
    parser.add_argument(
        "--figures", type=Path, default=RESULTS / "results.json", metavar="FILE", help="for render"
    )
    parser.add_argument("--before", metavar="COMMIT", help="for profile")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="output folder; default: a new temporary folder for a part of a run and for --quick,"
        " so that the README always shows a full run; otherwise bench/results",
    )
    return parser.parse_args()


class Screen:
    """Progress display: a bar on a terminal, one line per step in a log."""

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


@contextmanager
def at_work(seconds: float) -> Iterator[tuple[Screen, Path]]:
    """Yield a progress display and a temporary folder. seconds: of load, for the progress bar."""
    screen = Screen(seconds)
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder,
        screen.progress,
    ):
        yield screen, Path(folder)


def run(arguments: argparse.Namespace) -> None:
    """Run a plan. Results are kept even if the run ends early."""
    plan = select(quick_plan() if arguments.quick else full_plan(), arguments.only)
    full = not (arguments.quick or arguments.only)
    results = Results(describe_machine())
    try:
        with at_work(plan.seconds) as (screen, folder):
            measure(plan, folder, screen, results)
        require_results(results)
    except BaseException:
        if results.measurements:
            write(results, new_folder())
        raise
    write(results, arguments.output or (RESULTS if full else new_folder()))
    if full and arguments.output is None:
        update_readme(results)


def render(arguments: argparse.Namespace) -> None:
    """Write tables and plots from figures, and update the README if it shows these figures."""
    try:
        results = Results.from_data(json.loads(arguments.figures.read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BenchError(f"{arguments.figures} holds no figures of a run: {error!r}") from None
    folder = arguments.output or arguments.figures.parent
    write(results, folder)
    if folder.resolve() == RESULTS:
        update_readme(results)


def write(results: Results, folder: Path) -> None:
    """Write figures, tables and plots, and print the tables."""
    from . import plots  # noqa: PLC0415  (matplotlib takes longest to import)

    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(results, folder)
    pictures = report.pictures(path.stem for path in drawn)
    parts = [goals.markdown(results), pictures, report.markdown(results)]
    text = "\n".join(part for part in parts if part)
    (folder / "results.json").write_text(as_json(results), "utf-8")
    (folder / "results.md").write_text(text, "utf-8")
    print(text)
    names = ["results.json", "results.md", *(path.name for path in drawn)]
    print(f"In {folder}: {', '.join(names)}")


def as_json(results: Results) -> str:
    """Return all figures as JSON, one line per measurement."""
    data = results.as_data()
    lines = ",\n".join(json.dumps(one) for one in data.pop("measurements"))
    rest = json.dumps(data, ensure_ascii=False).removesuffix("}")
    return f'{rest},\n"measurements": [\n{lines}\n]}}\n'


def update_readme(results: Results) -> None:
    readme.write(README, readme.summary(results, RESULTS, REPOSITORY))
    print(f"Updated {README.name}.")


def profile(arguments: argparse.Namespace) -> None:
    with at_work(profiles.seconds(arguments.before)) as (screen, folder):
        found = profiles.take(folder, screen, arguments.before)
        text = profiles.write(found, folder, arguments.output or RESULTS)
    print(text)


def scale(arguments: argparse.Namespace) -> None:
    from . import scaling  # noqa: PLC0415  (needs what the template's tests need)

    with at_work(scaling.seconds(quick=arguments.quick)) as (screen, folder):
        found = scaling.take(folder, screen, quick=arguments.quick)
    usual = new_folder() if arguments.quick else RESULTS
    print(scaling.write(found, arguments.output or usual))


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="bench-results-"))


def end_orderly(number: int, _frame: object) -> None:
    """Exit as after Ctrl-C, so that every program we started is stopped."""
    sys.exit(128 + number)


TASKS = {"run": run, "render": render, "profile": profile, "scale": scale}


def main() -> None:
    arguments = read_arguments()
    # A shell script starts background commands with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_orderly)
    try:
        TASKS[arguments.task](arguments)
    except BenchError as error:
        sys.exit(f"✗ {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped; nothing is left running.")


if __name__ == "__main__":
    main()
