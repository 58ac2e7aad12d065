"""A model with only the tokens that the user's text needs: smaller embedding, same answers.

In a student of 0.1-0.5 billion parameters the embedding is 20-60 % of the file. Kept are the
tokens of the given text, every single byte, all special and added tokens, and whatever the byte
pair merges need on their way to these. The text then has the same tokens as before under new ids,
and the model gives them the same logits; other text falls into smaller pieces.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgekd.distill.prune import copy_tokenizer, write_prune_manifest
from edgekd.errors import ModelError
from edgekd.export.checkpoint import Checkpoint
from edgekd.files import atomic_folder
from edgekd.runtime.tokenizer import FileTokenizer, read_json

_ID_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "decoder_start_token_id",
)
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Trimmed:
    """Old ids in the order of the new ones."""

    old_ids: list[int]

    @property
    def new_id_of(self) -> dict[int, int]:
        """Old id to new id."""
        return {old: new for new, old in enumerate(self.old_ids)}


def choose_tokens(tokenizer: FileTokenizer, used: Iterable[int], n_rows: int) -> Trimmed:
    """Return the tokens that text with the ids ``used`` needs, of ``n_rows`` in the embedding.

    Raises:
        ModelError: the tokenizer is no byte-level BPE.
    """
    spec = _read_spec(tokenizer)
    ids: dict[str, int] = spec["model"]["vocab"]
    needed = {entry["id"] for entry in spec["added_tokens"]}
    needed |= {ids[char] for char in _alphabet() if char in ids}
    needed.update(used)
    made_of: dict[int, set[int]] = {}
    for left, right in _merges(spec):
        made_of.setdefault(ids[left + right], set()).update((ids[left], ids[right]))
    waiting = list(needed)
    while waiting:
        parts = made_of.get(waiting.pop(), set()) - needed
        needed |= parts
        waiting.extend(parts)
    return Trimmed(sorted(token_id for token_id in needed if token_id < n_rows))


def write_trimmed(checkpoint: Checkpoint, trimmed: Trimmed, out: Path) -> None:
    """Write ``checkpoint`` with only the tokens of ``trimmed`` to ``out``.

    Raises:
        ModelError: the tokenizer is no byte-level BPE.
        OutputError: ``out`` cannot be written; it is as it was.
    """
    tokenizer = FileTokenizer(checkpoint.folder)
    new_id_of, rows = trimmed.new_id_of, torch.tensor(trimmed.old_ids)
    with atomic_folder(out) as partial:
        weights = {name: checkpoint.tensor(name) for name in checkpoint.shard_of}
        for name in _EMBEDDINGS:
            if name in weights:
                weights[name] = weights[name].index_select(0, rows)
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        copy_tokenizer(checkpoint.folder, partial)
        _write(partial / "tokenizer.json", _trim_spec(_read_spec(tokenizer), new_id_of))
        config = _remap(checkpoint.config, new_id_of)
        _write(partial / "config.json", {**config, "vocab_size": len(rows), "dtype": "float32"})
        for name in ("generation_config.json", "tokenizer_config.json"):
            if (partial / name).is_file():
                _write(partial / name, _remap(read_json(partial / name), new_id_of))
        recipe = {"verb": "prune", "kept_tokens": trimmed.old_ids}
        write_prune_manifest(checkpoint, partial, recipe)


def _read_spec(tokenizer: FileTokenizer) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(tokenizer.core.to_str())
    is_byte_level = '"ByteLevel"' in json.dumps([spec["pre_tokenizer"], spec["decoder"]])
    if spec["model"].get("type") != "BPE" or not is_byte_level:
        raise ModelError(
            f"the tokenizer is a {spec['model'].get('type')} model; only byte-level BPE "
            "vocabularies can be trimmed"
        )
    return spec


def _trim_spec(spec: dict[str, Any], new_id_of: dict[int, int]) -> dict[str, Any]:
    ids: dict[str, int] = spec["model"]["vocab"]
    kept = {token: new_id_of[i] for token, i in ids.items() if i in new_id_of}
    merges = [
        [left, right]
        for left, right in _merges(spec)
        if left in kept and right in kept and left + right in kept
    ]
    return {
        **spec,
        "model": {**spec["model"], "vocab": kept, "merges": merges},
        "added_tokens": [
            {**entry, "id": new_id_of[entry["id"]]}
            for entry in spec["added_tokens"]
            if entry["id"] in new_id_of
        ],
        "post_processor": _remap_processor(spec["post_processor"], new_id_of),
    }


def _remap_processor(processor: Any, new_id_of: dict[int, int]) -> Any:
    """Return a post-processor whose special tokens have their new ids."""
    if isinstance(processor, list):
        return [_remap_processor(entry, new_id_of) for entry in processor]
    if not isinstance(processor, dict):
        return processor
    found = {name: _remap_processor(value, new_id_of) for name, value in processor.items()}
    if isinstance(ids := processor.get("ids"), list):
        found["ids"] = [new_id_of[token_id] for token_id in ids]
    for name in ("sep", "cls"):
        if isinstance(pair := processor.get(name), list) and len(pair) == 2:
            found[name] = [pair[0], new_id_of[pair[1]]]
    return found


def _remap(settings: dict[str, Any], new_id_of: dict[int, int]) -> dict[str, Any]:
    """Return a config with new ids wherever it names a token."""
    found = dict(settings)
    for name in _ID_KEYS:
        value = found.get(name)
        if isinstance(value, list):
            found[name] = [new_id_of[token_id] for token_id in value if token_id in new_id_of]
        elif value is not None:
            found[name] = new_id_of.get(value)
    if isinstance(added := found.get("added_tokens_decoder"), dict):
        found["added_tokens_decoder"] = {
            str(new_id_of[int(old)]): entry for old, entry in added.items() if int(old) in new_id_of
        }
    return found


def _merges(spec: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in spec["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
