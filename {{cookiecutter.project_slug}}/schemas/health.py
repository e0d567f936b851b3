"""What the health routes answer."""

from typing import Literal

from pydantic import BaseModel


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    app: str
    version: str


class Ready(BaseModel):
    status: Literal["ready"] = "ready"
    database_ms: float


class Problem(BaseModel):
    """The shape of every error."""

    detail: str
