"""What the pages say about runs that are committed is what those runs say."""

import json
import re

import pytest

from edgekd.devices.backends import BACKENDS
from tests.docs.pages import PAGES, ROOT

GPU_RUN = json.loads((ROOT / "benchmarks/results/five_rows_gpu.json").read_text("utf-8"))


def words(path: str) -> str:
    """Return the text of a page with single blanks."""
    return " ".join((ROOT / path).read_text("utf-8").split())


def test_the_run_that_was_cut_off_is_called_so_with_its_rows_and_epochs() -> None:
    page = words("docs/grid.md")
    assert GPU_RUN["cut_off"] and "five_rows_gpu.json), was **cut off**" in page
    *rows, last = [row["row"] for row in GPU_RUN["rows"]]
    assert f"three rows: {', '.join(rows)}, and {last}." in page and len(rows) == 2
    trained = {name: run["last"]["epoch"] for name, run in GPU_RUN["trainings"].items()}
    assert "baseline-second" not in trained and "no baseline of equal tokens" in page
    first, second = trained["distilled-first"], trained["distilled-second"]
    assert f"{first:.1f} epochs of it, the last quarter {second:.1f}." in page


def test_a_gpu_that_trained_was_at_hand() -> None:
    """So no page and no label may say that there was none; what was not tried may be named."""
    assert GPU_RUN["machine"]["gpus"]
    denial = re.compile(r"no (NVIDIA )?GPU was at hand")
    assert not [name for name, each in BACKENDS.items() if denial.search(each.evidence)]
    assert not [page for page in PAGES if denial.search(words(page.relative_to(ROOT).as_posix()))]


@pytest.mark.parametrize("name", ["llamacpp-gpu", "webgpu", "cuda", "tensorrt"])
def test_what_runs_models_on_gpus_is_labelled_as_not_tried(name: str) -> None:
    assert BACKENDS[name].label == "untested" and "not tried" in BACKENDS[name].evidence


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_front_page_leads_to_every_page(page: object) -> None:
    name = getattr(page, "name", "")
    assert name in {"index.md"} or f"]({name}" in words("docs/index.md"), name
