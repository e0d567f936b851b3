"""What goes over the wire about tasks."""

import re
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from models import Priority
from schemas.text import VISIBLE, NotBlank, PlainText, Strict, Utc, Whole, unset

# One day within Python's limits, so that no time zone moves a date out of them.
EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
LATEST = datetime(9999, 12, 30, tzinfo=UTC)


def require_text(value: object) -> object:
    """Reject numbers, which Pydantic would read as seconds since 1970."""
    if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d[Tt ]", value):
        return value
    raise ValueError("write a date and time with its zone, such as 2030-01-31T12:00:00Z")


def in_utc(value: datetime) -> datetime:
    try:
        moved = value.astimezone(UTC)
    except OverflowError:
        moved = None
    if moved is None or not EARLIEST <= moved <= LATEST:
        raise ValueError("the date is out of range")
    return moved


SEEN = {"pattern": VISIBLE}
Title = Annotated[
    PlainText,
    Field(min_length=1, max_length=200, examples=["Buy milk"], json_schema_extra=SEEN),
    NotBlank,
]
# The index on text finds three characters or more.
Search = Annotated[PlainText, Field(min_length=3, max_length=200, json_schema_extra=SEEN), NotBlank]
Description = Annotated[PlainText, Field(max_length=5000, examples=["Two litres, semi-skimmed"])]
Order = Annotated[int, Field(ge=-(2**31), le=2**31 - 1), Whole]
PriorityName = Annotated[Priority, Field(strict=False)]
Moment = Annotated[
    AwareDatetime,
    BeforeValidator(require_text),
    AfterValidator(in_utc),
    Field(strict=False, examples=["2030-01-31T12:00:00Z"]),
]


class TaskCreate(Strict):
    """A new task, or with PUT a whole task. Omitted fields get their defaults."""

    title: Title
    description: Description | None = None
    completed: bool = False
    order: Order | None = None
    priority: PriorityName = Priority.MEDIUM
    due_at: Moment | None = None


class TaskUpdate(Strict):
    """Changes to a task. Omitted fields stay as they are."""

    title: Title = Field(default_factory=unset)
    description: Description | None = Field(default_factory=unset)
    completed: bool = Field(default_factory=unset)
    order: Order | None = Field(default_factory=unset)
    priority: PriorityName = Field(default_factory=unset)
    due_at: Moment | None = Field(default_factory=unset)


class TasksUpdate(Strict):
    """A change of many tasks."""

    completed: Annotated[bool, Field(examples=[True])]


class TasksChanged(BaseModel):
    """The outcome of a change of many tasks."""

    changed: Annotated[int, Field(description="How many tasks were changed", examples=[3])]


class TaskPublic(BaseModel):
    """A task, as its owner sees it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "019a8f3e-5c1d-7b2a-9e4f-0123456789ab",
                    "url": "http://127.0.0.1:8000/tasks/019a8f3e-5c1d-7b2a-9e4f-0123456789ab",
                    "title": "Buy milk",
                    "description": "Two litres, semi-skimmed",
                    "completed": False,
                    "order": 1,
                    "priority": "medium",
                    "due_at": "2030-01-31T12:00:00Z",
                    "created_at": "2030-01-30T09:30:00Z",
                    "updated_at": "2030-01-30T09:30:00Z",
                }
            ]
        }
    )

    id: UUID
    url: str
    title: str
    description: str | None
    completed: bool
    order: int | None
    priority: Priority
    due_at: Utc | None
    created_at: Utc
    updated_at: Utc
