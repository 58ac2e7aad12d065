"""edgekd report on tiny real models: the command, its document, and every form of it."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from edgekd.errors import DataError, RecipeError
from edgekd.runtime.bench_settings import BenchSettings
from edgekd.runtime.choices import ChoiceQuality
from edgekd.runtime.estimate import Estimate
from edgekd.runtime.evaluate import EvalOptions, ModelQuality, evaluate
from edgekd.runtime.report import measure_report, quality_figures
from edgekd.runtime.report_formats import FORMS, read_report, render_report, row_views
from edgekd.runtime.report_recipe import resolve_report
from edgekd.runtime.report_settings import ROWS, ReportSettings
from tests.conftest import TEXTS
from tests.runtime.browser import chromium, opened_file

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
GIVEN = ("teacher", "quantized", "int4")
TEXT = " ".join(TEXTS * 8)  # two windows and more
QUESTIONS = [
    {"question": "The quick brown fox", "choices": ["jumps over", "a + b"], "answer": 0},
    {"question": "def add(a, b):", "choices": ["foxes bark", "return a + b"], "answer": 1},
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekd", "report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def recipe(folder: Path, float_gguf: Path, tiny_gguf: Path, tiny_onnx: Path) -> Path:
    """A TOML file that names three of the five rows, a text and questions."""
    (folder / "text.txt").write_text(TEXT, "utf-8")
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), "utf-8")
    file = folder / "rows.toml"
    models = zip(GIVEN, (float_gguf, tiny_gguf, tiny_onnx), strict=True)
    lines = [
        *(f"{key} = {json.dumps(str(path))}" for key, path in models),
        f"text = {json.dumps(str(folder / 'text.txt'))}",
        f"questions = {json.dumps(str(folder / 'questions.jsonl'))}",
        *("tokens = 512", "prompt_tokens = 8", "decode_tokens = 99", "depth = [0, 8]"),
        *("repetitions = 2", "threads = 1", "roofline = false"),
    ]
    file.write_text("\n".join(lines), "utf-8")
    return file


@pytest.fixture(scope="module")
def saved(recipe: Path, folder: Path) -> Path:
    """The report of the command, saved; its last line must be the same document."""
    file = folder / "report.json"
    done = run(str(recipe), "-n", "4", "--save", str(file), "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(file.read_text("utf-8"))
    return file


@pytest.fixture
def document(saved: Path) -> dict[str, Any]:
    return read_report(saved)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


def test_the_document_is_as_the_published_schemas_say(document: dict[str, Any]) -> None:
    for name, part in (("report-1.json", document), ("bench-1.json", document["bench"])):
        schema = json.loads((SCHEMAS / name).read_text("utf-8"))
        checker = jsonschema.Draft202012Validator(schema)
        assert [error.message for error in checker.iter_errors(part)] == []
    schema = json.loads((SCHEMAS / "report-1.json").read_text("utf-8"))
    assert schema["$defs"]["name"]["enum"] == list(ROWS.values())


def test_rows_are_in_order_and_have_the_figures_of_eval(
    document: dict[str, Any], float_gguf: Path, tiny_gguf: Path, tiny_onnx: Path, folder: Path
) -> None:
    assert [row["row"] for row in document["rows"]] == [ROWS[key] for key in GIVEN]
    paths = [str(path) for path in (float_gguf, tiny_gguf, tiny_onnx)]
    assert [row["speed"]["model"] for row in row_views(document)] == paths
    options = EvalOptions(
        teacher=paths[0],
        text=folder / "text.txt",
        n_tokens=512,
        questions=folder / "questions.jsonl",
        n_threads=1,
    )
    for row, expected in zip(document["rows"], evaluate(paths, options).models, strict=True):
        quality = row["quality"]
        assert expected.text and expected.text.to_teacher and expected.questions
        assert quality["perplexity"] == pytest.approx(expected.text.perplexity.value, rel=1e-5)
        kl = expected.text.to_teacher.kl_nats
        assert quality["kl_nats"] == pytest.approx(kl.value, rel=1e-4, abs=1e-9)
        assert quality["standard_errors"]["kl_nats"] == pytest.approx(
            kl.standard_error, rel=1e-3, abs=1e-9
        )
        assert quality["task_accuracy"] == expected.questions.acc_tokens.value
        assert (quality["n_questions"], quality["kl_kind"]) == (2, "exact")
    teacher, quantized, _ = (row["quality"] for row in document["rows"])
    assert teacher["kl_nats"] == pytest.approx(0, abs=1e-9) and teacher["top1_agreement"] == 1
    assert quantized["kl_nats"] > 1e-4


def test_the_task_is_judged_by_likelihood_per_token() -> None:
    shares = {
        name: Estimate(value, value / 10)
        for name, value in (
            ("acc", 0.1),
            ("acc_norm", 0.2),
            ("acc_bytes", 0.3),
            ("acc_tokens", 0.4),
        )
    }
    asked = ChoiceQuality(**shares, n_questions=7)
    quality = ModelQuality(
        model="m", engine="e", provider=None, weights_sha256="0", text=None, questions=asked
    )
    figures = quality_figures(quality)
    assert (figures.task_accuracy, figures.n_questions) == (0.4, 7)
    assert figures.standard_errors == {"task_accuracy": pytest.approx(0.04)}
    assert figures.kl_nats is None and figures.n_positions == 0


def test_options_go_over_the_file(recipe: Path, document: dict[str, Any]) -> None:
    assert document["bench"]["settings"]["decode_tokens"] == 4  # -n 4, the file has 99
    assert document["bench"]["settings"]["depths"] == [0, 8]
    assert document["bench"]["roofline"] is None
    given = {"decode_tokens": 5, "depth": (1, 2), "threads": None, "int4": "other", "limit": 1}
    settings = resolve_report(recipe, given)
    assert (settings.bench.decode_tokens, settings.bench.depths) == (5, (1, 2))
    assert (settings.bench.n_threads, settings.n_questions, settings.n_tokens) == (1, 1, 512)
    assert settings.models["int4"] == "other" and settings.models["teacher"] != "other"


def test_text_forms_name_every_row_and_file_and_what_is_missing(document: dict[str, Any]) -> None:
    for form in ("table", "md"):
        said = render_report(document, form)
        for row in row_views(document):
            assert row["row"] in said and Path(row["speed"]["model"]).name in said
            assert f"{row['quality']['kl_nats']:.4f}" in said
        assert "student baseline: missing, no --baseline was given" in said
        assert "student distilled: missing, no --distilled was given" in said
        assert "2 questions of questions.jsonl, 0 shots" in said
        n_positions = document["rows"][0]["quality"]["n_positions"]
        assert f"{n_positions} tokens predicted, of text.txt" in said
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert len(rows) == 5 and len({line.count("|") for line in rows}) == 1


def test_a_saved_report_is_shown_again_without_measuring(
    saved: Path, document: dict[str, Any]
) -> None:
    shown = run(str(saved), "-o", "md")
    assert shown.stdout.rstrip("\n") == render_report(document, "md").rstrip("\n")
    assert json.loads(render_report(document, "json")) == document
    refused = run(str(saved), "-n", "8", "--text", "x")
    assert refused.returncode == 2 and "--text, --decode-tokens cannot be given" in refused.stderr
    assert set(FORMS) == {"table", "json", "md", "html"}


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    for content, fault in (
        (
            '{"schema": "edgekd.bench/1"}',
            "has schema 'edgekd.bench/1', 'edgekd.report/1' is needed",
        ),
        ("[]", "has schema None"),
        ("{", "is no JSON file"),
        ("[" * 100_000, "is no JSON file"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=fault):
            read_report(file)
    shown = run(str(tmp_path / "none.json"))
    assert shown.returncode == 1 and shown.stderr.startswith("edgekd: cannot read ")
    assert len(shown.stderr.splitlines()) == 1


def test_all_faults_of_a_recipe_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.toml"
    file.write_text('teecher = "x"\ntext = 3\ntokens = "many"\ndepth = 4\nthreads = true\n')
    with pytest.raises(RecipeError) as caught:
        resolve_report(file, {})
    said = str(caught.value)
    assert "unknown keys teecher; known are teacher, baseline" in said and "\n" not in said
    for fault in (
        "text 3 is not text",
        "tokens 'many' is not a whole number",
        "depth 4 is not a list of whole numbers",
        "threads True is not a whole number",
    ):
        assert fault in said


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "no model to report on; give one or more of --teacher, --baseline"),
        ("teacher = ", "is no TOML file"),
        ("teacher = " + "[" * 100_000, "is no TOML file"),
        ("teacher = 'x'\nrepetitions = 0", "repetitions is 0, a whole number from 1 on is needed"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(
    tmp_path: Path, content: str, fault: str
) -> None:
    file = tmp_path / "rows.toml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=fault):
        resolve_report(file, {})
    with pytest.raises(RecipeError, match="cannot read"):
        resolve_report(tmp_path / "none.toml", {})


def test_every_key_of_a_recipe_is_an_option(tmp_path: Path) -> None:
    file = tmp_path / "rows.toml"
    file.write_text("x = 1")
    with pytest.raises(RecipeError) as caught:
        resolve_report(file, {})
    keys = str(caught.value).partition("known are ")[2].split(", ")
    help_text = run("--help").stdout
    assert len(keys) == 17 and all(f"--{key.replace('_', '-')}" in help_text for key in keys)


def test_without_text_and_questions_there_is_speed_alone(tiny_gguf: Path) -> None:
    bench = BenchSettings(prompt_tokens=8, decode_tokens=4, repetitions=1, warm_up_s=0)
    report = measure_report(ReportSettings(models={"int4": str(tiny_gguf)}, bench=bench))
    document = json.loads(json.dumps(report.as_dict()))
    (row,) = document["rows"]
    assert row["quality"] is None and len(document["missing"]) == 4
    assert "not asked" in render_report(document, "table")
    assert "\u00b1" not in render_report(document, "md")  # one repetition has no spread
    assert "No quality was measured" in render_report(document, "html")


def test_through_a_pack_the_kl_is_a_lower_bound(
    float_gguf: Path, tiny_gguf: Path, folder: Path, recipe: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "teacher.pack"
    options = EvalOptions(
        teacher=str(float_gguf), text=folder / "text.txt", write_reference=pack, top_k=4
    )
    evaluate([], options)
    bench = BenchSettings(prompt_tokens=8, decode_tokens=4, repetitions=1, warm_up_s=0)
    settings = ReportSettings(models={"int4": str(tiny_gguf)}, reference=pack, bench=bench)
    document = measure_report(settings).as_dict()
    kl_nats = document["rows"][0]["quality"]["kl_nats"]
    for form in FORMS.keys() - {"json"}:
        said = render_report(document, form)
        assert f"\u2265 {kl_nats:.4f}" in said and "KL is a lower bound" in said


def test_a_result_without_decode_is_shown_as_not_measured(document: dict[str, Any]) -> None:
    bare = copy.deepcopy(document)
    for result in bare["bench"]["results"]:
        result["scenarios"] = [e for e in result["scenarios"] if e["kind"] == "prefill"]
    for form in ("table", "md", "html"):
        assert render_report(bare, form).count("not measured") == 9


def test_the_page_has_rows_and_trade_offs_and_asks_for_nothing(
    document: dict[str, Any], browser: "Browser", tmp_path: Path
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe")
    file = tmp_path / "report.html"
    file.write_text(render_report(document, "html"), "utf-8")
    for scheme in ("light", "dark"):
        with opened_file(browser, file, color_scheme=scheme) as page:
            table = page.get_by_role("table").first
            rows = [ROWS[key] for key in GIVEN]
            assert table.get_by_role("rowheader").all_inner_texts() == rows
            for quality in ("KL to teacher", "Right answers", "Perplexity"):
                for against in ("size", "speed"):
                    name = f"{quality} against {against}"
                    picture = page.get_by_role("img", name=name, exact=True)
                    assert picture.locator(".ring").count() == 3, name
            kl = page.get_by_role("img", name="KL to teacher against size")
            assert kl.locator("path title").all_text_contents()[0] == "teacher: 0"
            found = axe.Axe().run(page)
            assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("valid", [True, False])
def test_a_page_of_an_invalid_run_says_so_above_the_rows(
    document: dict[str, Any], valid: bool
) -> None:
    document["bench"]["valid"] = valid
    before, _, _ = render_report(document, "html").partition("<table>")
    assert ("The speeds are not to be relied on" in before) == (not valid)


def test_rows_stand_at_their_size_speed_and_quality(document: dict[str, Any]) -> None:
    for place, row in enumerate(document["rows"], 1):
        row["quality"] |= {"task_accuracy": place / 4, "standard_errors": {}}
        result = document["bench"]["results"][row["result"]]
        result["file_bytes"] = place * 90_000_000
        for entry in result["scenarios"]:
            entry["tokens_per_s"] |= {"mean": place * 9.0, "ci95": None}
    page = render_report(document, "html")
    for against, widest in (("size", "300"), ("speed", "30")):
        title = f"<title>Right answers against {against}</title>"
        picture = re.search(rf'<svg viewBox="[^>]*>{title}.*?</svg>', page)
        assert picture
        texts = re.findall('class="tick"[^>]*>([^<]*)<', picture[0])
        assert [texts[texts.index("0", 1) - 1], texts[-1]] == [widest, "80"]
        places = re.findall('class="fill ring [^>]* d="M([0-9.]+) ([0-9.]+)', picture[0])
        xs, ys = zip(*((float(x), float(y)) for x, y in places), strict=True)
        assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True) and len(xs) == 3


def test_names_of_others_are_text_in_the_page(
    document: dict[str, Any], browser: "Browser", tmp_path: Path
) -> None:
    hostile = "<script>document.title='hacked'<\u2215script>"
    for row, result in zip(document["rows"], document["bench"]["results"], strict=True):
        row["row"] = result["model"] = hostile
    document["missing"] = {hostile: hostile}
    document["quality_settings"]["questions"] = hostile
    document["quality_reference"]["teacher"] = hostile
    file = tmp_path / "report.html"
    file.write_text(render_report(document, "html"), "utf-8")
    with opened_file(browser, file) as page:
        assert page.title() == "edgekd report" and page.locator("script").count() == 0
        assert page.get_by_role("rowheader", name=hostile).count() == 3
        assert page.get_by_text(f"{hostile}: missing, {hostile}").count() == 1


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['edgekd', 'report', '--help']\nfrom edgekd.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'llama_cpp') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "[]" and "--baseline" in said
