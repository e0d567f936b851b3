"""Secrets are only in `.env`, readable by its owner: after failures, and when the app runs.

tests/test_connection_string.py is about success.
"""

import base64
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest

from leaks import Watch, forms, holds, leaks, local_secrets, secret_of, watching
from machine import UV, Machine, Project
from postgres_server import Server, free_port

NEON = "database=neon"
PROMPT = "Connection string"
AGAIN = "--overwrite-if-exists"

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def plant() -> str:
    """Return a password with characters that URLs, shells and JSON escape."""
    return f"s3cr3t-{secrets.token_hex(12)}/@:é %\"'-{secrets.token_hex(12)}"


def url_with(password: str, port: int = 1) -> str:
    return f"postgresql://ada:{quote(password, safe='')}@127.0.0.1:{port}/app?sslmode=disable"


# The search itself: without these tests, those below would prove nothing


@pytest.mark.parametrize(
    "spell",
    [
        str,
        lambda text: quote(text, safe=""),
        lambda text: json.dumps({"a": f"x{text}"}),
        lambda text: repr([text]),
        lambda text: text[::-1],
        lambda text: text.encode().hex(),
        lambda text: base64.b64encode(f"ada:{text}@".encode()).decode(),
        lambda text: base64.b64encode(f"ad:{text}@".encode()).decode(),
        lambda text: base64.urlsafe_b64encode(f"a:{text}@".encode()).decode(),
        lambda text: text.partition("@")[0],
        lambda text: text.rpartition("@")[2],
        lambda text: text[:19],
        lambda text: text[-12:],
    ],
)
def test_the_search_finds_a_secret_in_any_encoding(spell: "type[str]") -> None:
    secret = plant()

    assert holds(f"some text {spell(secret)} and more", forms(secret))
    assert not holds(f"some text {spell(plant())} and more", forms(secret))


def test_the_search_finds_files_git_objects_and_readable_env_files(machine: Machine) -> None:
    secret = plant()
    git = ["git", "-C", str(machine.work)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    hash_it = [*git, "hash-object", "-w", "--stdin"]
    subprocess.run(hash_it, check=True, input=quote(secret).encode(), capture_output=True)
    (machine.home / "wide").write_bytes(secret.encode("utf-16"))
    (machine.temp / "coded").write_bytes(base64.b64encode(secret.encode()))
    for name, mode in (("open", 0o644), ("closed", 0o600)):
        (machine.work / name).mkdir()
        env = machine.work / name / ".env"
        env.write_text(f"DATABASE_URL={url_with(secret)}\n", "utf-8")
        env.chmod(mode)

    found = leaks(machine.root, f"-- {secret[:20]}", secret)

    assert sorted(found) == [
        "an object in work/.git",
        "home/wide",
        "temp/coded",
        "the output",
        "work/open/.env",
    ]


@linux
def test_the_search_covers_command_lines_and_environments(machine: Machine) -> None:
    secret = plant()
    environment = machine.environment

    variables = environment | {"A": url_with(secret)}
    command = ["sh", "-c", "read line", "sh", secret]
    expected = {"the environment of sleep 60", "the command line of sh"}

    with (
        watching(machine) as watch,
        subprocess.Popen(["sleep", "60"], env=variables) as sleep,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as shell,
    ):
        limit = time.monotonic() + 20
        while watch.leaks(secret) != expected and time.monotonic() < limit:
            time.sleep(0.05)
        sleep.kill()
        shell.kill()

    assert watch.leaks(secret) == expected


def test_a_program_that_has_no_command_line_yet_is_looked_at_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its command line, nothing says whether it may know a secret."""
    environment = f"HOME={machine.home}".encode()
    files = {"/proc/7/cmdline": [b"", b"sleep\0"], "/proc/7/environ": [environment] * 2}
    monkeypatch.setattr("leaks.os.listdir", lambda _folder: ["7"])
    monkeypatch.setattr("leaks.read", lambda path: files[path].pop(0))
    watch, foreign = Watch(machine), set[str]()

    watch.look(foreign)
    first = set(watch.seen)
    watch.look(foreign)

    assert (first, watch.seen, foreign) == (set(), {(b"sleep\0", environment)}, set())


# After failures: programs record what they know, and fail or wait in one step


# Records its environment and command line, where the search finds them.
RECORDER = """
case "$*" in *setup*) exec "$REAL" "$@";; esac
{{ env; echo "$@"; }} >> "$HOME/record" 2>&1
case "$*" in *{word}*) {mishap};; esac
exec "$REAL" "$@"
"""
FAIL = "echo 'it failed'; env; exit 1"
WAIT = 'touch "$HOME/now"; exec sleep 60'
STEPS = {"dependencies": ("uv", "python"), "git": ("git", "commit")}  # a program, and its word


def prepare(machine: Machine, step: str, then: str) -> None:
    """Install such programs on the machine."""
    for name, (program, word) in STEPS.items():
        script = RECORDER.format(word=word if name == step else "no-such-word", mishap=then)
        machine.environment["PATH"] = machine.path_with(program, script)
        if program == "uv":
            machine.environment["UV"] = machine.fake_uv(script.replace("$REAL", "$UV"))


@pytest.mark.parametrize("step", STEPS)
def test_after_a_failed_step_the_secret_is_only_in_env(
    machine: Machine, server: Server, step: str
) -> None:
    prepare(machine, step, FAIL)

    outcome = machine.generate(NEON, NEON_DATABASE_URL=server.url())

    assert f"✗ {step}: " in outcome.output
    assert (machine.home / "record").exists()
    assert (outcome.project.path / ".env").exists() == (step == "git")
    assert leaks(machine.root, outcome.output, server.password) == []


@linux
@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("--encoding=UTF8", "--encoding=other"), "initdb: error: ", id="initdb"),
        pytest.param(("CREATE DATABASE %I", "CREATE nothing %I"), "syntax error", id="psql"),
    ],
)
def test_after_a_failed_database_step_the_password_is_only_in_env(
    machine: Machine, words: tuple[str, str], message: str
) -> None:
    machine.template = Path(shutil.copytree(machine.template, machine.root / "template"))
    path = machine.template / "{{cookiecutter.project_slug}}" / "postgres" / "embedded.py"
    path.write_text(path.read_text("utf-8").replace(*words), "utf-8")

    with watching(machine) as watch:
        outcome = machine.generate()

    secrets_there = local_secrets(outcome.project)
    assert re.search(rf"(?s)✗ .*{message}.*✗ setup: see above", outcome.output)
    assert leaks(machine.root, outcome.output, *secrets_there) == []
    assert watch.leaks(*secrets_there) == set()
    assert machine.orphans() == []


@linux
def test_after_ctrl_c_a_typed_secret_is_only_in_env(machine: Machine, server: Server) -> None:
    prepare(machine, "git", WAIT)
    terminal = machine.type("--no-input", NEON)
    terminal.expect(PROMPT)
    terminal.sendline(server.url())

    with watching(machine) as watch:
        machine.wait_for((machine.home / "now").exists, terminal.isalive)
        output = (terminal.before or "") + machine.press_ctrl_c(terminal)

    secret = secret_of(machine.project())
    assert "Stopped. Completed steps are kept." in output
    assert leaks(machine.root, output, server.password, secret) == []
    assert watch.leaks(server.password, secret) == set()
    assert machine.orphans() == []


@linux
@pytest.mark.parametrize("step", STEPS)
def test_after_a_power_cut_the_secret_is_only_in_env(
    machine: Machine, server: Server, step: str
) -> None:
    prepare(machine, step, WAIT)
    machine.environment["NEON_DATABASE_URL"] = server.url()

    outcome = machine.switch_off((machine.home / "now").exists, NEON)

    assert outcome.code == -9
    assert leaks(machine.root, outcome.output, server.password) == []


@pytest.mark.parametrize("end", ["Ctrl-C", "a power cut"])
def test_an_interrupted_prompt_leaves_no_secret(machine: Machine, end: str) -> None:
    password = plant()
    terminal = machine.type("--no-input", NEON)
    terminal.expect(PROMPT)

    terminal.send(url_with(password))  # without Enter
    time.sleep(0.1)
    if end == "Ctrl-C":
        output = machine.press_ctrl_c(terminal)
    else:
        machine.kill_all()
        output = terminal.read()

    assert leaks(machine.root, output, password) == []


def test_an_invalid_connection_string_is_not_kept(machine: Machine) -> None:
    password = plant()

    outcome = machine.generate(NEON, NEON_DATABASE_URL=f"mysql://ada:{password}@/")

    assert "✗ settings: " in outcome.output
    assert leaks(machine.root, outcome.output, password) == []


def test_a_replay_file_contains_no_secret(machine: Machine) -> None:
    password = plant()
    first = machine.generate(NEON, NEON_DATABASE_URL=url_with(password))

    again = machine.generate("--replay", AGAIN, flags=(), NEON_DATABASE_URL=url_with(password))

    assert (machine.home / ".cookiecutter_replay").exists()
    assert "✓ settings" in again.output
    assert (
        leaks(machine.root, first.output + again.output, password, secret_of(first.project)) == []
    )


def test_crufts_file_contains_no_secret(machine: Machine) -> None:
    password = plant()
    shutil.copytree(machine.template, machine.root / "published")
    for command in ("init --quiet", "add --all", "commit --quiet --message template"):
        identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.com"]
        done = ["git", "-C", str(machine.root / "published"), *identity, *command.split()]
        subprocess.run(done, check=True)
    machine.template = machine.root / "published"
    cruft = (sys.executable, "-m", "cruft", "create")

    outcome = machine.generate(
        "--extra-context",
        '{"database": "neon"}',
        program=cruft,
        NEON_DATABASE_URL=url_with(password),
    )

    assert '"database": "neon"' in outcome.project.read(".cruft.json")
    assert quote(password, safe="") in outcome.project.read(".env")
    assert leaks(machine.root, outcome.output, password, secret_of(outcome.project)) == []


# The app


PATHS = ("/openapi.json", "/docs", "/redoc", "/", "/health", "/ready", "/tasks", "/nowhere")


@contextmanager
def served(project: Project, log: Path, **variables: str) -> Iterator[int]:
    """Run `uv run main.py` in a project. Yields the port."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [UV, "run", "--no-sync", "main.py"],
            cwd=project.path,
            env={**project.environment, "PORT": str(port), **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield port
        finally:
            os.killpg(process.pid, 2)
            process.wait(30)


def ask(port: int, method: str, path: str, body: str | None = None) -> bytes:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return str(response.getheaders()).encode() + response.read()
    finally:
        connection.close()


def wait_for(port: int) -> None:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        with suppress(OSError):
            ask(port, "GET", "/health")
            return
        time.sleep(0.05)


@pytest.mark.parametrize("environment", ["development", "production"])
def test_responses_and_logs_contain_no_secret(
    project: Project, tmp_path: Path, environment: str
) -> None:
    password, secret = plant(), plant()
    log = tmp_path / "log"
    variables = {"DATABASE_URL": url_with(password), "BETTER_AUTH_SECRET": secret}
    variables["MAIL_URL"] = f"smtp://a:{quote(password, safe='')}@127.0.0.1:1?from=ada@example.com"
    variables |= {"DEBUG": "true", "LOG_LEVEL": "DEBUG", "ENVIRONMENT": environment}
    variables["REGISTRATION"] = "open"

    with served(project, log, **variables) as port:
        wait_for(port)
        answers = [ask(port, "GET", path) for path in PATHS]
        answers.append(ask(port, "POST", "/auth/register", '{"email": "a@b.example"}'))
        account = {"email": "ada@example.com", "password": "long enough", "name": "Ada"}
        answers.append(ask(port, "POST", "/auth/register", json.dumps(account)))

    needles = forms(password, secret)
    assert any(b'"paths"' in answer for answer in answers) or environment == "production"
    assert not holds(log.read_bytes(), needles)
    assert [answer for answer in answers if holds(answer, needles)] == []


def test_error_messages_do_not_quote_invalid_settings(project: Project) -> None:
    password = plant()
    wrong = Project(
        project.path,
        {
            **project.environment,
            "DATABASE_URL": f"mysql://ada:{password}@/",
            "BETTER_AUTH_SECRET": f"{password[:20]}",
            "MAIL_URL": f"smtp://ada:{password}@",
            "THROTTLE_URL": f"redis://ada:{password}@",
            "DB_POOL_SIZE": password,
            "LOG_LEVEL": password,
        },
    )

    outcomes = [
        wrong.run("uv", "run", "--no-sync", *command.split())
        for command in ("main.py", "manage.py check", "manage.py migrate", "alembic current")
    ]

    assert all(outcome.code for outcome in outcomes)
    assert not holds("".join(outcome.output for outcome in outcomes), forms(password))
