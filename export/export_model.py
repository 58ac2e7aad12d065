"""``edgekd export``: any model in, a verified artifact with its manifest out.

What needs torch is imported where it is used: a GGUF that is neither checked nor rounded on data
is written without it.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekd.errors import ExportError, ModelError, VerificationError
from edgekd.export.checkpoint import Checkpoint, open_checkpoint, read_licence
from edgekd.export.export_options import Budget, CalibrationOptions
from edgekd.export.genai_config import Target
from edgekd.export.input_faults import check_input
from edgekd.export.modelfile import modelfile, modelfile_path
from edgekd.export.plan import HeadQuant, Plan, describe_rounding, make_plan, parse_quant
from edgekd.export.to_gguf import write_gguf
from edgekd.export.trained_rows import with_trained_rows
from edgekd.files import atomic_file, atomic_folder, size_of, write_text_atomic
from edgekd.manifest import (
    TENSORS_KEY,
    Manifest,
    describe_files,
    manifest_path,
    manifest_text,
    write_manifest,
)
from edgekd.progress import Progress, Silence
from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.model_kind import REJECTED, ModelKind, locate_model
from edgekd.runtime.static_model import is_static
from edgekd.untrusted import untrusted

if TYPE_CHECKING:
    from edgekd.export.to_npu import NpuOptions

Format = Literal["gguf", "onnx"]
UNVERIFIED = "unverified"
"""Key of a report that holds no check."""


def export_model(
    model: str,
    output_format: Format,
    out: Path,
    *,
    quant: str = "q4_0",
    head: HeadQuant = "q8_0",
    target: Target | Literal["qnn"] = "cpu",
    npu: "NpuOptions | None" = None,
    calibration: CalibrationOptions | None = None,
    budget: Budget | None = None,
    with_modelfile: bool = False,
    verify: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``model`` to ``out``, verify it, and return its manifest's verification.

    ``head`` is the grid of embedding and head in a q4_0 artifact, ``target`` what an ONNX folder
    is written for, with ``npu`` its sizes and chip for qnn; ``calibration`` says on which data
    matrices are rounded, ``budget`` how large they may be; ``with_modelfile`` adds one for Ollama.
    The artifact appears at ``out`` only once it has passed every check, on the CPU, and for qnn
    what was compiled a check in the emulator; without ``verify`` it is not looked at again, which
    its manifest then says.

    Raises:
        ExportError: the model has no such form.
        ModelError: it lacks a tensor, or holds what is no number, or its chat template is broken.
        VerificationError: what was written is not what it should be; ``out`` is as it was, and the
            artifact is kept as ``out``.rejected with the reason beside it.
        OutputError: ``out`` cannot be written; it is as it was.
    """
    if output_format == "onnx" and with_modelfile:
        raise ExportError("Ollama runs GGUF files; leave --modelfile out, or use --format gguf")
    if output_format == "gguf" and target != "cpu":
        raise ExportError(f"a GGUF is the same for every device; leave --target {target} out")
    with as_checkpoint(model, revision) as checkpoint:
        check_input(checkpoint)  # before anything is written
        said = progress or Silence()
        plan = make_plan(checkpoint, parse_quant(quant), head)
        if plan.fallen:
            said.say(
                f"{len(plan.fallen)} matrices have rows that are no multiple of 256 and are stored "
                "in a larger type than a K-quant"
            )
        with tempfile.TemporaryDirectory(prefix="edgekd-rows-") as folder:
            plan = _on_data(checkpoint, plan, calibration, budget, Path(folder), said)
            if output_format == "gguf":
                report = _export_gguf(checkpoint, plan, out, said, verify=verify)
                if with_modelfile:
                    write_text_atomic(modelfile_path(out), modelfile(checkpoint, out))
                return report
            if target == "qnn":
                return _export_npu(checkpoint, plan, npu, out, said, verify=verify)
            return _export_onnx(checkpoint, plan, target, out, said, verify=verify)


def _on_data(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: CalibrationOptions | None,
    budget: Budget | None,
    folder: Path,
    progress: Progress,
) -> Plan:
    """Return ``plan`` with what was trained, or is now measured and rounded, kept in ``folder``."""
    options = calibration or CalibrationOptions()
    if budget is not None:
        from edgekd.export.calibrate import plan_for_budget

        plan = plan_for_budget(checkpoint, plan, budget, options, progress)
    plan = with_trained_rows(checkpoint, plan, folder)
    if options == CalibrationOptions():
        return plan
    from edgekd.export.calibrate import calibrate

    return calibrate(checkpoint, plan, options, folder, progress)


def _export_gguf(
    checkpoint: Checkpoint, plan: Plan, out: Path, progress: Progress, *, verify: bool
) -> dict[str, Any]:
    if out.is_dir():
        raise ExportError(f"{out} is a folder; a GGUF is one file, give --out {out / 'model.gguf'}")
    # Both are whole before either is renamed.
    with atomic_file(manifest_path(out)) as partial_manifest, atomic_file(out) as partial:
        write_gguf(checkpoint, plan, partial, progress)
        report = _report(partial, out, checkpoint, plan, progress, verify=verify)
        manifest = _manifest(checkpoint, plan, report, [partial])
        partial_manifest.write_text(manifest_text(manifest), "utf-8")
    fallen = {"fallen_tensors": list(plan.fallen)} if plan.fallen else {}
    return {"path": str(out), "bytes": size_of(out), **fallen, **report}


def _export_onnx(
    checkpoint: Checkpoint,
    plan: Plan,
    target: Target,
    out: Path,
    progress: Progress,
    *,
    verify: bool,
) -> dict[str, Any]:
    from edgekd.export.to_onnx import write_onnx

    _check_folder(out)
    with atomic_folder(out) as partial:
        progress.say(f"writing {out}")
        write_onnx(checkpoint, plan, partial, target)
        report = _report(partial, out, checkpoint, plan, progress, verify=verify)
        files = [path for path in partial.iterdir() if path.is_file()]
        manifest = _manifest(checkpoint, plan, report, files, target)
        write_manifest(manifest_path(partial), manifest)
    return {"path": str(out), "bytes": size_of(out), **report}


def _export_npu(
    checkpoint: Checkpoint,
    plan: Plan,
    asked: "NpuOptions | None",
    out: Path,
    progress: Progress,
    *,
    verify: bool,
) -> dict[str, Any]:
    from edgekd.export.to_npu import NpuOptions, write_npu

    options = asked or NpuOptions()
    _check_folder(out)
    with atomic_folder(out) as partial:
        progress.say(f"writing {out}")
        npu = write_npu(checkpoint, plan, partial, options, progress)
        on_npu = options.emulate
        report = _report(partial, out, checkpoint, plan, progress, verify=verify, on_npu=on_npu)
        if "on_npu" in report:
            npu["label"] = report["on_npu"]["label"]
        report["npu"] = npu
        files = [path for path in partial.iterdir() if path.is_file()]
        manifest = _manifest(checkpoint, plan, report, files, "qnn", {"npu": options.describe()})
        write_manifest(manifest_path(partial), manifest)
    return {"path": str(out), "bytes": size_of(out), **report}


def _check_folder(out: Path) -> None:
    is_ours = (out / "model.onnx").is_file() or is_static(out)
    if out.exists() and not is_ours and (out.is_file() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is no ONNX folder of ours; choose another --out")


@contextmanager
def _kept_if_rejected(partial: Path, out: Path) -> Iterator[None]:
    """Keep what fails its checks as OUT.rejected, with the reason beside it."""
    try:
        yield
    except VerificationError as error:
        rejected = out.with_name(f"{out.name}{REJECTED}")
        if rejected.is_dir():
            shutil.rmtree(rejected)
        else:
            rejected.unlink(missing_ok=True)
        partial.rename(rejected)
        write_text_atomic(rejected.with_name(f"{rejected.name}.txt"), f"{error}\n")
        raise VerificationError(f"{error} (kept as {rejected})") from error


def _report(
    partial: Path,
    out: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    progress: Progress,
    *,
    verify: bool,
    on_npu: bool = False,
) -> dict[str, Any]:
    """Return the report of every check of ``partial``, or that there was none."""
    if not verify:
        return {UNVERIFIED: "exported without verification"}
    from edgekd.export.verify import verify_against_checkpoint

    progress.say("verifying weights, tokenizer, chat template and logits against the checkpoint")
    with _kept_if_rejected(partial, out):
        return verify_against_checkpoint(partial, checkpoint, plan, on_npu=on_npu)


def _manifest(
    checkpoint: Checkpoint,
    plan: Plan,
    report: dict[str, Any],
    files: list[Path],
    target: str = "cpu",
    settings: dict[str, Any] | None = None,
) -> Manifest:
    source = {
        "role": "checkpoint",
        "name": checkpoint.folder.name,
        "weights_sha256": checkpoint.weights_sha256(),
    }
    return Manifest(
        kind="artifact",
        files=describe_files(files),
        made_from=[source],
        recipe={
            "quant": plan.quant,
            "head": plan.head,
            "target": target,
            "tensor_types": plan.types,
            **describe_rounding(plan),
            **(settings or {}),
        },
        verification=report,
        tensors_sha256=report.pop(TENSORS_KEY, {}),  # too long for the report that is shown
        licence=read_licence(checkpoint.folder),
    )


@contextmanager
def as_checkpoint(model: str, revision: str | None = None) -> Iterator[Checkpoint]:
    """Yield ``model`` as a checkpoint; a GGUF is read back into a temporary folder first.

    Raises:
        ModelError: it is no model, or an ONNX folder, which cannot be turned back.
    """
    kind, path = locate_model(model, revision)
    if kind is ModelKind.ONNX:
        raise ModelError(f"{path} is an exported ONNX folder; give the checkpoint it was made from")
    if kind is ModelKind.CHECKPOINT:
        yield open_checkpoint(path)
        return
    from edgekd.export.from_gguf import gguf_to_checkpoint

    with tempfile.TemporaryDirectory(prefix="edgekd-") as holder:
        folder = Path(holder) / path.stem
        gguf_to_checkpoint(path, folder)
        yield open_checkpoint(folder)


@contextmanager
def as_text_side(model: str, revision: str | None = None) -> Iterator[Path]:
    """Yield a folder with the tokenizer files of ``model``; its weights are not read.

    Raises:
        ModelError: it is no model, or its tokenizer is not supported.
    """
    kind, path = locate_model(model, revision)
    if kind is not ModelKind.GGUF:
        yield path
        return
    from edgekd.export.from_gguf import write_text_side

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        header = read_gguf_header(path)
        with untrusted(path):
            write_text_side(header, Path(folder))
        yield Path(folder)
