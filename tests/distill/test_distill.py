import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekd.distill.data import read_documents
from edgekd.distill.distill import distill
from edgekd.distill.losses import LossOptions
from edgekd.distill.model import DistillModel, OnlineTeacher
from edgekd.distill.packing import pack
from edgekd.distill.recipe import Job, Recipe
from edgekd.distill.trainer import GridCallback, collate
from edgekd.distill.vocabulary import common_vocabulary
from edgekd.errors import VocabularyError
from edgekd.export.blocks import fake_quantize
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS, make_tokenizer, save_tiny_model, save_tokenizer


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "student", seed=1, n_layers=2)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n\n\n".join(TEXTS * 8), "utf-8")
    return str(path)


def _losses(folder: Path) -> list[float]:
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _job(teacher: Path, student: Path, text: str, **changes: object) -> Job:
    recipe = _small(**changes)
    return Job(teacher=str(teacher), student=str(student), data=[text], recipe=recipe)


def _small(**changes: object) -> Recipe:
    settings = {
        "steps": 12,
        "row_tokens": 32,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "precision": "fp32",
    }
    return Recipe(**(settings | changes))  # type: ignore[arg-type]


def test_distilling_lowers_the_kl(
    tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = distill(_job(tiny_folder, student, text, steps=30), out)
    losses = _losses(out)
    assert report["steps"] == len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert json.loads((out / "edgekd.json").read_text())["recipe"]["steps"] == 30
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0


def test_packing_changes_no_document_of_either_model(
    tiny_folder: Path, student: Path, text: str
) -> None:
    documents = read_documents([text], FileTokenizer(student), None)[:4]
    student_model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = DistillModel(
        student_model, OnlineTeacher(teacher, 400), 400, LossOptions(), torch.float32
    )
    together = model(**collate(pack(documents, 256)))
    singly = [model(**collate(pack([document], 256))).loss for document in documents]
    assert together.loss.item() == pytest.approx(sum(loss.item() for loss in singly), rel=1e-4)


def test_splitting_a_step_into_micro_batches_changes_nothing(
    tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    at_once, split = tmp_path / "one", tmp_path / "two"
    distill(_job(tiny_folder, student, text, rows_per_step=4, steps=3), at_once)
    distill(_job(tiny_folder, student, text, rows_per_step=1, accumulation_steps=4, steps=3), split)
    assert _losses(split) == pytest.approx(_losses(at_once), rel=1e-4)


def test_a_killed_run_resumes_on_the_uninterrupted_curve(
    tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    distill(_job(tiny_folder, student, text, steps=40), whole)
    arguments = ["distill", "--teacher", str(tiny_folder), "--student", str(student)]
    arguments += ["--data", text, "--out", str(killed), "--steps", "40", "--row-tokens", "32"]
    arguments += ["--learning-rate", "1e-2", "--save-steps", "4", "--precision", "fp32"]
    run = subprocess.Popen([sys.executable, "-m", "edgekd", *arguments], stderr=subprocess.PIPE)
    checkpoint = tmp_path / ".killed.checkpoints" / "checkpoint-8" / "complete.json"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL and not killed.exists()
    subprocess.run(
        [sys.executable, "-m", "edgekd", *arguments, "--resume"], check=True, env=os.environ
    )
    assert _losses(killed) == pytest.approx(_losses(whole), rel=1e-5)


def test_a_grid_step_uses_rounded_weights_and_moves_the_masters(student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    parameter = dict(model.named_parameters())[name]
    master = parameter.detach().clone()
    callback = GridCallback(model, {name: "q4_0"})
    callback.on_step_begin()
    assert parameter.equal(fake_quantize(master, "q4_0"))
    assert not parameter.equal(master)
    callback.on_pre_optimizer_step()
    assert parameter.equal(master)


def test_different_tokenizers_are_refused_and_padding_is_not(
    tiny_folder: Path, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", vocab_size=512)
    assert common_vocabulary(FileTokenizer(other), FileTokenizer(tiny_folder)) == 400
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<|extra|>"])
    save_tokenizer(other, tokenizer)
    assert common_vocabulary(FileTokenizer(other), FileTokenizer(tiny_folder)) == 400
    save_tokenizer(other, make_tokenizer(vocab_size=300))
    with pytest.raises(VocabularyError, match="tokenize differently"):
        common_vocabulary(FileTokenizer(other), FileTokenizer(tiny_folder))
