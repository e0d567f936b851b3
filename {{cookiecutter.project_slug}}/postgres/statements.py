"""Statements that are sent often: compiled once, then sent through psycopg2 directly.

`Connection.execute` takes as much processor time as psycopg2 needs for the statement itself: it
looks up the compiled form, and creates a context per execution and a result per cursor. Here, that
is done once. Types convert values, and errors are handled, as everywhere in SQLAlchemy.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import ClauseElement, Connection, Dialect, Executable, TextualSelect
from sqlalchemy.schema import ColumnDefault
from sqlalchemy.sql.compiler import SQLCompiler

type Row = dict[str, Any]  # values by the names of the columns
type Converters = list[tuple[str, Callable[[Any], Any]]]


class CompiledStatement:
    """A statement for `StatementDep` that is sent often. Make it a constant of its module:

    READ = CompiledStatement(select(Task.id, Task.title).where(Task.id == bindparam("task_id")))
    """

    def __init__(self, statement: Executable) -> None:
        self.statement = statement
        self._forms: dict[tuple[str, ...], Form] = {}  # by parameter names

    def execute(self, connection: Connection, parameters: Row) -> list[Row]:
        """Execute it and return its rows. Raises the same errors as Connection.execute."""
        if connection.dispatch.before_cursor_execute or connection.engine.echo:  # for listeners
            return execute(connection, self.statement, parameters)
        names = tuple(parameters)
        form = self._forms.get(names)
        if form is None:
            form = self._forms[names] = Form(self.statement, names, connection.dialect)
        return form.execute(connection, parameters)


def execute(connection: Connection, statement: Executable, parameters: Row) -> list[Row]:
    """Execute any statement and return its rows."""
    result = connection.execute(statement, parameters)
    if not result.returns_rows:
        return []
    names = tuple(result.keys())
    return [dict(zip(names, row, strict=True)) for row in result]


class Form:
    """A statement compiled for certain parameters: they decide which columns an INSERT writes."""

    def __init__(self, statement: Executable, names: tuple[str, ...], dialect: Dialect) -> None:
        assert isinstance(statement, ClauseElement)  # noqa: S101  (all are)
        compiled = statement.compile(dialect=dialect, column_keys=names)
        assert isinstance(compiled, SQLCompiler)  # noqa: S101  (it is no DDL)
        defaults = {column.key: column.default for column in compiled.insert_prefetch}
        constants = {
            name: default.arg
            for name, default in defaults.items()
            if isinstance(default, ColumnDefault) and default.is_scalar
        }
        if (
            compiled.post_compile_params
            or compiled.literal_execute_params
            or compiled.update_prefetch
            or len(constants) < len(defaults)
            or any(bind.callable for bind in compiled.bind_names)
        ):
            raise TypeError(
                "a list for IN, or a value from a function, differs in each execution: send the"
                f" statement itself, without CompiledStatement(…): {compiled.string}"
            )
        self._sql = compiled.string
        # The statement's own values; parameters override them.
        given = dict.fromkeys(names)  # raises InvalidRequestError if one is missing
        self._values = {**compiled.construct_params(given, escape_names=False), **constants}
        self._escaped = compiled.escaped_bind_names  # for names with a space or the like
        self._returns_rows = not compiled.implicit_returning  # else it is an INSERT's new key
        self._binders: Converters = [
            (name, convert)
            for bind, name in compiled.bind_names.items()
            if (convert := bind.type.dialect_impl(dialect).bind_processor(dialect))
        ]
        columns = getattr(statement, "exported_columns", ())
        self._types = [column.type.dialect_impl(dialect) for column in columns]
        self._types_by_name: dict[str, Any] = {}
        if isinstance(statement, TextualSelect) and not statement.positional:
            # The text decides on the order of its columns, and may have others.
            self._types_by_name = dict(zip(columns.keys(), self._types, strict=True))
            self._types = []
        self._dialect = dialect
        self._names: list[str] = []  # of the result's columns, known after the first execution
        self._readers: Converters = []

    def execute(self, connection: Connection, parameters: Row) -> list[Row]:
        values = self._values | parameters
        cursor = connection.connection.cursor()
        try:
            for name, convert in self._binders:
                values[name] = convert(values[name])
            if self._escaped:
                values = {self._escaped.get(name, name): values[name] for name in values}
            cursor.execute(self._sql, values)
            return self._read(cursor)
        except BaseException as error:  # noqa: BLE001  (it is raised again)
            # SQLAlchemy wraps the error, calls listeners, and drops a lost connection.
            connection._handle_dbapi_exception(error, self._sql, None, cursor, None)
        finally:
            cursor.close()

    def _read(self, cursor: Any) -> list[Row]:
        if cursor.description is None or not self._returns_rows:
            return []
        if not (self._names and self._types):  # a migration may change what SELECT * returns
            self._learn(cursor.description)
        rows = [dict(zip(self._names, row, strict=True)) for row in cursor]
        for name, convert in self._readers:
            for row in rows:
                row[name] = convert(row[name])
        return rows

    def _learn(self, description: Any) -> None:
        """Take the names and types of the columns from a result."""
        types = self._types or [self._types_by_name.get(column.name) for column in description]
        self._readers = [
            (column.name, convert)
            for column, kind in zip(description, types, strict=True)
            if kind and (convert := kind.result_processor(self._dialect, column.type_code))
        ]
        self._names = [column.name for column in description]
