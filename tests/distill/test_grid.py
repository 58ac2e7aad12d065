"""Training on the grid: learned scales and int8 activations, and what the export makes of them."""

import ctypes
import math
import platform
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from edgekd.distill.data import read_documents
from edgekd.distill.distill import distill
from edgekd.distill.grid import GridCallback
from edgekd.distill.int8_activations import quantize_activations, round_activations, round_inputs
from edgekd.distill.learned_scales import LearnedScales, scale_gradient
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.model import DistillModel, backbone_inputs
from edgekd.distill.packing import cut, pack
from edgekd.distill.recipe import Job, Recipe
from edgekd.distill.trainer import collate
from edgekd.errors import ExportError, ModelError, RecipeError
from edgekd.export.blocks import Blocks, dequantize, fake_quantize, pack_gguf, quantize
from edgekd.export.checkpoint import open_checkpoint
from edgekd.export.export_model import export_model
from edgekd.export.export_options import CalibrationOptions
from edgekd.export.plan import make_plan
from edgekd.export.read_back import read_gguf_blocks, read_onnx_blocks
from edgekd.export.rounded_model import rounded_model
from edgekd.export.trained_rows import FILE, with_trained_rows
from edgekd.export.verify import verify_as_recorded
from edgekd.manifest import manifest_path, read_manifest
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import load_causal_lm
from tests.conftest import TEXTS, save_tiny_model

_NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n\n".join(TEXTS) * 4, "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("students") / "student", seed=1, n_layers=2)


def _job(teacher: Path, student: Path, text: str, **changes: Any) -> Job:
    settings: dict[str, Any] = {
        "row_tokens": 32,
        "steps": 6,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "grid": "q4_0",
        "compile": "none",
    }
    recipe = Recipe(**(settings | changes))
    return Job(teacher=str(teacher), student=str(student), data=[text], recipe=recipe)


@pytest.fixture(scope="module")
def learned(
    tiny_folder: Path, student: Path, text: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A student that was trained with scales of its own, its head on Q4_0 too."""
    out = tmp_path_factory.mktemp("learned") / "student"
    distill(_job(tiny_folder, student, text, grid_scales="learned", grid_head="q4_0"), out)
    return out


class CallsOf(TrainerCallback):  # type: ignore[misc]
    """Counts the calls of a function while training runs, and changes none."""

    def __init__(self, function: Any) -> None:
        self._code, self.n_calls = function.__code__, 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        sys.setprofile(self._count)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self.n_calls += event == "call" and frame.f_code is self._code


def test_weights_are_rounded_once_per_step_however_many_passes_it_has(
    tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    n_grids = len(make_plan(open_checkpoint(student), "q4_0").grids())
    for n_passes in (1, 3):
        calls = CallsOf(fake_quantize)
        job = _job(tiny_folder, student, text, steps=2, accumulation_steps=n_passes, save_steps=2)
        distill(job, tmp_path / f"of-{n_passes}", callbacks=[calls])
        assert calls.n_calls == 2 * n_grids


def test_a_grid_step_uses_rounded_weights_and_moves_the_masters(student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    parameter = dict(model.named_parameters())[name]
    teacher_source = parameter.detach().clone()
    callback = GridCallback(model, {name: "q4_0"})
    callback.on_step_begin()
    assert parameter.equal(fake_quantize(teacher_source, "q4_0"))
    assert not parameter.equal(teacher_source)
    callback.on_pre_optimizer_step()
    assert parameter.equal(teacher_source)


def _rounded_in_fp64(
    weight_NK: torch.Tensor, scales_NB: torch.Tensor, gradient_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return autograd's gradients of ``sum(gradient * rounded)``: by scale, and by weight."""
    weight = weight_NK.double().requires_grad_()
    scales = scales_NB.double().requires_grad_()
    scaled = (weight.reshape(len(weight), -1, 32) / scales.unsqueeze(-1)).clamp(-8, 7)
    codes = scaled + (scaled.round() - scaled).detach()
    rounded = (codes * scales.unsqueeze(-1)).reshape(weight.shape)
    (rounded * gradient_NK.double()).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and scales.grad is not None
    return scales.grad, weight.grad


@pytest.mark.parametrize("factor", [0.4, 1.0, 1.7])
def test_gradients_equal_autograd_in_fp64(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_NK, gradient_NK = (torch.randn(8, 96, generator=generator) for _ in range(2))
    scales_NB = (quantize(weight_NK, "q4_0").scales_NB.float() * factor).half()
    by_scale_NB, inside_NK = scale_gradient(weight_NK, gradient_NK, scales_NB)
    expected_by_scale, expected_by_weight = _rounded_in_fp64(weight_NK, scales_NB, gradient_NK)
    torch.testing.assert_close(by_scale_NB.double(), expected_by_scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((gradient_NK * inside_NK).double(), expected_by_weight)


def test_an_offset_moves_its_scale_by_the_share_of_an_average_weight() -> None:
    weight = nn.Parameter(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    weight.grad = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    scales = LearnedScales([("w", weight)])
    plain_NB = quantize(weight, "q4_0").scales_NB
    assert scales.scales("w").equal(plain_NB)
    size = float(weight.detach().square().mean().sqrt())
    by_scale_NB, inside_NK = scale_gradient(weight, weight.grad.clone(), plain_NB)
    before = weight.grad.clone()
    scales.take_gradient("w", weight)
    torch.testing.assert_close(scales.offsets[0].grad, by_scale_NB * plain_NB.float() / size)
    assert weight.grad.equal(before * inside_NK) and not inside_NK.all()
    with torch.no_grad():
        scales.offsets[0].fill_(0.25 * size)
    torch.testing.assert_close(scales.scales("w"), (1.25 * plain_NB.float()).half())
    with torch.no_grad():
        scales.offsets[0].fill_(-5 * size)
    assert (scales.scales("w").sign() == plain_NB.sign()).all()


def test_scales_follow_weights_that_have_grown() -> None:
    weight = nn.Parameter(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    scales = LearnedScales([("w", weight / 1.4)])
    optimizer = torch.optim.Adam(scales.offsets.parameters(), lr=0.01)
    distances = []
    for _ in range(60):
        difference = dequantize(scales.blocks("w", weight)) - weight.detach()
        distances.append(float(difference.square().mean()))
        weight.grad = 2 * difference
        scales.take_gradient("w", weight)
        optimizer.step()
    assert distances[-1] < 0.5 * distances[0]


def test_a_block_of_zeros_can_learn_a_weight() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :32] = 0.5
    blocks = LearnedScales([("w", weight)]).blocks("w", weight + 0.1)
    assert (dequantize(blocks)[0, 32:] > 0).all()


def test_a_learned_step_uses_the_learned_scales(student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    parameter = dict(model.named_parameters())[_NAME]
    master = parameter.detach().clone()
    scales = LearnedScales([(_NAME, parameter)])
    with torch.no_grad():
        scales.offsets[0].fill_(0.05)
    callback = GridCallback(model, {_NAME: "q4_0"}, scales)
    callback.on_step_begin()
    expected = dequantize(scales.blocks(_NAME, master))
    assert parameter.equal(expected) and not expected.equal(fake_quantize(master, "q4_0"))
    parameter.grad = torch.ones_like(parameter)
    callback.on_pre_optimizer_step()
    assert parameter.equal(master)
    assert scales.offsets[0].grad is not None and scales.offsets[0].grad.abs().max() > 0


def _same(one: Blocks, rows: NDArray[np.uint8]) -> bool:
    return bool(np.array_equal(pack_gguf(one), rows))


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_learned_scales_are_what_ships(learned: Path, container: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(learned)
    out = tmp_path / "artifact"
    export_model(str(learned), container, out, quant="q4_0", head="q4_0")
    read = read_onnx_blocks(out) if container == "onnx" else read_gguf_blocks(out, checkpoint)
    stored = np.load(learned / FILE)
    found = dict(read)
    assert found.keys() == set(stored.files) - {"weights_sha256"}
    for name, blocks in found.items():
        assert _same(blocks, stored[name])
        weight = checkpoint.tensor(name)
        # learned, not derived; and of these weights: no code but the ends can be off by one
        assert not blocks.scales_NB.equal(quantize(weight, "q4_0").scales_NB)
        error = (dequantize(blocks) - weight).abs().reshape(*blocks.codes_NBK.shape)
        inside = (blocks.codes_NBK > -8) & (blocks.codes_NBK < 7)
        half_steps = error / blocks.scales_NB.float().abs().unsqueeze(-1)
        assert half_steps[inside].max() < 0.5001
    manifest = read_manifest(manifest_path(out))
    assert manifest["recipe"]["calibration"]["method"] == "trained scales"
    assert verify_as_recorded(out, learned, manifest["recipe"])["equal_matrices"] == len(found)


def test_blocks_of_other_weights_are_refused(learned: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", FILE):
        (tmp_path / name).write_bytes((learned / name).read_bytes())
    other = save_tiny_model(tmp_path / "other", seed=5, n_layers=2)
    (tmp_path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="belongs to other weights"):
        export_model(str(tmp_path), "gguf", tmp_path / "out.gguf", quant="q4_0")
    (tmp_path / "model.safetensors").write_bytes((learned / "model.safetensors").read_bytes())
    (tmp_path / FILE).write_bytes((learned / FILE).read_bytes()[:-200])
    with pytest.raises(ModelError, match="is damaged"):
        export_model(str(tmp_path), "gguf", tmp_path / "out.gguf", quant="q4_0")
    assert not (tmp_path / "out.gguf").exists()


def test_learned_scales_are_not_rounded_on_data(learned: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="scales of its own"):
        export_model(
            str(learned),
            "gguf",
            tmp_path / "out.gguf",
            quant="q4_0",
            calibration=CalibrationOptions(text=Path(text)),
        )


def test_another_type_takes_the_weights(learned: Path, tmp_path: Path) -> None:
    export_model(str(learned), "gguf", tmp_path / "out.gguf", quant="q8_0")
    checkpoint = open_checkpoint(learned)
    found = dict(read_gguf_blocks(tmp_path / "out.gguf", checkpoint))
    expected = quantize(checkpoint.tensor(_NAME), "q8_0")
    assert found[_NAME].codes_NBK.equal(expected.codes_NBK)


class _Stop(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_an_interrupted_run_resumes_with_its_scales(
    learned: Path, tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    job = _job(tiny_folder, student, text, grid_scales="learned", grid_head="q4_0")
    out = tmp_path / "student"
    with pytest.raises(KeyboardInterrupt):
        distill(job, out, callbacks=[_Stop()])
    distill(job, out, resume=True)
    resumed, whole = np.load(out / FILE), np.load(learned / FILE)
    for name in set(whole.files) - {"weights_sha256"}:
        np.testing.assert_array_equal(resumed[name], whole[name])


@pytest.mark.parametrize("setting", [{"grid_scales": "learned"}, {"grid_activations": "int8"}])
def test_they_need_a_grid(setting: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="needs a grid"):
        Recipe(**setting)


_ACTIVATIONS = st.floats(-1e4, 1e4, width=32).filter(lambda value: abs(value) > 1e-30 or not value)
_TIES = st.sampled_from([127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -63.5, 0.0])


def _near_halves() -> NDArray[np.float32]:
    """Return rows whose codes hang on the last bit of the reciprocal."""
    generator = np.random.default_rng(0)
    values = generator.integers(-127, 127, (2000, 64)) + 0.5
    values[:, ::32] = 127
    return (values * generator.uniform(0.1, 9, (2000, 1)) / 127).astype(np.float32)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX's rule")
@given(
    values=st.one_of(
        hnp.arrays(np.float32, (3, 64), elements=_ACTIVATIONS),
        hnp.arrays(np.float32, (3, 64), elements=_TIES),
    )
)
@example(values=_near_halves())
def test_activations_equal_what_llama_cpp_multiplies_by(values: NDArray[np.float32]) -> None:
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-cpu.*"))
    function = ctypes.CDLL(str(library)).quantize_row_q8_0
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    expected = np.empty((len(values), 2 * 34), np.uint8)
    function(values.ctypes.data, expected.ctypes.data, values.size)
    packed = pack_gguf(quantize_activations(torch.from_numpy(values)))
    np.testing.assert_array_equal(packed, expected)


def test_rounded_activations_pass_gradients_and_are_exact() -> None:
    input_ = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rounded = round_activations(input_)
    expected = dequantize(quantize_activations(input_.detach().reshape(6, 64)))
    assert rounded.equal(expected.reshape(2, 3, 64)) and not rounded.equal(input_)
    slope = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    (rounded * slope).sum().backward()  # type: ignore[no-untyped-call]
    assert input_.grad is not None and input_.grad.equal(slope)


def test_matrices_and_the_head_see_rounded_inputs(student: Path, text: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    input_ = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = round_activations(input_) @ layer.weight.T
    round_inputs(model, {_NAME})
    torch.testing.assert_close(layer(input_), expected)
    other = model.model.layers[0].mlp.gate_proj
    torch.testing.assert_close(other(input_), input_ @ other.weight.T)

    options = LossOptions(hard_label_weight=1.0)
    wrapped = DistillModel(model, None, 400, options, torch.float32)
    wrapped.rounds_hidden = True
    batch = collate(pack(read_documents([text], FileTokenizer(student), None)[:1], 256))
    hidden_BTH = model.get_decoder()(**backbone_inputs(batch)).last_hidden_state
    labels_BT = batch["shift_labels"]
    seen_NH = round_activations(hidden_BTH[labels_BT != -100])
    logits_NV = seen_NH @ model.get_output_embeddings().weight[:400].T
    loss = nn.functional.cross_entropy(logits_NV, labels_BT[labels_BT != -100], reduction="sum")
    assert wrapped(**batch).loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_channels_that_make_no_blocks_are_refused() -> None:
    with pytest.raises(RecipeError, match="takes 40 channels"):
        round_inputs(nn.Sequential(nn.Linear(40, 4)), {"0.weight"})


@pytest.mark.parametrize("scales", ["derived", "learned"])
def test_held_out_text_is_measured_on_the_grid(
    scales: str, tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"grid_scales": scales, "grid_head": "q4_0", "rows_per_step": 1}
    job = replace(_job(tiny_folder, student, text, **settings), eval_data=[text])
    report = distill(job, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    plan = make_plan(checkpoint, "q4_0", "q4_0")
    if scales == "learned":
        (tmp_path / "rows").mkdir()
        plan = with_trained_rows(checkpoint, plan, tmp_path / "rows")
        assert plan.kept is not None
    documents = read_documents([text], FileTokenizer(student), None)
    perplexities = []
    for model in (rounded_model(checkpoint, plan), load_causal_lm(checkpoint.folder)):
        wrapped = DistillModel(model, None, 400, LossOptions(hard_label_weight=1.0), torch.float32)
        parts = [wrapped(**collate([row])) for row in pack(cut(documents, 32), 32)]
        n_tokens = sum(
            int((torch.tensor(row.labels) != -100).sum()) for row in pack(cut(documents, 32), 32)
        )
        perplexities.append(math.exp(sum(part.loss.item() for part in parts) / n_tokens))
    assert report["held_out"]["eval_perplexity"] == pytest.approx(perplexities[0], rel=1e-4)
    assert report["held_out"]["eval_perplexity"] != pytest.approx(perplexities[1], rel=1e-3)


def test_int8_activations_train(
    tiny_folder: Path, student: Path, text: str, tmp_path: Path
) -> None:
    job = _job(tiny_folder, student, text, grid_activations="int8", steps=20)
    report = distill(job, tmp_path / "int8")
    plain = distill(_job(tiny_folder, student, text, steps=20), tmp_path / "plain")
    assert report["last"]["loss"] == pytest.approx(plain["last"]["loss"], rel=0.05)
    assert report["last"]["loss"] != plain["last"]["loss"]
