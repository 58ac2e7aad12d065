import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekd.distill.cache import CaptureSettings, capture
from edgekd.distill.cache_codec import Sparse, decode
from edgekd.distill.cache_format import (
    LogitCache,
    sample_key,
)
from edgekd.distill.cache_source import Endpoint
from edgekd.distill.cached_teacher import CachedTarget
from edgekd.distill.data import read_documents
from edgekd.distill.heads import HeadShape
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.losses import distillation_loss
from edgekd.distill.packing import cut
from edgekd.errors import EngineError
from edgekd.export.checkpoint import open_checkpoint
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS, make_gguf, save_tiny_model
from tests.runtime.serving import serving

SMALL = CaptureSettings(row_tokens=32, top_k=8, tail_samples=4, shard_tokens=64)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n\n\n".join(f"{number} {text}" for number, text in enumerate(TEXTS * 4)))
    return str(path)


@pytest.fixture(params=["prompt_logprobs", "echo"])
def endpoint(request: pytest.FixtureRequest, tiny_folder: Path) -> Iterator[Endpoint]:
    """A server with the tiny model behind it, in the form of vLLM or of the older API."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with torch.inference_mode():
                log_p = model(torch.tensor([asked["prompt"]])).logits[0, :, :400].log_softmax(-1)
            top = log_p.topk(asked["prompt_logprobs"])
            choice: dict[str, Any] = {"text": ""}
            # Both put the prompt's own token first, and so send one more where it is unlikely.
            rows = [
                {own: float(log_p[place, own]), **dict(zip(ids, values, strict=True))}
                for place, (own, ids, values) in enumerate(
                    zip(
                        [*asked["prompt"][1:], 0],
                        top.indices.tolist(),
                        top.values.tolist(),
                        strict=True,
                    )
                )
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
    _check_kept(report, tiny_folder, text)


def test_our_own_server_gives_its_likeliest_tokens(text: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", vocab_size=400)  # a server counts padding too
    with serving(make_gguf(open_checkpoint(folder), "f32", tmp_path)) as server:
        endpoint = Endpoint(f"{server.url}/v1", "tiny")
        report = capture(endpoint, [text], tmp_path / "cache", SMALL, tokenizer_of=str(folder))
    _check_kept(report, folder, text)


def _check_kept(report: dict[str, Any], tiny_folder: Path, text: str) -> None:
    """Compare one sample of a cache of the tiny model with what torch says."""
    assert report["top_tokens"] == 8 and report["tail_samples"] == 0
    cache = LogitCache(Path(report["path"]))
    sample = cut(read_documents([text], FileTokenizer(tiny_folder), None), 32)[0]
    sparse = decode(cache.read(sample_key(sample)), cache.identity.temperatures, 1.0)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.inference_mode():
        exact = model(torch.tensor([sample.ids])).logits[0, :-1, :400].softmax(-1)
    assert (sparse.ids_PE[:, :8] == exact.topk(8).indices.numpy()).mean() > 0.99  # by rank
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
