from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekd.runtime.choices import Question, accuracy, choose
from edgekd.runtime.loading import open_model
from edgekd.runtime.tokenizer import FileTokenizer

QUESTION = Question("The quick brown", (" fox jumps", " lazy dog over", " 1234 dogs bark"), 0)


def _mean_log_p(folder: Path, context: str, choice: str) -> float:
    """The plain way: one forward over the whole text."""
    tokenizer = FileTokenizer(folder)
    ids, n_context = tokenizer.encode(context + choice), len(tokenizer.encode(context))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        log_p_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    picked = [float(log_p_TV[i - 1, ids[i]]) for i in range(n_context, len(ids))]
    return sum(picked) / len(picked)


@pytest.mark.parametrize("kind", ["tiny_folder", "tiny_gguf", "tiny_onnx"])
def test_the_likeliest_continuation_is_chosen(
    kind: str, tiny_folder: Path, request: pytest.FixtureRequest
) -> None:
    scores = [_mean_log_p(tiny_folder, QUESTION.context, text) for text in QUESTION.choices]
    best = scores.index(max(scores))
    loaded = open_model(request.getfixturevalue(kind), context_tokens=64)
    assert choose(loaded, QUESTION) == best
    right = Question(QUESTION.context, QUESTION.choices, best)
    wrong = Question(QUESTION.context, QUESTION.choices, (best + 1) % 3)
    assert accuracy(loaded, [right, wrong, right, right]) == 0.75
