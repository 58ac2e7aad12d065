"""What the models of ``edgekd eval`` are compared with: a pack, or a teacher that runs first.

A teacher can also be recorded into a folder, for models that are measured in other processes.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from edgekd.errors import DataError
from edgekd.files import disk_errors, sha256_of
from edgekd.progress import Progress, Silence
from edgekd.runtime.eval_options import EvalOptions, check_options
from edgekd.runtime.identity import (
    check_same_tokens,
    tokenizer_of,
    tokenizer_sha256,
    weights_sha256,
)
from edgekd.runtime.loading import LoadedModel, opened_model
from edgekd.runtime.model_kind import ModelKind, locate_model
from edgekd.runtime.reference import FullReference, PackReference, Reference, record_teacher
from edgekd.runtime.reference_pack import PackBuilder, PackIdentity, read_pack, write_pack
from edgekd.runtime.windows import cut_windows, n_scored

_LOGITS, _HEADER = "logits.f32", "reference.json"

Located = Sequence[tuple[ModelKind, Path]]


def check_evaluation(models: Sequence[str], options: EvalOptions) -> None:
    """Check what can be known before anything runs: options, pack, text, and everybody's tokens.

    Raises:
        RecipeError: the options contradict each other; all faults are named.
        DataError: text or pack are missing or malformed.
        VocabularyError: a model has other tokens than its reference.
    """
    check_options(models, options)
    located = [locate_model(model, options.revision) for model in models]
    if options.text:
        read_text(options.text)
    if options.reference:
        _open_pack(located, options.reference)
    elif options.teacher:
        kind, path = locate_model(options.teacher, options.revision)
        _check_tokens(located, path.name, tokenizer_sha256(tokenizer_of(kind, path)))


def open_reference(
    located: Located,
    options: EvalOptions,
    stack: ExitStack,
    progress: Progress,
    recorded: Path | None = None,
) -> tuple[Reference | None, dict[str, Any] | None]:
    """Return what to compare with, which ``stack`` closes, and what the report says of it.

    Raises:
        DataError: text or pack are missing or malformed.
        VocabularyError: a model has other tokens.
        ModelError, EngineError: the teacher cannot be read or run.
    """
    if options.reference:
        return _open_pack(located, options.reference)
    if not options.teacher:
        return None, None
    if recorded:
        reference, described = _open_recorded(recorded)
        _check_tokens(located, Path(described["teacher"]).name, described["tokenizer_sha256"])
    else:
        kind, path = locate_model(options.teacher, options.revision)
        described = _describe(kind, path)
        _check_tokens(located, path.name, described["tokenizer_sha256"])
        reference = _run_teacher(path, described, options, bool(located), progress)
    return stack.enter_context(closing(reference)), described


def record_reference(
    options: EvalOptions, folder: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the teacher and leave in ``folder`` what it said; return what a report says of it.

    Raises:
        DataError: the text is missing or too short.
        ModelError, EngineError: the teacher cannot be read or run.
        OutputError: the disk is full.
    """
    assert options.teacher
    kind, path = locate_model(options.teacher, options.revision)
    described = _describe(kind, path)
    with disk_errors(folder), (folder / _LOGITS).open("w+b") as file:
        reference = _run_teacher(path, described, options, True, progress or Silence(), file)
        header = {
            "windows": reference.windows,
            "vocab_size": reference.vocab_size,
            "described": described,
        }
        (folder / _HEADER).write_text(json.dumps(header), "utf-8")
    return described


def read_text(path: Path) -> str:
    """Return the text at ``path``.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read text from {path}: {error}") from error


def _open_pack(located: Located, file: Path) -> tuple[PackReference, dict[str, Any]]:
    pack = read_pack(file)
    name = f"{file.name} (teacher {pack.identity.teacher})"
    _check_tokens(located, name, pack.identity.tokenizer_sha256)
    return PackReference(pack), {"pack": str(file), **asdict(pack.identity)}


def _open_recorded(folder: Path) -> tuple[FullReference, dict[str, Any]]:
    header = json.loads((folder / _HEADER).read_text("utf-8"))
    file = (folder / _LOGITS).open("rb")
    return FullReference(header["windows"], header["vocab_size"], file=file), header["described"]


def _describe(kind: ModelKind, path: Path) -> dict[str, Any]:
    return {
        "teacher": str(path),
        "weights_sha256": weights_sha256(kind, path),
        "tokenizer_sha256": tokenizer_sha256(tokenizer_of(kind, path)),
    }


def _check_tokens(located: Located, reference: str, expected: str) -> None:
    """Refuse a model with other tokens before anything long begins."""
    for kind, path in located:
        found = tokenizer_sha256(tokenizer_of(kind, path))
        check_same_tokens(path.name, found, reference, expected)


def _run_teacher(
    path: Path,
    described: dict[str, Any],
    options: EvalOptions,
    is_compared: bool,
    progress: Progress,
    file: IO[bytes] | None = None,
) -> FullReference:
    """Run the teacher over the text, keep its logits if asked, and write a pack if asked."""
    assert options.text
    text = read_text(options.text)
    with opened_model(
        path, context_tokens=options.window_tokens, n_threads=options.n_threads
    ) as teacher:
        windows = cut_windows(teacher.tokenizer, text, options.n_tokens, options.window_tokens)
        builder = None
        if options.write_reference:
            builder = PackBuilder(_pack_identity(teacher, described, options), windows)
        with progress.track(f"teacher {path.name}", n_scored(windows)) as advance:
            reference = record_teacher(
                teacher,
                windows,
                is_kept=is_compared,
                builder=builder,
                advance=lambda done: advance(done, ""),
                file=file,
            )
    if builder and options.write_reference:
        write_pack(options.write_reference, builder.finish())
    return reference


def _pack_identity(
    teacher: LoadedModel, described: dict[str, Any], options: EvalOptions
) -> PackIdentity:
    assert options.text
    return PackIdentity(
        teacher=teacher.path.name,
        teacher_sha256=described["weights_sha256"],
        teacher_engine=teacher.engine.name,
        tokenizer_sha256=described["tokenizer_sha256"],
        text_sha256=sha256_of(options.text),
        vocab_size=teacher.engine.vocab_size,
        top_k=options.top_k,
    )
