"""Command line: whether an artifact is what it claims to be.

Part of edgekd.cli; the same rules hold.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edgekd.cli_options import Emulate, Json, Quiet, need, print_result
from edgekd.errors import MissingExtraError
from edgekd.progress import Progress, make_progress

app = typer.Typer()


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="A .gguf file or an ONNX folder.")],
    reference: Annotated[
        Path | None, typer.Option(help="The checkpoint it was exported from.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model to compare it with too, over --text.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text, a UTF-8 file.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use, at most.")] = 4096,
    max_kl: Annotated[
        float | None, typer.Option(help="Limit of the KL to the teacher, in nats per token.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Limit of the top-1 agreement with it, such as 0.6.")
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option(help="Limit of the perplexity over the teacher's.")
    ] = None,
    lineage: Annotated[
        bool, typer.Option("--lineage", help="Show all it was made from, checked by hash.")
    ] = False,
    emulate: Emulate = True,
    look_in: Annotated[
        list[Path] | None, typer.Option(help="Where else its sources may lie; repeatable.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check the hashes of ARTIFACT and of its tensors; more with --reference or --teacher.

    With --reference also its weights, tokenizer and logits against the checkpoint's; with --teacher
    what the running file has lost against that, within limits of your own.
    """
    from edgekd.runtime.model_kind import detect_kind

    detect_kind(artifact)
    if lineage:
        _show_lineage(artifact, look_in or [], as_json)
        return
    progress = make_progress(quiet)
    limits = {
        "max_kl_nats": max_kl,
        "min_top1_agreement": min_top1,
        "max_perplexity_ratio": max_perplexity_ratio,
    }
    against_teacher = None
    if any(each is not None for each in (teacher, text, *limits.values())):
        need("gguf", "numpy")
        from edgekd.runtime.quality_budget import TeacherCheck

        against_teacher = TeacherCheck.asked(artifact, teacher, text, tokens, limits)
    report = _check_itself(artifact, reference, emulate, progress)
    if against_teacher is not None:
        report["teacher"] = against_teacher.carry_out(progress)
    if as_json:
        print(json.dumps(report))
        return
    from rich.console import Console

    from edgekd.export.verify_table import render_report

    Console().print(render_report(report))


def _check_itself(
    artifact: Path, reference: Path | None, emulate: bool, progress: Progress
) -> dict[str, Any]:
    """Return the report of files, of tensors, and with a ``reference`` of weights and logits."""
    from edgekd.manifest import TENSORS_KEY, check_files, manifest_path, read_manifest

    manifest = read_manifest(manifest_path(artifact))
    check_files(artifact if artifact.is_dir() else artifact.parent, manifest)
    report: dict[str, Any] = {"path": str(artifact), "files": "unchanged"}
    if reference is None:
        report["fidelity"] = "unavailable: give --reference CHECKPOINT"
    else:
        need("export", "torch", "transformers", "gguf", "onnx")
        from edgekd.export.verify import verify_as_recorded

        progress.say(f"comparing weights, tokenizer and logits with {reference}")
        report |= verify_as_recorded(artifact, reference, manifest["recipe"], on_npu=emulate)
    report["tensors"] = _check_tensors(artifact, manifest, report.pop(TENSORS_KEY, None))
    return report


def _check_tensors(artifact: Path, manifest: dict[str, Any], found: Any) -> str:
    """Return what is to be said of the tensors' hashes; ``found`` where they are known already."""
    from edgekd.manifest import TENSORS_KEY

    if not (recorded := manifest.get(TENSORS_KEY)):
        return (
            "unavailable: the manifest records no hashes of tensors; export the model again, "
            "without --no-verify"
        )
    try:
        need("export", "gguf", "onnx")
    except MissingExtraError as error:
        return f"unavailable: {error}"
    from edgekd.export.tensor_hashes import check_recorded, hash_tensors

    check_recorded(artifact, hash_tensors(artifact) if found is None else found, recorded)
    return f"{len(recorded)} unchanged"


def _show_lineage(artifact: Path, look_in: list[Path], as_json: bool) -> None:
    from dataclasses import asdict

    from edgekd.errors import VerificationError
    from edgekd.lineage import render, walk

    link = walk(artifact, look_in)
    print_result(asdict(link), as_json, render(link))
    if changed := link.changed():
        names = ", ".join(one.name for one in changed)
        raise VerificationError(f"no longer what the manifests recorded: {names}")
