"""The log of a real server: every request has its one line there, and no secret has any."""

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx2
import pytest

from config import Settings
from logs import read_request_id, redact
from postgres.tests.counting_proxy import counting_proxy
from postgres.url import DatabaseUrl
from tests.logged_server import Run, served

TEXTS = "platypus"  # in titles, searches and paths
USER_ID = str(uuid4())
AT_ONCE = 50
ID_AT_ONCE = "number-"


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    embedded_url: DatabaseUrl,
    settings_for: Callable[..., Settings],
    token_for: Callable[[str], str],
) -> Run:
    """A day in the life: people work, mistype, and meet a bug; in the end the database is away.

    SQL statements are logged.
    """
    with (
        counting_proxy(embedded_url) as database,
        served(
            tmp_path_factory.mktemp("run"),
            settings_for(embedded_url.replace(port=database.port)),
            DEBUG="true",
        ) as run,
        httpx2.Client(base_url=run.url, timeout=60) as client,
    ):
        tell_everything(client, run.answers, token_for(USER_ID))
        meet_the_bug_at_once(client)
        database.close()
        run.answers["database away"] = client.get("/notes", params={"q": TEXTS})
        while (answer := client.get("/ready")).is_success:  # until that of the morning expires
            time.sleep(0.05)
        run.answers["not ready"] = answer
    return run


def tell_everything(client: httpx2.Client, answers: dict[str, httpx2.Response], token: str) -> None:
    answers["health"] = client.get("/health")
    answers["ready"] = client.get("/ready")
    answers["bad token"] = client.get(
        "/notes",
        params={"q": TEXTS},
        headers={"Authorization": f"Bearer {token}x", "X-Forwarded-For": "2001:db8:1:2::3"},
    )
    client.headers["Authorization"] = f"Bearer {token}"
    answers["create"] = client.post("/notes", json={"text": TEXTS})
    answers["head"] = client.head("/notes", params={"q": TEXTS})
    answers["search"] = client.get("/notes", params={"q": TEXTS})
    answers["one"] = client.get(f"/notes/{uuid4()}", headers={"X-Request-ID": "of-a-proxy"})
    answers["mistake"] = client.post("/notes", json={TEXTS: "wallaby"})
    answers["no route"] = client.get(f"/{TEXTS}", headers={"X-Request-ID": "not an id"})
    answers["large"] = client.post("/notes", content=TEXTS.encode() * 1_000_000)
    answers["bug"] = client.get("/bug/7")
    answers["preflight"] = client.options(
        "/notes",
        headers={"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"},
    )


def meet_the_bug_at_once(client: httpx2.Client) -> None:
    with ThreadPoolExecutor(10) as threads:
        for number in range(AT_ONCE):
            headers = {"X-Request-ID": f"{ID_AT_ONCE}{number}"}
            threads.submit(client.get, f"/bug/{number}", headers=headers)


def test_the_day_went_as_it_should(run: Run) -> None:
    statuses = {name: answer.status_code for name, answer in run.answers.items()}

    assert statuses == {
        "health": 200,
        "ready": 200,
        "bad token": 401,
        "create": 201,
        "head": 200,
        "search": 200,
        "one": 404,
        "mistake": 422,
        "no route": 404,
        "large": 413,
        "bug": 500,
        "preflight": 200,
        "database away": 503,
        "not ready": 503,
    }


def test_every_line_is_json_whoever_wrote_it(run: Run) -> None:
    assert all(line.keys() >= {"event", "level", "timestamp"} for line in run.lines)
    writers = {line.get("logger") for line in run.lines}
    assert {"uvicorn", "sqlalchemy.engine.Engine"} <= writers
    assert "uvicorn.access" not in writers


def test_every_request_has_one_line_and_probes_have_none(run: Run) -> None:
    answers = [answer for name, answer in run.answers.items() if name not in {"health", "ready"}]

    lines = [line for line in run.requests if not line["request_id"].startswith(ID_AT_ONCE)]
    assert [line["request_id"] for line in lines] == [
        answer.headers["X-Request-ID"] for answer in answers
    ]
    assert [line["status"] for line in lines] == [answer.status_code for answer in answers]


def test_the_line_names_method_route_status_time_and_user(run: Run) -> None:
    line = run.line_of("create")

    assert line == {
        "event": "request",
        "level": "info",
        "timestamp": line["timestamp"],
        "request_id": line["request_id"],
        "method": "POST",
        "path": "/notes",
        "status": 201,
        "duration_ms": line["duration_ms"],
        "user_id": USER_ID,
        "client": "127.0.0.1",
    }
    assert 0 < line["duration_ms"] < 60_000
    assert run.line_of("search")["user_id"] == USER_ID
    assert run.line_of("bad token")["user_id"] is None
    assert run.line_of("head")["method"] == "HEAD"


def test_the_line_names_the_client_that_was_refused_or_logged_in(run: Run) -> None:
    clients = {name: run.line_of(name)["client"] for name in ("one", "no route", "bug", "search")}

    assert clients == dict.fromkeys(clients, "127.0.0.1")
    assert run.line_of("bad token")["client"] == "2001:db8:1::/56"  # as rate limits count it
    assert run.line_of("preflight")["client"] is None


def test_the_path_is_the_routes_without_ids(run: Run) -> None:
    assert run.line_of("one")["path"] == "/notes/{note_id}"
    assert run.line_of("no route")["path"] is None


def test_a_sane_request_id_is_kept_and_another_replaced(run: Run) -> None:
    assert run.answers["one"].headers["X-Request-ID"] == "of-a-proxy"
    assert re.fullmatch(r"[0-9a-f]{32}", run.answers["no route"].headers["X-Request-ID"])


def test_a_bug_leaves_its_traceback_under_the_id_of_the_answer(run: Run) -> None:
    request_id = run.answers["bug"].json()["request_id"]

    lines = [line for line in run.lines if "exception" in line]
    (line,) = (line for line in lines if not line["request_id"].startswith(ID_AT_ONCE))
    assert line["request_id"] == request_id == run.line_of("bug")["request_id"]
    assert line["level"] == run.line_of("bug")["level"] == "error"
    assert "RuntimeError" in line["exception"]
    assert "with_bug.py" in line["exception"]


def test_no_secret_is_in_any_line(run: Run, settings: Settings, embedded_url: DatabaseUrl) -> None:
    token = run.answers["create"].request.headers["Authorization"].removeprefix("Bearer ")
    secrets = [
        TEXTS,
        "kangaroo",
        "quokka",
        "numbat",
        "wallaby",
        token,
        settings.better_auth_secret.get_secret_value(),
        embedded_url.password,
    ]

    found = [secret for secret in secrets if secret in run.output]

    assert found == []
    assert "127.0.0.1" in run.output  # what helps to find a fault stays


def test_without_its_database_the_line_tells_why(run: Run) -> None:
    line = run.line_of("database away")

    assert line["status"] == 503
    assert line["level"] == "error"
    assert "refused" in line["error"]


def test_a_failed_probe_is_logged(run: Run) -> None:
    line = run.line_of("not ready")

    assert (line["path"], line["status"], line["level"]) == ("/ready", 503, "error")


def test_requests_at_the_same_time_keep_their_ids_apart(run: Run) -> None:
    expected = {f"{ID_AT_ONCE}{number}" for number in range(AT_ONCE)}

    for event in ("request", "Exception in ASGI application\n"):
        lines = [line for line in run.lines if line["event"] == event]
        ids = [line["request_id"] for line in lines if line["request_id"].startswith(ID_AT_ONCE)]
        assert len(ids) == AT_ONCE
        assert set(ids) == expected


def test_in_development_the_log_is_text(tmp_path: Path, settings: Settings) -> None:
    with served(tmp_path, settings, ENVIRONMENT="development", LOG_LEVEL="debug") as run:
        httpx2.get(f"{run.url}/health")
        httpx2.get(f"{run.url}/bug/7")
        odd = httpx2.get(f"{run.url}/odd")

    assert odd.status_code == 200
    assert re.search(r"\[debug *\] request .*path=/health .*status=200", run.output)
    assert "\nTraceback (most recent call last):" in run.output
    assert "numbat" not in run.output


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"019a8f3e-5c1d-7b2a-9e4f-0123456789ab", True),
        (b"Root=1-67891233-abcdef012345678912345678", True),
        (b"x" * 128, True),
        (b"x" * 129, False),
        (b"", False),
        (b"two words", False),
        (b'{"json": 1}', False),
        (b"line\nbreak", False),
        (b"\xff", False),
    ],
    ids=str,
)
def test_what_passes_for_a_request_id(sent: bytes, kept: bool) -> None:
    request_id = read_request_id([(b"host", b"x"), (b"x-request-id", sent)])

    assert (request_id == sent.decode("latin-1")) is kept
    assert kept or re.fullmatch(r"[0-9a-f]{32}", request_id)


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("postgresql://ada:s3cret@db.example.com/x", "postgresql://***@db.example.com/x"),
        ("postgresql+psycopg2://ada:p:w/x?@host:5432/x", "postgresql+psycopg2://***@host:5432/x"),
        ("host=db password=s3cret user=ada", "host=db *** user=ada"),
        ("Authorization: Bearer abc.def.ghi, next", "Authorization: ***, next"),
        ("token eyJhbGciOi.eyJzdWIi.c2ln ends", "token *** ends"),
        ("to ada+todo@mail.example.com now", "to *** now"),
        ("duplicate key\nDETAIL:  Key (a)=(b) exists.\nmore", "duplicate key\nDETAIL:***\nmore"),
        ('connection to server at "db", port 5432 failed', None),
        ('File "/app/main.py", line 7, in bug', None),
    ],
)
def test_secrets_are_redacted_in_foreign_messages(text: str, redacted: str | None) -> None:
    assert redact(None, "error", {"event": text})["event"] == (redacted or text)


def test_redaction_is_quick_for_any_text() -> None:
    for text in ("a" * 100_000, "://" * 30_000, "a@" * 50_000, "eyJ" * 30_000, "a." * 50_000):
        redact(None, "error", {"event": text})
