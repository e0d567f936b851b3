"""Conditional requests: `If-Match` and `If-None-Match` (RFC 9110, 13), for rows with `updated_at`.

The ETag of a row is its `updated_at` in quotes, as JSON spells it, so a list has the ETags of all
its rows. That works because every change moves `updated_at`, if only by a microsecond.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import HTTPException, Request, status
from fastapi.exceptions import RequestValidationError
from sqlalchemy import ARRAY, Boolean, ColumnElement, SQLColumnExpression, any_, bindparam

from models import TIMESTAMP

MAX_HEADER_CHARACTERS = 1000
MEANINGS = {
    "If-Match": "The ETag that you know. If the task has another one by now, you get a 412.",
    "If-None-Match": "Of a GET: the ETag that you know. If it is still the task's, you get a 304."
    " Of a PUT: `*` to create a task, but replace none. If there is one, you get a 412.",
}
TAG = re.compile(r'(W/)?"([^"]*)"')


def etag_of(updated_at: datetime) -> str:
    """Return the ETag of a row. updated_at: in UTC."""
    return f'"{updated_at.isoformat().replace("+00:00", "Z")}"'


@dataclass(frozen=True, slots=True)
class Preconditions:
    """Which versions of a row a request accepts: one in `match`, and none in `none_match`.

    A version is the row's `updated_at`; None stands for `*`, all of them. must_exist: there is an
    If-Match, which a row that does not exist cannot fulfil.
    """

    must_exist: bool
    match: list[datetime] | None
    none_match: list[datetime] | None

    @property
    def parameters(self) -> dict[str, Any]:
        """Return the values of what `accepted` and `not_excluded` bind."""
        return {
            "any_match": self.match is None,
            "match": self.match or [],
            "any_none_match": self.none_match is None,
            "none_match": self.none_match or [],
        }

    def check(self, updated_at: datetime, *, only_reads: bool) -> None:
        """Raise HTTPException if they refuse a row: 412, with only_reads also 304."""
        if self.match is not None and updated_at not in self.match:
            raise changed()
        if self.none_match is None or updated_at in self.none_match:
            if not only_reads:
                raise changed()
            etag = {"ETag": etag_of(updated_at)}
            raise HTTPException(status.HTTP_304_NOT_MODIFIED, headers=etag)


UNCONDITIONAL = Preconditions(must_exist=False, match=None, none_match=[])


def accepted(updated_at: SQLColumnExpression[datetime]) -> ColumnElement[bool]:
    """Return the condition that a row fulfils both headers."""
    in_match = updated_at == any_(bindparam("match", type_=ARRAY(TIMESTAMP)))
    return (bindparam("any_match", type_=Boolean) | in_match) & not_excluded(updated_at)


def not_excluded(updated_at: SQLColumnExpression[datetime]) -> ColumnElement[bool]:
    """Return the condition that a row fulfils If-None-Match."""
    in_none_match = updated_at == any_(bindparam("none_match", type_=ARRAY(TIMESTAMP)))
    return ~(bindparam("any_none_match", type_=Boolean) | in_none_match)


def preconditions_of(request: Request) -> Preconditions:
    """Return what the headers of a request demand. Raises RequestValidationError."""
    match, none_match = [], []
    for name, value in request.scope["headers"]:  # most requests have neither
        if name == b"if-match":
            match.append(value)
        elif name == b"if-none-match":
            none_match.append(value)
    if not match and not none_match:
        return UNCONDITIONAL
    return Preconditions(
        must_exist=bool(match),
        # A weak ETag promises less than If-Match asks for. If-None-Match is content with it.
        match=read_tags(b",".join(match), "If-Match", weak=False) if match else None,
        none_match=read_tags(b",".join(none_match), "If-None-Match", weak=True),
    )


def read_tags(header: bytes, name: str, *, weak: bool) -> list[datetime] | None:
    """Return the versions in a header, None for `*`. A tag in another form matches no row.

    Raises RequestValidationError.
    """
    text = header.decode("latin-1").strip()
    if len(text) > MAX_HEADER_CHARACTERS:
        message = f"Header should have at most {MAX_HEADER_CHARACTERS} characters"
        raise RequestValidationError(
            [{"type": "string_too_long", "loc": ("header", name), "msg": message}]
        )
    if text == "*":
        return None
    versions = (version_of(tag) for is_weak, tag in TAG.findall(text) if weak or not is_weak)
    return [version for version in versions if version is not None]


def version_of(tag: str) -> datetime | None:
    try:
        version = datetime.fromisoformat(tag)
    except ValueError:
        return None
    # ETags are compared letter by letter: another spelling of the same time is another ETag.
    return version if tag.endswith("Z") and etag_of(version) == f'"{tag}"' else None


def changed() -> HTTPException:
    return HTTPException(
        status.HTTP_412_PRECONDITION_FAILED, "it has changed since you read it: read it again"
    )


def document_preconditions(*names: str) -> dict[str, Any]:
    """Document headers: `openapi_extra=document_preconditions("If-Match")` on a route.

    They are not parameters of its function, because each parameter adds time to every request.
    """
    schema = {"type": "string", "maxLength": MAX_HEADER_CHARACTERS, "pattern": r"^[^\u0000]*$"}
    return {
        "parameters": [
            {"name": name, "in": "header", "description": MEANINGS[name], "schema": schema}
            for name in names
        ]
    }
