"""Finds the one connection that a pasted text holds. All of the text must be understood."""

import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby

from postgres.pasted.parts import ASSIGNMENTS, COMMAND, PROMPT, read_command, read_pairs, scan
from postgres.pasted.url import (
    HOST_AND_PORT,
    MAX_URL_LENGTH,
    PARTS,
    PASTE,
    REFERENCE,
    SCHEME,
    DatabaseUrlError,
    add,
    canonical,
    join,
    read_url,
)

MAX_TEXT_LENGTH = 20_000  # whole .env files are shorter

# Characters that chats, terminals and web pages insert.
TERMINAL_CODE = re.compile(r"\x1b\[[\d;?]*[a-zA-Z~]")  # colors, and the codes around a paste
SPECIAL_BLANK = re.compile(r"[^\S \t\r\n\u2028\u2029\x85]")
# Typographic quotes around a text, as word processors and chats write them.
SPECIAL_QUOTES = re.compile(
    "(?<![^\\s=:(\\[{,])"
    "(?:[\u201c\u201e\xab]([^\u201c\u201d\u201e\xab\xbb\n]*)[\u201c\u201d\xbb]"
    "|[\u2018\u201a]([^\u2018\u2019\u201a\n]*)[\u2018\u2019])"
    "(?![^\\s,;:)\\]}])"
)
# [text](text) and <text|text>: PASSWORD@HOST looks like an e-mail address to them.
LINK = re.compile(r"\[([^\s]{1,500})\]\((?:mailto:)?\1\)|<(?:mailto:)?([^<>|\s]+)\|\2>")
COMMENT = re.compile(r"\s*(?:(?:#|//|--)\s.*|#.*|`{3}\w*)?$")  # or nothing, or a fence in Markdown

# One layer of what is around a string: a shell's word, a name, quotes, brackets. Both
# ends belong together. The first that matches counts, so a call comes before a name with a colon.
LAYERS = [
    re.compile(f"(?as){layer}")
    for layer in (
        r"(?:set -\w+|setx)\s+(?P<name>\w+)\s+(?P<inside>.*)",
        r"(?:export|set|env|ENV|-e|--env|const|let|var|[-*\u2022]|\d+\.)\s+(?P<inside>.*)",
        r"[A-Za-z_][\w.:]*\((?P<inside>.*)\)[;,.]?",
        r"(?:\$env:)?([\"'`]?)(?P<name>[A-Za-z_][\w.]*)\1\s*(?:=>|[=:|])\s*(?P<inside>.*)",
        r"\[[\w .-]{0,40}\]\((?P<inside>.*)\)",
        r"([\"'`])(?P<inside>.*)\1(?:[;,.]|\s+(?:#|//)\s[^\n]*)?",
        rf"[\"'`](?P<inside>{SCHEME.pattern.removeprefix('(?ai)')}[^\"'`]+)",
        r"(\*\*|\*|\|\||\|)(?P<inside>.*)\1",
        *(rf"\{mark[0]}(?P<inside>.*)\{mark[1]}[;,.]?" for mark in ("<>", "()", "[]", "{}")),
    )
]
# What may follow a URL: quotes and brackets that close, a full stop, a comment.
AFTER = re.compile(r"""(?:\\[nrt]|[\s"'`>)\]}*|;,.])*(?:(?<=\s)(?:#|//|--)\s.*)?""")

type Source = tuple[str, dict[str, str], int]  # a name or prefix, its settings, its first line
# The names of settings. Some are for a second connection to the same database.
FAMILY = re.compile(r"(?a)(PG|(?:DB|DATABASE|POSTGRES|(?:AZURE_)?POSTGRESQL|RDS)_)([A-Z_]+)")
DIRECT_NAMES = re.compile(r"(?i)unpooled|non_?pooling|direct")

OTHER_DATABASE = re.compile(
    r"""(?aimx) (?<![\w.-])(mysql|mariadb|sqlite|mssql|sqlserver|oracle|mongodb|redis|prisma)
    [\w+]*:/
    | jdbc:(mariadb|sqlite|sqlserver|jtds|oracle|db2|h2|derby|hsqldb|snowflake|redshift):
    | (?:connection|client|engine|driver|dialect|adapter|provider|type)["']?\s*[=:]
    \s*["'{]?[\w.\ ]*?(mysql|mariadb|sqlite|sqlsrv|mssql|sql\ server|oracle|mongo)
    | ^\s*(?:[^\n]*[$%>\#]\ )?(mysql|mariadb|sqlite3|sqlcmd|mongo|redis-cli)\w*\s
    | ^\s*(?:export\ )?(mysql|mariadb|mssql|oracle|mongo)\w*_\w+=
    | (?:initial\ catalog|integrated\ security|trusted_connection|multipleactiveresultsets)\s*=
    | (?<![\w-])(?:server|data\ source)\s*=\s*(?:(?:tcp|np|lpc):|\.\s*;|\(local
    |[^;\n\\]*\\\w[^;\n]*;|[^;,\n]*,\s*\d+\s*;)  # .\SQLEXPRESS, HOST,PORT
    | (?<![\w-])(?:user\ id|uid)\s*=\s*sa\s*(?:;|$)"""
)
# What a text is if it holds no connection.
EXPLANATIONS = {
    r"(?i)\b(?:sudo|su|docker|podman|kubectl|oc|ssh|fly|heroku)\s.*\b(?:psql|pg_dump)\b": (
        "the command runs in a container, on another machine or as another user"
    ),
    SCHEME.pattern: "there is text around the connection string, or it is a comment",
    r"connection to server|could not translate|psql: error|FATAL|ERROR:|Error": (
        "the text is an error message"
    ),
    r"(?i)\bhttps?://|^console\.neon\.tech": "the text is the URL of a web page",
    r"(?i)^[\w.-]+\.neon\.tech(?:/\S*)?$": "the text is only a host",
    r"^(?:npg|napi)_\w+$": "the text is only a password or an API key",
    r"(?im)(?<![\w.-])file:|\.(?:db|sqlite3?)(?:[?\"';]|$)": (
        "the text names a file, such as SQLite's"
    ),
    r"(?im)host\w*[\"']?\s*[=:]\s*[\"']?[\w.-]+:\d+(?![\w:])": HOST_AND_PORT,
    r"\\": 'the text has a "\\", perhaps an escape',
    r"://": "the text starts with another scheme",
    r"(?i)(?:host|user|pass|database|name)\w*[\"']?\s*[=:]": (
        "the settings are not clearly those of one connection, or a value needs '…' around it"
    ),
}


def read_text(text: str, changes: list[str]) -> dict[str, str]:
    """Return values by libpq's keyword. Raises DatabaseUrlError."""
    text = clean(text, changes)
    if not text:
        raise DatabaseUrlError(f"the text is empty: {PASTE}")
    bare = LINK.sub(lambda link: (link[1] or link[2]) if "@" in link[0] else link[0], text)
    if bare != text:
        changes.append("extracted the string from a link")
    for number, line in enumerate(bare.splitlines(), 1):
        if is_gap(line):
            continue
        place = f"line {number}: " if "\n" in bare else ""
        if REFERENCE.search(line):
            raise DatabaseUrlError(
                f"{place}there is a placeholder, which a program replaces: {PASTE}; "
                'write a real "$" as %24'
            )
        if other := OTHER_DATABASE.search(line):
            name = next(filter(None, other.groups()), "SQL Server").lower()
            raise DatabaseUrlError(f"{place}the text is for another database ({name}): {PASTE}")
    blocks = [list(lines) for gap, lines in groupby(bare.splitlines(), is_gap) if not gap]
    body = "\n".join(line.strip() for line in blocks[0]) if len(blocks) == 1 else ""
    if COMMAND.search(body):
        changes.append("ignored the text around the connection string")
        return read_command(body, changes)
    if body and not SCHEME.search(body) and (found := read_string(body, changes)):
        return found[1]
    before = len(changes)
    try:
        return read_lines(bare, changes)
    except DatabaseUrlError as error:
        refusal = error
    if len(SCHEME.findall(body)) == 1 and "\n" in body:
        del changes[before:]
        with suppress(DatabaseUrlError):
            return read_broken(body, changes)
    raise refusal


def is_gap(line: str) -> bool:
    """Whether a line is empty or a comment: what belongs together has none inside."""
    return COMMENT.match(line) is not None


def clean(text: str, changes: list[str]) -> str:
    """Remove invisible characters, and write others plainly. Raises DatabaseUrlError."""
    if len(text) > MAX_TEXT_LENGTH or max(map(len, text.splitlines()), default=0) > MAX_URL_LENGTH:
        raise DatabaseUrlError(f"the text is too long: {PASTE}")
    text = text.strip().strip("\ufeff\u200b\u2060").strip()
    seen = TERMINAL_CODE.sub("", text)
    seen = "".join(character for character in seen if unicodedata.category(character) != "Cf")
    if not all(character.isprintable() or character.isspace() for character in seen):
        raise DatabaseUrlError("the text contains control characters: copy it again")
    plain = SPECIAL_BLANK.sub(" ", seen)
    plain = SPECIAL_QUOTES.sub(lambda quote: f'"{quote[1] or quote[2] or ""}"', plain)
    if plain != text:
        changes.append("replaced invisible and typographic characters")
    return plain.strip()


def layers(text: str) -> Iterator[tuple[str, str]]:
    """Yield a text, and what is inside it, layer by layer, with the last name before it."""
    name = ""
    text = re.sub(f"^{PROMPT}", "", text.strip())
    for _ in range(12):
        text = text.strip()
        yield name, text
        match = next((match for layer in LAYERS if (match := layer.fullmatch(text))), None)
        if match is None:
            return
        name, text = match.groupdict().get("name") or name, match["inside"]
        if canonical(name) in PARTS:  # it is no wrapping
            return


def read_string(text: str, changes: list[str]) -> tuple[str, dict[str, str]] | None:
    """Read one string and what is around it. Returns its name and its parts, None if it is none.

    Raises DatabaseUrlError for a URL that is wrong.
    """
    for name, inside in layers(text):
        if scheme := SCHEME.match(inside):
            settings: dict[str, str] = {}
            url = inside.split(maxsplit=1)[0]
            rest = read_url(url[scheme.end() :], settings, changes, jdbc=bool(scheme[1]))
            rest += inside[len(url) :]
            may_be_password = "password=" in url and rest[:1].strip()
            if may_be_password or not AFTER.fullmatch(rest):
                raise DatabaseUrlError(f"text follows the connection string: {PASTE}")
            if rest or inside != text:
                changes.append("ignored the text around the connection string")
            if scheme[0] != "postgresql://":
                changes.append('wrote "postgresql://" at the start')
            return name, settings
        may_be_escaped = "\\" in inside and inside != text  # by what is around it
        if not may_be_escaped and "host" in (pairs := read_pairs(inside, changes) or {}):
            changes.append("combined the separate settings")
            return name, pairs
    return None


def read_broken(text: str, changes: list[str]) -> dict[str, str]:
    """Read a URL that a terminal or an e-mail broke into lines. Raises DatabaseUrlError."""
    lines = text.splitlines()
    for number, line in enumerate(lines[1:], 1):
        if re.match(r"(?a)\w+=", line) and not re.search(
            r"(?:jdbc:|@)[^@]*\?", "".join(lines[:number])
        ):
            raise DatabaseUrlError(explain(text))  # a setting, and no parameter of the URL
    found = read_string(join(lines), changes)
    complete = None
    with suppress(DatabaseUrlError):
        complete = read_string(lines[0], [])
    more = lines[0][-1] + "".join(lines[1:])
    mark = "&" if "user=" in lines[0] else "[?&=]"  # without it, the next line may be any word
    is_unclear = "password=" in lines[0] or not re.search(mark, more)
    if not found or (complete and is_unclear):
        raise DatabaseUrlError(explain(text))
    changes.append("joined the lines of the string")
    return found[1]


def read_lines(text: str, changes: list[str]) -> dict[str, str]:
    """Read lines of .env: URLs, or separate settings, of one database. Raises DatabaseUrlError."""
    urls: list[Source] = []
    families: dict[str, Source] = {}
    number = gap = 0
    try:
        for number, line in enumerate(text.splitlines(), 1):
            if is_gap(line):
                gap = number
            elif SCHEME.search(line):
                if not (found := read_string(line, changes)):
                    raise DatabaseUrlError(explain(text))
                urls.append((*found, number))
            elif not (pairs := scan(ASSIGNMENTS, line.strip())):
                raise DatabaseUrlError(explain(text))
            else:
                for family, keyword, value in filter(None, map(part_of, pairs)):
                    _, settings, first = families.setdefault(family, (family, {}, number))
                    if not family or first < gap:
                        raise DatabaseUrlError(explain(text))
                    add(settings, keyword, value, changes)
                    if keyword == "host":
                        settings.setdefault("port", "")
    except DatabaseUrlError as error:
        error.args = (f"line {number}: {error}" if "\n" in text else str(error),)
        raise
    if not (chosen := choose(urls, list(families.values()), changes)):
        raise DatabaseUrlError(explain(text))
    return chosen


def choose(urls: list[Source], families: list[Source], changes: list[str]) -> dict[str, str]:
    """Return the URL for an application, or else the separate settings. All must agree with it.

    Raises DatabaseUrlError.
    """
    if urls:
        _, chosen, number = min(urls, key=lambda url: DIRECT_NAMES.search(url[0]) is not None)
        if any(settings != chosen for _, settings, _ in urls):
            changes.append(f"took the string in line {number}")
    else:
        changes.append("combined the separate settings")
        parts = {"host", "user", "dbname"}
        complete = [each for each in families if parts <= each[1].keys()]
        if not complete and len(families) != 1:
            return {}
        chosen = (complete or families)[0][1]
    for name, settings, number in [*urls, *families]:
        shared = ("password", "dbname") if DIRECT_NAMES.search(name) else PARTS
        if any(differ(chosen, settings, part) for part in shared):
            raise DatabaseUrlError(
                f"line {number}: there are parts of several connections: {PASTE}"
            )
    return chosen


def part_of(pair: tuple[str, str]) -> tuple[str, str, str] | None:
    """Return the prefix of a setting's name, libpq's keyword, and the value. None: unknown."""
    name, value = pair
    if match := FAMILY.fullmatch(name):
        family, part = match.groups()
        keyword = "dbname" if part == "NAME" else canonical(part)
        known = keyword if family == "PG" else keyword in {*PARTS, "sslmode"}
        return (family, keyword, value) if known else None
    keyword = canonical(name)  # of anything; but HOST and PORT are often the app's own
    return ("", keyword, value) if keyword in PARTS and name not in {"HOST", "PORT"} else None


def differ(one: dict[str, str], two: dict[str, str], part: str) -> bool:
    """Whether both have the part, with different values. A pooler's host is that of its server."""
    values = {settings.get(part, "") for settings in (one, two)}
    if part == "host":
        values = {host.replace("-pooler.", ".") for host in values}
    if part == "port":
        values = {settings["port"] or "5432" for settings in (one, two) if "port" in settings}
    return len(values - {""}) > 1


def explain(text: str) -> str:
    """Say what a text is that holds no connection, and what to paste."""
    for pattern, explanation in EXPLANATIONS.items():
        if re.search(pattern, text):
            return f"{explanation}: {PASTE}"
    return f"the text is not a connection string: {PASTE}"
