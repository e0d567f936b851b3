"""Screenshots of the home page, the mailbox and the API documentation, as a newcomer sees them."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pictures.browser import chromium
from playwright.sync_api import Browser, Page, ViewportSize, expect

REPOSITORY = Path(__file__).parents[1]
UV = os.environ.get("UV") or "uv"  # set by `uv run`; a shim on the PATH may hide uv
SECONDS = 120
WIDE = ViewportSize(width=1280, height=860)
PHONE = ViewportSize(width=390, height=844)
TASKS = ("Water the tomatoes", "Answer Grace’s letter", "Mend the bicycle", "Buy milk")


def draw(folder: Path) -> list[Path]:
    """Generate a project, serve it, and take screenshots. Returns the files."""
    with tempfile.TemporaryDirectory() as work:
        clone = ["git", "clone", "--quiet", str(REPOSITORY), "template"]
        subprocess.run(clone, check=True, cwd=work, timeout=SECONDS)
        generate = [UV, "tool", "run", "cookiecutter", "template", "--no-input"]
        subprocess.run(generate, check=True, cwd=work, env=environment(), timeout=SECONDS)
        project = Path(work, "todo-backend")
        try:
            return photograph(project, folder)
        finally:
            stop = [UV, "run", "manage.py", "postgres", "stop"]
            subprocess.run(stop, check=True, cwd=project, env=environment(), timeout=SECONDS)


def photograph(project: Path, folder: Path) -> list[Path]:
    """Serve a project in development mode, and take screenshots. Returns the files."""
    with served(project) as url, chromium() as browser:
        return [
            mailbox(browser, url, folder),  # first, while it has one message
            *(page_in(browser, url, scheme, folder) for scheme in ("light", "dark")),
            phone(browser, url, folder),
            docs(browser, url, folder),
        ]


def environment() -> dict[str, str]:
    """Return the environment without the variables that `uv run` and pyenv set."""
    foreign = ("VIRTUAL_ENV", "PYENV_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


@contextmanager
def served(project: Path) -> Iterator[str]:
    """Serve a project as its README describes. Yields the URL."""
    port = free_port()
    server = subprocess.Popen(
        [UV, "run", "main.py"],
        cwd=project,
        env=environment() | {"PORT": str(port), "ENVIRONMENT": "development"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(port, server)
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(server.pid, signal.SIGINT)  # uv, the reloader and the app
        server.wait(SECONDS)


def free_port() -> int:
    """Return the port from the README, or another one if that is taken."""
    for port in (8000, 0):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)) as free:
            return int(free.getsockname()[1])
    raise RuntimeError("no port is free")


def wait_for(port: int, server: "subprocess.Popen[bytes]") -> None:
    """Wait until the server accepts connections. Raises OSError."""
    limit = time.monotonic() + SECONDS
    while True:
        if server.poll() is not None:
            raise RuntimeError("the app has ended")
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.1)
        else:
            return


def page_in(browser: Browser, url: str, scheme: str, folder: Path) -> Path:
    """Take a screenshot of the page in a colour scheme, with some tasks of a new account."""
    page = browser.new_page(
        viewport=WIDE, color_scheme="dark" if scheme == "dark" else "light", device_scale_factor=2
    )
    work_on_tasks(page, url, "Grace" if scheme == "dark" else "Ada")
    return take(page, folder / f"page-{scheme}.png")


def phone(browser: Browser, url: str, folder: Path) -> Path:
    page = browser.new_page(
        viewport=PHONE, device_scale_factor=2, has_touch=True, is_mobile=True, color_scheme="light"
    )
    work_on_tasks(page, url, "Alan")
    page.get_by_role("heading", name="Tasks").scroll_into_view_if_needed()
    page.evaluate("window.scrollTo(0, document.getElementById('tasks').offsetTop - 16)")
    return take(page, folder / "page-phone.png")


def mailbox(browser: Browser, url: str, folder: Path) -> Path:
    """Register, and take a screenshot of the message with the link, as text and as HTML."""
    page = browser.new_page(viewport=WIDE, device_scale_factor=2, color_scheme="light")
    page.goto(url)
    register(page, "Mary")
    expect(page.get_by_role("status")).to_have_text("Logged in.")
    page.goto(f"{url}mailbox")
    message = page.get_by_role("article")
    limit = time.monotonic() + SECONDS
    while not message.is_visible():  # it takes up to a second
        if time.monotonic() > limit:
            raise RuntimeError("the message has not arrived")
        time.sleep(0.2)
        page.reload()
    # Chromium draws a sandboxed frame without the device_scale_factor: blurred.
    message.locator("iframe").evaluate(
        "frame => { frame.removeAttribute('sandbox'); frame.srcdoc = frame.srcdoc }"
    )
    message.get_by_text("As HTML").click()
    expect(message.frame_locator("iframe").get_by_role("link")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    return take(page, folder / "mailbox.png")


def docs(browser: Browser, url: str, folder: Path) -> Path:
    page = browser.new_page(viewport=WIDE, device_scale_factor=2, color_scheme="light")
    page.goto(f"{url}docs")
    expect(page.get_by_role("button", name="Authorize")).to_be_visible()
    return take(page, folder / "docs.png")


def work_on_tasks(page: Page, url: str, name: str) -> None:
    """Register, add tasks, and tick one."""
    page.goto(url)
    register(page, name)
    for title in TASKS:
        page.get_by_label("New task").fill(title)
        page.get_by_role("button", name="Add").click()
        expect(page.get_by_role("checkbox", name=title)).to_be_visible()
    page.get_by_role("checkbox", name="Mend the bicycle").click()
    expect(page.get_by_role("status")).to_contain_text("is done")
    page.get_by_role("heading", name="Tasks").click()  # remove the focus
    page.evaluate("document.activeElement.blur()")


def register(page: Page, name: str) -> None:
    page.get_by_label("E-mail").fill(f"{name.lower()}@example.com")
    page.get_by_label("Password").fill("correct horse")
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Register").click()


def take(page: Page, picture: Path) -> Path:
    page.screenshot(path=picture)
    page.close()
    return picture
