"""What a database error means: for the commands, the app and its log.

A failed connection has no SQLSTATE, so its text is matched. Any other error is looked up by its
SQLSTATE, unless that is too vague.
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
UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
BY_TYPE: dict[type[OSError], str] = {
    socket.gaierror: "host-unknown",
    TimeoutError: "no-answer",
    ConnectionRefusedError: "nothing-listens",
    FileNotFoundError: "nothing-listens",  # there is no Unix socket
    ConnectionError: "connection-lost",
}
# psycopg2 raises these for connection errors and, with a SQLSTATE, for other errors too.
CONNECTION_ERRORS = (psycopg2.OperationalError, psycopg2.InterfaceError)
# Proxies and poolers use one SQLSTATE for everything: only the text tells their errors apart.
VAGUE_CODES = {"XX000", "08P01"}

# libpq reports each attempt: one per address, and with sslmode=prefer another one without TLS.
ATTEMPT = re.compile(r"(?m)^(?=connection to server (?:at|on) |could not translate host name )")

MAX_MESSAGE_LENGTH = 300
PREFIX = re.compile(r"^connection to server .*? failed: ")
ASSIGNED = re.compile(r"(?i)(password|secret)(\s?[=:]\s?)\S+")


def explain(error: BaseException, url: DatabaseUrl) -> Finding:
    """Return what an error of psycopg2, SQLAlchemy or the network means.

    Every error has a finding. It is meant for operators; clients get its `public` text.
    """
    finding, message = diagnose(innermost(error))
    return finding_for(finding.name if finding else "other-error", url, message)


def recognize(error: BaseException, url: DatabaseUrl) -> Finding | None:
    """Like explain(), but return None for an error that is not in the list: perhaps a bug."""
    finding, message = diagnose(innermost(error))
    return finding_for(finding.name, url, message) if finding else None


def finding_for(name: str, url: DatabaseUrl, message: str = "") -> Finding:
    """Return a finding with the advice for this database.

    message: the error's own, which may contain secrets: they are removed.
    """
    finding = BY_NAME[name]
    return replace(
        finding,
        cause=finding.cause.replace("`", ""),
        advice=advise(finding, url).replace("`", ""),
        message=hide_secrets(message, url),
    )


def innermost(error: BaseException) -> BaseException:
    """Return the driver's error, without the errors that were wrapped around it."""
    while isinstance(inner := getattr(error, "orig", None) or error.__cause__, Exception):
        error = inner
    return error


def diagnose(error: BaseException) -> tuple[Finding | None, str]:
    """Return the finding for an error, if there is one, and the error's message."""
    message = str(error).strip() or type(error).__name__
    code = getattr(error, "pgcode", None)
    if isinstance(error, OSError):
        return by_type(error), message
    if not code:
        finding, message = by_attempts(message)
        if not finding and isinstance(error, CONNECTION_ERRORS):
            finding = BY_NAME["connection-failed"]
        return finding, message
    message = message.partition("\n")[0]  # further lines quote rows and queries
    finding = by_attempts(message)[0] if code in VAGUE_CODES else None
    return finding or by_code(code), message


def by_type(error: OSError) -> Finding | None:
    if error.errno in UNREACHABLE:
        return BY_NAME["network-unreachable"]
    for kind, name in BY_TYPE.items():
        if isinstance(error, kind):
            return BY_NAME[name]
    return None


def by_code(code: str) -> Finding | None:
    return BY_CODE.get(code) or BY_CODE.get(code[:2])


def by_text(text: str) -> Finding | None:
    for pattern, finding in BY_TEXT:
        if pattern.search(text):
            return finding
    return None


def by_attempts(message: str) -> tuple[Finding | None, str]:
    """Return the finding for the most telling of libpq's attempts, and that attempt's message.

    That is the first attempt that a server answered: with sslmode=prefer a second one follows,
    without TLS, and its error is misleading. If no server answered, it is the first known one.
    """
    attempts = [part.strip() for part in ATTEMPT.split(message) if part.strip()]
    found = [(by_text(attempt), attempt.partition("\n")[0]) for attempt in attempts]
    known = [(finding, text) for finding, text in found if finding]
    answered = [(finding, text) for finding, text in known if finding.step not in {"DNS", "TCP"}]
    for candidates in (answered, known, found):
        if candidates:
            return candidates[0]
    return None, message


def advise(finding: Finding, url: DatabaseUrl) -> str:
    """Return the advice for this database."""
    fixed_by_start = {"nothing-listens", "login-refused", "database-missing", "server-stopped"}
    if url.is_embedded and finding.name in fixed_by_start:
        return "start it: uv run manage.py postgres start"
    if finding.name == "server-full" and url.pooled != url:
        return f"use the pooled host, {url.pooled.host}: uv run manage.py env"
    return finding.advice


def hide_secrets(text: str, url: DatabaseUrl) -> str:
    """Make an error message safe to show: one line, without secrets."""
    secrets = {url.password, dict(url.options).get("sslpassword", "")} - {""}
    patterns = [re.compile("".join(map(letter_pattern, secret))) for secret in secrets]
    for pattern in patterns:
        text = pattern.sub("***", text)
    text = ASSIGNED.sub(r"\1\2***", PREFIX.sub("", text))
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    # An "@" is part of an e-mail address, or follows the password in a URL.
    words = ["***" if "@" in word else word for word in text.split()]
    text = " ".join(words)[:MAX_MESSAGE_LENGTH]
    # By chance, the rest may spell a secret again.
    return "" if any(pattern.search(text) for pattern in patterns) else text


def letter_pattern(letter: str) -> str:
    """Return a pattern for a letter of a secret, plain or percent-encoded."""
    codes = "".join(f"%{byte:02x}" for byte in letter.encode("utf-8", "surrogatepass"))
    return f"(?:{re.escape(letter)}|(?i:{codes}))"
