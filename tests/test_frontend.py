"""Follow docs/frontend.md with real packages, and use the app in a browser.

What is the same code with all accounts runs with Better Auth once a week (`-m ""`).
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg2
import pytest
from pictures.browser import chromium, find_chromium
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect

from app_server import PASSWORD, AppServer, app_server, new_address
from front_end import MORE, REFUSED, FrontEnd
from machine import Project
from postgres_server import free_port
from visitors import wait_for

SECONDS = 20  # timeout of an operation, only to detect a hang
ENDED = "Your session has ended. Reload the page to log in."
AWAY = "The API cannot be reached."
UNREACHABLE = "The server cannot be reached."
END_SESSIONS = {"better-auth": "DELETE FROM session", "own": "DELETE FROM refresh_tokens"}
SCRIPTS = re.compile(r"/_next/static/.+\.js(\?|$)")
LINK = re.compile(r"http://localhost:\d+/\S*(?:reset-password|verify-email)[^\s']*")

WEEKLY = pytest.param("better-auth", marks=pytest.mark.weekly)
SAME_CODE = pytest.mark.parametrize("site", [WEEKLY, "own"], indirect=True)

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not find_chromium(), reason="needs Chromium"),
    pytest.mark.skipif(
        not (shutil.which("node") and shutil.which("npm")), reason="needs Node.js and npm"
    ),
]


@dataclass(frozen=True)
class Site:
    """The app and what it uses. log: of the app. database: the URL of the accounts' database."""

    kind: str
    front_end: FrontEnd
    api: AppServer
    log: Path
    database: str

    @property
    def url(self) -> str:
        return self.front_end.url

    @property
    def api_url(self) -> str:
        return f"http://localhost:{self.api.port}"

    def end_sessions(self, context: BrowserContext) -> None:
        """End all login sessions, as if the access tokens in cookies had expired, too."""
        with closing(psycopg2.connect(self.database)) as connection, connection.cursor() as cursor:
            cursor.execute(END_SESSIONS[self.kind])
            connection.commit()
        context.clear_cookies(name="access_token")

    def mailed_links(self) -> list[str]:
        """Return the links in all messages, from a log, the newest last."""
        log = self.log if self.kind == "better-auth" else self.api.log
        return LINK.findall(log.read_text("utf-8"))


class Tab:
    """A tab of a browser, and its user."""

    def __init__(self, page: Page, site: Site) -> None:
        self.page = page
        self.site = site
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    @property
    def problem(self) -> Locator:
        return self.page.get_by_role("alert").and_(self.page.locator("p"))

    @property
    def rows(self) -> Locator:
        return self.page.get_by_role("listitem")

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).click()

    def open(self, path: str) -> None:
        self.page.goto(self.site.url + path)

    @contextmanager
    def scripts_held_back(self) -> Iterator[None]:
        """Hold back the scripts of the page until the block ends, as a slow network does."""
        requested: list[str] = []

        def hold_back(route: Route) -> None:
            requested.append(route.request.url)

        self.page.route(SCRIPTS, hold_back)
        yield
        assert requested
        self.page.unroute(SCRIPTS)  # without a route, the browser goes on with the requests

    def enter(self, email: str, button: str, password: str = PASSWORD) -> None:
        """Fill in the form of /login, and press a button.

        Without loading the form again, which would clear the memory of the page.
        """
        if self.page.url != f"{self.site.url}/login":
            self.open("/login")
        self.page.get_by_label("E-mail").fill(email)
        self.page.get_by_label("Password").fill(password)
        self.press(button)

    def is_at_the_tasks(self) -> None:
        expect(self.page).to_have_url(f"{self.site.url}/tasks")
        expect(self.page.get_by_role("button", name="Add")).to_be_visible()

    def sign_up(self) -> str:
        """Create an account, to which a link is mailed. Returns its e-mail address."""
        before = len(self.site.mailed_links())
        email = f"{secrets.token_hex(8)}@example.com"
        self.enter(email, "Create account")
        self.is_at_the_tasks()
        wait_for(lambda: self.site.mailed_links()[before:])
        return email

    def log_out(self) -> None:
        self.press("Log out")
        expect(self.page).to_have_url(f"{self.site.url}/login")
        expect(self.page.get_by_label("E-mail")).to_be_visible()

    def ask_for_a_link(self, email: str, button: str) -> str:
        """Press a button that has a link mailed, which may take longer than the response."""
        before = len(self.site.mailed_links())
        self.enter(email, button, "")
        expect(self.problem).to_contain_text("sent a link")
        (link,) = wait_for(lambda: self.site.mailed_links()[before:])
        return link

    def add(self, title: str) -> None:
        self.page.get_by_label("New task").fill(title)
        self.press("Add")

    def sees(self, *titles: str) -> None:
        expect(self.rows).to_have_text(list(titles))


@pytest.fixture(scope="module")
def created(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], FrontEnd]]:
    """A function that returns the app as it is after the page's first section."""
    workshop = tmp_path_factory.mktemp("frontend")
    front_end = FrontEnd(workshop, project, newest=bool(os.environ.get("NEWEST_FRONT_END")))
    for step in front_end.steps("own"):
        if step.section == "Set up" and step.language == "shell":
            front_end.take(step)
    kept = shutil.ignore_patterns("node_modules", "cache")
    shutil.copytree(front_end.folder, workshop / "created", ignore=kept)

    def create() -> FrontEnd:
        cache, spare = front_end.folder / ".next" / "cache", workshop / "cache"
        # With the cache, the next build takes a third of the time. The newest Next.js builds
        # without: its cache might have a bug.
        if cache.exists() and not front_end.newest:
            cache.rename(spare)
        for path in front_end.folder.iterdir():
            if path.is_dir() and path.name != "node_modules":
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()
        shutil.copytree(workshop / "created", front_end.folder, dirs_exist_ok=True)
        if spare.exists():
            cache.parent.mkdir(exist_ok=True)
            spare.rename(cache)
        return front_end

    yield create
    shutil.rmtree(workshop)


@contextmanager
def api_for(front_end: FrontEnd, kind: str, url: str) -> Iterator[AppServer]:
    """Serve the API, with what the page adds to its .env."""
    settings = {"ENVIRONMENT": "development"}
    for step in front_end.steps(kind):
        if step.language == "ini" and "`.env`" in step.where:
            lines = step.code.replace("http://localhost:3000", front_end.url).splitlines()
            settings |= dict(line.split("=", 1) for line in lines)
    with app_server(
        front_end.project, url, front_end.workshop / f"{kind}-api.log", settings
    ) as api:
        yield api


@pytest.fixture(scope="module", params=["better-auth", "own"])
def site(
    request: pytest.FixtureRequest, created: Callable[[], FrontEnd], project: Project
) -> Iterator[Site]:
    """The app after all steps of the page, built and served."""
    kind, front_end = request.param, created()
    assert project.run("uv", "run", "manage.py", "postgres", "start").code == 0
    (url,) = re.findall(r"(?m)^DATABASE_URL=(.*)$", project.read(".env"))
    database = re.sub(r"/\w+\?", "/auth?", url) if kind == "better-auth" else url
    # These two are described on the page: the environment goes before .env.local.
    front_end.environment |= {"BETTER_AUTH_SECRET": secrets.token_hex(32), "DATABASE_URL": database}
    with api_for(front_end, kind, url) as api:
        (front_end.folder / "refused.ts").write_text(REFUSED, "utf-8")
        for step in front_end.steps(kind):
            is_done = step.section == "Set up" and step.language == "shell"
            is_for_the_api = step.language == "ini" and "`.env`" in step.where
            if not is_done and not is_for_the_api:
                front_end.take(step, api.port)
        log = front_end.workshop / f"{kind}.log"
        with front_end.served(log):
            yield Site(kind, front_end, api, log, database)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=SECONDS * 1000)
    with chromium(keeps_pages=True) as browser:
        yield browser


@pytest.fixture
def tab(browser: Browser, site: Site) -> Iterator[Tab]:
    # Few may log in from one address.
    context = browser.new_context(extra_http_headers={"X-Forwarded-For": new_address()})
    context.set_default_timeout(SECONDS * 1000)
    tab = Tab(context.new_page(), site)
    yield tab
    context.close()
    assert tab.complaints == []


def send_a_stale_token(route: Route) -> None:
    route.continue_(headers={**route.request.headers, "authorization": "Bearer stale"})


def abort_posts(route: Route) -> None:
    if route.request.method == "POST":
        route.abort()
    else:
        route.continue_()


def answer_with_html(route: Route) -> None:
    route.fulfill(status=200, content_type="text/html", body="<p>Welcome</p>")


def answer_with_a_502(route: Route) -> None:
    route.fulfill(status=502, content_type="text/html", body="<p>Bad Gateway</p>")


def test_a_user_signs_up_adds_ticks_reloads_and_logs_out(tab: Tab) -> None:
    email = tab.sign_up()

    tab.add("Buy milk")
    tab.sees("Buy milk")
    tab.add("Call Bob")
    tab.sees("Call Bob", "Buy milk")
    with tab.page.expect_response(lambda answer: answer.request.method == "PATCH"):
        tab.page.get_by_role("checkbox", name="Buy milk").click()
    tab.page.reload()
    tab.sees("Call Bob")
    tab.log_out()
    tab.open("/tasks")
    expect(tab.page).to_have_url(f"{tab.site.url}/login")

    tab.enter(email, "Log in")
    tab.sees("Call Bob")


def test_the_next_user_of_a_tab_sees_and_changes_nothing_of_the_last_one(tab: Tab) -> None:
    tab.sign_up()
    tab.add("Ada's")
    tab.sees("Ada's")
    for query in ("again", "and again"):  # pages to go back to
        tab.open(f"/tasks?{query}")
        tab.sees("Ada's")
    tab.log_out()
    expect(tab.page.get_by_label("E-mail")).to_have_value("")
    expect(tab.page.get_by_label("Password")).to_have_value("")

    bob = tab.sign_up()
    tab.sees()
    tab.add("Bob's")
    tab.sees("Bob's")
    for _ in range(2):
        tab.page.go_back()
        tab.sees("Bob's")
    tab.log_out()
    tab.page.go_forward()
    expect(tab.page).to_have_url(f"{tab.site.url}/login")
    expect(tab.rows).to_have_count(0)

    tab.enter(bob, "Log in")
    tab.sees("Bob's")


def test_a_tab_of_the_last_user_writes_nothing_for_the_next_one(tab: Tab) -> None:
    tab.sign_up()
    tab.add("Ada's")
    tab.sees("Ada's")
    other = Tab(tab.page.context.new_page(), tab.site)
    other.open("/tasks")
    other.log_out()
    other.sign_up()

    tab.page.route(f"{tab.site.api_url}/**", send_a_stale_token, times=1)
    tab.add("also Ada's")

    tab.sees()
    other.page.reload()
    other.sees()


@SAME_CODE
def test_forms_sent_before_the_scripts_have_loaded_are_not_lost(tab: Tab) -> None:
    email = tab.sign_up()
    tab.add("Buy milk")
    checkbox = tab.page.get_by_role("checkbox", name="Buy milk")
    expect(checkbox).to_be_enabled()

    with tab.scripts_held_back():
        tab.page.reload(wait_until="domcontentloaded")
        expect(checkbox).to_be_disabled()
        tab.press("Log out")
    expect(tab.page).to_have_url(f"{tab.site.url}/login")

    with tab.scripts_held_back():
        tab.page.reload(wait_until="domcontentloaded")
        tab.enter(email, "Log in")
    tab.is_at_the_tasks()
    expect(checkbox).to_be_enabled()


def test_without_the_front_ends_server_nothing_typed_is_lost(tab: Tab) -> None:
    tab.open("/login")
    tab.page.route(f"{tab.site.url}/**", abort_posts)
    tab.enter("ada@example.com", "Log in")
    expect(tab.problem).to_have_text(UNREACHABLE)
    expect(tab.page.get_by_label("E-mail")).to_have_value("ada@example.com")
    tab.page.unroute_all()

    tab.sign_up()
    tab.page.get_by_label("New task").fill("Buy milk")
    tab.page.route(f"{tab.site.url}/**", abort_posts)
    tab.press("Log out")
    expect(tab.problem).to_have_text(UNREACHABLE)
    expect(tab.page.get_by_label("New task")).to_have_value("Buy milk")


@SAME_CODE
def test_failures_are_reported_and_nothing_typed_is_lost(tab: Tab) -> None:
    tab.sign_up()
    tasks = re.compile(f"{tab.site.api_url}/tasks.*")
    title = tab.page.get_by_label("New task")
    tab.add("x" * 200)
    expect(tab.rows).to_have_count(1)

    tab.page.route(tasks, lambda route: route.abort())
    tab.add("Buy milk")
    expect(tab.problem).to_have_text(AWAY)
    expect(title).to_have_value("Buy milk")
    tab.page.unroute(tasks)
    for answer in (answer_with_html, answer_with_a_502):
        tab.page.route(tasks, answer)
        with tab.page.expect_response(tasks):
            tab.press("Add")
        expect(tab.page.get_by_role("button", name="Add")).to_be_enabled()
        expect(tab.problem).to_have_text("The API sent an unexpected response.")
        expect(title).to_have_value("Buy milk")
        tab.page.unroute(tasks)

    tab.page.route("**/api/auth/token", lambda route: route.fulfill(status=503, body="Reload."))
    tab.page.route(tasks, send_a_stale_token)
    tab.press("Add")
    expect(tab.problem).to_have_text(AWAY)
    tab.page.unroute_all()

    tab.press("Add")
    expect(tab.problem).to_be_empty()
    expect(tab.rows).to_have_count(2)
    expect(title).to_have_value("")


def test_the_page_says_that_the_api_is_away(tab: Tab, tmp_path: Path) -> None:
    tab.sign_up()
    nowhere = f"http://localhost:{free_port()}"

    log = tmp_path / "log"
    with tab.site.front_end.served(log, port=free_port(), API_URL=nowhere) as url:
        tab.page.goto(f"{url}/tasks")

        expect(tab.problem).to_have_text(AWAY)
        tab.page.context.clear_cookies(name="access_token")  # as if it had expired
        tab.page.goto(f"{url}/tasks")
        expect(tab.page.get_by_text("The API cannot be reached")).to_be_visible()


@pytest.mark.parametrize("site", ["own"], indirect=True)
def test_without_the_api_a_user_stays_logged_in_and_can_log_out_later(
    tab: Tab, tmp_path: Path
) -> None:
    tab.sign_up()
    tab.add("Buy milk")
    tab.sees("Buy milk")
    (refresh_token,) = (
        cookie["value"]
        for cookie in tab.page.context.cookies()
        if cookie["name"] == "refresh_token"
    )
    tab.page.context.clear_cookies(name="access_token")  # as if it had expired
    nowhere = f"http://localhost:{free_port()}"
    with tab.site.front_end.served(tmp_path / "log", port=free_port(), API_URL=nowhere) as url:

        def send_there(route: Route) -> None:
            headers = {**route.request.headers, "origin": url}
            route.fulfill(response=route.fetch(url=f"{url}/tasks", headers=headers))

        tab.page.route(f"{tab.site.url}/tasks", send_there)
        tab.press("Log out")
        expect(tab.problem).to_have_text(f"You are still logged in. {AWAY}")
    tab.page.unroute_all()
    tab.sees("Buy milk")

    tab.log_out()
    body = {"refresh_token": refresh_token}
    assert tab.page.context.cookies() == []
    assert tab.site.api.request("POST", "/auth/refresh", body).status == 401


def test_a_refused_token_is_replaced_until_the_session_has_ended(tab: Tab) -> None:
    tab.sign_up()
    tasks = f"{tab.site.api_url}/**"
    tab.page.route(tasks, send_a_stale_token, times=1)
    tab.add("Buy milk")
    tab.sees("Buy milk")
    expect(tab.problem).to_be_empty()

    tab.site.end_sessions(tab.page.context)
    tab.page.route(tasks, send_a_stale_token, times=1)
    tab.add("Call Bob")
    expect(tab.problem).to_have_text(ENDED)
    tab.page.reload()

    expect(tab.page).to_have_url(f"{tab.site.url}/login")


def test_a_forgotten_password_is_replaced(tab: Tab) -> None:
    email = tab.sign_up()
    tab.log_out()
    tab.page.goto(tab.ask_for_a_link(email, "Forgot password?"))
    tab.page.get_by_label("New password").fill("a new horse")
    tab.press("Save")
    expect(tab.page).to_have_url(f"{tab.site.url}/login")

    tab.enter(email, "Log in")
    expect(tab.problem).not_to_be_empty()
    tab.enter(email, "Log in", "a new horse")
    tab.is_at_the_tasks()


@pytest.mark.parametrize("site", ["own"], indirect=True)
def test_an_address_is_confirmed(tab: Tab) -> None:
    email = tab.sign_up()
    tab.log_out()
    tab.page.goto(tab.ask_for_a_link(email, "Confirm address"))
    tab.press("Confirm")

    expect(tab.problem).to_have_text("Your address is confirmed.")


@pytest.mark.parametrize("site", [WEEKLY], indirect=True)
def test_social_login_and_a_second_factor_fit(site: Site) -> None:
    front_end = site.front_end
    steps = [step for step in front_end.all_steps() if step.section == MORE]
    lib = shutil.copytree(front_end.folder / "lib", front_end.workshop / "lib")
    assert len(steps) == 2

    for step in steps:
        front_end.take(step)

    front_end.type("npx tsc --noEmit")
    shutil.rmtree(front_end.folder / "lib")
    lib.rename(front_end.folder / "lib")


@SAME_CODE
def test_fields_and_buttons_have_borders(tab: Tab) -> None:
    tab.open("/login")

    for element in tab.page.locator("input, button").all():
        assert element.evaluate("element => getComputedStyle(element).borderTopWidth") == "1px"


@pytest.mark.weekly
@pytest.mark.parametrize("site", ["own"], indirect=True)
def test_the_development_server_shows_no_errors_and_logs_no_password(
    tab: Tab, tmp_path: Path
) -> None:
    front_end, log = replace(tab.site.front_end, port=free_port()), tmp_path / "log"
    with api_for(front_end, "own", tab.site.database) as api:
        api_url = f"http://localhost:{api.port}"
        settings = {"API_URL": api_url, "NEXT_PUBLIC_API_URL": api_url}
        with front_end.served(log, front_end.port, "dev", **settings):
            developer = Tab(tab.page, replace(tab.site, front_end=front_end, api=api))
            lines: list[str] = []
            tab.page.on("console", lambda line: lines.append(f"{line.type}: {line.text}"))

            developer.sign_up()
            developer.add("Buy milk")
            developer.sees("Buy milk")

            badge = tab.page.locator("nextjs-portal [data-next-badge]")
            expect(badge).to_have_attribute("data-error", "false")
            expect(tab.page.locator("nextjs-portal [data-issues]")).to_have_count(0)
            assert not [line for line in lines if line.startswith("error")]
            assert "POST /login" in log.read_text("utf-8")
            assert PASSWORD not in log.read_text("utf-8")
