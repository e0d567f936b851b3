"""Compiled statements: they give what Connection.execute gives, or refuse."""

import enum
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import psycopg2.errors
import pytest
from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Date,
    DateTime,
    Double,
    Engine,
    Enum,
    Executable,
    ForeignKey,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    Text,
    Time,
    TypeDecorator,
    Uuid,
    bindparam,
    cast,
    create_engine,
    delete,
    event,
    exc,
    func,
    insert,
    literal,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as insert_or_update

from postgres.engine import open_engine
from postgres.statements import CompiledStatement, Row, execute
from postgres.tests.asking import Run
from postgres.url import DatabaseUrl


class Color(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Cents(TypeDecorator[Decimal]):
    """A type as users write them: an amount, kept as a whole number."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Any) -> int | None:  # noqa: ARG002
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, dialect: Any) -> Decimal | None:  # noqa: ARG002
        return None if value is None else Decimal(value) / 100


METADATA = MetaData()
COLOR = Enum(Color, name="color", values_callable=lambda _: list(map(str, Color)))
MOMENT = datetime(2030, 1, 31, 12, tzinfo=timezone(timedelta(hours=2)))
THINGS = Table(
    "things",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("uuid", Uuid, unique=True),
    Column("string", String(200)),
    Column("text", Text),
    Column("bytes", LargeBinary),
    Column("boolean", Boolean),
    Column("bigint", BigInteger),
    Column("double", Double),
    Column("numeric", Numeric(12, 3)),
    Column("float_numeric", Numeric(12, 3, asdecimal=False)),
    Column("cents", Cents),
    Column("color", COLOR),
    Column("colors", ARRAY(COLOR)),
    Column("text_enum", Enum(Color, native_enum=False)),
    Column("json", JSON),
    Column("jsonb", JSONB(none_as_null=True)),
    Column("numbers", ARRAY(Integer)),
    Column("texts", ARRAY(Text)),
    Column("amounts", ARRAY(Numeric)),
    Column("uuids", ARRAY(Uuid)),
    Column("moment", DateTime(timezone=True)),
    Column("local_moment", DateTime),
    Column("day", Date),
    Column("time", Time),
    Column("interval", Interval),
    Column("order", Integer),  # a word that SQL reserves
    Column("defaulted", Text, default="by Python"),
    Column("made", DateTime(timezone=True), server_default=func.now()),
    Column("changed", DateTime(timezone=True), server_default=func.now(), onupdate=func.now()),
)
LIVE = Table("live", METADATA, Column("id", Uuid, primary_key=True, default=uuid4))
PARTS = Table(
    "parts", METADATA, Column("thing", Uuid, ForeignKey("things.uuid")), Column("full name", Text)
)

# Each column's values beside NULL.
VALUES: dict[str, list[object]] = {
    "uuid": [UUID("0190a8c0-0000-7000-8000-000000000001")],
    "string": ["", "x" * 200],
    "text": ["50 % of %(this)s: 'ä' \"€\" \\ :that"],
    "bytes": [b"", b"\x00\xff'\\"],
    "boolean": [True, False],
    "bigint": [-(2**63), 0],
    "double": [0.1, float("inf")],
    "numeric": [Decimal("-1.005"), 2, 0.5],
    "float_numeric": [Decimal("1.5"), 2.25],
    "cents": [Decimal("12.34")],
    "color": [Color.BLUE, "red"],
    "colors": [[], [Color.RED, Color.BLUE]],
    "text_enum": [Color.RED],
    "json": [{"a": [1, None, "ä"]}, [], "text", 1.5, True],
    "jsonb": [{"a": {"b": []}}, []],
    "numbers": [[], [1, None, -3]],
    "texts": [["", "a,b", '"', "NULL", None, "ä\\"]],
    "amounts": [[Decimal("1.5"), None]],
    "uuids": [[UUID("0190a8c0-0000-7000-8000-000000000001")]],
    "moment": [MOMENT, MOMENT.astimezone(UTC)],
    "local_moment": [MOMENT.replace(tzinfo=None)],
    "day": [date(2030, 1, 31)],
    "time": [time(12, 30, 15, 500)],
    "interval": [timedelta(days=-3, seconds=5, microseconds=7)],
    "order": [1],
}
RETURNED = [column for column in THINGS.c if column.key != "id"]  # each INSERT has another
ONE = {name: values[-1] for name, values in VALUES.items()}
OWN = THINGS.c.uuid == bindparam("own")


@pytest.fixture(scope="module")
def things_url(new_database: Callable[[], DatabaseUrl]) -> DatabaseUrl:
    """A database with the tables."""
    url = new_database()
    engine = create_engine(url.for_sqlalchemy())
    METADATA.create_all(engine)
    engine.dispose()
    return url


@pytest.fixture(scope="module")
def engine(things_url: DatabaseUrl) -> Iterator[Engine]:
    engine = create_engine(things_url.for_sqlalchemy())
    yield engine
    engine.dispose()


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    """A connection whose work is rolled back after the test."""
    with engine.connect() as connection, connection.begin() as transaction:
        yield connection
        transaction.rollback()


def execute_both(
    connection: Connection, statement: Executable | CompiledStatement, **parameters: object
) -> list[Row]:
    """Execute a statement in both ways, from the same start, and compare. Returns its rows."""
    if not isinstance(statement, CompiledStatement):
        statement = CompiledStatement(statement)
    with connection.begin_nested() as savepoint:
        expected = execute(connection, statement.statement, parameters)
        savepoint.rollback()
    rows = statement.execute(connection, parameters)
    assert rows == expected
    assert kinds(rows) == kinds(expected)
    return rows


def kinds(rows: list[Row]) -> list[list[type]]:
    return [[type(value) for value in row.values()] for row in rows]


# What comes back.


@pytest.mark.parametrize("name", VALUES)
def test_types_are_converted_as_by_sqlalchemy(connection: Connection, name: str) -> None:
    column = THINGS.c[name]
    create = CompiledStatement(insert(THINGS).returning(column))
    change = CompiledStatement(update(THINGS).returning(column))
    for value in [*VALUES[name], None]:
        execute_both(connection, create, **{name: value})
        execute_both(connection, change, **{name: value})
        execute_both(connection, select(column).where(OWN | literal(True)), own=uuid4())
        connection.execute(delete(THINGS))


def test_rows_are_created_read_changed_and_deleted(connection: Connection) -> None:
    own = ONE["uuid"]

    (created,) = execute_both(connection, insert(THINGS).returning(*RETURNED), **ONE)
    (read,) = execute_both(connection, select(*RETURNED).where(OWN), own=own)
    change = update(THINGS).where(OWN).returning(*RETURNED)
    (changed,) = execute_both(connection, change, own=own, text="new", order=None)
    deletion = delete(THINGS).where(OWN).returning(THINGS.c.text)
    deleted = execute_both(connection, deletion, own=own)
    again = execute_both(connection, deletion, own=own)

    assert created["color"] is Color.RED
    assert created["made"].tzinfo is not None
    assert read == created
    assert (changed["text"], changed["order"], changed["color"]) == ("new", None, Color.RED)
    assert deleted == [{"text": "new"}]
    assert again == []


def test_no_row_and_many_rows_come_back(connection: Connection) -> None:
    numbers = CompiledStatement(
        select(func.generate_series(1, bindparam("last", type_=Integer)).label("number"))
    )

    assert execute_both(connection, numbers, last=0) == []
    assert execute_both(connection, numbers, last=3) == [{"number": n} for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "statement",
    [
        text("SELECT 1 AS one, 'a:b' AS two, '5 %' AS three, '{1,2}'::int[] AS four"),
        text("SELECT uuid, json, moment FROM things"),
        text("SELECT uuid, color AS c FROM things").columns(uuid=Uuid, c=COLOR),
        select(text("1 AS one"), text("2 AS two")),
        select(THINGS.c.order, (THINGS.c.numeric * 2).label("double"), cast(THINGS.c.uuid, Text)),
        select(func.coalesce(THINGS.c.text, "none"), literal("5 %"), func.count().over()),
        select(THINGS.c.text.like("50 \\%%"), THINGS.c.text.ilike("%'ä'%").label("is_like")),
        select(THINGS.c.jsonb["a"], THINGS.c.jsonb["a"]["b"].label("b"), THINGS.c.numbers[1]),
        select(THINGS.c.uuid, THINGS.alias().c.uuid).where(literal(True)).limit(1),
        select(THINGS.c.uuid).order_by(THINGS.c.made).limit(2).offset(0),
        select(THINGS.c.uuid, THINGS.c.color).cte("own").select(),
        union_all(select(THINGS.c.color.label("c")), select(THINGS.c.color)),
        insert(THINGS).values(text="fixed").returning(THINGS.c.text, THINGS.c.defaulted),
        insert(THINGS).values([{"order": 1}, {"order": 2}]).returning(THINGS.c.order),
        insert(THINGS).from_select(["text"], select(THINGS.c.text)).returning(THINGS.c.text),
        insert_or_update(THINGS)
        .values(uuid=ONE["uuid"])
        .on_conflict_do_update(index_elements=["uuid"], set_={"text": "was there"})
        .returning(THINGS.c.text, THINGS.c.color),
        insert(THINGS).values(text="no RETURNING"),
        update(THINGS).values(text="no RETURNING"),
        update(THINGS).values(order=THINGS.c.order + 1).returning(THINGS.c.order),
        delete(THINGS).where(THINGS.c.color == Color.RED),
        text("UPDATE things SET text = 'x' RETURNING text"),
        text("CREATE TABLE others (id integer)"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:SELECT statement has a cartesian product")
def test_any_statement_returns_what_sqlalchemy_returns(
    connection: Connection, statement: Executable
) -> None:
    connection.execute(insert(THINGS).values(**ONE))

    execute_both(connection, statement)


@pytest.mark.parametrize(
    "statement",
    [
        text("SELECT * FROM changing"),
        text("SELECT * FROM changing").columns(color=COLOR),
        text("SELECT * FROM changing").columns(moment=THINGS.c.moment.type, color=COLOR),
        select(text("*")).select_from(text("changing")),
    ],
    ids=["text", "text with a type", "text with types", "select(text)"],
)
def test_columns_that_are_not_named_may_change(
    connection: Connection, statement: Executable
) -> None:
    compiled = CompiledStatement(statement)
    connection.execute(text("CREATE TABLE changing (a integer, color color, b integer)"))
    connection.execute(text("INSERT INTO changing VALUES (1, 'red', 2)"))
    before = execute_both(connection, compiled)

    connection.execute(text("ALTER TABLE changing DROP a, ADD c integer DEFAULT 3"))
    after = execute_both(connection, compiled)

    assert [list(row) for row in before + after] == [["a", "color", "b"], ["color", "b", "c"]]


def test_names_that_a_parameter_cannot_have_pass(connection: Connection) -> None:
    create = insert(PARTS).returning(PARTS.c["full name"])

    rows = execute_both(connection, create, **{"full name": "Ada"})

    assert rows == [{"full name": "Ada"}]


# Parameters.


def test_one_statement_takes_different_sets_of_parameters(connection: Connection) -> None:
    create = CompiledStatement(insert(THINGS).returning(THINGS.c.text, THINGS.c.order))
    change = CompiledStatement(update(THINGS).returning(THINGS.c.text, THINGS.c.order))

    for statement in (create, change):
        for parameters in (
            {"text": "a"},
            {"order": 1, "text": "b"},
            {"text": "c", "order": 2},
            {"order": 3},
            {"text": "d"},
        ):
            rows = execute_both(connection, statement, **parameters)
            assert parameters.items() <= rows[-1].items()


def test_a_default_is_written_where_nothing_else_is_given(connection: Connection) -> None:
    create = CompiledStatement(insert(THINGS).returning(THINGS.c.defaulted))

    rows = [
        *execute_both(connection, create, text="x"),
        *execute_both(connection, create, text="x", defaulted="given"),
        *execute_both(connection, create, text="x", defaulted=None),
        *execute_both(connection, create),
    ]

    assert [row["defaulted"] for row in rows] == ["by Python", "given", None, "by Python"]


def test_a_parameter_with_a_value_of_its_own_may_be_left_out(connection: Connection) -> None:
    echo = CompiledStatement(select(bindparam("word", "default", type_=Text).label("word")))

    assert execute_both(connection, echo) == [{"word": "default"}]
    assert execute_both(connection, echo, word="given") == [{"word": "given"}]
    assert execute_both(connection, echo) == [{"word": "default"}]


@pytest.mark.parametrize(
    "statement", [select(THINGS.c.text).where(OWN), insert(THINGS).values(uuid=bindparam("own"))]
)
def test_a_missing_parameter_is_an_error(connection: Connection, statement: Executable) -> None:
    with pytest.raises(exc.SQLAlchemyError, match="value is required for bind parameter 'own'"):
        CompiledStatement(statement).execute(connection, {"owm": uuid4()})


@pytest.mark.parametrize(
    "statement",
    [
        select(THINGS.c.text).where(THINGS.c.order.in_([1, 2])),
        select(THINGS.c.text).where(THINGS.c.order.in_(bindparam("orders", expanding=True))),
        insert(LIVE),
        select(bindparam("now", callable_=lambda: datetime.now(UTC), type_=THINGS.c.moment.type)),
    ],
    ids=["a list", "a list to come", "a default", "a parameter"],
)
def test_what_differs_at_each_execution_is_refused(
    connection: Connection, statement: Executable
) -> None:
    compiled = CompiledStatement(statement)

    for _ in range(2):
        with pytest.raises(TypeError, match="send the statement itself, without CompiledStatement"):
            compiled.execute(connection, {})


def test_columns_without_a_type_are_refused_beside_those_that_have_one(
    connection: Connection,
) -> None:
    compiled = CompiledStatement(select(text("1 AS one, 2 AS two"), THINGS.c.cents))

    for _ in range(2):
        with pytest.raises(exc.StatementError), connection.begin_nested():
            compiled.execute(connection, {})


# Errors, and those who listen.


def test_an_error_of_the_database_is_wrapped_as_everywhere(connection: Connection) -> None:
    create = CompiledStatement(insert(THINGS).returning(THINGS.c.uuid))
    create.execute(connection, {"uuid": ONE["uuid"]})

    with pytest.raises(exc.IntegrityError) as caught, connection.begin_nested():
        create.execute(connection, {"uuid": ONE["uuid"]})

    assert isinstance(caught.value.orig, psycopg2.errors.UniqueViolation)
    assert caught.value.orig.pgcode == "23505"
    assert execute_both(connection, create, uuid=uuid4())


@pytest.mark.parametrize("name", ["cents", "text_enum", "numbers"])
def test_a_value_that_cannot_be_written_is_an_error_as_everywhere(
    connection: Connection, name: str
) -> None:
    statement = insert(THINGS).returning(THINGS.c[name])
    errors = []

    for way in (CompiledStatement(statement).execute, lambda c, p: execute(c, statement, p)):
        with pytest.raises(exc.StatementError) as caught, connection.begin_nested():
            way(connection, {name: "neither"})
        errors.append((type(caught.value), type(caught.value.orig)))

    assert errors[0] == errors[1]


def test_a_lost_connection_is_replaced(run: Run, embedded_server: DatabaseUrl) -> None:
    hang_up = CompiledStatement(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    pid = CompiledStatement(text("SELECT pg_backend_pid() AS pid"))

    async def use() -> list[Row]:
        rows: list[Row] = []
        async with open_engine(embedded_server) as engine:
            for statement in (pid, hang_up, pid):
                with suppress(exc.OperationalError):
                    async with engine.connect() as connection:
                        rows += await connection.run_sync(statement.execute, {})
        return rows

    first, second = run(use())
    assert first != second


def test_the_asynchronous_engine_gives_the_same(run: Run, things_url: DatabaseUrl) -> None:
    create = insert(THINGS).returning(*RETURNED)

    async def use() -> list[Row]:
        async with open_engine(things_url) as engine, engine.connect() as connection:
            return await connection.run_sync(lambda own: execute_both(own, create, **ONE))

    assert len(run(use())) == 1


def test_listeners_see_the_statement(engine: Engine) -> None:
    compiled = CompiledStatement(select(literal("x").label("x")))
    seen: list[str] = []

    def listen(*its: Any) -> None:
        seen.append(its[2])

    with engine.connect() as connection:
        unheard = compiled.execute(connection, {})
    event.listen(engine, "before_cursor_execute", listen)
    with engine.connect() as connection:
        heard = compiled.execute(connection, {})
    event.remove(engine, "before_cursor_execute", listen)

    assert heard == unheard == [{"x": "x"}]
    assert seen == ["SELECT %(param_1)s AS x"]


def test_an_engine_that_echoes_logs_the_statement(
    things_url: DatabaseUrl, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(things_url.for_sqlalchemy(), echo=True)
    with engine.connect() as connection:
        CompiledStatement(select(literal("x").label("x"))).execute(connection, {})
    engine.dispose()

    assert "SELECT %(param_1)s AS x" in caplog.text
