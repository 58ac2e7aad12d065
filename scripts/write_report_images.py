"""Write docs/img/report-light.png and report-dark.png: the page of a saved report.

Needs playwright and a Chromium; REPORT is what ``edgekd report --save`` wrote::

    python scripts/write_report_images.py benchmarks/results/report_demo.json
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from edgekd.runtime.report_formats import read_report, render_report

FOLDER = Path(__file__).parents[1] / "docs" / "img"
SIZE = {"width": 1180, "height": 760}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def write_images(page_file: Path) -> None:
    """Write what a browser shows of ``page_file``, the whole page in light and dark."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)
            page.goto(page_file.as_uri())
            page.screenshot(path=FOLDER / f"report-{scheme}.png", full_page=True)
        browser.close()


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
