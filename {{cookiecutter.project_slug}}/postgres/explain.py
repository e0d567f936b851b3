"""What an error of the database means: for the commands, the app and its log.

A connection that failed has no SQLSTATE, so it is told by its text; any other error by its
SQLSTATE, where it has one that says something.
"""

import errno
import re
import socket
from dataclasses import replace

import psycopg2

from postgres.findings import FINDINGS, Finding
from postgres.url import DatabaseUrl

BY_NAME = {finding.name: finding for finding in FINDINGS}
BY_CODE = {code: finding for finding in FINDINGS for code in finding.codes.split()}
BY_TEXT = [(re.compile(finding.texts), finding) for finding in FINDINGS if finding.texts]
BY_NUMBER = dict.fromkeys(
    (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN), "network-unreachable"
)
BY_TYPE: dict[type[OSError], str] = {
    socket.gaierror: "host-unknown",
    TimeoutError: "no-answer",
    ConnectionRefusedError: "nothing-listens",
    FileNotFoundError: "nothing-listens",  # there is no Unix socket
    ConnectionError: "connection-lost",
}
# What psycopg2 raises for them, and, with a SQLSTATE, for other things too.
CONNECTION_ERRORS = (psycopg2.OperationalError, psycopg2.InterfaceError)
# Proxies and poolers have one SQLSTATE for everything: only their text says what it is.
VAGUE = {"XX000", "08P01"}

# libpq tells of each attempt: one for each address, and with sslmode=prefer one without TLS.
ATTEMPT = re.compile(r"(?m)^(?=connection to server (?:at|on) |could not translate host name )")

LONGEST = 300  # characters of other people's words
PREFIX = re.compile(r"^connection to server .*? failed: ")
ASSIGNED = re.compile(r"(?i)(password|secret)(\s?[=:]\s?)\S+")


def explain(error: BaseException, url: DatabaseUrl) -> Finding:
    """Tell what an error means: the network's, psycopg2's, or what SQLAlchemy made of it.

    There is an answer to each. It is for those who run the app; its clients get `public`.
    """
    error = innermost(error)
    text = str(error).strip()
    code = getattr(error, "pgcode", None) or ""
    if code:
        text = text.partition("\n")[0]  # further lines quote rows and queries
    if isinstance(error, OSError):
        finding = by_type(error)
    elif code and code not in VAGUE:
        finding = by_code(code)
    else:
        text, finding = by_attempts(text)
        if finding.name == "other-error" and code:
            finding = by_code(code)
        elif finding.name == "other-error" and isinstance(error, CONNECTION_ERRORS):
            finding = BY_NAME["connection-failed"]
    return told(finding.name, url, text or type(error).__name__)


def told(name: str, url: DatabaseUrl, words: str = "") -> Finding:
    """Return a finding as it was met at this database. words: the error's own, with secrets."""
    finding = BY_NAME[name]
    return replace(
        finding,
        cause=finding.cause.replace("`", ""),
        advice=advise(finding, url).replace("`", ""),
        said=hide_secrets(words, url),
    )


def innermost(error: BaseException) -> BaseException:
    """Return what the driver raised, out of all that was wrapped around it."""
    while isinstance(inner := getattr(error, "orig", None) or error.__cause__, Exception):
        error = inner
    return error


def by_code(code: str) -> Finding:
    return BY_CODE.get(code) or BY_CODE.get(code[:2]) or BY_NAME["other-error"]


def by_type(error: OSError) -> Finding:
    if error.errno in BY_NUMBER:
        return BY_NAME[BY_NUMBER[error.errno]]
    names = (name for kind, name in BY_TYPE.items() if isinstance(error, kind))
    return BY_NAME[next(names, "other-error")]


def by_attempts(text: str) -> tuple[str, Finding]:
    """Return the attempt that tells most, and what it means.

    That is the first one that a server answered: with sslmode=prefer another one follows, without
    TLS, and its error misleads. Where no server answered, it is the first one that is known.
    """
    attempts = [attempt.strip() for attempt in ATTEMPT.split(text)]
    read = [(attempt.partition("\n")[0], by_text(attempt)) for attempt in attempts if attempt]
    known = [found for found in read if found[1].name != "other-error"]
    answered = [found for found in known if found[1].step not in {"DNS", "TCP"}]
    return (answered or known or read or [(text, BY_NAME["other-error"])])[0]


def by_text(text: str) -> Finding:
    found = (finding for pattern, finding in BY_TEXT if pattern.search(text))
    return next(found, BY_NAME["other-error"])


def advise(finding: Finding, url: DatabaseUrl) -> str:
    """Return the advice for this database."""
    mended = {"nothing-listens", "login-refused", "database-missing", "server-stopped"}
    if url.is_embedded and finding.name in mended:
        return "start it: uv run manage.py postgres start"
    if finding.name == "server-full" and url.pooled != url:
        return f"use the pooled host, {url.pooled.host}: uv run manage.py env"
    return finding.advice


def hide_secrets(text: str, url: DatabaseUrl) -> str:
    """Make other people's words fit to be shown: one line, and no secret in it."""
    secrets = {url.password, dict(url.options).get("sslpassword", "")} - {""}
    patterns = [re.compile("".join(map(spelled, secret))) for secret in secrets]
    for pattern in patterns:
        text = pattern.sub("***", text)
    text = ASSIGNED.sub(r"\1\2***", PREFIX.sub("", text))
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    # An "@" stands in e-mail addresses, and behind the log-in in a URL.
    text = " ".join("***" if "@" in word else word for word in text.split())[:LONGEST]
    # What is left may, by bad luck, spell a secret anew.
    return "" if any(pattern.search(text) for pattern in patterns) else text


def spelled(letter: str) -> str:
    """Return a pattern for a letter of a secret, as it is or percent-encoded."""
    codes = "".join(f"%{byte:02x}" for byte in letter.encode("utf-8", "surrogatepass"))
    return f"(?:{re.escape(letter)}|(?i:{codes}))"
