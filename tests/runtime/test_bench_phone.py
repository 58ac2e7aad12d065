import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgekd.runtime.bench_compare import compare
from edgekd.runtime.bench_remote_tied import clean
from tests.runtime.phones import Phone, StandIn, real_adbd, why_no_adbd
from tests.runtime.small_disk import small_disk, why_no_small_disk
from tests.runtime.ssh_machine import write_program

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schemas/bench-phone-1.json").read_text())
SMALL = ("-p", "16", "-n", "4", "-r", "2")

# What a binary prints whose row has text that clears a screen.
ROWS = """echo '[{"n_prompt": 16, "n_gen": 0, "samples_ns": [1000000], "gpu": "\\u001b[2J"}]'"""


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


def say_free(phone: Phone, free_kib: int) -> None:
    """Let df there say what toybox says of a disk of a phone."""
    line = f"/dev/block/dm-51 232000000 {232000000 - free_kib} {free_kib} 99% /data/user/0"
    write_program(phone.programs / "df", f"echo 'Filesystem 1K-blocks Used'; echo '{line}'")


def is_left_alone(phone: Phone, within_s: float = 10.0) -> bool:
    """Return whether nothing runs there any more, and nothing lies there."""
    deadline_s = time.monotonic() + within_s
    while (phone.running() or left_on(phone)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return phone.running() == [] and left_on(phone) == []


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
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
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
    assert is_left_alone(phone)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_on_the_phone_when_the_command_here_is_ended(
    phone: Phone, tiny_gguf: Path, end: signal.Signals
) -> None:
    with phone.bench(tiny_gguf, "-r", "1000") as process:
        assert process.stderr and any("measuring" in line for line in process.stderr)
        assert phone.running() and left_on(phone)
        process.send_signal(end)
        assert process.wait(20) != 0
    assert is_left_alone(phone)


def test_a_phone_that_is_lost_during_a_push_is_named(phone: Phone, tiny_gguf: Path) -> None:
    with phone.bench(tiny_gguf) as process:
        assert process.stderr and any("pushing" in line for line in process.stderr)
        phone.cut()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "did not arrive on adb://" in errors and "look at 'adb devices'" in errors


def test_what_an_ended_push_left_is_removed_a_day_later(phone: Phone, tiny_gguf: Path) -> None:
    """One of today may be another's who measures."""
    for name, days in (("edgekd-old", 3), ("edgekd-today", 0), ("others", 3)):
        (phone.tmp / name).mkdir()
        (phone.tmp / name / "model.gguf").touch()
        then_s = time.time() - days * 86400
        os.utime(phone.tmp / name, (then_s, then_s))
    try:
        assert run(phone, tiny_gguf)[0] == 0
        assert {entry.name for entry in phone.tmp.iterdir()} >= {"edgekd-today", "others"}
        assert left_on(phone) == [phone.tmp / "edgekd-today"]
    finally:
        phone.remove("edgekd-old", "edgekd-today", "others")


def test_a_binary_that_fails_is_reported_with_its_reason(phone: Phone, tiny_gguf: Path) -> None:
    write_program(phone.binary, "echo 'CANNOT LINK EXECUTABLE: libc++_shared.so' >&2; exit 9")
    code, _, errors = run(phone, tiny_gguf)
    assert code == 1 and "llama-bench failed: CANNOT LINK EXECUTABLE" in errors
    write_program(phone.binary, "echo no rows")
    code, _, errors = run(phone, tiny_gguf)
    assert code == 1 and "no rows, but 'no rows'" in errors
    assert left_on(phone) == []


def test_a_phone_without_room_is_reported_before_a_push(phone: Phone, tiny_gguf: Path) -> None:
    say_free(phone, 50)
    code, _, errors = run(phone, tiny_gguf)
    assert code == 1 and "51.2 kB free in /data/local/tmp" in errors
    assert "pushing" not in errors


def test_a_phone_whose_disk_fills_during_a_push_says_so(phone: Phone, tiny_gguf: Path) -> None:
    """The disk is really full; df says what was true a moment ago."""
    if reason := why_no_small_disk():
        pytest.skip(reason)
    say_free(phone, 10_000_000)
    with small_disk(phone.tmp, tiny_gguf.stat().st_size // 2):
        code, _, errors = run(phone, tiny_gguf)
        assert code == 1 and "did not arrive on adb://" in errors
        assert "No space left on device" in errors and "the room on the phone" in errors
        assert left_on(phone) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('[{"n_prompt": 16, "n_gen": 0, "samples_ns": ["1"]}]', "without samples_ns"),
        ('[{"n_prompt": 16, "n_gen": 0, "samples_ns": [NaN]}]', "a number that is none"),
        ('[{"n_prompt": "x", "n_gen": 0, "samples_ns": [1]}]', "whole numbers are expected"),
        ("[" * 5000, "no rows, but"),
    ],
)
def test_rows_that_are_none_are_refused(
    phone: Phone, tiny_gguf: Path, rows: str, said: str
) -> None:
    write_program(phone.binary, f"echo '{rows}'")
    code, out, errors = run(phone, tiny_gguf)
    assert code == 1 and said in errors and "Traceback" not in errors
    assert left_on(phone) == []


def test_what_a_phone_tells_cannot_steer_a_terminal(
    phone: Phone, tiny_gguf: Path, tmp_path: Path
) -> None:
    phone.answer_as("snapdragon_phone", "[25113PN0EC]", "[ \x1b]0;owned\x07]")
    write_program(phone.binary, "printf 'error: \\033[2Jgone\\n' >&2; exit 1")
    code, _, errors = run(phone, tiny_gguf)
    assert code == 1 and "error: \ufffd[2Jgone" in errors and clean(errors) == errors
    write_program(phone.binary, ROWS)
    code, out, errors = run(phone, tiny_gguf, "--save", str(tmp_path / "run.json"))
    assert code == 0 and "\ufffd]0;owned\ufffd" in out, errors
    assert clean(out) == out
    assert clean(json.loads((tmp_path / "run.json").read_text())["rows"][0]["gpu"]) == "\ufffd[2J"


def test_no_name_reaches_a_shell(phone: Phone, tiny_gguf: Path, tmp_path: Path) -> None:
    name = "-llama bench'; $(touch pwned) `touch pwned`"
    phone.binary = phone.binary.rename(tmp_path / name)
    model = tmp_path / "$(touch pwned); m'.gguf"
    model.write_bytes(tiny_gguf.read_bytes())
    code, out, errors = run(phone, model)
    assert code == 0, errors
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()
    assert left_on(phone) == [] and not list(phone.tmp.glob("pwned"))


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
