"""``edgekd distill --plan``: what a run needs, before step one.

Memory is counted, not guessed: weights, gradients and optimizer from the shapes, activations by
running one decoder layer on tensors without storage and adding up what autograd would keep. Speed
comes from under a second of matrix products on this machine, or from a data sheet, times the share
of that rate that whole steps were measured to reach. Several GPUs share the student (FSDP2).
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from edgekd.distill.cache import CaptureSettings
from edgekd.distill.cache_format import largest_record_bytes
from edgekd.distill.load_models import (
    backbone_dtype,
    for_machine,
    what_to_compile,
)
from edgekd.distill.losses import chunk_tokens_of
from edgekd.distill.machines import Machine, rss_bytes
from edgekd.distill.recipe import Recipe
from edgekd.distill.sharding import gathered_bytes, traffic_of_step
from edgekd.distill.writing_cost import writing_cost
from edgekd.errors import RecipeError
from edgekd.export.checkpoint import Checkpoint
from edgekd.units import format_bytes

_FLOAT32, _BFLOAT16 = 4, 2
# Of what autograd keeps in eager mode, compiled layers keep this share (activation budget 0.9);
# of the products' rate, whole steps reach these: benchmarks/results/plan.json.
_COMPILED_ACTIVATIONS = 0.45
_EFFICIENCY = {"none": 0.50, "loss": 0.52, "full": 0.55}
_PLAIN_LOSS_BUFFERS = 8  # temporaries of one chunk's logits without a compiler
_ALLOCATOR_SLACK = 1.05  # pages that are free and not given back
# Repeated text teaches nearly as much as new one up to here (Muennighoff et al., 2305.16264).
_MANY_EPOCHS = 4
_CUDA_BYTES = 600e6  # of a context and its libraries
_COMPILER_BYTES = 150e6  # torch.compile itself, in this process


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parts of the peak memory, and the work per token."""

    student_parameters: int
    trained_parameters: int
    teacher_parameters: int
    process_bytes: float
    """Of the interpreter and its libraries, now."""
    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    teacher_bytes: float
    activations_bytes: float
    loss_bytes: float
    gathered_bytes: float
    """Of what several GPUs share, what each of them holds whole for a moment."""
    peak_bytes: float
    """Of one process; several GPUs share weights, optimizer and gradients."""
    available_bytes: float
    n_gpus: int
    flop_per_token: float
    teacher_share: float
    """Of these operations, what the teacher takes and a cache of it saves."""
    compute_s_per_step: float
    writing_s_per_step: float
    """What the student takes to write its own text, on average."""
    network_s_per_step: float
    """At the rates of the data sheets; counted as if nothing were computed meanwhile."""
    network_gpu_bytes_per_step: float
    """What each GPU receives."""
    network_node_bytes_per_step: float
    """What each node receives from the others."""
    tokens_per_s: float
    """Of all GPUs together, as are tokens and time of the run."""
    run_tokens: int
    run_s: float
    epochs: float | None
    """How often the run reads the text; None where the text was not read."""
    cache_bytes_per_token: int | None
    """What recording the teacher would take at most; None where a cache is used already."""
    capture_tokens_per_s: float | None
    """At what rate the teacher alone would be recorded; None where none is run."""
    advice: list[str]

    @property
    def fits(self) -> bool:
        """Whether the peak is below what this machine has."""
        return self.peak_bytes <= self.available_bytes

    @property
    def step_s(self) -> float:
        """Seconds that an optimizer step takes, on average."""
        return self.compute_s_per_step + self.writing_s_per_step + self.network_s_per_step

    @property
    def gpu_hours(self) -> float:
        """Hours of one GPU that the run takes, capture not counted."""
        return self.n_gpus * self.run_s / 3600

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {**asdict(self), "fits": self.fits, "gpu_hours": self.gpu_hours}


def plan_run(
    recipe: Recipe,
    student: Checkpoint,
    teacher: Checkpoint | None,
    vocab_size: int,
    machine: Machine,
    *,
    is_cached: bool = False,
    n_rows: int | None = None,
    samples_per_row: float = 1.0,
) -> Plan:
    """Return what ``recipe`` needs on ``machine``; ``teacher`` is None where none is run.

    ``n_rows`` is what the text fills, where it was read, and ``samples_per_row`` how many texts
    stand in each.
    """
    recipe = for_machine(recipe, machine.has_bf16)
    n_student, n_teacher = student.n_parameters, teacher.n_parameters if teacher else 0
    n_trained = _n_trained(recipe, student)
    n_tokens = recipe.rows_per_step * recipe.row_tokens
    shards = machine.n_devices
    head = vocab_size * int(student.config["hidden_size"])
    frozen_byte = 0.5 if recipe.student_bits == "4" else _FLOAT32
    weights = (n_student * frozen_byte if n_trained < n_student else n_student * _FLOAT32) + (
        n_trained * _FLOAT32 if n_trained < n_student else 0
    )
    casts = (n_student - head) * _BFLOAT16 if _is_bf16(recipe) else 0
    gradients, optimizer = n_trained * _FLOAT32, n_trained * 2 * _FLOAT32
    teacher_bytes = (
        n_teacher * {"full": _teacher_byte(recipe), "8": 1.0, "4": 0.5}[recipe.teacher_bits]
    )
    if recipe.teacher_memory_gb is not None:
        teacher_bytes = min(teacher_bytes, recipe.teacher_memory_gb * 1e9)
    activations = _activations(recipe, student) + casts
    loss = _loss(recipe, vocab_size, head, n_tokens, n_trained < n_student, machine.is_gpu)
    is_compiled = what_to_compile(recipe) == "full"
    on_host = rss_bytes() + (_COMPILER_BYTES if is_compiled else 0)
    process = _CUDA_BYTES if machine.is_gpu else on_host
    gathered = 0.0
    if shards > 1:
        is_whole = n_trained == n_student
        gathered = gathered_bytes(student, weights / n_student, with_gradients=is_whole)
    at_rest = (weights + optimizer) / shards + teacher_bytes + gathered
    held = gradients if recipe.accumulation_steps > 1 else 0  # whole, until the last pass
    in_use = at_rest + max(held + activations + loss, gradients / shards + casts)
    peak = process + _ALLOCATOR_SLACK * in_use
    n_step_tokens = n_tokens * recipe.accumulation_steps * shards
    compute_s = n_step_tokens / shards * _s_per_token(recipe, machine, student, teacher, vocab_size)
    traffic = traffic_of_step(machine, weights, gradients, recipe.accumulation_steps)
    writing = writing_cost(recipe, student, machine, samples_per_row)
    writing_s = recipe.accumulation_steps * writing.seconds
    n_step_tokens = round(n_step_tokens * writing.learned_tokens / n_tokens)
    compute_s *= writing.work
    step_s = compute_s + writing_s + traffic.seconds
    flop_per_token = _flop_per_token(recipe, n_student, n_trained, n_teacher)
    return Plan(
        student_parameters=n_student,
        trained_parameters=n_trained,
        teacher_parameters=n_teacher,
        process_bytes=process,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        teacher_bytes=teacher_bytes,
        activations_bytes=activations,
        loss_bytes=loss,
        gathered_bytes=gathered,
        peak_bytes=peak,
        available_bytes=machine.memory_bytes,
        n_gpus=shards,
        flop_per_token=flop_per_token,
        teacher_share=2 * n_teacher / flop_per_token,
        compute_s_per_step=compute_s,
        writing_s_per_step=writing_s,
        network_s_per_step=traffic.seconds,
        network_gpu_bytes_per_step=traffic.gpu_bytes,
        network_node_bytes_per_step=traffic.node_bytes,
        tokens_per_s=n_step_tokens / step_s,
        run_tokens=recipe.steps * n_step_tokens,
        run_s=recipe.steps * step_s,
        epochs=None if n_rows is None else epochs_of(recipe, n_rows, shards),
        cache_bytes_per_token=None if is_cached else _cache_bytes(vocab_size),
        capture_tokens_per_s=_capture_tokens_per_s(recipe, machine, teacher),
        advice=_advice(recipe, peak, machine, teacher_bytes, activations, optimizer),
    )


def epochs_of(recipe: Recipe, n_rows: int, n_processes: int) -> float:
    """Return how often a run of ``n_processes`` reads text that fills ``n_rows`` rows."""
    rows_per_step = recipe.rows_per_step * recipe.accumulation_steps * n_processes
    return recipe.steps * rows_per_step / max(1, n_rows)


def epochs_note(epochs: float) -> str:
    """Return how often the text is read, in words, with a warning where that is too often."""
    if epochs <= _MANY_EPOCHS:
        return f"{epochs:.1f} epochs"
    return (
        f"{epochs:.1f} epochs: a text that is read more than {_MANY_EPOCHS} times is learned by "
        "heart; give more of it or fewer steps, and watch --eval-data"
    )


def _cache_bytes(vocab_size: int) -> int:
    kept = CaptureSettings()
    return largest_record_bytes(vocab_size, kept.top_k, kept.tail_samples, len(kept.temperatures))


def check_fits(plan: Plan, force: bool) -> None:
    """Refuse to start what cannot fit.

    Raises:
        RecipeError: the peak is larger than what is free; it says what would help.
    """
    if not (plan.fits or force):
        raise RecipeError(
            f"this run needs about {format_bytes(int(plan.peak_bytes))}, "
            f"{format_bytes(int(plan.available_bytes))} are available; "
            f"{'; '.join(plan.advice)}; or give --force"
        )


def _n_trained(recipe: Recipe, student: Checkpoint) -> int:
    if recipe.adapter == "none":
        return student.n_parameters
    matrices = (
        student.shape(name)
        for name in student.shard_of
        if name.startswith("model.layers.") and len(student.shape(name)) == 2
    )
    return sum(recipe.lora_rank * sum(shape) for shape in matrices)


def _is_bf16(recipe: Recipe) -> bool:
    return backbone_dtype(recipe.precision) == torch.bfloat16


def _teacher_byte(recipe: Recipe) -> float:
    return _BFLOAT16 if _is_bf16(recipe) else _FLOAT32


def _activations(recipe: Recipe, student: Checkpoint) -> float:
    """Return what autograd keeps of all layers, for one forward pass."""
    per_layer = saved_bytes_per_layer(student, recipe)
    hidden = recipe.rows_per_step * recipe.row_tokens * int(student.config["hidden_size"])
    if recipe.gradient_checkpointing:  # each layer's input, and one layer at a time
        return student.n_layers * hidden * _FLOAT32 + per_layer
    if what_to_compile(recipe) == "full":
        per_layer *= _COMPILED_ACTIVATIONS
    return student.n_layers * per_layer


def saved_bytes_per_layer(student: Checkpoint, recipe: Recipe) -> float:
    """Return the bytes that autograd keeps of one decoder layer, counted without computing."""
    one, two = (_saved_bytes(student, recipe, n_layers) for n_layers in (1, 2))
    return two - one


def _saved_bytes(student: Checkpoint, recipe: Recipe, n_layers: int) -> float:
    config = AutoConfig.from_pretrained(student.folder)
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        shape = recipe.rows_per_step, recipe.row_tokens
        ids = torch.zeros(shape, dtype=torch.int64)
        mask = torch.ones(shape[0], 1, shape[1], shape[1], dtype=torch.bool)
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=_is_bf16(recipe)),
        ):
            held = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
        del held
    return float(sum(kept.values()))


def _loss(
    recipe: Recipe,
    vocab_size: int,
    head: int,
    n_tokens: int,
    has_frozen_head: bool,
    is_gpu: bool,
) -> float:
    is_compiled = what_to_compile(recipe) != "none"
    chunk = chunk_tokens_of(
        recipe.chunk_tokens,
        compiled=is_compiled,
        hidden_size=head // vocab_size,
        n_tokens=n_tokens,
        is_gpu=is_gpu,
    )
    logits = min(n_tokens, chunk) * vocab_size * _FLOAT32
    is_low = recipe.head_precision != "fp32"
    buffers = 2.5 if is_compiled else _PLAIN_LOSS_BUFFERS
    casts = head * (_BFLOAT16 if is_low else _FLOAT32 if _is_bf16(recipe) else 0)
    gradient = 0 if has_frozen_head else head * _FLOAT32
    return buffers * logits + casts + gradient


def _flop_per_token(recipe: Recipe, n_student: int, n_trained: int, n_teacher: int) -> float:
    """Return 2 FLOP a weight for each of forward, gradient of inputs, gradient of weights."""
    backward = 4 if n_trained == n_student else 2
    again = 2 if recipe.gradient_checkpointing else 0
    return (2 + backward + again) * n_student + 2 * n_teacher


def _s_per_token(
    recipe: Recipe,
    machine: Machine,
    student: Checkpoint,
    teacher: Checkpoint | None,
    vocab_size: int,
) -> float:
    """Return the seconds that one device computes for a token."""
    n_student, n_trained = student.n_parameters, _n_trained(recipe, student)
    head = vocab_size * int(student.config["hidden_size"])
    teacher_head = vocab_size * int(teacher.config["hidden_size"]) if teacher else 0
    n_teacher = teacher.n_parameters if teacher else 0
    body = _flop_per_token(recipe, n_student - head, n_trained - head, n_teacher - teacher_head)
    heads = (4 if n_trained < n_student else 6) * head + 2 * teacher_head
    body_rate = machine.bf16_flops if _is_bf16(recipe) else machine.fp32_flops
    head_rate = machine.fp32_flops if recipe.head_precision == "fp32" else machine.bf16_flops
    share = _EFFICIENCY[what_to_compile(recipe)]
    return (body / body_rate + heads / head_rate) / share


def _capture_tokens_per_s(
    recipe: Recipe, machine: Machine, teacher: Checkpoint | None
) -> float | None:
    """Return how fast the teacher's forward passes would be, spread over the whole machine."""
    if teacher is None:
        return None
    rate = machine.bf16_flops if _is_bf16(recipe) else machine.fp32_flops
    return machine.n_devices * _EFFICIENCY["none"] * rate / (2 * teacher.n_parameters)


def _advice(
    recipe: Recipe,
    peak: float,
    machine: Machine,
    teacher: float,
    activations: float,
    optimizer: float,
) -> list[str]:
    """Return the switches that would help, the largest saving first."""
    savings: list[tuple[float, str]] = [
        (teacher, "record the teacher with edgekd cache and give --cache"),
        (teacher / 2, "--teacher-bits 8") if recipe.teacher_bits == "full" else (0, ""),
        (activations * 0.8, "--gradient-checkpointing")
        if not recipe.gradient_checkpointing
        else (0, ""),
        (activations / 2, "fewer --rows-per-step, more --accumulation-steps")
        if recipe.rows_per_step > 1
        else (activations / 2, "shorter --row-tokens"),
        (optimizer, "--adapter lora") if recipe.adapter == "none" else (0, ""),
    ]
    missing = peak - machine.memory_bytes
    if missing <= 0:
        return []
    useful = sorted((saving for saving in savings if saving[0] > 0), reverse=True)
    return [f"{name} saves about {format_bytes(int(size))}" for size, name in useful]
