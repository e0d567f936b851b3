"""The grammar of a PostgreSQL URL, and the names and values of libpq's parameters.

Only what can be read in one way is read. A raw "@" or "/" in a password can make a piece of it look
like the host, so such a URL is refused unless no other reading is possible. Messages are made of
words from these modules alone: any piece of a damaged string may belong to the password.
"""

import re
from urllib.parse import quote, unquote, unquote_to_bytes

PLACEHOLDER = "postgresql://USER:PASSWORD@HOST/DATABASE"
MAX_URL_LENGTH = 4_000  # a terminal cuts off longer lines
PASTE = f"paste only {PLACEHOLDER} (in Neon's console: Connect, Show password, Copy snippet)"
HOST_AND_PORT = "the host has a port: write the port in its own setting, such as PGPORT or -p"
ENCODE = 'write "@" in the {} as %40, "/" as %2F, "?" as %3F, "&" as %26, "\\" as %5C'

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
    "database": "dbname",
    "datasource": "host",
    "db": "dbname",
    "hostname": "host",
    "pass": "password",
    "pwd": "password",
    "server": "host",
    "ssl": "sslmode",
    "uid": "user",
    "unixsock": "host",  # pg8000's, in Google's documentation
    "userid": "user",
    "username": "user",
}
# Other clients' parameters that say nothing about where to connect to. Messages may name these.
FOREIGN = {
    name.replace("_", "").lower(): name
    for name in """
    charset command_timeout connection_limit currentSchema driver include_error_detail
    max_pool_size maximum_pool_size min_pool_size minimum_pool_size pgbouncer pool pool_mode
    pool_size pool_timeout pooling prepareThreshold schema search_path serverVersion socket_timeout
    sslaccept statement_cache_size supa timeout TimeZone trust_server_certificate uselibpqcompat
    workaround
    """.split()  # noqa: SIM905
}
# Parameters that are whole numbers. libpq would say so only when it connects, and the app never,
# since it replaces some of them.
NUMBERS = {
    *("connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval"),
    *("keepalives_count", "tcp_user_timeout"),
}
# Parameters with a fixed set of values, each with its spellings, without "-", "_" and spaces.
MODES: dict[str, dict[str, str]] = {
    "sslmode": {
        "disable": "disable false 0",
        "allow": "allow",
        "prefer": "prefer",
        "require": "require required true 1 noverify",
        "verify-ca": "verifyca",
        "verify-full": "verifyfull",
    },
    "channel_binding": {"disable": "disable", "prefer": "prefer", "require": "require"},
}
PARTS = {  # in words for messages
    "host": "host",
    "port": "port",
    "user": "user",
    "password": "password",
    "dbname": "database",
}

# What a program or a person would replace. A real password that looks like one must be
# percent-encoded in a URL.
REFERENCE = re.compile(
    r"[$#]\{|\$\(|\$[A-Z][A-Z_]+|\{\{|<%|%\(\w*\)s|\b(?:config|env|getenv)\(|\bENV\["
    r"|\bos\.environ|\b(?:process|meta|Deno|Bun)\.env\b"
    r"|\b(?:settings|secrets|config|env|vars?)\.(?=\w*[A-Z_])"
)
PLACEHOLDER_VALUE = re.compile(  # <host>, [YOUR-PASSWORD], {user}, $pw, %DB_USER%, of vaults
    r"(?ai).*<[^>]*>.*|\[[a-z][\w -]*\]|\{[^}]*\}|\$[a-z_][\w:]*|%s|%[a-z_]+%|__\w+__"
    r"|\w+:/.*|@Microsoft\.KeyVault.*|arn:aws:.*"
)
PLACEHOLDER_NAME = re.compile(
    r"(?ai)x{4,}|\.{3,}|your[-_]?(?:user|role|pass|host|endpoint)[\w-]*"
    r"|(?-i:[!@]*(?:USER(?:NAME)?|PASSWORD|DATABASE|REDACTED|REPLACE\w*)[!@]*)"
)
PLACEHOLDER_HOST = re.compile(  # including the example in Neon's documentation
    r"(?ai)host(?:name)?|ep-cool-darkness-(?:123456|a1b2c3d4)(?!\w).*"
)
MASK = re.compile("[*\u2022\u25cf\xb7]{3,}|\u2026")  # •, ●, · and …

# What no name has, unless two texts were put together. A URL may have it percent-encoded.
UNLIKELY = re.compile(r"""[\s=;&|"'`]|://""")
ENTITY = re.compile(r"&#?\w{1,9};")  # HTML's "&amp;": whether it is an escape is not certain

# A URL. Behind the last "@" stands nothing but what consoles write there unencoded.
SCHEME = re.compile(r"(?ai)(?<![\w+.-])(jdbc:)?(?:postgresql|postgres|pgsql)(?:\+\w+)?://")
CODE = r"%[\da-fA-F]{2}"
PLACE = re.compile(
    rf"(?a)(?P<host>\[[\da-fA-F:.]+\]|(?:[\w.-]|{CODE})*)(?::(?P<port>\d*))?"
    rf"/(?P<dbname>(?:[\w.~+$-]|{CODE})*)(?<!\.)"
    rf"(?:\?(?P<query>(?:[\w.~+$@:/*!&=-]|{CODE})*)(?<!\.))?"
)
USER = re.compile(r"""[^\s:/?#@"'`<>()\[\]{}\\,;=&|*]+""")


class DatabaseUrlError(ValueError):
    """What is wrong with a text, and what to write: one line, without any part of a secret."""


def squeeze(name: str) -> str:
    return re.sub("[-_ ]", "", name).lower()


def canonical(name: str) -> str:
    """Return libpq's keyword for any client's name of it, "" for an unknown name."""
    return SPELLINGS.get(squeeze(name), "")


def add(
    settings: dict[str, str], name: str, text: str, changes: list[str], *, encoded: bool = False
) -> None:
    """Add a parameter by its name in any client. Raises DatabaseUrlError.

    settings: by libpq's keyword. A second value for one of them must be the same.
    encoded: whether the text has codes such as %40.
    """
    keyword = canonical(name)
    if not keyword:
        if foreign := FOREIGN.get(squeeze(name)):
            changes.append(f"removed {foreign}, which libpq rejects")
            return
        raise DatabaseUrlError(f"there is a parameter that libpq does not know: {PASTE}")
    value = decode(text, keyword) if encoded else text
    is_name = keyword in {"host", "user", "dbname"} and not encoded
    if "\n" in text or (is_name and UNLIKELY.search(text)) or (keyword == "user" and ":" in text):
        raise DatabaseUrlError(f"the {PARTS.get(keyword, keyword)} is more than one word: {PASTE}")
    if keyword == "password" and not encoded and ENTITY.search(text):
        raise DatabaseUrlError(f"the password has an escape of HTML, such as &amp;: {PASTE}")
    for written in (text, quote(value, safe="")):  # the latter will be read again
        refuse_placeholder(keyword, written)
    if keyword in NUMBERS and value and not re.fullmatch(r"(?a)-?\d{1,9}", value):
        raise DatabaseUrlError(f"{keyword} is not a whole number: write only digits")
    if keyword in MODES and value:
        value = spell_mode(keyword, value, changes)
    if keyword == "host":
        if socket := re.fullmatch(r"(/.*)/\.s\.PGSQL\.(\d+)", value):  # libpq wants the directory
            value = socket[1]
            add(settings, "port", socket[2], changes)
        if value.startswith("/") and settings.get("host") == "localhost" and encoded:
            del settings["host"]  # Prisma's documentation puts it before a socket
    if settings.get(keyword) and settings[keyword] != value:  # blank is a value too
        raise DatabaseUrlError(
            f"there are two different values for the {PARTS.get(keyword, keyword)}: {PASTE}"
        )
    settings[keyword] = value


def spell_mode(keyword: str, value: str, changes: list[str]) -> str:
    """Return a mode as libpq spells it, which checks it only when it connects."""
    word = squeeze(value)
    for mode, words in MODES[keyword].items():
        if word in words.split():
            if mode != value:
                changes.append(f"wrote {keyword}={mode}, as libpq spells it")
            return mode
    known = ", ".join(MODES[keyword])
    raise DatabaseUrlError(f"unknown {keyword}, perhaps cut off: write one of {known}")


def refuse_placeholder(keyword: str, value: str) -> None:
    """Raise DatabaseUrlError if a value is a placeholder or masked, now or when written."""
    part = PARTS.get(keyword, "")
    if not part:
        return
    may_be_a_slug = keyword == "dbname" and value.islower()  # a project can be named your-host
    if (
        PLACEHOLDER_VALUE.fullmatch(value)
        or REFERENCE.search(value)
        or (PLACEHOLDER_NAME.fullmatch(value) and not may_be_a_slug)
        or (keyword == "host" and PLACEHOLDER_HOST.fullmatch(value))
    ):
        raise DatabaseUrlError(
            f"the {part} is a placeholder: paste your own string, with its values filled in; "
            "if it is real, percent-encode it"
        )
    if MASK.search(value):
        raise DatabaseUrlError(f"the {part} is masked: {PASTE}")


def read_url(text: str, settings: dict[str, str], changes: list[str], *, jdbc: bool = False) -> str:
    """Add the parts of a text that starts behind "postgresql://". Returns what follows the URL.

    jdbc: the URL has no login before the host. Raises DatabaseUrlError.
    """
    login, _, place = ("", "", text) if jdbc else text.rpartition("@")
    plain = re.sub(r"\\u0026|&amp;|\\&", "&", place)  # JSON's, HTML's, zsh's
    plain = re.sub(r"\\(?=[?=])", "", plain)
    match = PLACE.match(plain)
    if match is None:
        refuse_placeholder("host", re.split("[:/?]", place)[0])
        raise DatabaseUrlError(
            f'there is no HOST/DATABASE behind the last "@", perhaps it is cut off: {PASTE}'
        )
    user, _, password = login.partition(":")
    for part, value in (("user", user), ("password", password)):
        refuse_placeholder(part, value)
    if (login and not USER.fullmatch(user)) or not is_password(password):
        part = "user" if "@" in user and ":" in login else "password"  # Azure's user@server
        raise DatabaseUrlError(f"USER:PASSWORD is unclear: {ENCODE.format(part)}")
    if plain != place:
        changes.append('unescaped "&", "?" and "="')
    parts = {"user": user, "password": password, **match.groupdict(default="")}
    query = parts.pop("query")
    parts["host"] = parts["host"].strip("[]")
    for name, value in parts.items():
        if value or name not in settings:  # a part that is missing is no second value
            add(settings, name, value, changes, encoded=True)
    for pair in query.split("&") if query or match[0].endswith("?") else ():
        name, equals, value = pair.partition("=")
        if not (name and equals) or "=" in value:
            raise DatabaseUrlError(f"a parameter is not NAME=VALUE, perhaps it is cut off: {PASTE}")
        add(settings, unquote(name), value, changes, encoded=True)
    return plain[match.end() :]


def join(lines: list[str]) -> str:
    """Return a string that was broken into lines. Raises DatabaseUrlError.

    A terminal breaks at its width, so only the last line is shorter, and perhaps the first.
    """
    lengths = [len(line) for line in lines[:-1]]
    if len(set(lengths[1:])) > 1 or lengths != sorted(lengths):
        raise DatabaseUrlError(f"the text has several lines: {PASTE}, in one line")
    text = "".join(lines)
    # A line that ends before the database may be cut off, and the next one another text: its words
    # would become the password's, or the host. Only a parameter shows that they belong together.
    at = text.partition("?")[0].rfind("@")
    path = text.find("/", max(at, text.find("://") + 3))
    is_whole = text[:at].count("@") == 0 and re.search(r"\?\w+=", text[path:])
    if "://" in text and len(lines[0]) <= max(path, at) and not is_whole:
        raise DatabaseUrlError(f"the text has several lines: {PASTE}, in one line")
    return text


def is_password(text: str) -> bool:
    """Whether a text before the last "@" of a URL can be nothing but the password.

    There must be no "@" in it that something like a host follows, no port before a database, and
    no escape: whoever escaped the rest of the text may have escaped the password too.
    """
    return not re.search(rf"""@[^@]*[/?:"'`,;&<>()\[\]]|^\d*[/?]|\\|{ENTITY.pattern}""", text)


def decode(text: str, keyword: str) -> str:
    """Decode codes such as %40. Raises DatabaseUrlError."""
    part = PARTS.get(keyword, keyword)
    if re.search(rf"%(?!{CODE[1:]})", text):
        raise DatabaseUrlError(f'a "%" in the {part} starts no code: write it as %25')
    decoded = unquote_to_bytes(text).decode("utf-8", "surrogateescape")
    if re.search("[\0-\x1f\x7f\ud800-\udfff]", decoded):
        raise DatabaseUrlError(f"the {part} is not text: percent-encode it as UTF-8")
    return decoded
