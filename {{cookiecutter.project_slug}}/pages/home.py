"""The page at / in development: the app's status, and a todo list to try the API with.

Its routes come after all others, so they do not slow those down. Production has no such page.
"""

import asyncio
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine

from config import VERSION
from db import DatabaseBusy, Deadline, EngineDep, time_limit
from pages.policy import hashes_of, secure_page
from pages.status import AppStatus, DatabaseStatus, MigrationStatus, State, Status
from postgres.check import StepFailed, compare_columns, compare_revisions
from postgres.explain import explain
from postgres.outage_log import SCHEMA
from postgres.url import DatabaseUrl
from resources import resources

PAGE = Path(__file__).with_name("home.html")
STATUS_SECONDS = 5.0  # a person waits for the answer, and a compute may have to wake up
NO_SUCH_TABLE = "42P01"  # PostgreSQL's code
STATES: dict[str, State] = {
    "schema-behind": "behind the code",
    "models-ahead": "behind the models",
    "schema-ahead": "ahead of the code",
    "migrations-broken": "broken",
}


async def refuse_foreign_names(request: Request) -> None:
    """Answer 400 unless the host is local: with DNS rebinding, another site could read this page.

    An address, a name without a dot, and a name in .localhost or .local cannot be another site's.
    """
    try:
        # Not request.url: if the header is malformed, that has this machine's address instead.
        host = urlsplit(f"//{request.headers.get('Host', '')}").hostname or ""
        if "." not in host or host.endswith((".localhost", ".local")):
            return
        ip_address(host)
    except ValueError as error:
        detail = "this host name is not allowed: use localhost or an IP address"
        raise HTTPException(400, detail) from error


type Schema = tuple[list[str], list[str]]  # its revisions, and its columns as `table.column`

router = APIRouter(include_in_schema=False, dependencies=[Depends(refuse_foreign_names)])


@router.get("/")
def get_home() -> HTMLResponse:
    """Serve the page, which is read for each request: edit home.html and reload."""
    html = PAGE.read_text("utf-8")
    return secure_page(
        html,
        {
            "script-src": hashes_of("script", html),
            "style-src": hashes_of("style", html),
            "img-src": "data:",
            # The browser refuses innerHTML and similar ways to turn text into HTML.
            "require-trusted-types-for": "'script'",
            "trusted-types": "'none'",
        },
    )


@router.get("/home/status")
async def get_status(request: Request, engine: EngineDep) -> Status:
    """Return what the page shows. Each call sends one query; nothing runs in the background."""
    settings = resources(request).settings
    url = settings.database_url
    database, schema = await read_database(engine, url)
    # After the query, because it would add to the measured latency.
    migrations = await asyncio.to_thread(compare, schema, url)
    app = AppStatus(
        name=settings.app_name,
        version=VERSION,
        docs=settings.serves_docs,
        login="better-auth" if settings.better_auth_url else "password",
        better_auth_url=settings.better_auth_url,
        is_registration_open=settings.is_registration_open,
        mailbox=resources(request).mailer.mailbox is not None,
    )
    return Status(app=app, database=database, migrations=migrations)


async def read_database(
    engine: AsyncEngine, url: DatabaseUrl
) -> tuple[DatabaseStatus, Schema | None]:
    """Return the state of the database, and its schema, None if it could not be read."""
    status = DatabaseStatus(ok=True, kind=kind_of(url), name=url.database, address=url.address)
    try:
        with time_limit(Deadline(STATUS_SECONDS)):
            seconds, schema = await read_schema(engine)
    except DatabaseBusy as error:
        status.ok, status.cause, status.advice = False, str(error), "check again in a moment"
        return status, None
    except exc.DBAPIError as error:
        finding = explain(error, url)
        status.ok, status.cause, status.advice = False, finding.cause, finding.advice
        return status, None
    status.latency_ms = round(seconds * 1000, 1)
    return status, schema


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
    """Compare the schema of the database with the one that the code expects."""
    import migrations  # noqa: PLC0415  (slow, and the rest of the app does not need Alembic)

    if schema is None:
        return MigrationStatus(ok=None, state="not known")
    revisions, columns = schema
    revision = ", ".join(revisions) or None
    try:
        compare_revisions(revisions, migrations.history, url)
        compare_columns(migrations.columns(), columns, url)
    except StepFailed as failure:
        cause = str(failure)
        if failure.finding.message:
            cause = f"{cause}: {failure.finding.message}"
        return MigrationStatus(
            ok=False,
            state=STATES[failure.finding.name],
            revision=revision,
            cause=cause,
            advice=failure.finding.advice,
        )
    return MigrationStatus(ok=True, state="up to date", revision=revision)
