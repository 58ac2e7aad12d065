"""What a run knows besides weights and optimizer survives a kill, too."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from edgekd.distill.distill import distill
from edgekd.distill.recipe import Job, Recipe
from tests.conftest import TEXTS, save_tiny_model


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes the heads' precision at each step, and interrupts the run before one."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.precisions: list[str] = []
        self._interrupt_at = interrupt_at

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == self._interrupt_at:
            raise KeyboardInterrupt
        self.precisions.append(model.options.head_precision)


def _job(teacher: Path, student: Path, tmp_path: Path, **changes: object) -> Job:
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(TEXTS * 6))
    settings = {
        "steps": 12,
        "rows_per_step": 1,
        "row_tokens": 48,
        "learning_rate": 1e-3,
        "save_steps": 4,
        "precision": "fp32",
        "compile": "none",
    }
    recipe = Recipe(**(settings | changes))  # type: ignore[arg-type]
    return Job(teacher=str(teacher), student=str(student), data=[str(text)], recipe=recipe)


def _in_two_parts(job: Job, out: Path, interrupt_at: int) -> Watch:
    """Run ``job``, interrupted once and resumed; return what the resumed run has seen."""
    with pytest.raises(KeyboardInterrupt):
        distill(job, out, callbacks=[Watch(interrupt_at)])
    watch = Watch()
    distill(job, out, resume=True, callbacks=[watch])
    return watch


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]


def _losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in _log(out) if "loss" in entry]


def test_the_share_that_the_student_writes_goes_on_where_it_was(
    tiny_folder: Path, tmp_path: Path
) -> None:
    student = save_tiny_model(tmp_path / "student", seed=1, n_layers=2)
    asked = {"divergence": "reverse_kl", "on_policy": 0.3, "on_policy_tokens": 12, "force": True}
    job = _job(tiny_folder, student, tmp_path, on_policy_prompt_tokens=6, **asked)
    distill(job, tmp_path / "whole")
    _in_two_parts(job, tmp_path / "resumed", interrupt_at=6)
    whole, resumed = _log(tmp_path / "whole"), _log(tmp_path / "resumed")
    assert [x["tokens"] for x in resumed] == [x["tokens"] for x in whole]
    assert [x["loss"] for x in resumed] == pytest.approx([x["loss"] for x in whole], rel=1e-5)


def test_heads_that_have_moved_to_float32_stay_there(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a processor with bf16: on others the heads begin in float32.
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    job = _job(tiny_folder, tiny_folder, tmp_path, head_precision="auto")  # no divergence at all
    distill(job, tmp_path / "whole", callbacks=[watch := Watch()])
    assert watch.precisions == ["bf16"] + 11 * ["fp32"]
    assert _in_two_parts(job, tmp_path / "resumed", interrupt_at=6).precisions == 8 * ["fp32"]


def test_without_bf16_in_the_processor_heads_begin_in_float32(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    job = _job(tiny_folder, tiny_folder, tmp_path, head_precision="auto")
    distill(job, tmp_path / "out", callbacks=[watch := Watch()])
    assert watch.precisions == 12 * ["fp32"]


def test_the_mean_that_moves_the_heads_goes_on_where_it_was(
    tiny_folder: Path, tmp_path: Path
) -> None:
    student = save_tiny_model(tmp_path / "student", seed=1, n_layers=2)
    job = _job(tiny_folder, student, tmp_path, head_precision="auto")
    distill(job, tmp_path / "whole")
    found = {}
    for name, run in (("whole", None), ("resumed", 6)):
        folder = tmp_path / f".{name}.checkpoints"
        with pytest.raises(KeyboardInterrupt):
            distill(job, tmp_path / name, callbacks=[Watch(run or 9)])
        if run:
            with pytest.raises(KeyboardInterrupt):
                distill(job, tmp_path / name, resume=True, callbacks=[Watch(9)])
        found[name] = json.loads((folder / "checkpoint-8" / "complete.json").read_text())
    assert found["whole"]["heads"]["mean_nats"] > 0.1
    assert found["resumed"] == found["whole"]


def test_patience_goes_on_where_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    student = save_tiny_model(tmp_path / "student", seed=1, n_layers=2)
    rate = 0.2  # only makes it worse
    job = _job(
        tiny_folder, student, tmp_path, steps=60, learning_rate=rate, eval_steps=2, patience=3
    )
    job = replace(job, eval_data=job.data)
    distill(job, tmp_path / "whole")
    stop = len(_losses(tmp_path / "whole"))
    assert stop < 60
    _in_two_parts(job, tmp_path / "resumed", interrupt_at=stop - 1)
    assert _losses(tmp_path / "resumed") == pytest.approx(_losses(tmp_path / "whole"), rel=1e-5)
