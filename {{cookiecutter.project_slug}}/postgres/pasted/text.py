"""Finds connection strings in pasted text: from a command, a file, a chat, a web page."""

import difflib
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote

from postgres.pasted.url import PLACEHOLDER, DatabaseUrlError

MAX_TEXT_LENGTH = 20_000  # whole .env files are shorter
MAX_URLS = 10

# Characters that chats, terminals and web pages insert.
INVISIBLE = "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060\u00ad"
TERMINAL_CODE = re.compile(r"\x1b\[[\d;?]*[a-zA-Z~]")  # colors, and the codes around a paste
# Typographic quotes around a text, as word processors and chats write them.
SPECIAL_QUOTES = re.compile(
    "(?<![^\\s=:(\\[{,])"
    "(?:[\u201c\u201e\xab]([^\u201c\u201d\u201e\xab\xbb\n]*)[\u201c\u201d\xbb]"
    "|[\u2018\u201a]([^\u2018\u2019\u201a\n]*)[\u2018\u2019])"
    "(?![^\\s,;:)\\]}])"
)
SPECIAL_BLANK = re.compile(r"[^\S \t\r\n\u2028\u2029\x85]")
# [text](target) and <target|text>: PASSWORD@HOST looks like an e-mail address to them.
MARKDOWN_LINK = re.compile(r"\[([^][\n]*)\]\(((?:[a-z]+:)[^()\s]*)\)")
CHAT_LINK = re.compile(r"<(?:mailto:)?([^<>|\s]+)\|\1>")
ENCODED_STRING = re.compile(r"(?i)(?<![\w+.-])postgres(?:ql)?%(?:25)?3A%(?:25)?2F[^\s&\"'<>]*")

# A URL, and what may be before and after it.
DRIVERS = {"", "asyncpg", "pg8000", "psycopg", "psycopg2", "psycopg_async"}  # of SQLAlchemy
OUR_SCHEMES = ("postgresql", "postgres", "psql", "pgsql", "pg", "postgis")
SCHEME = re.compile(
    r"""(?aix) (?<![\w+.-])
    (?:(?P<name>[\w.]+)["'`]?[ \t]*[=:][ \t]*)?
    (?P<opening>["'`<>(\[{*_]{0,4})
    (?P<scheme>(?P<base>[a-z][a-z\d.-]*)(?:\+[a-z\d+.-]*)?):(?P<slashes>//?)"""
)
NO_SCHEME = re.compile(
    r"""(?:\w+["']?[ \t]*(?:=|:[ \t])[ \t]*)?["'`]?(?::?//)?([\w.%+-]+:[^\s/]\S*@\S+)"""
)
QUOTES = "\"'`"
BRACKETS = {"<": ">", ">": "<", "(": ")", "[": "]", "{": "}", "*": "*", "_": "_"}
AFTER_CLOSING = r"""(?=$|[\s,;.)\]}>|"'`*_&\\])"""
LEFT_OVER = "\"'`\u2018\u2019\u201c\u201d\xbb>;,)|\\"
ENTITIES = ("&quot;", "&#34;", "&#39;", "&apos;", "&gt;")
# Names of settings that hold an application's connection string, the best first, and parts of the
# names of those for other uses. Messages quote only the former.
NAMES = ("DATABASE_URL", "NEON_DATABASE_URL", "POSTGRES_URL", "url")
OTHER_USES = re.compile(r"(?i)unpooled|non_?pooling|direct|no_?ssl|shadow|prisma|test|replica|read")

# What a text is if no connection string was found in it.
EXPLANATIONS = {
    r"connection to server|could not translate|psql: error|FATAL|ERROR:|Error": (
        "the text is an error message: paste the connection string instead"
    ),
    r"(?i)\bhttps?://|^console\.neon\.tech": (
        "the text is the URL of a web page: choose Connect on that page, "
        "and copy the string that starts with postgresql://"
    ),
    r"(?i)(?<![\w+.-])postgres(?:ql)?://": (
        f"there is nothing after the scheme: copy all of {PLACEHOLDER}"
    ),
    r"(?i)(?<![\w+.-])(mysql|mariadb|sqlite|mongodb|redis|prisma)[\w+]*://": (
        f"the text starts with {{}}://: write {PLACEHOLDER}"
    ),
    r"://": f"the text starts with another scheme: write {PLACEHOLDER}",
    r"(?i)^[\w.-]+\.neon\.tech(?:/\S*)?$": f"the text is only a host: copy all of {PLACEHOLDER}",
    r"^(?:npg|napi)_\w+$": f"the text is only a password or an API key: copy all of {PLACEHOLDER}",
    r"process\.env|os\.environ|getenv|\benv\(|ENV\[|secrets\.|\$\{|\$[A-Z]": (
        "the text names a variable: paste its value, the connection string"
    ),
}


@dataclass(frozen=True)
class Found:
    """A URL in a text.

    name: of the setting with this value. url: what follows the scheme. joined: the same, with the
    lines after it if they may belong to it. broken: the part that seems to contain a space.
    """

    name: str
    scheme: str
    url: str
    joined: str | None = None
    broken: str = ""

    @property
    def rank(self) -> tuple[bool, int]:
        """Return the rank of its name: lower is better for an application."""
        if self.name in NAMES:
            return False, NAMES.index(self.name)
        return OTHER_USES.search(self.name) is not None, len(NAMES)

    @property
    def scheme_change(self) -> str:
        """Describe what was changed about the scheme, "" for nothing."""
        if self.scheme == "postgresql://":
            return ""
        if not self.scheme:
            return 'added "postgresql://" at the start'
        base, _, driver = self.scheme.lower().partition(":")[0].partition("+")
        known = base in OUR_SCHEMES and driver in DRIVERS
        shown = f'"{self.scheme}"' if known else "a misspelled one"
        return f'wrote "postgresql://" for {shown}'


def clean(text: str, changes: list[str]) -> str:
    """Remove invisible characters. Raises DatabaseUrlError."""
    if len(text) > MAX_TEXT_LENGTH:
        raise DatabaseUrlError("the text is too long: paste only the connection string")
    text = text.strip().strip(INVISIBLE).strip()
    seen = TERMINAL_CODE.sub("", text)
    seen = "".join(character for character in seen if unicodedata.category(character) != "Cf")
    if seen != text:
        changes.append("removed invisible characters")
    if not all(character.isprintable() or character.isspace() for character in seen):
        raise DatabaseUrlError("the text contains control characters: copy it again")
    plain = SPECIAL_BLANK.sub(" ", seen)
    if plain != seen:
        changes.append("replaced special spaces with plain ones")
    quoted = SPECIAL_QUOTES.sub(lambda quote: f'"{quote[1] or quote[2] or ""}"', plain)
    if quoted != plain:
        changes.append("replaced typographic quotes with plain ones")
    return quoted.strip()


def unwrap(text: str, changes: list[str]) -> str:
    """Undo what chats, web pages and programs do to a URL."""
    before = text
    if "](" in text:
        text = MARKDOWN_LINK.sub(lambda link: link[1] if "@" in link[1] else link[2], text)
    if "|" in text:
        text = CHAT_LINK.sub(r"\1", text)
    if text != before:
        changes.append("extracted the string from a link")
    if r":\/\/" in text:  # as PHP writes JSON
        text = text.replace(r"\/", "/")
    if ENCODED_STRING.search(text) and not find_urls(text):
        for _ in range(2 if "%253A" in text.upper() else 1):
            text = ENCODED_STRING.sub(lambda string: f"{unquote(string[0])} ", text)
        changes.append("decoded the string, which was percent-encoded entirely")
    return text.strip()


def find_urls(text: str) -> list[Found]:
    """Return the PostgreSQL URLs in a text; those in comments only if there are no others."""
    lines = [line.strip() for line in text.splitlines()]
    active = [line for line in lines if not line.startswith("#")]
    searches = ((active, is_ours), (lines, is_ours), (lines, is_nearly_ours))
    for searched, accept in searches:
        if found := list(itertools.islice(search(searched, accept), MAX_URLS)):
            return found
    match = NO_SCHEME.fullmatch(text)
    if match and "/" in match[1].rpartition("@")[2]:
        return [Found("", "", strip_end(match[1]))]
    return []


def is_ours(match: re.Match[str]) -> bool:
    return match["base"].lower() in OUR_SCHEMES and match["slashes"] == "//"


def is_nearly_ours(match: re.Match[str]) -> bool:
    """Accept "postgress://", "ostgresql://" (the first letter is missing), "postgresql:/"."""
    base = match["base"].lower()
    if base in OUR_SCHEMES:
        return True
    return match["slashes"] == "//" and (
        "postgresql".endswith(base)
        or bool(difflib.get_close_matches(base, OUR_SCHEMES[:2], 1, 0.8))
    )


def search(lines: list[str], accept: Callable[[re.Match[str]], bool]) -> Iterator[Found]:
    """Yield the URLs whose scheme is accepted."""
    for number, line in enumerate(lines):
        matches = [match for match in SCHEME.finditer(line) if accept(match)]
        starts = [match.start() for match in matches] + [len(line)]
        for match, end in zip(matches, starts[1:], strict=True):
            rest = line[match.end() : end]
            url, after = cut(match["opening"], rest)
            if not url:  # the scheme is repeated
                continue
            joined, broken = None, ""
            if end == len(line) and not re.search(r"\s", rest):
                more = "".join(continuation(lines[number + 1 :]))
                joined = cut(match["opening"], rest.rstrip("\\") + more)[0] if more else None
            if "@" in after or re.search(r"\s", url):
                broken = "login"
            elif after and "?" not in url and not line[: match.start("scheme")]:
                broken = "dbname"  # to libpq, the name continues after the space
            scheme = f"{match['scheme']}:{match['slashes']}"
            yield Found(match["name"] or "", scheme, url, joined, broken)


def cut(opening: str, rest: str) -> tuple[str, str]:
    """Find the end of a URL. Returns the URL, and the text after it without comments."""
    for mark in reversed(opening):
        if mark in QUOTES and (end := re.search(re.escape(mark) + AFTER_CLOSING, rest)):
            return rest[: end.start()].rstrip("\\").strip(), ""
    url, *after = rest.split(maxsplit=1) or [""]
    for mark in reversed(opening):
        if mark in BRACKETS:
            url = url.partition(BRACKETS[mark])[0]
    return strip_end(url), re.sub(r"(?:^|\s)(?:#|//|--).*", "", " ".join(after))


def strip_end(url: str) -> str:
    """Remove quotes and punctuation from the end: no connection string of Neon ends in them."""
    for _ in range(5):
        for entity in ENTITIES:
            url = url.removesuffix(entity)
        url = url.rstrip(LEFT_OVER)
    return url


def continuation(lines: list[str]) -> Iterator[str]:
    """Yield the lines that may be the rest of a URL, as a terminal or an e-mail breaks it."""
    for line in lines[:10]:
        name = re.match(r"(?a)([\w.-]+)[ \t]*=", line)
        parameter = name and any(word.endswith(name[1]) for word in ("sslmode", "channel_binding"))
        if (name and not parameter) or "://" in line or line.endswith(":"):
            return
        if not re.fullmatch(r"[^\s#]\S*", line) or not re.search(r"\w", line):
            return
        yield line


def explain(text: str) -> str:
    """Explain what a text is if it has no connection string."""
    for pattern, explanation in EXPLANATIONS.items():
        if match := re.search(pattern, text):
            return explanation.format(*match.groups())
    return f"the text is not a connection string: write {PLACEHOLDER}"
