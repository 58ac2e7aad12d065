"""The chunked loss against autograd on the dense one in float64."""

from collections.abc import Callable
from typing import NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.distill.divergences import DIVERGENCES
from edgekd.distill.heads import HeadShape, head_shape
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.losses import OnlineTarget, distillation_loss, held_out_figures
from edgekd.distill.recipe import DivergenceName
from edgekd.errors import RecipeError

N, HS, HT, V = 23, 8, 12, 57
NAMES: tuple[DivergenceName, ...] = get_args(DivergenceName)
OPTIONS = [
    *(LossOptions(divergence=name, mix=0.3) for name in NAMES),
    *(LossOptions(divergence=name, temperature=2.0, chunk_tokens=5) for name in NAMES),
    LossOptions(temperature=0.7, t_squared=False),
    LossOptions(hard_label_weight=0.3),
    LossOptions(temperature=4.0, hard_label_weight=0.5, chunk_tokens=5),
    LossOptions(hard_label_weight=1.0, chunk_tokens=7),
    LossOptions(student_shape=HeadShape(0.5), teacher_shape=HeadShape(2.0, 3.0)),
    LossOptions(student_shape=HeadShape(1.5, 2.0), temperature=3.0, hard_label_weight=0.4),
    LossOptions(divergence="jsd", student_shape=HeadShape(1.0, 4.0), chunk_tokens=4),
]


class Inputs(NamedTuple):
    hidden: torch.Tensor
    head: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def loss(self, options: LossOptions) -> torch.Tensor:
        target = OnlineTarget(self.teacher_hidden, self.teacher_head)
        found = distillation_loss(
            self.hidden, self.head, target, self.labels, self.weights, options
        )
        return found.loss


def _inputs(dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, HS), (V, HS), (N, HT), (V, HT)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    labels_N = torch.randint(0, V, (N,), generator=generator)
    weights_N = torch.rand(N, generator=generator, dtype=torch.float64)
    weights_N[3] = 0
    hidden, head, teacher_hidden, teacher_head = (tensor.to(dtype) for tensor in tensors)
    found = Inputs(hidden, head, teacher_hidden, teacher_head, labels_N, weights_N.to(dtype))
    found.hidden.requires_grad_()
    found.head.requires_grad_()
    return found


def _kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * (one.log() - other.log())).sum(-1)


# From the papers' formulas, in probabilities: nothing shared with the code under test.
PLAIN: dict[DivergenceName, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "forward_kl": lambda p, q, mix: _kl(p, q),
    "reverse_kl": lambda p, q, mix: _kl(q, p),
    "jsd": lambda p, q, mix: (
        mix * _kl(p, mix * p + (1 - mix) * q) + (1 - mix) * _kl(q, mix * p + (1 - mix) * q)
    ),
    "total_variation": lambda p, q, mix: (p - q).abs().sum(-1) / 2,
    "skew_kl": lambda p, q, mix: _kl(p, mix * p + (1 - mix) * q),
    "skew_reverse_kl": lambda p, q, mix: _kl(q, mix * p + (1 - mix) * q),
}


def _shape(logits: torch.Tensor, shape: HeadShape) -> torch.Tensor:
    scaled = logits * shape.scale
    return scaled if shape.softcap is None else shape.softcap * (scaled / shape.softcap).tanh()


def dense_loss(inputs: Inputs, options: LossOptions) -> torch.Tensor:
    """Return the same loss from the formula, with [N, V] tensors and autograd."""
    student = _shape(inputs.hidden @ inputs.head.T, options.student_shape)
    teacher = _shape(inputs.teacher_hidden @ inputs.teacher_head.T, options.teacher_shape)
    t = options.temperature
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    soft = PLAIN[options.divergence](p, q, options.mix) * (t * t if options.t_squared else 1)
    ce = F.cross_entropy(student, inputs.labels, reduction="none")
    a = options.hard_label_weight
    return (inputs.weights * ((1 - a) * soft + a * ce)).sum()


def _check(options: LossOptions, dtype: torch.dtype, tolerance: float = 1e-5) -> None:
    exact, tested = _inputs(torch.float64), _inputs(dtype)
    expected = dense_loss(exact, options)
    expected.backward()  # type: ignore[no-untyped-call]
    found = tested.loss(options)
    (found * 1.0).backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    for one, other in ((tested.hidden, exact.hidden), (tested.head, exact.head)):
        assert one.grad is not None and other.grad is not None
        error = (one.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS)
def test_value_and_gradients_equal_fp64_autograd(options: LossOptions, dtype: torch.dtype) -> None:
    _check(options, dtype)


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_the_compiled_body_is_the_plain_one(name: DivergenceName) -> None:
    options = LossOptions(divergence=name, hard_label_weight=0.3, chunk_tokens=10, compiled=True)
    _check(options, torch.float32)


def test_bf16_heads_are_near_where_the_divergence_is_large() -> None:
    _check(LossOptions(head_precision="bf16"), torch.float32, tolerance=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_is_never_negative_and_zero_for_equals(name: DivergenceName) -> None:
    log_p = torch.randn(5, V, dtype=torch.float64).log_softmax(-1)
    log_q = torch.randn(5, V, dtype=torch.float64).log_softmax(-1)
    assert (DIVERGENCES[name](log_q, log_p, 0.3)[0] > 0).all()
    value, grad = DIVERGENCES[name](log_p, log_p, 0.3)
    assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12


@given(chunk=st.integers(1, 30))
@settings(deadline=None, max_examples=15)
def test_the_chunk_size_does_not_matter(chunk: int) -> None:
    inputs = _inputs(torch.float64)
    whole = inputs.loss(LossOptions(chunk_tokens=N))
    split = inputs.loss(LossOptions(chunk_tokens=chunk))
    assert split.item() == pytest.approx(whole.item(), rel=1e-12)


def test_a_batch_without_any_weight_gives_a_finite_zero() -> None:
    inputs = _inputs(torch.float32)
    inputs.weights.zero_()
    loss = inputs.loss(LossOptions(hard_label_weight=0.5))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert inputs.hidden.grad is not None
    assert not inputs.hidden.grad.any()


def test_a_batch_without_any_position_gives_a_zero_with_a_gradient_path() -> None:
    inputs = _inputs(torch.float32)
    empty = Inputs(
        inputs.hidden[:0],
        inputs.head,
        inputs.teacher_hidden[:0],
        inputs.teacher_head,
        inputs.labels[:0],
        inputs.weights[:0],
    )
    loss = empty.loss(LossOptions())
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and inputs.head.grad is not None


def test_a_frozen_head_gets_no_gradient() -> None:
    inputs = _inputs(torch.float32)
    inputs.head.requires_grad_(False)
    inputs.loss(LossOptions()).backward()  # type: ignore[no-untyped-call]
    assert inputs.hidden.grad is not None
    assert inputs.head.grad is None


def test_held_out_figures_are_the_dense_ones_whatever_is_trained_on() -> None:
    inputs = _inputs(torch.float64)
    target = OnlineTarget(inputs.teacher_hidden, inputs.teacher_head)
    options = LossOptions(divergence="reverse_kl", temperature=3.0, chunk_tokens=5)
    kl, ce, same, n = held_out_figures(inputs.hidden, inputs.head, target, inputs.labels, options)
    student = inputs.hidden @ inputs.head.T
    teacher = inputs.teacher_hidden @ inputs.teacher_head.T
    assert kl.item() == pytest.approx(_kl(teacher.softmax(-1), student.softmax(-1)).sum().item())
    assert ce.item() == pytest.approx(F.cross_entropy(student, inputs.labels).item() * N)
    assert same.item() == (student.argmax(-1) == teacher.argmax(-1)).sum() and n.item() == N


def test_without_a_teacher_only_hard_labels_can_be_learned() -> None:
    inputs = _inputs(torch.float32)
    with pytest.raises(RecipeError, match="without a teacher"):
        distillation_loss(
            inputs.hidden, inputs.head, None, inputs.labels, inputs.weights, LossOptions()
        )


def test_all_faults_of_the_options_are_named_together() -> None:
    with pytest.raises(RecipeError, match=r"temperature 0 .*; hard_label_weight 2"):
        LossOptions(temperature=0, hard_label_weight=2)
    with pytest.raises(RecipeError, match="mix 1 must lie between 0 and 1"):
        LossOptions(divergence="jsd", mix=1)


def test_every_family_s_way_to_shape_logits_is_known() -> None:
    from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

    assert head_shape(LlamaConfig()) == HeadShape()
    assert head_shape(Gemma2Config(final_logit_softcapping=30.0)) == HeadShape(1.0, 30.0)
    assert head_shape(CohereConfig(logit_scale=0.0625)) == HeadShape(0.0625)
    assert head_shape(GraniteConfig(logits_scaling=8.0)) == HeadShape(0.125)


@pytest.mark.parametrize("name", NAMES)
def test_impossible_tokens_make_no_nan(name: DivergenceName) -> None:
    logits = torch.zeros(2, V)
    logits[0, 0], logits[1, 1] = 2e4, -3e4  # probabilities that underflow to 0
    log_p, log_q = logits.log_softmax(-1), logits.flip(0).log_softmax(-1)
    value, grad = DIVERGENCES[name](log_q, log_p, 0.3)
    assert value.isfinite().all() and grad.isfinite().all()
