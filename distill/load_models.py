"""Student and teacher in torch, as a recipe asks: whole, adapted, in few bits, offloaded."""

import atexit
import shutil
import tempfile
import warnings
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from edgekd.distill.machines import has_native_bf16
from edgekd.distill.recipe import Recipe
from edgekd.errors import MissingExtraError, ModelError
from edgekd.export.checkpoint import Checkpoint
from edgekd.runtime.torch_engine import load_causal_lm

_COMPILE_FROM_TOKENS = 20_000  # shorter runs end before compiling has paid for itself


def load_student(checkpoint: Checkpoint, recipe: Recipe) -> Any:
    """Return the student: float32 masters, or a frozen base with a trained adapter.

    Raises:
        ModelError: it cannot be loaded, or its head has a bias.
        MissingExtraError: peft or bitsandbytes is needed and not installed.
    """
    placement = _few_bits(recipe.student_bits)
    dtype = torch.float32 if recipe.student_bits == "full" else torch.bfloat16
    student = load_causal_lm(checkpoint.folder, dtype, **placement)
    _check_head(student, checkpoint)
    disable_dropout(student)
    if recipe.gradient_checkpointing:
        # transformers 5.23 renames it.
        enable = getattr(student, "activation_checkpointing_enable", None)
        (enable or student.gradient_checkpointing_enable)({"use_reentrant": False})
    if recipe.adapter == "lora":
        student = _with_lora(student, recipe)
        if recipe.gradient_checkpointing:
            student.enable_input_require_grads()
    return student


def disable_dropout(model: Any) -> None:
    """Switch dropout off: a student that forgets at random cannot follow exactly."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def load_teacher(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Any, bool]:
    """Return the frozen teacher, and whether it already lies where it runs.

    Raises:
        ModelError: it cannot be loaded, or its head has a bias.
        MissingExtraError: bitsandbytes is needed and not installed.
    """
    placement = _few_bits(recipe.teacher_bits)
    if recipe.teacher_memory_gb is not None:
        place = 0 if torch.cuda.is_available() else "cpu"
        placement |= {
            "device_map": "auto",
            "max_memory": {place: int(recipe.teacher_memory_gb * 1e9)},
            "offload_folder": _offload_folder(),
        }
    teacher = load_causal_lm(checkpoint.folder, backbone_dtype(recipe.precision), **placement)
    _check_head(teacher, checkpoint)
    return teacher, bool(placement)


def backbone_dtype(precision: str) -> torch.dtype:
    """Return bfloat16 where it is asked for, or where the processor multiplies it natively."""
    is_low = has_native_bf16() if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if is_low else torch.float32


def for_machine(recipe: Recipe, has_bf16: bool) -> Recipe:
    """Return ``recipe`` with fp32 for each auto that can mean nothing else on such a machine.

    Heads of a machine with bf16 stay auto: they begin in bf16 and end in float32.
    """
    if recipe.precision == "auto":
        recipe = replace(recipe, precision="bf16" if has_bf16 else "fp32")
    if recipe.head_precision == "auto" and not has_bf16:
        recipe = replace(recipe, head_precision="fp32")
    return recipe


def can_compile() -> bool:
    """Return whether torch.compile has what it needs: a GPU, or a C++ compiler."""
    return torch.cuda.is_available() or any(map(shutil.which, ("g++", "clang++")))


def what_to_compile(recipe: Recipe) -> str:
    """Return none, loss or full; what was asked for, else what the run's length makes worth it."""
    if recipe.compile != "auto":
        return recipe.compile
    n_rows = recipe.steps * recipe.accumulation_steps * recipe.rows_per_step
    is_long = n_rows * recipe.row_tokens >= _COMPILE_FROM_TOKENS
    return "full" if is_long and can_compile() else "none"


def merged(student: Any) -> Any:
    """Return the student as a plain model: an adapter is added to the weights it adapts."""
    return student.merge_and_unload() if hasattr(student, "merge_and_unload") else student


def _offload_folder() -> str:
    """Return a folder that is removed when the process ends: the teacher reads it until then."""
    folder = tempfile.mkdtemp(prefix="edgekd-offload-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _few_bits(bits: str) -> dict[str, Any]:
    if bits == "full":
        return {}
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "bits")
    from transformers import BitsAndBytesConfig

    if bits == "8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": config}


def _with_lora(student: Any, recipe: Recipe) -> Any:
    if find_spec("peft") is None:
        raise MissingExtraError("peft", "distill")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft 0.19 asks transformers 5.23 by the old name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(student, config)


def _check_head(model: Any, checkpoint: Checkpoint) -> None:
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(
            f"{checkpoint.folder} has a head with a bias, which distillation does not follow yet"
        )
