"""Request and response bodies of accounts.

Passwords and tokens in requests are `Secret`, which prints as asterisks.
"""

from typing import Annotated, Literal
from uuid import UUID

from email_validator import EmailNotValidError, validate_email
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Secret, StringConstraints

from auth.passwords import COMMON, normalize
from schemas.text import IS_VISIBLE, VISIBLE, NotBlank, PlainText, Strict, Utc, unset

MIN_PASSWORD = 8


def normalize_email(text: str) -> str:
    """Return the spelling in which an address is stored and looked up. Raises ValueError.

    It is in lower case: mail servers treat "Ada@" and "ada@" as the same. There is no DNS lookup.
    """
    try:
        return validate_email(text.strip(), check_deliverability=False).normalized.lower()
    except EmailNotValidError:
        raise ValueError("enter an e-mail address such as ada@example.com") from None


def check_password(password: str) -> str:
    """Return a new password in the spelling in which it is hashed. Raises ValueError.

    The rules are those of NIST SP 800-63B: a length, and no password that is likely to be guessed.
    """
    password = normalize(password)
    if len(password) < MIN_PASSWORD:
        raise ValueError(f"String should have at least {MIN_PASSWORD} characters")
    if not IS_VISIBLE.search(password):
        raise ValueError("choose a password with letters, digits or signs")
    if password.casefold() in COMMON:
        raise ValueError("choose another password: many people use this one")
    return password


OWN_ADDRESS = "choose a password that is not the e-mail address or its part before @"


def is_own_address(password: str, email: str) -> bool:
    """Return whether a new password is the e-mail address of its account, or its first part."""
    parts = (email, email.partition("@")[0])
    return password.casefold() in {normalize(part).casefold() for part in parts}


Email = Annotated[
    PlainText,
    Field(max_length=254, examples=["ada@example.com"], json_schema_extra={"format": "email"}),
    AfterValidator(normalize_email),
]
Name = Annotated[
    PlainText,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=100),
    Field(examples=["Ada"], json_schema_extra={"pattern": VISIBLE}),
    NotBlank,
]
HiddenText = Annotated[PlainText, Field(json_schema_extra={"format": "password"})]
NewPassword = Secret[
    Annotated[
        HiddenText, Field(min_length=MIN_PASSWORD, max_length=128), AfterValidator(check_password)
    ]
]
OldPassword = Secret[Annotated[HiddenText, Field(min_length=1, max_length=128)]]
LinkToken = Secret[Annotated[HiddenText, Field(min_length=1, max_length=1000)]]
OldRefreshToken = Secret[Annotated[HiddenText, Field(min_length=1, max_length=200)]]


class Registration(Strict):
    email: Email
    password: NewPassword
    name: Name


class LoginForm(BaseModel):
    """OAuth2's password grant (RFC 6749, 4.3), which requires that other fields are ignored."""

    model_config = ConfigDict(hide_input_in_errors=True)

    grant_type: Literal["password"] = "password"
    username: Annotated[Email, Field(description="The e-mail address")]
    password: OldPassword


class RefreshRequest(Strict):
    refresh_token: OldRefreshToken


class PasswordChange(Strict):
    current_password: OldPassword
    new_password: NewPassword


class AccountDeletion(Strict):
    current_password: OldPassword


class AccountUpdate(Strict):
    """Changes to an account. Omitted fields stay as they are."""

    name: Name = Field(default_factory=unset)
    email: Annotated[
        Email, Field(description="It takes effect once the link that is mailed to it is followed")
    ] = Field(default_factory=unset)
    current_password: Annotated[
        OldPassword, Field(description="Required to change the address")
    ] = Field(default_factory=unset)


class AddressOnly(Strict):
    email: Email


class PasswordReset(Strict):
    token: LinkToken
    new_password: NewPassword


class AddressVerification(Strict):
    token: LinkToken


class TokenPair(BaseModel):
    """The tokens of a login session: one for requests, and one that gets the next pair, once."""

    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105  (OAuth2's name for this type)
    expires_in: Annotated[
        int, Field(description="How long the access token is valid, in seconds", examples=[900])
    ]
    refresh_token: str


class LoginSession(BaseModel):
    """A login session of the account."""

    id: UUID
    created_at: Utc
    last_used_at: Annotated[Utc, Field(description="When a refresh token was used last")]
    address: Annotated[
        str | None,
        Field(
            description="Where the login came from: an IPv4 address or an IPv6 network",
            examples=["192.0.2.1"],
        ),
    ]
    is_current: Annotated[bool, Field(description="Whether the access token belongs to it")]


class UserPublic(BaseModel):
    """An account, as its owner sees it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "019a8f3e-5c1d-7b2a-9e4f-0123456789ab",
                    "email": "ada@example.com",
                    "name": "Ada",
                    "email_verified_at": "2030-01-30T09:35:00Z",
                    "created_at": "2030-01-30T09:30:00Z",
                }
            ]
        }
    )

    id: UUID
    email: str
    name: str
    email_verified_at: Annotated[
        Utc | None, Field(description="When the address was verified; null if it was not")
    ]
    created_at: Utc
