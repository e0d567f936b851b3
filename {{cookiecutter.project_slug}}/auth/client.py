"""The client of a request, as rate limits count it and the log names it."""

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Network, ip_address

from starlette.types import Scope

MAX_KEY_CHARACTERS = 45  # as an IPv6 address has; a proxy may pass on anything


@lru_cache(maxsize=256)
def client_key(host: str) -> str:
    """Return what a client is counted by: its IPv4 address or its IPv6 network.

    Providers give a customer a /56 network, or a larger one, whose addresses are all theirs.
    host: the client's address, which uvicorn takes from a proxy if it trusts that.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host[:MAX_KEY_CHARACTERS]
    if isinstance(address, IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or IPv6Network((int(address), 56), strict=False))


def client_of(scope: Scope) -> str:
    """Return the key of a request's client; empty if the server does not know it."""
    client = scope.get("client")
    return client_key(client[0]) if client else ""
