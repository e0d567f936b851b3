"""The three apps, each in its own words: how it is started, what its requests look like."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from .data import CROWD_OWNERS, PAGE, WRITER, Data, Owner, owner_of
from .load import prepare
from .plan import APPS, Cell
from .processes import App, BenchError
from .project import HERE, Project

BODY = {"title": "Buy milk", "description": "Two litres, semi-skimmed"}
CHANGE = {"title": "Buy oat milk"}
MIX = ("list",) * 5 + ("get",) * 3 + ("create",) * 2
VARIETY = 1_000  # different tasks that are read or changed
DELETED_A_SECOND = 5_000  # more than any app manages
UNKNOWN = "00000000-0000-7000-8000-000000000000"


@dataclass(frozen=True)
class World:
    """What the apps have in common: one database, one kind of token."""

    project: Project
    data: Data
    key: str
    issuer: str
    connections: int  # of one app
    tokens: dict[str, str] = field(repr=False)  # by user
    cursors: dict[str, str]  # of ours, by task

    def requests(self, app: str, cell: Cell) -> list[bytes]:  # noqa: PLR0911
        """Return what the clients send to an app, each once or in turn."""
        owners: Sequence[Owner] = (owner_of(cell.tasks),) if cell.owners == 1 else CROWD_OWNERS
        token = self.tokens[owners[0].id]
        match cell.operation:
            case "list":
                return [prepare("GET", "/tasks", self.tokens[owner.id]) for owner in owners]
            case "last page":
                return [prepare("GET", self.last_page(app, owners[0]), token)]
            case "get":
                ids = self.data.ids(owners[0], VARIETY)
                return [prepare("GET", f"/tasks/{task}", token) for task in ids]
            case "create":
                self.data.reset_writer(0)
                return [prepare("POST", "/tasks", self.tokens[WRITER.id], BODY)]
            case "change":
                ids = self.data.reset_writer(VARIETY)
                token = self.tokens[WRITER.id]
                return [prepare("PATCH", f"/tasks/{task}", token, CHANGE) for task in ids]
            case "delete":
                ids = self.data.reset_writer(round(DELETED_A_SECOND * cell.seconds))
                token = self.tokens[WRITER.id]
                return [prepare("DELETE", f"/tasks/{task}", token) for task in ids]
            case "mixed":
                return self.mixed(token, owners[0])
            case unknown:
                raise BenchError(f"there is no operation {unknown}")

    def mixed(self, token: str, owner: Owner) -> list[bytes]:
        """Return half lists, three tenths single tasks, two tenths new ones, well mixed."""
        self.data.reset_writer(0)
        ids = itertools.cycle(self.data.ids(owner, VARIETY))
        words = [word for _ in range(100) for word in MIX]
        random.Random(1).shuffle(words)  # noqa: S311  (the same one in each run)
        create = prepare("POST", "/tasks", self.tokens[WRITER.id], BODY)
        page = prepare("GET", "/tasks", token)
        return [
            page if word == "list"
            else create if word == "create"
            else prepare("GET", f"/tasks/{next(ids)}", token)
            for word in words
        ]  # fmt: skip

    def last_page(self, app: str, owner: Owner) -> str:
        """Return the address of an owner's last page, as an app's client would have it."""
        if owner.tasks <= PAGE:
            return "/tasks"
        if app == "textbook":
            return f"/tasks?offset={owner.tasks - PAGE}"
        created_at, task = self.data.before_last_page(owner)
        if app == "ours":
            return f"/tasks?cursor={self.cursors[task]}"
        return f"/tasks?after={created_at:%Y-%m-%dT%H:%M:%S.%fZ}_{task}"

    @contextmanager
    def apps(self, url: str, logs: Path) -> Iterator[dict[str, App]]:
        """Serve all three, with the database at `url`."""
        python = self.project.python
        common = {
            "BENCH_CONNECTIONS": str(self.connections),
            "BENCH_DATABASE_URL": url.replace("postgresql://", "postgresql+psycopg2://"),
            "BENCH_TOKEN_ISSUER": self.issuer,
            "BENCH_TOKEN_KEY": self.key,
        }
        as_in_production = {"DATABASE_URL": url, "ENVIRONMENT": "production"}
        subjects = (
            App("ours", python, self.project.path, "main:app", logs / "ours", **as_in_production),
            App("textbook", python, HERE, "textbook:app", logs / "textbook", **common),
            App("floor", python, HERE, "floor:app", logs / "floor", **common),
        )
        with ExitStack() as stack:
            yield {app.name: stack.enter_context(app) for app in subjects}

    def require_sameness(self, apps: dict[str, App], owner: Owner) -> None:
        """Ask all apps the same. Raises BenchError where one answers differently."""
        answers = {name: self.sample(apps[name], owner) for name in APPS}
        for name in APPS[1:]:
            for (what, expected), (_, answer) in zip(answers["ours"], answers[name], strict=True):
                if answer != expected:
                    raise BenchError(
                        f"{what}: the app {name} does not answer as ours does:"
                        f"\n  {name}: {answer}\n  ours: {expected}"
                    )

    def sample(self, app: App, owner: Owner) -> list[tuple[str, Any]]:
        """Return what an app answers, without what may differ."""
        reader, writer = self.tokens[owner.id], self.tokens[WRITER.id]
        task = f"/tasks/{self.data.ids(owner, 1)[0]}"
        own = f"/tasks/{self.data.reset_writer(1)[0]}"
        new = {"id", "url", "created_at", "updated_at"}
        return [
            ("list", ask(app, "GET", "/tasks", reader)),
            ("last page", ask(app, "GET", self.last_page(app.name, owner), reader)),
            ("get", ask(app, "GET", task, reader)),
            ("get an unknown one", ask(app, "GET", f"/tasks/{UNKNOWN}", reader, {"detail"})),
            ("get another's", ask(app, "GET", own, reader, {"detail"})),
            ("create", ask(app, "POST", "/tasks", writer, new, BODY)),
            ("change", ask(app, "PATCH", own, writer, new, CHANGE)),
            ("delete", ask(app, "DELETE", own, writer)),
        ]


def ask(
    app: App,
    method: str,
    path: str,
    token: str,
    leave_out: set[str] | frozenset[str] = frozenset(),
    body: object = None,
) -> tuple[int, Any]:
    """Return status and content of an answer; the app's own port in it is not told."""
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
