"""Command line: each command parses, calls one function, and prints.

Nothing heavy is imported before a command runs, so ``--help`` stays instant.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgekd.errors import EdgekdError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
devices_app = typer.Typer(no_args_is_help=True, help="What this machine is.")
app.add_typer(devices_app, name="devices")

_CALIBRATION_DOCUMENTS = 64

Model = Annotated[
    str, typer.Argument(help="HF folder, hub id, .gguf file or ONNX folder.", metavar="MODEL")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print results only.")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", help="CPU threads.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]


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
    _need("demo", "torch", "transformers", "accelerate", "gguf", "onnx", "onnxruntime", "llama_cpp")
    from rich.console import Console

    from edgekd.distill.demo import as_document
    from edgekd.distill.demo import demo as run_demo
    from edgekd.runtime.five_rows import render_rows

    result = run_demo(out, minutes, _speaker(quiet))
    if as_json:
        print(json.dumps(as_document(result)))
        return
    Console(width=150).print(render_rows(result.rows))
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
    layers: Annotated[int | None, typer.Option(help="How many layers to keep.")] = None,
    params: Annotated[str | None, typer.Option(help="Largest size, such as 90M.")] = None,
    keep: Annotated[str | None, typer.Option(help="The layers to keep, such as 0,1,5.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Calibration text.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Carve a shallower student out of MODEL, by block influence or by an explicit list."""
    if sum(option is not None for option in (layers, params, keep)) != 1:
        raise typer.BadParameter("give one of --layers, --params, --keep")
    if keep is None and not data:
        raise typer.BadParameter("block influence needs --data; or name layers with --keep")
    _need("distill", "torch", "transformers", "gguf")
    _need("export", "onnx")
    from edgekd.distill.data import read_documents
    from edgekd.distill.prune import block_influence, choose_layers, layers_within, write_pruned
    from edgekd.export.export_model import as_checkpoint
    from edgekd.runtime.chat_template import read_chat_template
    from edgekd.runtime.tokenizer import FileTokenizer

    with as_checkpoint(model, revision) as checkpoint:
        influence = None
        if keep is not None:
            chosen = _parse_layers(keep)
        else:
            tokenizer = FileTokenizer(checkpoint.folder)
            documents = read_documents(data or [], tokenizer, read_chat_template(checkpoint.folder))
            influence = block_influence(checkpoint, documents[:_CALIBRATION_DOCUMENTS])
            n_keep = layers or layers_within(checkpoint, _parse_count(params or ""))
            chosen = choose_layers(influence, n_keep)
        write_pruned(checkpoint, chosen, out)
        report = {"path": str(out), "kept_layers": chosen, "block_influence": influence}
        _print(
            report, as_json, f"{out}: kept {len(chosen)} of {checkpoint.n_layers} layers: {chosen}"
        )


@app.command()
def distill(
    teacher: Annotated[str, typer.Option(help="HF folder, hub id or .gguf file.")],
    student: Annotated[str, typer.Option(help="HF folder, hub id or .gguf file.")],
    data: Annotated[list[str], typer.Option(help="Text, JSONL, folder or hf://NAME.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    row_tokens: Annotated[int, typer.Option(help="Tokens in a packed row.")] = 512,
    rows_per_step: Annotated[int, typer.Option(help="Rows in one forward pass.")] = 2,
    accumulation_steps: Annotated[int, typer.Option(help="Forward passes per step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    temperature: Annotated[float, typer.Option(help="Of both distributions.")] = 1.0,
    hard_label_weight: Annotated[float, typer.Option(help="0 distils, 1 trains plainly.")] = 0.0,
    grid: Annotated[str, typer.Option(help="q4_0 trains on the int4 grid that ships.")] = "none",
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of order and initial state.")] = 0,
    precision: Annotated[str, typer.Option(help="Backbones: auto, bf16 or fp32.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a kill.")] = False,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the student to follow the teacher's whole distribution."""
    _need("distill", "torch", "transformers", "accelerate", "gguf")
    _need("export", "onnx")
    from edgekd.distill.distill import Recipe
    from edgekd.distill.distill import distill as run_distillation

    recipe = Recipe(
        max_steps=steps,
        row_tokens=row_tokens,
        rows_per_step=rows_per_step,
        accumulation_steps=accumulation_steps,
        learning_rate=learning_rate,
        temperature=temperature,
        hard_label_weight=hard_label_weight,
        grid=grid,  # type: ignore[arg-type]  # Recipe checks it
        save_steps=save_steps,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]
    )
    say = _speaker(quiet)
    report = run_distillation(
        teacher, student, data, out, recipe, resume=resume, revision=revision, say=say
    )
    _print(report, as_json, f"{out}: {report['steps']} steps, last {report['last']}")


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
    _need("export", "torch", "transformers", "gguf", "onnx")
    from edgekd.export.export_model import export_model

    report = export_model(
        model,
        "gguf" if format == "gguf" else "onnx",
        out,
        quant=quant,
        revision=revision,
        say=_speaker(quiet),
    )
    _print(report, as_json, _export_summary(report))


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="A .gguf file or an ONNX folder.")],
    reference: Annotated[
        Path | None, typer.Option(help="The checkpoint it was exported from.")
    ] = None,
    as_json: Json = False,
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
        _need("export", "torch", "transformers", "gguf", "onnx")
        from edgekd.export.checkpoint import open_checkpoint
        from edgekd.export.plan import make_plan, parse_quant
        from edgekd.export.verify import verify_against_checkpoint

        checkpoint = open_checkpoint(reference)
        plan = make_plan(checkpoint, parse_quant(manifest["recipe"]["quant"]))
        report |= verify_against_checkpoint(artifact, checkpoint, plan)
    _print(report, as_json, f"{artifact}: good\n{json.dumps(report, indent=2)}")


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Models to measure, each in a process.")],
    prompt_tokens: Annotated[int, typer.Option("-p", help="Tokens of prefill.")] = 512,
    decode_tokens: Annotated[int, typer.Option("-n", help="Tokens of decode.")] = 128,
    repetitions: Annotated[int, typer.Option("-r", help="Measured repetitions.")] = 5,
    threads: Threads = None,
    as_json: Json = False,
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
    results = bench_models(models, settings)
    if as_json:
        print(json.dumps([result.as_dict() for result in results]))
    else:
        Console().print(render_table(results))


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key.")] = None,
    ctx: Annotated[int, typer.Option(help="Tokens of context.")] = 2048,
    threads: Threads = None,
    revision: Revision = None,
) -> None:
    """Serve MODEL over the OpenAI API."""
    from edgekd.runtime.loading import open_model
    from edgekd.runtime.server import serve as serve_model

    key = api_key_file.read_text("utf-8").strip() if api_key_file else None
    loaded = open_model(model, context_tokens=ctx, n_threads=threads, revision=revision)
    serve_model(loaded, Path(model).name, host, port, key)


@app.command()
def chat(
    model: Model,
    temperature: Annotated[float, typer.Option(help="0 picks the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens in one reply.")] = 256,
    ctx: Annotated[int, typer.Option(help="Tokens of context.")] = 2048,
    threads: Threads = None,
    revision: Revision = None,
) -> None:
    """Talk to MODEL; /new starts over, /exit or end of input leaves."""
    from edgekd.runtime.chat import chat as chat_with
    from edgekd.runtime.loading import open_model
    from edgekd.runtime.sampling import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    loaded = open_model(model, context_tokens=ctx, n_threads=threads, revision=revision)
    chat_with(loaded, params, lambda: input("> "), lambda text: print(text, end="", flush=True))


@devices_app.command()
def detect(as_json: Json = False) -> None:
    """Describe this machine."""
    from edgekd.devices.detect import detect as detect_machine

    machine = detect_machine().as_dict()
    _print(machine, as_json, "\n".join(f"{key}: {value}" for key, value in machine.items()))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what is missing, and what to type."""
    from dataclasses import asdict

    from edgekd.devices.doctor import diagnose

    checks = diagnose()
    lines = [
        f"{check.status:8} {check.subject}: {check.found}"
        + (f"; {check.advice}" if check.advice else "")
        for check in checks
    ]
    _print([asdict(check) for check in checks], as_json, "\n".join(lines))


def main() -> None:
    """Run the CLI; print what a user can mend as one line, without a traceback."""
    try:
        app()
    except EdgekdError as error:
        raise SystemExit(f"edgekd: {error}") from error


def _need(extra: str, *packages: str) -> None:
    """Refuse to start where one of ``packages`` is missing, naming the extra that brings it."""
    from importlib.util import find_spec

    from edgekd.errors import MissingExtraError

    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(package, extra)


def _parse_layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list such as 0,1,5") from None


def _parse_count(text: str) -> int:
    scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower(), 1)
    try:
        return int(float(text[:-1] if scale > 1 else text) * scale)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no size such as 90M") from None


def _speaker(quiet: bool) -> Any:
    return (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))


def _print(document: Any, as_json: bool, text: str) -> None:
    print(json.dumps(document) if as_json else text)


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
