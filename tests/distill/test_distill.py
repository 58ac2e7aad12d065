import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from edgekd.distill.data import read_documents
from edgekd.distill.distill import distill
from edgekd.distill.load_models import load_student
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.model import DistillModel, HiddenMatching, OnlineTeacher
from edgekd.distill.packing import pack
from edgekd.distill.recipe import Job, Recipe
from edgekd.distill.trainer import HeadPrecisionCallback, collate
from edgekd.distill.vocabulary import common_vocabulary
from edgekd.errors import VocabularyError
from edgekd.export.checkpoint import open_checkpoint
from edgekd.progress import Silence
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import load_causal_lm
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


def test_heads_as_wide_as_qwens_train(text: str, tmp_path: Path) -> None:
    # Qwen2.5 7B has 152,064 rows and 0.5B 151,936, over one tokenizer of 151,665 tokens.
    spec = json.loads(make_tokenizer().to_str())
    ids = spec["model"]["vocab"]
    ids |= {f"unused{number}": number for number in range(len(ids), 151_665)}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    teacher, student = (
        save_tiny_model(tmp_path / name, seed=seed, vocab_size=rows, hidden_size=8, n_layers=1)
        for seed, (name, rows) in enumerate([("teacher", 152_064), ("student", 151_936)])
    )
    for folder in (teacher, student):
        save_tokenizer(folder, tokenizer)
    distill(_job(teacher, student, text, steps=8, rows_per_step=1), tmp_path / "out")
    losses = _losses(tmp_path / "out")
    assert losses[-1] < 0.9 * losses[0]
    assert open_checkpoint(tmp_path / "out").shape("model.embed_tokens.weight") == (151_936, 8)


def test_tokenizers_of_equal_width_and_different_content_stop(
    tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    spec = json.loads((student / "tokenizer.json").read_text())
    ids = spec["model"]["vocab"]
    first, second = sorted(ids, key=ids.__getitem__)[-2:]
    ids[first], ids[second] = ids[second], ids[first]
    (student / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(
        VocabularyError, match=r"id 398 is .* here, .* there \(student \w{12}, teacher"
    ):
        distill(_job(tiny_folder, student, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Said(Silence):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(("steps", "warns"), [(1, False), (40, True)])
def test_a_run_first_says_how_often_it_reads_the_text(
    steps: int, warns: bool, tiny_folder: Path, student: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text(TEXTS[0])
    said = Said()
    distill(_job(tiny_folder, student, str(text), steps=steps), tmp_path / "out", progress=said)
    first = said.lines[0]
    assert f"{steps * 2 / int(first.split()[2]):.1f} epochs" in first
    assert ("learned by heart" in first) == warns


@pytest.mark.parametrize("theirs", ["the same", "another", "no"])
def test_a_teacher_of_another_chat_template_is_told_of(
    theirs: str, student: Path, tmp_path: Path
) -> None:
    teacher = save_tiny_model(tmp_path / "teacher")
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    if theirs == "another":
        config["chat_template"] = config["chat_template"].replace("\n", " ")
    if theirs == "no":
        del config["chat_template"]
    (teacher / "tokenizer_config.json").write_text(json.dumps(config))
    chats, plain = tmp_path / "chats.jsonl", tmp_path / "plain.txt"
    chats.write_text(json.dumps({"prompt": "fox", "response": "a dog"}))
    plain.write_text(TEXTS[0])
    for data, is_told in ((chats, theirs != "the same"), (plain, False)):
        said = Said()
        job = _job(teacher, student, str(data), steps=1)
        distill(job, tmp_path / f"out-{data.stem}", progress=said)
        told = [line for line in said.lines if f"the teacher has {theirs} chat template" in line]
        assert bool(told) == is_told


def test_dropout_is_off_and_the_teacher_is_frozen(tmp_path: Path, text: str) -> None:
    folder = save_tiny_model(tmp_path / "model", attention_dropout=0.5)
    recipe = _small()
    model = load_student(open_checkpoint(folder), recipe)
    teacher = OnlineTeacher(load_student(open_checkpoint(folder), recipe).train(), 400)
    documents = read_documents([text], FileTokenizer(folder), None)[:2]
    wrapped = DistillModel(model.train(), teacher, 400, LossOptions(), torch.float32)
    batch = collate(pack(documents, 256))
    parts = wrapped(**batch)
    assert abs(parts.loss.item()) < 1e-3  # equal models, no noise
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert {name.split(".")[0] for name, _ in wrapped.named_parameters()} == {"student"}


def test_a_lora_student_is_merged_into_a_plain_checkpoint(
    tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    job = _job(tiny_folder, student, text, adapter="lora", lora_rank=4, steps=20)
    distill(job, tmp_path / "out")
    losses = _losses(tmp_path / "out")
    assert losses[-1] < 0.95 * losses[0]
    merged = open_checkpoint(tmp_path / "out")
    before = open_checkpoint(student)
    assert set(merged.shard_of) == set(before.shard_of)
    name = "model.layers.0.mlp.up_proj.weight"
    change = merged.tensor(name) - before.tensor(name)
    assert change.abs().max() > 1e-4
    assert torch.linalg.matrix_rank(change) <= 4
    assert merged.tensor("model.embed_tokens.weight").equal(
        before.tensor("model.embed_tokens.weight")
    )


def test_a_teacher_that_does_not_fit_is_fetched_layer_by_layer(
    tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    whole, offloaded = tmp_path / "whole", tmp_path / "offloaded"
    distill(_job(tiny_folder, student, text, steps=3), whole)
    distill(_job(tiny_folder, student, text, steps=3, teacher_memory_gb=0.0003), offloaded)
    assert _losses(offloaded) == pytest.approx(_losses(whole), rel=1e-5)


def test_evaluation_keeps_the_best_student_and_stops_early(
    tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    job = _job(tiny_folder, student, text, steps=60, learning_rate=0.2, eval_steps=2, patience=2)
    job = replace(job, eval_data=[text])
    report = distill(job, tmp_path / "out")
    assert report["steps"] < 60  # so large a rate only makes it worse
    lines = (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()
    found = [x for line in lines if "eval_kl_nats" in (x := json.loads(line))]
    best = min(entry["eval_kl_nats"] for entry in found)
    kept = distill(
        replace(
            job,
            student=str(tmp_path / "out"),
            recipe=_small(steps=1, learning_rate=1e-12),
        ),
        tmp_path / "kept",
    )
    assert kept["held_out"]["eval_kl_nats"] == pytest.approx(best, rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"held-out KL to the teacher: {found[-1]['eval_kl_nats']:.4f}" in card
    assert (tmp_path / "out" / "training_curve.svg").read_text().count("<polyline") == 2


def test_heads_move_to_float32_once_the_student_is_near(
    tiny_folder: Path, student: Path, text: str
) -> None:
    models = [load_causal_lm(folder, torch.float32) for folder in (student, tiny_folder)]
    options = LossOptions(head_precision="bf16")
    model = DistillModel(models[0], OnlineTeacher(models[1], 400), 400, options, torch.float32)
    callback = HeadPrecisionCallback(model, threshold_nats=0.5)
    for _ in range(30):
        callback.on_log(None, None, None, {"divergence_nats": 0.6})
    assert model.options == options
    for _ in range(200):
        callback.on_log(None, None, None, {"divergence_nats": 0.4})
    assert model.options.head_precision == "fp32"


def test_hidden_states_are_matched_through_a_projection_that_is_thrown_away(
    tiny_folder: Path, text: str, tmp_path: Path
) -> None:
    narrow = save_tiny_model(tmp_path / "narrow", seed=1, n_layers=2, hidden_size=32)
    plain = _job(tiny_folder, narrow, text, steps=8)
    matched = _job(tiny_folder, narrow, text, steps=8, match_hidden=1.0, save_steps=3)
    distill(plain, tmp_path / "plain")
    distill(matched, tmp_path / "out")
    losses, without = _losses(tmp_path / "out"), _losses(tmp_path / "plain")
    assert losses[0] > without[0]  # the distance is in the loss
    assert losses[-1] < losses[0]
    names = set(open_checkpoint(tmp_path / "out").shard_of)
    assert names == set(open_checkpoint(narrow).shard_of)
    matching = HiddenMatching(2, 3, 1.0)
    states = torch.randn(5, 2, requires_grad=True)
    target = torch.cat([states.detach(), torch.zeros(5, 1)], 1)
    assert matching(states, target).item() == pytest.approx(0, abs=1e-6)
