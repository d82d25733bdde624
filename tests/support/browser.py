"""A real browser for tests of pages: Chromium without a window, driven by Playwright."""

import contextlib
import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def path_of_chromium():
    """Where the browser is; None if none is found. The environment variable CHROMIUM may name one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def open_browser():
    """A browser. The test is skipped if there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = path_of_chromium()
    if path is None:
        pytest.skip(f"no browser was found, looked for {', '.join(NAMES)}; install chromium, or set CHROMIUM to its path")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page, with what it must not have: errors in its console, and requests to other places than its own."""

    def __init__(self, browser, width=1280, height=900, dark=False):
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", offline=False
        )
        self.page = self.context.new_page()
        self.errors, self.requests = [], []
        self.page.on(
            "console", lambda message: self.errors.append(message.text) if message.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, url):
        """Open a page; returns it."""
        self.page.goto(url)
        return self.page

    def close(self, own):
        """Check that nothing went wrong. own: what the address of every request begins with."""
        self.context.close()
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith((own, "data:"))] == []
