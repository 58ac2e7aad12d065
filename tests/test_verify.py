"""``edgekd verify`` with a teacher and limits, and ``export --no-verify``, by their commands."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.errors import EdgekdError, RecipeError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.plan import make_plan
from edgekd.export.rounded_model import rounded_model
from edgekd.export.verify import PROBE_TEXTS, Limit, limit_faults
from edgekd.runtime.estimated import Estimate
from edgekd.runtime.fidelity import Fidelity, GreedyAgreement, compare_engines
from edgekd.runtime.quality_budget import QualityBudget
from edgekd.runtime.text_quality import Fidelities
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine
from tests.conftest import TEXTS, make_tokenizer, save_tiny_model, save_tokenizer


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Return what the command of ``words`` says; the exit is that of the entry point."""
    done = CliRunner().invoke(app, words)
    refused = f"{done.exception}" if isinstance(done.exception, EdgekdError) else ""
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr + refused)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(TEXTS), "utf-8")
    return path


@pytest.fixture(scope="module")
def unverified(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unverified") / "model.gguf"
    code = (
        "import sys\nfrom edgekd.cli import main\nmain.__globals__['app'](standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    options = ["export", str(tiny_folder), "--format", "gguf", "--out", str(out), "--no-verify"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], capture_output=True, text=True, check=True
    )
    *said, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert any("exported without verification" in line for line in said)
    assert f"edgekd verify {out} --reference {tiny_folder}" in said[-1]
    return out


def test_an_unverified_export_has_the_bytes_of_a_verified_one_and_says_so(
    unverified: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.gguf"
    done = run("export", str(tiny_folder), "--format", "gguf", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == unverified.read_bytes()
    manifest = json.loads((unverified.parent / "model.edgekd.json").read_text("utf-8"))
    assert manifest["verification"] == {"unverified": "exported without verification"}
    assert manifest["tensors_sha256"] == {}


def test_what_was_exported_unverified_is_verified_later(
    unverified: Path, tiny_folder: Path
) -> None:
    done = run("verify", str(unverified), "--reference", str(tiny_folder), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["equal_matrices"] > 0
    assert report["tensors"].startswith("unavailable: ")


def test_an_unverified_onnx_folder_is_the_verified_one(tiny_folder: Path, tmp_path: Path) -> None:
    command = ["export", str(tiny_folder), "--format", "onnx", "--quant", "q4_0"]
    for name, more in (("checked", []), ("unchecked", ["--no-verify"])):
        done = run(*command, "--out", str(tmp_path / name), *more)
        assert done.returncode == 0, done.stderr
    for path in (tmp_path / "checked").iterdir():
        if path.name != "edgekd.json":
            assert path.read_bytes() == (tmp_path / "unchecked" / path.name).read_bytes()


def test_a_file_is_held_against_a_teacher_within_limits(
    unverified: Path, tiny_folder: Path, text: Path
) -> None:
    against = ["--teacher", str(tiny_folder), "--text", str(text), "--tokens", "90"]
    limits = ["--max-kl", "10", "--min-top1", "0.01", "--max-perplexity-ratio", "5"]
    done = run("verify", str(unverified), *against, *limits, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["teacher"]
    evaluated = run("eval", str(unverified), *against, "--json")
    (model,) = json.loads(evaluated.stdout.splitlines()[-1])["models"]
    assert found["kl_nats"] == model["text"]["to_teacher"]["kl_nats"]
    assert found["perplexity"] == model["text"]["perplexity"]
    assert found["limits"] == {
        "max_kl_nats": 10,
        "min_top1_agreement": 0.01,
        "max_perplexity_ratio": 5,
    }


def test_a_file_out_of_a_limit_is_refused_with_the_figure(
    unverified: Path, tiny_folder: Path, text: Path
) -> None:
    against = ["--teacher", str(tiny_folder), "--text", str(text), "--tokens", "90"]
    done = run("verify", str(unverified), *against, "--max-kl", "1e-9", "--min-top1", "0.01")
    assert done.returncode == 1
    assert "strays from its teacher" in done.stderr.splitlines()[-1]
    assert "limit 1e-09" in done.stderr and "top-1" not in done.stderr.splitlines()[-1]


def test_the_table_tells_what_was_found_and_what_was_allowed(
    unverified: Path, tiny_folder: Path, text: Path
) -> None:
    done = run(
        *("verify", str(unverified), "--reference", str(tiny_folder)),
        *("--teacher", str(tiny_folder), "--text", str(text), "--max-kl", "10"),
    )
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for words in ("bit for bit", "perplexity", "at most 10", "greedy tokens", "unchanged"):
        assert words in shown, done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-kl", "1"], "give --teacher and --text"),
        (["--teacher", "{tiny}"], "give --teacher and --text"),
        (["--teacher", "{tiny}", "--text", "{text}", "--min-top1", "60"], "must be a share"),
        (["--teacher", "{tiny}", "--text", "missing.txt"], "missing.txt"),
        (["--teacher", "{other}", "--text", "{text}"], "token"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    options: list[str], said: str, unverified: Path, tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other")
    save_tokenizer(other, make_tokenizer(380))
    words = [word.format(tiny=tiny_folder, text=text, other=other) for word in options]
    done = run("verify", str(unverified), *words)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def _fidelities(value: float) -> Fidelities:
    one = Estimate(value, 0.01)
    return Fidelities(
        kl_nats=one,
        kl_kind="exact",
        top1_agreement=one,
        perplexity_ratio=one,
        teacher_perplexity=one,
        delta_p_mean=one,
        delta_p_rms=one,
    )


def test_a_limit_is_held_at_its_value_and_missed_by_what_is_no_number() -> None:
    budget = QualityBudget(max_kl_nats=0.5, min_top1_agreement=0.5, max_perplexity_ratio=0.5)
    assert budget.faults(_fidelities(0.5)) == []
    assert len(budget.faults(_fidelities(0.51))) == 2  # of KL and perplexity
    assert len(budget.faults(_fidelities(0.49))) == 1  # of top-1
    assert len(budget.faults(_fidelities(float("nan")))) == 3
    assert QualityBudget().faults(_fidelities(9.0)) == []


@pytest.mark.parametrize("field", ["max_kl_nats", "min_top1_agreement", "max_perplexity_ratio"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_limit_that_nothing_meets_is_refused(field: str, value: float) -> None:
    with pytest.raises(RecipeError):
        QualityBudget(**{field: value})


def test_the_perplexity_beside_a_reference_is_that_of_the_texts(tiny: Checkpoint) -> None:
    exact = TorchEngine(rounded_model(tiny, make_plan(tiny, "f32")), 512)
    rounded = TorchEngine(rounded_model(tiny, make_plan(tiny, "q4_0")), 512)
    sequences = [FileTokenizer(tiny.folder).encode(text) for text in PROBE_TEXTS[:2]]
    log_p: dict[str, list[float]] = {"exact": [], "rounded": []}
    for ids in sequences:
        for name, engine in (("exact", exact), ("rounded", rounded)):
            engine.rewind()
            logits_TV = engine.forward(ids, every_logit=True).astype(np.float64)
            log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
            log_p[name] += [float(log_p_TV[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    expected = np.exp(np.mean(log_p["exact"]) - np.mean(log_p["rounded"]))
    found = compare_engines(exact, rounded, sequences).perplexity_ratio
    assert found == pytest.approx(expected, rel=1e-9)
    assert found != pytest.approx(1, abs=1e-6)


def test_a_perplexity_beyond_what_the_kl_allows_is_a_fault() -> None:
    limit = Limit(0.02, 0.5, 1.0)
    ceiling, greedy = limit.perplexity_ceiling(200), GreedyAgreement(16, 16, 0.0)
    near = Fidelity(0.01, 0.9, 200, ceiling)
    assert limit_faults(near, greedy, limit) == []
    (fault,) = limit_faults(replace(near, perplexity_ratio=ceiling * 1.001), greedy, limit)
    assert fault.startswith("perplexity")
    assert len(limit_faults(replace(near, perplexity_ratio=float("nan")), greedy, limit)) == 1
    assert 1 < limit.perplexity_ceiling(10_000) < ceiling
