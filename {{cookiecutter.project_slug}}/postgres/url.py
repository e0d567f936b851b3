"""Parses the connection strings that people paste: what is certain is read, the rest is refused.

pasted/text.py finds the connection in a text, pasted/url.py reads a URL, and pasted/parts.py reads
the formats with separate settings. This module makes a DatabaseUrl of the result.
"""

import dataclasses
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from postgres.pasted.text import read_text
from postgres.pasted.url import HOST_AND_PORT, PASTE, PLACEHOLDER, DatabaseUrlError

__all__ = ["PLACEHOLDER", "DatabaseUrl", "DatabaseUrlError", "Reading", "parse", "read"]

EMBEDDED_USER = "embedded"  # marks the project's own server
EMBEDDED_HOST = "127.0.0.1"

HOST_PATTERN = re.compile(r"(?ai)[a-z\d_](?:[\w.-]*\w)?\.?|/[\w./~ :@+-]*")
# Neon's own domain, and the one that Vercel used for Neon's databases.
NEON_HOST = re.compile(r"(?ai)(?:[\w.-]+\.)?(?:neon\.tech|postgres\.vercel-storage\.com)\.?")
OTHER_PORTS = {1433: "SQL Server", 1521: "Oracle", 3306: "MySQL", 33060: "MySQL"}


def encode(text: str) -> str:
    return quote(text, safe="")


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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
        host = f"[{self.host}]" if ":" in self.host and is_address(self.host) else self.host
        return f"{host}:{self.port}"

    @property
    def is_neon(self) -> bool:
        return NEON_HOST.fullmatch(self.host) is not None

    @property
    def is_pooled(self) -> bool:
        """Whether the host's name is that of a transaction pooler."""
        return self.host.partition(".")[0].lower().endswith("-pooler")

    @property
    def is_loopback(self) -> bool:
        return self.host == "localhost" or (
            is_address(self.host) and ipaddress.ip_address(self.host).is_loopback
        )

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
        label = self.host.partition(".")[0]
        return self._rename(label, label[: -len("-pooler")])

    @property
    def pooled(self) -> "DatabaseUrl":
        """The same database through Neon's pooler. The same URL if it is not at Neon."""
        if not self.is_neon or self.is_pooled:
            return self
        label = self.host.partition(".")[0]
        return self._rename(label, f"{label}-pooler")

    def _rename(self, old: str, new: str) -> "DatabaseUrl":
        """Change the first label of the host, also where endpoint=… repeats it.

        Clients without SNI name it in the options, or at the start of the password.
        """
        named = re.compile(rf"(?i)(endpoint|project)(=|%(?:25)*3D){re.escape(old)}(?![\w-])")
        again = rf"\1\g<2>{new}"
        password = named.sub(again, self.password)
        options = tuple((name, named.sub(again, value)) for name, value in self.options)
        return self.replace(host=new + self.host[len(old) :], password=password, options=options)


@dataclass(frozen=True)
class Reading:
    """The URL that was read from a text, and a description of each change that was made."""

    url: DatabaseUrl
    changes: tuple[str, ...]


def parse(text: str) -> DatabaseUrl:
    """Read a pasted text. Raises DatabaseUrlError."""
    return read(text).url


def read(text: str) -> Reading:
    """Read a pasted text, and say what was changed in it. Raises DatabaseUrlError."""
    changes: list[str] = []
    settings = read_text(text, changes)
    return Reading(assemble(settings, changes), tuple(dict.fromkeys(changes)))


def assemble(settings: Mapping[str, str], changes: list[str]) -> DatabaseUrl:
    """Check libpq's keywords. Raises DatabaseUrlError."""
    own = {name: settings.get(name, "") for name in ("user", "password", "host", "port", "dbname")}
    user, password, host, port, database = own.values()
    host = host or settings.get("hostaddr", "")
    if re.fullmatch(r"[\w.-]+[:,]\d+", host):
        raise DatabaseUrlError(HOST_AND_PORT)
    for part, value in {"host": host, "user": user, "database": database}.items():
        if not value:
            raise DatabaseUrlError(f"the {part} is missing: {PASTE}")
    if "," in host:
        raise DatabaseUrlError(f"there are several hosts: {PASTE}, with the primary")
    if not (HOST_PATTERN.fullmatch(host) or is_address(host)):
        raise DatabaseUrlError(f"the host is not a name, an address or a socket: {PASTE}")
    port = port or "5432"
    if not re.fullmatch(r"(?a)\d{1,5}", port) or not 0 < int(port) < 65536:
        raise DatabaseUrlError("the port is not a number from 1 to 65535: write HOST:5432")
    if other := OTHER_PORTS.get(int(port)):
        raise DatabaseUrlError(f"the port is that of another database ({other}): {PASTE}")
    options = {name: value for name, value in settings.items() if name not in own and value}
    url = DatabaseUrl(user, password, host, int(port), database)
    if url.is_neon:
        if not password:
            raise DatabaseUrlError(f"the password is missing: {PASTE}")
        set_tls(options, changes)
    return url.replace(options=tuple(options.items()))


def set_tls(options: dict[str, str], changes: list[str]) -> None:
    """Never connect to Neon without TLS."""
    if options.get("sslmode") not in {"require", "verify-ca", "verify-full"}:
        # libpq accepts the system's certificates only with verify-full.
        strict = options.get("sslrootcert") == "system"
        options["sslmode"] = "verify-full" if strict else "require"
        changes.append(f"set sslmode={options['sslmode']}, since Neon requires TLS")
