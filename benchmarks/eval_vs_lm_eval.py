"""Our answers to multiple-choice questions beside lm-evaluation-harness's own, one by one.

    python benchmarks/eval_vs_lm_eval.py --model CHECKPOINT --questions QUESTIONS.jsonl -n 200 \
        --out benchmarks/results/eval_vs_lm_eval.json

lm-evaluation-harness runs the checkpoint in float32 with its own HFLM, on the template of its
arc_easy; edgekd asks the same questions on its torch engine. Exits with 1 unless both choose the
same answer to every question, by acc and by acc_norm. Not measured: speed.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import record

from edgekd.export.checkpoint import open_checkpoint
from edgekd.files import sha256_of
from edgekd.runtime.choices import Answered, Question, answer, grade
from edgekd.runtime.loading import LoadedModel
from edgekd.runtime.model_kind import ModelKind
from edgekd.runtime.questions import read_questions
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm

# From lm_eval/tasks/arc/arc_easy.yaml.
TASK = {
    "task": "questions",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
}
CONTEXT_TOKENS = 1024


def ours(model: Any, folder: Path, questions: Sequence[Question]) -> list[Answered]:
    """Return what ``model`` makes of each question on edgekd's torch engine."""
    engine = TorchEngine(model, CONTEXT_TOKENS)
    loaded = LoadedModel(folder, ModelKind.CHECKPOINT, engine, FileTokenizer(folder), None)
    return answer(loaded, questions)


def theirs(model: Any, folder: Path, file: Path) -> tuple[list[list[float]], dict[str, Any]]:
    """Return HFLM's log-probabilities of each question's choices, and its summary."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(file)}}}
    # The tokenizer of tokenizer.json, as edgekd: AutoTokenizer replaces some models' splitter.
    hflm = HFLM(model, tokenizer=_tokenizer(folder), max_length=CONTEXT_TOKENS, batch_size=8)
    found = lm_eval.simple_evaluate(
        model=hflm, tasks=[task], log_samples=True, bootstrap_iters=1000
    )
    samples = sorted(found["samples"]["questions"], key=lambda sample: sample["doc_id"])
    log_p = [[float(log_p) for log_p, _ in sample["filtered_resps"]] for sample in samples]
    return log_p, found["results"]["questions"]


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def compare(answered: Sequence[Answered], log_p: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return how many answers differ, and by how much log-probabilities do at most."""
    n_unequal, n_unequal_norm, gap_nats = 0, 0, 0.0
    for one, expected in zip(answered, log_p, strict=True):
        lengths = [len(text.lstrip()) for text in one.question.choices]
        n_unequal += one.chosen("none") != _largest(expected)
        normed = [value / length for value, length in zip(expected, lengths, strict=True)]
        n_unequal_norm += one.chosen("chars") != _largest(normed)
        gaps = [abs(a.log_p - b) for a, b in zip(one.scored, expected, strict=True)]
        gap_nats = max(gap_nats, *gaps)
    return {
        "unequal_answers": n_unequal,
        "unequal_answers_norm": n_unequal_norm,
        "largest_gap_nats": gap_nats,
    }


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_causal_lm(arguments.model, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        lines = arguments.questions.read_text("utf-8").splitlines()[: arguments.n]
        file = Path(folder) / "questions.jsonl"
        file.write_text("\n".join(lines) + "\n", "utf-8")
        answered = ours(model, arguments.model, read_questions(file))
        log_p, summary = theirs(model, arguments.model, file)
    graded, compared = grade(answered), compare(answered, log_p)
    result = {
        "model_sha256": open_checkpoint(arguments.model).weights_sha256(),
        "questions_sha256": sha256_of(arguments.questions),
        "n_questions": len(answered),
        "compared": compared,
        "edgekd": {
            "acc": [graded.acc.value, graded.acc.standard_error],
            "acc_norm": [graded.acc_norm.value, graded.acc_norm.standard_error],
        },
        "lm_eval": {
            name: [summary[f"{name},none"], summary[f"{name}_stderr,none"]]
            for name in ("acc", "acc_norm")
        },
        "lm_eval_version": _version(),
    }
    record(result, arguments.out)
    if compared["unequal_answers"] or compared["unequal_answers_norm"]:
        sys.exit("answers differ")


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


if __name__ == "__main__":
    main()
