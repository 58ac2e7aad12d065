import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.distill.cache import CaptureSettings, capture, inspect
from edgekd.distill.cache_codec import decode, encode
from edgekd.distill.cache_format import (
    Identity,
    LogitCache,
    Records,
    largest_record_bytes,
    sample_key,
    write_shard,
)
from edgekd.distill.cached_teacher import CachedTarget
from edgekd.distill.data import Document, read_documents
from edgekd.distill.distill import distill
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.losses import OnlineTarget, distillation_loss
from edgekd.distill.packing import cut
from edgekd.distill.recipe import Job, Recipe
from edgekd.errors import DataError, RecipeError, VocabularyError
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS, make_tokenizer, save_tiny_model, save_tokenizer

SMALL = CaptureSettings(row_tokens=32, top_k=8, tail_samples=4, shard_tokens=64)
IDENTITY = Identity(
    teacher="t",
    teacher_sha256="0",
    revision=None,
    source="checkpoint",
    dtype="float32",
    vocabulary_sha256="0",
    template_sha256=None,
    vocab_size=200,
    row_tokens=32,
    top_k=6,
    top_mass=0.995,
    tail_samples=4,
    temperatures=(1.0, 2.0),
    seed=0,
)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n\n\n".join(f"{number} {text}" for number, text in enumerate(TEXTS * 4)))
    return str(path)


def _logits(n_positions: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(n_positions, 200, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_from_resampled_records_is_unbiased(temperature: float) -> None:
    n, hidden = 6, 5
    teacher_NV = _logits(n)
    student = torch.randn(n, hidden, generator=torch.Generator().manual_seed(2))
    head = torch.randn(200, hidden, generator=torch.Generator().manual_seed(3))
    labels, weights = torch.zeros(n, dtype=torch.int64), torch.ones(n)
    options = LossOptions(temperature=temperature)

    def gradient(target: Any) -> torch.Tensor:
        tested = student.clone().requires_grad_()
        loss = distillation_loss(tested, head, target, labels, weights, options).loss
        loss.backward()  # type: ignore[no-untyped-call]
        assert tested.grad is not None
        return tested.grad.double()

    dense = gradient(OnlineTarget(teacher_NV, torch.eye(200)))
    found = []
    for seed in range(400):
        records = encode(teacher_NV, IDENTITY, torch.Generator().manual_seed(seed))
        sparse = decode(records, IDENTITY.temperatures, temperature)
        found.append(gradient(CachedTarget(sparse, torch.device("cpu"))))
    samples = torch.stack(found)
    standard_error = samples.std(0) / len(samples) ** 0.5
    z = (samples.mean(0) - dense) / standard_error
    assert z.pow(2).mean() < 1.8  # 1 is expected of the 30 coordinates
    assert z.abs().max() < 4.5
    kept_only = replace(IDENTITY, tail_samples=0)
    records = encode(teacher_NV, kept_only, torch.Generator().manual_seed(0))
    biased = gradient(CachedTarget(decode(records, (1.0, 2.0), temperature), torch.device("cpu")))
    assert ((biased - dense) / standard_error).abs().max() > 4.5  # what the samples are for


def test_the_value_from_records_is_the_kl() -> None:
    teacher_NV, student_NV = _logits(64), 0.5 * _logits(64).flip(1)
    options = LossOptions()
    log_p, log_q = teacher_NV.log_softmax(-1), student_NV.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    records = encode(teacher_NV, replace(IDENTITY, top_k=150), torch.Generator().manual_seed(0))
    target = CachedTarget(decode(records, (1.0, 2.0), 1.0), torch.device("cpu"))
    found = target.measure(student_NV, *target.chunk(slice(None), torch.float32), options)
    torch.testing.assert_close(found.value_C, expected, atol=0.02, rtol=0.02)


def test_a_token_drawn_twice_is_one_entry_with_both_weights() -> None:
    logits = 0.1 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    flat = replace(IDENTITY, top_k=2, tail_samples=24)
    sparse = decode(encode(logits, flat, torch.Generator().manual_seed(1)), (1.0, 2.0), 1.0)
    rows = zip(sparse.ids_PE, sparse.weights_PE, strict=True)
    entries = [ids[weights > 0] for ids, weights in rows]
    assert all(len(set(ids)) == len(ids) for ids in entries)
    assert min(map(len, entries)) < 26  # 24 draws out of 28 tokens: some were drawn twice
    np.testing.assert_allclose(sparse.weights_PE.sum(1), 1, atol=0.05)


@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 30), n=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_every_position_keeps_its_own_entries(seed: int, scale: float, n: int) -> None:
    logits = scale * torch.randn(n, 200, generator=torch.Generator().manual_seed(seed))
    records = encode(logits, IDENTITY, torch.Generator().manual_seed(seed))
    sparse = decode(records, IDENTITY.temperatures, 1.0)
    probabilities = logits.softmax(-1).numpy()
    assert (sparse.ids_PE[:, 0] == logits.argmax(-1).numpy()).all()
    for row in range(n):
        n_top = int(records.n_top_P[row])
        assert 1 <= n_top <= 6
        expected = probabilities[row, sparse.ids_PE[row, :n_top]]
        for part, tolerance in ((slice(0, min(n_top, 4)), 5e-4), (slice(4, n_top), 0.07)):
            is_coded = expected[part] > np.exp(-15)
            found = sparse.weights_PE[row, part][is_coded]
            np.testing.assert_allclose(found, expected[part][is_coded], rtol=tolerance)
        kept = probabilities[row, sparse.ids_PE[row, :n_top]].sum()
        assert kept >= 0.995 or n_top == 6
        assert sparse.weights_PE[row].sum() == pytest.approx(1, abs=0.02)


def test_no_record_is_larger_than_the_plan_says() -> None:
    flat = encode(torch.zeros(9, 200), IDENTITY, torch.Generator().manual_seed(0))
    stored = sum(array.nbytes for array in flat) - 2 * (flat.top_ids_E.size + flat.tail_ids_E.size)
    assert stored == 9 * largest_record_bytes(200, 6, 4, 2)  # ids take two bytes on disk


@pytest.mark.parametrize("vocab_size", [60_000, 152_000])
def test_ids_of_small_and_large_vocabularies_survive_the_disk(
    vocab_size: int, tmp_path: Path
) -> None:
    from edgekd.distill.cache_format import begin, finished_shard, write_index

    identity = replace(IDENTITY, vocab_size=vocab_size)
    logits = torch.zeros(3, vocab_size)
    logits[:, vocab_size - 1] = 20
    records = encode(logits, identity, torch.Generator().manual_seed(0))
    begin(tmp_path, identity)
    write_shard(tmp_path, 0, [b"k" * 32], [records], vocab_size)
    write_index(tmp_path, identity, [finished_shard(tmp_path, 0, [b"k" * 32]) or {}])
    read = LogitCache(tmp_path).read(b"k" * 32)
    for one, other in zip(read, records, strict=True):
        np.testing.assert_array_equal(one, other)
    assert read.top_ids_E[0] == vocab_size - 1


def test_a_cached_run_follows_the_online_one(tiny_folder: Path, text: str, tmp_path: Path) -> None:
    student = save_tiny_model(tmp_path / "student", seed=1, n_layers=2)
    generous = replace(SMALL, top_k=250, top_mass=1.0, tail_samples=8)
    report = capture(str(tiny_folder), [text], tmp_path / "cache", generous)
    assert report["mass_kept"] > 0.9 and report["entropy_nats"] > 0
    recipe = Recipe(steps=4, row_tokens=32, learning_rate=1e-3, precision="fp32")
    online = Job(teacher=str(tiny_folder), student=str(student), data=[text], recipe=recipe)
    cached = replace(online, teacher=None, cache=str(tmp_path / "cache"), eval_data=[text])
    distill(online, tmp_path / "online")
    found = distill(cached, tmp_path / "cached")

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "training_log.jsonl").read_text().splitlines()
        return [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]

    assert losses("cached") == pytest.approx(losses("online"), rel=0.02)
    assert 0 < found["held_out"]["eval_kl_nats"] < 20
    manifest = json.loads((tmp_path / "cached" / "edgekd.json").read_text())
    assert (
        manifest["made_from"][0]["cache_sha256"] == LogitCache(tmp_path / "cache").identity.sha256()
    )


def test_a_gguf_teacher_gives_records_too(tiny_gguf: Path, text: str, tmp_path: Path) -> None:
    report = capture(str(tiny_gguf), [text], tmp_path / "cache", SMALL)
    assert report["positions"] > 100 and report["tail_samples"] > 1


def test_a_capture_killed_twenty_times_ends_with_the_same_bytes(
    tiny_folder: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    text = str(tmp_path / "long.txt")  # dozens of shards
    Path(text).write_text("\n\n\n".join(f"{n} {text}" for n, text in enumerate(TEXTS * 40)))
    capture(str(tiny_folder), [text], whole, SMALL)
    script = Path(__file__).with_name("killed_captures.py")
    command = [sys.executable, str(script), str(tiny_folder), text, str(killed), "20"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    n_shards = json.loads(found.stdout)
    assert len(n_shards) == 20 and n_shards == sorted(n_shards)
    assert len(set(n_shards)) >= 5  # the kills hit different places
    with contextlib.suppress(DataError):
        inspect(killed)  # unfinished or whole, never wrong
    capture(str(tiny_folder), [text], killed, SMALL)
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in killed.iterdir() if not path.name.startswith(".")}
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in names)


def test_other_data_in_the_same_folder_replaces_the_shards(
    tiny_folder: Path, text: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Some other text, captured into the same folder.")
    capture(str(tiny_folder), [text], tmp_path / "cache", SMALL)
    capture(str(tiny_folder), [str(other)], tmp_path / "cache", SMALL)
    samples = cut(read_documents([str(other)], FileTokenizer(tiny_folder), None), 32)
    cache = LogitCache(tmp_path / "cache")
    assert sum(entry["samples"] for entry in cache.shards) == len(samples)
    assert all(sample_key(sample) in cache for sample in samples)


def test_an_unfinished_cache_is_refused(tiny_folder: Path, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    capture(str(tiny_folder), [text], folder, SMALL)
    index = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(index | {"shards": []}))
    with pytest.raises(DataError, match="not finished"):
        LogitCache(folder)


def test_a_flipped_byte_is_found_before_training(
    tiny_folder: Path, text: str, tmp_path: Path
) -> None:
    capture(str(tiny_folder), [text], tmp_path / "cache", SMALL)
    shard = tmp_path / "cache" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    job = Job(
        cache=str(tmp_path / "cache"),
        student=str(tiny_folder),
        data=[text],
        recipe=Recipe(row_tokens=32),
    )
    with pytest.raises(DataError, match="it was changed"):
        distill(job, tmp_path / "out")
    assert inspect_fails(tmp_path / "cache")


def inspect_fails(folder: Path) -> bool:
    try:
        inspect(folder)
    except DataError:
        return True
    return False


def test_what_a_cache_does_not_belong_to_is_refused(
    tiny_folder: Path, text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    capture(str(tiny_folder), [text], folder, SMALL)
    with pytest.raises(
        DataError, match=r"is another cache \(\w{12}, this would be \w{12}\).*top_k 8"
    ):
        capture(str(tiny_folder), [text], folder, replace(SMALL, top_k=9))
    recipe = Recipe(row_tokens=64, temperature=3.0, divergence="jsd")
    job = Job(cache=str(folder), student=str(tiny_folder), data=[text], recipe=recipe)
    with pytest.raises(RecipeError, match=r"forward_kl only.*temperatures 1, 2, 4.*up to 32"):
        distill(job, tmp_path / "out")
    job = replace(job, recipe=Recipe(row_tokens=32))
    other = tmp_path / "other.txt"
    other.write_text("Some other text that was never captured.")
    with pytest.raises(DataError, match=r"1 of 1 samples are not in"):
        distill(replace(job, data=[str(other)]), tmp_path / "out")
    student = save_tiny_model(tmp_path / "student")
    save_tokenizer(student, make_tokenizer(vocab_size=300))
    with pytest.raises(VocabularyError, match=r"another tokenizer \(\w{12}\)"):
        distill(replace(job, student=str(student)), tmp_path / "out")


def test_records_of_no_position_can_be_joined() -> None:
    one = encode(_logits(2), IDENTITY, torch.Generator().manual_seed(0))
    assert len(Records.concatenate([one, one]).n_top_P) == 4
    assert len(sample_key(Document([1, 2], [True, True]))) == 32
