"""The shape of all errors, and how a route documents its errors in the OpenAPI."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

TOO_SHORT: dict[str, Any] = {
    "type": "string_too_short",
    "loc": ["body", "title"],
    "msg": "String should have at least 1 character",
}


class Problem(BaseModel):
    """An error: what went wrong, in a sentence for people."""

    detail: Annotated[str, Field(examples=["Not Found"])]


class Mistake(BaseModel):
    """One error in a request: where it is, but never what was sent."""

    model_config = ConfigDict(json_schema_extra={"examples": [TOO_SHORT]})

    type: Annotated[str, Field(description="The rule that was broken, for programs.")]
    loc: Annotated[list[str | int], Field(description="Where: `body`, `query`, …, and the field.")]
    msg: Annotated[str, Field(description="What is wrong, for people.")]


class ValidationProblem(BaseModel):
    """The errors in a request, at most the first 20."""

    detail: Annotated[list[Mistake], Field(examples=[[TOO_SHORT]])]


RETRY_AFTER_SECONDS = 2  # of a 503
RETRY_AFTER = {"Retry-After": "Seconds to wait before the next attempt."}

# Status: what it means, an example of `detail`, headers that come with it.
PROBLEMS: dict[int, tuple[str, Any, dict[str, str]]] = {
    400: ("The body cannot be read.", "There was an error parsing the body", {}),
    401: (
        "The token is missing, invalid or expired.",
        "Not authenticated",
        {"WWW-Authenticate": "The scheme that is asked for: `Bearer`."},
    ),
    403: ("It is not allowed.", "registration is closed", {}),
    404: ("Not found, or it belongs to another user.", "Not Found", {}),
    409: ("It conflicts with existing data.", "this e-mail address is taken", {}),
    412: (
        "A precondition failed: it has changed since, or exists already.",
        "it has changed since you read it: read it again",
        {},
    ),
    413: ("The body is too large.", "Content Too Large", {}),
    422: ("The request breaks the rules that are documented here.", [TOO_SHORT], {}),
    429: ("Too many attempts or requests.", "too many attempts, try again later", RETRY_AFTER),
    503: ("Temporarily unavailable.", "the database does not answer", RETRY_AFTER),
    507: ("The database has no space left.", "the database has no space left", {}),
}
BODY = (400, 413, 422, 507)  # the errors of every route that takes a body


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document errors: `responses=problems(401, 404, *BODY)` on a route or a router.

    422 must be among them: FastAPI's own has an `input`, which this app does not send.
    """
    return {status: document(status) for status in statuses}


def document(status: int) -> dict[str, Any]:
    description, detail, headers = PROBLEMS[status]
    response: dict[str, Any] = {
        "model": ValidationProblem if status == 422 else Problem,
        "description": description,
        "content": {"application/json": {"example": {"detail": detail}}},
    }
    return response | with_headers(headers) if headers else response


def with_headers(headers: dict[str, str]) -> dict[str, Any]:
    """Document the headers of a response, by their names and what they mean."""
    return {
        "headers": {
            name: {"description": meaning, "schema": {"type": "string"}}
            for name, meaning in headers.items()
        }
    }


ETAG = {"ETag": "The version, for `If-Match` and `If-None-Match`."}
# What a route documents that answers with 304 when the client has the newest version.
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "It is still the version in `If-None-Match`.", **with_headers(ETAG)}
}

# For a route that returns a page of a list.
NEXT_PAGE: dict[int | str, dict[str, Any]] = {
    200: with_headers({"Link": '<address>; rel="next"; missing on the last page.'})
}
