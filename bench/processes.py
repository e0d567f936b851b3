"""Start and stop the programs of a run, so that none outlives us."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import IO
from urllib.parse import urlsplit

import psutil
import psycopg2

HERE = Path(__file__).parent
START_SECONDS = 30
LISTENING_SECONDS = 0.25  # between two looks at a program's output
BACKLOG = 2048  # uvicorn's default
# Environment variables that programs inherit: none that an app could read as a setting.
PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYENV_ROOT"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_DIR", "SSL_CERT_FILE"),
    *("UV", "UV_CACHE_DIR", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_PYTHON_INSTALL_DIR"),
)


Command = Sequence[str | Path]


class BenchError(Exception):
    """Says why the benchmark cannot run, and what to do about it."""


def environment(**variables: str) -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | variables


def end_of(text: str, lines: int = 25) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines()[-lines:])


def run(
    *command: str | Path,
    cwd: Path,
    seconds: float = 300,
    silence: float = math.inf,
    since: float = 0,
    **variables: str,
) -> str:
    """Run a command and return its output. Raises BenchError with the last lines of it.

    The command gets a SIGINT when it has printed nothing for `silence` seconds, not counting the
    first `since` seconds. If we are interrupted, it is killed together with its children.
    """
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        start = time.monotonic()
        heard, last = 0, start + since
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=LISTENING_SECONDS)
                    break
                except subprocess.TimeoutExpired as pause:
                    now = time.monotonic()
                    if now - start > seconds:
                        raise BenchError(
                            f"{command[0]} did not finish within {seconds:.0f} s"
                        ) from None
                    if len(pause.output or b"") > heard:
                        heard, last = len(pause.output), max(now, last)
                    elif now - last > silence:
                        process.send_signal(signal.SIGINT)
                        silence = math.inf
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise BenchError(f"{' '.join(map(str, command))} failed:\n{end_of(output)}")
    return output


@contextmanager
def fed_by_pipe(
    command: Command,
    *,
    cwd: Path,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    variables: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Run a program that ends when its standard input closes, which happens even if we are killed.

    Ctrl-C does not reach it, so that programs end in order.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**(variables or {})),
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        pass_fds=pass_fds,
        start_new_session=True,
    )
    assert process.stdin  # noqa: S101  (a pipe, as asked for above)
    try:
        yield process
    finally:
        process.stdin.close()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout:
            process.stdout.close()


@contextmanager
def distant(url: str, milliseconds: float) -> Iterator[str]:
    """Add `milliseconds` of latency to the database. Yields the URL of the proxy."""
    if not milliseconds:
        yield url
        return
    port = urlsplit(url).port
    command: Command = [sys.executable, HERE / "proxy.py", str(port), str(milliseconds)]
    with fed_by_pipe(command, cwd=HERE, stdout=subprocess.PIPE) as process:
        line = process.stdout.readline() if process.stdout else ""
        if not line.strip().isdigit():
            raise BenchError(f"the delaying proxy did not start:\n{end_of(line)}")
        yield url.replace(f":{port}/", f":{int(line)}/")


def round_trip(url: str, times: int = 100) -> float:
    """Return the median time of `SELECT 1` in milliseconds."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    taken = []
    with connection.cursor() as cursor:
        for _ in range(times):
            start = time.perf_counter()
            cursor.execute("SELECT 1")
            taken.append((time.perf_counter() - start) * 1000)
    connection.close()
    return sorted(taken)[times // 2]


class App:
    """An app, served at `port`.

    folder: its working directory and module path. modules: further folders on the module path.
    health: the path of its health check, if it has one.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        folder: Path,
        target: str,
        log: Path,
        *,
        modules: Sequence[Path] = (),
        health: str | None = None,
        **variables: str,
    ) -> None:
        self.name = name
        self.log = log
        self.health = health
        self._command: Command = [python, "-P", HERE / "serve.py", target]
        self._folder = folder
        path = os.pathsep.join(map(str, (folder, *modules)))
        self._variables = variables | {"PYTHONPATH": path}  # without our folder, due to -P
        self.port = 0

    def __enter__(self) -> "App":
        with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as server:
            self.port = server.getsockname()[1]
            with self.log.open("ab") as log:
                self._running = fed_by_pipe(
                    [*self._command, str(server.fileno())],
                    cwd=self._folder,
                    stdout=log,
                    pass_fds=[server.fileno()],
                    variables=self._variables,
                )
                self._process = self._running.__enter__()
        try:
            self._wait()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._running.__exit__(None, None, None)

    def _wait(self) -> None:
        """Wait for any response."""
        end = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
            with closing(connection), suppress(OSError, HTTPException):
                connection.request("GET", "/")
                connection.getresponse().close()
                return
            time.sleep(0.05)
        raise BenchError(f"the app {self.name} did not start:\n{self.last_lines()}")

    def last_lines(self) -> str:
        return end_of(self.log.read_text("utf-8", "replace"))

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far. Raises BenchError if the app has ended."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.NoSuchProcess:
            raise BenchError(f"the app {self.name} has ended:\n{self.last_lines()}") from None
        return float(times.user + times.system)

    def restart(self) -> None:
        """Restart the app: after a lock-up, it would be busy with abandoned requests."""
        self.__exit__(None, None, None)
        self.__enter__()
