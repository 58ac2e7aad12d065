"""Open any model for many sequences: engine, tokenizer and chat template together."""

from dataclasses import dataclass
from pathlib import Path

from edgekd.runtime.batch_engine import BatchEngine, EngineOptions, OneSlotEngine
from edgekd.runtime.chat_template import ChatTemplate, read_chat_template
from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.loading import gguf_chat_template, open_model
from edgekd.runtime.model_kind import ModelKind, locate_model
from edgekd.runtime.tokenizer import FileTokenizer, Tokenizer


@dataclass(frozen=True)
class BatchModel:
    """A model that is ready to run many sequences."""

    path: Path
    kind: ModelKind
    engine: BatchEngine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


def open_batch_model(
    model: str | Path, options: EngineOptions, revision: str | None = None
) -> BatchModel:
    """Return ``model`` on the engine that runs its kind.

    A checkpoint, an ONNX folder of fixed shapes, and one that the CPU does not run get a single
    slot.

    Raises:
        ModelError: it cannot be found, read or run.
        EngineError: there is no memory for its contexts.
        RecipeError: its engine cannot do what ``options`` ask for.
        MissingExtraError: its engine is not installed.
    """
    kind, path = locate_model(str(model), revision)
    opener = {
        ModelKind.GGUF: _open_gguf,
        ModelKind.ONNX: _open_onnx,
        ModelKind.CHECKPOINT: _open_checkpoint,
    }[kind]
    return opener(path, options)


def _open_gguf(path: Path, options: EngineOptions) -> BatchModel:
    from edgekd.runtime.llamacpp_batch import LlamaCppBatchEngine
    from edgekd.runtime.llamacpp_engine import LlamaCppTokenizer

    template = gguf_chat_template(read_gguf_header(path))
    engine = LlamaCppBatchEngine(path, options)
    tokenizer = LlamaCppTokenizer(engine.model)
    return BatchModel(path, ModelKind.GGUF, engine, tokenizer, template)


def _open_onnx(path: Path, options: EngineOptions) -> BatchModel:
    from edgekd.runtime.npu_engine import NpuEngine
    from edgekd.runtime.onnx_batch import OnnxBatchEngine
    from edgekd.runtime.onnx_engine import OnnxEngine
    from edgekd.runtime.providers import choose
    from edgekd.runtime.static_model import is_static

    engine: BatchEngine
    if is_static(path) or choose(options.provider) != "cpu":
        kind = NpuEngine if is_static(path) else OnnxEngine
        alone = kind(
            path,
            options.context_tokens,
            options.n_threads,
            options.provider,
            require_npu=options.require_npu,
        )
        engine = OneSlotEngine(alone)
    else:
        engine = OnnxBatchEngine(path, options)
    return BatchModel(path, ModelKind.ONNX, engine, FileTokenizer(path), read_chat_template(path))


def _open_checkpoint(path: Path, options: EngineOptions) -> BatchModel:
    opened = open_model(path, context_tokens=options.context_tokens, n_threads=options.n_threads)
    engine = OneSlotEngine(opened.engine)
    return BatchModel(path, opened.kind, engine, opened.tokenizer, opened.chat_template)
