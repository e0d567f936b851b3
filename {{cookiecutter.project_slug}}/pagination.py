"""Keyset pagination for any table: the last page of a list costs no more than the first.

A cursor contains the sort values of a page's last row; the next page begins after them. It is
signed, so only cursors that this app issued reach a query.
"""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Depends, HTTPException, Request, Response, status
from fastapi.exceptions import RequestValidationError
from itsdangerous import BadData, Signer
from itsdangerous.encoding import base64_decode, base64_encode
from itsdangerous.signer import SigningAlgorithm
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    SQLColumnExpression,
    String,
    Text,
    bindparam,
    cast,
    exc,
    tuple_,
)
from structlog.contextvars import bind_contextvars

from db import CompiledStatement, OneStatement, ReadStatementDep, Row
from errors import unavailable
from resources import resources
from schemas.problem import RETRY_AFTER_SECONDS
from schemas.text import PlainText

LIST_SECONDS = 2.0  # for the server to work on one statement
QUERY_CANCELED = "57014"  # PostgreSQL's code


class PageQuery(BaseModel):
    """The query parameters of a list. Subclasses name the sort orders, and add filters."""

    model_config = ConfigDict(extra="forbid")

    sort: str  # a Literal of names in `Pages.sorts`, each also with a "-" before it
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    cursor: Annotated[PlainText | None, Field(max_length=500, description="From a Link header")] = (
        None
    )

    def filters(self) -> dict[str, Any]:
        """Return the values of the filters that were given."""
        return self.model_dump(exclude=set(PageQuery.model_fields), exclude_none=True)


class Pages:
    """The pages of a list. Make it a module constant: it builds and compiles each statement once.

    rows: selects all rows of the list. sorts: the expressions of each sort order, most significant
    first; none may be NULL, and the last one must be unique. With an index on the same expressions,
    a page reads only the rows that it shows. filters: the condition of each filter; its `bindparam`
    has the filter's name.
    """

    def __init__(
        self,
        rows: Select[*tuple[Any, ...]],
        *,
        sorts: Mapping[str, Sequence[SQLColumnExpression[Any]]],
        filters: Mapping[str, ColumnElement[bool]],
    ) -> None:
        self._rows = rows
        self._sorts = sorts
        self._filters = filters
        self._statements: dict[tuple[object, ...], CompiledStatement] = {}

    def statement(
        self, filters: Collection[str], sort: str, *, continued: bool
    ) -> CompiledStatement:
        """Return the statement for the first page, or for a page after a cursor."""
        key = (*filters, sort, continued)
        if key not in self._statements:
            page = self._build(filters, sort, continued=continued)
            self._statements[key] = CompiledStatement(page)
        return self._statements[key]

    def order(self, sort: str) -> Sequence[SQLColumnExpression[Any]]:
        return self._sorts[sort.removeprefix("-")]

    def _build(
        self, filters: Collection[str], sort: str, *, continued: bool
    ) -> Select[*tuple[Any, ...]]:
        descending = sort.startswith("-")
        columns = self.order(sort)
        page = self._rows.where(*(self._filters[name] for name in filters))
        page = page.order_by(*(c.desc() if descending else c.asc() for c in columns))
        # For the next cursor, as text: PostgreSQL can parse the text of any type.
        page = page.add_columns(*(cast(c, Text).label(name) for name, c in named(columns)))
        if continued:
            row = tuple_(*columns)
            # psycopg2 sends untyped literals, which PostgreSQL converts to the column's type.
            last = tuple_(*(bindparam(name, type_=String) for name, _ in named(columns)))
            page = page.where(row < last if descending else row > last)
        return page.limit(bindparam("limit", type_=Integer))


def named(values: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    """Name the values of a cursor: after_0, after_1, …"""
    return ((f"after_{number}", value) for number, value in enumerate(values))


class Sha256(SigningAlgorithm):
    """HMAC with SHA-256 in one call of OpenSSL, which takes a third of the time of `hmac.new`."""

    def get_signature(self, key: bytes, value: bytes) -> bytes:
        return hmac.digest(key, value, "sha256")


class Cursors:
    """Writes and reads cursors. They are valid until the secret changes."""

    def __init__(self, secret: SecretStr) -> None:
        # The key is derived here, once, and not for each cursor.
        key = hmac.digest(secret.get_secret_value().encode(), b"cursor", "sha256")
        self._signer = Signer(key, key_derivation="none", algorithm=Sha256())

    def write(self, sort: str, values: Iterable[str]) -> str:
        """Return the cursor of the page after a row. values: the row's sort values, as text."""
        content = json.dumps([sort, *values], separators=(",", ":"))
        return self._signer.sign(base64_encode(content)).decode()

    def read(self, cursor: str, sort: str) -> dict[str, str]:
        """Return the values by their names in a statement. Raises RequestValidationError."""
        try:
            parts: list[str] = json.loads(base64_decode(self._signer.unsign(cursor)))
        except BadData:
            raise invalid_cursor("is invalid: copy it from a Link header") from None
        if parts[0] != sort:
            raise invalid_cursor(f"belongs to another sort order: sort={parts[0]}")
        return dict(named(parts[1:]))


def invalid_cursor(reason: str) -> RequestValidationError:
    return RequestValidationError(
        [{"type": "cursor", "loc": ("query", "cursor"), "msg": f"The cursor {reason}"}]
    )


class UserLimit:
    """Limits how many connections the expensive requests of one user may take.

    Expensive are those that may touch all rows of the user: filtered lists, changes of many rows.
    A page without filters reads no more rows than it shows, so it is not limited. Of the requests
    of one user, `at_once` use the database; up to `waiting` wait for one of these to end, and
    others are refused.
    """

    def __init__(self, at_once: int, waiting: float, wait_seconds: float) -> None:
        self._at_once = at_once
        self._waiting = waiting
        self._wait_seconds = wait_seconds
        self._lines: dict[str, Line] = {}  # of the users who have requests

    @asynccontextmanager
    async def turn(self, user_id: str) -> AsyncIterator[None]:
        """Wait for the user's turn. Raises HTTPException, 429."""
        line = self._lines.get(user_id)
        if line is None:
            line = self._lines[user_id] = Line(asyncio.Semaphore(self._at_once))
        if line.requests >= self._at_once + self._waiting:
            raise too_many()
        line.requests += 1
        try:
            try:
                async with asyncio.timeout(self._wait_seconds):
                    await line.turns.acquire()
            except TimeoutError:
                raise too_many() from None
            try:
                yield
            finally:
                line.turns.release()
        finally:
            line.requests -= 1
            if not line.requests:
                del self._lines[user_id]


@dataclass(slots=True)
class Line:
    turns: asyncio.Semaphore
    requests: int = 0  # that read or wait


def too_many() -> HTTPException:
    return HTTPException(
        status.HTTP_429_TOO_MANY_REQUESTS,
        "too many requests at the same time: wait for the responses to the others",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


class PageReader:
    """Reads a page with one statement, and adds a link to the next page."""

    def __init__(self, request: Request, response: Response, statement: OneStatement) -> None:
        self._request = request
        self._response = response
        self._statement = statement

    async def read(self, pages: Pages, query: PageQuery, url: str, **parameters: Any) -> list[Row]:
        """Return the rows of a page. If there is a next one, the header Link has its address.

        url: the address of the list. parameters: what the `rows` of its pages bind. Raises
        HTTPException: 429 if the user has too many requests, 503 if it takes too long.
        """
        cursors = resources(self._request).cursors
        values = query.filters()
        is_filtered = bool(values)
        statement = pages.statement(values, query.sort, continued=query.cursor is not None)
        if query.cursor is not None:
            values |= cursors.read(query.cursor, query.sort)
        # One more row than the page shows tells whether there is a next page.
        values["limit"] = query.limit + 1
        user_id = getattr(self._request.state, "user_id", None)
        limit = resources(self._request).user_limit
        turn = limit.turn(user_id) if is_filtered and user_id is not None else nullcontext()
        async with turn:
            rows = await self._send(statement, values | parameters)
        keys = [name for name, _ in named(pages.order(query.sort))]
        values_of = [[row.pop(key) for key in keys] for row in rows]
        if len(rows) > query.limit:
            rows.pop()
            cursor = cursors.write(query.sort, values_of[-2])
            names = self._request.query_params.multi_items()
            kept = [(name, value) for name, value in names if name != "cursor"]
            link = f"{url}?{urlencode([*kept, ('cursor', cursor)])}"
            self._response.headers["Link"] = f'<{link}>; rel="next"'
        return rows

    async def _send(self, statement: CompiledStatement, values: dict[str, Any]) -> list[Row]:
        self._statement.seconds = LIST_SECONDS
        try:
            return await self._statement.all(statement, **values)
        except exc.OperationalError as error:
            if getattr(error.orig, "pgcode", None) != QUERY_CANCELED:
                raise
            bind_contextvars(error="the list took too long")
            detail = "reading this list takes too long: try again later, or with other filters"
            raise unavailable(detail) from None


async def get_page_reader(
    request: Request, response: Response, statement: ReadStatementDep
) -> PageReader:
    return PageReader(request, response, statement)


PageReaderDep = Annotated[PageReader, Depends(get_page_reader)]
