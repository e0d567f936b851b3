"""The *floor*: the least that Python can do for the same answers. Nobody should write an app so.

Starlette and psycopg2, one statement a request. It checks the token and nothing else: a wrong body
is a 500. As many threads as the generated project has connections, each with one of its own.

Runs in the generated project's environment, so that both have the same packages.
"""

import asyncio
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import psycopg2
from psycopg2.extras import RealDictCursor
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uuid_utils.compat import uuid7

KEY = bytes.fromhex(os.environ["BENCH_TOKEN_KEY"])
ISSUER = os.environ["BENCH_TOKEN_ISSUER"]
URL = os.environ["BENCH_DATABASE_URL"].replace("+psycopg2", "")
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
of_thread = threading.local()


def connect() -> None:
    connection = psycopg2.connect(URL)
    connection.autocommit = True
    of_thread.cursor = connection.cursor(cursor_factory=RealDictCursor)


threads = ThreadPoolExecutor(int(os.environ["BENCH_CONNECTIONS"]), initializer=connect)


def execute(statement: str, values: tuple[Any, ...]) -> Rows:
    of_thread.cursor.execute(statement, values)
    rows: Rows = of_thread.cursor.fetchall()
    return rows


async def send(statement: str, *values: Any) -> Rows:
    return await asyncio.get_running_loop().run_in_executor(threads, execute, statement, values)


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


async def list_tasks(request: Request) -> Response:
    limit = int(request.query_params.get("limit", "20"))
    if after := request.query_params.get("after"):
        rows = await send(NEXT_PAGE, owner(request), *after.split("_"), limit + 1)
    else:
        rows = await send(FIRST_PAGE, owner(request), limit + 1)
    headers = {}
    tasks = address(request)
    if len(rows) > limit:
        rows.pop()
        after = f"{rows[-1]['created_at']:%Y-%m-%dT%H:%M:%S.%fZ}_{rows[-1]['id']}"
        headers["Link"] = f'<{tasks}?limit={limit}&after={after}>; rel="next"'
    for row in rows:
        row["url"] = f"{tasks}/{row['id']}"
    return answer(rows, headers=headers)


async def create_task(request: Request) -> Response:
    body = json.loads(await request.body())
    values = str(uuid7()), owner(request), body["title"], body.get("description")
    return answer_one(request, await send(INSERT, *values), 201)


async def get_task(request: Request) -> Response:
    task_id = request.path_params["task_id"]
    return answer_one(request, await send(GET, task_id, owner(request)))


async def update_task(request: Request) -> Response:
    body = json.loads(await request.body())
    task_id = request.path_params["task_id"]
    return answer_one(request, await send(UPDATE, body["title"], task_id, owner(request)))


async def delete_task(request: Request) -> Response:
    rows = await send(DELETE, request.path_params["task_id"], owner(request))
    return Response(status_code=204) if rows else answer_one(request, rows)


app = Starlette(
    routes=[
        Route("/tasks", list_tasks, methods=["GET"]),
        Route("/tasks", create_task, methods=["POST"]),
        Route("/tasks/{task_id}", get_task, methods=["GET"]),
        Route("/tasks/{task_id}", update_task, methods=["PATCH"]),
        Route("/tasks/{task_id}", delete_task, methods=["DELETE"]),
    ]
)
