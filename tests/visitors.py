"""Clients that keep sending requests to the app, whatever happens, and record the results."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import TypeVar
from uuid import uuid4

from app_server import LIMIT_SECONDS, REQUEST_SECONDS, Answer, AppServer

T = TypeVar("T")

PAUSE_SECONDS = 0.2
RECOVERY_SECONDS = 40.0  # how long a test waits for an app to recover


@dataclass(frozen=True)
class Visit:
    """A request with its response or error. begun: of `time.monotonic()`."""

    begun: float
    method: str
    answer: Answer | None
    error: str = ""

    @property
    def status(self) -> int:
        return self.answer.status if self.answer else 0

    @property
    def succeeded(self) -> bool:
        return 200 <= self.status < 300

    def fault(self, limit: float) -> str:
        """Describe the fault, if it is neither a success nor a documented refusal, in time."""
        if self.answer is None:
            return f"{self.method}: {self.error}"
        if (self.succeeded or self.answer.asks_to_retry) and self.answer.seconds < limit:
            return ""
        return f"{self.method}: {self.status} after {self.answer.seconds:.1f} s: {self.answer.body}"


@dataclass
class Visitors:
    """Clients of one user. Each lists and creates tasks repeatedly."""

    app: AppServer
    token: str
    visits: list[Visit] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)  # of tasks that the app reported as created
    _over: threading.Event = field(default_factory=threading.Event)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def ask(self, method: str = "GET") -> Visit:
        """Send one request. POST creates a task."""
        title = f"task {next(self._numbers)}"
        body = {"title": title} if method == "POST" else None
        begun = time.monotonic()
        try:
            answer = self.app.request(method, "/tasks", body, token=self.token)
        except (OSError, HTTPException) as error:
            visit = Visit(begun, method, None, repr(error))
        else:
            visit = Visit(begun, method, answer)
            if method == "POST" and visit.succeeded:
                self.titles.append(title)
        self.visits.append(visit)
        return visit

    def go_on(self) -> None:
        for method in itertools.cycle(("GET", "POST", "GET")):
            if self._over.wait(PAUSE_SECONDS):
                return
            self.ask(method)

    def since(self, moment: float) -> list[Visit]:
        """Return the visits that began after a moment, in order."""
        return sorted((v for v in self.visits if v.begun > moment), key=lambda v: v.begun)

    def faults(self, limit: float = LIMIT_SECONDS) -> list[str]:
        """Describe what went wrong. limit: on the seconds that a response may take."""
        return [fault for visit in self.visits if (fault := visit.fault(limit))]

    def refusals(self) -> list[Visit]:
        return [visit for visit in self.visits if visit.status == 503]

    def wait_until_well(self, moment: float, number: int = 20) -> float:
        """Wait until the last `number` visits that began after `moment` have succeeded.

        Returns the seconds from `moment` to the first success in a row. Raises TimeoutError.
        """
        while time.monotonic() < moment + RECOVERY_SECONDS:
            latest = self.since(moment)[-number:]
            if len(latest) == number and all(visit.succeeded for visit in latest):
                good = itertools.takewhile(lambda v: v.succeeded, reversed(self.since(moment)))
                return min(visit.begun for visit in good) - moment
            time.sleep(PAUSE_SECONDS)
        statuses = [visit.status for visit in self.since(moment)]
        raise TimeoutError(f"not well after {RECOVERY_SECONDS:.0f} s: {statuses}")

    def stop(self) -> None:
        self._over.set()


@contextmanager
def visitors(app: AppServer, token: str, number: int = 8) -> Iterator[Visitors]:
    """Let `number` clients send requests until the end of the block."""
    crowd = Visitors(app, token)
    threads = [threading.Thread(target=crowd.go_on) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield crowd
    finally:
        crowd.stop()
        for thread in threads:
            thread.join()


@dataclass
class Writers:
    """Clients that keep their connections and create tasks until the app closes the connection.

    The id of a request is its task's title, and appears in the app's log.
    """

    app: AppServer
    token: str
    answered: dict[str, int] = field(default_factory=dict)  # statuses by request id
    unanswered: set[str] = field(default_factory=set)

    @property
    def created(self) -> set[str]:
        return {name for name, status in self.answered.items() if status == 201}

    def write(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.app.port, timeout=REQUEST_SECONDS)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        while True:
            name = str(uuid4())
            body = json.dumps({"title": name})
            try:
                connection.request("POST", "/tasks", body, {**headers, "X-Request-ID": name})
                response = connection.getresponse()
                response.read()
            except (OSError, HTTPException):
                self.unanswered.add(name)
                break
            self.answered[name] = response.status
            if response.getheader("Connection") == "close":
                break
        connection.close()


@contextmanager
def writers(app: AppServer, token: str, number: int) -> Iterator[Writers]:
    """Let `number` clients write. The app must close the connections before the block ends."""
    crowd = Writers(app, token)
    threads = [threading.Thread(target=crowd.write) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield crowd
    finally:
        for thread in threads:
            thread.join()


def at_once(*requests: Callable[[], Answer]) -> list[Answer]:
    """Send requests at the same time. Returns their answers."""
    with ThreadPoolExecutor(len(requests)) as threads:
        return [answer.result() for answer in [threads.submit(request) for request in requests]]


def wait_for(question: Callable[[], T], seconds: float = 20) -> T:
    """Call `question` until its result is true, and return that. Raises TimeoutError."""
    limit = time.monotonic() + seconds
    while not (answer := question()):
        if time.monotonic() > limit:
            raise TimeoutError(f"still {answer!r} after {seconds} s")
        time.sleep(0.05)
    return answer
