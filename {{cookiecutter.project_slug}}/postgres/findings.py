"""Everything that can be wrong with a database: what it means and what to do about it.

explain.py has the rules by which an error is recognized.
"""

from dataclasses import dataclass
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
    message: the error's own message, without secrets.
    """

    name: str
    step: str
    cause: str
    advice: str
    retry: Retry = Retry.NO
    public: str = "the database does not answer"
    is_outage: bool = True
    message: str = ""


BEHIND = "the schema is behind the code"
FULL = "the database has no free connection"
OFF = "the database is turned off"
SHUT = "the database refuses the app's login"
STARTING = "the database is starting"

COPY_AGAIN = "copy the connection string again, then type: `uv run manage.py env`"

FINDINGS: tuple[Finding, ...] = (
    Finding(
        "settings-wrong",
        "settings",
        "a setting is missing or cannot work",
        "correct the setting that the message names",
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
    ),
    Finding(
        "certificate-refused",
        "TLS",
        "the server's certificate could not be verified",
        (
            "check the host and the file in `sslrootcert`; use certifi's file with "
            "`sslmode=verify-full`, since `sslrootcert=system` does not work here"
        ),
    ),
    Finding(
        "client-certificate-refused",
        "TLS",
        "the server requires a client certificate, or does not accept the one it was given",
        "write the paths of a client certificate into `sslcert` and `sslkey` of DATABASE_URL",
        public=SHUT,
    ),
    Finding(
        "nothing-listens",
        "TCP",
        "nothing listens on this host and port",
        "start the server, or correct the port in DATABASE_URL",
    ),
    Finding(
        "connection-forbidden",
        "TCP",
        "this machine does not allow the connection: a firewall, or the permissions of the socket",
        "allow it in the firewall, or correct the permissions of the socket",
    ),
    Finding(
        "network-unreachable",
        "TCP",
        "the network has no route to this host",
        "check your network, your VPN, and whether IPv6 works",
        Retry.ONCE,
    ),
    Finding(
        "too-many-files",
        "TCP",
        "this machine, or the server, has too many open files or connections",
        "raise the limit, which `ulimit -n` shows; lower DB_POOL_SIZE, or run fewer processes",
        Retry.BACK_OFF,
    ),
    Finding(
        "not-postgresql",
        "TLS",
        "something answers, but it does not speak PostgreSQL's protocol",
        (
            "correct the host or port in DATABASE_URL; PostgreSQL's default port is 5432; if the "
            "error names GSSAPI, add `?gssencmode=disable`"
        ),
    ),
    Finding(
        "tls-required",
        "TLS",
        "the server requires TLS, but the connection does not use it",
        "add `?sslmode=require` to DATABASE_URL",
    ),
    Finding(
        "tls-not-offered",
        "TLS",
        "DATABASE_URL requires TLS, but the server does not offer it",
        "check the host and port; on your own server, turn TLS on or remove `sslmode`",
    ),
    Finding(
        "channel-binding-unsupported",
        "login",
        (
            "the server does not support channel binding: it is not Neon's proxy, it does not know "
            "the endpoint, or there is another pooler in between"
        ),
        "check the host; if the server has no channel binding, remove `channel_binding=require`",
        public=SHUT,
    ),
    Finding(
        "endpoint-missing",
        "login",
        (
            "the provider does not know which endpoint is meant: neither the host nor the user "
            "names it"
        ),
        "write host and user as your provider shows them, not an IP address or an alias",
        public=SHUT,
    ),
    Finding(
        "endpoint-mismatch",
        "login",
        "the host and the `options` of DATABASE_URL name different endpoints",
        "remove `options` from DATABASE_URL",
        public=SHUT,
    ),
    Finding(
        "endpoint-disabled",
        "login",
        "the endpoint was disabled: by hand, or by the provider",
        "enable it in your provider's console",
        public=OFF,
    ),
    Finding(
        "endpoint-deleted",
        "login",
        "no such endpoint, or it was deleted; on Supabase, the project may be paused",
        f"{COPY_AGAIN}; on Neon, deleting a branch deletes its endpoint",
        public=OFF,
    ),
    Finding(
        "endpoint-unavailable",
        "login",
        "the endpoint is unavailable for now: the plan's quota, or maintenance",
        "try again in a few minutes; check usage and status in Neon's console",
        Retry.ONCE_SLOWLY,
        public=OFF,
    ),
    Finding(
        "too-many-endpoints",
        "login",
        "the account has reached its limit of active endpoints",
        "suspend computes of other branches in Neon's console, then try again",
        public=OFF,
    ),
    Finding(
        "quota-exceeded",
        "login",
        "the plan's quota is used up: compute time, data transfer or storage",
        "wait for the next month, or change the plan in your provider's console",
        public=OFF,
    ),
    Finding(
        "address-not-allowed",
        "login",
        "the provider does not allow this IP address or network",
        "allow this machine's IP address in your provider's console; on Neon, under IP Allow",
        public=SHUT,
    ),
    Finding(
        "connect-storm",
        "login",
        "too many connections are being opened at once",
        "try again, but not from all processes at once; keep connections open in a pool",
        Retry.WITH_JITTER,
        public=FULL,
    ),
    Finding(
        "waking-up",
        "login",
        "the compute is waking up, or the provider has a problem",
        "try again in a moment; if it persists, check your provider's status page",
        Retry.YES,
        public=STARTING,
    ),
    Finding(
        "pooler-full",
        "login",
        "the pooler has reached its limit of clients",
        "wait longer between attempts; lower DB_POOL_SIZE, or run fewer processes",
        Retry.BACK_OFF,
        public=FULL,
    ),
    Finding(
        "pooler-waits",
        "login",
        "the pooler answers, but cannot connect to the server behind it",
        "try again; if it persists, check that server, and look for long transactions",
        Retry.YES,
    ),
    Finding(
        "pooler-mode-unsupported",
        "database",
        "the pooler is in statement mode, which does not allow transactions",
        "set `pool_mode = transaction` in the pooler, or use a host without it",
    ),
    Finding(
        "startup-parameter-refused",
        "login",
        "DATABASE_URL has `options` or another parameter that the server, or its pooler, refuses",
        "remove it from DATABASE_URL; a pooled host does not accept `options`",
        public=SHUT,
    ),
    Finding(
        "server-full",
        "login",
        "the server has reached its limit of connections",
        "close some, lower DB_POOL_SIZE, or use a pooled host",
        Retry.YES,
        public=FULL,
    ),
    Finding(
        "server-starting",
        "login",
        "the server is starting, stopping or recovering",
        "try again in a moment; if it persists, read the server's log",
        Retry.YES,
        public=STARTING,
    ),
    Finding(
        "password-missing",
        "login",
        "the server requires a password, but DATABASE_URL has none",
        COPY_AGAIN,
        public=SHUT,
    ),
    Finding(
        "peer-refused",
        "login",
        "the server requires the operating-system user to have the role's name: `peer` or `ident`",
        "write `localhost` and a password into DATABASE_URL, or run the app as that user",
        public=SHUT,
    ),
    Finding(
        "login-method-unsupported",
        "login",
        "the server and the client have no login method in common",
        "remove `require_auth` from DATABASE_URL; on your own server, use `scram-sha-256`",
        public=SHUT,
    ),
    Finding(
        "gssapi-failed",
        "login",
        "the login by GSSAPI (Kerberos) failed: no ticket, or one side does not support it",
        "get a ticket with `kinit`; without Kerberos, add `?gssencmode=disable` to DATABASE_URL",
        public=SHUT,
    ),
    Finding(
        "login-blocked",
        "login",
        "after too many wrong passwords, the pooler refuses all logins for some minutes",
        f"{COPY_AGAIN}; the pooler accepts it after about 10 minutes",
        public=SHUT,
    ),
    Finding(
        "login-refused",
        "login",
        "wrong password or role; on Neon, a wrong endpoint gives the same error",
        COPY_AGAIN,
        public=SHUT,
    ),
    Finding(
        "not-admitted",
        "login",
        "the server has no rule that allows this user to connect from here",
        (
            "add one to its pg_hba.conf, or to your provider's firewall; if the error ends in "
            "`no encryption` or `SSL off`, add `?sslmode=require` to DATABASE_URL"
        ),
        public=SHUT,
    ),
    Finding(
        "database-missing",
        "database",
        "the server has no database of this name",
        "check the name at the end of DATABASE_URL, or create it: `CREATE DATABASE …`",
        public=SHUT,
    ),
    Finding(
        "database-closed",
        "database",
        "the server does not allow connections to this database: a template, or half dropped",
        (
            "check the name at the end of DATABASE_URL; `ALTER DATABASE … ALLOW_CONNECTIONS true` "
            "opens a database, but one that is `invalid` must be dropped"
        ),
        public=SHUT,
    ),
    Finding(
        "role-missing",
        "login",
        "the role does not exist, or may not log in",
        "check the user in DATABASE_URL, or create it: `CREATE ROLE … LOGIN PASSWORD …`",
        public=SHUT,
    ),
    Finding(
        "permission-denied",
        "database",
        "the role lacks a privilege",
        "have the database's owner GRANT it, or use the role that owns the tables",
        public="the database refuses the app",
        is_outage=False,
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
    ),
    Finding(
        "server-crashed",
        "database",
        "a server process crashed, so all connections were closed",
        "try again; the server's log has the crash",
        Retry.YES,
    ),
    Finding(
        "pool-exhausted",
        "database",
        "all connections of this process are in use",
        "look for slow queries; raise DB_POOL_SIZE if the server allows it",
        Retry.WITH_JITTER,
        public="all connections are in use",
        is_outage=False,
    ),
    Finding(
        "no-answer",
        "TCP",
        "no answer in time: a firewall, a frozen server, or a compute that is slow to wake up",
        "try again; if it persists, check the network, the host, and the server",
        Retry.YES,
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
    ),
    Finding(
        "tls-failed",
        "TLS",
        "the TLS handshake failed",
        "check the host; a proxy or firewall may interfere with TLS",
    ),
    Finding(
        "disk-full",
        "database",
        "the server's disk is full: reads work, writes fail",
        "free some space or enlarge the disk; on Neon, check the project's storage",
        public="the database has no space left",
        is_outage=False,
    ),
    Finding(
        "out-of-memory",
        "database",
        "the server is out of memory",
        "look for expensive queries, or enlarge the compute",
        Retry.BACK_OFF,
        is_outage=False,
    ),
    Finding(
        "server-trouble",
        "database",
        "the server has an internal error: its disk, its files, or a bug",
        "read the server's log, or check your provider's status page",
    ),
    Finding(
        "read-only",
        "database",
        "the server does not accept writes: it is a replica, or set to read-only",
        "point DATABASE_URL at the primary, or turn off `default_transaction_read_only`",
        public="the database accepts no changes for now",
        is_outage=False,
    ),
    Finding(
        "target-mismatch",
        "database",
        "`target_session_attrs` of DATABASE_URL asks for another kind of server than this one",
        "remove `target_session_attrs` from DATABASE_URL, or name a host of that kind",
        public=SHUT,
    ),
    Finding(
        "query-cancelled",
        "database",
        "a query exceeded the server's time limit, or was cancelled",
        "find out what it waited for, or make it cheaper",
        public="the database took too long",
        is_outage=False,
    ),
    Finding(
        "lock-timeout",
        "database",
        "another session holds a lock: a running migration, or a long transaction",
        "wait until it ends, then try again; `pg_stat_activity` shows it",
        Retry.ONCE_SLOWLY,
        public="the database took too long",
        is_outage=False,
    ),
    Finding(
        "conflict",
        "database",
        "two transactions conflicted, and this one was rolled back",
        "try again",
        Retry.ONCE,
        public="another change conflicted with this one",
        is_outage=False,
    ),
    Finding(
        "schema-behind",
        "schema",
        "the schema is behind the code: some migrations have not run",
        "`uv run manage.py migrate`",
        public=BEHIND,
        is_outage=False,
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
    ),
    Finding(
        "migrations-broken",
        "schema",
        "the files in `migrations/versions/` do not form one history",
        "fix the file that the error names; for several heads: `uv run alembic merge heads`",
        is_outage=False,
    ),
    Finding(
        "server-refused",
        "login",
        "the server refused the login",
        "read the server's error message, and its log",
        public=SHUT,
    ),
    Finding(
        "connection-failed",
        "login",
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
