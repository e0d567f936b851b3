"""What the health routes answer."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    app: Annotated[str, Field(examples=["Todo Backend"])]
    version: Annotated[str, Field(examples=["0.1.0"])]


class Ready(BaseModel):
    status: Literal["ready"] = "ready"
    database_ms: Annotated[float, Field(examples=[1.5])]
