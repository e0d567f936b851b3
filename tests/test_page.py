"""Browser tests of the home page and the API documentation, with clicks and typing."""

import base64
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pictures.browser import chromium, find_chromium
from playwright.sync_api import Browser, ConsoleMessage, Error, Locator, Page, Route, expect

from app_server import PASSWORD, AppServer, new_address
from machine import Project
from stage import Stage, new_stage

SECONDS = 30  # timeout of an operation, only to detect a hang
PAGE_SIZE = 20  # tasks per request of the page
MARKUP = "<img src=x onerror=\"alert(1)\"><b>bold</b> & 'quoted' $TOKEN `id` \\"

# Radio buttons share one outline.
OUTLINE = "element => getComputedStyle(element.closest('.choice') ?? element).outlineStyle"

RECORD_ANNOUNCEMENTS = """() => {
  window.said = [];
  const element = document.getElementById("said");
  const note = () => { if (element.textContent) said.push(element.textContent); };
  new MutationObserver(note).observe(element, {childList: true});
}"""
HAS_SAID = "count => said.length === count"
REFUSE_COPYING = """() => {
  navigator.clipboard.writeText = () => Promise.reject(new Error("not allowed"));
  document.execCommand = () => false;
}"""

pytestmark = pytest.mark.skipif(not find_chromium(), reason="needs Chromium")


@dataclass
class Visitor:
    """A user with a browser. refusals: expected statuses of 400 and above."""

    page: Page
    app: AppServer
    refusals: set[int] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.app.port}/"

    def watch(self) -> None:
        """Record everything that should not happen on the page."""

        def note_console(message: ConsoleMessage) -> None:
            if message.type in {"error", "warning"} and "Failed to load" not in message.text:
                self.complaints.append(message.text)

        self.page.on("console", note_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.note_request(request.url))
        self.page.on("response", lambda response: self.note_status(response.status, response.url))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))

    def note_request(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.complaints.append(f"a request to {url}")

    def note_status(self, status: int, url: str) -> None:
        if status >= 400 and status not in self.refusals:
            self.complaints.append(f"{status} from {url}")

    def open(self) -> None:
        self.page.goto(self.url)
        expect(self.page.locator("#api")).to_have_text("✓ runs")

    def register(self, name: str) -> None:
        self.page.get_by_label("E-mail").fill(f"{name.lower()}@example.com")
        self.page.get_by_label("Password").fill(PASSWORD)
        self.page.get_by_label("Name").fill(name)
        self.page.get_by_role("button", name="Register").click()
        expect(self.said).to_have_text("Logged in.")

    def new_tab(self, click: Locator) -> "Visitor":
        """Click a link that opens a tab."""
        with self.page.expect_popup() as popup:
            click.click()
        visitor = Visitor(popup.value, self.app, self.refusals, self.complaints)
        visitor.watch()
        return visitor

    def follow(self, link: str, to: str) -> None:
        """In the mailbox, click the link of the newest message to an address."""
        message = self.page.locator("article", has_text=to).first
        message.get_by_role("link", name=link).click()
        self.page.wait_for_url(self.url)  # without the token

    def log_in(self, name: str, password: str = PASSWORD) -> None:
        self.page.get_by_label("Have an account").check(force=True)
        self.page.get_by_label("E-mail").fill(f"{name.lower()}@example.com")
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name="Log in").click()

    def add(self, *titles: str) -> None:
        for title in titles:
            self.page.get_by_label("New task").fill(title)
            self.page.get_by_role("button", name="Add").click()
            expect(self.said).to_have_text(f"Added “{title}”.")

    def tick(self, title: str) -> None:
        self.page.get_by_role("checkbox", name=title, exact=True).click()
        expect(self.said).to_have_text(f"“{title}” is done.")

    def button(self, name: str, title: str = "") -> Locator:
        return self.page.get_by_role("button", name=f"{name}: {title}" if title else name)

    @property
    def said(self) -> Locator:
        """The live region that screen readers announce."""
        return self.page.locator("#said")

    @property
    def problem(self) -> Locator:
        return self.page.locator("#problem")

    @property
    def last_exchange(self) -> Locator:
        return self.page.locator("#exchanges > li").first

    def sees(self, *titles: str) -> None:
        """Check the tasks on the screen, and their order."""
        expect(self.page.locator("#list .tick span")).to_have_text(list(titles))

    def titles_of(self, token: str, query: str = "sort=order") -> list[str]:
        """Return the titles that the API returns."""
        answer = self.app.request("GET", f"/tasks?{query}", token=token)
        return [task["title"] for task in answer.body]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=SECONDS * 1000)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def stage(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with new_stage(project, tmp_path_factory.mktemp("page")) as stage:
        yield stage


@pytest.fixture(scope="module")
def app(stage: Stage) -> Iterator[AppServer]:
    with stage.app("page", ENVIRONMENT="development") as app:
        yield app


@pytest.fixture
def screen() -> dict[str, Any]:
    """Options of the browser context; override by parametrizing."""
    return {}


@pytest.fixture
def visitor(browser: Browser, app: AppServer, screen: dict[str, Any]) -> Iterator[Visitor]:
    """A user who has opened the page. Fails at the end if there were complaints."""
    own = {
        "viewport": {"width": 1280, "height": 900},
        "extra_http_headers": {"X-Forwarded-For": new_address()},  # few may register from one
    }
    context = browser.new_context(**{**own, **screen})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(SECONDS * 1000)
    visitor = Visitor(context.new_page(), app)
    visitor.watch()
    visitor.open()
    yield visitor
    context.close()
    assert visitor.complaints == []


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A user name that is unique to the test: all tests share one database."""
    return "ada-" + re.sub(r"\W+", "-", request.node.name)[-60:].strip("-").lower()


@pytest.fixture
def ada(visitor: Visitor, name: str) -> Visitor:
    """A registered user."""
    visitor.register(name)
    return visitor


@pytest.fixture
def token(ada: Visitor, name: str) -> str:
    """An access token of Ada's for direct requests to the API."""
    return ada.app.log_in(f"{name}@example.com")


def clipboard(page: Page) -> str:
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def make_stale(route: Route) -> None:
    """Send an expired token to the API."""
    route.continue_(headers={**route.request.headers, "authorization": "Bearer stale"})


def test_the_page_shows_the_status_of_the_app(visitor: Visitor, stage: Stage) -> None:
    page = visitor.page

    expect(page.get_by_role("heading", level=1)).to_have_text("Todo Backend")
    expect(page.locator("#database")).to_have_text("✓ PostgreSQL")
    place = f"{stage.database} at 127.0.0.1:{stage.server.port}"
    expect(page.locator("#database-more")).to_have_text(place)
    expect(page.locator("#latency")).to_have_text(re.compile(r"^\d+(\.\d)? ms$"))
    expect(page.locator("#schema")).to_have_text("✓ up to date")
    expect(page.locator("#trouble")).to_be_empty()
    assert stage.server.password not in page.content()
    for link in page.get_by_role("navigation").get_by_role("link").all():
        assert visitor.page.request.get(visitor.url + (link.get_attribute("href") or "")).ok


def test_an_old_schema_is_shown_with_the_command_that_migrates_it(visitor: Visitor) -> None:
    def age(route: Route) -> None:
        answer = route.fetch()
        behind = {"ok": False, "state": "behind the code", "revision": None}
        behind |= {"cause": "migrations have not run yet", "advice": "uv run manage.py migrate"}
        route.fulfill(json=answer.json() | {"migrations": behind})

    visitor.page.route("**/home/status", age)
    visitor.button("Check again").click()

    expect(visitor.page.locator("#schema")).to_have_text("✗ behind the code")
    expect(visitor.page.locator("#trouble")).to_contain_text("uv run manage.py migrate")


def test_a_newcomer_registers_and_adds_a_task(visitor: Visitor, name: str) -> None:
    visitor.register(name)
    visitor.add("Buy milk")

    visitor.sees("Buy milk")
    expect(visitor.page.locator("#who")).to_have_text(f"{name}, {name}@example.com")
    expect(visitor.last_exchange.locator("summary")).to_contain_text("POST")
    expect(visitor.last_exchange.locator("summary")).to_contain_text("201 Created")
    expect(visitor.last_exchange.locator(".answered")).to_contain_text('"title": "Buy milk"')


def test_a_user_can_log_in_and_out(visitor: Visitor, name: str) -> None:
    token = visitor.app.register(name)
    visitor.app.request("POST", "/tasks", {"title": "from before"}, token=token)

    visitor.log_in(name)

    visitor.sees("from before")
    visitor.button("Log out").click()
    expect(visitor.said).to_have_text("Logged out.")
    visitor.sees()
    expect(visitor.page.get_by_label("E-mail")).to_be_focused()


def test_a_wrong_password_is_reported(visitor: Visitor, name: str) -> None:
    visitor.app.register(name)
    visitor.refusals = {401}

    visitor.log_in(name, "wrong horse")

    expect(visitor.problem).to_have_text("Wrong e-mail address or password.")
    expect(visitor.page.get_by_role("button", name="Log in")).to_be_visible()


def test_invalid_values_are_reported_at_their_fields(visitor: Visitor) -> None:
    visitor.refusals = {422}
    visitor.page.get_by_label("E-mail").fill("no address")
    visitor.page.get_by_label("Password").fill("short")

    visitor.button("Register").click()

    for field_name, words in (("E-mail", "ada@example.com"), ("Password", "8"), ("Name", "1")):
        input_ = visitor.page.get_by_label(field_name)
        expect(input_).to_have_attribute("aria-invalid", "true")
        expect(input_).to_have_accessible_description(re.compile(words))
    expect(visitor.page.get_by_label("E-mail")).to_be_focused()
    expect(visitor.problem).to_be_empty()


def test_a_taken_address_is_reported_at_its_field(visitor: Visitor, name: str) -> None:
    visitor.app.register(name)
    visitor.refusals = {409}
    visitor.page.get_by_label("E-mail").fill(f"{name}@example.com")
    visitor.page.get_by_label("Password").fill(PASSWORD)
    visitor.page.get_by_label("Name").fill("Ada")

    visitor.button("Register").click()

    expect(visitor.page.locator("#email-mistake")).to_have_text("This e-mail address is taken.")


def test_a_forgotten_password_is_replaced_with_the_link_in_the_mailbox(
    visitor: Visitor, name: str
) -> None:
    visitor.app.register(name)
    visitor.page.get_by_label("Have an account").check(force=True)
    visitor.button("Forgot your password?").click()
    visitor.page.get_by_label("E-mail").fill(f"{name}@example.com")
    visitor.button("Send the link").click()

    tab = visitor.new_tab(visitor.page.get_by_role("link", name="Open the mailbox"))
    tab.follow("Choose a new password here", f"{name}@example.com")
    expect(tab.page.get_by_label("New password")).to_be_focused()
    tab.page.get_by_label("New password").fill("a battery staple")
    tab.button("Set the password").click()
    expect(tab.said).to_have_text("The password is changed. Log in with the new one.")
    tab.log_in(name, "a battery staple")

    expect(tab.page.locator("#who")).to_have_text(f"Ada, {name}@example.com")
    assert "battery" not in tab.page.content()


def test_a_link_that_does_not_work_leads_to_a_new_one(visitor: Visitor) -> None:
    visitor.refusals = {422}
    visitor.page.goto(f"{visitor.url}#reset=used.or.expired")
    visitor.page.get_by_label("New password").fill("a battery staple")

    visitor.button("Set the password").click()

    expect(visitor.problem).to_contain_text("link")
    expect(visitor.button("Send the link")).to_be_visible()
    expect(visitor.page.get_by_label("E-mail")).to_be_focused()


def test_the_account_can_be_renamed_and_its_address_verified(ada: Visitor, name: str) -> None:
    expect(ada.page.locator("#unverified")).to_be_visible()
    ada.button("Account").click()
    settings = ada.page.get_by_role("region", name="Account")
    settings.get_by_label("Name").fill("Ada King")
    settings.get_by_label("E-mail").fill(f"new-{name}@example.com")
    ada.refusals = {422}
    settings.get_by_label("Current password").fill("wrong horse")
    ada.button("Save").click()
    expect(settings.get_by_label("Current password")).to_have_attribute("aria-invalid", "true")
    settings.get_by_label("Current password").fill(PASSWORD)
    ada.button("Save").click()
    expect(ada.page.locator("#who")).to_have_text(f"Ada King, {name}@example.com")

    tab = ada.new_tab(ada.page.get_by_role("link", name="Open the mailbox"))
    tab.follow("Verify the address here", f"new-{name}@example.com")

    expect(tab.page.locator("#notice")).to_have_text("The address is verified.")
    expect(ada.page.locator("#who")).to_have_text(f"Ada King, new-{name}@example.com")
    expect(settings.get_by_label("E-mail")).to_have_value(f"new-{name}@example.com")
    expect(ada.page.locator("#unverified")).to_be_hidden()


def test_login_sessions_can_be_ended(ada: Visitor, name: str, token: str) -> None:
    def sessions() -> int:
        return len(ada.app.request("GET", "/auth/sessions", token=token).body)

    ada.app.log_in(f"{name}@example.com")
    ada.app.log_in(f"{name}@example.com")
    ada.button("Account").click()
    ends = ada.page.locator("#sessions").get_by_role("button", name="End the session")
    expect(ends).to_have_count(3)

    ends.first.click()
    expect(ada.said).to_have_text("The session is ended.")
    expect(ends.first).to_be_focused()
    assert sessions() == 3
    ada.button("End all other sessions").click()
    expect(ada.said).to_have_text("All other sessions are ended.")

    assert sessions() == 1
    expect(ada.page.locator("#sessions li")).to_contain_text("This session")
    ada.add("Buy milk")


def test_a_closed_registration_is_not_offered(visitor: Visitor) -> None:
    def close(route: Route) -> None:
        status = route.fetch().json()
        assert status["app"]["is_registration_open"]
        status["app"]["is_registration_open"] = False
        route.fulfill(json=status)

    visitor.page.route("**/home/status", close)
    visitor.open()

    expect(visitor.button("Log in")).to_be_visible()
    expect(visitor.page.locator("#closed")).to_contain_text("Registration is closed")
    expect(visitor.page.get_by_label("New here")).to_be_hidden()


def test_a_task_can_be_completed_edited_and_deleted(ada: Visitor, token: str) -> None:
    ada.add("Buy milk", "Mend the bicycle")
    ada.tick("Buy milk")
    assert ada.titles_of(token, "completed=true") == ["Buy milk"]

    ada.button("Edit", "Buy milk").click()
    ada.page.get_by_role("textbox", name="Title").fill("Buy oat milk")
    ada.button("Save").click()
    expect(ada.said).to_have_text("Saved “Buy oat milk”.")
    assert ada.titles_of(token, "completed=true") == ["Buy oat milk"]

    ada.button("Delete", "Mend the bicycle").click()
    expect(ada.said).to_have_text("Deleted “Mend the bicycle”.")
    ada.sees("Buy oat milk")
    assert ada.titles_of(token) == ["Buy oat milk"]


def test_a_rejected_title_is_reported_and_not_lost(ada: Visitor) -> None:
    ada.add("Buy milk")
    ada.refusals = {422}
    ada.button("Edit", "Buy milk").click()
    title = ada.page.get_by_role("textbox", name="Title")
    title.fill("x" * 201)

    ada.button("Save").click()

    expect(title).to_have_attribute("aria-invalid", "true")
    expect(title).to_have_accessible_description(re.compile("200"))
    expect(title).to_have_value("x" * 201)
    ada.button("Cancel").click()
    ada.sees("Buy milk")


def test_other_actions_do_not_discard_an_edit(ada: Visitor, token: str) -> None:
    ada.add("three", "two", "one")
    ada.button("Edit", "two").click()
    title = ada.page.get_by_role("textbox", name="Title")
    title.fill("two and more")

    ada.tick("one")
    expect(title).to_have_value("two and more")
    ada.page.get_by_role("checkbox", name="one").press("Escape")  # has no effect here
    expect(title).to_have_value("two and more")
    title.press("Alt+ArrowUp")
    title.press("Alt+ArrowDown")
    ada.page.get_by_label("Search").fill("two")
    expect(ada.said).to_have_text("1 shown")
    expect(title).to_have_value("two and more")
    ada.button("Save").click()
    expect(ada.said).to_have_text("Saved “two and more”.")

    assert ada.titles_of(token) == ["one", "two and more", "three"]


def test_a_saved_task_that_no_longer_matches_the_search_disappears(
    ada: Visitor, token: str
) -> None:
    ada.add("Mend the bicycle", "Buy milk")
    ada.page.get_by_label("Search").fill("milk")
    ada.sees("Buy milk")
    ada.button("Edit", "Buy milk").click()
    ada.page.get_by_role("textbox", name="Title").fill("Buy bread")

    ada.button("Save").click()

    expect(ada.said).to_have_text("Saved “Buy bread”.")
    ada.sees()
    assert ada.titles_of(token) == ["Buy bread", "Mend the bicycle"]


def test_tasks_can_be_reordered_with_buttons_and_by_dragging(ada: Visitor, token: str) -> None:
    ada.add("three", "two", "one")
    ada.sees("one", "two", "three")

    ada.button("Move down", "one").click()
    expect(ada.said).to_have_text("“one” is number 2 of 3.")
    ada.sees("two", "one", "three")
    assert ada.titles_of(token) == ["two", "one", "three"]

    grips = ada.page.locator("#list .grip")
    bottom = grips.nth(2).bounding_box()
    assert bottom
    grips.nth(0).hover()
    ada.page.mouse.down()
    ada.page.mouse.move(bottom["x"] + 8, bottom["y"] + bottom["height"], steps=3)
    ada.page.mouse.up()
    expect(ada.said).to_have_text("“two” is number 3 of 3.")
    ada.sees("one", "three", "two")
    assert ada.titles_of(token) == ["one", "three", "two"]


def test_tasks_without_an_order_get_one_when_they_are_moved(visitor: Visitor, name: str) -> None:
    token = visitor.app.register(name)
    for title in ("one", "two", "three", "four"):
        visitor.app.request("POST", "/tasks", {"title": title}, token=token)
    visitor.log_in(name)
    visitor.sees("one", "two", "three", "four")

    visitor.button("Move up", "three").click()
    expect(visitor.said).to_have_text("“three” is number 2 of 4.")
    visitor.button("Move up", "four").click()
    expect(visitor.said).to_have_text("“four” is number 3 of 4.")

    visitor.sees("one", "three", "four", "two")
    assert visitor.titles_of(token) == ["one", "three", "four", "two"]


def test_tasks_are_renumbered_when_there_is_no_gap_in_the_order(
    visitor: Visitor, name: str
) -> None:
    token = visitor.app.register(name)
    for title, place in {"one": 1, "two": 2, "three": 3}.items():
        task = {"title": title, "order": place}
        visitor.app.request("POST", "/tasks", task, token=token)
    visitor.log_in(name)

    visitor.button("Move down", "one").click()
    expect(visitor.said).to_have_text("“one” is number 2 of 3.")

    assert visitor.titles_of(token) == ["two", "one", "three"]


def test_tasks_can_be_filtered_and_searched(ada: Visitor) -> None:
    ada.add("Buy milk", "Buy bread", "Mend the bicycle")
    ada.tick("Buy bread")

    ada.page.get_by_label("Done").check(force=True)
    ada.sees("Buy bread")
    expect(ada.said).to_have_text("1 shown")
    ada.page.get_by_label("Open").check(force=True)
    ada.sees("Mend the bicycle", "Buy milk")
    ada.page.get_by_label("Search").press_sequentially("BUY")
    ada.sees("Buy milk")
    ada.page.get_by_label("All").check(force=True)
    ada.sees("Buy bread", "Buy milk")
    ada.page.get_by_label("Search").fill("100 %")
    expect(ada.page.locator("#empty")).to_have_text("No matching tasks.")
    expect(ada.said).to_have_text("No matching tasks.")
    expect(ada.page.get_by_label("Search")).to_be_focused()


def test_show_more_appends_the_next_page(visitor: Visitor, name: str) -> None:
    token = visitor.app.register(name)
    titles = [f"number {number}" for number in range(PAGE_SIZE + 5)]
    for place, title in enumerate(titles):
        visitor.app.request("POST", "/tasks", {"title": title, "order": place}, token=token)
    visitor.log_in(name)
    visitor.sees(*titles[:PAGE_SIZE])

    visitor.button("Show more").click()

    visitor.sees(*titles)
    expect(visitor.page.get_by_role("checkbox", name=titles[PAGE_SIZE])).to_be_focused()
    expect(visitor.button("Show more")).to_be_hidden()
    expect(visitor.last_exchange.locator("summary")).to_contain_text("cursor=")


def test_a_task_that_was_changed_elsewhere_is_not_overwritten(ada: Visitor, token: str) -> None:
    ada.refusals = {412}
    ada.add("Buy milk")
    ada.button("Edit", "Buy milk").click()
    title = ada.page.get_by_role("textbox", name="Title")
    title.fill("Buy oat milk")
    (task,) = ada.app.request("GET", "/tasks", token=token).body
    ada.app.request("PATCH", f"/tasks/{task['id']}", {"title": "Buy bread"}, token=token)

    ada.button("Save").click()
    expect(ada.problem).to_contain_text("it is “Buy bread” now")
    expect(title).to_have_value("Buy oat milk")
    assert ada.titles_of(token) == ["Buy bread"]
    ada.button("Save").click()

    ada.sees("Buy oat milk")
    expect(ada.problem).to_be_empty()
    expect(ada.last_exchange.locator(".curl")).to_contain_text("If-Match")


def test_a_task_that_was_changed_elsewhere_is_not_deleted(ada: Visitor, token: str) -> None:
    ada.refusals = {412}
    ada.add("Buy milk")
    (task,) = ada.app.request("GET", "/tasks", token=token).body
    ada.app.request("PATCH", f"/tasks/{task['id']}", {"title": "Buy bread"}, token=token)

    ada.button("Delete", "Buy milk").click()

    expect(ada.problem).to_contain_text("changed elsewhere")
    ada.sees("Buy bread")


def test_all_completed_tasks_can_be_deleted(ada: Visitor, token: str) -> None:
    ada.add("one", "two", "three")
    ada.tick("one")
    ada.tick("three")

    ada.button("Delete completed").click()

    ada.sees("two")
    assert ada.titles_of(token) == ["two"]


def test_a_copied_command_repeats_the_request(ada: Visitor, token: str) -> None:
    ada.add(MARKUP)
    ada.button("Copy curl").first.click()
    expect(ada.said).to_have_text("Copied.")
    command = clipboard(ada.page)
    assert "$TOKEN" in command.replace(MARKUP, "")

    ada.button("Copy TOKEN=…").click()
    expect(ada.page.locator("#copy-token")).to_have_text("Copied")
    script = f"{clipboard(ada.page)}\n{command}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=SECONDS, check=True
    )

    assert done.stdout.startswith("HTTP/1.1 201 Created")
    assert json.loads(done.stdout.partition("\n\n")[2])["title"] == MARKUP
    assert ada.titles_of(token) == [MARKUP, MARKUP]


def test_every_successful_copy_is_announced(ada: Visitor) -> None:
    ada.page.evaluate(RECORD_ANNOUNCEMENTS)
    button = ada.page.locator("#copy-token")

    for count in (1, 2):
        button.click()
        ada.page.wait_for_function(HAS_SAID, arg=count)
    ada.page.evaluate(REFUSE_COPYING)
    button.click()
    expect(button).to_have_text("Not copied")
    ada.page.wait_for_function(HAS_SAID, arg=3)

    words = ["Copied.", "Copied.", "The browser did not let the page copy it."]
    assert ada.page.evaluate("said") == words


def test_a_name_that_looks_like_a_variable_is_escaped(visitor: Visitor, name: str) -> None:
    visitor.page.get_by_label("E-mail").fill(f"{name}@example.com")
    visitor.page.get_by_label("Password").fill(PASSWORD)
    visitor.page.get_by_label("Name").fill("$HOME")
    visitor.button("Register").click()
    expect(visitor.said).to_have_text("Logged in.")

    exchange = visitor.page.locator("#exchanges > li", has_text="/auth/register")
    command = exchange.locator(".curl").text_content() or ""
    command = command.replace(name, f"{name}-2")
    done = subprocess.run(
        ["bash", "-c", f"PASSWORD='{PASSWORD}'\n{command}"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )

    assert json.loads(done.stdout.partition("\n\n")[2])["name"] == "$HOME"


def test_a_copied_login_takes_the_password_from_a_shell_variable(ada: Visitor, name: str) -> None:
    for path in ("/auth/register", "/auth/login"):
        exchange = ada.page.locator("#exchanges > li", has_text=path)
        exchange.locator("summary").click()
        button = exchange.get_by_role("button")
        button.click()
        expect(button).to_have_text("Copied")
        command = clipboard(ada.page).replace(name, f"{name}-2")
        script = f"PASSWORD='{PASSWORD}'\n{command}"
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=SECONDS, check=True
        )
        assert done.stdout.startswith("HTTP/1.1 20"), done.stdout


def test_no_secret_is_shown_or_stored(ada: Visitor) -> None:
    ada.add("Buy milk")

    page = ada.page.content()
    assert PASSWORD not in page
    assert "eyJ" not in page  # the beginning of every JWT
    assert "$PASSWORD" in page
    assert ada.page.context.cookies() == []
    assert ada.page.evaluate("localStorage.length + sessionStorage.length") == 0
    ada.open()
    expect(ada.button("Register")).to_be_visible()


def test_an_expired_access_token_is_refreshed(ada: Visitor) -> None:
    ada.refusals = {401}
    ada.page.route("**/tasks", make_stale, times=1)

    ada.add("Buy milk")

    ada.sees("Buy milk")
    expect(ada.page.locator("#exchanges .path")).to_have_text(
        [
            *("/tasks", "/auth/refresh", "/tasks", "/tasks?sort=order&limit=20"),
            *("/auth/me", "/auth/login", "/auth/register"),
        ]
    )


def test_an_ended_session_leads_back_to_the_login_form(ada: Visitor, stage: Stage) -> None:
    ada.refusals = {401}
    stage.ask("DELETE FROM refresh_tokens")
    ada.page.route("**/tasks", make_stale)
    ada.page.get_by_label("New task").fill("Buy milk")

    ada.button("Add").click()

    expect(ada.problem).to_have_text("Your login has expired. Log in again.")
    expect(ada.page.get_by_label("E-mail")).to_be_focused()
    expect(ada.button("Log in")).to_be_visible()


def test_a_stopped_database_is_reported_and_work_continues_when_it_is_back(
    ada: Visitor, stage: Stage
) -> None:
    ada.add("Buy milk")
    ada.refusals = {503}

    stage.server.stop()
    try:
        ada.page.get_by_role("checkbox", name="Buy milk").click()
        expect(ada.problem).to_have_text(re.compile(r"Try again in \d+ s\.$"))
        expect(ada.page.get_by_role("checkbox", name="Buy milk")).not_to_be_checked()
        expect(ada.page.locator("#database")).to_have_text("✗ unavailable")
        expect(ada.page.locator("#trouble")).to_contain_text("nothing listens", ignore_case=True)
    finally:
        stage.server.start()

    ada.tick("Buy milk")
    expect(ada.problem).to_be_empty()
    expect(ada.page.locator("#database")).to_have_text("✓ PostgreSQL")
    expect(ada.page.locator("#trouble")).to_be_empty()


def test_a_stopped_app_is_reported(ada: Visitor) -> None:
    ada.page.route("**/tasks", lambda route: route.abort("connectionrefused"))
    ada.page.get_by_label("New task").fill("Buy milk")

    ada.button("Add").click()

    expect(ada.problem).to_contain_text("The API does not answer.")
    expect(ada.last_exchange.locator("summary")).to_contain_text("no answer")
    expect(ada.page.get_by_label("New task")).to_have_value("Buy milk")


class Typist:
    """A user without a mouse. outlines: the focus outline at each stop."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.press = page.keyboard.press
        self.type = page.keyboard.type
        self.outlines: set[str] = set()

    def tab_to(self, target: Locator) -> None:
        for _ in range(30):
            self.press("Tab")
            self.outlines.add(self.page.locator(":focus").evaluate(OUTLINE))
            if target.evaluate("element => element === document.activeElement"):
                return
        raise AssertionError(f"no way leads to {target}")


def test_a_user_can_register_with_the_keyboard(visitor: Visitor, name: str) -> None:
    typist = Typist(visitor.page)
    typist.tab_to(visitor.page.get_by_role("link", name="Skip to the tasks"))
    typist.press("Enter")
    typist.tab_to(visitor.page.get_by_label("New here"))
    for text in (f"{name}@example.com", PASSWORD, "Ada"):
        typist.press("Tab")
        typist.type(text)
    typist.press("Enter")

    expect(visitor.page.get_by_label("New task")).to_be_focused()
    typist.type("Buy milk")
    typist.press("Enter")
    visitor.sees("Buy milk")
    expect(visitor.page.get_by_label("New task")).to_be_focused()
    assert typist.outlines == {"solid"}


def test_tasks_can_be_managed_with_the_keyboard_without_losing_the_focus(ada: Visitor) -> None:
    ada.add("two", "one")
    typist = Typist(ada.page)
    box = ada.page.get_by_role("checkbox", name="one")
    edit = ada.button("Edit", "one")

    typist.tab_to(box)
    typist.press("Space")
    expect(ada.said).to_have_text("“one” is done.")
    expect(box).to_be_focused()
    typist.press("Alt+ArrowDown")
    expect(ada.said).to_have_text("“one” is number 2 of 2.")
    expect(box).to_be_focused()
    typist.tab_to(ada.button("Move up", "one"))
    typist.press("Enter")
    expect(ada.said).to_have_text("“one” is number 1 of 2.")
    expect(ada.button("Move down", "one")).to_be_focused()  # it cannot move further up
    typist.tab_to(edit)
    typist.press("Enter")
    expect(ada.page.get_by_role("textbox", name="Title")).to_be_focused()
    typist.press("Escape")
    expect(edit).to_be_focused()
    typist.press("Enter")
    typist.type(" more")
    typist.press("Enter")
    expect(ada.said).to_have_text("Saved “one more”.")
    expect(ada.button("Edit", "one more")).to_be_focused()
    typist.tab_to(ada.button("Delete", "one more"))
    typist.press("Enter")
    ada.sees("two")
    expect(ada.page.get_by_role("checkbox", name="two")).to_be_focused()
    typist.tab_to(ada.last_exchange.get_by_role("button", name="Copy curl"))
    typist.press("Enter")
    expect(ada.said).to_have_text("Copied.")

    assert "-X DELETE" in clipboard(ada.page)
    assert typist.outlines == {"solid"}


def test_markup_in_a_title_is_shown_as_text(ada: Visitor) -> None:
    ada.add(MARKUP)

    ada.sees(MARKUP)
    expect(ada.button("Delete", MARKUP)).to_have_count(1)
    assert ada.page.locator("#list img, #list b").count() == 0
    with pytest.raises(Error, match="TrustedHTML"):
        ada.page.evaluate("document.body.innerHTML = '<b>x</b>'")
    ada.complaints.clear()  # the browser reported that attempt


# Without transitions: axe would measure colors while they change from one scheme to the other.
@pytest.mark.parametrize("screen", [{"reduced_motion": "reduce"}], ids=str)
def test_the_page_passes_the_accessibility_rules_of_axe(visitor: Visitor, name: str) -> None:
    """axe-core checks the page before, during and after an error, and the mailbox."""
    found = violations(visitor.page)
    visitor.register(name)
    visitor.button("Account").click()
    expect(visitor.page.locator("#sessions li")).to_have_count(1)
    visitor.add("Buy milk", "Mend the bicycle")
    visitor.tick("Buy milk")
    found += violations(visitor.page)
    visitor.button("Account").click()
    visitor.refusals = {422}
    visitor.button("Edit", "Mend the bicycle").click()
    visitor.page.get_by_role("textbox", name="Title").fill("")
    visitor.button("Save").click()
    title = visitor.page.get_by_role("textbox", name="Title")
    expect(title).to_have_attribute("aria-invalid", "true")
    visitor.page.route("**/tasks", lambda route: route.abort("connectionrefused"))
    visitor.button("Delete completed").click()
    visitor.button("Add").click()
    expect(visitor.problem).not_to_be_empty()
    found += violations(visitor.page)
    tab = visitor.new_tab(visitor.page.get_by_role("link", name="Mailbox"))
    expect(tab.page.locator("article").first).to_be_visible()
    found += violations(tab.page)

    assert found == []


def violations(page: Page) -> list[str]:
    """Return what breaks a rule about colors in dark mode, or any rule in light mode."""
    page.emulate_media(color_scheme="dark")
    found = broken_rules(page, "dark", runOnly=["color-contrast", "link-in-text-block"])
    page.emulate_media(color_scheme="light")
    return found + broken_rules(page, "light")


def broken_rules(page: Page, scheme: str, **options: object) -> list[str]:
    # The frames of messages run no scripts, so axe cannot look into them.
    results = Axe().run(page, options={"iframes": False, **options}).response["violations"]
    return [f"{scheme}, {rule['id']}: {node['html']}" for rule in results for node in rule["nodes"]]


@pytest.mark.parametrize("screen", [{"color_scheme": "dark", "reduced_motion": "reduce"}], ids=str)
def test_the_page_respects_dark_mode_and_reduced_motion(visitor: Visitor) -> None:
    style = "(element, name) => getComputedStyle(element)[name]"
    background = visitor.page.locator("body").evaluate(style, "backgroundColor")
    ink = visitor.page.locator("body").evaluate(style, "color")
    duration = visitor.button("Register").evaluate(style, "transitionDuration")

    assert max(map(int, re.findall(r"\d+", background))) < 40
    assert min(map(int, re.findall(r"\d+", ink))) > 200
    assert duration == "0s"


@pytest.mark.parametrize(
    "screen",
    [{"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}],
    ids=["phone"],
)
def test_a_phone_shows_everything_without_scrolling_sideways(visitor: Visitor, name: str) -> None:
    width = "document.documentElement.scrollWidth"
    assert visitor.page.evaluate(width) == 320

    visitor.register(name)
    visitor.add("Buy milk", "W" * 200, "Rindfleischetikettierungsüberwachungsaufgaben")
    visitor.button("Edit", "Buy milk").tap()
    visitor.button("Account").tap()
    expect(visitor.page.locator("#sessions")).to_be_visible()

    assert visitor.page.evaluate(width) == 320
    buttons = visitor.page.locator("#tasks button:visible").all()
    size = "button => Math.min(button.offsetWidth, button.offsetHeight)"
    assert len(buttons) > 10
    assert min(button.evaluate(size) for button in buttons) >= 44  # minimum size for a finger


@dataclass
class Issuer:
    """A server that publishes a key like Better Auth, and signs tokens with it."""

    origin: str
    key: Ed25519PrivateKey

    def token(self, user: str) -> str:
        claims = {"iss": self.origin, "aud": self.origin, "sub": user, "exp": time.time() + 900}
        head = {"alg": "EdDSA", "typ": "JWT", "kid": "one"}
        content = ".".join(base64url(json.dumps(part).encode()) for part in (head, claims))
        return f"{content}.{base64url(self.key.sign(content.encode()))}"


def base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    key = Ed25519PrivateKey.generate()
    public = base64url(key.public_key().public_bytes_raw())
    published = {"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "kid": "one", "x": public}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"keys": [published]}).encode())

        def log_message(self, *_arguments: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Issuer(f"http://127.0.0.1:{server.server_port}", key)
        server.shutdown()
        thread.join()


def test_with_better_auth_the_page_accepts_a_token(
    browser: Browser, stage: Stage, issuer: Issuer
) -> None:
    with stage.app("tokens", ENVIRONMENT="development", BETTER_AUTH_URL=issuer.origin) as app:
        visitor = Visitor(browser.new_page(), app, refusals={401})
        visitor.watch()
        visitor.open()
        field = visitor.page.get_by_label("Access token")
        expect(visitor.page.get_by_label("E-mail")).to_be_hidden()
        expect(visitor.page.get_by_role("link", name="Mailbox")).to_be_hidden()
        link = visitor.page.get_by_role("link", name=f"{issuer.origin}/api/auth/token")
        expect(link).to_be_visible()

        field.fill("no token")
        visitor.button("Use this token").click()
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_have_accessible_description(re.compile("is invalid"))

        token = issuer.token("somebody-elsewhere")
        field.fill(token)
        visitor.button("Use this token").click()
        visitor.add("Buy milk")
        visitor.sees("Buy milk")
        expect(visitor.page.locator("#who")).to_have_text("with a Better Auth token")
        expect(visitor.button("Account")).to_be_hidden()
        assert token not in visitor.page.content()
        visitor.page.close()

    assert visitor.complaints == []


def test_authorize_works_in_the_documentation(visitor: Visitor, name: str) -> None:
    visitor.app.register(name)
    page = visitor.page
    page.goto(f"{visitor.url}docs")

    page.get_by_role("button", name="Authorize").click()
    page.get_by_label("username").fill(f"{name}@example.com")
    page.locator("#oauth_password").fill(PASSWORD)
    page.get_by_label("Apply given OAuth2 credentials").click()
    expect(page.get_by_label("Remove authorization")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    operation = page.locator("#operations-auth-get_me")
    operation.click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("button", name="Execute").click()

    expect(operation.locator(".live-responses-table")).to_contain_text(f"{name}@example.com")


def test_redoc_shows_the_routes(visitor: Visitor) -> None:
    visitor.page.goto(f"{visitor.url}redoc")

    expect(visitor.page.get_by_role("heading", name="List Tasks")).to_be_visible()
    expect(visitor.page.get_by_role("heading", name="Delete Me")).to_be_attached()
