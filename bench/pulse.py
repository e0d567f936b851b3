"""Health checks under load, like those of platforms that restart an app which fails them.

Some platforms keep one connection for health checks. Others open a new one each time, which queues
behind all clients that connect at the same moment.
"""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException

from .load import Health

PERIOD_MS = 50  # between checks on the kept connection
NEW_SECONDS = 0.25  # between checks on new connections, which cost the app more
PATIENCE_SECONDS = 30
AT_ONCE = 200  # maximum number of pending checks on new connections

Times = list[float | None]  # milliseconds; None for a check that did not get a 200


class Pulse:
    """Times of the health checks; complete when the load is over."""

    def __init__(self) -> None:
        self.kept: Times = []
        self.new: Times = []

    def health(self) -> Health:
        """Summarize the checks on the kept connection.

        A check starts only when the previous one is answered. So each long wait also counts for
        the checks that were due in the meantime (coordinated omission).
        """
        waits: Times = []
        for wait in self.kept:
            waits.append(wait)
            while wait is not None and wait > PERIOD_MS:
                wait -= PERIOD_MS  # noqa: PLW2901
                waits.append(wait)
        return summary(waits)

    def probe(self) -> Health:
        """Summarize the checks on new connections."""
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
    """Check health repeatedly until the end of the block."""
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
                asked.append(threads.submit(ask_on_a_new_connection))
        found.new += [question.result() for question in asked]

    def ask_on_a_new_connection() -> float | None:
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
    """Return the response time in milliseconds, or None if the response is not a 200."""
    start = time.perf_counter()
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
    except (OSError, HTTPException):
        connection.close()  # the next request reopens it
        return None
    return (time.perf_counter() - start) * 1000 if response.status == 200 else None
