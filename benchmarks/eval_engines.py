"""Whether quality is the same on every engine, and what a reference pack costs and misses.

    python benchmarks/eval_engines.py --teacher TEACHER --gguf MODEL-f16.gguf --onnx MODEL-f32 \
        --quantized MODEL-q4_0.gguf --model CHECKPOINT --text TEXT \
        --out benchmarks/results/eval_engines.json

Rows are the checkpoint in torch, its GGUF and its float ONNX folder, all against the same teacher
on the same tokens; then, for each number of kept tokens, the KL of ``--quantized`` that a
reference pack gives, beside the exact one, and the pack's size. Not measured: speed.
"""

import argparse
import tempfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import record

from edgekd.files import sha256_of
from edgekd.runtime.identity import tokenizer_of, tokenizer_sha256, weights_sha256
from edgekd.runtime.loading import opened_model
from edgekd.runtime.model_kind import detect_kind
from edgekd.runtime.reference import FullReference, PackReference, record_teacher
from edgekd.runtime.reference_pack import PackBuilder, PackIdentity, read_pack, write_pack
from edgekd.runtime.text_quality import TextQuality, score_text, summarise
from edgekd.runtime.windows import Windows, cut_windows

WINDOW_TOKENS = 256
KEPT = (8, 32, 64, 128, 256, 1024)


def measure(path: Path, reference: FullReference | PackReference) -> TextQuality:
    """Return the quality of the model at ``path``."""
    with opened_model(path, context_tokens=WINDOW_TOKENS) as loaded:
        return summarise(score_text(loaded.engine, reference.windows, reference), reference.kl_kind)


def pack_rows(
    builders: dict[int, PackBuilder], quantized: Path, folder: Path
) -> dict[str, dict[str, Any]]:
    """Return what a pack with each number of kept tokens says of ``quantized``."""
    rows = {}
    for top_k, builder in builders.items():
        path = folder / f"{top_k}.pack"
        write_pack(path, builder.finish())
        found = measure(quantized, PackReference(read_pack(path)))
        assert found.to_teacher
        size = path.stat().st_size
        rows[str(top_k)] = {"kl_nats": asdict(found.to_teacher.kl_nats), "pack_bytes": size}
    return rows


def identity(teacher: Path, text: Path, vocab_size: int, top_k: int) -> PackIdentity:
    """Return what a pack of ``teacher`` belongs to."""
    kind = detect_kind(teacher)
    return PackIdentity(
        teacher=teacher.name,
        teacher_sha256=weights_sha256(kind, teacher),
        teacher_engine=str(kind),
        tokenizer_sha256=tokenizer_sha256(tokenizer_of(kind, teacher)),
        text_sha256=sha256_of(text),
        vocab_size=vocab_size,
        top_k=top_k,
    )


def run_teacher(
    teacher: Path, text: Path, n_tokens: int
) -> tuple[FullReference, dict[int, PackBuilder]]:
    """Return the teacher's logits, and packs of them in the making."""
    with opened_model(teacher, context_tokens=WINDOW_TOKENS) as loaded:
        windows: Windows = cut_windows(
            loaded.tokenizer, text.read_text("utf-8"), n_tokens, WINDOW_TOKENS
        )
        size = loaded.engine.vocab_size
        builders = {k: PackBuilder(identity(teacher, text, size, k), windows) for k in KEPT}
        every = _Every(builders)
        return record_teacher(loaded, windows, builder=every), builders


class _Every(PackBuilder):
    """Hands each position to several builders."""

    def __init__(self, builders: dict[int, PackBuilder]) -> None:
        self._builders = builders

    def add(self, next_ids_S: Any, logits_SV: Any) -> None:
        for builder in self._builders.values():
            builder.add(next_ids_S, logits_SV)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("teacher", "model", "gguf", "onnx", "quantized", "text"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    reference, builders = run_teacher(arguments.teacher, arguments.text, arguments.tokens)
    with closing(reference), tempfile.TemporaryDirectory() as folder:
        models = {
            "torch": arguments.model,
            "llama.cpp": arguments.gguf,
            "onnxruntime": arguments.onnx,
            "quantized": arguments.quantized,
        }
        rows = {name: asdict(measure(path, reference)) for name, path in models.items()}
        packs = pack_rows(builders, arguments.quantized, Path(folder))
    result = {
        "weights_sha256": {
            name: weights_sha256(detect_kind(path), path) for name, path in models.items()
        },
        "teacher_sha256": weights_sha256(detect_kind(arguments.teacher), arguments.teacher),
        "text_sha256": sha256_of(arguments.text),
        "rows": rows,
        "packs_of_quantized": packs,
    }
    record(result, arguments.out)


if __name__ == "__main__":
    main()
