"""The operator's commands: `uv run manage.py --help`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Self

import typer

from config import ENV_FILE, PROJECT_DIR, PYPROJECT, Settings, SettingsError, load_settings
from postgres import env_file
from postgres.url import DatabaseUrl, DatabaseUrlError, parse

if TYPE_CHECKING:
    from postgres.check import Check
    from postgres.connect import OnWait
    from postgres.copy_data import Progress

app = typer.Typer(help="Run this project.", no_args_is_help=True, add_completion=False)
postgres = typer.Typer(help="The embedded PostgreSQL of this project.", no_args_is_help=True)
app.add_typer(postgres, name="postgres")


def fail(*lines: str) -> typer.Exit:
    """Say what is wrong. The result is to be raised."""
    for line in lines:
        typer.secho(f"✗ {line}", fg="red", err=True)
    return typer.Exit(1)


def settings_or_fail() -> Settings:
    try:
        return load_settings(ENV_FILE)
    except SettingsError as error:
        raise fail(*str(error).splitlines()) from None


@contextmanager
def failing_plainly() -> Iterator[None]:
    """Turn what can go wrong with the embedded server into a message and exit code 1."""
    try:
        from postgres.embedded import LocalPostgresError
    except ModuleNotFoundError:
        raise fail("the embedded PostgreSQL is for development only, and not here") from None
    try:
        yield
    except LocalPostgresError as error:
        raise fail(str(error)) from None


@app.command()
def env(
    *,
    local: Annotated[bool, typer.Option("--local", help="Use the embedded PostgreSQL.")] = False,
    new_secret: Annotated[
        bool, typer.Option("--new-secret", help="Replace BETTER_AUTH_SECRET, nothing else.")
    ] = False,
) -> None:
    """Create .env, or change the DATABASE_URL in it.

    Asks for a connection string without showing it, or reads it from standard input where that is
    not a terminal. An empty answer chooses the embedded PostgreSQL.
    """
    refuse_damaged_env()
    if not ENV_FILE.exists():
        secret = {"BETTER_AUTH_SECRET": env_file.new_secret()}
        env_file.create(ENV_FILE, PROJECT_DIR / ".env.example", secret)
        typer.echo("✓ .env is new, with a BETTER_AUTH_SECRET of its own")
        if new_secret:
            return
    elif new_secret:
        env_file.set_value(ENV_FILE, "BETTER_AUTH_SECRET", env_file.new_secret())
        typer.echo("✓ BETTER_AUTH_SECRET is new: whoever was logged in has to log in again")
        return
    url = None if local else ask_database_url(empty="the embedded PostgreSQL")
    if url is None:
        url = env_file.embedded_url(PYPROJECT["project"]["name"].replace("-", "_"))
    use_database(url)
    typer.echo("  next: uv run manage.py migrate")


def refuse_damaged_env() -> None:
    """A line could be changed in any file, but no command would read it afterwards."""
    try:
        ENV_FILE.read_text("utf-8")
    except UnicodeDecodeError:
        raise fail(
            f"{ENV_FILE} is damaged, or not saved as UTF-8\n"
            f"  → save it as UTF-8, or begin anew: mv {ENV_FILE.name} {ENV_FILE.name}.old, then the"
            " same command"
        ) from None
    except OSError:
        return  # it is missing, or whoever writes it will tell


def use_database(url: DatabaseUrl) -> None:
    """Write it into .env."""
    env_file.set_value(ENV_FILE, "DATABASE_URL", url.for_libpq())
    typer.echo(f"✓ DATABASE_URL is {url}")
    if "DATABASE_URL" in os.environ:
        typer.echo("! The shell sets DATABASE_URL too, and the shell goes first: unset it there.")
    name = "DATABASE_URL_DIRECT"
    remedies = {
        "unset it in the shell": os.environ.get(name),
        "change or remove that line in .env": env_file.get_value(ENV_FILE, name),
    }
    for remedy, value in remedies.items():
        if value and not is_same_place(value, url):
            typer.echo(f"! {name} still names another database: migrations go there; {remedy}")


def is_same_place(text: str, url: DatabaseUrl) -> bool:
    try:
        return place_of(parse(text)) == place_of(url)
    except DatabaseUrlError:
        return False


def ask_database_url(*, empty: str) -> DatabaseUrl | None:
    """Return what was pasted, None for an empty answer, which means `empty`."""
    try:
        if sys.stdin.isatty():
            return env_file.ask_database_url(empty=empty)
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
        return env_file.take_database_url(text) if text.strip() else None
    except DatabaseUrlError as error:
        raise fail(f"DATABASE_URL: {error}") from None


@app.command()
def check(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Try every step on the way to the database, and say what to do about the one that fails.

    A compute that sleeps is waited for. Exit code 0: all is well, 1: a step failed.
    """
    steps = []
    with Waiting("waiting for the database") as waiting:
        for step in run_checks(waiting):
            steps.append(step)
            waiting.clear()
            if not as_json:
                show(step)
    ok = all(step.ok for step in steps)
    if as_json:
        typer.echo(json.dumps(report(steps), ensure_ascii=False, indent=2))
    elif unreached := [step.name for step in steps if step.ok is None]:
        typer.echo(f"- not reached: {', '.join(unreached)}")
    raise typer.Exit(0 if ok else 1)


def run_checks(on_wait: "OnWait") -> Iterator["Check"]:
    from postgres.check import Check, check_connection
    from postgres.explain import BY_NAME

    try:
        settings = load_settings(ENV_FILE)
    except SettingsError as error:
        for line in str(error).splitlines():
            problem, _, advice = line.partition("; ")
            yield Check("settings", False, problem, advice, BY_NAME["settings-wrong"])
        return
    source = "the environment" if "DATABASE_URL" in os.environ else ".env"
    yield Check("settings", ok=True, detail=f"complete; DATABASE_URL comes from {source}")
    yield from check_connection(settings.database_url, known_revisions, on_wait)


def known_revisions() -> Sequence[str]:
    import migrations  # brings SQLAlchemy and Alembic: only the last step of a check needs them

    return migrations.history()


def report(steps: Sequence["Check"]) -> dict[str, object]:
    """Return what programs may want to know; docs/findings.md explains them."""
    found = next((step.finding for step in steps if step.finding), None)
    return {
        "ok": found is None,
        "finding": found and found.name,
        "retry": found and found.retry,
        "said": found and found.said,
        "checks": [
            {
                "name": step.name,
                "ok": step.ok,
                "detail": step.detail,
                "advice": step.advice,
                "finding": step.finding and step.finding.name,
            }
            for step in steps
        ],
    }


def show(step: "Check") -> None:
    if step.ok is None:
        return
    mark, color = ("✓", "green") if step.ok else ("✗", "red")
    typer.echo(f"{typer.style(mark, fg=color)} {step.name:<9} {step.detail}")
    if step.advice:
        typer.echo(f"  {'':<9} → {step.advice}")
    if step.finding and step.finding.said:
        typer.echo(f"  {'':<9} error: {step.finding.said}")


class Waiting:
    """Shows how long the database has been waited for: in a live line, in a log in a few lines."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._line = ""
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.clear()

    def __call__(self, seconds: float) -> None:
        if not self._live and seconds < self._next:
            return
        self._next = seconds + 5
        self._line = f"  {self.what}, {seconds:.0f} s so far"
        ends = ("\r", "") if self._live else ("", "\n")
        print(self._line.join(ends), end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the live line away, before something else is shown."""
        if self._live and self._line:
            print(f"\r{' ' * len(self._line)}\r", end="", file=sys.stderr, flush=True)
            self._line = ""


@app.command()
def migrate(
    *,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that it may take.")] = 600,
) -> None:
    """Bring the schema up to date: all of it, or nothing. Starts the embedded server.

    A compute that sleeps is waited for.
    """
    bring_up_to_date(running_database(), timeout)


def running_database() -> DatabaseUrl:
    """Return where migrations go, with the embedded server started where that is it."""
    from postgres.connect import reach

    url = settings_or_fail().migration_url
    if url.is_embedded:
        try:
            reach(url)
        except OSError:
            start()
            url = settings_or_fail().migration_url  # the port may have changed
    return url


def bring_up_to_date(
    url: DatabaseUrl,
    timeout: float,
    then: str = "`uv run manage.py check` tells whether it is done",
) -> None:
    """Run the migrations that are missing.

    timeout: seconds. then: what is said when they have passed.
    """
    import psycopg2
    from alembic.util import CommandError
    from sqlalchemy.exc import DBAPIError

    import migrations
    from postgres.connect import TOTAL_SECONDS, Patience, hang_up, log_in

    connection = None
    try:
        with Waiting("waiting for the database") as waiting:
            connection = log_in(url, Patience(url, waiting, TOTAL_SECONDS))
        with Waiting("migrating") as waiting:
            patience = Patience(url, waiting, timeout)
            patience.run(lambda: migrations.upgrade(url, connection), timeout)
    except (CommandError, DBAPIError, psycopg2.Error, TimeoutError) as error:
        if connection is not None and isinstance(error, TimeoutError):
            hang_up(connection)
            raise fail(
                f"{url.address}: given up after {timeout:.0f} s\n"
                f"  → {then}; --timeout gives it longer"
            ) from None
        raise failed(url, error, "nothing was changed") from None
    typer.echo(f"✓ the schema is at {migrations.head()}")


def failed(url: DatabaseUrl, error: Exception, outcome: str) -> typer.Exit:
    """Say what an error of a database means. The result is to be raised."""
    from postgres.explain import explain

    finding = explain(error, url)
    return fail(
        f"{url.address}: {finding.cause}; {outcome}\n  → {finding.advice}\n  error: {finding.said}"
    )


@dataclass
class Outcome:
    """What is true of a copy, whatever ends it now."""

    text: str = "nothing was copied"


@app.command()
def copy(
    *,
    switch: Annotated[
        bool | None,
        typer.Option(
            "--switch/--no-switch", help="Have .env name the new database afterwards, or not."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that it may take.")] = 3600,
) -> None:
    """Copy all data into an empty database, such as a new one at Neon: all of it, or nothing.

    Asks for its connection string without showing it, or takes it from TARGET_DATABASE_URL, or from
    standard input where that is not a terminal. Stop the app first: what it writes meanwhile stays
    in the old database.
    """
    outcome = Outcome()
    try:
        move(switch, timeout, outcome)
    except (KeyboardInterrupt, typer.Abort):  # the latter is what a question makes of Ctrl-C
        typer.echo(err=True)  # the terminal shows a ^C in this line
        fail(f"stopped: {outcome.text}")
        raise typer.Exit(130) from None


def move(switch: bool | None, timeout: float, outcome: Outcome) -> None:
    source, target = running_database(), ask_target_url()
    if place_of(source) == place_of(target):
        raise fail("that is the same database as in DATABASE_URL: nothing was copied")
    check_target(target)
    made = tables_to_make(target.direct, outcome)
    bring_up_to_date(target.direct, timeout, then=outcome.text)
    rows = copy_data(source, target.direct, timeout, made, outcome).rows
    outcome.text = f"all rows are at {target}; .env names the old database"
    for table, number in rows.items():
        typer.echo(f"✓ {table:<{max(map(len, rows))}} {number:>9,} row{'s' * (number != 1)}")
    typer.echo(f"✓ all of them are at {target}")
    if switch is None and sys.stdin.isatty() and not os.environ.get("TARGET_DATABASE_URL"):
        switch = typer.confirm("  Shall .env name this database from now on?")
    if switch:
        outcome.text = f"all rows are at {target}; look into .env for the database that it names"
        use_database(target)
        typer.echo("  next: uv run manage.py check")
    else:
        typer.echo("  .env names the old one; to change that: uv run manage.py env")


def ask_target_url() -> DatabaseUrl:
    """Return where the data shall go."""
    given = os.environ.get("TARGET_DATABASE_URL")
    try:
        url = env_file.take_database_url(given) if given else ask_database_url(empty="stop")
    except DatabaseUrlError as error:
        raise fail(f"TARGET_DATABASE_URL: {error}") from None
    if url is None:
        raise fail("no connection string was given: nothing was copied")
    return url


def place_of(url: DatabaseUrl) -> tuple[str, int, str]:
    return url.direct.host.lower(), url.port, url.database


def check_target(url: DatabaseUrl) -> None:
    """Show the steps on the way there. That tables are missing is as it should be."""
    from postgres.check import check_connection

    with Waiting("waiting for the database") as waiting:
        for step in check_connection(url, known_revisions, waiting):
            if step.finding and step.finding.name == "schema-behind":
                return
            waiting.clear()
            if step.ok is False:
                # The advice was written for those who come from `manage.py check`.
                show(replace(step, advice=step.advice.replace("manage.py env", "manage.py copy")))
                raise fail("nothing was copied")
            show(step)


@contextmanager
def failing_with(outcome: Outcome) -> Iterator[None]:
    """Turn what goes wrong at either end of a copy into a message and exit code 1."""
    from postgres.copy_data import CopyRefused, EndFailed

    try:
        yield
    except EndFailed as failure:
        raise failed(failure.url, failure, outcome.text) from None
    except CopyRefused as refusal:
        raise fail(f"{refusal}; {outcome.text}") from None


def tables_to_make(target: DatabaseUrl, outcome: Outcome) -> list[str]:
    """Return the tables that migrations have yet to make. The others must not have rows."""
    from sqlmodel import SQLModel

    import models  # noqa: F401  (the tables)
    from postgres.connect import TOTAL_SECONDS, Patience
    from postgres.copy_data import End, failing_at, find_missing

    with failing_with(outcome), Waiting("waiting for the database") as waiting:
        patience = Patience(target, waiting, TOTAL_SECONDS)
        end = End.log_in(target, patience)
        try:
            with failing_at(target):
                return patience.run(lambda: find_missing(end, SQLModel.metadata), TOTAL_SECONDS)
        finally:
            end.hang_up()


def copy_data(
    source: DatabaseUrl, target: DatabaseUrl, timeout: float, made: Sequence[str], outcome: Outcome
) -> "Progress":
    """Copy all rows and commit them.

    timeout: seconds. made: tables that were not there when this run began.
    """
    from sqlmodel import SQLModel

    import models  # noqa: F401  (the tables)
    from postgres.check import QUERY_SECONDS, StepFailed, compare_schema
    from postgres.connect import TOTAL_SECONDS, Patience
    from postgres.copy_data import End, Progress, copy_rows, failing_at

    ends: list[End] = []
    progress = Progress()
    with failing_with(outcome):
        try:
            with Waiting("waiting for the database") as waiting:
                for url in (source, target):
                    patience = Patience(url, waiting, TOTAL_SECONDS)
                    ends.append(End.log_in(url, patience))
                old, new = ends
                with failing_at(source):
                    compare_schema(source, old.connection, known_revisions, patience)
                    others = patience.run(old.other_clients, QUERY_SECONDS)
            if others:
                typer.echo(
                    f"! {source} has other connections ({others}): what they write now is not"
                    " copied"
                )
            with Waiting("copying") as waiting:

                def tell(seconds: float) -> None:
                    waiting.what = str(progress)
                    waiting(seconds)

                patience = Patience(target, tell, timeout)
                left = patience.run(
                    lambda: copy_rows(old, new, SQLModel.metadata, progress, made), timeout
                )
                outcome.text = (
                    "whether it is all there, the same command tells: it refuses tables with rows"
                )
                with failing_at(target):
                    patience.run(new.commit, TOTAL_SECONDS)
        except TimeoutError:  # of copy_rows: the others come as EndFailed
            raise fail(
                f"given up after {timeout:.0f} s: {outcome.text}\n  → --timeout gives it longer"
            ) from None
        except StepFailed as failure:
            advice = failure.finding.advice
            raise fail(f"{source}: {failure}; {outcome.text}\n  → {advice}") from None
        finally:
            for end in ends:
                end.hang_up()  # whatever it waits for: other threads use it, too
    if left:
        typer.echo(f"! not copied, since no model has them: {', '.join(left)}")
    return progress


@postgres.command()
def start() -> None:
    """Create the server on first use, and start it where it does not run."""
    before = settings_or_fail().database_url
    with failing_plainly():
        from postgres import embedded

        url = embedded.ensure_running(ENV_FILE)
    typer.echo(f"✓ PostgreSQL runs at {url}")
    if url.port != before.port:
        typer.echo(f"! Port {before.port} was taken; .env names the new one: restart the app")


@postgres.command()
def stop() -> None:
    """Stop the server; its data stays."""
    with failing_plainly():
        from postgres import embedded

        stopped = embedded.stop()
    typer.echo("✓ PostgreSQL has stopped" if stopped else "✓ PostgreSQL was not running")


@postgres.command()
def status() -> None:
    """Say whether the server runs; exit 0 when it does, 3 when it does not."""
    with failing_plainly():
        from postgres import embedded

        state = embedded.status()
    if not state.running:
        typer.echo(f"- PostgreSQL does not run; its data is in {state.folder}")
        raise typer.Exit(3)
    typer.echo(f"✓ PostgreSQL runs on port {state.port}, pid {state.pid}, log {state.log}")


@postgres.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context) -> None:
    """Open psql on the embedded server; further arguments go to psql."""
    url = settings_or_fail().database_url
    if not url.is_embedded:
        raise fail(f"DATABASE_URL is not the embedded server but {url}: use your own psql")
    with failing_plainly():
        from postgres import embedded

        program = embedded.binaries() / "psql"
        url = embedded.ensure_running(ENV_FILE)
    login = ["--host", url.host, "--port", str(url.port), "--username", url.user]
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("PG")}
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is psql's own: it cancels a query
    done = subprocess.run(  # noqa: S603
        [str(program), *login, *context.args, url.database],
        # The password goes by the environment: a command line can be read by everybody.
        env=environment | {"PGPASSWORD": url.password, "PGSSLMODE": "disable"},
        check=False,
    )
    raise typer.Exit(done.returncode)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has no ✓ shows a ?
    is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    app(color=False if is_plain else None)
