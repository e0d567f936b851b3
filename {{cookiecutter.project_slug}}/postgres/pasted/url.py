"""Splits a pasted PostgreSQL URL into its parts, and shows which part is wrong.

In a damaged string, a piece of the password may be anywhere: after a raw "@" it looks like a host.
So messages show the names of the parts in place of their values. They quote only hosts of a known
form, plain user and database names next to such a host, and words from the lists in these modules.
"""

import re
from collections.abc import Collection, Mapping
from urllib.parse import unquote, unquote_to_bytes

PLACEHOLDER = "postgresql://USER:PASSWORD@HOST/DATABASE"
MAX_URL_LENGTH = 8_000

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
# Other clients' names for them, without "_" and spaces, in lower case.
SPELLINGS = {keyword.replace("_", ""): keyword for keyword in KEYWORDS} | {
    "appname": "application_name",
    "database": "dbname",
    "databasename": "dbname",
    "datasource": "host",
    "db": "dbname",
    "hostname": "host",
    "pass": "password",
    "passwd": "password",
    "pw": "password",
    "pwd": "password",
    "requiressl": "sslmode",
    "server": "host",
    "ssl": "sslmode",
    "userid": "user",
    "username": "user",
}
# Other clients' parameters that libpq does not know. Messages may name these.
FOREIGN = frozenset(
    """
    TimeZone connection_limit currentSchema max_conns pgbouncer pool pool_mode pool_size
    pool_timeout prepareThreshold schema search_path socket_timeout sslaccept statement_cache_size
    timeout uselibpqcompat
    """.split()  # noqa: SIM905
)
# Parameters with a fixed set of values, each with its spellings: no "-" or "_", lower case.
MODES: dict[str, dict[str, str]] = {
    "sslmode": {
        "disable": "disable disabled false 0 off",
        "allow": "allow",
        "prefer": "prefer preferred",
        "require": "require required true 1 on noverify",
        "verify-ca": "verifyca",
        "verify-full": "verifyfull",
    },
    "channel_binding": {
        "disable": "disable disabled",
        "prefer": "prefer preferred",
        "require": "require required",
    },
}

# Hosts that cannot be mistaken for a password.
NEON_ENDPOINT = r"ep-[a-z]+-[a-z]+-[a-z\d]{6,}(?:-pooler)?"
KNOWN_HOST = re.compile(rf"(?ai){NEON_ENDPOINT}(?:\.[a-z\d-]*)*|localhost|127\.0\.0\.1|\[::1\]|::1")
PLAIN_NAME = re.compile(r"(?a)[\w.-]{1,63}")
# What follows "USER:PASSWORD@": hosts with their ports, the database, parameters.
NODE = r"(?:[\w.-]*|\[[\da-fA-F:.]+\]|%2[Ff][\w.%~-]*)(?::\d*)?"
PLACE = re.compile(rf"(?a)({NODE}(?:,{NODE})*)(?:/([^?]*))?(?:\?(.*))?")

# Placeholders in place of a value. A real password that looks like one must be percent-encoded.
PLACEHOLDER_VALUE = re.compile(  # <host>, [password], {user}, ${PGUSER}, $PGPASSWORD, %DB_USER%
    r"(?ai)<[^>]*>|\[[a-z][\w -]*\]|\$?\{[^}]*\}+|(?-i:\$[A-Z_][A-Z\d_]*)|\$\w{0,20}pass\w{0,20}"
    r"|%[a-z]+_[a-z_]+%|(?:os\.environ|os\.getenv|process\.env|getenv\(|env\().*"
)
PLACEHOLDER_NAME = re.compile(
    r"(?ai)x{4,}|\.{3,}|(?-i:PASSWORD)|your[-_]?(?:user|role|pass|host|endpoint)[\w-]*"
)
PLACEHOLDER_HOST = re.compile(  # including the example in Neon's documentation
    r"(?ai)host(?:name)?|ep-cool-darkness-(?:123456|a1b2c3d4)(?!\w).*"
)
MASK = re.compile("[*\u2022\u25cf\xb7]{3,}|\u2026")  # •, ●, · and …

ENCODE = 'write "@" in the password as %40, "/" as %2F'


class DatabaseUrlError(ValueError):
    """What is wrong with a text, and what to write: one line, without any part of a secret."""


def canonical(name: str) -> str:
    """Return libpq's keyword for any client's name of it, and other names unchanged."""
    return SPELLINGS.get(re.sub(r"[\W_]", "", name).lower(), name)


def refusal(settings: Mapping[str, str], faults: str, why: str) -> DatabaseUrlError:
    """Return an error that shows where the fault is. faults: names of parts, as in show()."""
    return DatabaseUrlError(f"{show(settings, faults.split())}: {why}")


def show(settings: Mapping[str, str], faults: Collection[str]) -> str:
    """Return a URL with the names of its parts, the faulty ones in [brackets].

    settings: its known parts, by libpq's keyword. faults: keywords, "login" (user and password),
    "place" (host and database) or "query".
    """

    def part(name: str, text: str) -> str:
        return f"[{text}]" if name in faults else text

    user, host, database = "USER", settings.get("host", ""), "DATABASE"
    if KNOWN_HOST.fullmatch(host):
        # Without a password, the user may be the password.
        if settings.get("password") and PLAIN_NAME.fullmatch(settings.get("user", "")):
            user = settings["user"]
        if PLAIN_NAME.fullmatch(settings.get("dbname", "")):
            database = settings["dbname"]
    else:
        host = "HOST"
    login = part("login", f"{part('user', user)}:{part('password', '***')}")
    port = ":[PORT]" if "port" in faults else ""
    place = part("place", f"{part('host', host)}{port}/{part('dbname', database)}")
    url = f"postgresql://{login}@{place}"
    if "query" in faults:
        return f"{url}?[…]"
    query = "&".join(f"{name}=[…]" for name in MODES if name in faults)
    return f"{url}?{query}" if query else url


def read_url(text: str, changes: list[str]) -> dict[str, str]:
    """Read what follows "postgresql://". Returns values by libpq's keyword, and by unknown names.

    Raises DatabaseUrlError.
    """
    if len(text) > MAX_URL_LENGTH:
        raise DatabaseUrlError("the connection string is too long: copy it again")
    text = unescape(text, changes)
    refuse_placeholders(rough_parts(text), sure=text.count("@") == 1)
    login, place = split_login(text, changes)
    nodes, database, query = place.groups(default="")
    user, colon, password = login.partition(":")
    host, _, port = nodes.partition("]:" if nodes.startswith("[") else ":")
    parts = {"user": user, "password": password, "host": host.strip("[]"), "port": port}
    parts["dbname"] = database.rstrip("/")
    if database.endswith("/"):
        changes.append('removed the "/" after the database')
    if "/" in user or ("@" in user and not colon):
        raise refusal(parts, "login", f"this is not USER:PASSWORD: {ENCODE}")
    settings = parts | split_query(query, changes)
    return {name: decode(value, name, parts, changes) for name, value in settings.items()}


def unescape(text: str, changes: list[str]) -> str:
    r"""Unescape HTML's "&amp;", JSON's "\u0026" and the shell's "\&" in the parameters."""
    login, end, place = text.rpartition("@")
    address, mark, query = place.partition("?")
    plain = re.sub(r"\\u0026|\\&|&amp;", "&", query).replace(r"\=", "=")
    if mark and address.endswith("\\"):
        address = address[:-1]
    if address + mark + plain != place:
        changes.append('unescaped "&", "?" and "="')
    return login + end + address + mark + plain


def rough_parts(text: str) -> dict[str, str]:
    """Split a URL that may have placeholders, whose brackets do not match PLACE."""
    login, _, place = text.partition("?")[0].rpartition("@")
    user, _, password = login.partition(":")
    address, _, database = place.partition("/")
    host = address.partition(":")[0]
    return {"user": user, "password": password, "host": host, "dbname": database}


def refuse_placeholders(settings: Mapping[str, str], *, sure: bool = True) -> None:
    """Raise DatabaseUrlError if a part is a placeholder or masked.

    sure: whether the text was certainly split at the right places, so that parts may be shown.
    """
    parts = {name: settings.get(name, "") for name in ("user", "password", "host", "dbname")}
    shown = parts if sure else {}
    placeholders = [
        name
        for name, text in parts.items()
        if PLACEHOLDER_VALUE.fullmatch(text)
        or (name != "dbname" and PLACEHOLDER_NAME.fullmatch(text))
        or (name == "host" and PLACEHOLDER_HOST.fullmatch(text))
    ]
    if placeholders:
        raise refusal(
            shown,
            " ".join(placeholders),
            "this is a placeholder: type `uv run manage.py env` and paste your own string; "
            "if it is your real password, percent-encode it",
        )
    if masked := [name for name, text in parts.items() if MASK.search(text)]:
        raise refusal(shown, " ".join(masked), "this is masked: show it, then copy it again")


def split_login(text: str, changes: list[str]) -> tuple[str, re.Match[str]]:
    """Split "user:password@host:port/database?query" at the right "@". Raises DatabaseUrlError.

    libpq splits at the first "@", unless there is a "/" before it. If that makes no sense, the
    password contains "@" or "/", and splitting must make sense at exactly one other "@".
    """
    ends = [index for index, character in enumerate(text) if character == "@"]
    usual = ends[0] if ends and "/" not in text[: ends[0]] else -1
    theirs, login = PLACE.fullmatch(text, usual + 1), text[: max(usual, 0)]
    others = [place for end in ends if end != usual and (place := PLACE.fullmatch(text, end + 1))]
    others = [place for place in others if place[1] and "@" not in (place[2] or "")]
    if theirs and (not others or is_sound(login, theirs)):
        return login, theirs
    rivals = [theirs, *others] if theirs and is_complete(login, theirs) else others
    known = [place for place in rivals if KNOWN_HOST.fullmatch(place[1])]
    if len(known) == 1:
        rivals = known
    if len(rivals) > 1:
        raise refusal({}, "login", f"this is ambiguous: {ENCODE}")
    if not rivals and ends:
        raise refusal({}, "place", f"this is not HOST:PORT/DATABASE: copy it again, and {ENCODE}")
    if not rivals:
        raise DatabaseUrlError(
            f'postgresql://[…]: this has no "@" and may be cut off: copy all of {PLACEHOLDER}'
        )
    if rivals[0] is not theirs:
        changes.append("percent-encoded special characters in the password")
    return text[: max(rivals[0].start() - 1, 0)], rivals[0]


def is_complete(login: str, place: re.Match[str]) -> bool:
    """Whether a reading has a host and a user."""
    names = names_of(place[3])
    return bool((place[1] or "host" in names) and (login.strip(":") or "user" in names))


def is_sound(login: str, place: re.Match[str]) -> bool:
    """Whether a reading is beyond doubt."""
    names = names_of(place[3])
    return is_complete(login, place) and names <= KEYWORDS and "@" not in (place[2] or "")


def names_of(query: str | None) -> set[str]:
    pairs = filter(None, (query or "").split("&"))
    return {canonical(unquote(pair.partition("=")[0])) for pair in pairs}


def split_query(query: str, changes: list[str]) -> dict[str, str]:
    """Split "a=1&b=2". If a name is repeated, the last value counts."""
    settings = {}
    for pair in filter(None, query.split("&")):
        written, equals, value = pair.partition("=")
        name = unquote(written)
        keyword = canonical(name) if equals else f"{name}="  # not a keyword
        if equals and keyword != name:
            changes.append(f"wrote {keyword}, as libpq calls it")
        settings[keyword] = value
    return settings


def decode(text: str, name: str, parts: Mapping[str, str], changes: list[str]) -> str:
    """Decode codes such as %40. A text without any code was not encoded."""
    fault = name if name in parts else "query"
    if re.search(r"%(?![\da-fA-F]{2})", text):
        if re.search(r"%[\da-fA-F]{2}", text):
            raise refusal(parts, fault, 'a "%" here does not start a code: write "%" itself as %25')
        changes.append(f'wrote "%" in the {fault.replace("dbname", "database")} as %25')
        return text
    decoded = unquote_to_bytes(text).decode("utf-8", "surrogateescape")
    if re.search("[\0\ud800-\udfff]", decoded):
        raise refusal(parts, fault, "this is not text: percent-encode it as UTF-8")
    return decoded
