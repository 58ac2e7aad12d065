"""``edgekd devices`` through the real entry point."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("torch", "numpy", "onnxruntime", "llama_cpp")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekd", "devices", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def document(*arguments: str) -> Any:
    result = run(*arguments, "--json", "--quiet")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def refusal(*arguments: str) -> str:
    result = run(*arguments)
    assert result.returncode == 1, result
    (line,) = result.stderr.strip().splitlines()
    return line


def test_list_and_show_tell_facts_with_their_sources() -> None:
    listed = {spec["name"]: spec for spec in document("list")}
    shown = document("show", "jetson-agx-orin-64gb")
    assert shown["facts"] == listed["jetson-agx-orin-64gb"]["facts"]
    assert shown["facts"]["bandwidth_bytes_per_s"]["values"] == [204_800_000_000]
    text = run("show", "google-tensor-g4").stdout
    assert "bandwidth_bytes_per_s: unknown, " in text
    assert "https://hothardware.com" in text
    assert "raspberry-pi-5" in run("list").stdout


def test_detect_reads_this_machines_sensors_or_gives_reasons() -> None:
    found = document("detect")
    power = found["sensors"]["power"]
    assert (power["value"] is None) == (power["status"] == "unavailable")
    assert power["value"] is not None or power["reason"]
    assert found["n_usable_cores"] >= 1


def test_a_phone_that_is_not_there_is_one_line() -> None:
    assert "no phone answers as 'nowhere:1'" in refusal("detect", "--adb", "nowhere:1")


def test_fit_on_a_published_device(tiny_gguf: Path) -> None:
    report = document("fit", str(tiny_gguf), "--on", "raspberry-pi-5", "--ctx", "64")
    assert report["fits"] is True
    assert {p["basis"] for p in report["predictions"]} == {"published measurements"}
    decode = report["predictions"][0]["decode"]
    assert decode["low"] < decode["value"] < decode["high"]
    assert report["predictions"][0]["prefill"]["value"] is None


def test_fit_finds_what_meets_a_wish(tiny_folder: Path) -> None:
    wish = ["--memory", "2kB", "--tokens-per-s", "1"]
    report = document("fit", str(tiny_folder), "--on", "apple-m4", "--quant", "int4", *wish)
    assert report["fits"] is False and report["format"] == "Q4_0"
    assert not any(option["meets"] for option in report["options"])
    assert report["largest_student"] is None
    assert "does not fit" in run("fit", str(tiny_folder), "--on", "apple-m4", *wish).stdout


def test_fit_predicts_from_own_measurements(tiny_gguf: Path, tmp_path: Path) -> None:
    rates = {"prefill": 700.0, "decode": 50.0}
    result = {
        "model": str(tiny_gguf),
        "engine": "llama.cpp",
        "scenarios": [
            {"kind": k, "n_tokens": 24, "n_depth": 0, "tokens_per_s": {"median": rate}}
            for k, rate in rates.items()
        ],
        "warm_start": {"load_s": 0.5},
    }
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"machine": {}, "results": [result]}))
    report = document("fit", str(tiny_gguf), "--measured", str(file), "--ctx", "24")
    (prediction,) = report["predictions"]
    assert prediction["basis"] == "own measurements"
    assert prediction["decode"]["value"] == pytest.approx(50, rel=0.1)
    assert prediction["prefill"]["value"] == pytest.approx(700)
    assert prediction["load"]["value"] == pytest.approx(0.5)


def test_fit_probes_this_machine(tiny_gguf: Path) -> None:
    report = document("fit", str(tiny_gguf))
    (prediction,) = report["predictions"]
    assert (prediction["basis"], report["device"]) == ("bandwidth alone", "this")
    assert prediction["decode"]["value"] > 0


def test_mistakes_are_one_line(tiny_gguf: Path, tmp_path: Path) -> None:
    assert "known are" in refusal("show", "toaster")
    assert "known are" in refusal("fit", str(tiny_gguf), "--on", "toaster")
    assert "choose one of" in refusal("fit", str(tiny_gguf), "--on", "apple-m4", "--quant", "q3")
    assert "no model at" in refusal("fit", str(tmp_path / "none"), "--on", "apple-m4")
    missing = ["--measured", str(tmp_path / "none.json")]
    assert "cannot read" in refusal("fit", str(tiny_gguf), "--on", "apple-m4", *missing)
    assert run("fit", str(tiny_gguf), "--on", "apple-m4", "--tokens-per-s", "0").returncode == 2


def test_nothing_heavy_is_imported(tiny_gguf: Path) -> None:
    code = (
        f"import sys\nsys.argv = ['edgekd', 'devices', 'fit', {str(tiny_gguf)!r}, '--on', "
        "'apple-m4']\nfrom edgekd.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
