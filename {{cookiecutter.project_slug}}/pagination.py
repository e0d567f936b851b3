"""Pages by keyset, for any table: the last page of a list costs no more than the first.

A cursor holds the values that the list is sorted by, of the last row of a page; the next page
begins behind them. It is signed, so that only one of ours ever reaches a query.
"""

import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Depends, Request, Response
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
    tuple_,
)

from db import CompiledStatement, OneStatement, Row, StatementDep
from resources import resources
from schemas.text import PlainText


class PageQuery(BaseModel):
    """The query parameters of a list. A subclass has its orders as `sort`, and its filters."""

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
    """The pages of a list, a constant of its module: each statement is built and compiled once.

    rows: selects all rows of the list. sorts: what each order compares, most significant first;
    no value may be NULL, and the last one is unique. An index on the same expressions makes a
    page read no more rows than it shows. filters: the condition of each filter, whose `bindparam`
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

    def statement(self, filters: Iterable[str], sort: str, *, continued: bool) -> CompiledStatement:
        """Return the statement for the first page, or for one behind a cursor."""
        key = (*filters, sort, continued)
        if key not in self._statements:
            page = self._build(filters, sort, continued=continued)
            self._statements[key] = CompiledStatement(page)
        return self._statements[key]

    def order(self, sort: str) -> Sequence[SQLColumnExpression[Any]]:
        return self._sorts[sort.removeprefix("-")]

    def _build(
        self, filters: Iterable[str], sort: str, *, continued: bool
    ) -> Select[*tuple[Any, ...]]:
        descending = sort.startswith("-")
        columns = self.order(sort)
        page = self._rows.where(*(self._filters[name] for name in filters))
        page = page.order_by(*(c.desc() if descending else c.asc() for c in columns))
        # For the next cursor, as text: PostgreSQL reads back what it wrote, whatever the type.
        page = page.add_columns(*(cast(c, Text).label(name) for name, c in named(columns)))
        if continued:
            row = tuple_(*columns)
            # psycopg2 quotes text without a type: PostgreSQL takes it for one of the column's.
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
    """Writes and reads cursors, which hold for the life of the secret they are signed with."""

    def __init__(self, secret: SecretStr) -> None:
        # The key is derived here, once, and not for each cursor.
        key = hmac.digest(secret.get_secret_value().encode(), b"cursor", "sha256")
        self._signer = Signer(key, key_derivation="none", algorithm=Sha256())

    def write(self, sort: str, values: Iterable[str]) -> str:
        """Return the cursor of the page behind a row. values: what it is sorted by, as text."""
        content = json.dumps([sort, *values], separators=(",", ":"))
        return self._signer.sign(base64_encode(content)).decode()

    def read(self, cursor: str, sort: str) -> dict[str, str]:
        """Return the values by their names in a statement. Raises RequestValidationError."""
        try:
            parts: list[str] = json.loads(base64_decode(self._signer.unsign(cursor)))
        except BadData:
            raise invalid_cursor("is not one of ours: take it from a Link header") from None
        if parts[0] != sort:
            raise invalid_cursor(f"belongs to another order: sort={parts[0]}")
        return dict(named(parts[1:]))


def invalid_cursor(reason: str) -> RequestValidationError:
    return RequestValidationError(
        [{"type": "cursor", "loc": ("query", "cursor"), "msg": f"The cursor {reason}"}]
    )


class PageReader:
    """Reads a page for a request, in one statement, and links to the next."""

    def __init__(self, request: Request, response: Response, statement: OneStatement) -> None:
        self._request = request
        self._response = response
        self._statement = statement

    async def read(self, pages: Pages, query: PageQuery, url: str, **parameters: Any) -> list[Row]:
        """Return the rows of a page. If there is a next one, the header Link has its address.

        url: the address of the list. parameters: what the `rows` of its pages bind.
        """
        cursors = resources(self._request).cursors
        values = query.filters()
        statement = pages.statement(values, query.sort, continued=query.cursor is not None)
        if query.cursor is not None:
            values |= cursors.read(query.cursor, query.sort)
        # With one row more than the page shows, there is a next page.
        values["limit"] = query.limit + 1
        rows = await self._statement.all(statement, **values, **parameters)
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


async def get_page_reader(
    request: Request, response: Response, statement: StatementDep
) -> PageReader:
    return PageReader(request, response, statement)


PageReaderDep = Annotated[PageReader, Depends(get_page_reader)]
