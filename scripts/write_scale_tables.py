"""Write the tables of docs/scale.md from plans and results; ``--check`` fails if they are stale.

    python scripts/write_scale_tables.py --tokens 5B --gpu-hour-price 2.50    # yours, only printed
    python scripts/write_scale_tables.py --teacher T --student S --gpu A100-80GB

Plans are those of ``edgekd distill --plan``; the models are known by their configs. Folders with
``config.json`` are enough for --teacher and --student.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from generated import Rows, put, table, write_or_check

from edgekd.cli_options import parse_count
from edgekd.distill.config_only import open_config
from edgekd.distill.machines import named_machine
from edgekd.distill.preflight import Plan, plan_run
from edgekd.distill.recipe import Recipe, setting_types
from edgekd.export.checkpoint import Checkpoint
from edgekd.units import format_bytes, format_count, format_duration

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "scale.md"
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = ROOT / "benchmarks" / "shapes"
NETWORKS_GBIT = (3200, 800, 100)
"""Of a node: a port of 400 Gbit/s for each of eight GPUs, two of them, a cloud's Ethernet."""
STEP = {
    "row_tokens": 2048,
    "precision": "bf16",
    "compile": "full",
    "head_precision": "auto",
    "gradient_checkpointing": True,
}
BESIDE, FOUR_BITS = "bf16 teacher beside", "4-bit teacher beside"
RECORDED, KEPT = "recorded teacher, recomputing", "recorded teacher, not recomputing"
WAYS: dict[str, dict[str, Any]] = {
    BESIDE: {"rows_per_step": 1},
    FOUR_BITS: {"rows_per_step": 2, "teacher_bits": "4"},
    RECORDED: {"rows_per_step": 8},
    KEPT: {"rows_per_step": 2, "gradient_checkpointing": False},
}
MEASURED_ON_GPU = {"baseline-first": False, "distilled-first": True, "distilled-second": True}
"""Trainings of the five rows, and whether they have a teacher."""
_BF16_BYTES, _FLOAT32_BYTES = 2, 4


class Asked(NamedTuple):
    """What the tables are for: the page's, or a reader's own."""

    teacher: Checkpoint
    student: Checkpoint
    gpu: str
    per_node: int
    nodes: int
    tokens: int
    price: float
    network_gbit: float | None

    @property
    def machines(self) -> list[str]:
        """One node, and several."""
        return [f"{self.per_node}x{self.gpu}", f"{self.nodes}x{self.per_node}x{self.gpu}"]


def planned(asked: Asked, way: str, machine: str, network_gbit: float | None = None) -> Plan:
    """Return the plan of one way on ``machine``, its steps as many as the tokens take."""
    teacher = asked.teacher if way in (BESIDE, FOUR_BITS) else None
    n_common = min(int(each.config["vocab_size"]) for each in (asked.teacher, asked.student))
    place = named_machine(machine, network_gbit or asked.network_gbit)
    recipe = Recipe(**(STEP | WAYS[way]))
    step_tokens = recipe.rows_per_step * recipe.row_tokens * place.n_devices
    recipe = replace(recipe, steps=math.ceil(asked.tokens / step_tokens))
    is_cached = teacher is None
    return plan_run(recipe, asked.student, teacher, n_common, place, is_cached=is_cached)


def ways(asked: Asked) -> Rows:
    """Return what each way needs, on one node and on several."""
    return [
        (
            machine,
            way,
            format_bytes(plan.peak_bytes),
            "yes" if plan.fits else "no",
            *(times(asked, plan.tokens_per_s, plan.run_s, plan.n_gpus) if plan.fits else ("",) * 4),
        )
        for machine in asked.machines
        for way in WAYS
        for plan in [planned(asked, way, machine)]
    ]


def times(asked: Asked, tokens_per_s: float, run_s: float, n_gpus: int) -> tuple[str, ...]:
    """Return rate, time, GPU hours and cost."""
    gpu_hours = n_gpus * run_s / 3600
    rate, days = f"{tokens_per_s:,.0f}", f"{format_duration(run_s)} ({run_s / 86400:.2f} d)"
    return rate, days, f"{gpu_hours:,.0f}", f"{gpu_hours * asked.price:,.0f}"


def memory(asked: Asked) -> Rows:
    """Return the parts of the peak of one GPU, the teacher recorded."""
    plans = [planned(asked, RECORDED, machine) for machine in asked.machines]
    parts: list[tuple[str, Callable[[Plan], float]]] = [
        ("weights, its share", lambda plan: plan.weights_bytes / plan.n_gpus),
        ("optimizer, its share", lambda plan: plan.optimizer_bytes / plan.n_gpus),
        ("gathered: two layers and what lies outside, with gradients", lambda p: p.gathered_bytes),
        ("activations, with the weights in bf16", lambda plan: plan.activations_bytes),
        ("loss, and the head's gradient", lambda plan: plan.loss_bytes),
        ("CUDA and its libraries", lambda plan: plan.process_bytes),
        ("peak", lambda plan: plan.peak_bytes),
        ("available", lambda plan: plan.available_bytes),
    ]
    return [(name, *(format_bytes(part(plan)) for plan in plans)) for name, part in parts]


def capture(asked: Asked) -> Rows:
    """Return what recording the teacher takes."""
    rows: list[tuple[str, ...]] = []
    for machine in asked.machines:
        plan = planned(asked, FOUR_BITS, machine)
        assert plan.capture_tokens_per_s is not None
        capture_s = asked.tokens / plan.capture_tokens_per_s
        weights = asked.teacher.n_parameters * _BF16_BYTES / asked.per_node
        cells = times(asked, plan.capture_tokens_per_s, capture_s, plan.n_gpus)
        together_s = capture_s + planned(asked, RECORDED, machine).run_s
        _, days, gpu_hours, cost = times(asked, 0, together_s, plan.n_gpus)
        together = f"{days}, {gpu_hours} GPU hours, {cost}"
        rows.append((machine, format_bytes(weights), *cells, together))
    return rows


def cache(asked: Asked) -> Rows:
    """Return the size of the cache: at most, and as measured for another vocabulary."""
    most = planned(asked, FOUR_BITS, asked.machines[0]).cache_bytes_per_token
    assert most is not None
    found = result("cache")["cache"]["bytes_per_token"]
    vocabulary = f"{asked.student.config['vocab_size']:,} tokens"
    return [
        (f"planned at most, {vocabulary}", f"{most}", format_bytes(most * asked.tokens)),
        ("measured, 49,152 tokens", f"{found:.0f}", format_bytes(found * asked.tokens)),
    ]


def network(asked: Asked) -> Rows:
    """Return what a step moves, and its share of the step at several speeds between nodes."""
    one, several = asked.machines
    asked_for = [asked.network_gbit] if asked.network_gbit else NETWORKS_GBIT
    cases = [(one, "", None), *((several, f"{gbit:,.0f} Gbit/s", gbit) for gbit in asked_for)]
    return [
        (
            machine,
            named,
            way,
            format_bytes(plan.network_gpu_bytes_per_step),
            format_bytes(plan.network_node_bytes_per_step),
            f"{plan.compute_s_per_step:.2f} s",
            f"{plan.network_s_per_step:.2f} s",
            f"{share_of_network(plan):.0%}",
            f"{plan.tokens_per_s:,.0f}",
        )
        for machine, named, gbit in cases
        for way in (RECORDED, KEPT)
        for plan in [planned(asked, way, machine, gbit)]
    ]


def share_of_network(plan: Plan) -> float:
    """Return the share of a step in which the network is waited for, if nothing overlaps."""
    return plan.network_s_per_step / (plan.network_s_per_step + plan.compute_s_per_step)


def host(asked: Asked) -> Rows:
    """Return what a node's own memory and its disks have to do."""
    text = result("text_memory")["bytes_per_token"]
    weights = _FLOAT32_BYTES * asked.student.n_parameters
    most = planned(asked, FOUR_BITS, asked.machines[0]).cache_bytes_per_token or 0
    return [
        (
            "student in float32, loaded by each process before it is shared",
            f"{asked.per_node} x {format_bytes(weights)}",
            format_bytes(asked.per_node * weights),
        ),
        (
            "text as token ids, held by each process",
            f"{asked.per_node} x {format_count(asked.tokens)} x {text:.0f} B",
            format_bytes(asked.per_node * asked.tokens * text),
        ),
        (
            "cache, read and hashed by each process before the first step",
            f"{asked.per_node} x {format_bytes(most * asked.tokens)}",
            format_bytes(asked.per_node * most * asked.tokens),
        ),
    ]


def accuracy() -> Rows:
    """Return planned over measured: on this project's processor, then on a GPU."""
    rows: list[tuple[str, ...]] = []
    found = result("plan")
    for name, row in found["rows"].items():
        memory_ratio, speed_ratio = (
            f"{row[f'{what}_planned_over_measured']:.2f}" for what in ("memory", "speed")
        )
        measured = f"{row['tokens_per_s']:,.0f}"
        place = f"{found['machine']['processor']}, {found['machine']['n_usable_cores']} cores"
        planned_rate = f"{row['planned']['tokens_per_s']:,.0f}"
        rows.append((place, name, memory_ratio, planned_rate, measured, speed_ratio))
    return rows + list(accuracy_on_gpu())


def accuracy_on_gpu() -> Rows:
    """Return the plan of the five rows' trainings beside their fastest steps; none without them."""
    if not (RESULTS / "five_rows_gpu.json").is_file():
        return []
    found = result("five_rows_gpu")
    teacher = open_config(SHAPES / "smollm2-135m")
    with TemporaryDirectory() as folder:
        student = shorter(teacher, 20, Path(folder))
        rows: list[tuple[str, ...]] = []
        for name, has_teacher in MEASURED_ON_GPU.items():
            if name not in found["trainings"]:
                continue
            training = found["trainings"][name]
            recipe = Recipe(**recorded_settings(found["settings"]), precision="bf16")
            machine = named_machine("H100-80GB")
            vocab_size = int(teacher.config["vocab_size"])
            plan = plan_run(recipe, student, teacher if has_teacher else None, vocab_size, machine)
            measured = training["last"]["tokens"] / training["fastest_step_s"]
            ratio = f"{plan.tokens_per_s / measured:.2f}"
            rates = f"{plan.tokens_per_s:,.0f}", f"{measured:,.0f}"
            gpu = found["machine"]["gpus"][0]
            rows.append((gpu, f"five rows, {name}", "not measured", *rates, ratio))
    return rows


def off_by() -> str:
    """Return in words how far the plan was from what was measured."""
    ratios = [row["speed_planned_over_measured"] for row in result("plan")["rows"].values()]
    said = f"On the processor speeds were {min(ratios):.2f} to {max(ratios):.2f} of the measured"
    found = [float(row[-1]) for row in accuracy_on_gpu()]
    if not found:
        return f"{said} ones; no GPU was compared."
    return (
        f"{said} ones, on the GPU {min(found):.2f} to {max(found):.2f}: expect a run there to take "
        "that many times longer than the plan says."
    )


def recorded_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a result says of its recipe: its own fields, and options given as text."""
    words = settings["extra"].split()
    options = {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(words[::2], words[1::2], strict=True)
    }
    return {name: value for name, value in settings.items() if name in setting_types()} | options


def shorter(model: Checkpoint, n_layers: int, folder: Path) -> Checkpoint:
    """Return ``model`` with fewer layers, as ``edgekd prune`` leaves it."""
    config = model.config | {"num_hidden_layers": n_layers}
    (folder / "config.json").write_text(json.dumps(config))
    return open_config(folder)


def result(name: str) -> dict[str, Any]:
    """Return a committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return found


def models(asked: Asked) -> Rows:
    """Return what is planned for."""
    return [
        (role, each.folder.name, f"{each.n_parameters:,}", f"{each.n_layers}")
        for role, each in (("teacher", asked.teacher), ("student", asked.student))
    ]


def tables(asked: Asked) -> dict[str, str]:
    """Return every table of the page by name."""
    spent = ("tokens/s", f"time for {format_count(asked.tokens)} tokens", "GPU hours")
    cost = f"cost at {asked.price:.2f} an hour"
    way = ("machine", "way", "peak of a GPU", "fits", *spent, cost)
    moved = ("each GPU receives", "each node receives", "computing", "network at least")
    accuracy_head = ("machine", "run", "memory, planned / measured", "tokens/s planned")
    return {
        "models": table(("role", "config", "parameters", "layers"), models(asked)),
        "ways": table(way, ways(asked)),
        "memory": table(("part of a GPU's memory", *asked.machines), memory(asked)),
        "capture": table(
            ("machine", "weights of a GPU", *spent, cost, "with training, recomputing"),
            capture(asked),
        ),
        "cache": table(
            ("records", "bytes per token", f"{format_count(asked.tokens)} tokens"), cache(asked)
        ),
        "network": table(
            ("machine", "between nodes", "way", *moved, "network's share", "tokens/s"),
            network(asked),
        ),
        "host": table(("on each node", "made of", "together"), host(asked)),
        "accuracy": table(
            (*accuracy_head, "measured", "speed, planned / measured"),
            accuracy(),
        )
        + f"\n{off_by()}\n",
    }


def main() -> None:
    """Put each table between its marks, or print a reader's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    for role, name in (("teacher", "llama-3.1-70b"), ("student", "llama-3.1-8b")):
        parser.add_argument(f"--{role}", type=Path, default=SHAPES / name)
    parser.add_argument("--gpu", default="H100-80GB")
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--tokens", type=parse_count, default=10**9)
    parser.add_argument("--gpu-hour-price", type=float, default=2.0)
    parser.add_argument("--network-gbit", type=float)
    given = parser.parse_args()
    asked = Asked(
        open_config(given.teacher),
        open_config(given.student),
        given.gpu,
        given.per_node,
        given.nodes,
        given.tokens,
        given.gpu_hour_price,
        given.network_gbit,
    )
    if set(sys.argv[1:]) - {"--check"}:
        print("\n".join(tables(asked).values()))
        return
    page = TARGET.read_text("utf-8")
    for name, made in tables(asked).items():
        page = put(page, name, made)
    write_or_check(TARGET, page)


if __name__ == "__main__":
    main()
