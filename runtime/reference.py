"""What models are compared with: a teacher's every logit, kept on the disk meanwhile, or a pack."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ModelError
from edgekd.files import disk_errors
from edgekd.runtime.fidelity import distances, log_softmax, pick
from edgekd.runtime.loading import LoadedModel
from edgekd.runtime.reference_pack import PackBuilder, ReferencePack
from edgekd.runtime.windows import Windows, each_prediction

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

# S positions, V vocabulary, K kept tokens

Floats = NDArray[np.float64]
KlKind = Literal["exact", "lower bound"]


class Compared(NamedTuple):
    """A model against its teacher at some positions."""

    kl_S: Floats
    """KL(teacher || model) in nats, or a lower bound of it."""
    is_same_S: NDArray[np.bool_]
    """Whether both find the same token likeliest."""
    teacher_log_p_S: Floats
    """What the teacher gave the token that came next."""


class Reference(Protocol):
    """A teacher's predictions at every scored position of some windows."""

    @property
    def kl_kind(self) -> KlKind:
        """What the KL of :meth:`compare` is."""

    @property
    def windows(self) -> Windows:
        """The text, in ids."""

    def compare(self, start: int, next_ids: NDArray[np.int64], model_SV: Floats) -> Compared:
        """Compare with a model's log-probabilities at the positions from ``start`` on."""


@dataclass
class FullReference:
    """A teacher's logits at every position, in a file that vanishes with the process.

    Another ``file``, opened for reading and writing, stays.
    """

    windows: Windows
    vocab_size: int
    kl_kind: KlKind = "exact"
    file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    """Closed by close()."""

    def add(self, logits_SV: "Logits") -> None:
        """Append the next positions.

        Raises:
            OutputError: the disk is full.
        """
        with disk_errors(Path(tempfile.gettempdir()) / "the teacher's logits"):
            self.file.write(logits_SV.astype(np.float32, copy=False).tobytes())

    def compare(self, start: int, next_ids: NDArray[np.int64], model_SV: Floats) -> Compared:
        """Compare with a model's log-probabilities at the positions from ``start`` on.

        Where one has more ids than the other, both are taken over those that they share.
        """
        teacher_SV = log_softmax(self._read(start, len(next_ids)))
        teacher_log_p_S = pick(teacher_SV, next_ids)
        if teacher_SV.shape[1] != model_SV.shape[1]:
            n_shared = min(teacher_SV.shape[1], model_SV.shape[1])
            teacher_SV = log_softmax(teacher_SV[:, :n_shared])
            model_SV = log_softmax(model_SV[:, :n_shared])
        found = distances(teacher_SV, model_SV)
        return Compared(found.kl_T, found.is_same_T, teacher_log_p_S)

    def close(self) -> None:
        """Close the file, which removes a temporary one."""
        self.file.close()

    def _read(self, start: int, n_positions: int) -> "Logits":
        self.file.seek(start * self.vocab_size * 4)
        raw = self.file.read(n_positions * self.vocab_size * 4)
        return np.frombuffer(raw, np.float32).reshape(n_positions, self.vocab_size)


@dataclass(frozen=True)
class PackReference:
    """A teacher's likeliest tokens, out of a reference pack."""

    pack: ReferencePack
    kl_kind: KlKind = "lower bound"

    @property
    def windows(self) -> Windows:
        """The rows of the pack."""
        return self.pack.rows

    def compare(self, start: int, next_ids: NDArray[np.int64], model_SV: Floats) -> Compared:
        """Compare with a model's log-probabilities at the positions from ``start`` on.

        Raises:
            ModelError: the model has fewer ids than the pack keeps.
        """
        if (largest := int(self.pack.top_ids_SK.max())) >= model_SV.shape[1]:
            raise ModelError(
                f"the model has {model_SV.shape[1]} ids, the reference pack keeps id {largest}; "
                "it was made of a teacher with other tokens"
            )
        rows = slice(start, start + len(next_ids))
        pack = self.pack
        kl_S = lumped_kl(
            pack.top_ids_SK[rows].astype(np.int64),
            pack.top_log_p_SK[rows].astype(np.float64),
            pack.rest_log_p_S[rows].astype(np.float64),
            model_SV,
        )
        is_same_S = model_SV.argmax(-1) == pack.top_ids_SK[rows, 0]
        return Compared(kl_S, is_same_S, pack.next_log_p_S[rows].astype(np.float64))


def record_teacher(
    teacher: LoadedModel,
    windows: Windows,
    *,
    is_kept: bool = True,
    builder: PackBuilder | None = None,
    advance: Callable[[int], None] = lambda done: None,
    file: IO[bytes] | None = None,
) -> FullReference:
    """Run ``teacher`` over ``windows`` and return its logits, none of them unless ``is_kept``.

    ``builder`` sees them too; ``advance`` hears how many positions are done. They wait in ``file``,
    or in a temporary one.

    Raises:
        OutputError: the disk is full.
        EngineError: the engine fails.
    """
    done = 0
    with ExitStack() as stack:
        vocab_size = teacher.engine.vocab_size
        reference = (
            FullReference(windows, vocab_size)
            if file is None
            else FullReference(windows, vocab_size, file=file)
        )
        stack.callback(reference.close)
        for _, next_ids, logits_SV in each_prediction(teacher.engine, windows):
            if is_kept:
                reference.add(logits_SV)
            if builder:
                builder.add(np.asarray(next_ids, np.int64), logits_SV)
            done += len(next_ids)
            advance(done)
        stack.pop_all()  # whole, so it stays open
    return reference


def lumped_kl(
    top_ids_SK: NDArray[np.int64],
    top_log_p_SK: Floats,
    rest_log_p_S: Floats,
    model_SV: Floats,
) -> Floats:
    """Return KL(teacher || model) over K + 1 cells [S]: each kept token, and all others as one.

    Lumping never adds to a KL (log sum inequality: Cover and Thomas, "Elements of Information
    Theory", 2.7.1), so this is at most the KL over the whole vocabulary.
    """
    model_top_SK = np.take_along_axis(model_SV, top_ids_SK, 1)
    others_SV = model_SV.copy()
    np.put_along_axis(others_SV, top_ids_SK, -np.inf, 1)
    rest_mass_S = np.maximum(np.exp(others_SV).sum(1), np.finfo(np.float64).tiny)
    model_rest_S = np.log(rest_mass_S)
    kept_S: Floats = (np.exp(top_log_p_SK) * (top_log_p_SK - model_top_SK)).sum(1)
    has_rest_S = np.isfinite(rest_log_p_S)  # none where every token is kept
    rest_S = np.where(has_rest_S, rest_log_p_S, 0)
    gap_S = rest_S - np.where(has_rest_S, model_rest_S, 0)
    kl_S: Floats = kept_S + np.where(has_rest_S, np.exp(rest_S), 0) * gap_S
    return kl_S
