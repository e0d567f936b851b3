"""Reads the formats with separate settings: PGHOST=…, host: …, psql -h … and others."""

import itertools
import re
import shlex

from postgres.pasted.url import FOREIGN, KEYWORDS, MAX_URL_LENGTH, DatabaseUrlError, canonical

# host=… user=…: a value is in '…' or has no spaces; a backslash escapes any character.
KEYWORD_FORM = re.compile(rf"""(?s)(["']?)\s*((?:{"|".join(sorted(KEYWORDS))})\s*=.*)\1""")
KEYWORD_VALUE = re.compile(
    r"(?as)\s*(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s\\']|\\.)(?:[^\s\\]|\\.)*)?)(?=\s|$)"
)
# Host=…;Username=…, from .NET: a value with ";" is in quotes.
SEMICOLON_FORM = re.compile(r"(?i)(?<![\w=])(?:host|server|data source) *= *[^;\s]{1,300};")
SEMICOLON_VALUE = re.compile(
    r"""(?x) [ ]*([A-Za-z][A-Za-z _]{0,40}?)[ ]*=[ ]*
    ("(?:[^"]|"")*"[ ]*|'(?:[^']|'')*'[ ]*|[^;"'\n ][^;\n]*|)(?:;|$)"""
)
# host:port:database:user:password: a line of ~/.pgpass.
PASSWORD_FILE = re.compile(r"(?a)([\w.-]+):(\d+|\*):([^:\s]+):([^:\s]+):((?:[^:\s\\]|\\.)+)")
# psql -h … -U …
COMMAND = re.compile(
    r"(?<!\S)(?:\S*[/\\])?(?:psql|pg_dump|pg_restore|pg_isready|pgcli)(?:\.exe)?(?!\S)"
)
FLAGS = {"-h": "host", "-p": "port", "-U": "user", "-d": "dbname"}
FLAGS |= {"--host": "host", "--port": "port", "--username": "user", "--dbname": "dbname"}
FLAGS_WITH_VALUE = {"-c", "-f", "-v", "-o", "-F", "-P", "-R", "-T", "-L", "-n", "-t", "-j"}
FLAGS_WITH_VALUE |= {"--command", "--file", "--set"}
# NAME=VALUE, name: value, 'NAME': 'value': lines of a shell, of .env, YAML, JSON, TOML, Python.
PAIR = re.compile(
    r"""(?ax) (?<![\w.-]) ["'`]? (?P<name>[A-Za-z_][\w.]*) ["'`]? [ \t]*
    (?:=>|[:=](?![/=])) [ \t]* (?P<value>
    "(?:[^"\\]|\\.)*"(?![^\s,;)}\]])|'(?:[^'\\]|\\.)*'(?![^\s,;)}\]])|[^\s"']\S*|)"""
)
PART = re.compile(
    r"""(?aix) (?P<group>(?:[\w.]*_)?(?:postgres|postgresql|database|db|pg|neon|sql|rds)_
    |[\w.]*datasource\.|) (?P<part>host|hostname|server|port|user|username|password|passwd|pass|pwd
    |pw|db|dbname|db_name|database|database_name|name|ssl_?mode|channel_?binding)"""
)
AROUND_PAIRS = re.compile(r"(?:[\s,;{}()\[\]|&\\$]|export\b|setx?\b|-e\b|--env\b|(?:#|//).*)*")


def find_settings(text: str, changes: list[str]) -> dict[str, str] | None:
    """Return values by libpq's keyword from a text without a URL, None if it has no settings.

    Raises DatabaseUrlError for a text that only begins in a known format.
    """
    for read in (read_semicolons, read_keywords, read_command, read_password_file, read_pairs):
        if settings := read(text):
            if max(map(len, settings.values())) > MAX_URL_LENGTH:
                raise DatabaseUrlError("one of the settings is too long: copy it again")
            if read is not read_keywords:
                changes.append("combined the separate settings")
            return settings
    return None


def read_keywords(text: str) -> dict[str, str] | None:
    """Read libpq's other format, "host=… user=…"."""
    match = KEYWORD_FORM.fullmatch(text)
    if not match:
        return None
    settings: dict[str, str] = {}
    body, end = match[2].rstrip(), 0
    while end < len(body):
        value = KEYWORD_VALUE.match(body, end)
        if not value or value[1] not in KEYWORDS | FOREIGN:
            shown = "".join(f"{keyword}=… " for keyword in settings)
            raise DatabaseUrlError(
                f"{shown}[…]: the rest is not KEYWORD=VALUE: "
                "put a value with spaces in '…', and \\ before '"
            )
        settings[value[1]] = re.sub(r"(?s)\\(.)", r"\1", value[2] or value[3] or "")
        end = value.end()
    # A value in "…" is from TOML or Python: libpq does not know these quotes.
    return None if settings.get("host", "").startswith('"') else settings


def read_semicolons(text: str) -> dict[str, str] | None:
    """Read the format of .NET, "Host=…;Username=…;Password=…"."""
    if not SEMICOLON_FORM.search(text):
        return None
    for part in (text, *re.split(r'["\n]', text)):  # it may be the value of a setting
        settings: dict[str, str] = {}
        end = 0
        while end < len(part) and (item := SEMICOLON_VALUE.match(part, end)):
            value = item[2].strip()
            if value[:1] in {"'", '"'}:
                value = value[1:-1].replace(value[0] * 2, value[0])
            settings[canonical(item[1])] = value
            end = item.end()
        names = [settings.get("host", "="), settings.get("user", "=")]
        if end == len(part) and not re.search(r"[=\s]", "".join(names)):
            return settings
    return None


def read_command(text: str) -> dict[str, str] | None:
    """Read "PGPASSWORD=… psql -h … -U … DATABASE"."""
    if not COMMAND.search(text) or len(text) > MAX_URL_LENGTH:
        return None
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError:  # an apostrophe, perhaps
        return None
    start = next((number for number, word in enumerate(words) if COMMAND.fullmatch(word)), 0)
    variables = (re.fullmatch(r"(?:\$env:)?PG([A-Z_]+)=(.*)", word) for word in words[:start])
    settings = {canonical(match[1]): match[2] for match in variables if match}
    arguments = itertools.takewhile(
        lambda word: set(word[:1]).isdisjoint(";|&<>"), words[start + 1 :]
    )
    # If there is a URL, they are not these, or are pieces of it.
    unnamed = [] if "://" in text else ["user", "dbname"]
    for word in arguments:
        flag, _, value = word.partition("=") if word.startswith("--") else (word[:2], "", word[2:])
        if flag in FLAGS:
            settings[FLAGS[flag]] = value or next(arguments, "")
        elif word in FLAGS_WITH_VALUE:
            next(arguments, "")
        elif not word.startswith("-") and unnamed:
            settings.setdefault(unnamed.pop(), word)
    given = settings.get("dbname", "")
    if "=" in given:
        settings |= {"dbname": ""} | (read_keywords(given) or {})
    return settings


def read_password_file(text: str) -> dict[str, str] | None:
    """Read a line of ~/.pgpass."""
    match = PASSWORD_FILE.fullmatch(text)
    if not match:
        return None
    values = [re.sub(r"\\(.)", r"\1", value) for value in match.groups()]
    settings = dict(zip(("host", "port", "dbname", "user", "password"), values, strict=True))
    return {name: value for name, value in settings.items() if value != "*"}


def read_pairs(text: str) -> dict[str, str] | None:
    """Read PGHOST=…, DB_HOST=…, host: …, "host": …: on one line or several."""
    groups: dict[str, dict[str, str]] = {}
    text = re.sub(r"(?i)\$env:", "", text)
    text = re.sub(r"(?m)^[ \t]*set[ \t]+-\w+[ \t]+(\w+)[ \t]+", r"\1=", text)  # from the fish shell
    lines = [(line, list(PAIR.finditer(line))) for line in text.splitlines()]
    values = [pair["value"] for _, pairs in lines for pair in pairs]
    # A single ";" or "," may be part of a password; several are separators.
    separators = ""
    for mark in ",;":
        if len([value for value in values if value.endswith(mark)]) > 1:
            separators += mark
    for line, pairs in lines:
        if line.lstrip().startswith("#"):
            continue
        starts = [pair.start() for pair in pairs] + [len(line)]
        for pair, end in zip(pairs, starts[1:], strict=True):
            group, keyword = part_of(pair["name"])
            if not keyword:
                continue
            if not AROUND_PAIRS.fullmatch(line, pair.end(), end):
                raise DatabaseUrlError(
                    f"{keyword}=[…]: text follows the value: put all of it in '…'"
                )
            marks = ",;" if keyword == "port" else separators
            groups.setdefault(group, {})[keyword] = unquoted(pair["value"], marks)
    ranked = sorted(groups, key=lambda group: group != "pg")
    complete = [group for group in ranked if {"host", "user"} <= groups[group].keys()]
    begun = [group for group in ranked if group == "pg" or {"host", "user"} & groups[group].keys()]
    return next((groups[group] for group in complete or begun), None)


def part_of(name: str) -> tuple[str, str]:
    """Return a name's prefix, such as "db_", and libpq's keyword for the rest, "" for none."""
    if name.startswith("PG"):
        keyword = canonical(name[2:])
        return "pg", keyword if keyword in KEYWORDS else ""
    part = PART.fullmatch(name)
    if not part or name == "name":  # it can be any name, unlike Django's NAME
        return "", ""
    keyword = "dbname" if part["part"].lower() == "name" else canonical(part["part"])
    return part["group"].lower(), keyword


def unquoted(value: str, separators: str) -> str:
    if not value or value[0] not in "\"'`":
        return value.rstrip(separators)
    return re.sub(r"""\\(["'\\/$`])""", r"\1", value[1:-1])
