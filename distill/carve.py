"""What ``edgekd prune`` does: from targets and text to a smaller model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekd.distill.data import read_documents
from edgekd.distill.importance import measure_importance
from edgekd.distill.latency import sizes_for_latency
from edgekd.distill.prune import write_pruned
from edgekd.distill.student_shape import Kept, Way, choose, sizes_of, sizes_within
from edgekd.distill.trim_vocabulary import choose_tokens, write_trimmed
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.progress import Progress, Silence
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.tokenizer import FileTokenizer

_CALIBRATION_DOCUMENTS = 64


def carve(
    checkpoint: Checkpoint,
    out: Path,
    *,
    data: Sequence[str] = (),
    max_params: int | None = None,
    max_latency_ms: float | None = None,
    way: Way = "depth",
    counts: Mapping[str, int] | None = None,
    layers: list[int] | None = None,
    tokens_of: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what is left of ``checkpoint`` to ``out``; return what was kept.

    ``max_params`` and ``max_latency_ms`` (a decoded token here, on Q4_0) are reached by ``way``;
    ``counts`` names sizes (layers, hidden, neurons, groups), ``layers`` the layers themselves;
    ``tokens_of`` trims the vocabulary instead.

    Raises:
        RecipeError: nothing would be left, or more is to be kept than there is.
        DataError: the text is missing or malformed.
        OutputError: ``out`` cannot be written; it is as it was.
    """
    report: dict[str, Any] = {"path": str(out), "n_parameters_before": checkpoint.n_parameters}
    tokenizer, template = FileTokenizer(checkpoint.folder), read_chat_template(checkpoint.folder)
    if tokens_of:
        documents = read_documents(tokens_of, tokenizer, template)
        ids = (token for document in documents for token in document.ids)
        trimmed = choose_tokens(tokenizer, ids, checkpoint.config["vocab_size"])
        write_trimmed(checkpoint, trimmed, out)
        report["kept_tokens"] = len(trimmed.old_ids)
    elif layers is not None:
        write_pruned(checkpoint, Kept(layers), out)
        report["kept_layers"] = layers
    else:
        documents = read_documents(data, tokenizer, template)[:_CALIBRATION_DOCUMENTS]
        if max_latency_ms is not None:
            sizes = sizes_for_latency(checkpoint, max_latency_ms, way, progress)
        elif max_params is not None:
            sizes = sizes_within(checkpoint, max_params, way)
        else:
            sizes = replace(sizes_of(checkpoint), **(counts or {}))
        importance = measure_importance(checkpoint, documents, progress or Silence())
        kept = choose(importance, sizes)
        write_pruned(checkpoint, kept, out)
        report |= {"kept_layers": kept.layers, "block_influence": importance.layers_L}
    left = open_checkpoint(out)
    report |= {"sizes": vars(sizes_of(left)), "n_parameters": left.n_parameters}
    return report
