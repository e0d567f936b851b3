"""Reads the connection strings that people paste, and mends what can be mended safely.

What libpq accepts is understood as libpq understands it. Where libpq would refuse a text, or
misread it, and one other reading makes sense, that one is taken and told. Anything else is refused.

A damaged text may hold a piece of the password anywhere. So messages quote a host that has proved
to be one, and words of the lists below; nothing else.

Standard library only, for Python 3.10 on: the generator's hook runs this file too.
"""

import dataclasses
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote_to_bytes

EMBEDDED_USER = "embedded"  # marks the project's own server
PLACEHOLDER = "postgresql://USER:PASSWORD@HOST/DATABASE"

# https://www.postgresql.org/docs/17/libpq-connect.html#LIBPQ-PARAMKEYWORDS
KEYWORDS = frozenset(
    """
    application_name channel_binding client_encoding connect_timeout dbname
    fallback_application_name gssdelegation gssencmode gsslib host hostaddr keepalives
    keepalives_count keepalives_idle keepalives_interval krbsrvname load_balance_hosts options
    passfile password port replication require_auth requirepeer service ssl_max_protocol_version
    ssl_min_protocol_version sslcert sslcertmode sslcompression sslcrl sslcrldir sslkey sslmode
    sslnegotiation sslpassword sslrootcert sslsni target_session_attrs tcp_user_timeout user
    """.split()  # noqa: SIM905  (as a list it takes forty lines)
)
# What other clients put into a URL: dropped like all that libpq does not know, but by name.
FOREIGN = {"connection_limit", "max_conns", "pgbouncer", "pool", "pool_size", "pool_timeout"}
FOREIGN |= {"schema", "search_path", "socket_timeout", "statement_cache_size", "timeout"}
# How Java, Node and asyncpg spell libpq's keywords and modes.
ALIASES = {"channelBinding": "channel_binding", "ssl": "sslmode"}
VARIABLES = {"appname": "application_name", "channelbinding": "channel_binding"}
VARIABLES |= {"database": "dbname"}
MODE_ALIASES = {"true": "require", "1": "require", "no-verify": "require", "false": "disable"}
MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

HOST = re.compile(r"(?ai)[a-z\d_](?:[\w.-]*\w)?\.?|/[\w./~ -]*|[\da-f.]*:[\da-f:.]*")
NEON_HOST = re.compile(r"(?ai)(?:[\w.-]+\.)?neon\.tech\.?")
NEON_ENDPOINT = re.compile(r"(?ai)ep-[a-z]+-[a-z]+-\w+(?:-pooler)?(?:\..*)?")

# "host=… user=…"; a value is in '…' or has no blanks, and a backslash makes any character plain.
KEYWORD_FORM = re.compile(rf"""(?s)(?:psql\s+)?(["']?)\s*((?:{"|".join(KEYWORDS)})\s*=.*)\1""")
KEYWORD_VALUE = re.compile(
    r"(?as)\s*(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s\\']|\\.)(?:[^\s\\]|\\.)*)?)(?=\s|$)"
)
# PGHOST=…, with what may stand around it, and lines that are not searched for a URL.
VARIABLE = re.compile(r"""(?a)(?<!\w)PG([A-Z_]+)[ \t]*=[ \t]*('[^']*'|"[^"]*"|\S*)""")
AROUND_VARIABLES = re.compile(r"(?i)(?:\s|;|export\s|set\s|\$env:|#.*)*")
NOT_A_URL = re.compile(r"(?i)\s*(?:(?:export\s+|set\s+|\$env:)?PG[A-Z_]+[ \t]*=|#)")
URL = re.compile(
    r"""(?aix)
    (?<![\w+.-])(?:(?P<name>\w+)["']?[ \t]*[=:][ \t]*["'`]?)?
    (?P<scheme>(?P<ours>(?:postgres|postgresql|psql|pgsql)(?:\+\w+)?)|[a-z][a-z\d+.-]*)
    ://(?P<rest>\S*)(?P<after>.*)"""
)
# What follows the log-in: hosts with their ports, the database, parameters.
NODE = r"(?:[\w.-]*|\[[\da-fA-F:.]+\]|%2[Ff][\w.%~-]*)(?::\d*)?"
PLACE = re.compile(rf"(?a)({NODE}(?:,{NODE})*)(?:/([^@?]*))?(?:\?(.*))?")
# Parts that only stand for something: <host>, [password], $PGPASSWORD, your-password, xxxx. A real
# password with such brackets, dollars or asterisks is taken when they are percent-encoded.
STAND_IN = re.compile(
    r"""(?aix)
    [:@](?:<[^>]*>|\[[a-z][\w\ -]*\]|\{[^}]*\}|\$\{?\w+\}?|x{4,}|\.{3,}|(?-i:PASSWORD)
        |your[-_]?(?:user|role|pass|host|endpoint)[\w-]*)(?=[:@/?]|$)
    |@host(?:name)?(?=[:/?@]|$)
    |@ep-cool-darkness-123456"""  # the example of Neon's documentation
)
MASK = re.compile(r"[*•●·]{3,}|…")


class DatabaseUrlError(ValueError):
    """What is wrong, and what to write: one line, without any part of a secret."""


@dataclass(frozen=True)
class DatabaseUrl:
    """A connection string taken apart. str() and repr() show no secret.

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
        """Return a copy with other fields."""
        return dataclasses.replace(self, **changes)

    def for_libpq(self) -> str:
        """Return the URL with its password, for psycopg2, psql and pg_dump."""
        return self._write(encode(self.password), self.options)

    def for_sqlalchemy(self) -> str:
        """Return the URL with its password and its driver: SQLAlchemy's choice of one changes."""
        return self.for_libpq().replace("postgresql", "postgresql+psycopg2", 1)

    def _write(self, password: str, options: Iterable[tuple[str, str]]) -> str:
        login = encode(self.user) + (f":{password}" if password else "")
        address = self.address
        if self.host.startswith("/"):  # SQLAlchemy knows a socket as a parameter only
            address = ""
            options = [("host", self.host), ("port", str(self.port)), *options]
        query = "&".join(f"{name}={encode(value)}" for name, value in options)
        return f"postgresql://{login}@{address}/{encode(self.database)}{query and '?'}{query}"

    @property
    def address(self) -> str:
        """Host and port, to be shown."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_neon(self) -> bool:
        return NEON_HOST.fullmatch(self.host) is not None

    @property
    def is_pooled(self) -> bool:
        """Whether a transaction pooler is in between, as far as the host's name tells."""
        return self.host.partition(".")[0].endswith("-pooler")

    @property
    def is_loopback(self) -> bool:
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_embedded(self) -> bool:
        """Whether this is the project's own server, which local_postgres.py starts."""
        return self.is_loopback and self.user == EMBEDDED_USER

    @property
    def direct(self) -> "DatabaseUrl":
        """The same database without the pooler: for migrations and dumps."""
        label, dot, domain = self.host.partition(".")
        return self.replace(host=label.removesuffix("-pooler") + dot + domain)

    @property
    def pooled(self) -> "DatabaseUrl":
        """The same database through Neon's pooler; elsewhere, the same URL."""
        if not self.is_neon or self.is_pooled:
            return self
        label, dot, domain = self.host.partition(".")
        return self.replace(host=f"{label}-pooler{dot}{domain}")


@dataclass(frozen=True)
class Reading:
    """What a text was understood as, and a sentence for each thing that was mended."""

    url: DatabaseUrl
    changes: tuple[str, ...]


def parse(text: str) -> DatabaseUrl:
    """Understand a pasted text. Raises DatabaseUrlError."""
    return read(text).url


def read(text: str) -> Reading:
    """Understand a pasted text, and tell what was mended. Raises DatabaseUrlError."""
    changes: list[str] = []
    text = text.strip().strip("\ufeff\u200b").strip()  # also the marks that web pages leave
    if not text:
        raise DatabaseUrlError(f"the text is empty: write {PLACEHOLDER}")
    if not all(character.isprintable() or character.isspace() for character in text):
        raise DatabaseUrlError("the text holds invisible characters: copy it again")
    if match := KEYWORD_FORM.fullmatch(text):
        settings = read_keywords(match[2])
    elif url := find_url(text, changes):
        settings = read_url(url, changes)
    elif VARIABLE.search(text):
        settings = read_variables(text)
        changes.append("put the PG… variables together")
    else:
        raise DatabaseUrlError(f"the text is no connection string: write {PLACEHOLDER}")
    return Reading(assemble(settings, changes), tuple(changes))


def read_keywords(text: str) -> dict[str, str]:
    """Read libpq's other form, "host=… user=…"."""
    settings: dict[str, str] = {}
    text = text.rstrip()
    end = 0
    while end < len(text):
        match = KEYWORD_VALUE.match(text, end)
        if not match or match[1] not in KEYWORDS:
            raise DatabaseUrlError(
                "the text is not all KEYWORD=VALUE: put a value with blanks in '…', and \\ before '"
            )
        settings[match[1]] = re.sub(r"(?s)\\(.)", r"\1", match[2] or match[3] or "")
        end = match.end()
    refuse_stand_ins(*(settings.get(name, "") for name in ("user", "password", "host")))
    return settings


def read_variables(text: str) -> dict[str, str]:
    """Read PGHOST=… and the like: on lines of their own, or on one line."""
    if not AROUND_VARIABLES.fullmatch(VARIABLE.sub("", text)):
        raise DatabaseUrlError("the text is not all PG…=VALUE: put a value with blanks in '…'")
    settings = {}
    for variable, value in VARIABLE.findall(text):
        name = variable.lower()
        settings[VARIABLES.get(name, name)] = value[1:-1] if value[:1] in {"'", '"'} else value
    refuse_stand_ins(*(settings.get(name, "") for name in ("user", "password", "host")))
    return settings


def find_url(text: str, changes: list[str]) -> str | None:
    """Take a PostgreSQL URL out of quotes, shell commands and settings. None: there is no URL."""
    lines = [line for line in text.splitlines() if not NOT_A_URL.match(line)]
    found = [match for line in lines if (match := URL.search(line))]
    ours = [match for match in found if match["ours"]]
    if found and not ours:
        raise DatabaseUrlError(explain_scheme(found[0]["scheme"].lower()))
    if len(ours) > 1:
        ours = [match for match in ours if match["name"] == "DATABASE_URL"]
        if len(ours) != 1:
            raise DatabaseUrlError("the text holds several connection strings: write one of them")
    if not ours:
        return None
    scheme, rest = ours[0]["scheme"], ours[0]["rest"].rstrip("'\"`>;,)\u2019\u201d")
    if "@" in ours[0]["after"]:
        raise DatabaseUrlError("the connection string holds a blank: write it as %20")
    if f"{scheme}://{rest}" != text:
        changes.append("took the connection string out of the text around it")
    if scheme != "postgresql":
        changes.append(f'wrote "postgresql://" for "{scheme}://"')
    return rest


def explain_scheme(scheme: str) -> str:
    if scheme in {"http", "https"}:
        return (
            "the text is the address of a web page: choose Connect on that page, "
            "and copy the string that starts with postgresql://"
        )
    others = ("mysql", "mariadb", "sqlite", "mongodb", "redis", "prisma")
    other = next((f"{name}://" for name in others if scheme.startswith(name)), "another scheme")
    return f"the text starts with {other}: write {PLACEHOLDER}"


def read_url(text: str, changes: list[str]) -> dict[str, str]:
    """Take apart and decode what stands after "postgresql://"."""
    refuse_stand_ins(text)
    login, place = split_login(text, changes)
    nodes, database, query = place.groups(default="")
    user, _, password = login.partition(":")
    host, _, port = nodes.partition("]:" if nodes.startswith("[") else ":")
    parts = {"user": user, "password": password, "host": host.strip("[]"), "port": port}
    parts |= {"dbname": database, **split_query(query)}
    return {name: decode(value, name, changes) for name, value in parts.items()}


def split_login(text: str, changes: list[str]) -> tuple[str, re.Match[str]]:
    """Tell "user:password" from "host:port/database?query". Raises DatabaseUrlError.

    For libpq the log-in ends at the first "@", unless a "/" comes before it. Where this makes no
    sense, the password holds an "@" or "/" itself, and just one other "@" must make sense.
    """
    ends = [index for index, character in enumerate(text) if character == "@"]
    usual = ends[0] if ends and "/" not in text[: ends[0]] else -1
    places = {end: place for end in (usual, *ends) if (place := PLACE.fullmatch(text, end + 1))}
    if usual in places and split_query(places[usual][3]).keys() <= KEYWORDS | {"ssl"}:
        places = {usual: places[usual]}
    if len(places) > 1:
        raise DatabaseUrlError(
            'the text can be read in several ways: write "@" in the password as %40, "/" as %2F'
        )
    if not places:
        raise DatabaseUrlError(
            'what follows the "@" is not HOST:PORT/DATABASE: copy the string again, '
            'and write "@" in the password as %40, "/" as %2F'
            if ends
            else f'the text has no "@", perhaps it is cut off: copy all of {PLACEHOLDER}'
        )
    ((end, place),) = places.items()
    if end != usual:
        changes.append("percent-encoded the special characters of the password")
    return text[: max(end, 0)], place


def split_query(query: str | None) -> dict[str, str]:
    """Split "a=1&b=2". The last of several values counts."""
    pairs = (pair.partition("=") for pair in (query or "").split("&"))
    return {name: value for name, _, value in pairs if name}


def refuse_stand_ins(*parts: str) -> None:
    if any(STAND_IN.search(f"@{part}") for part in parts):
        raise DatabaseUrlError(
            "the text still holds a placeholder: type `uv run manage.py env` and paste your own "
            "connection string, with special characters of the password percent-encoded"
        )
    if any(MASK.search(part) for part in parts):
        raise DatabaseUrlError("the password is masked: choose to show it, and copy again")


def decode(text: str, name: str, changes: list[str]) -> str:
    """Decode %40 and the like. A text without any such code was never encoded."""
    place = {"dbname": "database"}.get(name, name if name in KEYWORDS else "query")
    if re.search(r"%(?![\da-fA-F]{2})", text):
        if re.search(r"%[\da-fA-F]{2}", text):
            raise DatabaseUrlError(f'a "%" in the {place} starts no code: write "%" itself as %25')
        changes.append(f'wrote "%" in the {place} as %25')
        return text
    decoded = unquote_to_bytes(text).decode("utf-8", "surrogateescape")
    if re.search("[\0\ud800-\udfff]", decoded):
        raise DatabaseUrlError(f"the {place} is not text: write it percent-encoded, as UTF-8")
    return decoded


def encode(text: str) -> str:
    return quote(text, safe="")


def assemble(settings: dict[str, str], changes: list[str]) -> DatabaseUrl:
    """Check libpq's keywords, and fill in what is missing. Raises DatabaseUrlError."""
    own = {name: settings.get(name, "") for name in ("user", "password", "host", "port", "dbname")}
    user, password, host, port, database = own.values()
    options = {name: value for name, value in settings.items() if name not in own}
    if "," in host + port:
        raise DatabaseUrlError("the text names several hosts: write the one that takes writes")
    if not HOST.fullmatch(host):
        raise DatabaseUrlError(f"the host is missing, or not a host name: write {PLACEHOLDER}")
    if not user:
        raise DatabaseUrlError(f"the user is missing: write {PLACEHOLDER}")
    port = port or "5432"
    if not re.fullmatch(r"(?a)\d{1,5}", port) or not 0 < int(port) < 65536:
        raise DatabaseUrlError("the port is not a number from 1 to 65535: write HOST:5432")
    url = DatabaseUrl(user, password, host, int(port), database)
    refuse_stand_ins(url.for_libpq().removeprefix("postgresql://"))  # it will be read again
    if NEON_ENDPOINT.fullmatch(host) and not url.is_neon:
        raise DatabaseUrlError(f'the host "{host}" is cut off: those of Neon end in .neon.tech')
    if url.is_neon and not password:
        raise DatabaseUrlError("the password is missing: choose to show it, and copy again")
    if not database:
        # libpq takes the user's name. Neon's projects start with another one.
        url = url.replace(database="neondb" if url.is_neon else user)
        changes.append("added the database, which was missing")
    translate(options, changes)
    set_tls(options, changes, is_neon=url.is_neon)
    return url.replace(options=tuple(item for item in options.items() if item[1]))


def translate(options: dict[str, str], changes: list[str]) -> None:
    """Write the parameters of other clients as libpq's, and drop those that libpq refuses."""
    for foreign, keyword in ALIASES.items():
        if foreign in options:
            options.setdefault(keyword, options.pop(foreign))
            changes.append(f'wrote "{foreign}" as "{keyword}"')
    if refused := options.keys() - KEYWORDS:
        names = [*sorted(refused & FOREIGN), *(["unknown ones"] if refused - FOREIGN else [])]
        changes.append(f"dropped parameters that libpq refuses: {', '.join(names)}")
        for name in refused:
            del options[name]


def set_tls(options: dict[str, str], changes: list[str], *, is_neon: bool) -> None:
    """Check sslmode. Nothing goes to Neon without TLS."""
    if given := options.get("sslmode"):
        options["sslmode"] = MODE_ALIASES.get(given, given)
        if options["sslmode"] not in MODES:
            raise DatabaseUrlError(f"the sslmode is unknown: write one of {', '.join(MODES)}")
    if is_neon and options.get("sslmode") not in {"require", "verify-ca", "verify-full"}:
        # libpq takes the system's certificates only together with the full check.
        strict = options.get("sslrootcert") == "system"
        options["sslmode"] = "verify-full" if strict else "require"
        changes.append(f"set sslmode={options['sslmode']}, as Neon wants it")
