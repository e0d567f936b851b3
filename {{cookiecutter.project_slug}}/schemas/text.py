"""What bodies this API takes, and what values in them: nothing that the database cannot hold."""

from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# PostgreSQL's text holds every character but NUL. The pattern stands in the OpenAPI too, where
# clients can see it. Constrained text also refuses lone surrogates ("\ud800"), which JSON can
# spell and UTF-8 cannot; a plain `str` would let them through to a 500.
PlainText = Annotated[str, Field(pattern=r"^[^\u0000]*$")]

# A moment to be answered: the database tells it in the time zone that it is set to.
Utc = Annotated[datetime, AfterValidator(lambda moment: moment.astimezone(UTC))]


# An id in a body: JSON has no type for it.
Id = Annotated[UUID, Field(strict=False)]


def drop_zero_fraction(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# For an integer, behind its bounds: JSON does not tell 7.0 from 7, and some languages write it so.
Whole = BeforeValidator(drop_zero_fraction)

MAX_FIELDS = 100


class Strict(BaseModel):
    """The base of all request bodies: no fields but the declared ones, no guessing at types.

    `"yes"` is no boolean and `"7"` no integer. What JSON has no type for, a date or a choice,
    says that text will do: `Annotated[Priority, Field(strict=False)]`.
    """

    # The input may be a password: it stands neither in answers nor in logs.
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def refuse_a_flood(cls, body: Any) -> Any:
        """Spare us a list of 100,000 unknown names, which would take a third of a second."""
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields", "Body should have at most {max} fields", {"max": MAX_FIELDS}
            )
        return body
