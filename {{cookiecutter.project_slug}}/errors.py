"""Error responses, all in FastAPI's shape, `{"detail": …}`: what is wrong, and where.

They never repeat the input. It would put passwords into the logs of browsers and proxies, and it
can contain text ("\\ud800") that no response can encode.
"""

from typing import Any

from fastapi import FastAPI, HTTPException, Request, status
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy import exc
from sqlmodel import SQLModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, get_contextvars

from db import DatabaseBusy, Row
from resources import resources
from schemas.problem import RETRY_AFTER_SECONDS

# PostgreSQL's codes for constraint violations.
RESTRICT_VIOLATION = "23001"
FOREIGN_KEY_VIOLATION = "23503"
UNIQUE_VIOLATION = "23505"
CHECK_VIOLATION = "23514"
EXCLUSION_VIOLATION = "23P01"

MAX_BODY_BYTES = 1_000_000
MAX_MISTAKES = 20  # to report: a body may have 100,000
MAX_PLACES = 10
MAX_TEXT_CHARACTERS = 200


def add_error_handlers(app: FastAPI) -> None:
    """Handle all errors in this module. Call it before adding other middleware.

    That makes this middleware the innermost, so a 413 or a 500 gets CORS headers and a log line.
    """
    app.add_exception_handler(RequestValidationError, refuse_request)
    app.add_exception_handler(exc.DataError, refuse_value)
    app.add_exception_handler(exc.IntegrityError, refuse_conflict)
    for error in (DatabaseBusy, exc.DBAPIError):
        app.add_exception_handler(error, answer_fault)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(InternalErrors)


async def refuse_request(_request: Request, error: Exception) -> JSONResponse:
    """Return a 422 for a request that breaks the documented rules."""
    assert isinstance(error, RequestValidationError)  # noqa: S101  (Starlette's type is wider)
    mistakes = [
        {
            "type": mistake["type"],
            "loc": [clean(place) for place in mistake["loc"][:MAX_PLACES]],
            "msg": clean(mistake["msg"].removeprefix("Value error, ")),
        }
        for mistake in error.errors()[:MAX_MISTAKES]
    ]
    return JSONResponse({"detail": mistakes}, status.HTTP_422_UNPROCESSABLE_CONTENT)


def clean(place: Any) -> Any:
    """Shorten text that may come from the client, and replace what UTF-8 cannot encode."""
    if not isinstance(place, str):
        return place  # the index of an element
    return place[:MAX_TEXT_CHARACTERS].encode(errors="replace").decode()


async def refuse_value(_request: Request, error: Exception) -> JSONResponse:
    """Return a 422 if the database rejects a value that the schemas accepted, and log it."""
    bind_contextvars(error=f"a value that the schemas missed: {type(error.__cause__).__name__}")
    mistake = {
        "type": "database_value",
        "loc": ["request"],
        "msg": "The database cannot store one of the values",
    }
    return JSONResponse({"detail": [mistake]}, status.HTTP_422_UNPROCESSABLE_CONTENT)


async def refuse_conflict(request: Request, error: Exception) -> JSONResponse:
    """Return a 409, or a 422 that names the field, if a constraint of any table rejects a row.

    A missing required value is a bug, so its error is raised again.
    """
    assert isinstance(error, exc.IntegrityError)  # noqa: S101  (Starlette's type is wider)
    code, diag = error.orig.pgcode, error.orig.diag  # type: ignore[union-attr]
    fields = fields_of(diag.constraint_name)
    if code in {UNIQUE_VIOLATION, EXCLUSION_VIOLATION}:
        detail = f"another one already has this {' and '.join(fields) or 'value'}"
        return JSONResponse({"detail": detail}, status.HTTP_409_CONFLICT)
    if code == RESTRICT_VIOLATION or (code == FOREIGN_KEY_VIOLATION and request.method == "DELETE"):
        rows = (diag.table_name or "rows").replace("_", " ")
        detail = f"it still has {rows}: delete or move them first"
        return JSONResponse({"detail": detail}, status.HTTP_409_CONFLICT)
    if code == FOREIGN_KEY_VIOLATION:
        mistake = {"type": "foreign_key", "msg": "There is nothing of yours with this id"}
    elif code == CHECK_VIOLATION:
        mistake = {"type": "check", "msg": f"The values break the rule {diag.constraint_name}"}
    else:
        raise error
    place = ["body", *fields[:1]]
    return JSONResponse(
        {"detail": [mistake | {"loc": place}]}, status.HTTP_422_UNPROCESSABLE_CONTENT
    )


def fields_of(constraint: str | None) -> list[str]:
    """Return the columns of a constraint or an index, without the owner."""
    tables = SQLModel.metadata.tables.values()
    rules: list[Any] = [rule for table in tables for rule in (*table.constraints, *table.indexes)]
    return [
        column.name
        for rule in rules
        if rule.name == constraint
        for column in rule.columns
        if column.name != "owner_id"
    ]


def found(row: Row | None, what: str) -> Row:
    """Return the row. Raises HTTPException, a 404, if there is none."""
    if row is None:
        raise not_found(what)
    return row


def not_found(what: str) -> HTTPException:
    return HTTPException(status.HTTP_404_NOT_FOUND, f"there is no such {what}")


async def answer_fault(request: Request, error: Exception) -> JSONResponse:
    """Return a 503 or 507 if the database is down, busy or full, or its schema does not fit.

    The log has the cause. Any other database error is a bug, and is raised again.
    """
    if isinstance(error, DatabaseBusy):
        bind_contextvars(error=str(error))
        return unavailable_response(str(error))
    finding = await resources(request).availability.diagnose(error)
    if finding is None:
        raise error
    bind_contextvars(finding=finding.name, error=finding.message)
    if finding.name == "disk-full":
        # Without Retry-After: waiting does not free any space.
        return JSONResponse({"detail": finding.public}, status.HTTP_507_INSUFFICIENT_STORAGE)
    return unavailable_response(finding.public)


def unavailable_response(detail: str) -> JSONResponse:
    return JSONResponse(
        {"detail": detail},
        status.HTTP_503_SERVICE_UNAVAILABLE,
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def unavailable(detail: str) -> HTTPException:
    return HTTPException(
        status.HTTP_503_SERVICE_UNAVAILABLE,
        detail,
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


class BodyLimit:
    """Reject larger bodies with a 413.

    FastAPI's `max_body_size` works outside all middleware, and responds in plain text: browsers
    would report a CORS error, and the log would have no line.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.detail = f"the body is larger than {max_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():  # which the server enforces
                if len(value) > 18 or int(value) > self.max_bytes:
                    answer = JSONResponse(
                        {"detail": self.detail}, status.HTTP_413_CONTENT_TOO_LARGE
                    )
                    await answer(scope, receive, send)
                else:
                    await self.app(scope, receive, send)
                return

        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(status.HTTP_413_CONTENT_TOO_LARGE, self.detail)
            return message

        await self.app(scope, receive_counted, send)


class InternalErrors:
    """Turn an unexpected exception into a 500 with the id under which the log has its traceback.

    The exception is raised again, so the server logs it and tests fail. FastAPI's own handler works
    outside all middleware: its response would have no CORS headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except Exception:
            if not started:
                answer = JSONResponse(
                    {"detail": "internal error", "request_id": get_contextvars().get("request_id")},
                    status.HTTP_500_INTERNAL_SERVER_ERROR,
                    # uvicorn closes the connection after an exception. Without this header, a
                    # client could send its next request on it.
                    headers={"Connection": "close"},
                )
                await answer(scope, receive, send)
            raise
