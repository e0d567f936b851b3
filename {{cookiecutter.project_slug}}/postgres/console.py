"""What the commands show: steps and their times, what is waited for, what failed and what to do."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import typer

from postgres.check import Check


def fail(*problems: str, advice: str = "", error: str = "", code: int = 1) -> NoReturn:
    """Print what is wrong, what to do, and the database's error. Ends the command."""
    advices = [f"  → {line}" for line in advice.splitlines()]
    errors = [f"  error: {error}"] if error else []
    for line in [*(f"✗ {problem}" for problem in problems), *advices, *errors]:
        typer.secho(line, fg="red", err=True)
    raise typer.Exit(code)


def end_as_stopped(outcome: str) -> NoReturn:
    """Print what is true after Ctrl-C or Ctrl-D, and end the command."""
    typer.echo(err=True)  # the terminal shows a ^C in this line
    fail(f"stopped: {outcome}", code=130)


@contextmanager
def on_stop(outcome: str) -> Iterator[None]:
    """End the command with this outcome when the user stops what is inside."""
    try:
        yield
    except (KeyboardInterrupt, EOFError, typer.Abort):  # Typer's own questions raise Abort
        end_as_stopped(outcome)


@contextmanager
def timed_step(name: str) -> Iterator[None]:
    """Print that a step is done, and how long it took; on a terminal, that it has begun."""
    start = time.monotonic()
    if is_live():
        print(f"  {name} …", end="\r", file=sys.stderr, flush=True)
    yield
    typer.echo(f"{typer.style('✓', fg='green')} {name} ({time.monotonic() - start:.1f} s)")


def show_check(check: Check) -> None:
    """Print a step of the check, unless it was not reached."""
    if check.ok is None:
        return
    mark = typer.style("✓", fg="green") if check.ok else typer.style("✗", fg="red")
    typer.echo(f"{mark} {check.name:<9} {check.detail}")
    if check.advice:
        typer.echo(f"  {'':<9} → {check.advice}")
    if check.finding and check.finding.message:
        typer.echo(f"  {'':<9} error: {check.finding.message}")


def show_checks(checks: Iterator[Check], waiting: "Waiting", *, as_json: bool) -> bool:
    """Print each step as it comes, or all as JSON. Returns whether all passed."""
    done = []
    for check in checks:
        done.append(check)
        if not as_json:
            waiting.show(check)
    if as_json:
        typer.echo(json.dumps(report(done), ensure_ascii=False, indent=2))
    elif unreached := [check.name for check in done if check.ok is None]:
        typer.echo(f"- not reached: {', '.join(unreached)}")
    return all(check.ok for check in done)


def report(checks: Sequence[Check]) -> dict[str, Any]:
    """Return what programs may want to know; docs/findings.md explains `finding` and `retry`."""
    found = next((check.finding for check in checks if check.finding), None)
    return {
        "ok": found is None,
        "finding": found and found.name,
        "retry": found and found.retry,
        "message": found and found.message,
        "checks": [
            {
                "name": check.name,
                "ok": check.ok,
                "detail": check.detail,
                "advice": check.advice,
                "finding": check.finding and check.finding.name,
            }
            for check in checks
        ],
    }


def is_live() -> bool:
    """Whether a line may be overwritten."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Waiting:
    """Shows how long something has taken: in a live line on a terminal, in a few lines in a log."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._live = is_live()
        self._line = ""
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.clear()

    def __call__(self, seconds: float) -> None:
        if not self._live and self._next - 5 <= seconds < self._next:
            return
        self._next = seconds + 5
        self._line = f"  {self.what}, {seconds:.0f} s so far"
        text = f"\r{self._line}" if self._live else f"{self._line}\n"
        print(text, end="", file=sys.stderr, flush=True)

    def update(self, what: str, seconds: float) -> None:
        """Show the seconds of another wait."""
        self.clear()
        self.what = what
        self(seconds)

    def show(self, check: Check) -> None:
        self.clear()
        show_check(check)

    def clear(self) -> None:
        """Remove the live line before something else is printed."""
        if self._live and self._line:
            print(f"\r{' ' * len(self._line)}\r", end="", file=sys.stderr, flush=True)
            self._line = ""
