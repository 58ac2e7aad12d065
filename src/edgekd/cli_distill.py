"""Command line: the verbs that make a student.

Part of edgekd.cli; the same rules hold.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgekd.cli_options import (
    Context,
    Json,
    Model,
    Quiet,
    Revision,
    is_first_rank,
    need,
    parse_count,
    parse_layers,
    print_result,
    with_recipe_options,
)
from edgekd.progress import make_progress

if TYPE_CHECKING:
    from edgekd.distill.cache_source import Endpoint
    from edgekd.distill.preflight import Plan

app = typer.Typer()
cache_app = typer.Typer(invoke_without_command=True)
app.add_typer(cache_app, name="cache")


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    data: Annotated[list[str] | None, typer.Option(help="Calibration text.")] = None,
    params: Annotated[str | None, typer.Option(help="Largest size, such as 90M.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Slowest decoded token here, on Q4_0 in llama.cpp.")
    ] = None,
    by: Annotated[
        Literal["depth", "width", "both"], typer.Option(help="How the target is reached.")
    ] = "depth",
    layers: Annotated[int | None, typer.Option(help="How many layers to keep.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden channels to keep.")] = None,
    neurons: Annotated[int | None, typer.Option(help="MLP neurons of a layer to keep.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key-value heads to keep.")] = None,
    keep: Annotated[str | None, typer.Option(help="The layers to keep, such as 0,1,5.")] = None,
    tokens_of: Annotated[
        list[str] | None, typer.Option(help="Text whose tokens to keep; trims the vocabulary.")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carve a smaller student out of MODEL: fewer layers, narrower ones, fewer tokens.

    Trim the vocabulary first: the trimmed teacher then teaches the students carved out of it.
    """
    counts = {"layers": layers, "hidden": hidden, "neurons": neurons, "groups": kv_heads}
    given = {name: count for name, count in counts.items() if count is not None}
    if sum(map(bool, (given, params, latency_ms, keep, tokens_of))) != 1:
        raise typer.BadParameter(
            "give one of --params, --latency-ms, --keep, --tokens-of, or some of --layers, "
            "--hidden, --neurons, --kv-heads"
        )
    if not (keep or tokens_of or data):
        raise typer.BadParameter("importance needs --data; or name layers with --keep")
    need("distill", "torch", "transformers", "gguf")
    need("export", "onnx")
    from edgekd.distill.carve import carve
    from edgekd.export.export_model import as_checkpoint

    with as_checkpoint(model, revision) as checkpoint:
        report = carve(
            checkpoint,
            out,
            data=data or [],
            max_params=parse_count(params) if params else None,
            max_latency_ms=latency_ms,
            way=by,
            counts=given,
            layers=parse_layers(keep) if keep else None,
            tokens_of=tokens_of or [],
            progress=make_progress(quiet),
        )
    text = f"{out}: {report['n_parameters']:,} of {report['n_parameters_before']:,} parameters"
    print_result(report, as_json, text)


@cache_app.callback()
def cache(
    context: typer.Context,
    teacher: Annotated[
        str | None, typer.Option(help="HF folder, hub id, .gguf file, or URL of an endpoint's /v1.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text, JSONL, folder or hf://NAME; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write, or to go on in.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the endpoint.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with its key.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model with the endpoint's tokenizer.")
    ] = None,
    row_tokens: Annotated[int, typer.Option(help="Longest sample, as in distill.")] = 512,
    top_k: Annotated[int, typer.Option(help="Most tokens kept exactly.")] = 32,
    top_mass: Annotated[float, typer.Option(help="Enough probability to keep exactly.")] = 0.995,
    tail_samples: Annotated[int, typer.Option(help="Most samples of all other tokens.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Record the teacher's distributions once, for distill --cache; goes on after a kill."""
    if context.invoked_subcommand:
        return
    if teacher is None or not data or out is None:
        raise typer.BadParameter("give --teacher, --data and --out, or a command such as inspect")
    need("distill", "torch", "transformers", "gguf")
    need("export", "onnx")
    from edgekd.distill.cache import CaptureSettings, capture

    settings = CaptureSettings(
        row_tokens=row_tokens,
        top_k=top_k,
        top_mass=top_mass,
        tail_samples=tail_samples,
        seed=seed,
    )
    report = capture(
        _teacher(teacher, model, api_key_file),
        data,
        out,
        settings,
        tokenizer_of=tokenizer,
        revision=revision,
        progress=make_progress(quiet or not is_first_rank()),
    )
    if is_first_rank():
        print_result(report, as_json, _cache_summary(report))


@cache_app.command("inspect")
def cache_inspect(
    folder: Annotated[Path, typer.Argument(help="A cache.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check every shard of a cache and say what it holds."""
    need("distill", "torch", "safetensors")
    from edgekd.distill.cache import inspect

    report = inspect(folder)
    print_result(report, as_json, _cache_summary(report))


@app.command()
@with_recipe_options
def distill(
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    teacher: Annotated[str | None, typer.Option(help="HF folder, hub id or .gguf file.")] = None,
    student: Annotated[str | None, typer.Option(help="HF folder, hub id or .gguf file.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text, JSONL, folder or hf://NAME; repeatable.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Recorded distributions instead of a teacher.")
    ] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option(help="Held-out text, like --data; repeatable.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file with settings; options here go over it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a kill.")] = False,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Say what the run needs, and train nothing.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(help="Plan for 8xH100-80GB, say, or for 8x8xH100-80GB: nodes x GPUs."),
    ] = None,
    network_gbit: Annotated[
        float | None,
        typer.Option(help="Gbit/s that each of these nodes receives; by default 400 a GPU."),
    ] = None,
    gpu_hour_price: Annotated[
        float | None, typer.Option(help="What an hour of one GPU costs you; adds the run's cost.")
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="Upload to this model on the hub, private if new.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the teacher, a hub id.")] = None,
    student_revision: Annotated[str | None, typer.Option(help="Of the student.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Train the student to follow the teacher's whole distribution."""
    from edgekd.distill.recipe import resolve_job

    given = {
        "teacher": teacher,
        "cache": cache,
        "student": student,
        "data": data,
        "eval_data": eval_data,
    } | settings
    job = resolve_job(recipe, given)
    need("distill", "torch", "transformers", "accelerate", "gguf")
    need("export", "onnx")
    from edgekd.distill.distill import distill as run_distillation
    from edgekd.distill.distill import plan

    if only_plan or gpus:
        found = plan(
            job,
            gpus=gpus,
            network_gbit=network_gbit,
            revision=revision,
            student_revision=student_revision,
        )
        cost = None if gpu_hour_price is None else found.gpu_hours * gpu_hour_price
        document = found.as_dict() | ({} if cost is None else {"cost": cost})
        print_result(document, as_json, _plan_summary(found, cost))
        return
    if out is None:
        raise typer.BadParameter("give --out")
    report = run_distillation(
        job,
        out,
        resume=resume,
        revision=revision,
        student_revision=student_revision,
        progress=make_progress(quiet or not is_first_rank()),
    )
    if push_to and is_first_rank():
        from edgekd.distill.push import push

        report["pushed_to"] = push(out, push_to)
    if is_first_rank():
        print_result(report, as_json, f"{out}: {report['steps']} steps, last {report['last']}")


@app.command()
def answer(
    prompts: Annotated[Path, typer.Argument(help="JSONL with prompt or messages.")],
    teacher: Annotated[
        str, typer.Option(help="HF folder, hub id, .gguf file, or URL of an endpoint's /v1.")
    ],
    out: Annotated[Path, typer.Option(help="JSONL to append to.")],
    model: Annotated[str | None, typer.Option(help="The model's name at the endpoint.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with its key.")] = None,
    temperature: Annotated[float, typer.Option(help="0 picks the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens in one answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    ctx: Context = 2048,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have the teacher answer PROMPTS: data for sequence-level distillation; goes on after a kill.

    The student learns it with distill --hard-label-weight 1; tokenizers may differ.
    """
    need("distill", "transformers")
    from edgekd.distill.answers import write_answers
    from edgekd.runtime.sampling import SamplingParams

    n_answers = write_answers(
        _teacher(teacher, model, api_key_file),
        prompts,
        out,
        SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed),
        context_tokens=ctx,
        revision=revision,
        progress=make_progress(quiet),
    )
    report = {"path": str(out), "answers": n_answers}
    print_result(report, as_json, f"{out}: {n_answers} answers")


def _teacher(name: str, model: str | None, api_key_file: Path | None) -> "str | Endpoint":
    """Return what ``--teacher`` stands for: a model, or an endpoint at a URL."""
    if not name.startswith(("http://", "https://")):
        return name
    from edgekd.distill.cache_source import Endpoint
    from edgekd.runtime.server import read_key

    return Endpoint(name, model or "default", read_key(api_key_file) if api_key_file else None)


def _plan_summary(plan: "Plan", cost: float | None) -> str:
    from edgekd.distill.preflight import epochs_note
    from edgekd.units import format_bytes, format_duration

    rows = {
        "process": plan.process_bytes,
        "weights": plan.weights_bytes,
        "optimizer": plan.optimizer_bytes,
        "gradients": plan.gradients_bytes,
        "teacher": plan.teacher_bytes,
        "activations": plan.activations_bytes,
        "loss": plan.loss_bytes,
        **({"gathered": plan.gathered_bytes} if plan.n_gpus > 1 else {}),
        "peak": plan.peak_bytes,
        "available": plan.available_bytes,
    }
    verdict = "it fits" if plan.fits else "it does not fit: " + "; ".join(plan.advice)
    return "\n".join(
        [
            f"student {plan.student_parameters:,} parameters, {plan.trained_parameters:,} trained; "
            f"teacher {plan.teacher_parameters:,}",
            *(f"  {name:12} {format_bytes(int(size)):>10}" for name, size in rows.items()),
            *(
                [f"a cache of the teacher takes at most {plan.cache_bytes_per_token} bytes a token"]
                if plan.cache_bytes_per_token
                else []
            ),
            f"about {plan.tokens_per_s:,.0f} tokens/s at {plan.flop_per_token / 1e9:.2f} GFLOP "
            f"a token, {plan.teacher_share:.0%} of them the teacher's; estimated, {verdict}",
            *_writing_summary(plan),
            *_network_summary(plan),
            f"{plan.run_tokens:,} tokens take about {format_duration(plan.run_s)}, "
            f"{plan.gpu_hours:,.1f} hours of one GPU"
            + (f"; they cost {cost:,.2f}" if cost else ""),
            *([epochs_note(plan.epochs)] if plan.epochs is not None else []),
        ]
    )


def _writing_summary(plan: "Plan") -> list[str]:
    share = plan.writing_s_per_step / plan.step_s
    return [f"  of the time the student writes its own text: {share:.0%}"] if share else []


def _network_summary(plan: "Plan") -> list[str]:
    from edgekd.units import format_bytes

    if plan.n_gpus == 1:
        return []
    share = plan.network_s_per_step / plan.step_s
    return [
        f"  {plan.n_gpus} GPUs share weights, optimizer and gradients; a step brings each "
        f"{format_bytes(plan.network_gpu_bytes_per_step)}, each node "
        f"{format_bytes(plan.network_node_bytes_per_step)} from others: {share:.0%} of its time"
    ]


def _cache_summary(report: dict[str, Any]) -> str:
    return (
        f"{report['path']}: {report['positions']} positions of {report['samples']} samples from "
        f"{report['teacher']}\n"
        f"  {report['bytes_per_token']:.1f} bytes per token: {report['top_tokens']:.1f} likeliest "
        f"tokens with {report['mass_kept']:.1%} of the probability, {report['tail_samples']:.1f} "
        f"samples of the others; entropy {report['entropy_nats']:.2f} nats"
    )
