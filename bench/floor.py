"""The *floor*: the minimum work in threads. Not a way to write an app.

Starlette and psycopg2, one statement per request. It checks the token and nothing else: an invalid
body is a 500. It has as many threads as the generated project has connections, and one connection
per thread.

Runs in the generated project's environment, so that both use the same packages.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
from floor_routes import CONNECTIONS, URL, Rows, create_app
from psycopg2.extras import RealDictCursor

of_thread = threading.local()


def connect() -> None:
    connection = psycopg2.connect(URL)
    connection.autocommit = True
    of_thread.cursor = connection.cursor(cursor_factory=RealDictCursor)


threads = ThreadPoolExecutor(CONNECTIONS, initializer=connect)


def execute(statement: str, values: tuple[Any, ...]) -> Rows:
    of_thread.cursor.execute(statement, values)
    rows: Rows = of_thread.cursor.fetchall()
    return rows


async def send(statement: str, *values: Any) -> Rows:
    return await asyncio.get_running_loop().run_in_executor(threads, execute, statement, values)


app = create_app(send)
