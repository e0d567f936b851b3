"""Bad input, faults and bugs: each gets an answer in the one shape, and none repeats what was sent.

What there is to send is read from the OpenAPI, so that a new route is tested as it is written.
"""

import http.client
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.testclient import TestClient
from pydantic import Field
from sqlalchemy import TextClause, text

import main
from config import Settings
from db import SessionDep, StatementDep
from errors import MAX_BODY_BYTES, MAX_MISTAKES, MAX_TEXT_CHARACTERS
from postgres.url import DatabaseUrl
from schemas.text import MAX_FIELDS, PlainText, Strict
from tests.conftest import served

type Schema = dict[str, Any]

SENT = "kangaroo"  # part of every value that is sent; must not appear in any response
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
ORIGIN = {"Origin": "http://localhost:3000"}
DEEP = 100_000

OPENAPI = main.app.openapi()
OPERATIONS: list[tuple[str, str, Schema]] = [
    (method.upper(), path, operation)
    for path, methods in OPENAPI["paths"].items()
    for method, operation in methods.items()
]


def resolve(schema: Schema) -> Schema:
    name = schema.get("$ref", "").split("/")[-1]
    return {**OPENAPI["components"]["schemas"][name]} if name else schema


def body_schema(operation: Schema, media_type: str) -> Schema | None:
    content = operation.get("requestBody", {}).get("content", {})
    return resolve(content[media_type]["schema"]) if media_type in content else None


def address(method: str, path: str) -> str:
    """Fill the parameters of a path with well-formed values that do not exist."""
    unknown = {"uuid": uuid4(), "date": "2030-01-31", "date-time": "2030-01-31T12:00:00Z"}
    for parameter in OPENAPI["paths"].get(path, {}).get(method.lower(), {}).get("parameters", []):
        schema = resolve(parameter["schema"])
        other = unknown.get(schema.get("format", ""), schema.get("minimum", SENT))
        value = (schema.get("examples") or schema.get("enum") or [other])[0]
        path = path.replace(f"{{{parameter['name']}}}", str(value))
    return path


BAD_BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": SENT.encode(),
    "cut off": f'{{"{SENT}": '.encode(),
    "null": b"null",
    "a list": f'["{SENT}"]'.encode(),
    "a text": f'"{SENT}"'.encode(),
    "a number": b"7",
    "an unknown field": f'{{"{SENT * 100}": 1}}'.encode(),
    "very many unknown fields": json.dumps(dict.fromkeys(map(str, range(5_000)))).encode(),
    "a lone surrogate as a value": rb'{"title": "\ud800", "email": "\ud800", "x": "\udfff"}',
    "a lone surrogate in a name": rb'{"\ud800": "kangaroo"}',
    "a lone surrogate as bytes": b'{"x": "kangaroo \xed\xa0\x80"}',
    "NUL in a name": rb'{"\u0000": "kangaroo"}',
    "NUL itself": b'{"x": "kangaroo \0"}',
    "invalid UTF-8": b'{"x": "kangaroo \xff"}',
    "UTF-16 cut off": '{"x": "kangaroo"}'.encode("utf-16")[:-1],
    "deeply nested lists": b"[" * DEEP + b"]" * DEEP,
    "deeply nested objects": b'{"x":' * DEEP + b"1" + b"}" * DEEP,
    "a number of many digits": b'{"x": ' + b"7" * 5_000 + b"}",
    "not a number": b'{"x": NaN}',
    "too much": b'{"x": "' + b"kangaroo" * (MAX_BODY_BYTES // 8) + b'"}',
}

NO_TEXT = [7, True, [SENT], {SENT: SENT}]
BAD_TEXT = [f"{SENT} \ud800", f"{SENT} \udfff\ud800", f"{SENT} \0"]
BAD_DATES = [SENT, "", "2030-02-30", "2030-13-01"]
BAD_TIMES = [
    SENT,
    "",
    "2030-01-31",
    "2030-01-31T12:00:00",  # in which zone?
    "2030-02-30T12:00:00Z",
    "0001-01-01T00:00:00+23:59",  # in UTC, before the first day there is
    "9999-12-31T23:59:59-23:59",
    "1893456000",  # seconds since 1970 are guesswork
]
BAD_INTEGERS = [2**31, -(2**31) - 1, 2**63, 10**400, -(10**400)]


def too_long(schema: Schema) -> list[str]:
    return [SENT * schema["maxLength"]] if "maxLength" in schema else []


def bad_values(schema: Schema) -> list[Any]:
    """What a field of a body must not be. Of a type that is not here, it is only null or not."""
    options = [resolve(option) for option in schema.get("anyOf", [schema])]
    types = {option.get("type") for option in options}
    values: list[Any] = [] if "null" in types else [None]
    for option in options:
        match option:
            case {"enum": _}:
                values += [SENT, *NO_TEXT]
            case {"type": "string", "format": "date-time"}:
                values += BAD_TIMES + NO_TEXT
            case {"type": "string", "format": "date"}:
                values += BAD_DATES + NO_TEXT
            case {"type": "string"} if "number" in types:  # a Decimal may be text, too
                values += [SENT, [SENT], {SENT: SENT}]
            case {"type": "string"}:
                values += BAD_TEXT + NO_TEXT + too_long(option)
            case {"type": "integer"}:
                values += [*BAD_INTEGERS, 1.5, float("nan"), float("inf"), "7", True, SENT, [7]]
            case {"type": "boolean"}:
                values += ["true", "yes", 1, 0, SENT, [True]]
    return values


GOOD = {
    "uuid": "019a8f3e-5c1d-7b2a-9e4f-0123456789ab",
    "date-time": "2030-01-31T12:00:00Z",
    "date": "2030-01-31",
    "time": "12:00:00",
    "duration": "PT1H",
}


def good_values(schema: Schema) -> list[Any]:
    """What a field of a body may be, of the types that JSON writes as text."""
    options = [resolve(option) for option in schema.get("anyOf", [schema])]
    return [GOOD[option["format"]] for option in options if option.get("format") in GOOD] + [
        value for option in options for value in option.get("enum", [])
    ]


def bad_parameters(schema: Schema) -> list[str]:
    """Return bad values for a parameter in a query or a path, encoded as in a URL."""
    values: list[str] = []
    for option in [resolve(option) for option in schema.get("anyOf", [schema])]:
        match option:
            case {"enum": _} | {"type": "boolean"} | {"format": "uuid" | "date"}:
                values += [SENT, "%00", "%FF", "%ED%A0%80", SENT * 1000]
            case {"type": "string", "format": "date-time"}:
                values += [quote(value) for value in BAD_TIMES] + ["%00"]
            case {"type": "string"}:
                values += ["%00", *too_long(option)]
            case {"type": "integer"}:
                values += [SENT, "%00", "1.5", "", "7" * 5_000, *map(str, BAD_INTEGERS)]
                values += [str(option["minimum"] - 1)] if "minimum" in option else []
                values += [str(option["maximum"] + 1)] if "maximum" in option else []
    return values


def with_body(media_type: str) -> list[Any]:
    return [
        pytest.param(method, path, schema, id=f"{method} {path}")
        for method, path, operation in OPERATIONS
        if (schema := body_schema(operation, media_type))
    ]


WELL_FORMED = [
    pytest.param(method, path, name, value, id=f"{method} {path} {name} {value}")
    for method, path, operation in OPERATIONS
    for name, field in (body_schema(operation, "application/json") or {})
    .get("properties", {})
    .items()
    for value in good_values(field)
]
PARAMETERS = [
    pytest.param(method, path, parameter, id=f"{method} {path} {parameter['name']}")
    for method, path, operation in OPERATIONS
    for parameter in operation.get("parameters", [])
]
SECURED = [
    pytest.param(method, path, id=f"{method} {path}")
    for method, path, operation in OPERATIONS
    if "security" in operation
]

probe = APIRouter(prefix="/probe")


class Note(Strict):
    text: Annotated[PlainText, Field(max_length=100)]


@probe.get("/ok")
async def ok(statement: StatementDep) -> None:
    await statement.all(text("SELECT 1"))


@probe.post("/json")
async def take_json(note: Note) -> None:
    assert note


@probe.get("/bug")
async def bug() -> None:
    raise RuntimeError(SENT)


@probe.get("/bug-in-thread")
def bug_in_thread() -> None:
    raise RuntimeError(SENT)


@probe.get("/refusal")
async def refusal() -> None:
    raise HTTPException(418, "a teapot", headers={"X-Kind": "oolong"})


@probe.get("/value")
async def value(session: SessionDep) -> None:
    await session.scalar(text(f"SELECT CAST('{SENT}' AS integer)"))


def failing(sqlstate: str) -> TextClause:
    """Return a statement that the server refuses, with that code."""
    return text(f"DO $$ BEGIN RAISE EXCEPTION '{SENT}' USING ERRCODE = '{sqlstate}'; END $$")


@probe.get("/statement")
async def fail_in_statement(statement: StatementDep, sqlstate: str) -> None:
    await statement.all(failing(sqlstate))


@probe.get("/session")
async def fail_in_session(session: SessionDep, sqlstate: str) -> None:
    await session.scalar(failing(sqlstate))


@probe.get("/no-right")
async def use_no_right(session: SessionDep) -> None:
    await (await session.connection()).execute(text("SET LOCAL ROLE pg_monitor"))
    await session.scalar(text("SELECT * FROM pg_authid"))


@pytest.fixture(scope="module")
def app(settings: Settings) -> FastAPI:
    app = main.create_app(settings)
    app.include_router(probe)
    return app


@pytest.fixture(scope="module")
def caller(app: FastAPI, token_for: Callable[[str], str]) -> Iterator[TestClient]:
    """A client that is logged in, and fails the test when the app raises."""
    with TestClient(app) as client:
        client.headers["Authorization"] = f"Bearer {token_for(str(uuid4()))}"
        yield client


@pytest.fixture(scope="module")
def browser(app: FastAPI, caller: TestClient) -> TestClient:
    """A client that takes a 500 for an answer, as browsers do."""
    client = TestClient(app, raise_server_exceptions=False, headers={**caller.headers, **ORIGIN})
    client.portal = caller.portal
    return client


@pytest.fixture(scope="module")
def port(settings: Settings) -> Iterator[int]:
    """An app behind a real server and a real socket."""
    app = main.create_app(settings)
    app.include_router(probe)
    with served(app) as port:
        yield port


def refusal_of(answer: Any) -> list[Schema]:
    """Check that an answer is a 4xx in the documented shape. Returns its mistakes, if any."""
    assert 400 <= answer.status_code < 500, answer.text
    assert SENT * (MAX_TEXT_CHARACTERS // len(SENT) + 1) not in answer.text
    assert len(answer.content) < 10_000
    detail = answer.json()["detail"]
    if answer.status_code != 422:
        assert isinstance(detail, str)
        assert SENT not in detail
        return []
    for mistake in detail:
        assert mistake.keys() == {"type", "loc", "msg"}
        assert SENT not in mistake["msg"]
    assert detail
    return list(detail)


@pytest.mark.parametrize(("method", "path", "_schema"), with_body("application/json"))
def test_a_bad_body_is_refused(caller: TestClient, method: str, path: str, _schema: Schema) -> None:
    for kind, body in BAD_BODIES.items():
        answer = caller.request(method, address(method, path), content=body, headers=JSON)

        places = {mistake["loc"][0] for mistake in refusal_of(answer)}
        assert answer.status_code in {400, 413, 422}, kind
        assert places <= {"body"}, "give the parameters of the path an example: Path(examples=[…])"


@pytest.mark.parametrize(("method", "path", "schema"), with_body("application/json"))
def test_a_bad_value_is_refused_by_name(
    caller: TestClient, method: str, path: str, schema: Schema
) -> None:
    left = {name: bad_values(field) for name, field in schema.get("properties", {}).items()}
    # Several fields at once, but so few that all mistakes are listed: one for each type of a field,
    # and one for each required field that is missing.
    at_once = max(1, (MAX_MISTAKES - len(schema.get("required", []))) // 4)
    while names := [name for name in left if left[name]][:at_once]:
        body = {name: left[name].pop() for name in names}

        answer = caller.request(
            method, address(method, path), content=json.dumps(body), headers=JSON
        )

        places = [mistake["loc"][:2] for mistake in refusal_of(answer)]
        for name, value in body.items():
            # Python reads no number of more than 4,300 digits, and then nobody knows its field.
            assert ["body", name] in places, (name, value, answer.text)


@pytest.mark.parametrize(("method", "path", "name", "value"), WELL_FORMED)
def test_a_value_that_json_writes_as_text_is_accepted(
    caller: TestClient, method: str, path: str, name: str, value: Any
) -> None:
    answer = caller.request(method, address(method, path), json={name: value})

    kinds = {
        mistake["type"]
        for mistake in (answer.json()["detail"] if answer.status_code == 422 else [])
        if mistake["loc"] == ["body", name]
    }
    assert not [kind for kind in kinds if kind == "is_instance_of" or kind.endswith("_type")], (
        "Strict takes no text for it: write Annotated[…, Field(strict=False)], as schemas/text.py"
    )


@pytest.mark.parametrize(("method", "path", "parameter"), PARAMETERS)
def test_a_bad_parameter_is_refused_by_name(
    caller: TestClient, method: str, path: str, parameter: Schema
) -> None:
    name, place, full = parameter["name"], parameter["in"], address(method, path)
    for value in bad_parameters(parameter["schema"]):
        if place == "path" and not value:
            continue  # the address of another route
        if place == "header" and value == "%00":
            continue  # three characters like others
        in_query, in_path = f"{full}?{name}={value}", path.replace(f"{{{name}}}", value)
        url = {"query": in_query, "path": in_path, "header": full}[place]
        headers = {name: value} if place == "header" else {}

        answer = caller.request(method, url, headers=headers)

        places = [mistake["loc"] for mistake in refusal_of(answer)]
        assert [place, name] in places, (name, value, answer.text)


@pytest.mark.parametrize(("method", "path", "schema"), with_body(FORM["Content-Type"]))
def test_a_bad_form_is_refused(caller: TestClient, method: str, path: str, schema: Schema) -> None:
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    names = list(schema["properties"])
    forms: list[tuple[bytes, dict[str, str]]] = [
        (b"", {}),
        (b"", FORM),
        (b'{"kangaroo": 1}', JSON),
        (b"\xff\xfe=\xff&%FF=%FF&%00=%00", FORM),
        (b"&".join(b"kangaroo=%d" % number for number in range(2_000)), FORM),
        (b"kangaroo=" + b"7" * MAX_BODY_BYTES, FORM),
        (b"kangaroo", multipart),
        (b"kangaroo", {"Content-Type": "multipart/form-data"}),
        (b'--x\r\nContent-Disposition: form-data; name="kangaroo', multipart),
        *((f"{name}=%00".encode(), FORM) for name in names),
        *((f"{name}=".encode() + b"kangaroo" * 10_000, FORM) for name in names),
    ]
    for form, headers in forms:
        url = address(method, path)
        refusal_of(caller.request(method, url, content=form, headers=headers))


@pytest.mark.parametrize(("method", "path", "_schema"), with_body("application/json"))
def test_only_json_content_types_are_accepted(
    caller: TestClient, method: str, path: str, _schema: Schema
) -> None:
    body = b'{"title": "kangaroo"}'
    for content_type in (b"", b"text/plain", b"\xff", b"application/", b"x" * 10_000):
        headers = {b"Content-Type": content_type}

        answer = caller.request(method, address(method, path), content=body, headers=headers)

        refusal_of(answer)
        assert answer.status_code in {415, 422}, content_type


@pytest.mark.parametrize(("method", "path"), SECURED)
def test_a_request_without_a_good_token_is_refused(
    caller: TestClient, method: str, path: str
) -> None:
    credentials: list[bytes] = [
        b"",
        b"kangaroo",
        b"Bearer",
        b"Bearer ",
        b"Bearer kangaroo",
        b"Bearer \xff\xfe",
        b"Bearer " + b"." * 10_000,
        b"Bearer e30.e30.e30",
        b"Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ.",  # alg: none
        b"Basic a2FuZ2Fyb28=",
    ]
    headers = [{}, *({b"Authorization": credential} for credential in credentials)]
    stranger, url = TestClient(caller.app), address(method, path)
    stranger.portal = caller.portal
    for header in headers:
        answer = stranger.request(method, url, headers=header)

        refusal_of(answer)
        assert answer.status_code == 401, header
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "[::1"},
        {"Host": "kangaroo:99999999"},
        {"Host": "\xff"},
        {"Host": ""},
        {"Host": "kangaroo/?#@"},
        {"Origin": "\xff"},
        {"Cookie": "\xff=\xff; ;;"},
        {"X-Request-ID": "\xff"},
        {"X-Forwarded-For": "kangaroo"},
        {"X-Forwarded-Proto": "kangaroo"},
        {"Accept": "\xff"},
        {"Range": "bytes=-"},
        {"Content-Length": "-1"},
    ],
    ids=str,
)
def test_unusual_headers_cause_no_500(caller: TestClient, headers: dict[str, str]) -> None:
    raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}

    answers = [
        caller.get("/health", headers=raw),
        caller.get("/probe/ok", headers=raw),
        caller.post("/probe/json", headers=raw, json={"text": "odd"}),
    ]

    assert {answer.status_code for answer in answers} <= {200, 400}


def test_only_the_first_errors_are_listed(caller: TestClient) -> None:
    fields = dict.fromkeys(map(str, range(MAX_FIELDS)))

    answer = caller.post("/probe/json", json=fields)

    assert len(refusal_of(answer)) == MAX_MISTAKES


def test_unknown_routes_and_methods_have_the_same_shape(caller: TestClient) -> None:
    not_found = caller.get(f"/{SENT}")
    not_allowed = caller.post("/health")

    assert (not_found.status_code, not_found.json()) == (404, {"detail": "Not Found"})
    assert (not_allowed.status_code, not_allowed.json()) == (405, {"detail": "Method Not Allowed"})
    assert not_allowed.headers["Allow"] == "GET"


def test_an_http_exception_of_a_route_is_unchanged(caller: TestClient) -> None:
    answer = caller.get("/probe/refusal")

    assert (answer.status_code, answer.json()) == (418, {"detail": "a teapot"})
    assert answer.headers["X-Kind"] == "oolong"


@pytest.mark.parametrize("path", ["/probe/bug", "/probe/bug-in-thread"])
def test_a_bug_is_a_500_with_only_a_request_id(browser: TestClient, path: str) -> None:
    answer = browser.get(path, headers={"X-Request-ID": "id-of-a-proxy"})

    assert answer.status_code == 500
    assert answer.json() == {"detail": "internal error", "request_id": "id-of-a-proxy"}
    assert answer.headers["X-Request-ID"] == "id-of-a-proxy"
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN["Origin"]


def test_a_bug_fails_a_test(caller: TestClient) -> None:
    with pytest.raises(RuntimeError, match=SENT):
        caller.get("/probe/bug")


def test_a_value_that_only_the_database_rejects_is_a_422(caller: TestClient) -> None:
    answer = caller.get("/probe/value")

    (mistake,) = refusal_of(answer)
    assert answer.status_code == 422
    assert mistake["type"] == "database_value"


def test_without_a_database_requests_get_a_503(
    nowhere: DatabaseUrl, settings_for: Callable[..., Settings]
) -> None:
    app = main.create_app(settings_for(nowhere))
    app.include_router(probe)
    with TestClient(app) as client:
        answers = [client.get("/probe/ok"), client.get("/probe/value")]

    for answer in answers:
        assert answer.status_code == 503
        assert answer.json() == {"detail": "the database does not answer"}
        assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize("way", ["statement", "session"])
@pytest.mark.parametrize(
    "sqlstate",
    [
        "08006",  # connection_failure
        "08P01",  # protocol_violation: PgBouncer's word for all that it has to say
        "25006",  # read_only_sql_transaction
        "25P03",  # idle_in_transaction_session_timeout
        "40P01",  # deadlock_detected
        "42P01",  # undefined_table
        "42703",  # undefined_column
        "42P10",  # invalid_column_reference: no index for ON CONFLICT
        "53200",  # out_of_memory
        "53300",  # too_many_connections
        "55P03",  # lock_not_available
        "57014",  # query_canceled
        "57P01",  # admin_shutdown
        "57P03",  # cannot_connect_now
        "58030",  # io_error
        "XX000",  # internal_error: Neon's proxy
        "XX001",  # data_corrupted
    ],
)
def test_a_database_fault_is_a_503(caller: TestClient, way: str, sqlstate: str) -> None:
    answer = caller.get(f"/probe/{way}?sqlstate={sqlstate}")

    assert answer.status_code == 503
    assert SENT not in answer.text
    assert int(answer.headers["Retry-After"]) > 0
    assert caller.get("/probe/ok").status_code == 200


@pytest.mark.parametrize("way", ["statement", "session"])
def test_a_full_disk_is_a_507(caller: TestClient, way: str) -> None:
    answer = caller.get(f"/probe/{way}?sqlstate=53100")

    assert answer.status_code == 507
    assert answer.json() == {"detail": "the database has no space left"}
    assert "Retry-After" not in answer.headers


@pytest.mark.parametrize("way", ["statement", "session"])
@pytest.mark.parametrize("sqlstate", ["42601", "25001", "P0001"])
def test_an_invalid_statement_is_a_500(browser: TestClient, way: str, sqlstate: str) -> None:
    answer = browser.get(f"/probe/{way}?sqlstate={sqlstate}")

    assert answer.status_code == 500
    assert SENT not in answer.text


def test_a_missing_privilege_is_a_503(caller: TestClient) -> None:
    answer = caller.get("/probe/no-right")

    assert (answer.status_code, answer.json()) == (503, {"detail": "the database refuses the app"})


def in_chunks(size: int) -> Iterator[bytes]:
    yield from itertools.repeat(b"7" * 1_000, size // 1_000)


@pytest.mark.parametrize("chunked", [False, True], ids=["with Content-Length", "in chunks"])
def test_a_large_body_is_refused(browser: TestClient, chunked: bool) -> None:
    size = MAX_BODY_BYTES + 1_000
    body = in_chunks(size) if chunked else b"7" * size

    answer = browser.post("/probe/json", content=body, headers=JSON)

    assert answer.status_code == 413
    assert answer.json() == {"detail": f"the body is larger than {MAX_BODY_BYTES} bytes"}
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN["Origin"]
    assert answer.headers["X-Request-ID"]


def test_a_body_at_the_limit_is_read(caller: TestClient) -> None:
    answer = caller.post("/probe/json", content=b" " * MAX_BODY_BYTES, headers=JSON)

    assert answer.status_code == 422


@pytest.mark.parametrize("chunked", [False, True], ids=["with Content-Length", "in chunks"])
def test_a_large_body_is_refused_over_a_real_socket(port: int, chunked: bool) -> None:
    size = 10 * MAX_BODY_BYTES
    length = {} if chunked else {"Content-Length": str(size)}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    connection.request(
        "POST",
        "/probe/json",
        body=in_chunks(size),
        headers=JSON | length,
        encode_chunked=chunked,
    )
    answer = connection.getresponse()

    assert answer.status == 413
    assert "detail" in json.load(answer)
    connection.close()
