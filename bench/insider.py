"""Read what no client can know from inside the generated project.

Run it in the project's folder, with its Python and modules, and one of two commands. Output is
JSON.

`world` reads a JSON object from standard input: `users`, a list of ids; `tasks`, creation times by
id; and a `password`. It prints the tokens' key and issuer, the number of database connections, the
hash of the password, a token for each user, the cursor after each task, and package versions. It
does not query the database.

`sessions` prints seconds: `connect`, for a first connection and a query on it, and `session`, the
median of opening and closing a session with its connection.
"""

import asyncio
import json
import platform
import statistics
import sys
import time
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import auth.tokens
from auth.passwords import Passwords
from config import get_settings
from pagination import Cursors

PACKAGES = ("fastapi", "starlette", "sqlmodel", "sqlalchemy", "psycopg2-binary", "uvicorn")
SESSIONS = 200

auth.tokens.ACCESS_TOKEN_SECONDS = 2 * 3600  # longer than any run


def world() -> dict[str, Any]:
    wanted: dict[str, Any] = json.load(sys.stdin)
    settings = get_settings()
    tokens, cursors = auth.tokens.OwnTokens(settings), Cursors(settings.better_auth_secret)
    packages = [f"{package} {version(package)}" for package in PACKAGES]
    return {
        "key": auth.tokens.signing_key(settings).hex(),
        "issuer": auth.tokens.ISSUER,
        "connections": settings.db_pool_size,
        "password_hash": Passwords.HASHER.hash(wanted["password"]),
        "tokens": {user: tokens.issue(user) for user in wanted["users"]},
        "cursors": {
            task: cursors.write("-created_at", [created, task])
            for task, created in wanted["tasks"].items()
        },
        "software": ", ".join([f"Python {platform.python_version()}", *packages]),
    }


def sessions() -> dict[str, float]:
    return asyncio.run(time_sessions())


async def time_sessions() -> dict[str, float]:
    # Imported here, so that `world` also works on the earlier versions that `profile` compares.
    from db import get_session, open_engine, ping  # noqa: PLC0415
    from starlette.requests import Request  # noqa: PLC0415

    session_of = asynccontextmanager(get_session)
    async with open_engine(get_settings().database_url) as engine:
        start = time.perf_counter()
        await ping(engine)
        connect = time.perf_counter() - start
        taken = []
        for _ in range(SESSIONS):
            start = time.perf_counter()
            async with session_of(engine, Request({"type": "http"})) as session:
                await session.connection()
            taken.append(time.perf_counter() - start)
    return {"connect": connect, "session": statistics.median(taken)}


if __name__ == "__main__":
    print(json.dumps({"world": world, "sessions": sessions}[sys.argv[1]]()))
