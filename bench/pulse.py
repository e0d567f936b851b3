"""Asks an app for its health while it is under load, as platforms do, which may restart it.

Some keep a connection for that, others open a new one each time, which has to be accepted first,
behind all the clients that come at the same moment.
"""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException

from .load import Health

PERIOD_MS = 50  # of questions on one connection
NEW_SECONDS = 0.25  # between questions on new connections, which cost the app more
PATIENCE_SECONDS = 30
AT_ONCE = 200  # questions on new connections that may wait for an answer

Times = list[float | None]  # milliseconds, None for a question that got no 200


class Pulse:
    """What was found out, in full when the load is over."""

    def __init__(self) -> None:
        self.kept: Times = []
        self.new: Times = []

    def health(self) -> Health:
        """Tell of the questions on one connection.

        The next one waits for an answer to the last. So for each long wait, the ones are added
        that others would have had who asked meanwhile.
        """
        waits: Times = []
        for wait in self.kept:
            waits.append(wait)
            while wait is not None and wait > PERIOD_MS:
                wait -= PERIOD_MS  # noqa: PLW2901
                waits.append(wait)
        return summary(waits)

    def probe(self) -> Health:
        """Tell of the questions on new connections."""
        return summary(self.new)


def summary(times: Sequence[float | None]) -> Health:
    found = [time_ms for time_ms in times if time_ms is not None]
    failed = len(times) - len(found)
    if len(found) < 2:
        return Health(len(times), failed, *[found[0] if found else 0.0] * 3)
    p99 = statistics.quantiles(found, n=100, method="inclusive")[-1]
    return Health(len(times), failed, statistics.median(found), p99, max(found))


@contextmanager
def pulse(port: int, path: str) -> Iterator[Pulse]:
    """Ask again and again until the end of the block."""
    found, over = Pulse(), threading.Event()
    kept = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    ask(kept, path)

    def ask_on_one() -> None:
        while not over.wait(PERIOD_MS / 1000):
            found.kept.append(ask(kept, path))
        kept.close()

    def ask_on_new() -> None:
        asked: list[Future[float | None]] = []
        with ThreadPoolExecutor(AT_ONCE) as threads:
            while not over.wait(NEW_SECONDS):
                asked.append(threads.submit(ask_anew))
        found.new += [question.result() for question in asked]

    def ask_anew() -> float | None:
        with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)) as connection:
            return ask(connection, path)

    threads = [threading.Thread(target=work) for work in (ask_on_one, ask_on_new)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        over.set()
        for thread in threads:
            thread.join()


def ask(connection: HTTPConnection, path: str) -> float | None:
    """Return how many milliseconds the answer took, None if it is not a 200."""
    start = time.perf_counter()
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
    except (OSError, HTTPException):
        connection.close()  # the next request opens it anew
        return None
    return (time.perf_counter() - start) * 1000 if response.status == 200 else None
