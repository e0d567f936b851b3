"""Settings: every environment variable that the app reads, checked once, before anything starts."""

import os
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit, urlunsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from mail import MailUrl
from postgres.env_file import EXAMPLE_SECRET
from postgres.url import DatabaseUrl, parse

PROJECT_DIR = Path(__file__).parent
ENV_FILE = PROJECT_DIR / ".env"
PYPROJECT: dict[str, Any] = tomllib.loads((PROJECT_DIR / "pyproject.toml").read_text("utf-8"))
VERSION: str = PYPROJECT["project"]["version"]
# A host with other letters than these is sent in its ASCII form, xn--….
ORIGIN = re.compile(r"(?P<scheme>https?)://([a-z\d.-]+|\[[a-f\d:.]+\])(:[1-9]\d{0,4})?", re.ASCII)

REDIS_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
REDIS_TLS_OPTIONS = {"ssl_ca_certs", "ssl_cert_reqs"}


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a setting, and what to do about it."""

    problem: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.problem}; {self.advice}" if self.advice else self.problem


class WrongValueError(ValueError):
    """A value that cannot work. advice: what to do about it."""

    def __init__(self, problem: str, *, advice: str) -> None:
        super().__init__(problem)
        self.advice = advice


class SettingsError(Exception):
    """Settings that cannot work: one line for each mistake, and no secret in any of them."""

    def __init__(self, *mistakes: Mistake) -> None:
        super().__init__("\n".join(map(str, mistakes)))
        self.mistakes = mistakes


def read_origin(text: str) -> str:
    """Return `scheme://host[:port]`, the way browsers send it. Raises ValueError."""
    origin = text.strip().rstrip("/").lower()
    if "*" in origin:
        raise ValueError('"*" is refused, because requests carry credentials: list every origin')
    match = ORIGIN.fullmatch(origin)
    if match is None:
        raise ValueError("write an origin such as https://app.example.com, without a path")
    standard = {"http": "80", "https": "443"}[match["scheme"]]  # browsers leave it out
    return origin.removesuffix(f":{standard}")


def read_origins(value: object) -> object:
    """Split a comma-separated list of origins."""
    if not isinstance(value, str):
        return value
    origins = tuple(read_origin(part) for part in value.split(",") if part.strip())
    if not origins:
        raise ValueError("is empty: write an origin such as https://app.example.com")
    return origins


def read_path(value: object) -> object:
    if not isinstance(value, str):
        return value
    path = value.rstrip("/")
    if not re.fullmatch(r"(/[\w.~-]+)*", path, re.ASCII):
        raise ValueError("write a path that begins with /, such as /api or /reset-password")
    return path


def require_tls(origin: str, info: ValidationInfo) -> str:
    """Refuse http in production, except on this machine. Raises ValueError."""
    in_production = info.data.get("environment") == "production"
    if in_production and origin.startswith("http:") and not is_loopback(origin):
        raise ValueError("begins with http, so others could replace the keys: write https")
    return origin


def is_loopback(origin: str) -> bool:
    host = re.sub(r":\d+$", "", origin.partition("://")[2]).strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def parse_database_url(value: object) -> object:
    return parse(value) if isinstance(value, str) else value


def read_mail_url(value: object) -> object:
    return MailUrl.parse(value) if isinstance(value, str) else value


def read_throttle_url(value: object) -> object:
    """Return the URL of a Redis or Valkey server the way `limits` reads it.

    Raises ValueError, without a part of the URL.
    """
    if not isinstance(value, str):
        return value
    example = "write redis://:PASSWORD@HOST:6379/0"
    try:
        url = urlsplit(value.strip())
        host = url.netloc if url.port else f"{url.netloc.removesuffix(':')}:6379"
    except ValueError:
        advice = "encode special characters, such as @ as %40"
        raise WrongValueError(f"is not a URL: {example}", advice=advice) from None
    scheme = REDIS_SCHEMES.get(url.scheme)
    if not (scheme and url.hostname and re.fullmatch(r"/?\d*", url.path)) or url.fragment:
        raise ValueError(f"is not the URL of a Redis or Valkey server: {example}")
    if set(parse_qs(url.query)) - (REDIS_TLS_OPTIONS if scheme == "rediss" else set()):
        raise ValueError("may have only ssl_ca_certs and ssl_cert_reqs, and only with rediss://")
    if find_spec("redis") is None:
        raise WrongValueError("needs a package", advice="run: uv sync --group redis")
    return urlunsplit((scheme, host, url.path, url.query, ""))


def read_log_level(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


Url = Annotated[DatabaseUrl, NoDecode, BeforeValidator(parse_database_url)]
Origin = Annotated[str, BeforeValidator(read_origin)]
UrlPath = Annotated[str, BeforeValidator(read_path)]
Mail = Annotated[MailUrl, NoDecode, BeforeValidator(read_mail_url)]
BetterAuthUrl = Annotated[Origin, AfterValidator(require_tls)]
RedisUrl = Annotated[SecretStr, BeforeValidator(read_throttle_url)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(read_origins)]
LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(read_log_level)
]


class Settings(BaseSettings):
    """Environment variables override `.env`. `.env.example` explains each setting."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    database_url: Url
    database_url_direct: Url | None = None
    read_database_url: Url | None = None
    environment: Literal["development", "production"] = "production"
    better_auth_secret: Annotated[SecretStr, Field(min_length=32)]
    better_auth_url: BetterAuthUrl | None = None
    frontend_url: Origins = ("http://localhost:3000",)
    frontend_reset_path: UrlPath = "/reset-password"
    frontend_verify_path: UrlPath = "/verify-email"
    mail_url: Mail | None = None
    registration: Literal["open", "closed"] | None = None
    require_verified_email: bool = False
    throttle_url: RedisUrl | None = None
    app_name: str = PYPROJECT["tool"]["todo"]["title"]
    api_docs: bool | None = None
    debug: bool = False
    db_pool_size: Annotated[int, Field(ge=1, le=1000)] = 15
    db_queue_size: Annotated[int, Field(ge=0)] = 2000
    db_queue_seconds: Annotated[float, Field(gt=0, le=60)] = 4.0
    tasks_per_user: Annotated[int, Field(ge=0)] = 10_000
    log_level: LogLevel = "INFO"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    root_path: UrlPath = ""

    @field_validator("better_auth_secret")
    @classmethod
    def refuse_the_example(cls, secret: SecretStr) -> SecretStr:
        if secret.get_secret_value() == EXAMPLE_SECRET:
            raise ValueError("is the one from .env.example, which everybody knows")
        return secret

    @field_validator("mail_url")
    @classmethod
    def require_secure_links(cls, url: MailUrl | None, info: ValidationInfo) -> MailUrl | None:
        origin = info.data.get("frontend_url", ("",))[0]
        in_production = info.data.get("environment") == "production"
        if url and in_production and origin.startswith("http:") and not is_loopback(origin):
            raise ValueError("mails link to the first origin of FRONTEND_URL: write https there")
        return url

    @field_validator("require_verified_email")
    @classmethod
    def require_mail(cls, wanted: bool, info: ValidationInfo) -> bool:
        can_send = info.data.get("mail_url") or info.data.get("environment") == "development"
        if wanted and not can_send:
            raise ValueError("needs MAIL_URL, or nobody could log in")
        return wanted

    @property
    def in_development(self) -> bool:
        return self.environment == "development"

    @property
    def is_registration_open(self) -> bool:
        """Whether anybody may register: by default only in development."""
        return self.in_development if self.registration is None else self.registration == "open"

    @property
    def serves_docs(self) -> bool:
        """Whether to serve /docs, /redoc and /openapi.json: by default only in development."""
        return self.in_development if self.api_docs is None else self.api_docs

    @property
    def migration_url(self) -> DatabaseUrl:
        """The URL for migrations: without a transaction pooler, which does not keep sessions."""
        return self.database_url_direct or self.database_url.direct


REMEDIES = {  # for a value in .env, and for one in the environment, which overrides it
    "database_url": ("run: uv run manage.py env", "set it in the environment"),
    "better_auth_secret": (
        "run: uv run manage.py env --new-secret",
        "set it to the output of: openssl rand -hex 32",
    ),
}


def load_settings(env_file: Path | None) -> Settings:
    """Read and check all settings. Raises SettingsError, which names every mistake at once."""
    try:
        settings = Settings(_env_file=env_file)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_input=False)
    except UnicodeDecodeError as error:
        mistake = Mistake(f"{env_file} cannot be read, save it as UTF-8: {error}")
        raise SettingsError(mistake) from None
    except OSError as error:
        raise SettingsError(Mistake(f"{env_file} cannot be read: {error.strerror}")) from None
    else:
        return settings
    required = {name for name, field in Settings.model_fields.items() if field.is_required()}
    missing = {mistake["loc"][0] for mistake in mistakes if mistake["type"] == "missing"}
    has_file = env_file is not None and env_file.exists()
    if not has_file and missing == required:
        problem = "DATABASE_URL and BETTER_AUTH_SECRET are not set"
        advice = "in development, run: uv run manage.py setup; on a server, see docs/deploying.md"
        raise SettingsError(Mistake(problem, advice))
    in_environment = {name.lower() for name, value in os.environ.items() if value}
    found = {
        describe(mistake, in_file=has_file and mistake["loc"][0] not in in_environment)
        for mistake in mistakes
    }
    raise SettingsError(*sorted(found, key=str))


def describe(mistake: Any, *, in_file: bool) -> Mistake:
    """Describe an error of Pydantic's without the value, which may be a secret."""
    field = str(mistake["loc"][0])
    context = mistake.get("ctx", {})
    for_file, for_environment = REMEDIES.get(field, ("", ""))
    remedy = for_file if in_file else for_environment
    match mistake["type"]:
        case "missing":
            reason = "is missing"
        case "too_short":
            reason = f"is too short: at least {context['min_length']} characters"
        case "value_error":
            reason = str(context["error"])
            remedy = getattr(context["error"], "advice", remedy)
        case _:
            reason = mistake["msg"]
    return Mistake(f"{field.upper()}: {reason}", remedy)


def clear_libpq_variables(settings: Settings) -> None:
    """Remove PG… variables that are for another server than that of DATABASE_URL.

    For the embedded server, those are all. For others, they are the ones that name an address.
    """
    for name in [name for name in os.environ if name.startswith("PG")]:
        if settings.database_url.is_embedded or name in {"PGHOSTADDR", "PGSERVICE"}:
            del os.environ[name]


@lru_cache
def get_settings() -> Settings:
    """Return the settings of this process, or exit with a line for each mistake."""
    try:
        settings = load_settings(ENV_FILE)
    except SettingsError as error:
        lines = "".join(f"\n  {mistake}" for mistake in error.mistakes)
        raise SystemExit(f"Cannot start, the settings are not right:{lines}") from None
    clear_libpq_variables(settings)
    return settings
