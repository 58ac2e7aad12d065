"""Reference packs: exact where they claim to be, a bound where not, and refused when touched."""

import hashlib
import json
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.errors import DataError, ModelError, RecipeError
from edgekd.runtime.fidelity import kl_per_token, log_softmax
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.runtime.reference import PackReference, lumped_kl, record_teacher
from edgekd.runtime.reference_pack import (
    MAGIC,
    PackBuilder,
    PackIdentity,
    ReferencePack,
    read_pack,
    write_pack,
)
from edgekd.runtime.text_quality import TextQuality, score_text, summarise
from edgekd.runtime.windows import cut_windows
from tests.conftest import TEXTS, save_tiny_model

TEXT = " ".join(TEXTS)


def _identity(vocab_size: int, top_k: int) -> PackIdentity:
    return PackIdentity(
        teacher="teacher",
        teacher_sha256="1" * 64,
        teacher_engine="torch",
        tokenizer_sha256="2" * 64,
        text_sha256="3" * 64,
        vocab_size=vocab_size,
        top_k=top_k,
    )


def _random_pack(seed: int, vocab_size: int, top_k: int, lengths: list[int]) -> ReferencePack:
    draw = np.random.default_rng(seed)
    rows = [draw.integers(0, vocab_size, length).tolist() for length in lengths]
    builder = PackBuilder(_identity(vocab_size, top_k), rows)
    for row in rows:
        logits = draw.normal(0, 3, (len(row) - 1, vocab_size)).astype(np.float32)
        builder.add(np.array(row[1:]), logits)
    return builder.finish()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "small.pack"
    write_pack(path, _random_pack(0, 50, 4, [5, 3]))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "teacher", seed=1)
    return open_model(folder, context_tokens=64, n_threads=1)


def _both(
    teacher: LoadedModel, student: LoadedModel, top_k: int, path: Path
) -> tuple[TextQuality, TextQuality]:
    """Return the quality of ``student`` by all of the teacher's logits, and by a pack."""
    windows = cut_windows(teacher.tokenizer, TEXT, 100, 32)
    builder = PackBuilder(_identity(teacher.engine.vocab_size, top_k), windows)
    with closing(record_teacher(teacher, windows, builder=builder)) as full:
        exact = summarise(score_text(student.engine, windows, full))
    write_pack(path, builder.finish())
    packed = PackReference(read_pack(path))
    bound = summarise(score_text(student.engine, packed.windows, packed), packed.kl_kind)
    return exact, bound


@pytest.mark.parametrize("top_k", [1, 16, 200])
def test_a_pack_tells_all_but_the_kl_exactly_and_the_kl_from_below(
    top_k: int, teacher: LoadedModel, tiny_folder: Path, tmp_path: Path
) -> None:
    student = open_model(tiny_folder, context_tokens=64, n_threads=1)
    exact, packed = _both(teacher, student, top_k, tmp_path / "pack")
    assert exact.to_teacher and packed.to_teacher
    assert packed.perplexity == exact.perplexity
    assert packed.to_teacher.top1_agreement == exact.to_teacher.top1_agreement
    for name in ("teacher_perplexity", "delta_p_mean", "delta_p_rms"):
        expected = getattr(exact.to_teacher, name).value
        assert getattr(packed.to_teacher, name).value == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert packed.to_teacher.kl_kind == "lower bound"
    assert 0 < packed.to_teacher.kl_nats.value < exact.to_teacher.kl_nats.value


def test_the_bound_grows_with_what_is_kept_and_ends_at_the_kl(
    teacher: LoadedModel, tiny_folder: Path, tmp_path: Path
) -> None:
    student = open_model(tiny_folder, context_tokens=64, n_threads=1)
    bounds, exact_kl = [], 0.0
    for top_k in (1, 8, 64, 400, 1000):  # the last is all 405 of them
        exact, packed = _both(teacher, student, top_k, tmp_path / "pack")
        assert packed.to_teacher and exact.to_teacher
        bounds.append(packed.to_teacher.kl_nats.value)
        exact_kl = exact.to_teacher.kl_nats.value
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(exact_kl, abs=1e-6)
    assert bounds[2] > bounds[0] + 0.01


def test_a_model_by_its_own_pack_is_perfect(teacher: LoadedModel, tmp_path: Path) -> None:
    _, packed = _both(teacher, teacher, 8, tmp_path / "pack")
    assert packed.to_teacher
    assert abs(packed.to_teacher.kl_nats.value) < 1e-6
    assert packed.to_teacher.top1_agreement.value == 1


@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 40), scale=st.floats(0.01, 20))
def test_lumping_never_adds_to_the_kl(seed: int, top_k: int, scale: float) -> None:
    draw = np.random.default_rng(seed)
    p_SV = log_softmax(draw.normal(0, scale, (3, 40)))
    q_SV = log_softmax(draw.normal(0, scale, (3, 40)))
    top_SK = np.argsort(-p_SV, 1)[:, :top_k]
    rest_SV = p_SV.copy()
    np.put_along_axis(rest_SV, top_SK, -np.inf, 1)
    with np.errstate(divide="ignore"):
        rest_S = np.log(np.exp(rest_SV).sum(1))
    bound_S = lumped_kl(top_SK, np.take_along_axis(p_SV, top_SK, 1), rest_S, q_SV)
    exact_S = kl_per_token(p_SV, q_SV)
    assert (bound_S <= exact_S + 1e-9).all() and (bound_S >= -1e-9).all()
    if top_k >= 39:  # one token left over is a cell of its own
        np.testing.assert_allclose(bound_S, exact_S, atol=1e-9)


@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.integers(2, 60),
    top_k=st.integers(1, 70),
    lengths=st.lists(st.integers(2, 6), min_size=1, max_size=4),
)
def test_a_pack_comes_back_as_it_was_written(
    seed: int,
    vocab_size: int,
    top_k: int,
    lengths: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    pack = _random_pack(seed, vocab_size, top_k, lengths)
    path = tmp_path_factory.getbasetemp() / "round-trip.pack"
    write_pack(path, pack)
    found = read_pack(path)
    assert found.rows == pack.rows
    kept = replace(pack.identity, top_k=min(top_k, vocab_size), created=found.identity.created)
    assert found.identity == kept
    for name in ("top_ids_SK", "top_log_p_SK", "rest_log_p_S", "next_log_p_S"):
        np.testing.assert_array_equal(getattr(found, name), getattr(pack, name))


@given(data=st.data())
def test_a_changed_byte_is_refused(
    data: st.DataObject, written: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(written.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    _refuse(bytes(raw), tmp_path_factory)


@given(data=st.data())
def test_a_pack_cut_short_or_too_long_is_refused(
    data: st.DataObject, written: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = written.read_bytes()
    end = data.draw(st.integers(0, len(raw) - 1))
    _refuse(raw[:end], tmp_path_factory)
    _refuse(raw + data.draw(st.binary(min_size=1, max_size=9)), tmp_path_factory)


def _signed(header: object, arrays: bytes) -> bytes:
    """Return a pack whose hash is right, whatever it says."""
    text = json.dumps(header).encode()
    body = len(text).to_bytes(4, "little") + text + arrays
    return MAGIC + hashlib.sha256(body).digest() + body


def _refuse(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "broken.pack"
    path.write_bytes(raw)
    with pytest.raises(DataError, match="broken.pack"):
        read_pack(path)


_VALUES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=3)


@given(
    changes=st.dictionaries(
        st.sampled_from(["schema_version", "rows", "tokens", "top_k", "vocab_size", "teacher"]),
        _VALUES | st.lists(_VALUES, max_size=2),
        min_size=1,
    ),
    arrays=st.binary(max_size=400),
)
def test_a_forged_header_is_refused_or_read_but_breaks_nothing(
    changes: dict[str, object], arrays: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header = {"schema_version": 1, **asdict(_identity(50, 4)), "rows": 2, "tokens": 8} | changes
    path = tmp_path_factory.getbasetemp() / "forged.pack"
    path.write_bytes(_signed(header, arrays))
    with pytest.raises(DataError, match="forged.pack"):
        read_pack(path)


@given(arrays=st.binary(min_size=4 * (2 + 8 + 6 * 10), max_size=4 * (2 + 8 + 6 * 10)))
def test_forged_numbers_are_refused(
    arrays: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header = {"schema_version": 1, **asdict(_identity(50, 4)), "rows": 2, "tokens": 8}
    _refuse(_signed(header, arrays), tmp_path_factory)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("top_ids_SK", lambda array: array * 0, "twice"),
        ("top_ids_SK", lambda array: array + 50, "beyond its vocabulary"),
        ("top_log_p_SK", lambda array: array * np.nan, "no probabilities"),
        ("top_log_p_SK", lambda array: array[:, ::-1], "no probabilities"),
        ("rest_log_p_S", lambda array: array * 0, "no probabilities"),
        ("next_log_p_S", lambda array: -array, "no probabilities"),
    ],
)
def test_numbers_that_are_no_distribution_are_refused(
    name: str, change: object, reason: str, tmp_path: Path
) -> None:
    pack = _random_pack(0, 50, 4, [5, 3])
    assert callable(change)
    write_pack(tmp_path / "pack", replace(pack, **{name: change(getattr(pack, name))}))
    with pytest.raises(DataError, match=reason):
        read_pack(tmp_path / "pack")


def test_another_version_is_refused_by_name(written: Path, tmp_path: Path) -> None:
    raw = written.read_bytes()[len(MAGIC) + 32 :]
    length = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + length]) | {"schema_version": 2}
    (tmp_path / "new.pack").write_bytes(_signed(header, raw[4 + length :]))
    with pytest.raises(DataError, match="schema version 2, this edgekd reads 1"):
        read_pack(tmp_path / "new.pack")


def test_a_missing_pack_and_one_that_keeps_too_much_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no reference pack at"):
        read_pack(tmp_path / "none")
    with pytest.raises(RecipeError, match="--top-k 0"):
        PackBuilder(_identity(50, 0), [])


def test_a_model_with_fewer_ids_than_the_pack_keeps_is_refused(tiny_folder: Path) -> None:
    pack = _random_pack(0, 50, 4, [5, 3])
    beyond = replace(pack, top_ids_SK=pack.top_ids_SK + np.uint32(9000))
    student = open_model(tiny_folder, context_tokens=64, n_threads=1)
    with pytest.raises(ModelError, match="other tokens"):
        score_text(student.engine, beyond.rows, PackReference(beyond))
