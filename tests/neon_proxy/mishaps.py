"""Everything that can go wrong when connecting to a Neon database, and how to cause it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import trustme

from neon_proxy import Endpoint, Reply
from postgres_server import free_port

NEVER = 3600.0  # seconds
UNFORESEEN = "the flux capacitor is out of tune"

Retry = Literal["no", "once", "yes"]


@dataclass(frozen=True)
class Mishap:
    """An error, the finding to report for it, and whether a retry can help.

    meet: makes it happen on a new endpoint, and returns the URL to connect to. counted: whether
    connection attempts get as far as naming their endpoint.
    """

    text: str
    finding: str
    retry: Retry
    meet: Callable[[Endpoint], str]
    counted: bool = True


def reply(
    text: str,
    finding: str,
    retry: Retry,
    *,
    severity: str = "ERROR",
    code: str = "XX000",
    before_login: bool = False,
) -> Mishap:
    """An error reply from the proxy, the pooler or the server, independent of the URL."""

    def meet(endpoint: Endpoint) -> str:
        endpoint.reply(Reply(text, severity, code, before_login=before_login))
        return endpoint.url()

    return Mishap(text, finding, retry, meet)


def written(
    text: str, finding: str, *, retry: Retry = "no", counted: bool = True, **changes: str | None
) -> Mishap:
    """An error caused by a part of the URL."""
    return Mishap(text, finding, retry, lambda endpoint: endpoint.url(**changes), counted)


def elsewhere(text: str, finding: str, *, retry: Retry, **changes: str | None) -> Mishap:
    """An error caused by a host name that is not Neon's."""
    return written(text, finding, retry=retry, counted=False, host="db.example.com", **changes)


def sleep_for_ever(endpoint: Endpoint) -> str:
    endpoint.suspend(wake_seconds=NEVER)
    return endpoint.url()


def name_no_database(endpoint: Endpoint) -> str:
    # PgBouncer remembers a failed login for 15 s per database and reports that, so use a new name.
    return endpoint.url(database=f"nowhere_{endpoint.name[-8:]}")


def name_the_server(endpoint: Endpoint) -> str:
    return endpoint.url(host="db.example.com", port=str(endpoint.proxy.server.port))


def name_a_free_port(endpoint: Endpoint) -> str:
    return endpoint.url(port=str(free_port()))


def trust_another_authority(endpoint: Endpoint) -> str:
    file = endpoint.proxy.authority.with_name("another.pem")
    trustme.CA().cert_pem.write_to_path(file)
    return endpoint.url(sslmode="verify-full", sslrootcert=str(file))


def tell_the_password(endpoint: Endpoint) -> str:
    endpoint.reply(Reply(f"no luck with {endpoint.password}"))
    return endpoint.url()


NO_BINDING = "channel binding required but not supported by server's authentication request"
ALLOW_LIST = (
    "This IP address 203.0.113.7 is not allowed to connect to this endpoint. Please add it to the"
    " allowed list in the Neon console. Make sure to check for IPv4 or IPv6 addresses."
)
QUOTA = (
    "Your account or project has exceeded the compute time quota."
    " Upgrade your plan to increase limits."
)
UNAVAILABLE = (
    "Control plane request failed: endpoint is temporarily unavailable."
    " Check your quotas and/or contact our support."
)
PERMIT = (
    "Failed to acquire permit to connect to the database."
    " Too many database connection attempts are currently ongoing."
)
RESERVED = "remaining connection slots are reserved for roles with the SUPERUSER attribute"

MISHAPS = (
    # The URL
    elsewhere("connection is insecure (try using `sslmode=require`)", "tls-required", retry="no",
              sslmode="disable", channel_binding=None),
    elsewhere("Endpoint ID is not specified.", "endpoint-missing", retry="no",
              channel_binding=None),
    elsewhere(NO_BINDING, "channel-binding-unsupported", retry="no"),
    written("password authentication failed for user 'ada' (password)", "login-refused",
            password="wrong"),
    written("password authentication failed for user 'bob' (role)", "login-refused", user="bob"),
    written("password authentication failed for user 'ada' (endpoint)", "login-refused",
            host="ep-no-body-a1b2c3d4.us-east-2.aws.neon.tech", counted=False),
    reply('password authentication failed for user "ada"', "login-refused", "no",
          severity="FATAL", code="28P01"),
    written("Inconsistent project name inferred from SNI ('ep-…') and project option ('ep-x').",
            "endpoint-mismatch", options="endpoint=ep-x", counted=False),
    Mishap('database "nowhere" does not exist', "database-missing", "no", name_no_database),
    reply('role "ada" does not exist', "role-missing", "no", severity="FATAL", code="28000"),
    written("unsupported startup parameter in options: statement_timeout",
            "startup-parameter-refused", options="-c statement_timeout=5s"),
    # The project at Neon
    reply(ALLOW_LIST, "address-not-allowed", "no", before_login=True),
    reply("This connection is trying to access this endpoint from a blocked network.",
          "address-not-allowed", "no", before_login=True),
    reply(QUOTA, "quota-exceeded", "no"),
    reply("Control plane request failed: endpoint is disabled", "endpoint-disabled", "no"),
    reply("Control plane request failed: endpoint cannot be found", "endpoint-deleted", "no"),
    reply(UNAVAILABLE, "endpoint-unavailable", "once"),
    # Temporary errors
    reply("Control plane request failed", "waking-up", "yes"),
    reply("Couldn't connect to compute node", "waking-up", "yes"),
    reply(PERMIT, "connect-storm", "yes"),
    reply("Too many connections to this endpoint. Please try again later.", "connect-storm", "yes"),
    reply("Too many connections attempts", "connect-storm", "yes"),
    reply("Authentication timed out", "no-answer", "yes"),
    Mishap("timeout expired", "no-answer", "yes", sleep_for_ever),
    reply(RESERVED, "server-full", "yes", severity="FATAL", code="53300"),
    reply("sorry, too many clients already", "server-full", "yes", severity="FATAL", code="53300"),
    reply("no more connections allowed (max_client_conn)", "pooler-full", "yes", severity="FATAL",
          code="08P01"),
    # Network and TLS
    written('could not translate host name "db.example.invalid"', "host-unknown", retry="once",
            host="db.example.invalid", hostaddr=None, counted=False),
    Mishap("connection refused", "nothing-listens", "no", name_a_free_port, counted=False),
    Mishap("server does not support SSL, but SSL was required", "tls-not-offered", "no",
           name_the_server, counted=False),
    Mishap("certificate verify failed", "certificate-refused", "no", trust_another_authority,
           counted=False),
    # Unknown errors
    reply(UNFORESEEN, "server-refused", "no"),
    Mishap("an error with the password in it", "server-refused", "no", tell_the_password),
)  # fmt: skip
