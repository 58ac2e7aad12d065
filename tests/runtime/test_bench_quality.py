"""Quality beside speed: the figures of edgekd eval, for the file that runs, in its own process."""

import copy
import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from edgekd.errors import EngineError, RecipeError
from edgekd.files import sha256_of
from edgekd.progress import Lines
from edgekd.runtime.bench import BenchSettings, QualitySettings, run_bench
from edgekd.runtime.bench_formats import render
from edgekd.runtime.evaluate import EvalOptions, evaluate
from edgekd.runtime.reference_pack import read_pack, write_pack
from tests.conftest import TEXTS
from tests.runtime.browser import chromium, opened_file

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schemas/bench-1.json").read_text())
TINY = BenchSettings(prompt_tokens=8, decode_tokens=4, repetitions=1, n_threads=1, warm_up_s=0)
TOKENS = 600  # windows of two lengths


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(" ".join(TEXTS * 8), "utf-8")
    return path


@pytest.fixture(scope="module")
def pack(text: Path, float_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "teacher.pack"
    options = EvalOptions(
        teacher=str(float_gguf), text=text, n_tokens=TOKENS, write_reference=path, top_k=4
    )
    evaluate([], options)
    return path


@pytest.fixture(scope="module")
def document(text: Path, float_gguf: Path, tiny_gguf: Path, tiny_onnx: Path) -> dict[str, Any]:
    """Teacher and two of its int4 forms, compared with the teacher."""
    asked = QualitySettings(teacher=str(float_gguf), text=text, n_tokens=TOKENS)
    models = [str(path) for path in (float_gguf, tiny_gguf, tiny_onnx)]
    return dict(json.loads(json.dumps(run_bench(models, TINY, quality=asked).as_dict())))


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


def faults(document: dict[str, Any]) -> list[str]:
    checker = jsonschema.Draft202012Validator(SCHEMA)
    return [error.message for error in checker.iter_errors(document)]


def without_quality(document: dict[str, Any]) -> dict[str, Any]:
    bare = copy.deepcopy(document)
    for result in bare["results"]:
        del result["quality"]
    return {name: value for name, value in bare.items() if not name.startswith("quality_")}


def test_the_schema_takes_documents_with_quality_and_those_without(
    document: dict[str, Any],
) -> None:
    assert faults(document) == [] and faults(without_quality(document)) == []
    broken = copy.deepcopy(document)
    del broken["results"][0]["quality"]["to_teacher"]["kl_nats"]
    broken["results"][1]["quality"]["perplexity"]["standard_error"] = -1
    del broken["quality_reference"]
    assert len(faults(broken)) == 3


def test_a_run_without_quality_writes_the_document_of_before(tiny_gguf: Path) -> None:
    plain = json.loads(json.dumps(run_bench([str(tiny_gguf)], TINY).as_dict()))
    assert "quality" not in plain["results"][0] and "quality_settings" not in plain
    assert faults(plain) == []


def test_the_figures_are_those_of_eval_on_the_very_file(
    document: dict[str, Any], text: Path, float_gguf: Path, tiny_gguf: Path, tiny_onnx: Path
) -> None:
    paths = [str(path) for path in (float_gguf, tiny_gguf, tiny_onnx)]
    options = EvalOptions(teacher=paths[0], text=text, n_tokens=TOKENS, n_threads=1)
    expected = json.loads(json.dumps(evaluate(paths, options).as_dict()))
    for result, one in zip(document["results"], expected["models"], strict=True):
        quality = result["quality"]
        assert quality["weights_sha256"] == one["weights_sha256"]
        assert quality["windows_sha256"] == one["windows_sha256"]
        for name in ("kl_nats", "top1_agreement", "delta_p_mean", "delta_p_rms"):
            for part in ("value", "standard_error"):
                found = quality["to_teacher"][name][part]
                assert found == pytest.approx(one["text"]["to_teacher"][name][part], abs=1e-7)
        assert quality["perplexity"] == pytest.approx(one["text"]["perplexity"], rel=1e-6)
        assert quality["perplexity"]["standard_error"] > 0
    teacher, gguf, onnx = (result["quality"]["to_teacher"] for result in document["results"])
    assert teacher["kl_nats"]["value"] == pytest.approx(0, abs=1e-9)
    assert gguf["kl_nats"]["value"] > 1e-4 and onnx["kl_nats"]["value"] > 1e-4
    assert document["results"][1]["quality"]["weights_sha256"] == sha256_of(tiny_gguf)
    assert document["quality_reference"] == expected["reference"]
    assert document["quality_settings"] == expected["settings"]


def test_the_means_of_windows_give_the_figures(document: dict[str, Any]) -> None:
    quality = document["results"][1]["quality"]
    windows, to_teacher = quality["by_window"], quality["to_teacher"]
    sizes = windows["n_positions"]
    assert len(sizes) == quality["n_windows"] >= 2 and len(set(sizes)) > 1
    assert sum(sizes) == quality["n_positions"]
    for field, figure in (
        ("kl_nats", "kl_nats"),
        ("top1_agreement", "top1_agreement"),
        ("delta_p", "delta_p_mean"),
    ):
        whole = sum(m * n for m, n in zip(windows[field], sizes, strict=True)) / sum(sizes)
        assert whole == pytest.approx(to_teacher[figure]["value"])


def test_on_a_device_a_pack_is_enough_and_torch_is_not_there(
    tiny_gguf: Path, tiny_onnx: Path, pack: Path, tmp_path: Path
) -> None:
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} on this device')")
    paths = [str(tmp_path), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    models, saved = [str(tiny_gguf), str(tiny_onnx)], tmp_path / "run.json"
    options = ["-p", "8", "-n", "4", "-r", "1", "-t", "1", "--no-roofline", "--no-cold"]
    command = [sys.executable, "-m", "edgekd", "bench", *models, "--reference", str(pack)]
    done = subprocess.run(
        [*command, *options, "--save", str(saved)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "quality 2/2" in done.stderr and "KL is a lower bound" in done.stdout
    assert done.stderr.rindex("speed ") < done.stderr.index("quality ")
    document = json.loads(saved.read_text())
    assert faults(document) == []
    for result in document["results"]:
        assert result["quality"]["to_teacher"]["kl_kind"] == "lower bound"
        assert f"\u2265 {result['quality']['to_teacher']['kl_nats']['value']:.5f}" in done.stdout
    assert document["quality_reference"]["pack"] == str(pack)


def test_a_text_alone_gives_the_perplexity(tiny_gguf: Path, text: Path) -> None:
    run = run_bench([str(tiny_gguf)], TINY, quality=QualitySettings(text=text, n_tokens=64))
    document = json.loads(json.dumps(run.as_dict()))
    assert faults(document) == []
    quality = document["results"][0]["quality"]
    assert quality["to_teacher"] is None and document["quality_reference"] is None
    said = render(document, "md")
    assert f"| {quality['perplexity']['value']:.3f} | no teacher |" in said
    assert "64 tokens" not in said and "text: 63 tokens predicted, of held-out.txt" in said


def test_other_tokens_are_refused_before_anything_is_measured(
    tiny_gguf: Path, pack: Path, tmp_path: Path
) -> None:
    whole, other = read_pack(pack), tmp_path / "other.pack"
    write_pack(other, replace(whole, identity=replace(whole.identity, tokenizer_sha256="0" * 64)))
    said = io.StringIO()
    asked = QualitySettings(reference=other)
    with pytest.raises(EngineError, match="has other tokens than other.pack"):
        run_bench([str(tiny_gguf)], TINY, Lines(said), quality=asked)
    assert said.getvalue() == ""


def test_a_quality_that_fails_does_not_cost_the_speed(tiny_gguf: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a", "utf-8")
    run = run_bench([str(tiny_gguf)], TINY, quality=QualitySettings(text=short))
    document = json.loads(json.dumps(run.as_dict()))
    assert faults(document) == [] and "quality" not in document["results"][0]
    said = render(document, "table")
    assert "quality was not measured" in said and "the text has 1 tokens" in said


def test_nothing_is_left_on_the_disk_not_even_by_a_bench_that_was_killed(
    tiny_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, young = tmp_path / "edgekd-teacher-old", tmp_path / "edgekd-teacher-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "logits.f32").write_bytes(b"0000")
    os.utime(old, (0, time.time() - 25 * 3600))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    asked = QualitySettings(teacher=str(tiny_gguf), text=text, n_tokens=64)
    (result,) = run_bench([str(tiny_gguf)], TINY, quality=asked).results
    assert result.quality and result.quality["to_teacher"]["kl_nats"]["value"] < 1e-9
    assert list(tmp_path.iterdir()) == [young]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"teacher": "t"}, "needs a text"),
        ({"reference": Path("p"), "text": Path("t")}, "brings teacher and text"),
    ],
)
def test_what_contradicts_itself_is_refused(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        QualitySettings(**given)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--device", "ssh://pi@host", "--teacher", "t", "--text", "f"], "--write-reference"),
        (["--device", "adb://X", "--remote-binary", "b", "--reference", "p"], "over adb"),
    ],
)
def test_other_machines_are_asked_only_what_they_can(options: list[str], fault: str) -> None:
    command = [sys.executable, "-m", "edgekd", "bench", "m.gguf", *options]
    environment = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and fault in done.stderr


def test_table_and_markdown_show_quality_with_its_errors(document: dict[str, Any]) -> None:
    for form in ("table", "md"):
        said = render(document, form)
        for result in document["results"]:
            kl = result["quality"]["to_teacher"]["kl_nats"]
            assert f"{kl['value']:.5f} \u00b1 {kl['standard_error']:.5f}" in said
        n_positions = document["results"][0]["quality"]["n_positions"]
        assert f"text: {n_positions} tokens predicted, of held-out.txt" in said
        assert "\u0394p RMS" in said and "\u0394p RMS" not in render(
            without_quality(document), form
        )


def test_csv_has_the_figures_or_nothing(document: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(render(document, "csv"))))
    for row, result in zip(rows[::2], document["results"], strict=True):
        kl = result["quality"]["to_teacher"]["kl_nats"]
        assert float(row["kl_nats"]) == kl["value"]
        assert float(row["kl_nats_standard_error"]) == kl["standard_error"]
        assert row["kl_kind"] == "exact"
    bare = list(csv.DictReader(io.StringIO(render(without_quality(document), "csv"))))
    assert bare[0].keys() == rows[0].keys() and bare[0]["kl_nats"] == ""


def test_the_page_draws_quality_against_size_and_speed(
    document: dict[str, Any], browser: "Browser", tmp_path: Path
) -> None:
    file = tmp_path / "bench.html"
    file.write_text(render(document, "html"), "utf-8")
    names = [Path(result["model"]).name for result in document["results"]]
    with opened_file(browser, file) as page:
        for quality in ("KL to teacher", "Perplexity"):
            for against in ("size", "speed"):
                picture = page.get_by_role("img", name=f"{quality} against {against}", exact=True)
                assert picture.locator(".ring").count() == 3
        kl = page.get_by_role("img", name="KL to teacher against size")
        found = kl.locator("path title").all_text_contents()
        assert [one.partition(":")[0] for one in found] == names
        assert page.get_by_role("table").count() == 3
        assert page.get_by_text("tokens predicted, of held-out.txt").count() == 1
    assert "What quality costs" not in render(without_quality(document), "html")


def test_a_model_without_quality_is_left_out_of_its_pictures(document: dict[str, Any]) -> None:
    partial = copy.deepcopy(document)
    del partial["results"][1]["quality"]
    page = render(partial, "html")
    picture = re.search(r"<title>KL to teacher against size</title>.*?</svg>", page)
    assert picture and len(re.findall('class="fill ring', picture[0])) == 2
    table = render(partial, "md").partition("KL to teacher, nats")[2]
    assert len([line for line in table.splitlines() if line.startswith("| tiny")]) == 2
