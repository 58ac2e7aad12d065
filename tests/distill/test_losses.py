"""The chunked loss against autograd on the dense one in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.distill.losses import LossOptions, distillation_loss
from edgekd.errors import RecipeError

N, HS, HT, V = 23, 8, 12, 57
OPTIONS = [
    LossOptions(),
    LossOptions(temperature=2.0),
    LossOptions(temperature=0.7, t_squared=False),
    LossOptions(hard_label_weight=0.3),
    LossOptions(temperature=4.0, hard_label_weight=0.5, chunk_tokens=5),
    LossOptions(hard_label_weight=1.0, chunk_tokens=7),
]


def _inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, HS), (V, HS), (N, HT), (V, HT)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    labels_N = torch.randint(0, V, (N,), generator=generator)
    weights_N = torch.rand(N, generator=generator, dtype=torch.float64)
    weights_N[3] = 0
    return [*(tensor.to(dtype) for tensor in tensors), labels_N, weights_N.to(dtype)]


def dense_loss(inputs: list[torch.Tensor], options: LossOptions) -> torch.Tensor:
    """Return the same loss from the formula, with [N, V] tensors and autograd."""
    hidden, head, teacher_hidden, teacher_head, labels, weights = inputs
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    t = options.temperature
    q_log, p_log = F.log_softmax(student / t, -1), F.log_softmax(teacher / t, -1)
    kl = (p_log.exp() * (p_log - q_log)).sum(-1) * (t * t if options.t_squared else 1)
    ce = F.cross_entropy(student, labels, reduction="none")
    a = options.hard_label_weight
    return (weights * ((1 - a) * kl + a * ce)).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS)
def test_value_and_gradients_equal_fp64_autograd(options: LossOptions, dtype: torch.dtype) -> None:
    exact = _inputs(torch.float64)
    tested = _inputs(dtype)
    for tensors in (exact, tested):
        tensors[0].requires_grad_()
        tensors[1].requires_grad_()
    expected = dense_loss(exact, options)
    expected.backward()  # type: ignore[no-untyped-call]
    found = distillation_loss(*tested, options).loss  # type: ignore[call-arg, arg-type]
    (found * 1.0).backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(tested[:2], exact[:2], strict=True):
        assert one.grad is not None and other.grad is not None
        error = (one.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 1e-5


@given(chunk=st.integers(1, 30))
@settings(deadline=None, max_examples=15)
def test_the_chunk_size_does_not_matter(chunk: int) -> None:
    inputs = _inputs(torch.float64)
    whole = distillation_loss(*inputs, LossOptions(chunk_tokens=N))  # type: ignore[call-arg, arg-type]
    split = distillation_loss(*inputs, LossOptions(chunk_tokens=chunk))  # type: ignore[call-arg, arg-type]
    assert split.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    hidden, head, _, _, labels, weights = _inputs(torch.float64)
    hidden.requires_grad_()
    parts = distillation_loss(hidden, head, hidden.detach(), head, labels, weights, LossOptions())
    parts.loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert abs(parts.loss.item()) < 1e-12
    assert hidden.grad.abs().max() < 1e-12


def test_a_batch_without_any_weight_gives_a_finite_zero() -> None:
    inputs = _inputs(torch.float32)
    inputs[0].requires_grad_()
    inputs[5].zero_()
    loss = distillation_loss(*inputs, LossOptions(hard_label_weight=0.5)).loss  # type: ignore[call-arg, arg-type]
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert inputs[0].grad is not None
    assert not inputs[0].grad.any()


def test_a_frozen_head_gets_no_gradient() -> None:
    inputs = _inputs(torch.float32)
    inputs[0].requires_grad_()
    distillation_loss(*inputs, LossOptions()).loss.backward()  # type: ignore[call-arg, arg-type, no-untyped-call]
    assert inputs[0].grad is not None
    assert inputs[1].grad is None


def test_all_faults_of_the_options_are_named_together() -> None:
    with pytest.raises(RecipeError, match=r"temperature 0 .*; hard_label_weight 2"):
        LossOptions(temperature=0, hard_label_weight=2)
