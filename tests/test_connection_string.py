"""database=neon: sources of the connection string, its effect, and its secrecy."""

import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from leaks import Watch, leaks, secret_of, watching
from machine import Machine, Outcome, new_machine
from postgres_server import Server, free_port, new_password

NEON = "database=neon"
PROMPT = "Connection string"


@dataclass(frozen=True)
class Generation:
    """A generation with a secret in its connection string, and a record of its programs."""

    machine: Machine
    outcome: Outcome
    watch: Watch

    @property
    def secret(self) -> str:
        """The secret that signs tokens."""
        return secret_of(self.outcome.project)


@pytest.fixture(scope="module")
def generation(
    template: Path, tmp_path_factory: pytest.TempPathFactory, server: Server
) -> Iterator[Generation]:
    """A project on a provider's database, with its URL from the environment."""
    with new_machine(tmp_path_factory.mktemp("neon") / "machine", template) as machine:
        with watching(machine) as watch:
            outcome = machine.generate(NEON, NEON_DATABASE_URL=server.url())
        assert "It is ready" in outcome.output, outcome.output
        yield Generation(machine, outcome, watch)


@pytest.fixture(scope="module")
def connected(generation: Generation) -> Outcome:
    return generation.outcome


@pytest.fixture(scope="module")
def wrong_password() -> str:
    return new_password()


@pytest.fixture(scope="module")
def refused_machine(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with new_machine(tmp_path_factory.mktemp("refused") / "machine", template) as machine:
        yield machine


@pytest.fixture(scope="module")
def refused(refused_machine: Machine, server: Server, wrong_password: str) -> Outcome:
    """A project with a wrong password in its URL."""
    return refused_machine.generate(NEON, NEON_DATABASE_URL=server.url(wrong_password))


def test_the_string_can_come_from_the_environment(connected: Outcome, server: Server) -> None:
    assert f"\nDATABASE_URL={server.url()}\n" in connected.project.read(".env")


def test_the_schema_is_created_and_the_smoke_test_passes(
    connected: Outcome, server: Server
) -> None:
    tables = server.ask("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")

    assert {"users", "tasks", "alembic_version"} <= {name for (name,) in tables}
    assert "✓ connection" in connected.output


def test_no_embedded_server_is_started(connected: Outcome) -> None:
    assert "database" not in re.findall(r"^. ([a-z ]+) \(", connected.output, re.MULTILINE)
    assert not connected.project.data.exists()


def test_the_check_reports_tls(connected: Outcome) -> None:
    outcome = connected.project.run("uv", "run", "manage.py", "check")

    assert outcome.code == 0, outcome.output
    assert "TLS       on (sslmode=require)" in outcome.output


def test_after_success_no_file_git_object_or_output_contains_a_secret(
    generation: Generation, server: Server
) -> None:
    root, output = generation.machine.root, generation.outcome.output

    assert leaks(root, output, server.password, generation.secret) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_no_program_gets_a_secret_that_it_does_not_need(
    generation: Generation, server: Server
) -> None:
    for program in ("uv", "git", "manage.py"):
        assert any(program in command for command in generation.watch.commands), program
    assert generation.watch.leaks(server.password, generation.secret) == set()


def test_a_wrong_password_is_reported_with_what_to_do(refused: Outcome) -> None:
    assert refused.code == 0
    assert "✗ 127.0.0.1:" in refused.output
    assert "wrong password" in refused.output
    assert "uv run manage.py env" in refused.output


def test_no_secret_is_left_anywhere_after_a_failure(
    refused: Outcome, refused_machine: Machine, wrong_password: str
) -> None:
    assert leaks(refused_machine.root, refused.output, wrong_password) == []


def test_an_unreachable_database_is_reported_with_its_address(machine: Machine) -> None:
    port = free_port()

    outcome = machine.generate(NEON, NEON_DATABASE_URL=f"postgresql://ada:x@127.0.0.1:{port}/app")

    assert outcome.code == 0
    assert f"127.0.0.1:{port}: nothing listens on this host and port" in outcome.output
    assert "✗ setup: see above\n    again: uv run manage.py setup\n" in outcome.output
    assert f"\nDATABASE_URL=postgresql://ada:x@127.0.0.1:{port}/app\n" in outcome.project.read(
        ".env"
    )


def test_without_terminal_and_variable_the_output_says_how_to_set_the_string(
    machine: Machine,
) -> None:
    outcome = machine.generate(NEON, DATABASE_URL="postgresql://a:b@other/db")

    env = outcome.project.path / ".env"
    assert "\nDATABASE_URL=postgresql://USER:PASSWORD@HOST/DATABASE\n" in env.read_text("utf-8")
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    assert "✗ settings: there is no connection string yet" in outcome.output
    assert "\n    uv run manage.py setup\n" in outcome.output


def test_a_pasted_string_is_hidden_and_saved(machine: Machine, server: Server) -> None:
    terminal = machine.type("--no-input", NEON)
    terminal.expect(PROMPT)
    terminal.sendline("https://console.neon.tech/s3cr3t")
    terminal.expect("Try again: .*web page")
    terminal.expect(PROMPT)
    half = len(server.url()) // 2
    terminal.send(f"psql '{server.url()[:half]}\n  {server.url()[half:]}'")
    terminal.sendline()
    terminal.expect("Fixed: ")
    terminal.expect("✓.* settings")
    typed = (terminal.before or "") + terminal.read()

    assert "It is ready" in typed
    assert "s3cr3t" not in typed
    assert server.url() in machine.project().read(".env")
    assert leaks(machine.root, typed, server.password) == []
