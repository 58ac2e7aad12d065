"""``edgekd cache``: the teacher's distributions, computed once for every later run.

Shards are written one after the other, each whole or not at all; a capture that was killed goes
on at the first one that is missing, and ends with the same bytes as one that was not. Under
``torchrun`` or ``accelerate launch`` the ranks share the shards between them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.distill.cache_codec import entropy_nats, top_log_p
from edgekd.distill.cache_format import (
    Identity,
    LogitCache,
    Records,
    begin,
    finished_shard,
    samples_by_shard,
    write_index,
    write_shard,
)
from edgekd.distill.cache_source import Endpoint, TeacherSource, open_source
from edgekd.distill.cached_teacher import template_sha256
from edgekd.distill.data import Document, read_documents
from edgekd.distill.packing import cut
from edgekd.distill.vocabulary import vocabulary_sha256, vocabulary_size
from edgekd.errors import DataError, OutputError, RecipeError
from edgekd.export.export_model import as_text_side
from edgekd.progress import Progress, Silence
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.tokenizer import FileTokenizer

_SHARD_TOKENS = 65_536
_LONGEST_WAIT = timedelta(days=7)  # for ranks that began later or had more to do


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """What is kept of each distribution."""

    row_tokens: int = 512
    """Longest sample; must be the recipe's."""
    top_k: int = 32
    top_mass: float = 0.995
    tail_samples: int = 8
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    seed: int = 0
    shard_tokens: int = _SHARD_TOKENS

    def __post_init__(self) -> None:
        """Check the ranges; all faults are reported together."""
        faults = []
        if self.row_tokens < 2:
            faults.append(f"row_tokens {self.row_tokens} is below 2")
        for name, highest in (("top_k", 255), ("tail_samples", 255)):
            lowest = 1 if name == "top_k" else 0
            if not lowest <= getattr(self, name) <= highest:
                faults.append(f"{name} {getattr(self, name)} must lie in {lowest}..{highest}")
        if not 0 < self.top_mass <= 1:
            faults.append(f"top_mass {self.top_mass} must lie in 0..1")
        if 1.0 not in self.temperatures or min(self.temperatures) < 1:
            faults.append(f"temperatures {self.temperatures} must be 1 and above, one of them 1")
        if faults:
            raise RecipeError("; ".join(faults))


def capture(
    teacher: str | Endpoint,
    data: Sequence[str],
    out: Path,
    settings: CaptureSettings,
    *,
    tokenizer_of: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the distributions of ``teacher`` over ``data`` into the folder ``out``.

    ``tokenizer_of`` names a model whose tokenizer an endpoint uses; others bring their own.

    Raises:
        ModelError: the teacher cannot be read.
        DataError: the data is missing or malformed, or ``out`` is another capture's.
        EngineError: the teacher, or the endpoint, fails.
        OutputError: ``out`` cannot be written.
    """
    progress = progress or Silence()
    named = tokenizer_of or (teacher if isinstance(teacher, str) else None)
    if named is None:
        raise RecipeError("an endpoint does not tell its tokenizer; name a model with --tokenizer")
    with as_text_side(named, revision) as folder:
        tokenizer, template = FileTokenizer(folder), read_chat_template(folder)
        samples = cut(read_documents(data, tokenizer, template), settings.row_tokens)
        source = open_source(teacher, settings.row_tokens, revision)
        identity = _identity(source, tokenizer, template_sha256(template), settings)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make {out}: {error.strerror}") from error
        begin(out, identity)
        _capture_shards(source, samples, out, identity, settings.shard_tokens, progress)
    return inspect(out)


def inspect(folder: Path) -> dict[str, Any]:
    """Return what the cache in ``folder`` holds: bytes per token, mass kept, entropy.

    Raises:
        DataError: it is unfinished or empty, or a shard was changed.
    """
    cache = LogitCache(folder)
    n_positions = sum(entry["positions"] for entry in cache.shards)
    if not n_positions:
        raise DataError(f"{folder} holds no position; capture longer samples")
    n_bytes = sum(entry["bytes"] for entry in cache.shards)
    sums = np.sum([_figures(cache.shard_records(i)) for i in range(len(cache.shards))], 0)
    return {
        "path": str(folder),
        "teacher": cache.identity.teacher,
        "identity_sha256": cache.identity.sha256(),
        "samples": sum(entry["samples"] for entry in cache.shards),
        "positions": n_positions,
        "bytes": n_bytes,
        "bytes_per_token": n_bytes / n_positions,
        "top_tokens": sums[0] / n_positions,
        "tail_samples": sums[1] / n_positions,
        "mass_kept": sums[2] / n_positions,
        "entropy_nats": sums[3] / n_positions,
    }


def _figures(records: Records) -> list[float]:
    """Return sums over positions: kept tokens, tail samples, mass kept, entropy."""
    return [
        records.n_top_P.sum(dtype=np.int64),
        records.n_tail_P.sum(dtype=np.int64),
        np.exp(top_log_p(records)).sum(),
        entropy_nats(records).sum(),
    ]


def _capture_shards(
    source: TeacherSource,
    samples: Sequence[Document],
    out: Path,
    identity: Identity,
    shard_tokens: int,
    progress: Progress,
) -> None:
    shards = samples_by_shard(samples, shard_tokens)
    rank, n_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    n_tokens = sum(len(sample.ids) for shard in shards for _, sample in shard)
    ours = [number for number in range(len(shards)) if number % n_ranks == rank]
    keys_of = [[key for key, _ in shard] for shard in shards]
    missing = [n for n in ours if finished_shard(out, n, keys_of[n]) is None]
    done = n_tokens - sum(len(sample.ids) for number in missing for _, sample in shards[number])
    with progress.track("token", n_tokens, done) as advance:
        for number in missing:
            records = []
            for key, sample in shards[number]:
                records.append(source.records(key, sample, identity))
                done += len(sample.ids)
                advance(done, f"shard {number + 1} of {len(shards)}")
            write_shard(out, number, keys_of[number], records, identity.vocab_size)
    if n_ranks > 1:
        _wait_for_all_ranks()
    if rank == 0:
        found = [finished_shard(out, number, keys) for number, keys in enumerate(keys_of)]
        if lost := [number for number, entry in enumerate(found) if entry is None]:
            raise DataError(f"shards {lost} of {out} are missing; run edgekd cache again")
        write_index(out, identity, [entry for entry in found if entry])
    if n_ranks > 1:
        _wait_for_all_ranks()  # or the others would look for the index before it is there


def _wait_for_all_ranks() -> None:
    """Return once every rank is here; only through the network, so that no GPU is needed."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    dist.barrier()


def _identity(
    source: TeacherSource,
    tokenizer: FileTokenizer,
    template: str | None,
    settings: CaptureSettings,
) -> Identity:
    return Identity(
        teacher=source.name,
        teacher_sha256=source.sha256,
        revision=source.revision,
        source=source.kind,
        dtype=source.dtype,
        vocabulary_sha256=vocabulary_sha256(tokenizer),
        template_sha256=template,
        vocab_size=vocabulary_size(tokenizer),
        row_tokens=settings.row_tokens,
        top_k=settings.top_k,
        top_mass=settings.top_mass,
        tail_samples=settings.tail_samples,
        temperatures=settings.temperatures if source.knows_temperatures else (1.0,),
        seed=settings.seed,
    )
