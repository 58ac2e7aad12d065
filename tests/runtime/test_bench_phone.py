import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekd.runtime.bench_compare import compare
from tests.runtime.phones import Phone, StandIn, real_adbd, why_no_adbd
from tests.runtime.ssh_machine import write_program

SMALL = ("-p", "16", "-n", "4", "-r", "2")


@pytest.fixture(params=["stand-in", "adbd"])
def phone(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Phone]:
    if request.param == "stand-in":
        yield StandIn(tmp_path)
        return
    if reason := why_no_adbd():
        pytest.skip(reason)
    with real_adbd(tmp_path) as there:
        yield there


def left_on(phone: Phone) -> list[Path]:
    return list(phone.tmp.glob("edgekd-*"))


def run(phone: Phone, model: Path, *options: str) -> tuple[int, str, str]:
    with phone.bench(model, *SMALL, *options) as process:
        out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


def test_a_phone_runs_the_binary_and_its_rows_come_back(
    phone: Phone, tiny_gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "libggml.so").write_bytes(b"beside the binary")
    saved = tmp_path / "run.json"
    options = ("-d", "0,8", "-t", "3", "--save", str(saved))
    code, out, errors = run(phone, tiny_gguf, *options)
    assert code == 0, errors
    assert "pushing tiny-q4_0.gguf" in errors and "pushing libggml.so" in errors
    assert "measuring 16 and 4" in errors
    assert "pp16  8.0 \u00b1 0.0 tokens/s" in out and "tg4  2.0" in out
    told = phone.told.read_text().split()
    assert told[2:] == ["-p", "16", "-n", "4", "-r", "2", "-o", "json", "-d", "0,8", "-t", "3"]
    document: dict[str, Any] = json.loads(saved.read_text())
    assert document["machine"]["address"] == f"adb://{phone.serial}"
    assert document["machine"]["soc_model"] == "SM8850"
    assert document["conditions"]["after"]["thermal_status"]["value"] == 0
    assert document["valid"] and document["rows"][0]["model_filename"] == str(tiny_gguf)
    assert left_on(phone) == []
    assert compare(str(saved), str(saved), 0.05).verdict == "within limits"


def test_a_phone_that_throttles_makes_the_result_invalid(
    phone: Phone, tiny_gguf: Path, tmp_path: Path
) -> None:
    phone.answer_as("snapdragon_phone", "Thermal Status: 1", "Thermal Status: 3")
    saved = tmp_path / "run.json"
    code, out, errors = run(phone, tiny_gguf, "--save", str(saved))
    assert code == 0 and "INVALID: the phone throttled after the run" in out, errors
    assert compare(str(saved), str(saved), 0.05).verdict == "inconclusive"


def test_a_cut_connection_leaves_nothing_on_the_phone(phone: Phone, tiny_gguf: Path) -> None:
    with phone.bench(tiny_gguf, "-r", "1000") as process:
        assert process.stderr
        assert any("measuring" in line for line in process.stderr)
        assert phone.running() and left_on(phone)
        phone.cut()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [entry for entry in errors.splitlines() if entry.startswith("edgekd: ")]
    assert "was lost while it measured" in line and "connect the phone" in line
    deadline_s = time.monotonic() + 10
    while (phone.running() or left_on(phone)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert phone.running() == [] and left_on(phone) == []


def test_a_binary_that_fails_is_reported_with_its_reason(phone: Phone, tiny_gguf: Path) -> None:
    write_program(phone.binary, "echo 'CANNOT LINK EXECUTABLE: libc++_shared.so' >&2; exit 9")
    code, _, errors = run(phone, tiny_gguf)
    assert code == 1 and "llama-bench failed: CANNOT LINK EXECUTABLE" in errors
    write_program(phone.binary, "echo no rows")
    code, _, errors = run(phone, tiny_gguf)
    assert code == 1 and "no rows, but 'no rows'" in errors
    assert left_on(phone) == []


def test_a_phone_without_room_is_reported_before_a_push(phone: Phone, tiny_gguf: Path) -> None:
    """The df there is a stand-in, which says what toybox says of a full phone."""
    said = "/dev/block/dm-51 232000000 231999950 50 100% /data/user/0"
    write_program(phone.programs / "df", f"echo 'Filesystem 1K-blocks Used'; echo '{said}'")
    code, _, errors = run(phone, tiny_gguf)
    assert code == 1 and "51.2 kB free in /data/local/tmp" in errors
    assert "pushing" not in errors


def test_a_phone_that_is_not_there_is_named(phone: Phone, tiny_gguf: Path) -> None:
    phone.cut()
    code, _, errors = run(phone, tiny_gguf)
    assert code == 1 and "does not answer" in errors and "'adb devices'" in errors


def test_what_a_phone_cannot_do_is_refused_first(
    tmp_path: Path, tiny_onnx: Path, tiny_gguf: Path
) -> None:
    phone = StandIn(tmp_path)
    assert "is no GGUF" in run(phone, tiny_onnx)[2]
    assert "has no soak" in run(phone, tiny_gguf, "--soak", "1")[2]
    assert run(phone, tiny_gguf, "-o", "html")[0] == 2
    phone.binary.unlink()
    assert "is no file" in run(phone, tiny_gguf)[2]
