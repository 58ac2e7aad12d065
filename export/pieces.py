"""SentencePiece's BPE, as Llama 2, Mistral, Phi-3 and Gemma have it, in llama.cpp's terms.

``tokenizers`` merges pairs by their rank in a list; llama.cpp (``llm_tokenizer_spm``) merges any
two neighbours whose text is a token, best score first, of equal ones the leftmost. Both give the
same ids only where the list holds every such pair, grouped by the token that it makes. Anything
else is refused.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, normalizers

from edgekd.errors import ExportError, ModelError

_SPACE = "\u2581"
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10_000.0  # as in llama.cpp's converter; never compared
# llama.cpp takes the spaces behind every mark but these for part of it, in models so named.
_STRIPPING_NAME = "Phi-3"
_NEVER_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


@dataclass(frozen=True)
class Pieces:
    """What llama.cpp needs to know beside the tokens."""

    score_of: dict[str, float]
    """Of each token of the model; a higher one is merged first."""
    adds_space_prefix: bool
    """Whether a space is put before each run of text."""

    def score(self, token: str, kind: TokenType) -> float:
        """Return the score of an entry of the token list."""
        if kind == TokenType.UNUSED:
            return _UNUSED_SCORE
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            return _ADDED_SCORE
        return self.score_of[token]


def is_sentencepiece(model: dict[str, Any]) -> bool:
    """Return whether ``model``, out of a tokenizer.json, is a BPE with byte fallback."""
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def read_pieces(tokenizer: Tokenizer) -> Pieces:
    """Return scores and space handling of ``tokenizer``, a BPE with byte fallback.

    Raises:
        ExportError: llama.cpp would give other ids for some text; it says for what reason.
    """
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    added = {token["content"] for token in description["added_tokens"]}
    if reason := (
        _model_fault(model)
        or _added_fault(tokenizer, description["added_tokens"])
        or _merge_fault(model, added)
    ):
        raise ExportError(f"llama.cpp cannot tokenize as this tokenizer does: {reason}")
    return Pieces(_scores(model, added), _adds_space_prefix(description))


def fitting_name(name: str, tokenizer: Tokenizer) -> str:
    """Return ``name`` as the model may be called, for llama.cpp goes by it.

    In a model whose name contains phi-3 or phi3 spaces behind marks are swallowed, as Phi-3's own
    tokenizer says (``rstrip``); it must be called so then, and may not otherwise.
    """
    calls_itself_so = re.search("phi-?3", name, re.IGNORECASE) is not None
    if calls_itself_so == (strips := _strips_like_phi3(tokenizer)):
        return name
    if not strips:
        return re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)
    renamed = re.sub("phi[ _.]3", _STRIPPING_NAME, name, flags=re.IGNORECASE)
    return renamed if renamed != name else f"{name} ({_STRIPPING_NAME})"


def _strips_like_phi3(tokenizer: Tokenizer) -> bool:
    added = tokenizer.get_added_tokens_decoder().values()
    stripping = {token.content for token in added if token.rstrip}
    kept = {token.content for token in added if not token.rstrip}
    return "</s>" in stripping and kept == _NEVER_STRIPPED


def _model_fault(model: dict[str, Any]) -> str | None:
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    for option in options:
        if model.get(option):
            return f"it has {option} {model[option]!r}"
    if missing := sorted(BYTE_TOKENS - set(model["vocab"])):
        return f"it lacks {len(missing)} of 256 byte tokens, such as {missing[0]}"
    return None


def _adds_space_prefix(description: dict[str, Any]) -> bool:
    """Return whether text gets a space before it; all else done to text must be ``" "`` to ▁.

    Raises:
        ExportError: something else is done to it.
    """
    steps = _parts(description["normalizer"], "normalizers")
    splits = _parts(description["pre_tokenizer"], "pretokenizers")
    if steps in ([_PREPEND, _REPLACE], [_REPLACE]) and all(map(_finds_nothing, splits)):
        return _PREPEND in steps
    # Metaspace that prepends leaves out the space where there is one already; llama.cpp does not.
    if not steps and len(splits) == 1 and _only_replaces(splits[0]):
        return False
    raise ExportError(
        "llama.cpp cannot prepare text as this tokenizer does: normalizer "
        f"{json.dumps(description['normalizer'])}, pre-tokenizer "
        f"{json.dumps(description['pre_tokenizer'])}; it can only replace spaces by {_SPACE}, with "
        "or without one put first"
    )


def _parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _finds_nothing(split: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer looks for spaces, of which the normalizer left none (Gemma)."""
    return split["type"] == "Split" and split["pattern"] == {"String": " "} and not split["invert"]


def _only_replaces(split: dict[str, Any]) -> bool:
    found = {key: split.get(key) for key in ("type", "replacement", "prepend_scheme", "split")}
    return found == {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "never",
        "split": False,
    }


def _added_fault(tokenizer: Tokenizer, added: list[dict[str, Any]]) -> str | None:
    for token in added:
        content = token["content"]
        for flag in ("single_word", "lstrip", "rstrip"):
            if token[flag] and not (flag == "rstrip" and _strips_like_phi3(tokenizer)):
                return f"token {content!r} has {flag}, which a GGUF cannot say"
        normalized = content
        if token["normalized"] and tokenizer.normalizer:
            normalized = tokenizer.normalizer.normalize_str(content)
        if normalized != content:
            return f"token {content!r} is looked for as {normalized!r}"
    return None


def _merge_fault(model: dict[str, Any], added: set[str]) -> str | None:
    """Name a text that llama.cpp would put together and this tokenizer would not, or later."""
    merges = {tuple(merge) for merge in _merges(model)}
    for token in model["vocab"]:
        # Added tokens are cut out of the text before anything is merged.
        if token in added or token in BYTE_TOKENS:
            continue
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in merges and all(_can_occur(part, model, added) for part in pair):
                return f"no merge joins {pair[0]!r} and {pair[1]!r}, though {token!r} is a token"
    made = [left + right for left, right in _merges(model) if left + right not in added]
    runs = Counter(token for token, _ in groupby(made))
    torn = next((token for token, n_runs in runs.items() if n_runs > 1), None)
    if torn is not None:
        return f"the merges that make {torn!r} have different ranks"
    return None


def _can_occur(part: str, model: dict[str, Any], added: set[str]) -> bool:
    return (len(part) == 1 or part in model["vocab"]) and part not in added


def _scores(model: dict[str, Any], added: set[str]) -> dict[str, float]:
    """Return scores in the order of the merges; SentencePiece's own where ids are in that order."""
    vocab = model["vocab"]
    made = dict.fromkeys(left + right for left, right in _merges(model))
    order = [token for token in made if token not in added]
    rest = [token for token in vocab if token not in made and token not in added | BYTE_TOKENS]
    if order == sorted(order, key=vocab.__getitem__):
        first = min(map(vocab.__getitem__, [*order, *rest]), default=0)
        score_of = {token: float(first - vocab[token]) for token in [*order, *rest]}
    else:
        score_of = {token: -float(i) for i, token in enumerate([*order, *rest])}
    return score_of | dict.fromkeys((*added, *BYTE_TOKENS), 0.0)


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in split]


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a GGUF file whose ``tokenizer.ggml.model`` is ``llama``.

    Special tokens and the first token are not yet in it.

    Raises:
        ModelError: scores or kinds are missing, or do not say which token is made first.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    listed = metadata.get("tokenizer.ggml.scores", [])
    if not len(tokens) == len(kinds) == len(listed):
        raise ModelError(
            f"the file has {len(tokens)} tokens, {len(listed)} scores and {len(kinds)} kinds; "
            "convert it again"
        )
    scores = dict(zip(tokens, listed, strict=True))
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != TokenType.UNUSED}
    normal = {token for token in vocab if kinds[vocab[token]] == TokenType.NORMAL}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(normal, key=lambda token: (-scores[token], vocab[token]))
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    made = {left + right for left, right in merges}
    if len({scores[token] for token in made}) < len(made):
        raise ModelError(
            "several tokens of the file have the same score, so the order of merges is lost; "
            "start from the original checkpoint"
        )
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    bpe = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token=tokens[unknown])
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", _SPACE)
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(_SPACE), spaces] if has_prefix else [spaces]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
