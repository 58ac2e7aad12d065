"""Results in the form of llama.cpp's llama-bench, so that tools made for it read ours, and back.

Fields and their types are those of llama-bench's ``-o jsonl``. Its standard deviations are not
trusted when read: everything is computed again from ``samples_ns``.
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from edgekd.errors import DataError
from edgekd.runtime.bench_settings import Scenario
from edgekd.units import format_count
from edgekd.untrusted import parse_json

PHONE_SCHEMA = "edgekd.bench-phone/1"
"""Of a document that holds rows of a llama-bench that ran on a phone."""
# What llama-bench writes for a setting that was left alone, on a CPU.
_DEFAULTS: dict[str, Any] = {
    "gpu_info": "",
    "backends": "CPU",
    "n_batch": 512,
    "n_ubatch": 512,
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "poll": 50,
    "type_k": "f16",
    "type_v": "f16",
    "n_gpu_layers": -1,
    "n_cpu_moe": 0,
    "split_mode": "layer",
    "main_gpu": 0,
    "no_kv_offload": False,
    "flash_attn": -1,
    "devices": "auto",
    "tensor_split": "0.00",
    "tensor_buft_overrides": "none",
    "load_mode": "auto",
    "lazy_mode": "auto",
    "embeddings": False,
    "no_op_offload": 0,
    "no_host": False,
    "repack": True,
    "fit_target": 0,
    "fit_min_ctx": 0,
}
_LONGEST_NS = 1e18  # 31 years
_PACKAGES = {"llama.cpp": "llama-cpp-python"}


def llama_bench_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each scenario of each model in ``document``."""
    return [
        _row(document, result, scenario)
        for result in document["results"]
        for scenario in result["scenarios"]
    ]


def processor_label(machine: dict[str, Any]) -> str:
    """Return the processor's name; of an emulated one also what it is emulated on."""
    name = machine["processor"] or machine["architecture"]
    real = machine.get("emulated_on")
    return f"{name} (emulated on {real})" if real else str(name)


def to_jsonl(document: dict[str, Any]) -> str:
    """Return the rows of ``document``, one JSON object a line."""
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in llama_bench_rows(document))


def is_llama_bench(parsed: Any) -> bool:
    """Return whether ``parsed`` is a list of llama-bench's rows."""
    return (
        isinstance(parsed, list)
        and bool(parsed)
        and all(isinstance(row, dict) and "n_prompt" in row for row in parsed)
    )


def scenario_of(row: dict[str, Any]) -> Scenario:
    """Return which scenario ``row`` measured.

    Raises:
        DataError: it measured a prefill and a decode in one (``-pg``), which has no rate.
    """
    try:
        n_prompt, n_gen, depth = row["n_prompt"], row["n_gen"], row.get("n_depth", 0)
    except KeyError as error:
        raise DataError(f"a row of llama-bench without {error}") from error
    if any(type(count) is not int or count < 0 for count in (n_prompt, n_gen, depth)):
        raise DataError(
            f"a row of llama-bench with {n_prompt!r:.40} prompt and {n_gen!r:.40} generated tokens "
            f"at depth {depth!r:.40}; whole numbers are expected, write it with -o json or jsonl"
        )
    if bool(n_prompt) == bool(n_gen):
        raise DataError(
            f"a row of llama-bench with {n_prompt} prompt and {n_gen} generated tokens mixes two "
            "rates; measure with -p and -n, not with -pg"
        )
    kind: Any = "prefill" if n_prompt else "decode"
    return Scenario(kind=kind, n_tokens=n_prompt or n_gen, n_depth=depth)


def samples_of(row: dict[str, Any]) -> list[float]:
    """Return the seconds of each repetition in ``row``.

    Raises:
        DataError: it keeps no samples, as in llama-bench's CSV and SQL.
    """
    samples = row.get("samples_ns")
    if not isinstance(samples, list) or not samples or not all(map(_is_time, samples)):
        raise DataError("a row of llama-bench without samples_ns; write it with -o json or jsonl")
    return [sample / 1e9 for sample in samples]


def parse_rows(text: str) -> list[dict[str, Any]] | None:
    """Return the rows of llama-bench's JSON or JSONL in ``text``; None where it is neither."""
    for parse in (parse_json, _parse_lines):
        try:
            parsed = parse(text)
        except (ValueError, RecursionError):
            continue
        if is_llama_bench(parsed):
            return list(parsed)
    return None


def _is_time(sample: Any) -> bool:
    return type(sample) in (int, float) and 0 < sample < _LONGEST_NS


def _parse_lines(text: str) -> list[Any]:
    return [parse_json(line) for line in text.splitlines() if line.strip()]


def _row(
    document: dict[str, Any], result: dict[str, Any], scenario: dict[str, Any]
) -> dict[str, Any]:
    is_prefill = scenario["kind"] == "prefill"
    samples_ns = [round(seconds * 1e9) for seconds in scenario["samples_s"]]
    rates = [scenario["n_tokens"] * 1e9 / sample for sample in samples_ns]
    package = _PACKAGES.get(result["engine"], result["engine"])
    version = document["tools"].get(package, "unknown")
    return {
        **_DEFAULTS,
        "build_commit": f"{package}-{version}",
        "build_number": 0,
        "cpu_info": processor_label(document["machine"]),
        "model_filename": result["model"],
        "model_type": _model_type(result),
        "model_size": result["file_bytes"],
        "model_n_params": int(result["facts"]["n_parameters"]["value"] or 0),
        "n_threads": result["n_threads"],
        "n_prompt": scenario["n_tokens"] if is_prefill else 0,
        "n_gen": 0 if is_prefill else scenario["n_tokens"],
        "n_depth": scenario["n_depth"],
        "test_time": document["created"].replace("+00:00", "Z"),
        "avg_ns": round(statistics.fmean(samples_ns)),
        "stddev_ns": round(_stdev(samples_ns)),
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": _stdev(rates),
        "samples_ns": samples_ns,
        "samples_ts": rates,
    }


def _model_type(result: dict[str, Any]) -> str:
    n_parameters = result["facts"]["n_parameters"]["value"]
    size = format_count(n_parameters) if n_parameters else "?B"
    return f"{result['kind']} {size} {PurePath(result['model']).stem}"


def _stdev(samples: Iterable[float]) -> float:
    found = list(samples)
    return statistics.stdev(found) if len(found) > 1 else 0.0
