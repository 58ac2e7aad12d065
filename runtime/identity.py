"""What a figure belongs to: hashes of a model's weights and of its tokens."""

import hashlib
from pathlib import Path

from edgekd.errors import VocabularyError
from edgekd.files import sha256_of, sha256_of_all
from edgekd.runtime.model_kind import ModelKind
from edgekd.runtime.tokenizer import FileTokenizer, Tokenizer


def weights_sha256(kind: ModelKind, path: Path) -> str:
    """Return one hash over the files with the weights: a file's own where there is only one."""
    if kind is ModelKind.GGUF:
        return sha256_of(path)
    pattern = "*.safetensors" if kind is ModelKind.CHECKPOINT else "model.onnx*"
    return sha256_of_all(sorted(path.glob(pattern)))


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Return a hash of what each id stands for, the same for every format of a model.

    Padding at the end of a vocabulary, which only some formats have, does not count.
    """
    tokens = [tokenizer.raw_token_bytes(token_id) for token_id in range(tokenizer.n_ids)]
    while tokens and not tokens[-1]:
        tokens.pop()
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()


def tokenizer_of(kind: ModelKind, path: Path) -> Tokenizer:
    """Return the tokenizer of a model without its weights.

    Raises:
        ModelError: it cannot be read.
    """
    if kind is not ModelKind.GGUF:
        return FileTokenizer(path)
    from edgekd.runtime.llamacpp_engine import LlamaCppVocabulary

    return LlamaCppVocabulary(path)


def check_same_tokens(name: str, found: str, reference: str, expected: str) -> None:
    """Compare the token hash of the model called ``name`` with that of its ``reference``.

    Raises:
        VocabularyError: they differ; both are named.
    """
    if found != expected:
        raise VocabularyError(
            f"{name} has other tokens than {reference} (tokenizer sha256 {found} and {expected}); "
            "only models with the same tokens can be compared"
        )
