"""What the tests of the engine share."""

import asyncio

import pytest

from postgres.tests.asking import Run


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on asyncio's own event loop, and on the one that uvicorn prefers."""
    if request.param == "asyncio":
        return asyncio.run
    run: Run = pytest.importorskip("uvloop").run
    return run
