"""database=neon: sources of the connection string, its effect, and its secrecy."""

import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from machine import Machine, Outcome, new_machine
from postgres_server import Server, free_port, new_password

NEON = "database=neon"
PROMPT = "Connection string"


def places_of(secret: str, machine: Machine) -> list[Path]:
    """Return the files that contain a secret, except the project's .env."""
    needle = re.match(r"[\w-]+", secret)  # the part that no encoding changes
    assert needle is not None
    return [
        file
        for file in machine.root.glob("**/*")
        if file.is_file() and file != machine.work / "todo-backend" / ".env"
        if needle[0].encode() in content(file)
    ]


def content(file: Path) -> bytes:
    if file.parent.parent.name == "objects":  # of git
        return zlib.decompress(file.read_bytes())
    return file.read_bytes()


@pytest.fixture(scope="module")
def other_machine(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with new_machine(tmp_path_factory.mktemp("neon") / "machine", template) as machine:
        yield machine


@pytest.fixture(scope="module")
def connected(other_machine: Machine, server: Server) -> Outcome:
    """A project on a provider's database, with its URL from the environment."""
    return other_machine.generate(NEON, NEON_DATABASE_URL=server.url())


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


def test_no_secret_is_left_anywhere_after_success(
    connected: Outcome, other_machine: Machine, server: Server
) -> None:
    assert "It is ready" in connected.output
    assert server.password[:15] not in connected.output
    assert places_of(server.password, other_machine) == []


def test_a_wrong_password_is_reported_with_what_to_do(refused: Outcome) -> None:
    assert refused.code == 0
    assert "✗ 127.0.0.1:" in refused.output
    assert "wrong password" in refused.output
    assert "uv run manage.py env" in refused.output


def test_no_secret_is_left_anywhere_after_a_failure(
    refused: Outcome, refused_machine: Machine, wrong_password: str
) -> None:
    assert wrong_password[:15] not in refused.output
    assert places_of(wrong_password, refused_machine) == []


def test_the_search_for_secrets_finds_committed_ones(
    refused: Outcome, refused_machine: Machine
) -> None:
    """Otherwise the tests above would prove nothing."""
    project = refused.project
    (project.path / "leak.txt").write_text(project.read(".env"), "utf-8")
    project.git("add", "leak.txt")
    (project.path / "leak.txt").unlink()
    secret = re.search(r"s3cr3t-\w+", project.read(".env"))
    assert secret is not None

    (place,) = places_of(secret[0], refused_machine)
    assert place.is_relative_to(project.path / ".git" / "objects")


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
    assert places_of(server.password, machine) == []
