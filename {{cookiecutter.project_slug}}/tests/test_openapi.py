"""Rules that the OpenAPI keeps for every route there will ever be: clients are made from it."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts

import main
from db import get_engine, get_session, get_statement

type Schema = dict[str, Any]


def calls_of(dependant: Dependant) -> set[Any]:
    """Return what a route depends on, directly and indirectly."""
    inner = (calls_of(dependency) for dependency in dependant.dependencies)
    return {dependant.call}.union(*inner)


OPENAPI = main.app.openapi()
SCHEMAS: dict[str, Schema] = OPENAPI["components"]["schemas"]
OPERATIONS: dict[str, Schema] = {
    f"{method.upper()} {path}": operation
    for path, methods in OPENAPI["paths"].items()
    for method, operation in methods.items()
}
ACTIONS = "register login refresh logout verify verify/resend password/forgot password/reset"
WITHOUT_TOKEN = {"GET /health", "GET /ready"} | {f"POST /auth/{name}" for name in ACTIONS.split()}
# Routes that ask the database, themselves or through what they depend on.
ASK_DATABASE = {
    context.name
    for context in iter_route_contexts(main.app.routes)
    if isinstance(context.original_route, APIRoute)
    and calls_of(context.dependant) & {get_engine, get_session, get_statement}
} | {"get_ready"}
BODILESS = {"202", "204", "304"}
PARSED = {"uuid", "date-time", "date", "time", "duration", "email", "uri"}  # hold no arbitrary text

each_operation = pytest.mark.parametrize("name", OPERATIONS)


def answers(name: str) -> dict[str, Schema]:
    """Return what a route answers with, by status."""
    responses: dict[str, Schema] = OPERATIONS[name]["responses"]
    return responses


def model_of(answer: Schema) -> str:
    """Return the name of an answer's model, or of the model that it is a list of."""
    schema = answer["content"]["application/json"]["schema"]
    reference: str = schema.get("items", schema).get("$ref", "")
    return reference.removeprefix("#/components/schemas/")


def names_in(value: Any) -> Iterator[str]:
    """Find the models that a part of the OpenAPI refers to, and those that they refer to."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                name = inner.split("/")[-1]
                yield name
                yield from names_in(SCHEMAS[name])
            else:
                yield from names_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from names_in(inner)


def scalars(value: Any) -> Iterator[Schema]:
    """Find the schemas of single values in what a route takes."""
    if isinstance(value, dict):
        if "$ref" in value:
            yield from scalars(SCHEMAS[value["$ref"].split("/")[-1]])
        elif value.get("type") in {"string", "integer", "number"}:
            yield value
        elif any(option.get("type") == "number" for option in value.get("anyOf", [])):
            # A Decimal may be text, too.
            yield from (option for option in value["anyOf"] if option["type"] == "number")
        else:
            for key, inner in value.items():
                if key not in {"example", "examples", "default"}:
                    yield from scalars(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from scalars(inner)


def test_operation_ids_make_unique_names_of_functions() -> None:
    ids = Counter(operation["operationId"] for operation in OPERATIONS.values())

    odd = [name for name in ids if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)]
    assert odd == [], "name the functions of routes in snake_case"
    assert set(ids.values()) == {1}, f"give each route's function a name of its own: {ids}"


def test_models_have_names_of_their_own() -> None:
    # Two models of one name get their modules' names before it: schemas__health__Problem.
    odd = [name for name in SCHEMAS if not re.fullmatch(r"[A-Z][A-Za-z0-9]+", name)]
    assert odd == [], "give each model a name of its own, in CamelCase"


def test_fastapis_own_errors_are_not_promised() -> None:
    promised = {"HTTPValidationError", "ValidationError"} & SCHEMAS.keys()
    assert not promised, "a route lacks 422: write responses=problems(422), or *BODY with a body"


@each_operation
def test_a_route_has_one_tag_and_says_what_it_does(name: str) -> None:
    tags = OPERATIONS[name].get("tags", [])
    assert len(tags) == 1, "write APIRouter(…, tags=[…])"
    assert OPERATIONS[name].get("description"), "write a docstring: /docs shows it"


@each_operation
def test_a_route_asks_for_a_token_unless_it_is_known_not_to(name: str) -> None:
    assert ("security" in OPERATIONS[name]) == (name not in WITHOUT_TOKEN), (
        f"{name}: ask for `owner_id: CurrentUserId`, or add it to WITHOUT_TOKEN"
    )


@each_operation
def test_a_route_answers_with_named_models(name: str) -> None:
    for status, answer in answers(name).items():
        expected = {"422": "ValidationProblem"}.get(status, "Problem")
        if status in BODILESS:
            assert "content" not in answer
        elif status.startswith("2"):
            assert model_of(answer) in SCHEMAS, "return a model of schemas/, or a list of one"
        else:
            assert "content" in answer, f"write responses=problems({status})"
            assert model_of(answer) == expected, f"write responses=problems({status})"
            assert answer["content"]["application/json"]["example"].keys() == {"detail"}


@each_operation
def test_a_route_names_all_its_statuses(name: str) -> None:
    operation = OPERATIONS[name]
    expected: set[str] = set()
    if "security" in operation:
        expected |= {"401"}
    if "requestBody" in operation:
        expected |= {"400", "413", "422"}
    if "parameters" in operation:
        expected |= {"422"}
    if "security" in operation or operation["operationId"] in ASK_DATABASE:
        expected |= {"503"}

    missing = sorted(expected - answers(name).keys())
    assert missing == [], f"add {', '.join(missing)} to responses=problems(…), or *BODY for a body"


@each_operation
def test_401_and_503_document_their_headers(name: str) -> None:
    headers = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}

    for status, header in headers.items():
        if status in answers(name):
            assert header in answers(name)[status]["headers"]


@each_operation
def test_all_input_has_bounds(name: str) -> None:
    operation = OPERATIONS[name]

    for value in scalars([operation.get("requestBody"), operation.get("parameters")]):
        if value["type"] == "string":
            bounded = value.keys() & {"enum", "const"} or value.get("format") in PARSED
            advice = f"write Annotated[PlainText, Field(max_length=…)]: {value}"
            assert bounded or {"maxLength", "pattern"} <= value.keys(), advice
        else:
            advice = f"write Annotated[…, Field(ge=…, le=…)]: {value}"
            assert {"minimum", "maximum"} <= value.keys(), advice


@pytest.mark.parametrize("name", sorted({*names_in(OPENAPI["paths"])}))
def test_a_model_has_an_example(name: str) -> None:
    model = SCHEMAS[name]
    fields = model.get("properties", {}).values()

    has_example = any("examples" in field for field in [model, *fields])
    is_secret = all(field.get("format") == "password" for field in fields)
    assert has_example or is_secret or "enum" in model, (
        "give a field of the model an example: Annotated[…, Field(examples=[…])]"
    )


def test_bodies_reject_unknown_fields() -> None:
    bodies = [
        content["schema"]
        for operation in OPERATIONS.values()
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items()
        if media_type == "application/json"
    ]

    assert bodies
    lax = {
        name
        for name in names_in(bodies)
        if "properties" in SCHEMAS[name] and SCHEMAS[name].get("additionalProperties") is not False
    }
    assert lax == set(), "bodies inherit from Strict, in schemas/text.py"
