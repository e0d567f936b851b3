"""Asks the generated project, from inside its own environment, for what no client could have.

Run in the project's folder, with its Python and its modules. Reads a JSON object from standard
input, with `users` and `tasks`, lists of ids; prints one with the key and issuer of tokens, the
number of connections to the database, a token for each user, and for each task the cursor of the
page behind it.
"""

import json
import sys
from typing import Any
from uuid import UUID

import auth
from config import get_settings
from db import create_db_engine
from models import Task
from paging import Cursors, Sort
from sqlmodel import Session

auth.ACCESS_TOKEN_SECONDS = 2 * 3600  # longer than any run


def main() -> None:
    wanted: dict[str, Any] = json.load(sys.stdin)
    settings = get_settings()
    tokens, cursors = auth.OwnTokens(settings), Cursors(settings.better_auth_secret)
    with Session(create_db_engine(settings.database_url)) as session:
        tasks = {task: session.get_one(Task, UUID(task)).model_dump() for task in wanted["tasks"]}
    answer = {
        "key": auth.signing_key(settings).hex(),
        "issuer": auth.ISSUER,
        "connections": settings.db_pool_size,
        "tokens": {user: tokens.issue(user) for user in wanted["users"]},
        "cursors": {task: cursors.write(row, Sort.NEWEST) for task, row in tasks.items()},
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
