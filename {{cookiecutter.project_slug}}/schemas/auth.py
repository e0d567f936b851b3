"""What goes over the wire about accounts. Passwords and tokens come in as `SecretStr`, which
shows asterisks wherever it is printed."""

from dataclasses import dataclass
from typing import Annotated, Literal
from uuid import UUID

from email_validator import EmailNotValidError, validate_email
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SecretStr,
    StringConstraints,
)
from pydantic_core import CoreSchema, core_schema

from schemas.text import PlainText, Strict, Utc


def normalize_email(text: str) -> str:
    """Return the one spelling under which an address is stored and looked up.

    No mail server tells "Ada@" from "ada@", so neither do we. No DNS is asked. Raises ValueError.
    """
    try:
        return validate_email(text.strip(), check_deliverability=False).normalized.lower()
    except EmailNotValidError:
        raise ValueError("write an e-mail address such as ada@example.com") from None


@dataclass(frozen=True)
class Characters:
    """How long a secret may be, in characters; the limits stand in the OpenAPI."""

    least: int
    most: int

    def __get_pydantic_core_schema__(
        self, _source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        text = Annotated[
            PlainText,
            Field(
                min_length=self.least,
                max_length=self.most,
                json_schema_extra={"format": "password"},
            ),
        ]
        schema = handler.generate_schema(text)
        return core_schema.no_info_after_validator_function(SecretStr, schema)


Email = Annotated[
    PlainText,
    Field(max_length=254, examples=["ada@example.com"], json_schema_extra={"format": "email"}),
    AfterValidator(normalize_email),
]
Name = Annotated[
    PlainText,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=100),
    Field(examples=["Ada"]),
]
NewPassword = Annotated[SecretStr, Characters(8, 128)]
Password = Annotated[SecretStr, Characters(1, 128)]  # one that exists: it may be shorter
OldRefreshToken = Annotated[SecretStr, Characters(1, 200)]


class Registration(Strict):
    email: Email
    password: NewPassword
    name: Name


class LoginForm(BaseModel):
    """OAuth2's password grant (RFC 6749, 4.3). Other fields are ignored, as it demands."""

    model_config = ConfigDict(hide_input_in_errors=True)

    grant_type: Literal["password"] = "password"
    username: Annotated[Email, Field(description="The e-mail address")]
    password: Password


class RefreshRequest(Strict):
    refresh_token: OldRefreshToken


class PasswordChange(Strict):
    current_password: Password
    new_password: NewPassword


class TokenPair(BaseModel):
    """What a log-in yields: a token for requests, and one to get the next pair with, once."""

    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105  (OAuth2's word for the kind)
    expires_in: Annotated[
        int, Field(description="Seconds that the access token is valid for", examples=[900])
    ]
    refresh_token: str


class UserPublic(BaseModel):
    """An account, as its owner sees it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "019a8f3e-5c1d-7b2a-9e4f-0123456789ab",
                    "email": "ada@example.com",
                    "name": "Ada",
                    "created_at": "2030-01-30T09:30:00Z",
                }
            ]
        }
    )

    id: UUID
    email: str
    name: str
    created_at: Utc
