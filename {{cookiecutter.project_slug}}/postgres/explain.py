"""What a database error means: for the commands, the app and its log.

An error with a SQLSTATE is looked up in CODES, unless that code is too vague. A failed connection
has none: its text is looked up in RULES.
"""

import errno
import re
import socket
from dataclasses import replace
from functools import lru_cache

import psycopg2

from postgres.findings import FINDINGS, Finding
from postgres.url import DatabaseUrl

# SQLSTATEs, or their classes: https://www.postgresql.org/docs/17/errcodes-appendix.html
CODES = {
    "conflict": "40",
    "connection-lost": "08 57 57P05",
    "database-missing": "3D000 57P04",
    "disk-full": "53100",
    "lock-timeout": "55P03",
    "login-refused": "28P01",
    "not-admitted": "28000",
    "out-of-memory": "53 53200",
    "permission-denied": "42501",
    "query-cancelled": "25P03 25P04 57014 72000",
    "read-only": "25006",
    "schema-behind": "3F000 42703 42704 42883 42P01 42P10",
    "server-crashed": "57P02",
    "server-full": "53300",
    "server-starting": "57P03",
    "server-stopped": "57P01",
    "server-trouble": "58 F0 XX",
}
# Proxies and poolers use one of these for everything: only the text tells their errors apart.
VAGUE_CODES = ("08", "28000", "58000", "XX000")

# What an error says, and the finding that this means. The first rule that fits decides. Each part
# between two `|` has an example in tests/error_texts.py, with its source.
RULES: tuple[tuple[str, str], ...] = (
    # This app, Alembic, and libpq's options
    ("pool-exhausted", "QueuePool limit|all connections are in use|too many requests wait"),
    ("schema-ahead", "locate revision|no such revision"),
    ("migrations-broken", "multiple heads|multiple head revisions"),
    ("settings-wrong", r"^invalid dsn|^invalid \S+ value|path .*too long"),
    ("settings-wrong", "^invalid port number|^invalid connection option|^definition of service"),
    ("settings-wrong", r"^could not match \d+ |^could not parse|min_protocol_version|^requirepeer"),
    ("settings-wrong", "not compiled in"),
    ("target-mismatch", "^session is not|^server is not in hot standby"),
    # TLS. An alert is what the other side says.
    ("client-certificate-refused", "alert .*certificate|alert unknown ca"),
    ("client-certificate-refused", "valid client certificate|certificate authentication failed"),
    ("certificate-refused", "certificate verify failed|server certificate|verified SSL connection"),
    ("certificate-refused", "root certificate|certificate file|private key|sslrootcert"),
    ("tls-required", "SSL(?:/TLS)? (?:connection )?(?:is )?required|connection is insecure"),
    ("tls-required", r"requires TLS|with TLS\b|with SSL\b"),
    ("tls-not-offered", "server does not support SSL"),
    # The network. Windows adds the number of its error.
    ("host-unknown", "translate host name|getaddrinfo failed"),
    ("nothing-listens", r"^(?:could not .*: )?connection refused|/10061\)|^no such file"),
    ("connection-forbidden", r"^permission denied|operation not permitted|/10013\)"),
    ("network-unreachable", "unreachable|no route to host|host is down|network is down"),
    ("network-unreachable", "assign requested address|address not available|address family not"),
    ("network-unreachable", r"/1004[79]\)|/1005[01]\)|/1006[45]\)"),
    ("not-postgresql", "received invalid|expected authentication request|unsupported frontend"),
    # The provider of the database
    ("address-not-allowed", "not allowed to connect|VPC endpoint|blocked network|allow_list"),
    ("address-not-allowed", "not allowed to access|public network access"),
    ("endpoint-mismatch", "Inconsistent project name"),
    ("endpoint-missing", "Endpoint ID is not specified|Common name inferred|no tenant identifier"),
    ("endpoint-missing", "Project name .* must contain|Invalid Username specified|sni was not"),
    ("endpoint-unavailable", "endpoint is temporar"),
    ("endpoint-disabled", 'endpoint is disabled|endpoint has been disabled|" is disabled'),
    ("endpoint-disabled", "tenant is banned"),
    ("endpoint-deleted", "endpoint cannot be found|not be found, or|tenant or user|tenant/user"),
    ("too-many-endpoints", "active endpoints"),
    ("quota-exceeded", r"exceeded the (?:\w+ )*quota|exceeded the compute time|planLimitReached"),
    ("connect-storm", "acquire permit|connections to this endpoint|connections attempts"),
    ("connect-storm", "rate limit|rate of connection|competing requests"),
    ("login-blocked", "too many authentication"),
    # Limits
    ("pooler-full", "no more connections allowed|client connections .*exceeded|max client"),
    ("pooler-full", "max pools|max proxy|too many active clients|tcp connections"),
    ("pooler-full", "resources exhaustion|no memory for"),
    ("server-full", "remaining connection slots|too many clients|too many connections"),
    ("server-starting", "the database system is |shutting down|pooler is shut|upgrade mode"),
    ("server-stopped", "due to administrator command"),
    ("server-crashed", "because of crash of another|unexpected postmaster exit"),
    ("too-many-files", r"too many open files|no buffer space|/10024\)|/10055\)"),
    ("out-of-memory", "out of memory|cannot allocate memory|could not fork|during SSL exchange"),
    ("disk-full", "no space left on device|could not extend file"),
    # The login
    ("startup-parameter-refused", "startup parameter|configuration parameter|set parameter"),
    ("startup-parameter-refused", 'value for parameter|parameter ".*" cannot be'),
    ("startup-parameter-refused", "command-line|support the option|invalid server parameter"),
    ("password-missing", "no password supplied|empty password"),
    ("peer-refused", "peer authentication failed|ident authentication failed|unix socket login"),
    ("not-admitted", r"pg_hba\.conf|HBA configuration|authentication rejected|login rejected"),
    ("not-admitted", "no authentication method is found"),
    ("channel-binding-unsupported", "channel binding|SCRAM-SHA-256-PLUS"),
    ("login-method-unsupported", "authentication method|authentication mechanism|only IAM"),
    ("login-method-unsupported", "authentication not supported|requires OAuth"),
    ("gssapi-failed", "GSSAPI|SSPI"),
    ("login-refused", "authentication failed|authentication error|password .* is wrong"),
    ("login-refused", r"SCRAM \w|server signature|access token|auth failed|password message"),
    ("login-refused", "access denied"),
    ("login-refused", "incorrect password|incorrect user|name too long|password too long"),
    ("database-closed", 'database ".*" is not currently accepting|invalid database "'),
    ("database-missing", 'database ".*" does not exist|no such database'),
    ("database-missing", "no pool configured|route for .* not found"),
    ("role-missing", 'role ".*" does not exist|no such user|user not found'),
    ("role-missing", "not permitted to log in|no credentials for|role .* is protected"),
    ("permission-denied", "permission denied"),
    ("read-only", "read-only transaction|is read-only|server is in hot standby"),
    ("read-only", "writable connection"),
    # A proxy cannot reach the server, for a reason that no rule above knows.
    ("waking-up", "plane request failed|console request failed|connect to compute node"),
    ("waking-up", "connect to the compute node|running operations|internal error|page ?server"),
    ("pooler-waits", "query_wait_timeout|server login|server down|acquire database connection"),
    ("pooler-waits", "connection from the pool|checkout|check out|pool down|subscribe to tenant"),
    ("pooler-waits", "failed to connect to|upstream database|remote server connection"),
    ("pooler-waits", "auth.query|authentication query|database credentials|failed to reach"),
    ("pooler-waits", "cannot connect to server|pool for .* is down|pool is |all .* down"),
    ("pooler-waits", "no primary|routing failed"),
    ("pooler-mode-unsupported", "statement pooling mode"),
    # Lost, with TLS or without: a "SYSCALL error" is one of the network.
    ("connection-lost", "SSL SYSCALL error|eof while reading|bad record mac|protocol is shutdown"),
    ("connection-lost", r"could not send |data from server|/1005[234]\)"),
    ("connection-lost", "closed the connection|connection has been closed|connection closed"),
    ("connection-lost", "connection to database closed|connection already closed"),
    ("connection-lost", "connection not open|no connection to|connection reset"),
    ("connection-lost", "terminating connection|idle.*timeout|suspend_timeout|inactivity"),
    ("connection-lost", "server conn crashed|DbHandler exited|database removed|read/write error"),
    ("connection-lost", "communicating with the server|lost synchronization|no message from the"),
    ("connection-lost", "forced disconnect|configuration changed|server lifetime|idle client"),
    ("connection-lost", "connection abort|contents do not agree|unexpected response from server"),
    ("query-cancelled", "query.timeout|statement timeout|transaction timeout"),
    ("no-answer", r"timeout expired|timed out|due to timeout|timeout while|login.timeout|/10060\)"),
    ("no-answer", "connect timeout"),
    ("tls-failed", r"SSL error|could not \w+ SSL|without ALPN|unencrypted data"),
    # "FATAL:  …", in any language
    ("server-refused", r"^[^\s:]+:  \S"),
)

BY_NAME = {finding.name: finding for finding in FINDINGS}
BY_CODE = {code: BY_NAME[name] for name, codes in CODES.items() for code in codes.split()}
BY_TEXT = [(re.compile(pattern, re.IGNORECASE), BY_NAME[name]) for name, pattern in RULES]
UNREACHABLE = {
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.EHOSTDOWN,
    errno.EADDRNOTAVAIL,
    errno.EAFNOSUPPORT,
}
BY_TYPE: dict[type[OSError], str] = {
    socket.gaierror: "host-unknown",
    TimeoutError: "no-answer",
    ConnectionRefusedError: "nothing-listens",
    FileNotFoundError: "nothing-listens",  # there is no Unix socket
    PermissionError: "connection-forbidden",
    ConnectionError: "connection-lost",
}
# psycopg2 raises these for connection errors and, with a SQLSTATE, for other errors too.
CONNECTION_ERRORS = (psycopg2.OperationalError, psycopg2.InterfaceError)

# libpq reports each attempt: one per address, and with sslmode=prefer another one without TLS.
# Before libpq 14, the errors of a server have no prefix.
LIBPQ_PREFIX = re.compile(r"^(?:connection to server .*? failed|could not connect to server): ")
ATTEMPT = re.compile(
    r"(?m)^(?=connection to server |could not connect to server|could not translate host name"
    r"|(?:ERROR|FATAL|PANIC):  )"
)

MAX_MESSAGE_LENGTH = 300
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
        return by_type(error) or by_text(message), message
    if not code:
        finding, message = by_attempts(message)
        if not finding and isinstance(error, CONNECTION_ERRORS):
            finding = BY_NAME["connection-failed"]
        return finding, message
    message = message.partition("\n")[0]  # further lines quote rows and queries
    finding = by_attempts(message)[0] if code.startswith(VAGUE_CODES) else None
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


@lru_cache(maxsize=100)  # in an outage, all requests have the same error
def by_text(text: str) -> Finding | None:
    text = LIBPQ_PREFIX.sub("", text)
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
    candidates = answered or known or found
    return candidates[0] if candidates else (None, message)


def advise(finding: Finding, url: DatabaseUrl) -> str:
    """Return the advice for this database."""
    fixed_by_start = {"nothing-listens", "login-refused", "database-missing", "server-stopped"}
    if url.is_embedded and finding.name in fixed_by_start:
        return "start the embedded PostgreSQL: uv run manage.py postgres start"
    if finding.name == "server-full" and url.pooled != url:
        return f"use the pooled host, {url.pooled.host}: uv run manage.py env"
    return finding.advice


def hide_secrets(text: str, url: DatabaseUrl) -> str:
    """Make an error message safe to show: one line, without secrets."""
    secrets = {url.password, dict(url.options).get("sslpassword", "")} - {""}
    patterns = [re.compile("".join(map(letter_pattern, secret))) for secret in secrets]
    for pattern in patterns:
        text = pattern.sub("***", text)
    text = ASSIGNED.sub(r"\1\2***", LIBPQ_PREFIX.sub("", text))
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
