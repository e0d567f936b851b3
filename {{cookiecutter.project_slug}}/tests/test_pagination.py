"""Pages of a table of the tests' own, whose columns have types that tasks do not have."""

import itertools
import random
from collections.abc import Iterator
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
import sqlalchemy as sa
from fastapi import FastAPI, Query
from fastapi.testclient import TestClient

import main
from config import Settings
from pagination import PageQuery, PageReaderDep, Pages


class Size(Enum):
    SMALL = 1
    LARGE = 2


TABLE = sa.Table(
    "parcels",
    sa.MetaData(),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("size", sa.Enum(Size)),  # PostgreSQL has the names: SMALL and LARGE
    sa.Column("weight", sa.Numeric(8, 3)),
    sa.Column("sent_on", sa.Date),
    sa.Column("address", sa.Text),
)
C = TABLE.c
ORDERS: dict[str, list[sa.SQLColumnExpression[Any]]] = {
    "size": [C.size, C.number],
    "weight": [C.weight, C.number],
    "sent_on": [C.sent_on, C.weight, C.number],
    "address": [sa.func.lower(C.address), C.number],
}
PARCELS = Pages(
    sa.select(C.number).where(C.number >= sa.bindparam("least")),
    sorts=ORDERS,
    filters={"size": C.size == sa.bindparam("size")},
)


class ParcelQuery(PageQuery):
    size: Annotated[Literal["SMALL", "LARGE"] | None, Query()] = None


@pytest.fixture(scope="module")
def parcels(engine: sa.Engine) -> Iterator[list[dict[str, Any]]]:
    pick = random.Random(1)  # noqa: S311  (the same parcels each time)
    rows = [
        {
            "number": number,
            "size": pick.choice(list(Size)),
            "weight": Decimal(pick.randrange(20)) / 8,
            "sent_on": date(2030, 1, 1) + timedelta(days=pick.randrange(5)),
            "address": pick.choice(['"a"', "B, \\ c", "Ä", "", "a'"]),
        }
        for number in range(100)
    ]
    TABLE.create(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(TABLE), rows)
    yield rows
    TABLE.drop(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TYPE size"))


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[TestClient]:
    app: FastAPI = main.create_app(settings)

    @app.get("/parcels")
    async def list_parcels(
        query: Annotated[ParcelQuery, Query()], reader: PageReaderDep
    ) -> list[dict[str, Any]]:
        return await reader.read(PARCELS, query, "http://testserver/parcels", least=5)

    with TestClient(app) as client:
        yield client


def read(client: TestClient, url: str) -> Iterator[list[int]]:
    """Yield the numbers on each page."""
    while url:
        answer = client.get(url)
        assert answer.status_code == 200, answer.text
        yield [row["number"] for row in answer.json()]
        url = answer.links.get("next", {}).get("url", "")


@pytest.mark.parametrize("way", ["", "-"])
@pytest.mark.parametrize("order", ORDERS)
def test_pages_show_every_row_once_and_in_order(
    client: TestClient, engine: sa.Engine, parcels: list[dict[str, Any]], order: str, way: str
) -> None:
    keys = [key.desc() if way else key.asc() for key in ORDERS[order]]
    with engine.connect() as connection:
        in_order = sa.select(C.number).where(C.number >= 5).order_by(*keys)
        expected = list(connection.scalars(in_order))

    pages = list(read(client, f"/parcels?limit=7&sort={way}{order}"))

    assert list(itertools.chain.from_iterable(pages)) == expected
    assert len(pages) == 14
    assert len(expected) == len(parcels) - 5


def test_pages_can_be_filtered(client: TestClient, parcels: list[dict[str, Any]]) -> None:
    pages = read(client, "/parcels?limit=7&sort=weight&size=LARGE")

    large = {row["number"] for row in parcels[5:] if row["size"] is Size.LARGE}
    assert set(itertools.chain.from_iterable(pages)) == large


def test_a_row_has_the_columns_that_were_selected_and_no_more(
    client: TestClient, parcels: list[dict[str, Any]]
) -> None:
    assert parcels
    assert client.get("/parcels?limit=1&sort=weight").json()[0].keys() == {"number"}
