"""Copying rows with foreign keys, sequences and all kinds of values."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg2
import pytest
import sqlalchemy as sa

from postgres import copy_tables
from postgres.copy_tables import CopyError, End, Progress, copy_rows
from postgres.tests.servers import connected, rows
from postgres.url import DatabaseUrl


def shop() -> sa.MetaData:
    metadata = sa.MetaData()
    sa.Table(
        "line items",
        metadata,
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("order_id", sa.ForeignKey("orders.id"), nullable=False),
        sa.Column("parent_id", sa.ForeignKey("line items.id")),
        sa.Column("price", sa.Numeric(10, 2)),
        sa.Column("twice", sa.Numeric(10, 2), sa.Computed("price * 2", persisted=True)),
        sa.Column("Weights", sa.ARRAY(sa.Double)),
        sa.Column("extra", sa.JSON),
    )
    sa.Table(
        "orders",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("number", sa.Integer, sa.Sequence("order_numbers")),
    )
    return metadata


@pytest.fixture
def shops(new_database: Callable[[], DatabaseUrl]) -> Iterator[tuple[End, End]]:
    """Two databases with these tables: one with rows, and an empty one."""
    ends = []
    for url in (new_database(), new_database()):
        engine = sa.create_engine(url.direct.for_sqlalchemy())
        shop().create_all(engine)
        engine.dispose()
        ends.append(End(url, psycopg2.connect(url.direct.for_libpq())))
    with ends[0].connection, ends[0].connection.cursor() as cursor:
        for _ in range(3):
            cursor.execute("INSERT INTO orders (number) VALUES (nextval('order_numbers'))")
        cursor.execute(
            """INSERT INTO "line items" (order_id, parent_id, price, "Weights", extra) VALUES
            (1, 2, 0.1, '{0.1, 3e-300}', '{"a": [1]}'), (3, NULL, 2.5, NULL, NULL)"""
        )
        cursor.execute("DELETE FROM orders WHERE id = 2")
    yield ends[0], ends[1]
    for end in ends:
        end.connection.close()


def test_rows_are_copied_unchanged(shops: tuple[End, End]) -> None:
    source, target = shops
    progress = Progress()

    copy_rows(source, target, shop(), progress)
    target.commit()

    tables = ["orders", "line items"]
    assert progress.rows == {"orders": 2, "line items": 2}
    assert str(progress) == "copying line items: 2 rows"
    assert rows(target.url, tables) == rows(source.url, tables)


def test_columns_without_a_model_field_are_copied(shops: tuple[End, End]) -> None:
    source, target = shops
    for end in shops:
        end.ask('ALTER TABLE orders ADD COLUMN "Note" text')
        end.connection.commit()
    source.ask("UPDATE orders SET \"Note\" = 'by hand' WHERE id = 1")
    source.connection.commit()

    copy_rows(source, target, shop(), Progress())
    target.commit()

    assert rows(target.url, ["orders"]) == rows(source.url, ["orders"])
    assert target.ask('SELECT "Note" FROM orders WHERE id = 1') == [("by hand",)]


def test_a_column_that_the_target_does_not_have_is_an_error(shops: tuple[End, End]) -> None:
    source, target = shops
    source.ask("ALTER TABLE orders ADD COLUMN note text")
    source.connection.commit()

    with pytest.raises(CopyError) as caught:
        copy_rows(source, target, shop(), Progress())

    assert target.url.database in caught.value.problem
    assert 'column "note" of relation "orders" does not exist' in caught.value.message


def test_rows_written_during_the_copy_are_left_out(
    shops: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = shops

    def write_between(source: End, target: End, table: sa.Table, progress: Progress) -> None:
        copy_table(source, target, table, progress)
        with connected(source.url) as cursor:
            cursor.execute("INSERT INTO orders DEFAULT VALUES RETURNING id")
            cursor.execute('INSERT INTO "line items" (order_id) VALUES (%s)', cursor.fetchone())

    copy_table = copy_tables.copy_table
    monkeypatch.setattr(copy_tables, "copy_table", write_between)
    copy_rows(source, target, shop(), progress := Progress())
    target.commit()

    assert progress.rows == {"orders": 2, "line items": 2}


def test_sequences_continue_where_they_were(shops: tuple[End, End]) -> None:
    source, target = shops

    copy_rows(source, target, shop(), Progress())
    target.commit()

    insert = "INSERT INTO orders (number) VALUES (nextval('order_numbers')) RETURNING id, number"
    assert target.ask(insert) == [(4, 4)]
    assert target.ask('INSERT INTO "line items" (order_id) VALUES (4) RETURNING id') == [(3,)]


def test_row_level_security_is_an_error_because_it_hides_rows(shops: tuple[End, End]) -> None:
    source, target = shops
    role = f"test_{secrets.token_hex(8)}"
    source.ask("ALTER TABLE orders ENABLE ROW LEVEL SECURITY")
    source.ask(f"CREATE ROLE {role}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    source.connection.commit()
    source.ask(f"SET ROLE {role}")
    source.connection.commit()

    with pytest.raises(CopyError) as caught:
        copy_rows(source, target, shop(), Progress())

    source.connection.rollback()
    source.connection.set_session(isolation_level="DEFAULT", readonly=False)
    source.ask(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")
    source.connection.commit()
    assert source.url.database in caught.value.problem
    assert "row-level security" in caught.value.message


def test_a_copy_does_not_wait_long_for_a_lock(
    shops: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_tables, "TRANSACTION", "SET LOCAL lock_timeout = '100ms'")
    source, target = shops
    with closing(psycopg2.connect(target.url.direct.for_libpq())) as other:
        other.cursor().execute("LOCK TABLE orders IN ROW EXCLUSIVE MODE")

        with pytest.raises(CopyError) as caught:
            copy_rows(source, target, shop(), Progress())

    assert target.url.database in caught.value.problem
    assert "lock timeout" in caught.value.message
