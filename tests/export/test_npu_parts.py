"""Models that are cut into parts for NPUs: how they are cut, and that it changes no answer."""

import json
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.errors import ExportError, ModelError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.export_model import export_model
from edgekd.export.npu_parts import cut_evenly, cut_into_parts, piece_bytes
from edgekd.export.package_android import package_android
from edgekd.export.plan import Quant, make_plan
from edgekd.export.to_npu import PLACEMENT_FILE, NpuOptions, check_binaries
from edgekd.export.verify import verify_as_recorded
from edgekd.manifest import read_manifest
from edgekd.runtime.loading import open_model
from edgekd.runtime.model_facts import read_facts
from edgekd.runtime.model_kind import ModelKind
from edgekd.runtime.npu_engine import NpuEngine
from edgekd.runtime.static_model import Compiled, part_names, read_static
from tests.conftest import TEXTS
from tests.export.npu_shapes import CONTEXT, PREFILL, PROMPT, needs_qnn, write_uncompiled
from tests.export.tiny_models import save_model

LIMIT_BYTES = 350_000
"""Of the tiny model's four pieces of 150 to 160 kB, two fit."""
SINGLE_TOKENS = (7, 9, 11)
NPU_LABEL = "verified-in-emulator"


def _logits(folder: Path, provider: str = "cpu") -> NDArray[np.float32]:
    """Return the logits after each token: a prompt of two pieces, then tokens one by one."""
    engine = NpuEngine(folder, CONTEXT, 1, provider, require_npu=provider == "qnn")
    single = [engine.forward([token])[None] for token in ()]
    found = [engine.forward(PROMPT, every_logit=True), *single]
    found += [engine.forward([token])[None] for token in SINGLE_TOKENS]
    engine.close()
    return np.concatenate(found)


def _export(model: Path, out: Path, **options: object) -> Path:
    chosen = NpuOptions(soc="sm8750", context_tokens=CONTEXT, prefill_tokens=PREFILL)
    export_model(str(model), "onnx", out, target="qnn", npu=replace(chosen, **options))  # type: ignore[arg-type]
    return out
