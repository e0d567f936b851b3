"""Takes a pasted PostgreSQL URL apart, and shows where one is wrong.

A damaged string may hold a piece of the password anywhere: behind a raw "@" it looks like a host.
So messages show a string by the names of its parts. They quote a host that is known to be one, the
plain names beside such a host, and words of the lists in these modules; nothing else.
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
# What other clients call them, without "_", blanks and capitals.
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
# What other clients take besides: dropped like all that libpq does not know, but by name.
FOREIGN = frozenset(
    """
    TimeZone connection_limit currentSchema max_conns pgbouncer pool pool_mode pool_size
    pool_timeout prepareThreshold schema search_path socket_timeout sslaccept statement_cache_size
    timeout uselibpqcompat
    """.split()  # noqa: SIM905
)
# The parameters that have a few values each, in clients' spellings without "-", "_" and capitals.
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

# Hosts that no password looks like.
NEON_ENDPOINT = r"ep-[a-z]+-[a-z]+-[a-z\d]{6,}(?:-pooler)?"
KNOWN_HOST = re.compile(rf"(?ai){NEON_ENDPOINT}(?:\.[a-z\d-]*)*|localhost|127\.0\.0\.1|\[::1\]|::1")
PLAIN_NAME = re.compile(r"(?a)[\w.-]{1,63}")
# What follows the log-in: hosts with their ports, the database, parameters.
NODE = r"(?:[\w.-]*|\[[\da-fA-F:.]+\]|%2[Ff][\w.%~-]*)(?::\d*)?"
PLACE = re.compile(rf"(?a)({NODE}(?:,{NODE})*)(?:/([^?]*))?(?:\?(.*))?")

# Parts that only stand for something. A real password of such a form is taken when its special
# characters are percent-encoded.
STAND_IN = re.compile(  # <host>, [password], {user}, ${PGUSER}, $PGPASSWORD, %DB_USER%
    r"(?ai)<[^>]*>|\[[a-z][\w -]*\]|\$?\{[^}]*\}+|(?-i:\$[A-Z_][A-Z\d_]*)|\$\w{0,20}pass\w{0,20}"
    r"|%[a-z]+_[a-z_]+%|(?:os\.environ|os\.getenv|process\.env|getenv\(|env\().*"
)
STAND_IN_NAME = re.compile(
    r"(?ai)x{4,}|\.{3,}|(?-i:PASSWORD)|your[-_]?(?:user|role|pass|host|endpoint)[\w-]*"
)
STAND_IN_HOST = re.compile(  # with the example of Neon's documentation
    r"(?ai)host(?:name)?|ep-cool-darkness-(?:123456|a1b2c3d4)(?!\w).*"
)
MASK = re.compile("[*\u2022\u25cf\xb7]{3,}|\u2026")  # •, ●, · and …

ENCODE = 'write "@" in the password as %40, "/" as %2F'


class DatabaseUrlError(ValueError):
    """Where a text is wrong, and what to write: one line, without any part of a secret."""


def canonical(name: str) -> str:
    """Return libpq's keyword for any client's spelling of it, and other names as they are."""
    return SPELLINGS.get(re.sub(r"[\W_]", "", name).lower(), name)


def refusal(settings: Mapping[str, str], faults: str, why: str) -> DatabaseUrlError:
    """Return an error that shows the place. faults: names of parts, as show() takes them."""
    return DatabaseUrlError(f"{show(settings, faults.split())}: {why}")


def show(settings: Mapping[str, str], faults: Collection[str]) -> str:
    """Write a connection string by the names of its parts, with the faulty ones in [brackets].

    settings: what is known of it, by libpq's keywords. faults: keywords, "login", "place" (what
    follows the log-in) or "query".
    """

    def part(name: str, text: str) -> str:
        return f"[{text}]" if name in faults else text

    user, host, database = "USER", settings.get("host", ""), "DATABASE"
    if KNOWN_HOST.fullmatch(host):
        # A user without a password may be a password without a user.
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
    """Return libpq's keywords and values from what stands after "postgresql://".

    Names that libpq does not know are among them. Raises DatabaseUrlError.
    """
    if len(text) > MAX_URL_LENGTH:
        raise DatabaseUrlError("the connection string is too long: copy it again")
    text = unescape(text, changes)
    refuse_stand_ins(rough_parts(text), sure=text.count("@") == 1)
    login, place = split_login(text, changes)
    nodes, database, query = place.groups(default="")
    user, colon, password = login.partition(":")
    host, _, port = nodes.partition("]:" if nodes.startswith("[") else ":")
    parts = {"user": user, "password": password, "host": host.strip("[]"), "port": port}
    parts["dbname"] = database.rstrip("/")
    if database.endswith("/"):
        changes.append('dropped the "/" after the database')
    if "/" in user or ("@" in user and not colon):
        raise refusal(parts, "login", f"this is not USER:PASSWORD: {ENCODE}")
    settings = parts | split_query(query, changes)
    return {name: decode(value, name, parts, changes) for name, value in settings.items()}


def unescape(text: str, changes: list[str]) -> str:
    r"""Undo HTML's "&amp;", JSON's "\u0026" and the shell's "\&" in the parameters."""
    login, end, place = text.rpartition("@")
    address, mark, query = place.partition("?")
    plain = re.sub(r"\\u0026|\\&|&amp;", "&", query).replace(r"\=", "=")
    if mark and address.endswith("\\"):
        address = address[:-1]
    if address + mark + plain != place:
        changes.append('wrote "&", "?" and "=" for their escapes')
    return login + end + address + mark + plain


def rough_parts(text: str) -> dict[str, str]:
    """Take a URL apart that may hold placeholders, whose brackets PLACE does not know."""
    login, _, place = text.partition("?")[0].rpartition("@")
    user, _, password = login.partition(":")
    address, _, database = place.partition("/")
    host = address.partition(":")[0]
    return {"user": user, "password": password, "host": host, "dbname": database}


def refuse_stand_ins(settings: Mapping[str, str], *, sure: bool = True) -> None:
    """Raise DatabaseUrlError where a part stands for something, or is masked.

    sure: whether the parts are what they are taken for, and may be shown as such.
    """
    parts = {name: settings.get(name, "") for name in ("user", "password", "host", "dbname")}
    shown = parts if sure else {}
    stand_ins = [
        name
        for name, text in parts.items()
        if STAND_IN.fullmatch(text)
        or (name != "dbname" and STAND_IN_NAME.fullmatch(text))
        or (name == "host" and STAND_IN_HOST.fullmatch(text))
    ]
    if stand_ins:
        raise refusal(
            shown,
            " ".join(stand_ins),
            "a placeholder is left: type `uv run manage.py env` and paste your own string; "
            "a password of this kind is written percent-encoded",
        )
    if masked := [name for name, text in parts.items() if MASK.search(text)]:
        raise refusal(shown, " ".join(masked), "this is masked: choose to show it, and copy again")


def split_login(text: str, changes: list[str]) -> tuple[str, re.Match[str]]:
    """Tell "user:password" from "host:port/database?query". Raises DatabaseUrlError.

    For libpq the log-in ends at the first "@", unless a "/" comes before it. Where this makes no
    sense, the password holds an "@" or "/" itself, and just one other "@" must make sense.
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
        raise refusal({}, "login", f"this can be read in several ways: {ENCODE}")
    if not rivals and ends:
        raise refusal({}, "place", f"this is not HOST:PORT/DATABASE: copy it again, and {ENCODE}")
    if not rivals:
        raise DatabaseUrlError(
            f'postgresql://[…]: this has no "@", perhaps it is cut off: copy all of {PLACEHOLDER}'
        )
    if rivals[0] is not theirs:
        changes.append("percent-encoded the special characters of the password")
    return text[: max(rivals[0].start() - 1, 0)], rivals[0]


def is_complete(login: str, place: re.Match[str]) -> bool:
    """Whether a reading has a host and a user."""
    names = names_of(place[3])
    return bool((place[1] or "host" in names) and (login.strip(":") or "user" in names))


def is_sound(login: str, place: re.Match[str]) -> bool:
    """Whether a reading leaves nothing to doubt."""
    names = names_of(place[3])
    return is_complete(login, place) and names <= KEYWORDS and "@" not in (place[2] or "")


def names_of(query: str | None) -> set[str]:
    pairs = filter(None, (query or "").split("&"))
    return {canonical(unquote(pair.partition("=")[0])) for pair in pairs}


def split_query(query: str, changes: list[str]) -> dict[str, str]:
    """Split "a=1&b=2". The last of several values counts."""
    settings = {}
    for pair in filter(None, query.split("&")):
        written, equals, value = pair.partition("=")
        name = unquote(written)
        keyword = canonical(name) if equals else f"{name}="  # which is no keyword
        if equals and keyword != name:
            changes.append(f"wrote {keyword}, as libpq calls it")
        settings[keyword] = value
    return settings


def decode(text: str, name: str, parts: Mapping[str, str], changes: list[str]) -> str:
    """Decode %40 and the like. A text without any such code was never encoded."""
    fault = name if name in parts else "query"
    if re.search(r"%(?![\da-fA-F]{2})", text):
        if re.search(r"%[\da-fA-F]{2}", text):
            raise refusal(parts, fault, 'a "%" here starts no code: write "%" itself as %25')
        changes.append(f'wrote "%" in the {fault.replace("dbname", "database")} as %25')
        return text
    decoded = unquote_to_bytes(text).decode("utf-8", "surrogateescape")
    if re.search("[\0\ud800-\udfff]", decoded):
        raise refusal(parts, fault, "this is not text: write it percent-encoded, as UTF-8")
    return decoded
