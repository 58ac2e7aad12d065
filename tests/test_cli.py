"""The real entry point in a process of its own: exit code, last line of stdout, error text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "onnxruntime", "llama_cpp", "numpy")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['edgekd', '--help']\nfrom edgekd.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert "export" in result.stdout


def test_export_then_verify_then_a_changed_byte_is_found(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    exported = run("export", str(tiny_folder), "--format", "gguf", "--out", str(out), "--json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout.splitlines()[-1])["bytes"] == out.stat().st_size
    assert run("verify", str(out), "--reference", str(tiny_folder)).returncode == 0
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    broken = run("verify", str(out))
    assert broken.returncode == 1
    assert "manifest says" in broken.stderr


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no model at"),
        (b"GGUF\x03\x00\x00\x00\xff", "cut short"),
        (b"PK\x03\x04 not a model", "is no model"),
    ],
)
def test_bad_models_give_one_line_and_leave_nothing(
    content: bytes | None, complaint: str, tmp_path: Path
) -> None:
    model, out = tmp_path / "model.gguf", tmp_path / "out.gguf"
    if content is not None:
        model.write_bytes(content)
    result = run("export", str(model), "--format", "gguf", "--out", str(out))
    assert result.returncode == 1
    assert complaint in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [path for path in tmp_path.iterdir() if path != model] == []


def test_a_full_disk_during_export_leaves_nothing_half_written(
    tiny_folder: Path, tmp_path: Path
) -> None:
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from edgekd.cli import main\nmain()"
    )
    arguments = ["export", str(tiny_folder), "--format", "gguf", "--out", str(tmp_path / "x.gguf")]
    # A coverage run would hit the same limit with its own file.
    environment = {key: value for key, value in os.environ.items() if "COVERAGE" not in key}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    assert "cannot write" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    out = blocker / "x.gguf"
    result = run("export", str(tiny_folder), "--format", "gguf", "--out", str(out))
    assert result.returncode == 1
    assert "cannot write" in result.stderr.splitlines()[-1]


def test_a_wrong_option_is_a_usage_error(tiny_folder: Path) -> None:
    assert run("export", str(tiny_folder), "--format", "pt", "--out", "x").returncode == 2


def test_doctor_and_detect_speak_json() -> None:
    assert json.loads(run("devices", "detect", "--json").stdout.splitlines()[-1])["n_usable_cores"]
    assert json.loads(run("doctor", "--json").stdout.splitlines()[-1])
