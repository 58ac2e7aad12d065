"""Command line: each command parses, calls one function, and prints.

Nothing heavy is imported before a command runs, so ``--help`` stays instant.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from edgekd.cli_bench import app as bench_app
from edgekd.cli_devices import app as devices_app
from edgekd.cli_distill import app as distill_app
from edgekd.cli_eval import app as eval_app
from edgekd.cli_help import ByPlace
from edgekd.cli_options import (
    Emulate,
    Json,
    Model,
    Quiet,
    Revision,
    need,
    parse_bytes,
    print_result,
)
from edgekd.cli_report import app as report_app
from edgekd.cli_serve import app as serve_app
from edgekd.cli_verify import app as verify_app
from edgekd.errors import EdgekdError
from edgekd.no_memory import ADVICE, is_out_of_memory
from edgekd.progress import make_progress

app = typer.Typer(
    cls=ByPlace, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(distill_app)
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app)
app.add_typer(report_app)
app.add_typer(serve_app)
app.add_typer(verify_app)
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
    if (kl_nats := result.pruned.kl_nats) is not None:
        print(f"freshly pruned student: KL to teacher {kl_nats:.4f}")
    print(
        f"everything lies in {out}; next:\n"
        f"  edgekd chat {out}/student-int4-q4_0.gguf\n"
        f"  edgekd serve {out}/student-int4-q4_0.gguf\n"
        f"  edgekd bench {out}/student-int4-q4_0.gguf {out}/student-int4-onnx"
    )


@app.command()
def export(
    model: Model,
    format: Annotated[str, typer.Option(help="gguf or onnx.")],
    out: Annotated[Path, typer.Option(help="File (gguf) or folder (onnx) to write.")],
    quant: Annotated[
        str,
        typer.Option(
            help="f32, f16, q8_0 (int8), q4_0 (int4), q4_1; GGUF also bf16, q4_k_m, q5_k_m, q6_k."
        ),
    ] = "q4_0",
    head: Annotated[
        Literal["q8_0", "q4_0"], typer.Option(help="Of embedding and head, with q4_0 and q4_1.")
    ] = "q8_0",
    target: Annotated[
        Literal["cpu", "cuda", "qnn"],
        typer.Option(help="Of an ONNX folder; cuda (fp16) is untested, qnn is a Hexagon NPU."),
    ] = "cpu",
    soc: Annotated[str, typer.Option(help="Chip to compile for (qnn), such as sm8750.")] = "sm8650",
    ctx: Annotated[int, typer.Option(help="Tokens of context, fixed (qnn).")] = 1024,
    prefill: Annotated[int, typer.Option(help="Tokens of a prompt at a time (qnn).")] = 64,
    max_binary: Annotated[
        str, typer.Option(help="Of one compiled file (qnn); larger models are cut by layers.")
    ] = "1GB",
    emulate: Emulate = True,
    calibrate_activations: Annotated[
        Path | None,
        typer.Option(help="Text to round activations to 16-bit integers on (qnn): W4A16."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Text to round on: GPTQ for q4_0, else an importance matrix."),
    ] = None,
    calibrate_tokens: Annotated[int, typer.Option(help="Tokens of that text to use.")] = 16_384,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix to round with: llama.cpp's GGUF file.")
    ] = None,
    save_imatrix: Annotated[
        Path | None, typer.Option(help="Where to keep the one measured by --calibrate.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Of the GGUF file, such as 80MB: q8_0 where --calibrate shows need."),
    ] = None,
    bits_per_weight: Annotated[
        float | None, typer.Option(help="The same by bits, 4.5 to 8.5, scales included.")
    ] = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="Also write a Modelfile for Ollama (gguf).")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Check what was written against MODEL before it appears.")
    ] = True,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write MODEL as GGUF or ONNX, verified against its own weights.

    With --no-verify it is only written, several times as fast; edgekd verify checks it later.
    """
    if format not in ("gguf", "onnx"):
        raise typer.BadParameter(f"{format!r} is neither gguf nor onnx", param_hint="--format")
    if calibrate_activations is not None and target != "qnn":
        raise typer.BadParameter(
            "only graphs for --target qnn have them", param_hint="--calibrate-activations"
        )
    need("export", "torch", "transformers", "gguf", "onnx")
    from edgekd.export.export_model import export_model
    from edgekd.export.export_options import Budget, CalibrationOptions

    budget = npu = None
    if target == "qnn":
        from edgekd.export.to_npu import NpuOptions

        npu = NpuOptions(
            soc=soc,
            context_tokens=ctx,
            prefill_tokens=prefill,
            activations_text=calibrate_activations,
            emulate=emulate,
            max_binary_bytes=parse_bytes(max_binary),
        )
    if size is not None or bits_per_weight is not None:
        file_bytes = None if size is None else parse_bytes(size)
        budget = Budget(file_bytes=file_bytes, bits_per_weight=bits_per_weight)
    report = export_model(
        model,
        "gguf" if format == "gguf" else "onnx",
        out,
        quant=quant,
        head=head,
        target=target,
        npu=npu,
        calibration=CalibrationOptions(
            text=calibrate,
            n_tokens=calibrate_tokens,
            imatrix=imatrix,
            save_imatrix=save_imatrix,
        ),
        budget=budget,
        with_modelfile=modelfile,
        verify=verify,
        revision=revision,
        progress=make_progress(quiet),
    )
    print_result(report, as_json, _export_summary(report, model))


@app.command()
def package(
    artifact: Annotated[Path, typer.Argument(help="An ONNX folder, exported with --target qnn.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    target: Annotated[Literal["android"], typer.Option(help="What it is for.")] = "android",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Gather what a phone needs of ARTIFACT in one folder, with scripts for adb and Termux."""
    need("export", "torch", "transformers", "gguf", "onnx")
    from edgekd.export.package_android import package_android

    report = package_android(artifact, out)
    text = f"{report['path']}: for {report['soc']}, model {report['model']}, scripts " + (
        f"{report['scripts']}; on the workstation: {report['commands'][0]}; in Termux: "
        f"{report['commands'][1]}"
    )
    print_result(report, as_json, text)


@app.command()
def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """Say what is installed, what is missing, and what to type; --quiet leaves out what is well."""
    from dataclasses import asdict

    from edgekd.devices.doctor import diagnose

    checks = [check for check in diagnose() if not (quiet and check.status == "ok")]
    lines = [
        f"{check.status:8} {check.subject}: {check.found}"
        + (f" ({check.evidence})" if check.evidence else "")
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
    except Exception as error:
        if is_out_of_memory(error):
            raise SystemExit(f"edgekd: {ADVICE}") from error
        raise


def _export_summary(report: dict[str, Any], model: str) -> str:
    from edgekd.export.export_model import UNVERIFIED
    from edgekd.units import format_bytes

    if (unverified := report.get(UNVERIFIED)) is not None:
        checkpoint = model if Path(model).is_dir() else "CHECKPOINT"
        return (
            f"{report['path']}: {format_bytes(report['bytes'])}, {unverified}; check it with\n"
            f"  edgekd verify {report['path']} --reference {checkpoint}" + _npu_summary(report)
        )
    arithmetic, rounding = report["arithmetic"], report["rounding"]
    return (
        f"{report['path']}: {format_bytes(report['bytes'])}, "
        f"{report['equal_matrices']} matrices equal to the checkpoint's blocks\n"
        f"  engine against its own weights in torch: KL {arithmetic['kl_nats']:.2e} nats, "
        f"top-1 {arithmetic['top1_agreement']:.1%}\n"
        f"  rounding against the float checkpoint:   KL {rounding['kl_nats']:.2e} nats, "
        f"top-1 {rounding['top1_agreement']:.1%}" + _npu_summary(report)
    )


def _npu_summary(report: dict[str, Any]) -> str:
    """Return what an export for an NPU adds: where it was seen to run, and how well."""
    if (npu := report.get("npu")) is None:
        return ""
    lines = [f"\n  NPU: {npu['label']}"]
    if (n_parts := len(npu["parts"])) > 1:
        lines.append(f", in {n_parts} parts")
    if npu["compiled"]:
        left, soc = sum(npu["nodes_on_cpu"].values()), npu["compiled"]["soc"]
        lines.append(f" for {soc}, {left} of {sum(npu['nodes'].values())} nodes on the CPU")
    if seen := report.get("on_npu"):
        lines.append(f"; KL {seen['to_torch']['kl_nats']:.2e} nats to torch")
    return "".join(lines)
