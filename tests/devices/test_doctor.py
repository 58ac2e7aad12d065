import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from edgekd.devices.doctor import Check, diagnose


def check_of(checks: list[Check], subject: str) -> Check:
    return next(check for check in checks if check.subject == subject)


def test_an_installed_package_is_named_with_its_version() -> None:
    check = check_of(diagnose(), "torch")
    assert check == Check("torch", "ok", version("torch"))


def test_a_missing_package_comes_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # no package can be found there
    check = check_of(diagnose(), "llama-cpp-python")
    assert (check.status, check.advice) == ("missing", "pip install 'edgekd[gguf]'")
    assert check_of(diagnose(), "uvicorn").advice == "pip install 'edgekd[serve]'"


def test_every_problem_has_advice_and_nothing_else_has() -> None:
    checks = diagnose()
    assert len({check.subject for check in checks}) == len(checks)
    assert all((check.status == "ok") == (check.advice is None) for check in checks)


def test_nothing_heavy_is_imported_to_find_out() -> None:
    program = (
        "import sys; from edgekd.devices.doctor import diagnose; diagnose();"
        "sys.exit(bool({'numpy', 'torch', 'onnxruntime', 'llama_cpp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_busy_machine_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "proc/pressure").mkdir(parents=True)
    file = tmp_path / "proc/pressure/cpu"
    file.write_text("some avg10=38.20 avg60=1.00 avg300=0.10 total=1\nfull avg10=0.00\n")
    check = check_of(diagnose(tmp_path), "other load")
    assert check.status == "warning"
    assert "38.2 %" in check.found
    file.write_text("some avg10=0.50 avg60=1.00 avg300=0.10 total=1\n")
    assert check_of(diagnose(tmp_path), "other load").status == "ok"


def test_little_memory_and_a_saving_governor_are_warned_about(tmp_path: Path) -> None:
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_governor").write_text("powersave\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2000000 kB\nMemAvailable: 500000 kB\n")
    checks = diagnose(tmp_path)
    assert check_of(checks, "free memory").found == "512.0 MB available"
    assert check_of(checks, "free memory").status == "warning"
    assert check_of(checks, "CPU governor").status == "warning"


def test_a_cache_folder_that_is_not_there_yet_is_measured_on_its_disk(tmp_path: Path) -> None:
    check = check_of(diagnose(cache=tmp_path / "not" / "yet"), "disk")
    assert "free for" in check.found
    assert not (tmp_path / "not").exists()


def test_every_backend_says_how_far_it_was_tried() -> None:
    found = {check.found for check in diagnose() if check.subject.startswith("backend: ")}
    assert found <= {
        "verified-on-device",
        "verified-in-emulator",
        "compile-only",
        "untested",
    }
    assert "verified-on-device" in found
