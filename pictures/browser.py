"""Headless Chromium for pictures and tests. It opens only local pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

# Without these, Chromium contacts its vendor's servers at startup.
FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]


def find_chromium() -> str | None:
    """Return the system's browser. Playwright's would have to be downloaded."""
    # The shell is the same engine without windows, and takes a third of the processor time.
    shell = shutil.which("chromium-headless-shell")
    return shell or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium(*, keeps_pages: bool = False) -> Iterator[Browser]:
    """Start a browser with an empty profile.

    keeps_pages: whether Back may show a page from memory, as browsers do, but not Playwright.
    """
    # The shell keeps pages only if it is told to, and Playwright tells every browser not to.
    added = ["--enable-bfcache"] if keeps_pages else []
    ignored = ["--disable-back-forward-cache"] if keeps_pages else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(),
            args=[*FLAGS, *added],
            chromium_sandbox=False,
            ignore_default_args=ignored,
        )
        try:
            yield browser
        finally:
            browser.close()
