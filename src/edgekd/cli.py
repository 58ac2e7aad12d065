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

Model = Annotated[
    str, typer.Argument(help="HF folder, hub id, .gguf file or ONNX folder.", metavar="MODEL")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print results only.")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", help="CPU threads.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]


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
