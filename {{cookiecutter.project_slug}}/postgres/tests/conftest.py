"""Shared fixtures for tests of the engine."""

import asyncio

import pytest

from postgres.tests.asking import Run


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on asyncio's event loop, and on uvloop, which uvicorn prefers."""
    if request.param == "asyncio":
        return asyncio.run
    run: Run = pytest.importorskip("uvloop").run
    return run
