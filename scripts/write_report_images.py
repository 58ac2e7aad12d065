"""Write docs/img/report-light.png and report-dark.png: two parts of the page of a saved report.

Needs playwright and a Chromium; REPORT is what ``edgekd report --save`` wrote::

    python scripts/write_report_images.py benchmarks/results/report_demo.json
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from edgekd.runtime.report_formats import read_report, render_report

FOLDER = Path(__file__).parents[1] / "docs" / "img"
WIDTH_PX = 1180
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PARTS = {
    "light": ("The five rows", "Machine and conditions"),
    "dark": ("Speed", "Memory and energy"),
}
"""By theme: the heading that the image begins with, and the one before which it ends."""


def write_images(page_file: Path) -> None:
    """Write a part of ``page_file`` as a browser shows it, for each theme."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for scheme, (first, last) in PARTS.items():
            size = {"width": WIDTH_PX, "height": 760}
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(page_file.as_uri())
            top, bottom = (heading_y(page, name) for name in (first, last))
            clip = {"x": 0, "y": top - 24, "width": WIDTH_PX, "height": bottom - top}
            page.screenshot(path=FOLDER / f"report-{scheme}.png", full_page=True, clip=clip)
        browser.close()


def heading_y(page: Page, name: str) -> float:
    """Return where a heading begins, in pixels from the top of the page."""
    box = page.get_by_role("heading", name=name, exact=True).bounding_box()
    assert box, name
    return box["y"]


def main() -> None:
    """Render the report and write both images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    document = read_report(parser.parse_args().report)
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / "report.html"
        page_file.write_text(render_report(document, "html"), "utf-8")
        write_images(page_file)


if __name__ == "__main__":
    main()
