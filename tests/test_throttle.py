"""Processes that share their rate limits in a Redis or Valkey, as docs/api.md says."""

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

import processes
from app_server import PASSWORD, Answer, AppServer, new_address
from machine import Project
from redis_server import Redis, redis_server
from stage import new_stage
from visitors import at_once, wait_for

GUESSES = 10  # at one account from one address
AWAY, BACK = "rate limits are not shared", "rate limits are shared again"


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with redis_server() as redis:
        yield redis


@pytest.fixture(scope="module")
def sharing(project: Project, redis: Redis, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project, after the command in the message that a package is missing."""
    variables = project.environment | {"THROTTLE_URL": redis.url}
    outcome = replace(project, environment=variables).run(str(project.python), "main.py")
    assert outcome.code != 0
    command = re.search(r"THROTTLE_URL: needs a package; run: (uv .+)", outcome.output)
    assert command, outcome.output
    assert f"`{command[1]}`" in project.read("docs/api.md")

    folder = tmp_path_factory.mktemp("sharing") / "project"
    ignored = shutil.ignore_patterns(".git", ".postgres", ".venv")
    copy = replace(project, path=shutil.copytree(project.path, folder, ignore=ignored))
    installed = copy.run(*command[1].split())
    assert installed.code == 0, installed.output
    counts = copy.path / "auth" / "shared_counts.py"
    text = counts.read_text("utf-8")
    assert "COUNT_SECONDS = 0.5" in text
    # The machine may be busy, and these tests ask a hundred times.
    counts.write_text(text.replace("COUNT_SECONDS = 0.5", "COUNT_SECONDS = 3.0"), "utf-8")
    return copy


@pytest.fixture(scope="module")
def apps(
    sharing: Project, redis: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[AppServer]]:
    """Two processes, with one database."""
    with new_stage(sharing, tmp_path_factory.mktemp("stage")) as stage, ExitStack() as at_the_end:
        yield [
            at_the_end.enter_context(stage.app(name, THROTTLE_URL=redis.url))
            for name in ("first", "second")
        ]


@pytest.fixture
def email(apps: list[AppServer]) -> str:
    """The address of an account."""
    name = secrets.token_hex(8)
    apps[0].register(name)
    return f"{name}@example.com"


def log_in(app: AppServer, email: str, password: str, address: str) -> Answer:
    form = f"username={email}&password={password}"
    return app.request("POST", "/auth/login", form, address=address)


def guess(apps: list[AppServer], email: str, address: str) -> list[int]:
    """Send as many wrong passwords as are allowed, to the apps in turn, and one more to each."""
    turns = [*apps * (GUESSES // len(apps)), *apps]
    return [log_in(app, email, "a wrong one", address).status for app in turns]


def test_processes_count_together(apps: list[AppServer], email: str) -> None:
    address = new_address()

    before = [log_in(apps[0], email, "a wrong one", address).status for _ in range(GUESSES - 1)]
    login = log_in(apps[1], email, PASSWORD, address)
    after = guess(apps, email, address)
    refused = log_in(apps[1], email, PASSWORD, address)

    assert before == [401] * (GUESSES - 1)
    assert login.status == 200  # and resets the count of both
    assert after == [401] * GUESSES + [429] * len(apps)
    assert refused.status == 429
    assert int(refused.headers["Retry-After"]) > 0


def test_while_the_server_is_away_each_process_limits_logins(
    apps: list[AppServer], redis: Redis, email: str
) -> None:
    def log_in_everywhere() -> list[int]:
        return [log_in(app, email, PASSWORD, new_address()).status for app in apps]

    def messages(app: AppServer) -> list[str]:
        return [line["event"] for line in app.lines() if line["event"] in {AWAY, BACK}]

    frozen, gone = apps
    before = log_in_everywhere()
    assert redis.process
    with processes.frozen(redis.process.pid):
        logins = at_once(*[lambda: log_in(frozen, email, PASSWORD, new_address())] * 4)
        guesses = guess([frozen], email, new_address())
    redis.stop()
    login = log_in(gone, email, PASSWORD, new_address())
    guesses_without = guess([gone], email, new_address())
    redis.start()

    def are_back() -> bool:
        return log_in_everywhere() == [200, 200] and all(BACK in messages(app) for app in apps)

    wait_for(are_back)
    afterwards = guess(apps, email, new_address())

    assert before == [200, 200]
    assert [answer.status for answer in [*logins, login]] == [200] * 5
    assert guesses == guesses_without == [401] * GUESSES + [429]
    assert afterwards == [401] * GUESSES + [429] * len(apps)
    for app in apps:
        assert messages(app) == [AWAY, BACK]
        assert redis.password not in app.log.read_text("utf-8")
        assert [line for line in app.lines() if line["level"] == "error"] == []
