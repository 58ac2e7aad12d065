"""Perplexity, KL, top-1 and Δp against torch's own arithmetic, and on all engines alike."""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekd.errors import DataError, ModelError, RecipeError
from edgekd.runtime.estimate import Blocks, share
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.runtime.reference import FullReference, record_teacher
from edgekd.runtime.text_quality import score_text, summarise
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.windows import begin_ids, cut_windows
from tests.conftest import TEXTS, save_tiny_model
from tests.export.tiny_tokenizers import train_byte_level

TEXT = " ".join(TEXTS)


def _open(path: Path) -> LoadedModel:
    return open_model(path, context_tokens=64, n_threads=1)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="module")
def teacher(other_folder: Path) -> Iterator[FullReference]:
    """The reference that everything here is compared with, in windows of 32 tokens."""
    loaded = _open(other_folder)
    with closing(record_teacher(loaded, cut_windows(loaded.tokenizer, TEXT, 100, 32))) as found:
        yield found


def _log_p(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        log_p_TV: torch.Tensor = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return log_p_TV[:-1]


def test_figures_are_those_of_their_formulas(
    tiny_folder: Path, other_folder: Path, teacher: FullReference
) -> None:
    found = summarise(score_text(_open(tiny_folder).engine, teacher.windows, teacher))
    kl, same, log_q, log_p = [], [], [], []
    for window in teacher.windows:
        ids = list(window)
        p_TV, q_TV = _log_p(other_folder, ids), _log_p(tiny_folder, ids)
        following = torch.tensor(ids[1:])[:, None]
        kl += (p_TV.exp() * (p_TV - q_TV)).sum(-1).tolist()
        same += (p_TV.argmax(-1) == q_TV.argmax(-1)).tolist()
        log_p += p_TV.gather(1, following)[:, 0].tolist()
        log_q += q_TV.gather(1, following)[:, 0].tolist()
    delta_p = np.exp(log_q) - np.exp(log_p)
    close = found.to_teacher
    assert close
    assert close.kl_nats.value == pytest.approx(np.mean(kl), rel=1e-4)
    assert close.top1_agreement.value == np.mean(same)
    assert found.perplexity.value == pytest.approx(math.exp(-np.mean(log_q)), rel=1e-4)
    assert close.teacher_perplexity.value == pytest.approx(math.exp(-np.mean(log_p)), rel=1e-4)
    ratio = math.exp(np.mean(log_p) - np.mean(log_q))
    assert close.perplexity_ratio.value == pytest.approx(ratio, rel=1e-4)
    assert close.delta_p_mean.value == pytest.approx(delta_p.mean(), abs=1e-6)
    assert close.delta_p_rms.value == pytest.approx(np.sqrt((delta_p**2).mean()), rel=1e-4)
    assert close.delta_p_percentiles["90"].value == pytest.approx(
        np.percentile(delta_p, 90), abs=1e-6
    )
    assert close.delta_p_percentiles["0"].value == pytest.approx(delta_p.min(), abs=1e-6)
    assert found.n_positions == len(kl) == 100 - len(teacher.windows)


def test_float_files_of_one_model_agree_on_all_engines(
    tiny_folder: Path, float_gguf: Path, float_onnx: Path, teacher: FullReference
) -> None:
    found = [
        summarise(score_text(_open(path).engine, teacher.windows, teacher))
        for path in (tiny_folder, float_gguf, float_onnx)
    ]
    for other in found[1:]:
        assert other.to_teacher and found[0].to_teacher
        assert other.perplexity.value == pytest.approx(found[0].perplexity.value, rel=1e-3)
        assert other.to_teacher.kl_nats.value == pytest.approx(
            found[0].to_teacher.kl_nats.value, abs=1e-3
        )
        assert other.to_teacher.top1_agreement == found[0].to_teacher.top1_agreement


def test_models_of_other_widths_are_compared_over_the_ids_they_share(
    tiny_folder: Path, tmp_path: Path
) -> None:
    wide = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    n_ids = wide.config.vocab_size
    wide.resize_token_embeddings(n_ids + 7, mean_resizing=False)
    wide.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    loaded = _open(tmp_path)
    windows = cut_windows(loaded.tokenizer, TEXT, 64, 64)
    with closing(record_teacher(loaded, windows)) as reference:
        found = summarise(score_text(_open(tiny_folder).engine, windows, reference))
    assert found.to_teacher
    assert abs(found.to_teacher.kl_nats.value) < 1e-9


def test_a_text_with_ids_that_a_model_lacks_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="uses id 9999"):
        score_text(_open(tiny_folder).engine, [[1, 9999]])


def test_windows_hold_the_text_in_order_and_each_begins_with_bos(tmp_path: Path) -> None:
    train_byte_level("gpt-2", adds_bos=True).save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path)
    assert begin_ids(tokenizer) == [1]
    windows = cut_windows(tokenizer, TEXT, 50, 20)
    assert [len(window) for window in windows] == [20, 20, 13]
    assert all(window[0] == 1 for window in windows)
    text_ids = tokenizer.encode(TEXT, add_special=False)[:50]
    assert [token for window in windows for token in window[1:]] == text_ids


def test_windows_without_bos_leave_out_a_rest_of_one_token(tiny_folder: Path) -> None:
    windows = cut_windows(FileTokenizer(tiny_folder), TEXT, 41, 20)
    assert [len(window) for window in windows] == [20, 20]


def test_windows_of_nothing_are_refused(tiny_folder: Path) -> None:
    tokenizer = FileTokenizer(tiny_folder)
    with pytest.raises(DataError, match="at least 2"):
        cut_windows(tokenizer, "", 10, 20)
    with pytest.raises(RecipeError, match="too short"):
        cut_windows(tokenizer, TEXT, 10, 1)


def test_the_standard_error_of_independent_positions_is_the_textbook_one() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = Blocks(np.arange(400)).mean(values)
    assert found.value == values.mean()
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 20, rel=0.08)


def test_a_few_blocks_are_not_believed_more_than_they_deserve() -> None:
    """Over many texts of four blocks, the mean squared error found is the true one."""
    draws = np.random.default_rng(2).normal(0, 1, (400, 4))
    found = [Blocks(np.arange(4)).mean(values).standard_error or 0 for values in draws]
    assert np.mean(np.square(found)) == pytest.approx(1 / 4, rel=0.15)


def test_positions_that_hang_together_count_as_one_block() -> None:
    values = np.repeat(np.random.default_rng(3).normal(0, 1, 50), 20)
    apart = Blocks(np.arange(1000)).mean(values).standard_error
    together = Blocks(np.repeat(np.arange(50), 20)).mean(values).standard_error
    assert apart and together
    assert together / apart == pytest.approx(math.sqrt(20), rel=0.15)


def test_percentiles_and_their_errors() -> None:
    values = np.random.default_rng(4).uniform(0, 1, 2000)
    low, median, high = Blocks(np.arange(2000)).percentiles(values, (0, 50, 100))
    assert (low.value, high.value) == (values.min(), values.max())
    assert median.value == pytest.approx(np.median(values))
    # Of a uniform distribution: sqrt(1/4 / n) / density.
    assert median.standard_error == pytest.approx(0.5 / math.sqrt(2000), rel=0.3)


def test_one_block_says_nothing_of_the_spread() -> None:
    found = Blocks(np.zeros(9, np.int64)).mean(np.arange(9.0))
    assert (found.value, found.standard_error) == (4.0, None)
    assert share(1, 1).standard_error is None
    assert share(3, 4).standard_error == pytest.approx(np.std([1, 1, 1, 0], ddof=1) / 2)
