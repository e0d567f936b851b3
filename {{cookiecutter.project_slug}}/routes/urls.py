"""Absolute addresses, as the client reached this app."""

from functools import lru_cache
from typing import Any

from fastapi import Request

MAX_HOST_BYTES = 255  # a domain name has no more


def url_of(request: Request, path: str) -> str:
    """Return the address of a path, such as "tasks"."""
    scope = request.scope
    host = next((value for name, value in scope["headers"] if name == b"host"), None)
    if len(host or b"") > MAX_HOST_BYTES:  # not worth keeping
        return f"{request.base_url}{path}"
    server = tuple(scope.get("server") or ())
    return f"{base_url(scope['scheme'], server, scope.get('root_path', ''), host)}{path}"


@lru_cache(maxsize=256)  # most requests come to the same few hosts
def base_url(scheme: str, server: tuple[Any, ...], root_path: str, host: bytes | None) -> str:
    headers = [(b"host", host)] if host is not None else []
    place = {"scheme": scheme, "server": server or None, "root_path": root_path}
    return str(Request({"type": "http", "headers": headers, **place}).base_url)
