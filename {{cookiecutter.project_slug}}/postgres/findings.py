"""Everything that can be wrong with a database: what it means and what to do about it.

The error texts are those of Neon's documentation and of its proxy's source. PostgreSQL's codes:
https://www.postgresql.org/docs/17/errcodes-appendix.html
"""

from dataclasses import dataclass, field
from enum import StrEnum


class Retry(StrEnum):
    """Whether to try the same again a little later; connect.PAUSES has the seconds."""

    NO = "no"
    ONCE = "once"
    ONCE_SLOWLY = "once slowly"
    YES = "yes"
    WITH_JITTER = "yes, with jitter"
    BACK_OFF = "back off"


@dataclass(frozen=True)
class Finding:
    """What is wrong. Texts are Markdown here, and plain text in what explain() returns.

    name: never changes, so programs can compare it. step: how far an attempt to connect got.
    public: what clients of the app may know. is_outage: whether no request can be served.
    codes, texts: how to recognize it: SQLSTATEs or their classes, and a pattern for error messages.
    message: the error's own message, without secrets.
    """

    name: str
    step: str
    cause: str
    advice: str
    retry: Retry = Retry.NO
    public: str = "the database does not answer"
    is_outage: bool = True
    codes: str = field(default="", repr=False)
    texts: str = field(default="", repr=False)
    message: str = ""


BEHIND = "the schema is behind the code"
FULL = "the database has no free connection"
OFF = "the database is turned off"
SHUT = "the database refuses the app's log-in"
STARTING = "the database is starting"

PASTE = "copy the connection string again, then type: `uv run manage.py env`"

# Where the texts of several fit, the first one counts.
FINDINGS: tuple[Finding, ...] = (
    Finding(
        "settings-wrong",
        "settings",
        "a setting is missing or cannot work",
        "each message says what to write",
    ),
    Finding(
        "host-unknown",
        "DNS",
        "no such host name, or no network",
        (
            "compare the host in DATABASE_URL with your provider's, or paste the connection string"
            " again: `uv run manage.py env`"
        ),
        Retry.ONCE,
        texts=(
            "could not translate host name|Name or service not known|nodename nor servname"
            "|getaddrinfo failed|name resolution"
        ),
    ),
    Finding(
        "certificate-refused",
        "TLS",
        "the server's certificate could not be verified",
        (
            "check the host and the file in `sslrootcert`; use certifi's file with "
            "`sslmode=verify-full`, since `sslrootcert=system` does not work here"
        ),
        texts=(
            "certificate verify failed|server certificate|root certificate|certificate file"
            "|private key file|revocation list|sslrootcert"
        ),
    ),
    Finding(
        "nothing-listens",
        "TCP",
        "nothing listens on this host and port",
        "start the server, or correct the port in DATABASE_URL",
        texts=r"(?i)connection refused|actively refused|/10061\)|No such file or directory",
    ),
    Finding(
        "network-unreachable",
        "TCP",
        "the network has no route to this host",
        "check your network, your VPN, and whether IPv6 works",
        Retry.ONCE,
        texts=r"(?i)network is unreachable|no route to host|host is down|/100(?:51|65)\)",
    ),
    Finding(
        "not-postgresql",
        "TLS",
        "something answers, but it does not speak PostgreSQL's protocol",
        "correct the host or port in DATABASE_URL; PostgreSQL's default port is 5432",
        texts=(
            "invalid response to (?:SSL|GSSAPI) negotiation|expected authentication request"
            "|unsupported frontend protocol"
        ),
    ),
    Finding(
        "tls-required",
        "TLS",
        "the server requires TLS, but the connection does not use it",
        "add `?sslmode=require` to DATABASE_URL",
        texts="connection is insecure|SSL required",
    ),
    Finding(
        "tls-not-offered",
        "TLS",
        "DATABASE_URL requires TLS, but the server does not offer it",
        "check the host and port; on your own server, turn TLS on or remove `sslmode`",
        texts="server does not support SSL",
    ),
    Finding(
        "channel-binding-unsupported",
        "log-in",
        (
            "the server does not support channel binding: it is not Neon's proxy, it does not know "
            "the endpoint, or there is another pooler in between"
        ),
        "check the host; if the server has no channel binding, remove `channel_binding=require`",
        public=SHUT,
        texts="channel binding",
    ),
    Finding(
        "endpoint-missing",
        "log-in",
        (
            "Neon does not know which endpoint is meant: the TLS connection names no host, or "
            "another host"
        ),
        "write the host as Neon shows it, not its IP address or an alias",
        public=SHUT,
        texts="Endpoint ID is not specified",
    ),
    Finding(
        "endpoint-mismatch",
        "log-in",
        "the host and the `options` of DATABASE_URL name different endpoints",
        "remove `options` from DATABASE_URL",
        public=SHUT,
        texts="Inconsistent project name",
    ),
    Finding(
        "endpoint-disabled",
        "log-in",
        "the endpoint was suspended by hand",
        "enable it in Neon's console",
        public=OFF,
        texts="endpoint is disabled",
    ),
    Finding(
        "endpoint-deleted",
        "log-in",
        "the endpoint no longer exists",
        f"{PASTE}; deleting a branch deletes its endpoint",
        public=OFF,
        texts="endpoint (?:cannot be|could not be|not) found",
    ),
    Finding(
        "endpoint-unavailable",
        "log-in",
        "the endpoint is unavailable for now: the plan's quota, or maintenance",
        "try again in a few minutes; check usage and status in Neon's console",
        Retry.ONCE_SLOWLY,
        public=OFF,
        texts="endpoint is temporarily unavailable",
    ),
    Finding(
        "quota-exceeded",
        "log-in",
        "the plan's compute time is used up",
        "wait for the next month, or change the plan in Neon's console",
        public=OFF,
        texts=r"exceeded the (?:\w+ ){0,3}quota",
    ),
    Finding(
        "address-not-allowed",
        "log-in",
        "the provider does not allow this IP address or network",
        "add this machine's IP address in Neon's console, under IP Allow",
        public=SHUT,
        texts="IP address .* not allowed|not allowed to connect to this endpoint|blocked network",
    ),
    Finding(
        "connect-storm",
        "log-in",
        "too many connections are being opened at once",
        "try again, but not from all processes at once; keep connections open in a pool",
        Retry.WITH_JITTER,
        public=FULL,
        texts="Failed to acquire permit|Too many connections (?:to this endpoint|attempts)",
    ),
    Finding(
        "waking-up",
        "log-in",
        "the compute is waking up, or Neon has a problem",
        "try again in a moment; if it persists, check Neon's status page",
        Retry.YES,
        public=STARTING,
        texts="Control plane request failed|Couldn.t connect to compute node",
    ),
    Finding(
        "pooler-full",
        "log-in",
        "the pooler has reached its limit of clients",
        "wait longer between attempts; lower DB_POOL_SIZE, or run fewer processes",
        Retry.BACK_OFF,
        public=FULL,
        texts="no more connections allowed",
    ),
    Finding(
        "pooler-waits",
        "log-in",
        "the pooler answers, but cannot connect to the server behind it",
        "try again; if it persists, check that server, and look for long transactions",
        Retry.YES,
        texts=(
            "query_wait_timeout|server login (?:has been failing|failed)|cannot connect to server"
        ),
    ),
    Finding(
        "startup-parameter-refused",
        "log-in",
        "DATABASE_URL has `options` or another parameter that the server, or its pooler, refuses",
        "remove it from DATABASE_URL; a pooled host does not accept `options`",
        public=SHUT,
        texts=(
            "unsupported startup parameter|unrecognized configuration parameter"
            "|invalid command-line argument|permission denied to set parameter"
        ),
    ),
    Finding(
        "server-full",
        "log-in",
        "the server has reached its limit of connections",
        "close some, lower DB_POOL_SIZE, or use a pooled host",
        Retry.YES,
        public=FULL,
        codes="53300",
        texts="remaining connection slots|too many clients|too many connections for",
    ),
    Finding(
        "server-starting",
        "log-in",
        "the server is starting, stopping or recovering",
        "try again in a moment; if it persists, read the server's log",
        Retry.YES,
        public=STARTING,
        codes="57P03",
        texts="the database system is |pooler is (?:shut|shutting) down",
    ),
    Finding(
        "password-missing",
        "log-in",
        "the server requires a password, but DATABASE_URL has none",
        PASTE,
        public=SHUT,
        texts="no password supplied",
    ),
    Finding(
        "login-refused",
        "log-in",
        "wrong password or role; on Neon, a wrong endpoint gives the same error",
        PASTE,
        public=SHUT,
        codes="28P01",
        texts="authentication failed for (?:user|role)|SASL authentication failed|invalid-proof",
    ),
    Finding(
        "not-admitted",
        "log-in",
        "the server has no rule that allows this user to connect from here",
        (
            "add one to its pg_hba.conf; if the error ends in `no encryption`, add "
            "`?sslmode=require` to DATABASE_URL"
        ),
        public=SHUT,
        codes="28000",
        texts=r"pg_hba\.conf|client certificate",
    ),
    Finding(
        "database-missing",
        "database",
        "the server has no database of this name",
        "check the name at the end of DATABASE_URL, or create it: `CREATE DATABASE …`",
        public=SHUT,
        codes="3D000 57P04",
        texts="(?i)database .* does not exist|no such database",
    ),
    Finding(
        "role-missing",
        "log-in",
        "the role does not exist",
        "check the user in DATABASE_URL, or create it: `CREATE ROLE … LOGIN PASSWORD …`",
        public=SHUT,
        texts="(?i)(?:role|user) .* does not exist|no such user",
    ),
    Finding(
        "permission-denied",
        "database",
        "the role lacks a privilege",
        "have the database's owner GRANT it, or use the role that owns the tables",
        public="the database refuses the app",
        is_outage=False,
        codes="42501",
        texts="permission denied",
    ),
    Finding(
        "server-too-old",
        "database",
        "the server is older than PostgreSQL 15",
        "update the server",
    ),
    Finding(
        "server-stopped",
        "database",
        "the server closed the connection: a restart, a failover, or an administrator",
        "try again; if it persists, start the server",
        Retry.YES,
        codes="57P01",
        texts="due to administrator command",
    ),
    Finding(
        "server-crashed",
        "database",
        "a server process crashed, so all connections were closed",
        "try again; the server's log has the crash",
        Retry.YES,
        codes="57P02",
        texts="because of crash of another",
    ),
    Finding(
        "pool-exhausted",
        "database",
        "all connections of this process are in use",
        "look for slow queries; raise DB_POOL_SIZE if the server allows it",
        Retry.WITH_JITTER,
        public="all connections are in use",
        is_outage=False,
        texts="QueuePool limit|all connections are in use|too many requests wait",
    ),
    Finding(
        "no-answer",
        "TCP",
        "no answer in time: a firewall, a frozen server, or a compute that is slow to wake up",
        "try again; if it persists, check the network, the host, and the server",
        Retry.YES,
        texts=r"(?i)timeout expired|timed out|client_login_timeout|/10060\)|does not answer",
    ),
    Finding(
        "connection-lost",
        "database",
        (
            "the connection was lost: the compute went to sleep, the server restarted, or the "
            "network failed"
        ),
        "try again; if it persists, read the server's log",
        Retry.YES,
        codes="08 57 57P05",
        texts=(
            r"(?i)server closed the connection|connection has been closed|EOF detected"
            r"|reset by peer|broken pipe|terminating connection"
            r"|connection (?:already closed|not open)|server conn crashed|idle\w*[_ ]timeout"
            r"|lost synchronization"
        ),
    ),
    Finding(
        "tls-failed",
        "TLS",
        "the TLS handshake failed",
        "check the host; a proxy or firewall may interfere with TLS",
        texts=r"SSL (?:SYSCALL )?error|(?:create|establish|initialize) SSL|tlsv\d|TLS alert",
    ),
    Finding(
        "disk-full",
        "database",
        "the server's disk is full: reads work, writes fail",
        "free some space or enlarge the disk; on Neon, check the project's storage",
        public="the database has no space left",
        is_outage=False,
        codes="53100",
        texts="No space left on device|could not extend file",
    ),
    Finding(
        "out-of-memory",
        "database",
        "the server is out of memory",
        "look for expensive queries, or enlarge the compute",
        Retry.BACK_OFF,
        is_outage=False,
        codes="53 53200",
    ),
    Finding(
        "server-trouble",
        "database",
        "the server has an internal error: its disk, its files, or a bug",
        "read the server's log, or check your provider's status page",
        codes="58 F0 XX",
    ),
    Finding(
        "read-only",
        "database",
        "the server does not accept writes: it is a replica, or set to read-only",
        "point DATABASE_URL at the primary, or turn off `default_transaction_read_only`",
        public="the database accepts no changes for now",
        is_outage=False,
        codes="25006",
        texts="read-only transaction",
    ),
    Finding(
        "query-cancelled",
        "database",
        "a query exceeded the server's time limit, or was cancelled",
        "find out what it waited for, or make it cheaper",
        public="the database took too long",
        is_outage=False,
        codes="57014 25P03 25P04 72000",
        texts="canceling statement due to statement timeout",
    ),
    Finding(
        "lock-timeout",
        "database",
        "another session holds a lock: a running migration, or a long transaction",
        "wait until it ends, then try again; `pg_stat_activity` shows it",
        Retry.ONCE_SLOWLY,
        public="the database took too long",
        is_outage=False,
        codes="55P03",
    ),
    Finding(
        "conflict",
        "database",
        "two transactions conflicted, and this one was rolled back",
        "try again",
        Retry.ONCE,
        public="another change conflicted with this one",
        is_outage=False,
        codes="40",
    ),
    Finding(
        "schema-behind",
        "schema",
        "the schema is behind the code: some migrations have not run",
        "`uv run manage.py migrate`",
        public=BEHIND,
        is_outage=False,
        codes="3F000 42703 42704 42883 42P01 42P10",
    ),
    Finding(
        "models-ahead",
        "schema",
        "the models have a table or a column that no migration creates",
        '`uv run alembic revision --autogenerate -m "…"`, then `uv run manage.py migrate`',
        public=BEHIND,
        is_outage=False,
    ),
    Finding(
        "schema-ahead",
        "schema",
        "the database is at a revision that the code does not know: the code is older",
        "use the newer code, or point DATABASE_URL at a database of this version",
        is_outage=False,
        texts="Can.t locate revision|No such revision",
    ),
    Finding(
        "migrations-broken",
        "schema",
        "the files in `migrations/versions/` do not form one history",
        "fix the file that the error names; for several heads: `uv run alembic merge heads`",
        is_outage=False,
        texts="multiple heads|Multiple head revisions",
    ),
    Finding(
        "server-refused",
        "log-in",
        "the server refused the log-in",
        "read the server's error message, and its log",
        public=SHUT,
        texts=r"^connection to server .* failed: [^\s:]+:  \S",
    ),
    Finding(
        "connection-failed",
        "log-in",
        "the connection failed for a reason that is not in this list",
        "read the server's error message, and its log",
    ),
    Finding(
        "other-error",
        "database",
        "an error that is not in this list",
        "read the server's error message, and its log",
        is_outage=False,
    ),
)
