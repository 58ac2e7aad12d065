"""Command line: each command parses, calls one function, and prints.

Nothing heavy is imported before a command runs, so ``--help`` stays instant.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgekd.cli_options import (
    Context,
    Json,
    Model,
    Quiet,
    Revision,
    Threads,
    is_first_rank,
    need,
    parse_count,
    parse_layers,
    print_result,
    with_recipe_options,
)
from edgekd.errors import EdgekdError
from edgekd.progress import make_progress

if TYPE_CHECKING:
    from edgekd.distill.cache_source import Endpoint
    from edgekd.distill.preflight import Plan

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
cache_app = typer.Typer(invoke_without_command=True)
app.add_typer(cache_app, name="cache")
devices_app = typer.Typer(no_args_is_help=True, help="What this machine is.")
app.add_typer(devices_app, name="devices")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path(
        "edgekd-demo"
    ),
    minutes: Annotated[float, typer.Option(help="Budget on 2 cores.")] = 6.0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole chain on a real model and end with the five rows."""
    need("demo", "torch", "transformers", "accelerate", "gguf", "onnx", "onnxruntime", "llama_cpp")
    from rich.console import Console

    from edgekd.distill.demo import demo as run_demo
    from edgekd.runtime.five_rows import render_rows

    result = run_demo(out, minutes, make_progress(quiet))
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    Console(width=180).print(render_rows(result.rows))
    print(f"freshly pruned student: KL to teacher {result.pruned.kl_nats:.4f}")
    print(
        f"everything lies in {out}; next:\n"
        f"  edgekd chat {out}/student-int4-q4_0.gguf\n"
        f"  edgekd serve {out}/student-int4-q4_0.gguf\n"
        f"  edgekd bench {out}/student-int4-q4_0.gguf {out}/student-int4-onnx"
    )


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
            "give one of --params, --latency-ms, --keep, --tokens-of, or some of --layers, --hidden, --neurons, "
            "--kv-heads"
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
        progress=make_progress(quiet),
    )
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
        str | None, typer.Option(help="Plan for another machine, such as 8xH100-80GB.")
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
        found = plan(job, gpus=gpus, revision=revision, student_revision=student_revision)
        print_result(found.as_dict(), as_json, _plan_summary(found))
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
def export(
    model: Model,
    format: Annotated[str, typer.Option(help="gguf or onnx.")],
    out: Annotated[Path, typer.Option(help="File (gguf) or folder (onnx) to write.")],
    quant: Annotated[str, typer.Option(help="f32, f16, q8_0, q4_0 (int4).")] = "q4_0",
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write MODEL as GGUF or ONNX, verified against its own weights."""
    if format not in ("gguf", "onnx"):
        raise typer.BadParameter(f"{format!r} is neither gguf nor onnx", param_hint="--format")
    need("export", "torch", "transformers", "gguf", "onnx")
    from edgekd.export.export_model import export_model

    report = export_model(
        model,
        "gguf" if format == "gguf" else "onnx",
        out,
        quant=quant,
        revision=revision,
        progress=make_progress(quiet),
    )
    print_result(report, as_json, _export_summary(report))


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="A .gguf file or an ONNX folder.")],
    reference: Annotated[
        Path | None, typer.Option(help="The checkpoint it was exported from.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check the hashes of ARTIFACT and, with --reference, its weights and logits."""
    from edgekd.manifest import check_files, manifest_path, read_manifest
    from edgekd.runtime.model_kind import detect_kind

    detect_kind(artifact)
    manifest = read_manifest(manifest_path(artifact))
    check_files(artifact if artifact.is_dir() else artifact.parent, manifest)
    report: dict[str, Any] = {"path": str(artifact), "files": "unchanged"}
    if reference is None:
        report["fidelity"] = "unavailable: give --reference CHECKPOINT"
    else:
        need("export", "torch", "transformers", "gguf", "onnx")
        from edgekd.export.checkpoint import open_checkpoint
        from edgekd.export.plan import make_plan, parse_quant
        from edgekd.export.verify import verify_against_checkpoint

        make_progress(quiet).say(f"comparing weights, tokenizer and logits with {reference}")
        checkpoint = open_checkpoint(reference)
        plan = make_plan(checkpoint, parse_quant(manifest["recipe"]["quant"]))
        report |= verify_against_checkpoint(artifact, checkpoint, plan)
    print_result(report, as_json, f"{artifact}: good\n{json.dumps(report, indent=2)}")


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Models to measure, each in a process.")],
    prompt_tokens: Annotated[int, typer.Option("-p", help="Tokens of prefill.")] = 512,
    decode_tokens: Annotated[int, typer.Option("-n", help="Tokens of decode.")] = 128,
    repetitions: Annotated[int, typer.Option("-r", help="Measured repetitions.")] = 5,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed, latency and memory of MODELS on this machine."""
    from rich.console import Console

    from edgekd.runtime.bench import BenchSettings, bench_models
    from edgekd.runtime.bench_table import render_table

    settings = BenchSettings(
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        repetitions=repetitions,
        n_threads=threads,
    )
    results = bench_models(models, settings, make_progress(quiet))
    if as_json:
        print(json.dumps([result.as_dict() for result in results]))
    else:
        Console().print(render_table(results))


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key.")] = None,
    ctx: Context = 2048,
    threads: Threads = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve MODEL over the OpenAI API; --json prints where, once it listens."""
    need("serve", "fastapi", "uvicorn")
    from edgekd.runtime.loading import open_model
    from edgekd.runtime.server import read_key
    from edgekd.runtime.server import serve as serve_model

    key = read_key(api_key_file) if api_key_file else None
    loaded = open_model(model, context_tokens=ctx, n_threads=threads, revision=revision)
    alias = Path(model).name

    def announce(url: str) -> None:
        document = {"url": url, "model": alias, "api": f"{url}/v1"}
        print_result(document, as_json, f"{alias} at {url}/v1; Ctrl-C stops")
        sys.stdout.flush()

    serve_model(loaded, alias, host, port, key, announce, access_log=not quiet)


@app.command()
def chat(
    model: Model,
    temperature: Annotated[float, typer.Option(help="0 picks the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens in one reply.")] = 256,
    ctx: Context = 2048,
    threads: Threads = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Talk to MODEL; /new starts over, /exit or end of input leaves.

    With --json the last line of output is the conversation.
    """
    from edgekd.runtime.chat import chat as chat_with
    from edgekd.runtime.loading import open_model
    from edgekd.runtime.sampling import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    loaded = open_model(model, context_tokens=ctx, n_threads=threads, revision=revision)
    spoken = sys.stderr if as_json else sys.stdout

    def ask() -> str:
        if not quiet:
            print("> ", end="", file=spoken, flush=True)
        if line := sys.stdin.readline():
            return line
        raise EOFError

    def say(text: str) -> None:
        if not (as_json and quiet):
            print(text, end="", file=spoken, flush=True)

    messages = chat_with(loaded, params, ask, say)
    if as_json:
        print(json.dumps({"messages": messages}))


@devices_app.command()
def detect(as_json: Json = False, quiet: Quiet = False) -> None:
    """Describe this machine."""
    from edgekd.devices.detect import detect as detect_machine

    machine = detect_machine().as_dict()
    print_result(machine, as_json, "\n".join(f"{key}: {value}" for key, value in machine.items()))


@app.command()
def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """Say what is installed, what is missing, and what to type; --quiet leaves out what is well."""
    from dataclasses import asdict

    from edgekd.devices.doctor import diagnose

    checks = [check for check in diagnose() if not (quiet and check.status == "ok")]
    lines = [
        f"{check.status:8} {check.subject}: {check.found}"
        + (f"; {check.advice}" if check.advice else "")
        for check in checks
    ]
    print_result([asdict(check) for check in checks], as_json, "\n".join(lines))


def main() -> None:
    """Run the CLI; print what a user can mend as one line, without a traceback."""
    try:
        app()
    except EdgekdError as error:
        raise SystemExit(f"edgekd: {error}") from error


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


def _plan_summary(plan: "Plan") -> str:
    from edgekd.units import format_bytes

    rows = {
        "process": plan.process_bytes,
        "weights": plan.weights_bytes,
        "optimizer": plan.optimizer_bytes,
        "gradients": plan.gradients_bytes,
        "teacher": plan.teacher_bytes,
        "activations": plan.activations_bytes,
        "loss": plan.loss_bytes,
        "peak": plan.peak_bytes,
        "available": plan.available_bytes,
    }
    verdict = "it fits" if plan.fits else "it does not fit: " + "; ".join(plan.advice)
    return "\n".join(
        [
            f"student {plan.student_parameters:,} parameters, {plan.trained_parameters:,} trained; "
            f"teacher {plan.teacher_parameters:,}",
            *(f"  {name:12} {format_bytes(int(size)):>10}" for name, size in rows.items()),
            f"about {plan.tokens_per_s:,.0f} tokens/s at {plan.flop_per_token / 1e9:.2f} GFLOP "
            f"a token; estimated, {verdict}",
        ]
    )


def _cache_summary(report: dict[str, Any]) -> str:
    return (
        f"{report['path']}: {report['positions']} positions of {report['samples']} samples from "
        f"{report['teacher']}\n"
        f"  {report['bytes_per_token']:.1f} bytes per token: {report['top_tokens']:.1f} likeliest "
        f"tokens with {report['mass_kept']:.1%} of the probability, {report['tail_samples']:.1f} "
        f"samples of the others; entropy {report['entropy_nats']:.2f} nats"
    )


def _export_summary(report: dict[str, Any]) -> str:
    from edgekd.units import format_bytes

    arithmetic, rounding = report["arithmetic"], report["rounding"]
    return (
        f"{report['path']}: {format_bytes(report['bytes'])}, "
        f"{report['equal_matrices']} matrices equal to the checkpoint's blocks\n"
        f"  engine against its own weights in torch: KL {arithmetic['kl_nats']:.2e} nats, "
        f"top-1 {arithmetic['top1_agreement']:.1%}\n"
        f"  rounding against the float checkpoint:   KL {rounding['kl_nats']:.2e} nats, "
        f"top-1 {rounding['top1_agreement']:.1%}"
    )
