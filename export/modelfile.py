"""A Modelfile beside a GGUF, so that ``ollama create NAME -f FILE`` takes the model as it is.

Format: https://docs.ollama.com/modelfile. The chat template is left to the GGUF, from which Ollama
chooses its own form of it.
"""

from pathlib import Path

from edgekd.export.checkpoint import Checkpoint, read_licence
from edgekd.runtime.tokenizer import FileTokenizer, read_json

# Ollama's names of transformers' sampling settings.
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def modelfile_path(artifact: Path) -> Path:
    """Return where the Modelfile of the GGUF ``artifact`` lies."""
    return artifact.with_name(f"{artifact.stem}.Modelfile")


def modelfile(checkpoint: Checkpoint, artifact: Path) -> str:
    """Return the Modelfile of the GGUF ``artifact``, which lies beside it."""
    tokenizer = FileTokenizer(checkpoint.folder)
    stops = [tokenizer.raw_token_bytes(token).decode() for token in sorted(tokenizer.stop_ids)]
    generation = read_json(checkpoint.folder / "generation_config.json")
    sampling = {
        ollama: generation[name]
        for name, ollama in _SAMPLING.items()
        if generation.get(name) is not None
    }
    lines = [
        f"FROM ./{artifact.name}",
        f"PARAMETER num_ctx {checkpoint.config['max_position_embeddings']}",
        *(f"PARAMETER {name} {value}" for name, value in sampling.items()),
        *(f"PARAMETER stop {_quoted(stop)}" for stop in stops),
    ]
    if licence := read_licence(checkpoint.folder):
        lines.append(f"LICENSE {_quoted(licence)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"""' + text + '"""' if '"' in text or "\n" in text else f'"{text}"'
