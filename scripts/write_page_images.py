"""Write docs/img/chat-light.png and chat-dark.png: the page with a real model behind it.

Needs playwright and a Chromium; MODEL is anything that ``edgekd serve`` takes::

    python scripts/write_page_images.py MODEL
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

FOLDER = Path(__file__).parents[1] / "docs" / "img"
QUESTION = "Write a Python function that returns the largest number of a list."
SIZE = {"width": 1180, "height": 760}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def write_image(browser: Browser, url: str, scheme: str) -> None:
    """Ask ``QUESTION`` and write what the page shows when the answer is there."""
    page = browser.new_page(viewport=SIZE, color_scheme=scheme)
    page.goto(url)
    page.locator("#send:enabled").wait_for()
    page.click("#open-settings")
    for name, value in {"temperature": "0", "max_tokens": "120", "seed": "1"}.items():
        page.fill(f"[name={name}]", value)
    if scheme == "light":
        page.click("#open-settings")
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    page.locator(".assistant .note", has_text="tokens").wait_for(timeout=120_000)
    page.locator("#memory", has_text="iB").wait_for()
    page.wait_for_timeout(500)  # the meters' last answer
    page.screenshot(path=FOLDER / f"chat-{scheme}.png")


def main() -> None:
    """Serve the model and write both images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--alias", default="smollm2-135m")
    parsed = parser.parse_args()
    command = [sys.executable, "-m", "edgekd", "serve", parsed.model, "--alias", parsed.alias]
    command += ["--port", "0", "--json", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            url = json.loads(server.stdout.readline())["page"]
            with sync_playwright() as playwright:
                path = shutil.which("chromium")
                browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
                for scheme in ("light", "dark"):
                    write_image(browser, url, scheme)
                browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
