"""A real Chromium, driven over its pipe; none is ever downloaded."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

_REFUSED = re.compile("status of 40[01] ")
"""What Chromium says of an answer that the page shows to the reader."""


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Run the system's Chromium; skip where there is none."""
    sync = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright; run: pip install --group dev"
    )
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs Chromium; run: apt-get install chromium")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: "Browser", url: str, path: str = "/", **options: Any) -> Iterator["Page"]:
    """Open a page; it must not complain, and must ask no other host than the server."""
    with watched(browser, **options) as (page, asked):
        page.goto(url + path)
        yield page
    assert asked and all(each.startswith((url + "/", "data:")) for each in asked), asked


@contextmanager
def opened_file(browser: "Browser", file: Path, **options: Any) -> Iterator["Page"]:
    """Open a file from the disk; it must not complain, and must ask for nothing but itself."""
    with watched(browser, **options) as (page, asked):
        page.goto(file.as_uri())
        yield page
    assert asked == [file.as_uri()]


@contextmanager
def watched(browser: "Browser", **options: Any) -> Iterator[tuple["Page", list[str]]]:
    """Yield a page and what it asks for; at the end it must not have complained."""
    context = browser.new_context(**options)
    context.set_default_timeout(30_000)
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page, asked
    context.close()
    assert [each for each in complaints if not _REFUSED.search(each)] == []
