"""The page at /, in development: what runs here, and a todo list to try the API with.

Its routes come after all others, so that it costs those nothing. In production it is not there.
"""

import asyncio
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine

from config import VERSION, Settings
from db import DatabaseBusy, Deadline, EngineDep, time_limit
from pages.policy import hashes_of, secure_page
from pages.status import AppStatus, DatabaseStatus, MigrationStatus, State, Status
from postgres.check import StepFailed, compare_columns, compare_revisions
from postgres.explain import explain
from postgres.outage_log import SCHEMA
from postgres.url import DatabaseUrl

PAGE = Path(__file__).with_name("home.html")
QUERY_SECONDS = 5.0  # a person waits for the answer, and a compute may have to wake up
NO_SUCH_TABLE = "42P01"  # PostgreSQL's code
STATES: dict[str, State] = {
    "schema-behind": "behind the code",
    "models-ahead": "behind the models",
    "schema-ahead": "ahead of the code",
    "migrations-broken": "broken",
}


async def refuse_foreign_names(request: Request) -> None:
    """Answer 400 to a host that may be anybody's: with DNS rebinding, their page would read this.

    An address, a name without a dot, and a name in .localhost or .local can only be meant.
    """
    try:
        # Not request.url: where it finds the header odd, it tells this machine's own address.
        host = urlsplit(f"//{request.headers.get('Host', '')}").hostname or ""
        if "." not in host or host.endswith((".localhost", ".local")):
            return
        ip_address(host)
    except ValueError as error:
        detail = "in development this page has no such host: use localhost, or an address"
        raise HTTPException(400, detail) from error


type Schema = tuple[list[str], list[str]]  # its revisions, and its columns as `table.column`

router = APIRouter(include_in_schema=False, dependencies=[Depends(refuse_foreign_names)])


@router.get("/")
def get_home() -> HTMLResponse:
    """Serve the page as its file is now: to change it, edit and reload."""
    html = PAGE.read_text("utf-8")
    return secure_page(
        html,
        {
            "script-src": hashes_of("script", html),
            "style-src": hashes_of("style", html),
            "img-src": "data:",
            # Text stays text: the browser refuses innerHTML and the like.
            "require-trusted-types-for": "'script'",
            "trusted-types": "'none'",
        },
    )


@router.get("/home/status")
async def get_status(request: Request, response: Response, engine: EngineDep) -> Status:
    """Tell what the page shows. The database is asked once, and only when somebody looks."""
    settings: Settings = request.app.state.settings
    url = settings.database_url
    response.headers["Cache-Control"] = "no-store"
    answer, schema = await ask(engine, url)
    # Afterwards: it would show in the latency.
    migrations = await asyncio.to_thread(compare, schema, url)
    app = AppStatus(
        name=settings.app_name,
        version=VERSION,
        docs=settings.serves_docs,
        login="better-auth" if settings.better_auth_url else "password",
        better_auth_url=settings.better_auth_url,
    )
    return Status(app=app, database=answer, migrations=migrations)


async def ask(engine: AsyncEngine, url: DatabaseUrl) -> tuple[DatabaseStatus, Schema | None]:
    """Return how the database is, and its schema: None where it did not tell it."""
    answer = DatabaseStatus(ok=True, kind=kind_of(url), name=url.database, address=url.address)
    try:
        with time_limit(Deadline(QUERY_SECONDS)):
            seconds, schema = await read_schema(engine)
    except DatabaseBusy as error:
        answer.ok, answer.cause, answer.advice = False, str(error), "look again in a moment"
        return answer, None
    except exc.DBAPIError as error:
        finding = explain(error, url)
        answer.ok, answer.cause, answer.advice = False, finding.cause, finding.advice
        return answer, None
    answer.latency_ms = round(seconds * 1000, 1)
    return answer, schema


def kind_of(url: DatabaseUrl) -> Literal["embedded PostgreSQL", "Neon", "PostgreSQL"]:
    if url.is_embedded:
        return "embedded PostgreSQL"
    return "Neon" if url.is_neon else "PostgreSQL"


async def read_schema(engine: AsyncEngine) -> tuple[float, Schema]:
    """Return how many seconds one round trip took, and what it brought."""
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        start = time.perf_counter()
        try:
            revisions, columns = (await connection.execute(SCHEMA)).one()
        except exc.ProgrammingError as error:
            if getattr(error.orig, "pgcode", None) != NO_SUCH_TABLE:
                raise
            revisions, columns = [], []
        return time.perf_counter() - start, (revisions, columns)


def compare(schema: Schema | None, url: DatabaseUrl) -> MigrationStatus:
    """Tell whether the database has the tables that the code expects."""
    import migrations  # noqa: PLC0415  (takes a second, and the app has no other need of Alembic)

    if schema is None:
        return MigrationStatus(ok=None, state="not known")
    revisions, columns = schema
    revision = ", ".join(revisions) or None
    try:
        compare_revisions(revisions, migrations.history, url)
        compare_columns(migrations.columns(), columns, url)
    except StepFailed as failure:
        return MigrationStatus(
            ok=False,
            state=STATES[failure.finding.name],
            revision=revision,
            cause=": ".join(filter(None, [str(failure), failure.finding.message])),
            advice=failure.finding.advice,
        )
    return MigrationStatus(ok=True, state="up to date", revision=revision)
