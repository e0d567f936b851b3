"""The base of all request bodies, and types for values that the database can store."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# PostgreSQL's text can contain every character but NUL. The OpenAPI shows the pattern to clients.
# Constrained text also rejects lone surrogates ("\ud800"), which JSON can express but UTF-8 cannot;
# with a plain `str` they would cause a 500.
PlainText = Annotated[str, Field(pattern=r"^[^\u0000]*$")]

# What cannot be seen: spaces, control characters, and characters of no width, such as U+200B.
INVISIBLE = (
    r"\u0000-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f"
    r"\u2000-\u200f\u2028-\u202f\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0"
)
# The OpenAPI shows this pattern; NotBlank has the message for people.
VISIBLE = rf"^[^\u0000]*[^{INVISIBLE}][^\u0000]*$"
IS_VISIBLE = re.compile(rf"[^{INVISIBLE}\U000e0000-\U000e0fff]")


def refuse_blank(text: str) -> str:
    if not IS_VISIBLE.search(text):
        raise ValueError("write at least one visible character")
    return text


# For text, after its bounds; add `json_schema_extra={"pattern": VISIBLE}` to them.
NotBlank = AfterValidator(refuse_blank)

# A point in time in a response. The database returns it in the time zone of its own settings.
Utc = Annotated[datetime, AfterValidator(lambda moment: moment.astimezone(UTC))]

# An id in a body: JSON has no type for it.
Id = Annotated[UUID, Field(strict=False)]


def drop_zero_fraction(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# For an integer, after its bounds: in JSON, 7.0 equals 7, and some languages write it that way.
Whole = BeforeValidator(drop_zero_fraction)


def unset() -> Any:
    """Stand in for a field that was not sent. `exclude_unset` drops it, so nothing reads it."""


MAX_FIELDS = 100


class Strict(BaseModel):
    """The base of all request bodies: rejects unknown fields, and does not convert types.

    `"yes"` is not a boolean and `"7"` not an integer. A type that JSON lacks, such as a date or an
    enum, must allow text: `Annotated[Priority, Field(strict=False)]`.
    """

    # The input may be a password: it must not appear in responses or logs.
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def limit_fields(cls, body: Any) -> Any:
        """Reject bodies with too many fields: to list 100,000 unknown ones takes 0.3 s."""
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields", "Body should have at most {max} fields", {"max": MAX_FIELDS}
            )
        return body
