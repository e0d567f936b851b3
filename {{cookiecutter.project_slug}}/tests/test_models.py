"""Rules for all tables, including future ones."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.util import CommandError
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlmodel import SQLModel

import migrations
import models  # noqa: F401  (the tables)
from config import PROJECT_DIR
from db import StatementDep
from postgres.tests.servers import connected
from postgres.url import DatabaseUrl

# Tables whose rows belong to nobody, and are kept when an account is deleted.
SHARED: set[str] = set()


def goes_with_its_owner(table: sa.Table) -> bool:
    """Return whether deleting an account deletes its rows, directly or by a cascade."""
    parents = [key.referred_table for key in table.foreign_key_constraints if is_cascade(key)]
    return (
        table.name == "users"
        or "owner_id" in table.columns
        or any(goes_with_its_owner(parent) for parent in parents if parent is not table)
    )


def is_cascade(key: sa.ForeignKeyConstraint) -> bool:
    return key.ondelete == "CASCADE"


def test_rows_of_every_table_can_be_deleted_with_their_account() -> None:
    forgotten = [
        table.name
        for table in SQLModel.metadata.sorted_tables
        if table.name not in SHARED and not goes_with_its_owner(table)
    ]

    assert forgotten == [], 'add an `owner_id`, a foreign key with ondelete="CASCADE", or to SHARED'


OWN = sa.MetaData(naming_convention=SQLModel.metadata.naming_convention)
SHELVES = sa.Table(
    "shelves",
    OWN,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("owner_id", sa.String, nullable=False),
    sa.Column("name", sa.String),
    sa.UniqueConstraint("owner_id", "id"),
    sa.UniqueConstraint("owner_id", "name"),
)
BOOKS = sa.Table(
    "books",
    OWN,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("owner_id", sa.String, nullable=False),
    sa.Column("shelf_id", sa.Integer),
    sa.Column("pages", sa.Integer, sa.CheckConstraint("pages > 0", "pages_positive")),
    sa.Column("title", sa.String, nullable=False, server_default=""),
    sa.ForeignKeyConstraint(["owner_id", "shelf_id"], ["shelves.owner_id", "shelves.id"]),
)


@pytest.fixture
def library(engine: sa.Engine) -> Iterator[None]:
    """Add tables for tests to the models and to the database."""
    tables = [table.to_metadata(SQLModel.metadata) for table in (SHELVES, BOOKS)]
    for table in tables:
        table.create(engine)
    yield
    for table in reversed(tables):
        table.drop(engine)
        SQLModel.metadata.remove(table)


@pytest.fixture
def client(
    app_with: Callable[..., FastAPI], database_url: DatabaseUrl, library: None
) -> Iterator[TestClient]:
    assert library is None
    app = app_with(database_url)

    @app.post("/{table}")
    async def create(table: str, row: dict[str, Any], statement: StatementDep) -> None:
        await statement.all(sa.insert(OWN.tables[table]), **row)

    @app.delete("/shelves")
    async def delete_shelves(statement: StatementDep) -> None:
        await statement.all(sa.delete(SHELVES))

    with TestClient(app) as client:
        client.post("/shelves", json={"id": 1, "owner_id": "ada", "name": "Novels"})
        yield client


@pytest.mark.parametrize("row", [{"shelf_id": 2}, {"owner_id": "bob", "shelf_id": 1}], ids=str)
def test_a_reference_to_a_row_that_the_owner_does_not_have_is_a_422(
    client: TestClient, row: dict[str, Any]
) -> None:
    answer = client.post("/books", json={"id": 1, "owner_id": "ada", **row})

    (mistake,) = answer.json()["detail"]
    assert answer.status_code == 422
    assert (mistake["type"], mistake["loc"]) == ("foreign_key", ["body", "shelf_id"])


def test_a_value_that_is_taken_is_a_409_that_names_the_field(client: TestClient) -> None:
    shelf = {"id": 2, "owner_id": "ada", "name": "Novels"}

    taken = client.post("/shelves", json=shelf)
    other = client.post("/shelves", json=shelf | {"owner_id": "bob"})

    assert other.status_code == 200
    assert taken.status_code == 409
    assert taken.json() == {"detail": "another one already has this name"}


def test_deleting_a_row_that_others_refer_to_is_a_409(client: TestClient) -> None:
    client.post("/books", json={"id": 1, "owner_id": "ada", "shelf_id": 1})

    answer = client.delete("/shelves")

    assert answer.status_code == 409
    assert answer.json() == {"detail": "it still has books: delete or move them first"}


def test_a_value_that_violates_a_check_constraint_is_a_422(client: TestClient) -> None:
    answer = client.post("/books", json={"id": 1, "owner_id": "ada", "pages": 0})

    (mistake,) = answer.json()["detail"]
    assert answer.status_code == 422
    assert (mistake["type"], mistake["loc"]) == ("check", ["body"])
    assert "ck_books_pages_positive" in mistake["msg"]


def test_a_missing_required_value_is_a_bug_in_the_route(client: TestClient) -> None:
    with pytest.raises(sa.exc.IntegrityError, match="title"):
        client.post("/books", json={"id": 1, "owner_id": "ada", "title": None})


@pytest.mark.usefixtures("library")
def test_deleting_an_account_deletes_its_rows_in_all_tables(
    engine: sa.Engine, app_with: Callable[..., FastAPI], database_url: DatabaseUrl
) -> None:
    with TestClient(app_with(database_url)) as client:
        account = {
            "email": f"{uuid4().hex}@example.com",
            "password": "correct horse",
            "name": "Ada",
        }
        owner_id = client.post("/auth/register", json=account).json()["id"]
        another = str(uuid4())
        for number, owner in enumerate((owner_id, another)):
            shelf = {"id": number, "owner_id": owner}
            with engine.begin() as connection:
                connection.execute(sa.insert(SHELVES), shelf)
                connection.execute(sa.insert(BOOKS), shelf | {"shelf_id": number})
        form = {"username": account["email"], "password": account["password"]}
        token = client.post("/auth/login", data=form).json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"

        answer = client.request(
            "DELETE", "/auth/me", json={"current_password": account["password"]}
        )

    assert answer.status_code == 204
    with engine.connect() as connection:
        for table in (SHELVES, BOOKS):
            assert list(connection.scalars(sa.select(table.c.owner_id))) == [another]


def test_a_migration_that_would_drop_a_column_is_not_generated(
    new_database: Callable[[], DatabaseUrl],
) -> None:
    url = new_database()
    migrations.upgrade(url)
    with connected(url) as cursor:
        cursor.execute("ALTER TABLE tasks ADD nickname text; CREATE TABLE nicknames (id integer)")

    with pytest.raises(CommandError, match=r"no model has nicknames, tasks\.nickname"):
        command.revision(migrations.alembic_config(url), "Rename it", autogenerate=True)


def test_a_migration_creates_the_type_of_a_new_enum_column(
    new_database: Callable[[], DatabaseUrl], tmp_path: Path
) -> None:
    url = new_database()
    migrations.upgrade(url)
    with connected(url) as cursor:
        cursor.execute("CREATE TABLE parcels (id integer NOT NULL PRIMARY KEY)")
    size = sa.Enum("small", "cat's", name="size")
    columns = [sa.Column("id", sa.Integer, primary_key=True), sa.Column("size", size)]
    parcels = sa.Table("parcels", SQLModel.metadata, *columns)
    config = migrations.alembic_config(url)
    folders = [str(PROJECT_DIR / "migrations" / "versions"), str(tmp_path)]
    config.set_main_option("path_separator", "os")
    config.set_main_option("version_locations", os.pathsep.join(folders).replace("%", "%%"))

    try:
        command.revision(config, "Add sizes", autogenerate=True, version_path=str(tmp_path))
        command.upgrade(config, "head")
        command.check(config)
        command.downgrade(config, "-1")
        command.upgrade(config, "head")
    finally:
        SQLModel.metadata.remove(parcels)
