"""The page of a benchmark, opened from the disk in a real browser."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgekd.runtime.bench import BenchSettings, run_bench
from edgekd.runtime.bench_formats import render
from tests.runtime.browser import chromium, opened_file

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "<script>document.title='hacked'</script><img src=http://localhost/x>"
WIDE = "\u65e5\u672c\u8a9e\u306e\u30e2\u30c7\u30eb" * 6
# Text that its picture cuts off, and pairs that lie over each other.
CLASHES = """() => [...document.querySelectorAll("main figure > svg")].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter(each => each.textContent);
    const boxes = texts.map(each => [each.textContent, each.getBoundingClientRect()]);
    const cut = boxes.filter(([, b]) => b.left < frame.left - 0.5 || b.right > frame.right + 0.5
        || b.top < frame.top - 0.5 || b.bottom > frame.bottom + 0.5).map(([text]) => [text]);
    const pairs = boxes.flatMap(([text, a], place) => boxes.slice(place + 1)
        .filter(([, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
        .map(([other]) => [text, other]));
    return [...cut, ...pairs];
})"""


@pytest.fixture(scope="module")
def document(tiny_gguf: Path, tiny_onnx: Path) -> dict[str, Any]:
    settings = BenchSettings(
        prompt_tokens=16,
        decode_tokens=8,
        depths=(0, 16),
        ttft_tokens=(8,),
        repetitions=2,
        n_threads=1,
        warm_up_s=0.2,
    )
    run = run_bench([str(tiny_gguf), str(tiny_onnx)], settings)
    return dict(json.loads(json.dumps(run.as_dict())))


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(document: dict[str, Any], browser: "Browser", tmp_path: Path) -> Iterator["Page"]:
    with opened_file(browser, write(document, tmp_path)) as found:
        yield found


def write(document: dict[str, Any], folder: Path) -> Path:
    file = folder / "bench.html"
    file.write_text(render(document, "html"), "utf-8")
    return file


def with_names(document: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return ``document`` with the models called ``names``, as many as there are."""
    changed = copy.deepcopy(document)
    first, second = changed["results"]
    changed["results"] = [
        copy.deepcopy(second if place % 2 else first) | {"model": name}
        for place, name in enumerate(names)
    ]
    return changed


def figure_of(page: "Page", title: str) -> Any:
    return page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))


def test_every_picture_has_a_name_and_shows_every_model(
    page: "Page", document: dict[str, Any]
) -> None:
    titles = page.locator("figure h3").all_inner_texts()
    assert titles == [
        *("Decode speed against depth", "Prefill speed"),
        *("Time to first token", "Time between tokens"),
        *("Memory", "Energy of a token"),
    ]
    names = [Path(result["model"]).name for result in document["results"]]
    for title in titles[:5]:
        picture = page.get_by_role("img", name=title, exact=True)
        assert picture.count() == 1
        assert picture.locator(".s0.fill").count() and picture.locator(".s1.fill").count()
        said = figure_of(page, title).inner_text()
        assert all(name in said for name in names), title
    depth = page.get_by_role("img", name="Decode speed against depth")
    assert depth.locator(".stroke").count() == 2
    left = "each => each.getBoundingClientRect().x"
    lefts = [mark.evaluate(left) for mark in depth.locator(".ring").all()]
    assert len(lefts) == 4 and lefts[0] < lefts[1] and lefts[2:] == pytest.approx(lefts[:2], abs=3)


def test_energy_is_a_picture_or_the_reason_why_not(
    page: "Page", document: dict[str, Any], browser: "Browser", tmp_path: Path
) -> None:
    reading = document["results"][0]["scenarios"][-1]["energy_per_token"]
    assert (reading["reason"] or "J/token") in figure_of(page, "Energy of a token").inner_text()
    measured = copy.deepcopy(document)
    for result in measured["results"]:
        for entry in result["scenarios"]:
            entry["energy_per_token"] = reading | {"value": 0.25, "reason": None}
    with opened_file(browser, write(measured, tmp_path)) as other:
        figure = figure_of(other, "Energy of a token")
        assert figure.locator("rect").count() == 2 and "0.25 J" in figure.inner_text()
        assert "navailable" not in figure.inner_text()


def test_machine_versions_and_warnings_are_told(page: "Page", document: dict[str, Any]) -> None:
    said = page.inner_text("main")
    assert document["machine"]["system"] in said and document["tools"]["onnxruntime"] in said
    for warning in document["conditions"]["warnings"]:
        assert f"{warning['message']}; {warning['advice']}" in said
    assert ("Do not rely" in said) == (not document["valid"])
    definition = document["definitions"]["ttft_s"]
    assert page.get_by_text(definition).is_hidden()
    page.click("summary")
    assert page.get_by_text(definition).is_visible()


def test_an_invalid_run_says_so_first(
    document: dict[str, Any], browser: "Browser", tmp_path: Path
) -> None:
    for valid in (True, False):
        with opened_file(browser, write(document | {"valid": valid}, tmp_path)) as page:
            assert page.get_by_text("Do not rely on these figures").count() == (not valid)


def test_text_of_others_is_shown_and_never_run(
    document: dict[str, Any], browser: "Browser", tmp_path: Path
) -> None:
    hostile = with_names(document, HOSTILE.replace("/", "\u2215"), "b")
    hostile["machine"] |= {"system": HOSTILE, "processor": HOSTILE}
    hostile["tools"] = {HOSTILE: HOSTILE}
    hostile["conditions"]["warnings"] = [
        {"code": "x", "message": HOSTILE, "advice": HOSTILE, "invalid": False}
    ]
    with opened_file(browser, write(hostile, tmp_path)) as page:
        assert page.title() == "edgekd bench"
        assert page.locator("script, img, iframe, link").count() == 0
        assert page.inner_text("main").count(HOSTILE) == 6
        assert page.get_by_role("rowheader", name="<script>").count() > 0


def test_the_policy_stops_whatever_got_into_the_page(
    document: dict[str, Any], browser: "Browser", tmp_path: Path
) -> None:
    file = write(document, tmp_path)
    evil = f"<script>document.title='hacked'</script>{HOSTILE}<p style='color:red' id=p>x</p>"
    file.write_text(file.read_text("utf-8").replace("<main>", f"<main>{evil}"), "utf-8")
    page = browser.new_page()
    loaded: list[str] = []
    page.on("response", lambda answer: loaded.append(answer.url))
    page.goto(file.as_uri())
    assert page.title() == "edgekd bench"
    colour = "() => getComputedStyle(document.getElementById('p')).color"
    assert page.evaluate(colour) != "rgb(255, 0, 0)"
    assert [url for url in loaded if not url.startswith("file:")] == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(
    document: dict[str, Any], browser: "Browser", tmp_path: Path, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe")
    file = write(document | {"valid": False}, tmp_path)
    with opened_file(browser, file, color_scheme=scheme) as page:
        page.click("summary")
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("width", [360, 1180])
def test_no_text_is_cut_off_or_lies_over_other_text(
    document: dict[str, Any], browser: "Browser", tmp_path: Path, width: int
) -> None:
    names = [f"student-{'of-a-very-long-name-' * 4}{place}.gguf" for place in range(6)]
    crowded = with_names(document, *names, WIDE)
    view = {"width": width, "height": 900}
    with opened_file(browser, write(crowded, tmp_path), viewport=view) as page:
        assert page.locator("figure > svg text").count() > 100
        assert page.evaluate(CLASHES) == []
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_a_series_has_one_colour_in_picture_and_legend_dark_and_light(
    document: dict[str, Any], browser: "Browser", tmp_path: Path
) -> None:
    colour = "each => getComputedStyle(each).fill"
    seen = []
    for scheme in ("light", "dark"):
        with opened_file(browser, write(document, tmp_path), color_scheme=scheme) as page:
            figure = figure_of(page, "Decode speed against depth")
            for css in (".s0", ".s1"):
                mark = figure.locator(f"> svg {css}.ring").first.evaluate(colour)
                assert figure.locator(f".legend {css}").evaluate(colour) == mark
                seen.append(mark)
    assert len(set(seen)) == 4


def test_what_was_not_measured_is_told(
    document: dict[str, Any], browser: "Browser", tmp_path: Path
) -> None:
    bare = copy.deepcopy(document)
    for kept, result in zip(("prefill", "decode"), bare["results"], strict=True):
        entries = [entry for entry in result["scenarios"] if entry["kind"] == kept]
        result["scenarios"] = entries
        result["memory"]["peak_rss_bytes"]["value"] = None
        for entry in entries:
            for summary in (entry["tokens_per_s"], entry["ttft_s"] or {}):
                summary |= {"ci95": None, "stdev": None}
    bare["roofline"] = None
    for results in (bare["results"], bare["results"][:1], bare["results"][1:]):
        with opened_file(browser, write(bare | {"results": results}, tmp_path)) as page:
            said = page.inner_text("main")
            kinds = {entry["kind"] for result in results for entry in result["scenarios"]}
            assert ("No prefill was measured" in said) == ("prefill" not in kinds)
            assert ("No decode was measured" in said) == ("decode" not in kinds)
            assert page.locator(".interval").count() == 0
            memory = page.get_by_role("img", name="Memory").locator(".value").all_text_contents()
            assert memory.count("unavailable") == len(results)
