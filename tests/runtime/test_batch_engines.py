from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import Phi3Config, Phi3ForCausalLM

from edgekd.errors import EngineError, RecipeError
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.plan import make_plan
from edgekd.export.to_gguf import write_gguf
from edgekd.export.to_onnx import write_onnx
from edgekd.runtime.batch_engine import BatchEngine, EngineOptions, KvType, OneSlotEngine, Work
from edgekd.runtime.llamacpp_batch import LlamaCppBatchEngine
from edgekd.runtime.loading import open_model
from edgekd.runtime.onnx_batch import OnnxBatchEngine
from edgekd.runtime.onnx_runs import plan_runs
from tests.conftest import make_tokenizer, save_tiny_model, save_tokenizer

Logits = NDArray[np.float32]

OPTIONS = EngineOptions(context_tokens=96, n_slots=4, kv_type="f32")
UNIFIED = EngineOptions(context_tokens=96, n_slots=4, kv_type="f32", unified_kv=True)
PROMPTS = [[5, 9, 80, 200, 7, 31], [44] * 3, list(range(20, 45)), [300]]


@pytest.fixture(params=["llama.cpp", "llama.cpp unified", "onnx"])
def engine(request: pytest.FixtureRequest) -> Iterator[BatchEngine]:
    made: BatchEngine
    if request.param == "onnx":
        made = OnnxBatchEngine(request.getfixturevalue("float_onnx"), OPTIONS)
    else:
        options = UNIFIED if "unified" in request.param else OPTIONS
        made = LlamaCppBatchEngine(request.getfixturevalue("float_gguf"), options)
    yield made
    made.close()


def assert_close(found: object, expected: object) -> None:
    # Kernels for one row and for several round differently.
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=2e-3)


def alone(engine: BatchEngine, ids: list[int]) -> Logits:
    """The logits after each of ``ids``, with nothing else in the engine."""
    for slot in range(engine.n_slots):
        engine.forget(slot)
    logits_TV = engine.step([Work(0, ids, len(ids))])[0].copy()
    engine.forget(0)
    return logits_TV


def greedy_alone(engine: BatchEngine, prompt: list[int], n_tokens: int) -> list[int]:
    ids = [int(alone(engine, prompt)[-1].argmax())]
    engine.step([Work(0, prompt, 0)])
    while len(ids) < n_tokens:
        ids.append(int(engine.step([Work(0, ids[-1:])])[0][-1].argmax()))
    return ids


def test_sequences_in_one_step_get_the_logits_they_get_alone(engine: BatchEngine) -> None:
    expected = [alone(engine, prompt) for prompt in PROMPTS]
    work = [Work(slot, prompt, min(2, len(prompt))) for slot, prompt in enumerate(PROMPTS)]
    found = engine.step(work)
    for logits_NV, expected_TV in zip(found, expected, strict=True):
        assert_close(logits_NV, expected_TV[-2:])
    assert [engine.length(slot) for slot in range(4)] == [len(prompt) for prompt in PROMPTS]


def test_many_sequences_decoded_together_choose_what_each_chooses_alone(
    engine: BatchEngine,
) -> None:
    expected = [greedy_alone(engine, prompt, 12) for prompt in PROMPTS]
    engine.forget(0)
    logits = engine.step([Work(slot, prompt) for slot, prompt in enumerate(PROMPTS)])
    texts = [[int(each[-1].argmax())] for each in logits]
    for _ in range(11):
        logits = engine.step([Work(slot, text[-1:]) for slot, text in enumerate(texts)])
        for text, each in zip(texts, logits, strict=True):
            text.append(int(each[-1].argmax()))
    assert texts == expected


def test_a_prompt_in_chunks_beside_decodes_disturbs_nobody(engine: BatchEngine) -> None:
    expected = alone(engine, PROMPTS[2])[-1]
    steady = alone(engine, [*PROMPTS[0], 1, 2, 3])
    engine.step([Work(3, PROMPTS[0], 0)])
    found = []
    for start, token_id in ((0, 1), (10, 2), (20, 3)):
        chunk = PROMPTS[2][start : start + 10]
        found.append(
            [each[-1].copy() for each in engine.step([Work(1, chunk), Work(3, [token_id])])]
        )
    assert_close(found[-1][0], expected)
    assert_close([each[1] for each in found], steady[-3:])


def test_logits_come_in_the_order_of_the_work_whatever_that_of_the_slots(
    engine: BatchEngine,
) -> None:
    expected = [alone(engine, prompt)[-1] for prompt in PROMPTS]
    order = [2, 0, 3, 1]
    found = engine.step([Work(slot, PROMPTS[slot]) for slot in order])
    assert_close([each[-1] for each in found], [expected[slot] for slot in order])
    if isinstance(engine, LlamaCppBatchEngine):  # else it passes over the weights four times
        slots = engine._batch._slots_T[: engine._batch.struct.n_tokens].tolist()
        assert slots == sorted(slots)


def test_idle_slots_between_busy_ones_keep_their_tokens(engine: BatchEngine) -> None:
    expected = alone(engine, [*PROMPTS[2], 8])[-1]
    engine.step([Work(1, PROMPTS[2], 0)])
    for token_id in range(5):
        engine.step([Work(0, [token_id]), Work(2, [token_id])])
    assert_close(engine.step([Work(1, [8])])[0][-1], expected)


def test_what_is_forgotten_has_no_trace(engine: BatchEngine) -> None:
    expected = alone(engine, [*PROMPTS[2][:9], 7])[-1]
    engine.step([Work(2, PROMPTS[2], 0), Work(0, PROMPTS[1], 0)])
    assert engine.forget(2, 9) == 9
    assert_close(engine.step([Work(2, [7])])[0][-1], expected)
    assert engine.forget(2, 50) == 10
    assert (engine.forget(2), engine.length(2)) == (0, 0)


def test_a_copied_prefix_stands_for_the_tokens_it_was_made_of(engine: BatchEngine) -> None:
    expected = alone(engine, [*PROMPTS[2][:15], 7])[-1]
    other = alone(engine, [*PROMPTS[2], 8])[-1]
    engine.step([Work(0, PROMPTS[2], 0), Work(3, PROMPTS[1], 0)])
    assert engine.copy_prefix(0, 3, 15) == engine.length(3) == 15
    found = engine.step([Work(0, [8]), Work(3, [7])])
    assert_close(found[0][-1], other)
    assert_close(found[1][-1], expected)
    assert engine.copy_prefix(1, 3, 5) == 0  # an empty slot has nothing to copy


def test_a_full_context_is_refused_by_name_and_harms_nobody(engine: BatchEngine) -> None:
    limit = engine.context_tokens
    engine.step([Work(1, [3] * (limit - 1), 0)])
    with pytest.raises(EngineError, match=rf"{limit - 1} \+ 2 .* context of {limit}"):
        engine.step([Work(0, [1]), Work(1, [1, 2])])
    assert [engine.length(slot) for slot in (0, 1)] == [0, limit - 1]
    assert engine.step([Work(1, [1])])[0].shape == (1, engine.vocab_size)


def test_all_slots_can_be_full_at_once(engine: BatchEngine) -> None:
    for slot in range(engine.n_slots):
        engine.step([Work(slot, [slot] * engine.context_tokens)])
    assert engine.length(3) == engine.context_tokens


def test_a_prompt_goes_through_the_head_at_its_end_only(float_onnx: Path) -> None:
    engine = OnnxBatchEngine(float_onnx, OPTIONS)
    binding = engine._binding(0, 0)
    seen: list[tuple[int, ...]] = []
    run = binding.run

    def note(inputs: dict[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        seen.append(shape)
        return run(inputs, shape)

    binding.run = note  # type: ignore[method-assign]
    engine.step([Work(0, PROMPTS[2], 0)])
    engine.step([Work(0, PROMPTS[2])])
    assert seen == [(1, 1, engine.vocab_size)] * 2


def test_too_large_a_step_is_refused(engine: BatchEngine) -> None:
    with pytest.raises(EngineError, match="65 rows.*64 rows are allowed"):
        engine.step([Work(0, [1] * 65, 65)])


def test_rows_of_a_model_that_rotates_a_part_of_each_head_keep_their_positions(
    tmp_path: Path,
) -> None:
    config = Phi3Config(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        partial_rotary_factor=0.5,
        pad_token_id=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, make_tokenizer())
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "onnx").mkdir()
    write_onnx(checkpoint, make_plan(checkpoint, "f32"), tmp_path / "onnx")
    engine = OnnxBatchEngine(tmp_path / "onnx", OPTIONS)
    expected = [alone(engine, [*prompt, 7])[-1] for prompt in PROMPTS]
    engine.step([Work(slot, prompt, 0) for slot, prompt in enumerate(PROMPTS)])
    found = engine.step([Work(slot, [7]) for slot in range(4)])
    for logits_NV, expected_V in zip(found, expected, strict=True):
        assert_close(logits_NV[-1], expected_V)


def test_one_slot_wraps_any_engine(tiny_folder: Path) -> None:
    engine = OneSlotEngine(open_model(tiny_folder, context_tokens=64, n_threads=1).engine)
    expected = alone(engine, PROMPTS[0])
    assert_close(engine.step([Work(0, PROMPTS[0], 2)])[0], expected[-2:])
    assert engine.copy_prefix(0, 0, 3) == 3
    assert engine.step([Work(0, PROMPTS[0][3:5], 0)])[0].shape[0] == 0
    assert_close(engine.step([Work(0, PROMPTS[0][5:])])[0], expected[-1:])


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_smaller_kv_types_stay_near(tmp_path: Path, kv_type: KvType) -> None:
    checkpoint = open_checkpoint(save_tiny_model(tmp_path / "wide", n_layers=1, head_dim=32))
    path = tmp_path / "wide.gguf"
    write_gguf(checkpoint, make_plan(checkpoint, "f32"), path)
    plain = EngineOptions(context_tokens=96, kv_type="f32", flash_attention=False)
    exact = LlamaCppBatchEngine(path, plain)
    smaller = LlamaCppBatchEngine(path, EngineOptions(context_tokens=96, kv_type=kv_type))
    expected, found = alone(exact, PROMPTS[2]), alone(smaller, PROMPTS[2])
    assert 0 < np.abs(found - expected).max() < 0.3


def test_a_kv_type_that_the_heads_are_too_small_for_is_refused(float_gguf: Path) -> None:
    with pytest.raises(EngineError, match="q8_0 KV cache.*multiple of 32"):
        LlamaCppBatchEngine(float_gguf, EngineOptions(kv_type="q8_0"))


def test_options_that_cannot_be_met_are_named(float_gguf: Path, float_onnx: Path) -> None:
    with pytest.raises(RecipeError, match="n_slots is 0.*gpu_layers is -2"):
        EngineOptions(n_slots=0, gpu_layers=-2)
    with pytest.raises(RecipeError, match="flash attention"):
        LlamaCppBatchEngine(float_gguf, EngineOptions(kv_type="q8_0", flash_attention=False))
    with pytest.raises(RecipeError, match="provider 'npu'.*cpu"):
        OnnxBatchEngine(float_onnx, EngineOptions(provider="npu"))


def test_the_context_is_bounded_by_what_the_model_was_trained_on(
    tiny: Checkpoint, float_gguf: Path, float_onnx: Path
) -> None:
    options = EngineOptions(context_tokens=100_000)
    trained = tiny.config["max_position_embeddings"]
    assert LlamaCppBatchEngine(float_gguf, options).context_tokens == trained
    assert OnnxBatchEngine(float_onnx, options).context_tokens == trained


def test_single_tokens_share_a_run_and_prompts_only_from_the_start() -> None:
    work = [Work(0, [1]), Work(2, [1] * 9), Work(3, [1]), Work(1, [1] * 9)]
    runs = plan_runs(work, [50, 0, 0, 7], context_tokens=64)
    assert [(run.first, run.last, run.n_tokens) for run in runs] == [(0, 3, 1), (1, 2, 9)]
    runs = plan_runs(work, [50, 0, 20, 7], context_tokens=64)
    assert [(run.first, run.last) for run in runs] == [(0, 3), (1, 1), (2, 2)]


def test_a_run_never_writes_behind_a_full_row_or_over_far_too_many_idle_ones() -> None:
    full = plan_runs([Work(0, [1]), Work(2, [1])], [5, 64, 5], context_tokens=64)
    assert [(run.first, run.last) for run in full] == [(0, 0), (2, 2)]
    far = plan_runs([Work(0, [1]), Work(4, [1])], [5] * 5, context_tokens=64)
    assert [(run.first, run.last) for run in far] == [(0, 0), (4, 4)]


def test_a_single_token_takes_an_idle_row_along_that_has_room() -> None:
    def rows(work: list[Work], lengths: list[int]) -> list[tuple[int, int]]:
        runs = plan_runs(work, lengths, context_tokens=64, never_alone=True)
        return [(run.first, run.last) for run in runs]

    assert rows([Work(0, [1])], [5, 9, 9]) == [(0, 1)]
    assert rows([Work(2, [1])], [5, 9, 9]) == [(1, 2)]
    assert rows([Work(1, [1])], [5, 9, 64]) == [(0, 1)]
    assert rows([Work(1, [1])], [64, 9, 64]) == [(1, 1)]
    assert rows([Work(0, [1]), Work(1, [1])], [5, 9, 9]) == [(0, 1)]
    assert rows([Work(0, [1, 2])], [5, 9, 9]) == [(0, 0)]
    # A prompt's run comes later, and writes over what the row was given.
    assert rows([Work(0, [1]), Work(1, [1, 2])], [5, 9, 9]) == [(0, 1), (1, 1)]
