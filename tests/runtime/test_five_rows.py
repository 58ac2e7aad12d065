import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from edgekd.errors import DataError
from edgekd.runtime.bench import BenchSettings, bench_models
from edgekd.runtime.five_rows import Row, measure_quality, render_rows
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS

TEXT = " ".join(TEXTS)


def test_a_model_against_itself_is_perfect_and_has_its_own_perplexity(tiny_folder: Path) -> None:
    figures = measure_quality(tiny_folder, [tiny_folder], TEXT, 64)[tiny_folder]
    ids = torch.tensor([FileTokenizer(tiny_folder).encode(TEXT)[:64]])
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert figures.perplexity == pytest.approx(
        math.exp(model(ids, labels=ids).loss.item()), rel=1e-4
    )
    assert (figures.top1_agreement, figures.n_positions) == (1.0, 63)  # the last predicts nothing
    assert figures.kl_nats == pytest.approx(0, abs=1e-9)


def test_the_quantized_file_is_further_from_the_teacher(tiny_folder: Path, tiny_gguf: Path) -> None:
    kl_nats = measure_quality(tiny_folder, [tiny_gguf], TEXT, 64)[tiny_gguf].kl_nats
    assert kl_nats and kl_nats > 1e-4


def test_too_little_text_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(DataError, match="are needed"):
        measure_quality(tiny_folder, [], "short", 64)


def test_the_table_shows_what_was_measured(tiny_folder: Path, tiny_gguf: Path) -> None:
    quality = measure_quality(tiny_folder, [tiny_gguf], TEXT, 64)[tiny_gguf]
    settings = BenchSettings(prompt_tokens=8, decode_tokens=4, repetitions=2)
    (speed,) = bench_models([str(tiny_gguf)], settings)
    console = Console(width=200, record=True)
    console.print(render_rows([Row("distilled + int4", 98_765_432, quality, speed)]))
    shown = console.export_text()
    assert f"{quality.kl_nats:.4f}" in shown and "llama.cpp" in shown
    assert "98.8M" in shown or "99M" in shown
    assert ("energy unavailable: " in shown) == (speed.energy_per_token.value is None)
