"""The apps under test: how each is started, and its requests."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from .data import PAGE, VISITORS, WRITER, Data, Owner, email_of, owners_of
from .load import prepare, prepare_form
from .plan import APPS, POOLS, Cell
from .processes import App, BenchError
from .project import HERE, Project

BODY = {"title": "Buy milk", "description": "Two litres, semi-skimmed"}
CHANGE = {"title": "Buy oat milk"}
MIX = ("list",) * 5 + ("get",) * 3 + ("create",) * 2
MIX_WITH_LOG_INS = ("list",) * 4 + ("get",) * 3 + ("create",) * 2 + ("log in",)
PASSWORD = "correct horse"  # noqa: S105  (of users of this benchmark)
VARIETY = 1_000  # different tasks that are read or changed
DELETED_A_SECOND = 5_000  # more than any app manages
# URL schemes of all apps except the generated project: SQLAlchemy's include the driver.
DRIVERS = {
    "textbook": "postgresql+psycopg2",
    "async textbook": "postgresql+asyncpg",
    "floor": "postgresql",
    "async floor": "postgresql",
}
UNKNOWN = "00000000-0000-7000-8000-000000000000"


@dataclass(frozen=True)
class World:
    """The database, tokens and cursors that all apps share."""

    project: Project
    data: Data
    key: str
    issuer: str
    connections: int  # per app
    tokens: dict[str, str] = field(repr=False)  # by user
    cursors: dict[str, str]  # of ours, by task
    software: str  # names and versions
    packages: Path  # a folder with packages that the project does not have

    def requests(self, app: str, cell: Cell) -> list[bytes]:  # noqa: PLR0911
        """Return the requests that the clients send to an app, in a loop."""
        owners = owners_of(cell)
        match cell.operation:
            case "list":
                return [prepare("GET", "/tasks", self.tokens[owner.id]) for owner in owners]
            case "last page":
                return [
                    prepare("GET", path, self.tokens[owner.id])
                    for owner, path in zip(owners, self.last_pages(app, owners), strict=True)
                ]
            case "get":
                return self.gets(owners[0])
            case "create":
                if cell.chapter == "growth":
                    self.data.reset(owners[0])
                    return [self.create(owners[0])]
                self.data.reset_writer(0)
                return [self.create(WRITER)]
            case "change":
                ids = self.data.reset_writer(VARIETY)
                token = self.tokens[WRITER.id]
                return [prepare("PATCH", f"/tasks/{task}", token, CHANGE) for task in ids]
            case "delete":
                ids = self.data.reset_writer(round(DELETED_A_SECOND * cell.seconds))
                token = self.tokens[WRITER.id]
                return [prepare("DELETE", f"/tasks/{task}", token) for task in ids]
            case "mixed":
                return self.mix(owners[0], MIX)
            case "log-ins":
                return self.mix(owners[0], MIX_WITH_LOG_INS)
            case unknown:
                raise BenchError(f"there is no operation {unknown}")

    def create(self, owner: Owner) -> bytes:
        return prepare("POST", "/tasks", self.tokens[owner.id], BODY)

    def gets(self, owner: Owner) -> list[bytes]:
        ids = self.data.ids(owner, VARIETY)
        return [prepare("GET", f"/tasks/{task}", self.tokens[owner.id]) for task in ids]

    def mix(self, owner: Owner, words: Sequence[str]) -> list[bytes]:
        """Return a hundred requests for each word, shuffled."""
        self.data.reset_writer(0)
        page = prepare("GET", "/tasks", self.tokens[owner.id])
        log_ins = [
            prepare_form(
                "/auth/login", f"192.0.2.{number}", username=email_of(visitor), password=PASSWORD
            )
            for number, visitor in enumerate(VISITORS)
        ]
        kinds = {
            "list": itertools.repeat(page),
            "get": itertools.cycle(self.gets(owner)),
            "create": itertools.repeat(self.create(WRITER)),
            "log in": itertools.cycle(log_ins),
        }
        mixed = [word for _ in range(100) for word in words]
        random.Random(1).shuffle(mixed)  # noqa: S311  (the same one in each run)
        return [next(kinds[word]) for word in mixed]

    def last_pages(self, app: str, owners: Sequence[Owner]) -> list[str]:
        """Return the paths of the owners' last pages, in an app's kind of pagination."""
        if owners[0].tasks <= PAGE:
            return ["/tasks"] * len(owners)
        if app in {"textbook", "async textbook", "session"}:
            return [f"/tasks?offset={owner.tasks - PAGE}" for owner in owners]
        places = self.data.before_last_page(owners)
        if app in {"floor", "async floor"}:
            return [
                f"/tasks?after={created_at:%Y-%m-%dT%H:%M:%S.%fZ}_{task}"
                for created_at, task in places
            ]
        return [f"/tasks?cursor={self.cursors[task]}" for _, task in places]

    @contextmanager
    def apps(self, url: str, logs: Path, names: Sequence[str] = APPS) -> Iterator[dict[str, App]]:
        """Serve apps at the same time, with the database at `url`."""
        with ExitStack() as stack:
            yield {name: stack.enter_context(self.app(name, url, logs)) for name in names}

    def app(self, name: str, url: str, logs: Path) -> App:
        python, path = self.project.python, self.project.path
        module = name.replace(" ", "_")
        log = logs / module
        if name in DRIVERS:
            return App(
                *(name, python, HERE, f"{module}:app", log),
                modules=[self.packages],
                BENCH_CONNECTIONS=str(self.connections),
                BENCH_DATABASE_URL=url_for(name, url),
                BENCH_TOKEN_ISSUER=self.issuer,
                BENCH_TOKEN_KEY=self.key,
            )
        variables = {"DATABASE_URL": url, "ENVIRONMENT": "production", "TASKS_PER_USER": "0"}
        if name in POOLS:
            variables["DB_POOL_SIZE"] = str(POOLS[name])
        target, modules = ("session:app", [HERE]) if name == "session" else ("main:app", [])
        return App(name, python, path, target, log, modules=modules, health="/health", **variables)

    def require_sameness(self, apps: dict[str, App], owner: Owner) -> None:
        """Send all apps the same requests. Raises BenchError if their responses differ."""
        (first, expected), *others = [(name, self.sample(apps[name], owner)) for name in apps]
        for name, answers in others:
            for (what, ours), (_, answer) in zip(expected, answers, strict=True):
                if answer != ours:
                    raise BenchError(
                        f"{what}: {name} and {first} respond differently:"
                        f"\n  {name}: {answer}\n  {first}: {ours}"
                    )

    def sample(self, app: App, owner: Owner) -> list[tuple[str, Any]]:
        """Return an app's responses, without the fields that may differ."""
        reader, writer = self.tokens[owner.id], self.tokens[WRITER.id]
        task = f"/tasks/{self.data.ids(owner, 1)[0]}"
        own = f"/tasks/{self.data.reset_writer(1)[0]}"
        new = {"id", "url", "created_at", "updated_at"}
        return [
            ("list", ask(app, "GET", "/tasks", reader)),
            ("last page", ask(app, "GET", self.last_pages(app.name, [owner])[0], reader)),
            ("get", ask(app, "GET", task, reader)),
            ("get an unknown one", ask(app, "GET", f"/tasks/{UNKNOWN}", reader, {"detail"})),
            ("get another's", ask(app, "GET", own, reader, {"detail"})),
            ("create", ask(app, "POST", "/tasks", writer, new, BODY)),
            ("change", ask(app, "PATCH", own, writer, new, CHANGE)),
            ("delete", ask(app, "DELETE", own, writer)),
        ]


def url_for(app: str, url: str) -> str:
    """Return the database's URL for an app that is not the generated project."""
    url = url.replace("postgresql", DRIVERS[app], 1)
    return url.replace("sslmode=", "ssl=") if app == "async textbook" else url  # for asyncpg


def ask(
    app: App,
    method: str,
    path: str,
    token: str,
    leave_out: set[str] | frozenset[str] = frozenset(),
    body: object = None,
) -> tuple[int, Any]:
    """Return status and content of a response, with the app's port masked."""
    connection = HTTPConnection("127.0.0.1", app.port, timeout=30)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode().replace(f":{app.port}/", ":PORT/")
    connection.close()
    try:
        content = json.loads(text) if text else None
    except ValueError:
        return response.status, text
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in leave_out}
    return response.status, content
