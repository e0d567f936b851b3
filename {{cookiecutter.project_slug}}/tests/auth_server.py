"""A small server in the place of Better Auth: it publishes keys, and signs tokens with them."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms

USER_ID = "YxBiJmSNqN92fnT6ydGjtXRxox5c3zma"

type Answer = Callable[[BaseHTTPRequestHandler], None]
type Changes = dict[str, Any]


@cache
def rsa_key() -> Any:
    """Return the same key each time: to make one takes as long as several tests."""
    return rsa.generate_private_key(65537, 2048)


MAKE_KEY: dict[str, Callable[[], Any]] = {
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ES512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "RS256": rsa_key,
    "PS256": rsa_key,
}
key_ids = (f"key-{number}" for number in itertools.count())


@dataclass(frozen=True)
class Key:
    id: str
    algorithm: str
    private: Any

    @classmethod
    def new(cls, algorithm: str = "EdDSA") -> "Key":
        return cls(next(key_ids), algorithm, MAKE_KEY[algorithm]())

    def published(self, **changes: object) -> Changes:
        """Return the public key the way Better Auth publishes it."""
        numbers = get_default_algorithms()[self.algorithm].to_jwk(
            self.private.public_key(), as_dict=True
        )
        numbers.pop("key_ops", None)
        return {"alg": self.algorithm, **numbers, "kid": self.id, **changes}

    def pem(self) -> bytes:
        pem: bytes = self.private.public_key().public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        )
        return pem


class Handler(BaseHTTPRequestHandler):
    server: "AuthServer"

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.answer(self)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class AuthServer(ThreadingHTTPServer):
    """Publishes `keys`, or sends another `answer`; records the requests, and signs tokens."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server_port}"
        self.keys: list[object] = []
        self.requests: list[str] = []
        self.answer: Answer = self.publish

    def handle_error(self, *_: object) -> None:
        """Ignore clients that hang up."""

    def publish(self, request: BaseHTTPRequestHandler) -> None:
        reply(json.dumps({"keys": self.keys}).encode())(request)

    def new_key(self, algorithm: str = "EdDSA") -> Key:
        """Publish one more key."""
        key = Key.new(algorithm)
        self.keys.append(key.published())
        return key

    def token(self, key: Key, header: Changes | None = None, **changes: object) -> str:
        """Sign a token like Better Auth's. A change to None omits a claim."""
        now = int(time.time())
        claims = {
            "iat": now,
            "name": "Ada",
            "email": "ada@example.com",
            "sub": USER_ID,
            "exp": now + 900,
            "iss": self.origin,
            "aud": self.origin,
        } | changes
        return jwt.encode(
            {name: value for name, value in claims.items() if value is not None},
            key.private,
            key.algorithm,
            {"kid": key.id, "typ": None} | (header or {}),
        )


def reply(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


@contextmanager
def running_auth_server() -> Iterator[AuthServer]:
    with AuthServer() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
