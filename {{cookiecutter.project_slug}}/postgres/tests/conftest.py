"""Shared fixtures for tests of the engine, and the settings of Hypothesis."""

import asyncio

import pytest
from hypothesis import settings

from postgres.tests.asking import Run

# Hypothesis uses a fixed seed and measures no time, so that a test fails only because of a change.
# To try other examples: pytest --hypothesis-profile=random --hypothesis-seed=NUMBER
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", derandomize=False, deadline=None, print_blob=True)
settings.load_profile("fixed")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on asyncio's event loop, and on uvloop, which uvicorn prefers."""
    if request.param == "asyncio":
        return asyncio.run
    run: Run = pytest.importorskip("uvloop").run
    return run
