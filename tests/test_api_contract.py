"""The OpenAPI schema of a generated project is correct: other tools can rely on it."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest

from machine import UVX, Project

HERE = Path(__file__).parent
SCHEMATHESIS = "schemathesis==4.32.5"
PYTHON_CLIENT = "openapi-python-client==0.29.1"
NPM_PACKAGES = ("openapi-typescript@7.13.0", "@hey-api/openapi-ts@0.99.0", "typescript@5.9.3")
SECONDS = 30  # timeout of a program other than Schemathesis
SCHEMATHESIS_SECONDS = 600  # usually 15 to 40 for 25 examples
WEEKLY_SECONDS = 1800  # for 500

# Names in generated clients: changing one breaks every front end that uses it.
OPERATIONS = {
    "change_password",
    "complete_tasks",
    "create_task",
    "delete_me",
    "delete_task",
    "delete_tasks",
    "end_other_sessions",
    "end_session",
    "forgot_password",
    "get_health",
    "get_me",
    "get_ready",
    "get_task",
    "list_sessions",
    "list_tasks",
    "login",
    "logout",
    "refresh_token",
    "register",
    "replace_task",
    "resend_verification",
    "reset_password",
    "update_me",
    "update_task",
    "verify_address",
}
MODELS = {
    "AccountDeletion",
    "AccountUpdate",
    "AddressOnly",
    "AddressVerification",
    "Health",
    "LoginForm",
    "LoginSession",
    "Mistake",
    "PasswordChange",
    "PasswordReset",
    "Priority",
    "Problem",
    "Ready",
    "RefreshRequest",
    "Registration",
    "TaskCreate",
    "TaskPublic",
    "TaskUpdate",
    "TasksChanged",
    "TasksUpdate",
    "TokenPair",
    "UserPublic",
    "ValidationProblem",
}

# For the compiler in the last of these packages.
TSCONFIG = {
    "files": ["schema.d.ts", "client_at_work.ts"],
    "compilerOptions": {
        "strict": True,
        "target": "es2022",
        "lib": ["es2022", "dom", "dom.iterable"],
        "module": "commonjs",
        "moduleResolution": "node10",  # the client's files import each other without an extension
        "outDir": "out",
    },
}

# On Windows these are scripts, found only by their full names.
NPM, NPX = shutil.which("npm") or "npm", shutil.which("npx") or "npx"
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="needs Node.js and npm"
)


@dataclass(frozen=True)
class Api:
    """The generated project, served as in production."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, media_type: str = "", body: str = "") -> Any:
        """Return the JSON of the response. media_type: of the body."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, {"Content-Type": media_type})
            response = connection.getresponse()
            assert response.status < 300, response.read()
            return json.load(response)
        finally:
            connection.close()

    def log_in_new_user(self) -> str:
        """Return an access token."""
        email, password = f"{uuid4()}@example.com", "correct horse battery staple"
        account = json.dumps({"email": email, "password": password, "name": "Ada"})
        self.request("POST", "/auth/register", "application/json", account)
        form = urlencode({"username": email, "password": password})
        tokens = self.request("POST", "/auth/login", "application/x-www-form-urlencoded", form)
        return str(tokens["access_token"])


@pytest.fixture
def api(project: Project, tmp_path: Path) -> Iterator[Api]:
    """A new server for each test: after thousands of wrong passwords, a server locks us out."""
    log = tmp_path / "log"
    started = project.run("uv", "run", "manage.py", "postgres", "start")
    assert started.code == 0, started.output
    command = [str(project.python), "-m", "uvicorn", "main:app", "--port", "0"]
    environment = project.environment | {
        "ENVIRONMENT": "production",
        "API_DOCS": "true",
        "REGISTRATION": "open",
        "MAIL_URL": "smtp://127.0.0.1:1?from=todo@example.com",  # nothing is there
    }
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(
            command, cwd=project.path, env=environment, stdout=output, stderr=output
        ) as server,
    ):
        try:
            while not (found := re.search(r"running on http://127.0.0.1:(\d+)", log.read_text())):
                assert server.poll() is None, log.read_text("utf-8")
                time.sleep(0.05)
            yield Api(int(found[1]), log)
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def workshop(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the schema, for generating clients."""
    folder = tmp_path_factory.mktemp("workshop")
    print_schema = "import json, main; print(json.dumps(main.app.openapi()))"
    printed = project.run(str(project.python), "-c", print_schema)
    assert printed.code == 0, printed.output
    (folder / "openapi.json").write_text(printed.output, "utf-8")
    (folder / "package.json").write_text('{"private": true}', "utf-8")
    return folder


@pytest.fixture(scope="module")
def typescript(workshop: Path) -> Path:
    """The folder with the npm generators and their output."""
    options = ["--no-audit", "--no-fund", "--ignore-scripts"]
    run([NPM, "install", *options, *NPM_PACKAGES], workshop, seconds=240)
    run([NPX, "openapi-typescript", "openapi.json", "--output=schema.d.ts"], workshop)
    run([NPX, "openapi-ts", "--input=openapi.json", "--output=client"], workshop)
    shutil.copy(HERE / "client_at_work.ts", workshop)
    (workshop / "tsconfig.json").write_text(json.dumps(TSCONFIG), "utf-8")
    run([NPX, "tsc"], workshop)
    return workshop


def run(command: list[str], folder: Path, *, seconds: float = SECONDS) -> str:
    """Run a program that must succeed. Returns its output."""
    done = subprocess.run(
        command,
        check=False,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.title, others))


@pytest.mark.timeout(WEEKLY_SECONDS + SECONDS)
@pytest.mark.parametrize(
    ("examples", "seconds"),
    [
        pytest.param(25, SCHEMATHESIS_SECONDS, id="25"),
        pytest.param(500, WEEKLY_SECONDS, marks=pytest.mark.weekly, id="500"),
    ],
)
def test_schemathesis_finds_no_failures(
    api: Api, tmp_path: Path, examples: int, seconds: float
) -> None:
    command = [UVX, SCHEMATHESIS, f"--config-file={HERE / 'schemathesis.toml'}", "run"]
    command += [f"--header=Authorization: Bearer {api.log_in_new_user()}"]
    # Always the same cases, so that a failure appears with the change that causes it.
    command += ["--generation-deterministic", "--warnings=off", "--no-color"]
    command += [f"--max-examples={examples}"]
    command += ["--report=json", "--report-json-path=report.json", f"{api.url}/openapi.json"]

    output = run(command, tmp_path, seconds=seconds)

    print(output)
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["operations"]["tested"] == len(OPERATIONS)
    assert report["test_cases"]["generated"] > 20 * examples
    lines = [json.loads(line) for line in api.log.read_text("utf-8").splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert len(requests) > 20 * examples
    errors = [line for line in lines if line["level"] == "error"]
    assert [line for line in errors if line["event"] != "message not sent"] == []


@needs_node
def test_openapi_typescript_generates_good_names(typescript: Path) -> None:
    declared = (typescript / "schema.d.ts").read_text("utf-8")

    schemas, operations = declared.split("export interface operations")
    assert set(re.findall(r"^    (\w+): \{$", operations, re.MULTILINE)) == OPERATIONS
    assert set(re.findall(r"^        ([A-Z]\w+): ", schemas, re.MULTILINE)) == MODELS


@needs_node
def test_openapi_ts_generates_good_names(typescript: Path) -> None:
    functions = (typescript / "client" / "sdk.gen.ts").read_text("utf-8")
    types = (typescript / "client" / "types.gen.ts").read_text("utf-8")

    names = set(re.findall(r"^export const (\w+) = <", functions, re.MULTILINE))
    assert names == {camel_case(name) for name in OPERATIONS}
    assert set(re.findall(r"^export type (\w+) = ", types, re.MULTILINE)) >= MODELS


@needs_node
def test_a_generated_client_works_with_the_api(typescript: Path, api: Api) -> None:
    output = run(["node", "out/client_at_work.js", api.url, f"{uuid4()}@example.com"], typescript)

    expected = {"titles": ["Call it"], "left": 0, "error": "there is no such task"}
    assert json.loads(output) == expected


def test_openapi_python_client_generates_good_names(workshop: Path) -> None:
    generate = [UVX, PYTHON_CLIENT, "generate", "--path=openapi.json", "--meta=none"]

    run([*generate, "--output-path=python_client", "--fail-on-warning"], workshop)

    files = (workshop / "python_client" / "api").glob("*/[!_]*.py")
    assert {file.stem for file in files} == OPERATIONS
    exported = (workshop / "python_client" / "models" / "__init__.py").read_text("utf-8")
    # It also names the sort orders, which are in the parameter's schema.
    names = set(re.findall(r'^    "(\w+)",$', exported, re.MULTILINE))
    assert names == MODELS | {"ListTasksSort"}
