"""A teacher that comes out of a cache: targets for the loss, found by what a sample is."""

import hashlib
from collections.abc import Iterable, Sequence

import torch

from edgekd.distill.cache_codec import Sparse, decode
from edgekd.distill.cache_format import LogitCache, Records, sample_key
from edgekd.distill.data import Document
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.losses import Entries, Measure, Measured, Target
from edgekd.distill.model import Batch
from edgekd.distill.packing import Row
from edgekd.distill.recipe import Recipe
from edgekd.distill.vocabulary import vocabulary_sha256
from edgekd.errors import DataError, RecipeError, VocabularyError
from edgekd.runtime.chat_template import ChatTemplate
from edgekd.runtime.tokenizer import FileTokenizer

# N learned positions, C of one chunk, E entries of a position at most, V common vocabulary


class CachedTarget:
    """Sparse estimates of the teacher's distribution at N positions."""

    weights_N: torch.Tensor | None = None

    def __init__(self, sparse: Sparse, device: torch.device) -> None:
        """Move ``sparse`` to ``device``."""
        self._ids_NE = torch.from_numpy(sparse.ids_PE).to(device)
        self._weights_NE = torch.from_numpy(sparse.weights_PE).to(device)
        self._entropy_N = torch.from_numpy(sparse.entropy_P).to(device)
        self._rest_N = torch.from_numpy(sparse.rest_P).to(device)
        self.measure: Measure = measure_cached

    def chunk(self, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return the entries of each position, its entropy and the weight of all other tokens."""
        return (
            self._ids_NE[rows],
            self._weights_NE[rows],
            self._entropy_N[rows],
            self._rest_N[rows],
        )

    def likeliest(self, rows: slice, options: LossOptions) -> torch.Tensor:
        """Return the teacher's first choice [C]."""
        return self._ids_NE[rows, 0]


class CachedTeacher:
    """Looks the samples of a row up in a cache."""

    def __init__(
        self,
        cache: LogitCache,
        packed: Iterable[tuple[Sequence[Document], Sequence[Row]]],
        temperature: float,
    ) -> None:
        """Serve the rows that were ``packed`` from samples, at ``temperature``.

        Raises:
            DataError: a sample is not in the cache.
        """
        self._cache = cache
        self._temperature = temperature
        self._keys_of_row: dict[int, list[bytes]] = {}
        for samples, rows in packed:
            keys = [sample_key(sample) for sample in samples]
            _check_captured(cache, keys)
            for row in rows:
                self._keys_of_row[row.number] = [keys[index] for index in row.samples]

    def target(self, batch: Batch, is_learned_BT: torch.Tensor) -> Target:
        """Return the teacher's distributions at the learned positions of ``batch``."""
        keys = [key for row in batch["row_numbers"].tolist() for key in self._keys_of_row[row]]
        records = Records.concatenate([self._cache.read(key) for key in keys])
        sparse = decode(records, self._cache.identity.temperatures, self._temperature)
        return CachedTarget(sparse, is_learned_BT.device)


def check_recipe(recipe: Recipe, cache: LogitCache) -> None:
    """Refuse settings that a cache cannot serve.

    Raises:
        RecipeError: another divergence than forward KL, a temperature without its log Z, or rows
            of another length than the cache was cut for.
    """
    identity = cache.identity
    faults = []
    if recipe.divergence != "forward_kl":
        faults.append(f"a cache serves forward_kl only, not {recipe.divergence}")
    if recipe.match_hidden:
        faults.append("a cache holds no hidden states; match_hidden needs --teacher")
    if recipe.cross_tokenizer != "refuse":
        faults.append("a cache holds token ids; cross_tokenizer needs --teacher")
    if recipe.on_policy > 0:
        faults.append("a cache knows nothing of what the student writes; on_policy needs --teacher")
    if recipe.temperature not in identity.temperatures:
        known = ", ".join(f"{temperature:g}" for temperature in identity.temperatures)
        faults.append(f"the cache knows the temperatures {known}, not {recipe.temperature:g}")
    if recipe.row_tokens != identity.row_tokens:
        faults.append(
            f"the cache holds samples of up to {identity.row_tokens} tokens, row_tokens is "
            f"{recipe.row_tokens}"
        )
    if faults:
        raise RecipeError("; ".join(faults))


def check_vocabulary(
    cache: LogitCache, tokenizer: FileTokenizer, template: ChatTemplate | None
) -> None:
    """Compare the tokens and the chat template that a cache was captured with.

    Raises:
        VocabularyError: they are not those given; both hashes are named.
    """
    identity = cache.identity
    for what, captured, ours in (
        ("tokenizer", identity.vocabulary_sha256, vocabulary_sha256(tokenizer)),
        ("chat template", identity.template_sha256, template_sha256(template)),
    ):
        if captured != ours:
            raise VocabularyError(
                f"{cache.folder} was captured with another {what} ({_short(captured)}) than the "
                f"student's ({_short(ours)}); capture it again, or choose a student of the "
                "teacher's family"
            )


def template_sha256(template: ChatTemplate | None) -> str | None:
    """Return the hash of a chat template's source; None without one."""
    return None if template is None else hashlib.sha256(template.source.encode()).hexdigest()


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"


def _check_captured(cache: LogitCache, keys: Sequence[bytes]) -> None:
    missing = [key for key in keys if key not in cache]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(keys)} samples are not in {cache.folder}, the first is "
            f"{missing[0].hex()[:12]}; capture this data with edgekd cache"
        )


def measure_cached(
    student_CV: torch.Tensor,
    ids_CE: torch.Tensor,
    weights_CE: torch.Tensor,
    entropy_C: torch.Tensor,
    rest_C: torch.Tensor,
    options: LossOptions,
) -> Measured:
    """Return forward KL [C] and its gradient; ``rest_C`` is learned as one sum.

    An id has one weight; where that is 0 the entry stands for nothing.
    """
    weights_CE = weights_CE.to(student_CV.dtype)
    scaled_CV = student_CV / options.temperature
    largest_C1 = scaled_CV.amax(-1, keepdim=True)
    log_total_C1 = (scaled_CV - largest_C1).exp().sum(-1, keepdim=True).log()
    is_entry_CE = weights_CE > 0
    ids_CE = torch.where(is_entry_CE, ids_CE, ids_CE[:, :1])
    log_q_CE = scaled_CV.gather(1, ids_CE) - largest_C1 - log_total_C1
    q_CE = log_q_CE.exp()
    rest_q_C = (1 - (q_CE * is_entry_CE).sum(-1)).clamp(min=1e-9)
    value_C = -(weights_CE * log_q_CE).sum(-1) - rest_C * rest_q_C.log() - entropy_C
    pull_C1 = (rest_C / rest_q_C)[:, None]
    mass_C1 = weights_CE.sum(-1, keepdim=True) + rest_C[:, None]
    entry_CE = q_CE * mass_C1 - weights_CE
    entry_CE = torch.where(is_entry_CE, entry_CE, entry_CE[:, :1])
    # Not the exponentials above: a compiler would store [C, V] of them, which costs more than exp.
    grad_CV = (scaled_CV - largest_C1 - log_total_C1).exp() * (mass_C1 - pull_C1)
    return Measured(value_C, grad_CV, Entries(ids_CE, entry_CE))
