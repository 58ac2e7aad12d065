"""The real entry point in a process of its own: exit code, last line of stdout, error text."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import TEXTS, make_tokenizer, save_tiny_model, save_tokenizer

HEAVY = ("torch", "transformers", "onnxruntime", "llama_cpp", "numpy")


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekd", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


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


def test_export_calibrates_within_a_size_and_verify_needs_no_text(
    tiny_folder: Path, tmp_path: Path
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "tiny.gguf"
    text.write_text(" ".join(TEXTS), "utf-8")
    common = ["export", str(tiny_folder), "--format", "gguf", "--out", str(out)]
    data = ["--calibrate", str(text), "--calibrate-tokens", "64", "--bits-per-weight", "5.2"]
    exported = run(*common, *data, "--json")
    assert exported.returncode == 0, exported.stderr
    recipe = json.loads((tmp_path / "tiny.edgekd.json").read_text())["recipe"]
    assert recipe["calibration"]["n_tokens"] == 64
    assert 5.0 < recipe["budget"]["bits_per_weight"] <= 5.2
    assert run("verify", str(out), "--reference", str(tiny_folder)).returncode == 0
    refused = run(*common, "--size", "5kB", *data[:2])
    assert refused.returncode == 1 and "q4_0 throughout takes" in refused.stderr


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


def _run_on_a_small_disk(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run where no file can grow beyond 20 kB."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from edgekd.cli import main\nmain()"
    )
    # A coverage run would hit the same limit with its own file.
    environment = {key: value for key, value in os.environ.items() if "COVERAGE" not in key}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("verb", ["gguf", "onnx", "prune"])
def test_a_full_disk_leaves_nothing_half_written(
    verb: str, tiny_folder: Path, tmp_path: Path
) -> None:
    command = {
        "gguf": ["export", "--format", "gguf", "--out", str(tmp_path / "x.gguf"), "--quiet"],
        "onnx": ["export", "--format", "onnx", "--out", str(tmp_path / "x"), "--quiet"],
        "prune": ["prune", "--keep", "0,1", "--out", str(tmp_path / "x")],
    }[verb]
    result = _run_on_a_small_disk(*command, str(tiny_folder))
    assert "cannot write" in _one_line(result)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_during_training_is_one_line_and_leaves_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.txt"
    data.write_text("\n\n\n".join(TEXTS))
    models = ["--teacher", str(tiny_folder), "--student", str(tiny_folder), "--data", str(data)]
    options = ["--row-tokens", "32", "--steps", "2", "--out", str(tmp_path / "out"), "--quiet"]
    result = _run_on_a_small_disk("distill", *models, *options)
    assert "cannot write" in _one_line(result)
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    out = blocker / "x.gguf"
    result = run("export", str(tiny_folder), "--format", "gguf", "--out", str(out))
    assert result.returncode == 1
    assert "cannot write" in result.stderr.splitlines()[-1]


def _one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The error of a refused command: exit code 1, one line."""
    assert result.returncode == 1, result
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "holds no text"), (b"\n\n\n", "holds no text"), (b"\xff\xfe", "is no UTF-8 text")],
)
def test_bad_training_data_is_one_line_and_leaves_nothing(
    content: bytes, complaint: str, tiny_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.txt"
    data.write_bytes(content)
    models = ["--teacher", str(tiny_folder), "--student", str(tiny_folder)]
    result = run("distill", *models, "--data", str(data), "--out", str(tmp_path / "out"))
    assert complaint in _one_line(result)
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]


def test_a_student_of_another_tokenizer_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other")
    save_tokenizer(other, make_tokenizer(vocab_size=300))
    data = tmp_path / "data.txt"
    data.write_text("Some text to train on.")
    models = ["--teacher", str(tiny_folder), "--student", str(other)]
    result = run("distill", *models, "--data", str(data), "--out", str(tmp_path / "out"))
    assert "tokenize differently" in _one_line(result)
    assert {path.name for path in tmp_path.iterdir()} == {"data.txt", "other"}


def test_prune_distill_bench_and_chat_from_the_command_line(
    tiny_folder: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    data, pruned, out = tmp_path / "data.txt", tmp_path / "pruned", tmp_path / "out"
    data.write_text("\n\n\n".join(TEXTS))
    arguments = ["--layers", "2", "--data", str(data), "--out", str(pruned), "--json", "--quiet"]
    pruned_report = _json(run("prune", str(tiny_folder), *arguments))
    assert len(pruned_report["kept_layers"]) == 2 and len(pruned_report["block_influence"]) == 3
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'teacher = "{tiny_folder}"\nstudent = "{pruned}"\nrow_tokens = 32\nsteps = 9\n'
    )
    arguments = ["--recipe", str(recipe), "--data", str(data), "--steps", "2", "--out", str(out)]
    trained = run("distill", *arguments, "--json")
    assert _json(trained)["steps"] == 2
    assert "step 2/2" in trained.stderr and "tokens/s" in trained.stderr
    assert "row_tokens = 32" in (out / "recipe.toml").read_text()
    sizes = ["-p", "8", "-n", "4", "-d", "0,8", "-r", "2", "--no-roofline", "--no-cold"]
    saved = tmp_path / "run.json"
    document = _json(run("bench", str(tiny_gguf), *sizes, "--save", str(saved), "--json"))
    assert document == json.loads(saved.read_text())
    names = [entry["name"] for entry in document["results"][0]["scenarios"]]
    assert names == ["pp8", "tg4", "pp8@d8", "tg4@d8"]
    own_user_s = document["results"][0]["warm_start"]["own_user_s"]
    assert document["parent_user_s"] + own_user_s < 1.5  # beyond what the engine needs to start
    assert run("bench", "compare", str(saved), str(saved)).returncode in (0, 3)
    listed = run("bench", str(tiny_gguf), *sizes, "-o", "csv", "--quiet")
    assert len(listed.stdout.splitlines()) == 5 and listed.stderr == ""
    command = [
        sys.executable,
        "-m",
        "edgekd",
        "chat",
        str(tiny_gguf),
        "--max-tokens",
        "4",
        "--json",
    ]
    talked = subprocess.run(
        command, input="hi\n/exit\n", capture_output=True, text=True, check=True
    )
    assert [turn["role"] for turn in _json(talked)["messages"]] == ["user", "assistant"]


def _json(result: subprocess.CompletedProcess[str]) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_serve_takes_a_free_port_and_says_which(tiny_gguf: Path) -> None:
    command = [sys.executable, "-m", "edgekd", "serve", str(tiny_gguf), "--port", "0", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        announced = json.loads(process.stdout.readline())
        try:
            transport = httpx.HTTPTransport(retries=20)
            with httpx.Client(transport=transport) as client:
                health = client.get(announced["url"] + "/health").json()
        finally:
            process.terminate()
        process.communicate(timeout=30)
    assert health == {"status": "ok"}


def test_a_taken_port_is_one_line(tiny_gguf: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", str(tiny_gguf), "--port", str(port))
    assert "choose another --port" in _one_line(result)


def test_a_wrong_option_is_a_usage_error(tiny_folder: Path) -> None:
    assert run("export", str(tiny_folder), "--format", "pt", "--out", "x").returncode == 2


def test_doctor_and_detect_speak_json() -> None:
    assert json.loads(run("devices", "detect", "--json").stdout.splitlines()[-1])["n_usable_cores"]
    assert json.loads(run("doctor", "--json").stdout.splitlines()[-1])


def test_serve_hands_flash_attention_to_the_engine(tiny_gguf: Path) -> None:
    options = ["--port", "0", "--quiet", "--kv-type", "q8_0", "--no-flash-attention"]
    result = run("serve", str(tiny_gguf), *options)
    assert "q8_0 KV cache needs flash attention" in _one_line(result)
