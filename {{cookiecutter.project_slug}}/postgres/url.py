"""Parses the connection strings that people paste, and fixes what can be fixed safely.

What libpq accepts is read as libpq reads it. If libpq would reject or misread a text, and exactly
one other reading makes sense, that one is used, and reported. Anything else is an error.

pasted/text.py finds URLs in a text, pasted/url.py splits one, and pasted/parts.py reads the formats
with separate settings. This module makes a DatabaseUrl of the result: checked and complete.
"""

import dataclasses
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from postgres.pasted.parts import find_settings
from postgres.pasted.text import NAMES, Found, clean, explain, find_urls, unwrap
from postgres.pasted.url import (
    FOREIGN,
    KEYWORDS,
    MODES,
    NEON_ENDPOINT,
    PLACEHOLDER,
    DatabaseUrlError,
    read_url,
    refusal,
    refuse_placeholders,
    rough_parts,
)

__all__ = ["PLACEHOLDER", "DatabaseUrl", "DatabaseUrlError", "Reading", "parse", "read"]

EMBEDDED_USER = "embedded"  # marks the project's own server
EMBEDDED_HOST = "127.0.0.1"

HOST_PATTERN = re.compile(r"(?ai)[a-z\d_](?:[\w.-]*\w)?\.?|/[\w./~ -]*|[\da-f.]*:[\da-f:.]*")
# Neon's own domain, and the one that Vercel used for Neon's databases.
NEON_HOST = re.compile(r"(?ai)(?:[\w.-]+\.)?(?:neon\.tech|postgres\.vercel-storage\.com)\.?")
NEON_BEGINNING = re.compile(
    rf"(?ai)ep-[a-z]+-[a-z\d-]*|{NEON_ENDPOINT}(?:\.c-\d+)?(?:\.[a-z\d-]*(?P<end>\..*)?)?"
)


def encode(text: str) -> str:
    return quote(text, safe="")


@dataclass(frozen=True)
class DatabaseUrl:
    """A connection string, split into its parts. str() and repr() show no secrets.

    host: a name, an address, or the directory of a Unix socket. options: libpq's other parameters.
    """

    user: str
    password: str = field(repr=False)
    host: str
    port: int
    database: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        shown = ((name, "" if name == "sslpassword" else value) for name, value in self.options)
        return self._write("***" if self.password else "", shown)

    def __repr__(self) -> str:
        return f"<DatabaseUrl {self}>"

    def replace(self, **changes: Any) -> "DatabaseUrl":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def for_libpq(self) -> str:
        """Return the URL with its password, for psycopg2, psql and pg_dump."""
        return self._write(encode(self.password), self.options)

    def for_sqlalchemy(self, driver: str = "psycopg2") -> str:
        """Return the URL with its password and driver: SQLAlchemy's default driver may change."""
        return self.for_libpq().replace("postgresql", f"postgresql+{driver}", 1)

    def _write(self, password: str, options: Iterable[tuple[str, str]]) -> str:
        login = encode(self.user) + (f":{password}" if password else "")
        address = self.address
        if self.host.startswith("/"):  # SQLAlchemy takes a Unix socket only as a parameter
            address = ""
            options = [("host", self.host), ("port", str(self.port)), *options]
        url = f"postgresql://{login}@{address}/{encode(self.database)}"
        query = "&".join(f"{name}={encode(value)}" for name, value in options)
        return f"{url}?{query}" if query else url

    @property
    def address(self) -> str:
        """Host and port, for messages."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_neon(self) -> bool:
        return NEON_HOST.fullmatch(self.host) is not None

    @property
    def is_pooled(self) -> bool:
        """Whether the host's name is that of a transaction pooler."""
        return self.host.partition(".")[0].lower().endswith("-pooler")

    @property
    def is_loopback(self) -> bool:
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_embedded(self) -> bool:
        """Whether this is the project's own server, which embedded.py starts."""
        return self.is_loopback and self.user == EMBEDDED_USER

    def is_same_database(self, other: "DatabaseUrl") -> bool:
        """Whether both URLs name the same database."""
        one, two = self.direct, other.direct
        return (one.host.lower(), one.port, one.database) == (
            two.host.lower(),
            two.port,
            two.database,
        )

    @property
    def direct(self) -> "DatabaseUrl":
        """The same database without the pooler: for migrations and dumps."""
        if not self.is_pooled:
            return self
        label, dot, domain = self.host.partition(".")
        return self.replace(host=label[: -len("-pooler")] + dot + domain)

    @property
    def pooled(self) -> "DatabaseUrl":
        """The same database through Neon's pooler. The same URL if it is not at Neon."""
        if not self.is_neon or self.is_pooled:
            return self
        label, dot, domain = self.host.partition(".")
        return self.replace(host=f"{label}-pooler{dot}{domain}")


@dataclass(frozen=True)
class Reading:
    """The URL that was read from a text, and a description of each change that was made."""

    url: DatabaseUrl
    changes: tuple[str, ...]


Outcome = Reading | DatabaseUrlError


def parse(text: str) -> DatabaseUrl:
    """Read a pasted text. Raises DatabaseUrlError."""
    return read(text).url


def read(text: str) -> Reading:
    """Read a pasted text, and say what was changed in it. Raises DatabaseUrlError."""
    changes: list[str] = []
    text = clean(text, changes)
    if not text:
        raise DatabaseUrlError(f"the text is empty: write {PLACEHOLDER}")
    bare = unwrap(text, changes)
    urls = find_urls(bare)
    outcome = choose(urls, bare) if urls else read_settings(bare)
    if urls and isinstance(outcome, DatabaseUrlError) and "$" in bare:
        # DATABASE_URL=postgresql://$PGUSER:…, and PGUSER=… in the same text
        settings = read_settings(bare)
        outcome = settings if isinstance(settings, Reading) else outcome
    if isinstance(outcome, DatabaseUrlError):
        raise outcome
    whole = "".join(line.strip() for line in bare.splitlines())
    if urls and whole not in {url.scheme + (url.joined or url.url) for url in urls}:
        changes.append("ignored the text around the connection string")
    return Reading(outcome.url, (*changes, *outcome.changes))


def choose(urls: list[Found], text: str) -> Outcome:
    """Read the URL that is meant for applications. Others may lead to the same database."""
    ranked = sorted(urls, key=lambda found: found.rank)
    if ranked[0].name == "DATABASE_URL":
        ranked = [found for found in ranked if found.name == "DATABASE_URL"]
    outcomes = [(found, attempt(found, text)) for found in ranked]
    readings = [(found, outcome) for found, outcome in outcomes if isinstance(outcome, Reading)]
    if not readings:
        return outcomes[0][1]
    if len({reading.url.direct.replace(options=()) for _, reading in readings}) > 1:
        return DatabaseUrlError("the text contains several connection strings: paste only one")
    equals = [(found, reading) for found, reading in readings if found.rank == readings[0][0].rank]
    found, reading = min(equals, key=lambda pair: not pair[1].url.is_pooled)
    if len({other.url for other in urls}) == 1:
        return reading
    name = found.name if found.name in NAMES else "one"
    change = f"took {name} of {len(urls)} connection strings"
    return Reading(reading.url, (change, *reading.changes))


def attempt(found: Found, text: str) -> Outcome:
    """Read a URL alone, and joined with the lines after it."""
    alone = attempt_url(found, found.url, text)
    if not found.joined:
        return alone
    more = found.joined.removeprefix(found.url)
    joined = attempt_url(found, found.joined, text)
    if isinstance(joined, Reading):
        if isinstance(alone, Reading) and alone.url == joined.url:
            return alone
        if isinstance(alone, DatabaseUrlError) or re.search("[@/?&=]", found.url[-1] + more):
            return Reading(joined.url, ("joined the lines of the string", *joined.changes))
    elif isinstance(alone, DatabaseUrlError) or "@" not in more:
        return alone
    return DatabaseUrlError("the text has more lines: paste only the connection string")


def attempt_url(found: Found, url: str, text: str) -> Outcome:
    changes: list[str] = []
    try:
        if found.broken:
            raise refusal({}, found.broken, "this contains a space: write it as %20")
        settings = read_url(url, changes)
        if not (settings["user"] and settings["password"]):
            borrow(settings, text.replace(url, ""), changes)
        if found.scheme_change:
            changes.append(found.scheme_change)
        return Reading(assemble(settings, changes), tuple(changes))
    except DatabaseUrlError as error:
        return error


def borrow(settings: dict[str, str], text: str, changes: list[str]) -> None:
    """Fill in a user or password from outside the URL, as in `PGPASSWORD=… psql URL`."""
    try:
        others = find_settings(text, []) or {}
    except DatabaseUrlError:
        return
    for name in ("user", "password"):
        if others.get(name) and not settings[name]:
            settings[name] = others[name]
            changes.append(f"took the {name} from next to the connection string")


def read_settings(text: str) -> Outcome:
    """Read a text with separate settings, such as PGHOST=… PGUSER=…."""
    changes: list[str] = []
    try:
        settings = find_settings(text, changes)
        if not settings:
            return DatabaseUrlError(explain(text))
        refuse_placeholders(settings)
        return Reading(assemble(settings, changes), tuple(changes))
    except DatabaseUrlError as error:
        return error


def assemble(settings: Mapping[str, str], changes: list[str]) -> DatabaseUrl:
    """Check libpq's keywords, and fill in what is missing. Raises DatabaseUrlError."""
    own = {name: settings.get(name, "") for name in ("user", "password", "host", "port", "dbname")}
    user, password, host, port, database = own.values()
    if "," in host + port:
        raise refusal(own, "host", "there are several hosts: write only the primary")
    if not HOST_PATTERN.fullmatch(host):
        raise refusal(own, "host", f"the host is missing or invalid: write {PLACEHOLDER}")
    if not user:
        raise refusal(own, "user", f"the user is missing: write {PLACEHOLDER}")
    port = port or "5432"
    if not re.fullmatch(r"(?a)\d{1,5}", port) or not 0 < int(port) < 65536:
        raise refusal(own, "port", "the port is not a number from 1 to 65535: write HOST:5432")
    url = DatabaseUrl(user, password, host, int(port), database)
    if is_cut_off(url):
        raise refusal(own, "host", "the host is cut off: Neon's hosts end in .neon.tech")
    if url.is_neon and not password:
        raise refusal(
            own,
            "password",
            "the password is missing: show it, then copy the string again",
        )
    if not database:
        # libpq's default is the user's name; Neon's first database has another one.
        url = url.replace(database="neondb" if url.is_neon else user)
        changes.append("added the missing database name")
    refuse_placeholders(rough_parts(url.for_libpq().partition("://")[2]))  # it will be parsed again
    options = {name: value for name, value in settings.items() if name in KEYWORDS - own.keys()}
    if refused := settings.keys() - KEYWORDS:
        names = sorted(refused & FOREIGN)
        if refused - FOREIGN:
            names.append("unknown names")
        changes.append(f"removed parameters that libpq rejects: {', '.join(names)}")
    set_modes(options, own, changes)
    if url.is_neon:
        set_tls(options, changes)
    return url.replace(options=tuple(item for item in options.items() if item[1]))


def is_cut_off(url: DatabaseUrl) -> bool:
    """Whether a Neon host was not copied completely."""
    beginning = NEON_BEGINNING.fullmatch(url.host)
    if not beginning or url.is_neon:
        return False
    end = beginning["end"] or ""
    return any(domain.startswith(end) for domain in (".aws.neon.tech", ".azure.neon.tech"))


def set_modes(options: dict[str, str], own: Mapping[str, str], changes: list[str]) -> None:
    """Check sslmode and channel_binding, which libpq checks only when it connects."""
    for name, modes in MODES.items():
        if not (given := options.get(name)):
            continue
        word = re.sub(r"[\W_]", "", given).lower()
        mode = next((mode for mode, words in modes.items() if word in words.split()), None)
        if mode is None:
            known = ", ".join(modes)
            raise refusal(own, name, f"unknown {name}, perhaps cut off: write one of {known}")
        if mode != given:
            changes.append(f"wrote {name}={mode}, as libpq spells it")
        options[name] = mode


def set_tls(options: dict[str, str], changes: list[str]) -> None:
    """Never connect to Neon without TLS."""
    if options.get("sslmode") not in {"require", "verify-ca", "verify-full"}:
        # libpq accepts the system's certificates only with verify-full.
        strict = options.get("sslrootcert") == "system"
        options["sslmode"] = "verify-full" if strict else "require"
        changes.append(f"set sslmode={options['sslmode']}, since Neon requires TLS")
