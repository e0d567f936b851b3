"""Reads connections that are not URLs: libpq's keywords, .NET's string, psql's flags.

Each is read from its first character to its last, or not at all.
"""

import re
import shlex

from postgres.pasted.url import (
    FOREIGN,
    PASTE,
    SCHEME,
    DatabaseUrlError,
    add,
    canonical,
    join,
    read_url,
    squeeze,
)

# Host=…;Username=…: .NET's. A value with ";" is in quotes.
SEMICOLONS = re.compile(
    r"""(?ax) [ ]*(?P<name>[A-Za-z][A-Za-z _]{0,40}?)[ ]*=[ ]*
    (?:"(?P<double>[^"\\]*)"|'(?P<quoted>[^'\\]*)'|(?P<bare>[^;"'\n\\]*?))[ ]*(?:;[ ]*|$)"""
)
# host=… user=…: libpq's own. A value is in '…' or has no spaces; "\" escapes what needs it.
# Here and below, NAME= after a space is never the value of the name before it.
PAIRS = re.compile(
    r"""(?asx) \s*(?P<name>[a-z]\w*|TimeZone)[ \t]*=[ \t]*
    (?:'(?P<quoted>(?:[^'\\]|\\[\\'\ ])*)'
    |(?:(?<!\s)|(?!\w+\s*=))(?P<bare>(?:[^\s\\'"]|\\[\\'\ ])+|(?=\s*$))(?<![;,]))(?=\s|$)\s*"""
)
# connect(host="…", user="…"): Python's and Ruby's. A value is in quotes, or a number.
ARGUMENTS = re.compile(
    r"""(?ax) \s*(?P<name>[a-z]\w*)\s*=>?\s*
    (?:"(?P<double>[^"\\]*)"|'(?P<quoted>[^'\\]*)'|(?P<bare>\d+))\s*(?:,\s*|$)"""
)
# PGHOST=…: a line has one or more of them. A value with other characters is in quotes.
ASSIGNMENTS = re.compile(
    r"""(?ax) (?:(?:export|set|ENV|-)[ \t]+)?(?:\$env:)?
    (?P<name>[A-Za-z_][\w.]*)[ \t]*(?:=|:(?=[ \t]))[ \t]*
    (?:"(?P<double>[^"\\]*)"|'(?P<quoted>[^'\\]*)'
    |(?:(?<!\s)|(?!\w+[ \t]*=))(?P<bare>(?:[^\s"'`;\\\#][^\s"'`;\\]*)?(?<!,)))
    (?:[ \t]+\#.*$|[ \t]+|$)"""
)
PROMPT = r"(?:(?!://)[^\n\"'`=]){0,60}?(?:[$%>]|(?<=\S)[#])[ ]+"
# psql -h … -U …, perhaps with a prompt and variables before it
COMMAND = re.compile(
    rf"""(?amx) ^\s*(?:{PROMPT})??
    (?P<command> (?:PG[A-Z]+=(?:'[^'\n]*'|"[^"\n]*"|\S+)[ ]+)*
    (?:\S*[/\\])?(?:psql|pgcli|pg_dump)(?:\.exe)?(?=\s))"""
)
PSQL_FLAGS = {"-h": "host", "-p": "port", "-U": "user", "-d": "dbname"}
PSQL_FLAGS |= {"--host": "host", "--port": "port", "--username": "user", "--dbname": "dbname"}
PSQL_FLAGS |= dict.fromkeys(["-c", "-f", "-F", "--command", "--file", "--format", "--set"], "")
PSQL_FLAGS_WITHOUT_VALUE = {"-W", "-w", "--password", "--no-password"}
SEPARATOR = re.compile(r"[\n;|<>&]+")
# What every shell understands in the same way: no variables, and no escapes but of \ and ".
SHELL = re.compile(r"""(?s)(?:[^'"\\$`]|\\.|'[^']*'|"(?:[^"\\$`]|\\["\\])*+")*+""")


def scan(pattern: re.Pattern[str], text: str) -> list[tuple[str, str]]:
    """Return names and values if the pattern matches again and again up to the end, else []."""
    pairs, end = [], 0
    while end < len(text):
        match = pattern.match(text, end)
        if match is None or match.end() == end:
            return []
        groups = match.groupdict()
        name = groups.pop("name")
        value = next((value for value in groups.values() if value is not None), "")
        pairs.append((name, re.sub(r"(?s)\\(.)", r"\1", value) if pattern is PAIRS else value))
        end = match.end()
    return pairs


def read_pairs(text: str, changes: list[str]) -> dict[str, str] | None:
    """Read .NET's string, libpq's keywords or Python's arguments. None: it is none of them."""
    for pattern in (SEMICOLONS, PAIRS, ARGUMENTS):
        pairs = scan(pattern, text)
        if len(pairs) > 1 and all(canonical(name) or squeeze(name) in FOREIGN for name, _ in pairs):
            settings: dict[str, str] = {}
            for name, value in pairs:
                add(settings, name, value, changes)
            return settings
    return None


def split_flag(word: str) -> tuple[str, str]:
    """Return the flag and the value of -hHOST or --host=HOST. Other words are only a value."""
    if word.startswith("--"):
        flag, _, value = word.partition("=")
        return flag, value
    return (word[:2], word[2:]) if word.startswith("-") else ("", word)


def read_command(text: str, changes: list[str]) -> dict[str, str]:
    """Read "PGPASSWORD=… psql -h … -U … DATABASE". Raises DatabaseUrlError."""
    start = COMMAND.match(text)
    words = iter(split_words(text[start.start("command") :]) if start else [])
    settings: dict[str, str] = {}
    for word in words:
        if not (variable := re.fullmatch(r"(?s)PG([A-Z]+)=(.*)", word)):
            break
        add(settings, variable[1], variable[2], changes)
    unnamed = ["dbname", "user"]
    for word in words:
        flag, value = split_flag(word)
        if word in PSQL_FLAGS_WITHOUT_VALUE:
            continue
        if flag in PSQL_FLAGS:
            name, value = PSQL_FLAGS[flag], value or next(words, "")
            unnamed = [other for other in unnamed if other != name]
            if value.startswith(("-", "=")):  # -h=HOST is the host "=HOST" to psql
                raise DatabaseUrlError(f"a flag has no value: write -h HOST, or {PASTE}")
        elif unnamed and not flag and not SEPARATOR.fullmatch(word):
            name = unnamed.pop(0)
        else:
            raise DatabaseUrlError(f"there is more than a connection in the command: {PASTE}")
        if name == "dbname":
            add_database(settings, value, changes)
        elif name:
            add(settings, name, value, changes)
    if not settings:
        raise DatabaseUrlError(f"there is more than one command, or an empty one: {PASTE}")
    return settings


def add_database(settings: dict[str, str], text: str, changes: list[str]) -> None:
    """Add what psql takes for a database: a URL, keywords, or a name."""
    if scheme := SCHEME.match(text):
        if read_url(text[scheme.end() :], settings, changes):
            raise DatabaseUrlError(f"text follows the URL in the command: {PASTE}")
    elif "=" in text:
        for keyword, value in (read_pairs(text, changes) or {"dbname": text}).items():
            add(settings, keyword, value, changes)
    else:
        add(settings, "dbname", text, changes)


def split_words(command: str) -> list[str]:
    """Split a command as a shell does. Raises DatabaseUrlError."""
    command = command.replace("\\\n", " ")
    if not SHELL.fullmatch(command):
        raise DatabaseUrlError(f"the command has a variable, or a quote is not closed: {PASTE}")
    lexer = shlex.shlex(command, posix=True, punctuation_chars="\n;|<>")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    return [
        word if SEPARATOR.fullmatch(word) else join(re.split(r"\s*\n\s*", word)) for word in lexer
    ]
