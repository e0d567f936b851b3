"""The engine, the sessions and the schema, on a real PostgreSQL."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from alembic import command
from conftest import settings_for
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, exc, func, inspect, text
from sqlmodel import Session, col, select

import db
import migrations
from database_url import DatabaseUrl
from db import SessionDep, create_db_and_tables, create_db_engine, ping
from main import create_app
from models import Priority, RefreshToken, Task, User

ADA = {"email": "ada@example.com", "password_hash": "…", "name": "Ada"}


def app_with_slow_route(url: DatabaseUrl, *, pool_size: int) -> FastAPI:
    """Return the app with the kind of route that a tutorial shows: sync, with a session."""
    app = create_app(settings_for(url, db_pool_size=pool_size))
    router = APIRouter()

    @router.get("/slow")
    def slow(session: SessionDep) -> dict[str, int]:
        return {"answer": session.scalar(text("SELECT 42 FROM pg_sleep(0.05)")) or 0}

    app.include_router(router)
    return app


def test_ping_tells_the_seconds_of_a_round_trip(engine: Engine) -> None:
    assert 0 < ping(engine) < 3


def test_ping_fails_when_nothing_listens(server: DatabaseUrl) -> None:
    with pytest.raises(exc.OperationalError, match="refused"):
        ping(create_db_engine(server.replace(port=1)))


def test_a_session_commits_only_when_told(new_database: Callable[[], DatabaseUrl]) -> None:
    engine = create_db_engine(new_database())
    create_db_and_tables(engine)

    with Session(engine) as session:
        session.add(User(**ADA))
        session.flush()
    with Session(engine) as session:
        forgotten = session.exec(select(func.count()).select_from(User)).one()
        session.add(User(**ADA))
        session.commit()
    with Session(engine) as session:
        kept = session.exec(select(func.count()).select_from(User)).one()

    engine.dispose()
    assert (forgotten, kept) == (0, 1)


def test_the_database_fills_in_defaults(session: Session) -> None:
    task = Task(owner_id="someone", title="Write a test")
    session.add(task)
    session.commit()
    session.refresh(task)

    assert (task.completed, task.priority, task.order) == (False, Priority.MEDIUM, None)
    assert task.created_at == task.updated_at
    assert task.created_at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - task.created_at) < timedelta(minutes=5)


def test_ids_grow_in_the_order_of_creation(session: Session) -> None:
    titles = [str(number) for number in range(50)]
    for title in titles:
        session.add(Task(owner_id="someone", title=title))
        session.commit()

    assert session.exec(select(Task.title).order_by(col(Task.id))).all() == titles


def test_an_email_belongs_to_one_account(session: Session) -> None:
    session.add(User(**ADA))
    session.commit()
    session.add(User(**ADA))

    with pytest.raises(exc.IntegrityError, match="ix_users_email"):
        session.commit()


def test_a_deleted_account_takes_its_refresh_tokens_along(session: Session) -> None:
    user = User(**ADA)
    session.add(user)
    session.commit()
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    token = RefreshToken(
        user_id=user.id, family_id=user.id, token_hash=b"0" * 32, expires_at=tomorrow
    )
    session.add(token)
    session.commit()

    session.delete(user)
    session.commit()

    assert session.exec(select(RefreshToken)).all() == []


def test_an_unknown_priority_is_refused_by_the_table(session: Session) -> None:
    statement = text(
        "INSERT INTO tasks (id, owner_id, title, priority)"
        " VALUES (gen_random_uuid(), 'someone', 'x', 'urgent')"
    )

    with pytest.raises(exc.IntegrityError, match="ck_tasks_priority"):
        session.execute(statement)


def test_migrations_and_models_agree(database_url: DatabaseUrl) -> None:
    command.check(migrations.alembic_config(database_url))  # raises on a difference


def test_tables_from_the_models_are_those_of_the_migrations(
    engine: Engine, new_database: Callable[[], DatabaseUrl]
) -> None:
    scratch = create_db_engine(new_database())

    create_db_and_tables(scratch)
    create_db_and_tables(scratch)  # tables that are there are left alone

    assert describe(scratch) == {
        table: columns for table, columns in describe(engine).items() if table != "alembic_version"
    }
    scratch.dispose()


def describe(engine: Engine) -> dict[str, list[str]]:
    inspector = inspect(engine)
    return {
        table: [
            *sorted(
                f"{column['name']} {column['type']!r} {column['nullable']} {column['default']}"
                for column in inspector.get_columns(table)
            ),
            *sorted(str(index["name"]) for index in inspector.get_indexes(table)),
            *sorted(str(check["name"]) for check in inspector.get_check_constraints(table)),
            *sorted(str(key["name"]) for key in inspector.get_foreign_keys(table)),
        ]
        for table in inspector.get_table_names()
    }


def test_every_migration_can_be_taken_back(new_database: Callable[[], DatabaseUrl]) -> None:
    url = new_database()
    migrations.upgrade(url)

    command.downgrade(migrations.alembic_config(url), "base")

    engine = create_db_engine(url)
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_replicas_that_migrate_at_once_take_turns(
    new_database: Callable[[], DatabaseUrl],
) -> None:
    url = new_database()

    with ThreadPoolExecutor(4) as replicas:
        list(replicas.map(migrations.upgrade, [url] * 4))  # raises what a replica raised

    engine = create_db_engine(url)
    assert "tasks" in inspect(engine).get_table_names()
    engine.dispose()


def test_a_connection_that_died_idle_is_replaced(
    database_url: DatabaseUrl, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "IDLE_SECONDS", 0.05)
    own = create_db_engine(database_url)
    with own.connect() as connection:
        pid = connection.scalar(text("SELECT pg_backend_pid()"))
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    time.sleep(0.1)

    with own.connect() as connection:
        assert connection.scalar(text("SELECT pg_backend_pid()")) != pid
    own.dispose()


def test_more_requests_than_connections_and_threads_are_all_answered(
    database_url: DatabaseUrl,
) -> None:
    app = app_with_slow_route(database_url, pool_size=5)

    with TestClient(app) as client, ThreadPoolExecutor(100) as clients:
        answers = list(clients.map(lambda _: client.get("/slow"), range(100)))

    assert [answer.status_code for answer in answers] == [200] * 100


def test_a_request_that_waits_too_long_for_a_connection_gets_a_503(
    database_url: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "WAIT_SECONDS", 0.2)
    app = app_with_slow_route(database_url, pool_size=1)

    with TestClient(app) as client, ThreadPoolExecutor(30) as clients:
        answers = list(clients.map(lambda _: client.get("/slow"), range(30)))

    assert {answer.status_code for answer in answers} == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.json() == {"detail": "all connections are in use"}
    assert int(refused.headers["Retry-After"]) > 0


def test_no_connection_is_held_after_an_answer(database_url: DatabaseUrl) -> None:
    app = app_with_slow_route(database_url, pool_size=2)

    with TestClient(app) as client:
        client.get("/slow")

        assert app.state.database.engine.pool.checkedout() == 0
