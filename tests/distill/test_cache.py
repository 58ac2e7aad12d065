import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from edgekd.distill.cache import CaptureSettings, capture, inspect
from edgekd.distill.cache_codec import Sparse, decode, encode
from edgekd.distill.cache_format import (
    Identity,
    LogitCache,
    Records,
    largest_record_bytes,
    sample_key,
    write_shard,
)
from edgekd.distill.cache_source import Endpoint
from edgekd.distill.cached_teacher import CachedTarget
from edgekd.distill.data import Document, read_documents
from edgekd.distill.distill import distill
from edgekd.distill.heads import HeadShape
from edgekd.distill.losses import LossOptions, OnlineTarget, distillation_loss
from edgekd.distill.packing import cut
from edgekd.distill.recipe import Job, Recipe
from edgekd.errors import DataError, EngineError, RecipeError, VocabularyError
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
    tiny_folder: Path, text: str, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    capture(str(tiny_folder), [text], whole, SMALL)
    script = Path(__file__).with_name("killed_captures.py")
    command = [sys.executable, str(script), str(tiny_folder), text, str(killed), "20"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) >= 5  # the others had come to their end
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


@pytest.fixture(params=["prompt_logprobs", "echo"])
def endpoint(request: pytest.FixtureRequest, tiny_folder: Path) -> Iterator[Endpoint]:
    """A server with the tiny model behind it, in the form of vLLM or of the older API."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with torch.inference_mode():
                logits = model(torch.tensor([asked["prompt"]])).logits[0, :, :400]
            top = logits.log_softmax(-1).topk(asked["prompt_logprobs"])
            choice: dict[str, Any] = {"text": ""}
            rows = [
                dict(zip(ids, values, strict=True))
                for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
            if request.param == "echo":
                named = [{f"token_id:{token}": v for token, v in row.items()} for row in rows]
                choice["logprobs"] = {"top_logprobs": [None, *named]}
            else:
                ranked = [{token: {"logprob": v} for token, v in row.items()} for row in rows]
                choice["prompt_logprobs"] = [None, *ranked[:-1]]
            body = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "tiny")
    server.shutdown()
    server.server_close()


def test_an_endpoint_gives_its_likeliest_tokens_and_the_rest_as_one(
    endpoint: Endpoint, tiny_folder: Path, text: str, tmp_path: Path
) -> None:
    report = capture(endpoint, [text], tmp_path / "cache", SMALL, tokenizer_of=str(tiny_folder))
    assert report["top_tokens"] == 8 and report["tail_samples"] == 0
    cache = LogitCache(tmp_path / "cache")
    sample = cut(read_documents([text], FileTokenizer(tiny_folder), None), 32)[0]
    sparse = decode(cache.read(sample_key(sample)), cache.identity.temperatures, 1.0)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.inference_mode():
        exact = model(torch.tensor([sample.ids])).logits[0, :-1, :400].softmax(-1)
    expected = exact.gather(1, torch.from_numpy(sparse.ids_PE))
    np.testing.assert_allclose(sparse.weights_PE[:, :4], expected[:, :4], rtol=2e-3)
    np.testing.assert_allclose(sparse.weights_PE, expected, rtol=0.07)
    np.testing.assert_allclose(sparse.rest_P, 1 - sparse.weights_PE.sum(1), atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("hard_label_weight", [0.0, 0.3])
def test_the_gradient_with_a_rest_is_that_of_the_lumped_kl(
    hard_label_weight: float, compiled: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head, weights = (
        torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
        for size in ((4, 6), (30, 6), (4,))
    )
    labels = torch.tensor([3, 1, 29, 0])
    p = torch.randn(4, 30, dtype=torch.float64, generator=generator).softmax(-1)
    top, ids = p.topk(5)
    top[2, 3:] = 0  # of this position only three were kept, and id 7 fills the row
    ids[2, 3:] = 7
    rest = 1 - top.sum(-1)
    shape, n_kept = HeadShape(1.3, 4.0), (top > 0)
    logits = shape.shape(hidden @ head.T)
    log_q = (logits / 2).log_softmax(-1).gather(1, ids)
    lumped = (log_q.exp() * n_kept).sum(-1)
    dense = -(top * log_q).sum(-1) - rest * (1 - lumped).log()
    hard = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = ((1 - hard_label_weight) * 4 * dense + hard_label_weight * hard) * weights.detach()
    expected = torch.autograd.grad(loss.sum(), [hidden, head])

    exact: Any = (top.numpy(), np.zeros(4), rest.numpy())  # float64, to compare closely
    sparse = Sparse(ids.numpy(), *exact)
    target = CachedTarget(sparse, torch.device("cpu"))
    options = LossOptions(
        temperature=2.0,
        hard_label_weight=hard_label_weight,
        student_shape=shape,
        chunk_tokens=3,
        compiled=compiled,
    )
    found = distillation_loss(hidden, head, target, labels, weights.detach(), options)
    torch.testing.assert_close(found.loss, loss.sum())
    for one, other in zip(torch.autograd.grad(found.loss, [hidden, head]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_a_server_that_gives_no_prompt_log_probabilities_is_named(
    tiny_folder: Path, text: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="failed"):
        capture(
            Endpoint("http://127.0.0.1:9/v1", "tiny"),
            [text],
            tmp_path / "cache",
            SMALL,
            tokenizer_of=str(tiny_folder),
        )
    from edgekd.distill.cache_source import _prompt_log_p

    with pytest.raises(EngineError, match="0 of 5 prompt tokens"):
        _prompt_log_p({"text": "only"}, 5)
    with pytest.raises(EngineError, match="names tokens by text"):
        _prompt_log_p({"logprobs": {"top_logprobs": [None, {" the": -1.0}]}}, 2)


def test_records_of_no_position_can_be_joined() -> None:
    one = encode(_logits(2), IDENTITY, torch.Generator().manual_seed(0))
    assert len(Records.concatenate([one, one]).n_top_P) == 4
    assert len(sample_key(Document([1, 2], [True, True]))) == 32
