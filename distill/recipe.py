"""The recipe: every setting of a distillation, from a TOML file, the command line, or both.

A field here is an option of ``edgekd distill`` and a key of the TOML file by itself; nothing heavy
is imported, so the command line can read the fields for its help.
"""

import json
import tomllib
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edgekd.errors import RecipeError

DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jsd", "total_variation", "skew_kl", "skew_reverse_kl"
]

_SOURCES: dict[str, type] = {
    "teacher": str,
    "cache": str,
    "student": str,
    "data": list,
    "eval_data": list,
}
"""What a recipe file may name beside the settings."""


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a run."""

    steps: int = _setting(100, "Optimizer steps.")
    row_tokens: int = _setting(512, "Tokens in a packed row.")
    rows_per_step: int = _setting(2, "Rows in one forward pass.")
    accumulation_steps: int = _setting(1, "Forward passes per step.")
    learning_rate: float = _setting(1e-4, "Peak learning rate.")
    warmup_steps: int = _setting(5, "Steps until the peak.")
    max_grad_norm: float = _setting(1.0, "Longer gradients are scaled down to it.")
    weight_decay: float = _setting(0.0, "Of AdamW.")
    divergence: DivergenceName = _setting("forward_kl", "What is minimised.")
    mix: float = _setting(0.5, "Teacher's share in the mixture of jsd and the skew divergences.")
    temperature: float = _setting(1.0, "Of both distributions.")
    t_squared: bool = _setting(True, "Multiply the divergence by T^2.")
    hard_label_weight: float = _setting(0.0, "0 distils, 1 trains without the teacher.")
    match_hidden: float = _setting(0.0, "Weight of the distance between last hidden states.")
    grid: Literal["none", "q4_0"] = _setting("none", "q4_0 trains on the int4 grid that ships.")
    grid_head: Literal["q8_0", "q4_0"] = _setting(
        "q8_0", "Grid of embedding and head, with --grid q4_0; export with the same --head."
    )
    grid_scales: Literal["derived", "learned"] = _setting(
        "derived", "Scales of 4-bit blocks: from the largest weight of each, or trained."
    )
    grid_activations: Literal["none", "int8"] = _setting(
        "none", "int8 rounds what matrices are multiplied by too, as the runtimes do."
    )
    save_steps: int = _setting(50, "Steps between checkpoints.")
    seed: int = _setting(0, "Of order and initial state.")
    precision: Literal["auto", "bf16", "fp32"] = _setting("auto", "Of the backbones.")
    head_precision: Literal["auto", "bf16", "fp32"] = _setting(
        "fp32", "Of the products with the heads; auto: bf16 while the divergence is large."
    )
    chunk_tokens: int | None = _setting(None, "Tokens whose logits exist at a time.")
    compile: Literal["auto", "none", "loss", "full"] = _setting(
        "auto", "torch.compile the loss, or the layers too; auto: full where the run is long."
    )
    gradient_checkpointing: bool = _setting(False, "Recompute activations: slower, smaller.")
    adapter: Literal["none", "lora"] = _setting("none", "lora trains low-rank updates only.")
    lora_rank: int = _setting(16, "Of the updates.")
    lora_alpha: int = _setting(32, "The updates are multiplied by alpha / rank.")
    student_bits: Literal["full", "4"] = _setting("full", "4: frozen in 4 bits, with an adapter.")
    teacher_bits: Literal["full", "8", "4"] = _setting("full", "8 or 4 take bitsandbytes.")
    teacher_memory_gb: float | None = _setting(
        None, "Most memory for the teacher's layers; the others are fetched as needed."
    )
    cross_tokenizer: Literal["refuse", "ranks"] = _setting(
        "refuse", "ranks compares sorted probabilities of a teacher with other tokens; text only."
    )
    on_policy: float = _setting(0.0, "Share of the tokens that the student writes itself.")
    on_policy_tokens: int = _setting(64, "Longest continuation that it writes.")
    on_policy_prompt_tokens: int = _setting(32, "Of text without a prompt, given to continue.")
    force: bool = _setting(False, "Go on where a check says stop.")
    eval_steps: int = _setting(0, "Steps between evaluations on --eval-data; 0: at the end.")
    patience: int = _setting(0, "Stop after so many evaluations without a better KL; 0: never.")
    report_to: str = _setting("none", "tensorboard, wandb, trackio or others; commas between.")

    def __post_init__(self) -> None:
        """Check types and ranges.

        Raises:
            RecipeError: some are wrong; all of them are named.
        """
        faults = [
            fault
            for name, kind in setting_types().items()
            if (fault := self._type_fault(name, kind))
        ]
        if not faults:
            faults = self._range_faults()
        if faults:
            raise RecipeError("; ".join(faults))

    def _type_fault(self, name: str, kind: Any) -> str | None:
        value = getattr(self, name)
        if value is None and type(None) in get_args(kind):
            return None
        if get_origin(kind) is UnionType:
            kind = next(part for part in get_args(kind) if part is not type(None))
        if allowed := get_args(kind):
            return None if value in allowed else f"{name} {value!r} is none of {', '.join(allowed)}"
        kinds = (int, float) if kind is float else (kind,)
        is_number = kind in (int, float)
        if not isinstance(value, kinds) or (is_number and isinstance(value, bool)):
            return f"{name} {value!r} is no {kind.__name__}"
        return None

    def _range_faults(self) -> list[str]:
        lowest = {"row_tokens": 2, "warmup_steps": 0, "seed": 0, "eval_steps": 0, "patience": 0}
        counts = (
            "steps",
            "rows_per_step",
            "accumulation_steps",
            "save_steps",
            "lora_rank",
            "on_policy_tokens",
            "on_policy_prompt_tokens",
            *lowest,
        )
        faults = [
            f"{name} {getattr(self, name)} is below {lowest.get(name, 1)}"
            for name in counts
            if getattr(self, name) < lowest.get(name, 1)
        ]
        for name in ("learning_rate", "temperature", "max_grad_norm", "lora_alpha"):
            if not getattr(self, name) > 0:
                faults.append(f"{name} {getattr(self, name)} must be above 0")
        if not 0 <= self.hard_label_weight <= 1:
            faults.append(f"hard_label_weight {self.hard_label_weight} must lie in 0..1")
        if self.cross_tokenizer != "refuse" and self.on_policy > 0:
            faults.append("on_policy needs a teacher of the same tokens, not cross_tokenizer")
        if not 0 <= self.on_policy <= 1:
            faults.append(f"on_policy {self.on_policy} must lie in 0..1")
        if not self.match_hidden >= 0:
            faults.append(f"match_hidden {self.match_hidden} is below 0")
        if self.match_hidden and self.cross_tokenizer != "refuse":
            faults.append("match_hidden needs a teacher of the same tokens, not cross_tokenizer")
        if not 0 < self.mix < 1:
            faults.append(f"mix {self.mix} must lie between 0 and 1")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            faults.append(f"chunk_tokens {self.chunk_tokens} is below 1")
        if self.student_bits != "full" and self.adapter == "none":
            faults.append("a student in 4 bits is frozen and needs adapter lora")
        if self.grid != "none" and self.adapter != "none":
            faults.append(f"the grid {self.grid} rounds trained weights, an adapter freezes them")
        if self.grid == "none":
            faults += [
                f"{name} {getattr(self, name)} needs a grid; add grid q4_0"
                for name, off in (("grid_scales", "derived"), ("grid_activations", "none"))
                if getattr(self, name) != off
            ]
        return faults


@dataclass(frozen=True, kw_only=True)
class Job:
    """What ``edgekd distill`` is asked to do: sources and recipe."""

    student: str
    data: list[str]
    recipe: Recipe
    teacher: str | None = None
    cache: str | None = None
    """Folder of the teacher's recorded distributions; instead of a teacher."""
    eval_data: list[str] = field(default_factory=list)
    """Held-out text."""


def setting_fields() -> tuple[Field[Any], ...]:
    """Return the fields of :class:`Recipe`, each with its help in ``metadata``."""
    return fields(Recipe)


def setting_types() -> dict[str, Any]:
    """Return the name and type of each setting."""
    hints = get_type_hints(Recipe)
    return {entry.name: hints[entry.name] for entry in setting_fields()}


def resolve_job(path: Path | None, given: dict[str, Any]) -> Job:
    """Return the job in the TOML file at ``path``, if any; what is ``given`` goes over the file.

    A value of None, or an empty list, counts as not given.

    Raises:
        RecipeError: the file is missing or malformed, a key is unknown, a setting is out of
            range, or teacher, student or data are named nowhere.
    """
    values = {} if path is None else _read_toml(path)
    values |= {name: value for name, value in given.items() if value not in (None, [], ())}
    missing = [f"--{name}" for name in ("student", "data") if not values.get(name)]
    if not (values.get("teacher") or values.get("cache")):
        missing.insert(0, "--teacher or --cache")
    if missing:
        raise RecipeError(
            f"{', '.join(missing)} missing; give it on the command line or in the recipe"
        )
    if values.get("teacher") and values.get("cache"):
        raise RecipeError("--teacher and --cache are both given; the cache replaces the teacher")
    sources = {name: values.pop(name) for name in _SOURCES if name in values}
    return Job(**sources, recipe=Recipe(**values))


def write_recipe(path: Path, job: Job) -> None:
    """Write ``job``, every setting resolved, as a TOML file that ``--recipe`` reads."""
    values = {name: getattr(job, name) for name in _SOURCES} | asdict(job.recipe)
    lines = [
        f"{name} = {_toml(value)}" for name, value in values.items() if value not in (None, [])
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _toml(value: Any) -> str:
    """Return a scalar or a list of strings as TOML: JSON, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is no TOML file: {error}") from error
    known = {**_SOURCES, **setting_types()}
    if unknown := sorted(values.keys() - known.keys()):
        raise RecipeError(
            f"{path} has unknown settings: {', '.join(unknown)}; known are {', '.join(known)}"
        )
    for name in ("data", "eval_data"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    for name, kind in _SOURCES.items():
        if name in values and not isinstance(values[name], kind):
            raise RecipeError(f"{path}: {name} {values[name]!r} is no {kind.__name__}")
    return values
