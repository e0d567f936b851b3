"""The app as a platform runs it, in a process of its own, and what it logs."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from config import PROJECT_DIR, Settings

IN_BUG = "postgresql://owner:quokka@db.example.com/todo"
BUG = f'''
import structlog

from fastapi import HTTPException
from sqlalchemy import bindparam, select

from auth import CurrentUserId
from db import StatementDep
from main import app
from routes import health
from schemas.text import PlainText, Strict

health.READY_SECONDS, health.PING_SECONDS = 6.0, 5.0  # the machine may be busy

class Note(Strict):
    text: PlainText

@app.post("/notes", status_code=201)
async def create_note(note: Note, user_id: CurrentUserId, statement: StatementDep) -> None:
    await statement.all(select(bindparam("text")), text=note.text)

@app.get("/notes")
async def list_notes(q: str, user_id: CurrentUserId, statement: StatementDep) -> None:
    await statement.all(select(bindparam("text")), text=q)

@app.get("/notes/{{note_id}}")
async def get_note(note_id: str) -> None:
    raise HTTPException(404)

@app.get("/odd")
async def odd() -> None:
    structlog.get_logger().info("no encoding has this", text="\\ud800")

@app.get("/bug/{{number}}")
async def bug(number: int) -> None:
    a_local_variable = "numbat"
    raise RuntimeError("{IN_BUG} says (email)=(ada.kangaroo@example.com)")
'''  # noqa: S608  (no SQL)


@dataclass
class Run:
    """A server in production, and everything that it logged before it was stopped."""

    url: str
    answers: dict[str, httpx2.Response] = field(default_factory=dict)
    output: str = ""

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.splitlines()]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == "request"]

    def line_of(self, name: str) -> dict[str, Any]:
        """Return the line about an answer, by the request's id."""
        request_id = self.answers[name].headers["X-Request-ID"]
        (line,) = (line for line in self.requests if line["request_id"] == request_id)
        return line


@contextmanager
def served(folder: Path, settings: Settings, **changes: str) -> Iterator[Run]:
    """Run the app, with a route that has a bug, in production. changes: environment variables."""
    (folder / "with_bug.py").write_text(BUG, "utf-8")
    environment = {
        "PYTHONPATH": str(PROJECT_DIR),
        "PYTHONUTF8": "1",
        "DATABASE_URL": settings.database_url.for_libpq(),
        "BETTER_AUTH_SECRET": settings.better_auth_secret.get_secret_value(),
        "BETTER_AUTH_URL": settings.better_auth_url or "",
        "ENVIRONMENT": "production",
    }
    command = [sys.executable, "-m", "uvicorn", "with_bug:app", "--port", "0"]
    output = folder / "output"
    with (
        output.open("w", encoding="utf-8") as stdout,
        subprocess.Popen(  # noqa: S603  (our own program)
            command,
            cwd=folder,
            env=os.environ | environment | changes,
            stdout=stdout,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        try:
            while not (
                found := re.search(r"running on (http://[\d.:]+)", output.read_text("utf-8"))
            ):
                assert server.poll() is None, output.read_text("utf-8")
                time.sleep(0.05)
            run = Run(found[1])
            yield run
        finally:
            server.terminate()
    run.output = output.read_text("utf-8")
