"""What the measuring process does for the quality of a model: edgekd eval, and nothing else."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgekd.runtime.eval_options import EvalOptions
from edgekd.runtime.eval_reference import check_evaluation, record_reference
from edgekd.runtime.evaluate import ModelQuality, evaluate
from edgekd.runtime.loading import default_threads


def check(models: list[str], options: dict[str, Any]) -> None:
    """Check what can be known before anything runs."""
    check_evaluation(models, _options(options))


def record(options: dict[str, Any], folder: str) -> None:
    """Run the teacher and leave in ``folder`` what it said."""
    record_reference(_options(options), Path(folder))


def measure(model: str, options: dict[str, Any], recorded: str | None) -> dict[str, Any]:
    """Return the quality of ``model``, the settings, and what it was compared with."""
    place = Path(recorded) if recorded else None
    found = evaluate([model], _options(options), recorded=place)
    return {
        "quality": _document(found.models[0]),
        "settings": found.settings,
        "reference": found.reference,
    }


def _document(quality: ModelQuality) -> dict[str, Any]:
    """Return ``quality`` of docs/schemas/bench-1.json."""
    assert quality.text
    return {
        "weights_sha256": quality.weights_sha256,
        "windows_sha256": quality.windows_sha256,
        **asdict(quality.text),
    }


def _options(values: dict[str, Any]) -> EvalOptions:
    paths = {name: Path(values[name]) for name in ("reference", "text") if values[name]}
    threads = values["n_threads"] or default_threads()
    return EvalOptions(**{**values, **paths, "n_threads": threads})
