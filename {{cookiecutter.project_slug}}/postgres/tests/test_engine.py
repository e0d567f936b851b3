"""The engine's connections: whether they live, and who gets them."""

import asyncio

import pytest
from sqlalchemy import text

from postgres import engine as engine_module
from postgres.engine import open_engine
from postgres.url import DatabaseUrl


@pytest.mark.parametrize("idle_seconds", [0.0, 30.0])
def test_a_connection_that_died_idle_is_replaced(
    embedded_server: DatabaseUrl, monkeypatch: pytest.MonkeyPatch, idle_seconds: float
) -> None:
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", idle_seconds)
    own_pid = text("SELECT pg_backend_pid()")
    terminate = text("SELECT pg_terminate_backend(:pid, 5000)")

    async def use() -> list[int | None]:
        pids = []
        async with open_engine(embedded_server) as own, open_engine(embedded_server) as other:
            for _ in range(2):
                async with own.connect() as connection:
                    pids.append(await connection.scalar(own_pid))
                async with other.connect() as connection:
                    await connection.execute(terminate, {"pid": pids[-1]})
        return pids

    first, second = asyncio.run(use())
    assert first != second
