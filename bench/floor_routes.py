"""Statements, routes and responses of both floors.

They differ in how they send a statement to the database: `floor.py` in a thread, `async_floor.py`
on the event loop.
"""

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

import jwt
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan
from uuid_utils.compat import uuid7

CONNECTIONS = int(os.environ["BENCH_CONNECTIONS"])
URL = os.environ["BENCH_DATABASE_URL"]
KEY = bytes.fromhex(os.environ["BENCH_TOKEN_KEY"])
ISSUER = os.environ["BENCH_TOKEN_ISSUER"]
COLUMNS = (
    'id, title, description, completed, "order", priority::text, due_at, created_at, updated_at'
)
INSERT = (
    "INSERT INTO tasks (id, owner_id, title, description) VALUES (%s, %s, %s, %s)"
    f" RETURNING {COLUMNS}"
)
OF_OWNER = f"SELECT {COLUMNS} FROM tasks WHERE owner_id = %s"
NEWEST_FIRST = "ORDER BY created_at DESC, id DESC LIMIT %s"
FIRST_PAGE = f"{OF_OWNER} {NEWEST_FIRST}"
NEXT_PAGE = f"{OF_OWNER} AND (created_at, id) < (%s, %s) {NEWEST_FIRST}"
GET = f"SELECT {COLUMNS} FROM tasks WHERE id = %s AND owner_id = %s"
UPDATE = (
    "UPDATE tasks SET title = %s, updated_at = now() WHERE id = %s AND owner_id = %s"
    f" RETURNING {COLUMNS}"
)
DELETE = "DELETE FROM tasks WHERE id = %s AND owner_id = %s RETURNING id"

Rows = list[dict[str, Any]]
Send = Callable[..., Awaitable[Rows]]  # takes a statement and its values


def owner(request: Request) -> str:
    token = request.headers["authorization"].removeprefix("Bearer ")
    claims = jwt.decode(token, KEY, algorithms=["HS256"], audience=ISSUER, issuer=ISSUER)
    user_id: str = claims["sub"]
    return user_id


def address(request: Request) -> str:
    return f"http://{request.headers['host']}/tasks"


def answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, "application/json")


def answer_one(request: Request, rows: Rows, status: int = 200) -> Response:
    if not rows:
        return answer({"detail": "there is no such task"}, 404)
    rows[0]["url"] = url = f"{address(request)}/{rows[0]['id']}"
    return answer(rows[0], status, {"Location": url} if status == 201 else None)


class Tasks:
    """The routes. Each sends one statement."""

    def __init__(self, send: Send) -> None:
        self.send = send

    async def list(self, request: Request) -> Response:
        limit = int(request.query_params.get("limit", "20"))
        if after := request.query_params.get("after"):
            rows = await self.send(NEXT_PAGE, owner(request), *after.split("_"), limit + 1)
        else:
            rows = await self.send(FIRST_PAGE, owner(request), limit + 1)
        headers = {}
        tasks = address(request)
        if len(rows) > limit:
            rows.pop()
            after = f"{rows[-1]['created_at']:%Y-%m-%dT%H:%M:%S.%fZ}_{rows[-1]['id']}"
            headers["Link"] = f'<{tasks}?limit={limit}&after={after}>; rel="next"'
        for row in rows:
            row["url"] = f"{tasks}/{row['id']}"
        return answer(rows, headers=headers)

    async def create(self, request: Request) -> Response:
        body = json.loads(await request.body())
        values = str(uuid7()), owner(request), body["title"], body.get("description")
        return answer_one(request, await self.send(INSERT, *values), 201)

    async def get(self, request: Request) -> Response:
        task_id = request.path_params["task_id"]
        return answer_one(request, await self.send(GET, task_id, owner(request)))

    async def update(self, request: Request) -> Response:
        body = json.loads(await request.body())
        values = body["title"], request.path_params["task_id"], owner(request)
        return answer_one(request, await self.send(UPDATE, *values))

    async def delete(self, request: Request) -> Response:
        rows = await self.send(DELETE, request.path_params["task_id"], owner(request))
        return Response(status_code=204) if rows else answer_one(request, rows)


def create_app(send: Send, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    tasks = Tasks(send)
    return Starlette(
        routes=[
            Route("/tasks", tasks.list, methods=["GET"]),
            Route("/tasks", tasks.create, methods=["POST"]),
            Route("/tasks/{task_id}", tasks.get, methods=["GET"]),
            Route("/tasks/{task_id}", tasks.update, methods=["PATCH"]),
            Route("/tasks/{task_id}", tasks.delete, methods=["DELETE"]),
        ],
        lifespan=lifespan,
    )
