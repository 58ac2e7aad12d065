"""onnxruntime-genai runs the ONNX folder as it is, and generates what our engine generates."""

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest

from edgekd.export.checkpoint import Checkpoint
from edgekd.export.plan import make_plan
from edgekd.export.to_onnx import write_onnx
from edgekd.runtime.loading import open_model
from tests.conftest import TEXTS
from tests.export.tiny_models import MODELS, save_model

N_TOKENS = 24
MESSAGES = [
    {"role": "user", "content": "Where do foxes sleep?"},
    {"role": "assistant", "content": "In dens."},
    {"role": "user", "content": "And dogs?"},
]


def _greedy_in_genai(model: Any, ids: list[int], n_tokens: int) -> list[int]:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + n_tokens, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    chosen: list[int] = []
    while not generator.is_done() and len(chosen) < n_tokens:
        generator.generate_next_token()
        chosen.append(int(generator.get_next_tokens()[0]))
    return chosen


def _greedy_in_ours(folder: Path, ids: list[int], n_tokens: int) -> list[int]:
    loaded = open_model(folder, context_tokens=256)
    chosen = [int(loaded.engine.forward(ids).argmax())]
    while len(chosen) < n_tokens and chosen[-1] not in loaded.tokenizer.stop_ids:
        chosen.append(int(loaded.engine.forward(chosen[-1:]).argmax()))
    loaded.engine.close()
    return chosen


@pytest.mark.parametrize("name", MODELS)
def test_genai_chooses_the_tokens_that_our_engine_chooses(name: str, tmp_path: Path) -> None:
    checkpoint = save_model(name, tmp_path / "checkpoint")
    folder = tmp_path / "onnx"
    folder.mkdir()
    write_onnx(checkpoint, make_plan(checkpoint, "q4_0"), folder)
    ids = open_model(folder, context_tokens=64).tokenizer.encode(TEXTS[0])
    chosen = _greedy_in_genai(og.Model(str(folder)), ids, N_TOKENS)
    assert chosen == _greedy_in_ours(folder, ids, N_TOKENS)


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0"])
def test_genai_runs_every_type(quant: str, tiny: Checkpoint, tmp_path: Path) -> None:
    write_onnx(tiny, make_plan(tiny, quant), tmp_path)  # type: ignore[arg-type]
    chosen = _greedy_in_genai(og.Model(str(tmp_path)), [5, 6, 7], N_TOKENS)
    assert chosen == _greedy_in_ours(tmp_path, [5, 6, 7], N_TOKENS)


def test_a_folder_of_a_real_model_answers_in_genai(smollm2: Checkpoint, tmp_path: Path) -> None:
    write_onnx(smollm2, make_plan(smollm2, "q4_0"), tmp_path)
    loaded = open_model(tmp_path, context_tokens=64)
    model = og.Model(str(tmp_path))
    tokenizer = og.Tokenizer(model)
    rendered = tokenizer.apply_chat_template(json.dumps(MESSAGES), add_generation_prompt=True)
    assert loaded.chat_template and rendered == loaded.chat_template.render(MESSAGES)
    ids = loaded.tokenizer.encode(rendered)
    assert [int(token_id) for token_id in tokenizer.encode(rendered)] == ids
    chosen = _greedy_in_genai(model, ids, N_TOKENS)
    assert chosen == _greedy_in_ours(tmp_path, ids, N_TOKENS)
