"""Tokens of a Better Auth server, valid and invalid. tests/auth_server.py takes its place.

The tests move the clock where keys grow old; everything else is real, sockets included.
"""

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi import FastAPI
from fastapi.testclient import TestClient
from jwt.algorithms import get_default_algorithms

from auth import AuthUnavailable, CurrentUserId, InvalidToken, better_auth
from auth.better_auth import (
    COOLDOWN_SECONDS,
    FETCH_SECONDS,
    JWKS_PATH,
    LEEWAY_SECONDS,
    MAX_JWKS_BYTES,
    REFRESH_SECONDS,
    STALE_SECONDS,
    BetterAuth,
    WrongSignature,
)
from config import Settings
from main import create_app
from postgres.url import DatabaseUrl
from tests.auth_server import (
    MAKE_KEY,
    USER_ID,
    Answer,
    AuthServer,
    Changes,
    Key,
    reply,
    running_auth_server,
)

pytestmark = pytest.mark.anyio


def hang_up(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True


def after(event: Event, answer: Answer) -> Answer:
    def answer_late(request: BaseHTTPRequestHandler) -> None:
        event.wait(10)
        answer(request)

    return answer_late


def drip(request: BaseHTTPRequestHandler) -> None:
    """Send without an end: each piece comes in time, the whole never does."""
    reply(b"")(request)
    try:
        while True:
            request.wfile.write(b" ")
            time.sleep(0.02)
    except OSError:
        pass


def flood(request: BaseHTTPRequestHandler) -> None:
    reply(b"")(request)
    try:
        while True:
            request.wfile.write(b" " * 65536)
    except OSError:
        pass


class Clock:
    """A replacement for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()  # tokens expire by the real one


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def auth_server() -> Iterator[AuthServer]:
    with running_auth_server() as server:
        yield server


@pytest.fixture
async def verifier(
    auth_server: AuthServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[BetterAuth]:
    with monkeypatch.context() as patch:
        # The server has no TLS, and to read the system's certificates would take most of the time.
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path))
        verifier = BetterAuth(auth_server.origin)
    yield verifier
    await verifier.aclose()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(better_auth, "time", clock)
    return clock


@pytest.fixture(scope="module")
def app_server() -> Iterator[AuthServer]:
    with running_auth_server() as server:
        yield server


@pytest.fixture(scope="module")
def app(
    app_server: AuthServer, database_url: DatabaseUrl, settings_for: Callable[..., Settings]
) -> FastAPI:
    app = create_app(settings_for(database_url, better_auth_url=app_server.origin))

    @app.get("/whoami")
    async def whoami(user_id: CurrentUserId) -> str:
        return user_id

    return app


@pytest.fixture
def app_client(app: FastAPI, app_server: AuthServer) -> Iterator[TestClient]:
    """The app, which knows no keys yet: it begins and ends with each test."""
    app_server.answer = app_server.publish
    app_server.requests.clear()
    with TestClient(app) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def outcomes(verifier: BetterAuth, tokens: Iterable[str]) -> set[object]:
    """Verify all at once. Returns the users' ids, and the types of exceptions."""
    answers = await asyncio.gather(*map(verifier.user_id, tokens), return_exceptions=True)
    return {type(answer) if isinstance(answer, Exception) else answer for answer in answers}


# Which tokens are good.


@pytest.mark.parametrize("algorithm", better_auth.ALGORITHMS)
async def test_every_algorithm_of_better_auth_is_accepted(
    algorithm: str, verifier: BetterAuth, auth_server: AuthServer
) -> None:
    key = auth_server.new_key(algorithm)

    assert await verifier.user_id(auth_server.token(key)) == USER_ID


async def test_clocks_may_differ_a_little(verifier: BetterAuth, auth_server: AuthServer) -> None:
    key = auth_server.new_key()
    await verifier.user_id(auth_server.token(key))  # from here on, the keys are known
    just_expired = auth_server.token(key, exp=time.time() - LEEWAY_SECONDS + 2)
    from_the_future = auth_server.token(key, iat=time.time() + LEEWAY_SECONDS - 2)

    assert await outcomes(verifier, [just_expired, from_the_future]) == {USER_ID}


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": None},
        {"sub": None},
        {"iss": None},
        {"aud": None},
        pytest.param({"exp": time.time() - 3600}, id="exp an hour ago"),
        {"exp": "soon"},
        {"exp": float("inf")},
        pytest.param({"nbf": time.time() + 3600}, id="nbf in an hour"),
        pytest.param({"iat": time.time() + 3600}, id="iat in an hour"),
        {"iss": "https://elsewhere.example.com"},
        {"aud": "https://elsewhere.example.com"},
        {"aud": ["https://elsewhere.example.com"]},
        {"aud": "better-auth:session-cache"},
        {"sub": 7},
        {"sub": ""},
        {"sub": "a" * 256},
        {"sub": "nul\0"},
        {"sub": "\ud800"},
        {"name": "a" * 10_000},  # more than a header can carry
    ],
    ids=lambda changes: str(changes)[:40],
)
async def test_wrong_or_missing_claims_are_refused(
    changes: Changes, verifier: BetterAuth, auth_server: AuthServer
) -> None:
    key = auth_server.new_key()

    with pytest.raises(InvalidToken):
        await verifier.user_id(auth_server.token(key, **changes))


async def test_another_issuer_is_logged_once(
    verifier: BetterAuth, auth_server: AuthServer, caplog: pytest.LogCaptureFixture
) -> None:
    key = auth_server.new_key()
    origin = auth_server.origin.replace("127.0.0.1", "localhost")
    tokens = [auth_server.token(key, iss=origin, aud=origin, iat=number) for number in range(3)]
    forged = auth_server.token(Key(key.id, key.algorithm, Key.new().private), iss="forged")

    for token in [forged, *tokens]:
        with pytest.raises(InvalidToken):
            await verifier.user_id(token)

    (message,) = caplog.messages
    assert repr(origin) in message
    assert repr(auth_server.origin) in message
    assert not any(token in message for token in tokens)


def encode(part: bytes | Changes) -> str:
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def unsigned(server: AuthServer, key: Key) -> str:
    payload = server.token(key).split(".")[1]
    return f"{encode({'alg': 'none', 'kid': key.id})}.{payload}."


def signed_with_the_public_key_as_secret(server: AuthServer, key: Key) -> str:
    payload = server.token(key).split(".")[1]
    signed = f"{encode({'alg': 'HS256', 'kid': key.id})}.{payload}"
    return f"{signed}.{encode(hmac.digest(key.pem(), signed.encode(), hashlib.sha256))}"


def relabelled(algorithm: str) -> Callable[[AuthServer, Key], str]:
    """Sign right, and name another algorithm."""

    def forge(server: AuthServer, key: Key) -> str:
        _, payload, signature = server.token(key).split(".")
        return f"{encode({'alg': algorithm, 'kid': key.id})}.{payload}.{signature}"

    return forge


def signed_by_another_type_of_key(server: AuthServer, key: Key) -> str:
    return server.token(Key(key.id, "ES256", MAKE_KEY["ES256"]()))


def signed_with_the_sister_algorithm(server: AuthServer, _: Key) -> str:
    """The right RSA key, its signature right too, by an algorithm that the key is not for."""
    key = server.new_key("RS256")
    return server.token(Key(key.id, "PS256", key.private))


def with_anothers_key_id(server: AuthServer, key: Key) -> str:
    return server.token(key, {"kid": server.new_key().id})


def with_a_key_of_its_own(server: AuthServer, key: Key) -> str:
    stranger = Key.new()
    header = {
        "kid": key.id,
        "jwk": stranger.published(),
        "jku": f"{server.origin}/of-a-stranger",
        "x5u": f"{server.origin}/of-a-stranger",
    }
    return server.token(stranger, header)


def with_key_id(key_id: object) -> Callable[[AuthServer, Key], str]:
    def forge(server: AuthServer, key: Key) -> str:
        _, payload, signature = server.token(key).split(".")
        return f"{encode({'alg': 'EdDSA', 'kid': key_id})}.{payload}.{signature}"

    return forge


def without_key_id(server: AuthServer, key: Key) -> str:
    _, payload, signature = server.token(key).split(".")
    return f"{encode({'alg': 'EdDSA'})}.{payload}.{signature}"


def tampered(server: AuthServer, key: Key) -> str:
    header, _, signature = server.token(key).split(".")
    payload = server.token(key, sub="somebody-else").split(".")[1]
    return f"{header}.{payload}.{signature}"


def without_signature(server: AuthServer, key: Key) -> str:
    return server.token(key).rpartition(".")[0] + "."


def demanding_an_unknown_extension(server: AuthServer, key: Key) -> str:
    return server.token(key, {"crit": ["exp"], "exp": 1})


@pytest.mark.parametrize(
    "forge",
    [
        unsigned,
        signed_with_the_public_key_as_secret,
        *map(relabelled, ("none", "HS256", "RS256", "PS256", "ES256", "ES512", "ES384", "")),
        signed_by_another_type_of_key,
        signed_with_the_sister_algorithm,
        with_anothers_key_id,
        with_a_key_of_its_own,
        *map(with_key_id, (None, "", 7, ["key"], {"key": 1}, "unheard-of")),
        without_key_id,
        tampered,
        without_signature,
        demanding_an_unknown_extension,
    ],
)
async def test_every_confusion_is_refused(
    forge: Callable[[AuthServer, Key], str], verifier: BetterAuth, auth_server: AuthServer
) -> None:
    token = forge(auth_server, auth_server.new_key())

    with pytest.raises(InvalidToken):
        await verifier.user_id(token)
    assert set(auth_server.requests) <= {JWKS_PATH}


@pytest.mark.parametrize(
    "forge",
    [unsigned, signed_with_the_public_key_as_secret, relabelled("ES384"), with_key_id("")],
)
async def test_a_token_that_better_auth_cannot_have_made_is_not_worth_a_fetch(
    forge: Callable[[AuthServer, Key], str], verifier: BetterAuth, auth_server: AuthServer
) -> None:
    with pytest.raises(InvalidToken):
        await verifier.user_id(forge(auth_server, auth_server.new_key()))
    assert auth_server.requests == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a.b.c",
        "é.é.é",
        "\ud800",
        "\0.\0.\0",
        f"{encode(b'[]')}.e30.",
        f"{encode(b'[' * 4000)}.e30.",
        f"{encode(b'\xff\xfe')}.e30.",
        "A" * 100_000,
    ],
    ids=lambda text: ascii(text[:10]),
)
async def test_what_is_no_token_is_refused_without_a_fetch(
    text: str, verifier: BetterAuth, auth_server: AuthServer
) -> None:
    with pytest.raises(InvalidToken):
        await verifier.user_id(text)
    assert auth_server.requests == []


# Which keys are good.


def unusable(name: str, **changes: object) -> Any:
    return pytest.param(changes, id=name)


@pytest.mark.parametrize(
    "changes",
    [
        unusable("for encryption", use="enc"),
        unusable("for encryption, told otherwise", key_ops=["encrypt"]),
        unusable("for an algorithm that is null", alg=None),
        unusable("has an id that is null", kid=None),
        unusable("for an algorithm of secrets", alg="HS256"),
        unusable("for no algorithm", alg="none"),
        unusable("for the algorithm of another type", alg="RS256"),
        unusable("for the algorithm of another curve", alg="ES512"),
    ],
)
async def test_a_key_that_is_not_for_this_signs_nothing(
    changes: Changes, verifier: BetterAuth, auth_server: AuthServer
) -> None:
    key = Key.new("ES256")
    auth_server.keys = [key.published(**changes)]

    with pytest.raises(InvalidToken):
        await verifier.user_id(auth_server.token(key))


def published_with_less(key: Key, *missing: str) -> Changes:
    return {name: value for name, value in key.published().items() if name not in missing}


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "ES512", "RS256", "PS256"])
async def test_the_type_of_a_key_tells_its_algorithm(
    algorithm: str, verifier: BetterAuth, auth_server: AuthServer
) -> None:
    key = Key.new(algorithm)
    auth_server.keys = [published_with_less(key, "alg"), Key.new().published()]

    assert await verifier.user_id(auth_server.token(key)) == USER_ID


@pytest.mark.parametrize("algorithm", ["ES384", "RS384"])
async def test_a_key_without_algorithm_is_for_no_other_than_those_of_better_auth(
    algorithm: str, verifier: BetterAuth, auth_server: AuthServer
) -> None:
    key = Key(f"for {algorithm}", algorithm, MAKE_KEY[algorithm.replace("RS384", "RS256")]())
    auth_server.keys = [published_with_less(key, "alg")]

    with pytest.raises(InvalidToken):
        await verifier.user_id(auth_server.token(key))


@pytest.mark.parametrize(
    "forge",
    [
        unsigned,
        signed_with_the_public_key_as_secret,
        *map(relabelled, ("RS256", "ES256", "")),
        signed_by_another_type_of_key,
        tampered,
    ],
)
async def test_a_key_without_algorithm_allows_no_confusion(
    forge: Callable[[AuthServer, Key], str], verifier: BetterAuth, auth_server: AuthServer
) -> None:
    key = Key.new()
    auth_server.keys = [published_with_less(key, "alg")]

    with pytest.raises(InvalidToken):
        await verifier.user_id(forge(auth_server, key))


async def test_a_private_key_without_algorithm_signs_nothing(
    verifier: BetterAuth, auth_server: AuthServer
) -> None:
    key = Key.new("ES256")
    private = get_default_algorithms()["ES256"].to_jwk(key.private, as_dict=True)
    auth_server.keys = [published_with_less(key, "alg") | {"d": private["d"]}]

    with pytest.raises(InvalidToken):
        await verifier.user_id(auth_server.token(key))


async def test_the_only_key_needs_no_id(verifier: BetterAuth, auth_server: AuthServer) -> None:
    key = Key.new()
    auth_server.keys = [published_with_less(key, "kid")]
    token = auth_server.token(key)
    claims = jwt.decode(token, options={"verify_signature": False})
    token_without_id = jwt.encode(claims, key.private, key.algorithm)

    assert await outcomes(verifier, [token, token_without_id]) == {USER_ID}
    assert await outcomes(verifier, [token, token_without_id]) == {USER_ID}
    assert auth_server.requests == [JWKS_PATH]


async def test_one_of_several_keys_needs_an_id(
    verifier: BetterAuth, auth_server: AuthServer
) -> None:
    key = Key.new()
    auth_server.keys = [published_with_less(key, "kid"), Key.new().published()]

    with pytest.raises(InvalidToken):
        await verifier.user_id(auth_server.token(key))


async def test_a_private_key_that_everybody_can_read_signs_nothing(
    verifier: BetterAuth, auth_server: AuthServer
) -> None:
    key = Key.new("ES256")
    private = get_default_algorithms()["ES256"].to_jwk(key.private, as_dict=True)
    auth_server.keys = [key.published(**private)]

    with pytest.raises(InvalidToken):
        await verifier.user_id(auth_server.token(key))


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")  # from signing
async def test_a_key_that_is_too_short_signs_nothing(
    verifier: BetterAuth, auth_server: AuthServer
) -> None:
    key = Key("short", "RS256", rsa.generate_private_key(65537, 1024))  # noqa: S505
    auth_server.keys = [key.published()]

    with pytest.raises(InvalidToken):
        await verifier.user_id(auth_server.token(key))


async def test_keys_that_cannot_be_used_do_not_disturb_the_others(
    verifier: BetterAuth, auth_server: AuthServer, caplog: pytest.LogCaptureFixture
) -> None:
    good = Key.new()
    ec_key = Key.new("ES256").published()
    no_texts: list[object] = [None, 7, [], {}]
    auth_server.keys = [
        *("key", *no_texts),
        {"kty": "oct", "alg": "HS256", "kid": "secret", "k": "c2VjcmV0"},
        {"kty": "AKP", "alg": "ML-DSA-44", "kid": "of tomorrow", "pub": "AAAA"},
        Key.new("ES384").published(),
        *({**ec_key, "kid": key_id} for key_id in no_texts),
        *({**ec_key, "alg": algorithm} for algorithm in no_texts),
        *({**ec_key, "x": x} for x in ("", "é", "AAAA", ec_key["y"], *no_texts)),
        {**ec_key, "key_ops": 7},
        {**ec_key, "use": []},
        good.published(use="sig", key_ops=["verify"]),
    ]

    assert await verifier.user_id(auth_server.token(good)) == USER_ID
    assert "1 can be used" in caplog.text


# When keys are fetched.


async def test_a_known_key_costs_no_fetch(verifier: BetterAuth, auth_server: AuthServer) -> None:
    key = auth_server.new_key()

    for _ in range(20):
        await verifier.user_id(auth_server.token(key))

    assert auth_server.requests == [JWKS_PATH]


async def test_one_fetch_serves_all_who_wait(verifier: BetterAuth, auth_server: AuthServer) -> None:
    token = auth_server.token(auth_server.new_key())

    assert await outcomes(verifier, [token] * 100) == {USER_ID}
    assert auth_server.requests == [JWKS_PATH]


async def test_a_client_that_hangs_up_does_not_end_the_fetch_for_others(
    verifier: BetterAuth, auth_server: AuthServer
) -> None:
    go = Event()
    auth_server.answer = after(go, auth_server.publish)
    token = auth_server.token(auth_server.new_key())
    impatient, patient = (asyncio.create_task(verifier.user_id(token)) for _ in range(2))
    await asyncio.sleep(0.05)

    impatient.cancel()
    await asyncio.sleep(0.05)
    go.set()

    assert await patient == USER_ID
    assert auth_server.requests == [JWKS_PATH]


async def test_unknown_keys_cause_one_fetch_in_a_cooldown(
    verifier: BetterAuth, auth_server: AuthServer, clock: Clock
) -> None:
    await verifier.user_id(auth_server.token(auth_server.new_key()))

    for _ in range(3):
        clock.now += COOLDOWN_SECONDS
        for _ in range(2):
            strangers = [auth_server.token(Key.new()) for _ in range(20)]
            assert await outcomes(verifier, strangers) == {InvalidToken}

    assert len(auth_server.requests) == 1 + 3


async def test_a_new_key_is_noticed_after_the_cooldown(
    verifier: BetterAuth, auth_server: AuthServer, clock: Clock
) -> None:
    old = auth_server.new_key()
    await verifier.user_id(auth_server.token(old))
    new = auth_server.new_key()

    with pytest.raises(InvalidToken):
        await verifier.user_id(auth_server.token(new))
    clock.now += COOLDOWN_SECONDS

    assert await outcomes(verifier, map(auth_server.token, [new, old])) == {USER_ID}


@pytest.mark.parametrize("missing", [["kid"], []], ids=["without id", "with id"])
async def test_a_key_that_replaces_one_without_id_is_noticed_after_the_cooldown(
    verifier: BetterAuth, auth_server: AuthServer, clock: Clock, missing: list[str]
) -> None:
    old, new = Key.new(), Key.new()
    auth_server.keys = [published_with_less(old, "kid")]
    await verifier.user_id(auth_server.token(old))
    auth_server.keys = [published_with_less(new, *missing)]

    assert await outcomes(verifier, [auth_server.token(new)]) == {InvalidToken}
    clock.now += COOLDOWN_SECONDS

    assert await outcomes(verifier, [auth_server.token(new)] * 10) == {USER_ID}
    assert await outcomes(verifier, [auth_server.token(old)]) == {InvalidToken}
    assert len(auth_server.requests) == 2


async def test_wrong_signatures_of_a_key_without_id_cause_one_fetch_in_a_cooldown(
    verifier: BetterAuth, auth_server: AuthServer, clock: Clock
) -> None:
    key = Key.new()
    auth_server.keys = [published_with_less(key, "kid")]
    await verifier.user_id(auth_server.token(key))

    for _ in range(3):
        clock.now += COOLDOWN_SECONDS
        for _ in range(2):
            strangers = [auth_server.token(Key.new()) for _ in range(20)]
            assert await outcomes(verifier, strangers) <= {InvalidToken, WrongSignature}

    assert len(auth_server.requests) == 1 + 3
    assert await outcomes(verifier, [auth_server.token(key)]) == {USER_ID}


async def test_a_withdrawn_key_is_refused_soon_after_its_refresh_is_due(
    verifier: BetterAuth, auth_server: AuthServer, clock: Clock
) -> None:
    token = auth_server.token(auth_server.new_key())
    await verifier.user_id(token)
    auth_server.keys = []

    clock.now += REFRESH_SECONDS
    await verifier.user_id(token)  # has the keys fetched behind it

    async with asyncio.timeout(5):
        while await outcomes(verifier, [token]) != {InvalidToken}:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.02)


async def test_a_withdrawn_key_is_refused_at_once_when_nobody_came_for_long(
    verifier: BetterAuth, auth_server: AuthServer, clock: Clock
) -> None:
    token = auth_server.token(auth_server.new_key())
    await verifier.user_id(token)
    auth_server.keys = []

    clock.now += STALE_SECONDS
    assert await outcomes(verifier, [token] * 10) == {InvalidToken}
    assert len(auth_server.requests) == 2


async def test_nobody_waits_for_a_refresh(
    verifier: BetterAuth, auth_server: AuthServer, clock: Clock
) -> None:
    token = auth_server.token(auth_server.new_key())
    await verifier.user_id(token)
    go = Event()
    auth_server.answer = after(go, auth_server.publish)

    clock.now += REFRESH_SECONDS
    async with asyncio.timeout(FETCH_SECONDS / 2):
        for _ in range(20):
            await verifier.user_id(token)
        while len(auth_server.requests) < 2:  # noqa: ASYNC110  (the server is in a thread)
            await asyncio.sleep(0.01)
        for _ in range(20):
            await verifier.user_id(token)
    go.set()

    assert len(auth_server.requests) == 2


# When the server is away, or worse.


async def test_while_the_server_is_away_only_unknown_keys_are_turned_away(
    verifier: BetterAuth, auth_server: AuthServer, clock: Clock
) -> None:
    known = auth_server.token(auth_server.new_key())
    await verifier.user_id(known)
    unknown = auth_server.token(auth_server.new_key())
    auth_server.answer = hang_up

    for seconds in (COOLDOWN_SECONDS, REFRESH_SECONDS, STALE_SECONDS, 86_400):
        clock.now += seconds
        assert await outcomes(verifier, [known]) == {USER_ID}
        assert await outcomes(verifier, [unknown]) == {AuthUnavailable}
    auth_server.answer = auth_server.publish
    clock.now += better_auth.FETCH_RETRY_SECONDS

    assert await outcomes(verifier, [unknown, known]) == {USER_ID}
    assert await outcomes(verifier, [auth_server.token(Key.new())]) == {InvalidToken}


async def test_a_server_that_is_away_is_not_flooded(
    verifier: BetterAuth, auth_server: AuthServer, clock: Clock
) -> None:
    auth_server.answer = hang_up
    token = auth_server.token(auth_server.new_key())

    for _ in range(2):
        assert await outcomes(verifier, [token] * 100) == {AuthUnavailable}
    assert auth_server.requests == [JWKS_PATH]
    clock.now += better_auth.FETCH_RETRY_SECONDS
    auth_server.answer = auth_server.publish

    assert await verifier.user_id(token) == USER_ID


def to_the_keys(request: BaseHTTPRequestHandler) -> None:
    server = request.server
    assert isinstance(server, AuthServer)
    if request.path == JWKS_PATH:
        reply(b"", 302, {"Location": f"{server.origin}/elsewhere"})(request)
    else:
        server.publish(request)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(hang_up, id="none"),
        pytest.param(drip, id="one that never ends"),
        pytest.param(flood, id="one that never ends, fast"),
        pytest.param(to_the_keys, id="a redirect"),
        pytest.param(reply(b'{"keys": []}', 500), id="an error"),
        pytest.param(reply(b""), id="nothing"),
        pytest.param(reply(b"<html></html>"), id="HTML"),
        pytest.param(reply(b"\xff\xfe\xff"), id="bytes"),
        pytest.param(reply(b"[" * 100_000), id="deeply nested"),
        pytest.param(reply(b"9" * 100_000), id="a long number"),
        pytest.param(reply(b"[]"), id="a list"),
        pytest.param(reply(b"{}"), id="no keys"),
        pytest.param(reply(b'{"keys": null}'), id="null for keys"),
        pytest.param(reply(b'{"keys": "keys"}'), id="text for keys"),
        pytest.param(reply(b'{"keys": {"keys": []}}'), id="an object for keys"),
        pytest.param(reply(b" " * MAX_JWKS_BYTES + b'{"keys": []}'), id="too large"),
        pytest.param(
            reply(gzip.compress(b'{"keys": []}'), headers={"Content-Encoding": "gzip"}),
            id="packed, though not asked for",
        ),
        pytest.param(
            reply(b'{"keys": []}', headers={"Content-Length": "1000"}), id="less than it promises"
        ),
    ],
)
async def test_an_answer_that_is_no_jwks_is_an_outage_and_stalls_nothing(
    answer: Answer,
    verifier: BetterAuth,
    auth_server: AuthServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(better_auth, "FETCH_SECONDS", 1.0)
    token = auth_server.token(auth_server.new_key())
    auth_server.answer = answer
    pauses = []

    async def watch() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            pauses.append(time.perf_counter() - start)

    watching = asyncio.create_task(watch())
    async with asyncio.timeout(5):
        with pytest.raises(AuthUnavailable):
            await verifier.user_id(token)
    watching.cancel()

    assert auth_server.requests == [JWKS_PATH]
    assert max(pauses) < 0.9  # a fetch that blocks the event loop could take the whole second
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_closing_ends_a_fetch_under_way(
    verifier: BetterAuth, auth_server: AuthServer, caplog: pytest.LogCaptureFixture
) -> None:
    go = Event()
    auth_server.answer = after(go, auth_server.publish)
    token = auth_server.token(auth_server.new_key())
    waiting = asyncio.create_task(verifier.user_id(token))
    await asyncio.sleep(0.05)

    await verifier.aclose()
    async with asyncio.timeout(FETCH_SECONDS / 2):
        await asyncio.wait([waiting])
    go.set()

    assert waiting.cancelled()
    assert caplog.records == []


async def test_no_token_is_logged(
    verifier: BetterAuth, auth_server: AuthServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = auth_server.token(auth_server.new_key())
    auth_server.answer = hang_up

    for text in (token, tampered(auth_server, Key.new())):
        with pytest.raises(AuthUnavailable) as caught:
            await verifier.user_id(text)
        for part in text.split("."):
            assert part not in caplog.text + str(caught.value)


# The app with it.


def test_the_app_takes_tokens_of_better_auth_and_no_others(
    app_client: TestClient, app_server: AuthServer
) -> None:
    key = app_server.new_key()

    taken = app_client.get("/whoami", headers=bearer(app_server.token(key)))
    refused = app_client.get("/whoami", headers=bearer(tampered(app_server, key)))

    assert taken.status_code == 200
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_route_gets_the_id_of_the_user(app_client: TestClient, app_server: AuthServer) -> None:
    key = app_server.new_key()

    answers = [
        app_client.get("/whoami", headers=bearer(app_server.token(key, sub=name)))
        for name in ("ada", "bob")
    ]

    assert [answer.json() for answer in answers] == ["ada", "bob"]


def test_unavailable_with_a_hint_when_to_retry_while_no_key_is_known(
    app_client: TestClient, app_server: AuthServer
) -> None:
    app_server.answer = hang_up

    answer = app_client.get("/whoami", headers=bearer(app_server.token(app_server.new_key())))

    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0


def test_a_slow_auth_server_delays_no_other_request(
    app_client: TestClient, app_server: AuthServer
) -> None:
    go = Event()
    app_server.answer = after(go, app_server.publish)
    headers = bearer(app_server.token(app_server.new_key()))

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(app_client.get, "/whoami", headers=headers)
        while not app_server.requests:
            time.sleep(0.01)
        start = time.perf_counter()
        health = app_client.get("/health")
        seconds = time.perf_counter() - start
        go.set()
        answer = waiting.result()

    assert health.status_code == 200
    assert seconds < FETCH_SECONDS / 2
    assert answer.status_code == 200


def test_with_better_auth_there_are_no_auth_routes(app_client: TestClient) -> None:
    documented = app_client.get("/openapi.json").json()["paths"]

    assert not any(path.startswith("/auth") for path in documented)
    for name in ("register", "login", "refresh", "logout", "password"):
        assert app_client.post(f"/auth/{name}").status_code == 404


def test_the_auth_server_is_not_needed_to_start(
    app_client: TestClient, app_server: AuthServer
) -> None:
    assert app_client.get("/health").status_code == 200
    assert app_server.requests == []


def test_the_docs_ask_for_a_token(app_client: TestClient) -> None:
    schema = app_client.get("/openapi.json").json()

    (scheme,) = schema["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")


def test_the_page_says_where_to_log_in(app_client: TestClient, app_server: AuthServer) -> None:
    app = app_client.get("/home/status").json()["app"]

    assert (app["login"], app["better_auth_url"]) == ("better-auth", app_server.origin)
