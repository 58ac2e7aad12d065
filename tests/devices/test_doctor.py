import json
import re
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest
from pytest import CaptureFixture

from edgekd.cli import app
from edgekd.devices.backends import BACKENDS, LABELS, install_command
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


def test_every_backend_says_how_far_it_was_tried_and_by_what(capsys: CaptureFixture[str]) -> None:
    checks = [check for check in diagnose() if check.subject.startswith("backend: ")]
    assert [(check.found, check.evidence) for check in checks] == [
        (backend.label, backend.evidence) for backend in BACKENDS.values()
    ]
    with pytest.raises(SystemExit, match="0"):
        app(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [asdict(check) for check in checks] == [
        check for check in told if check["subject"].startswith("backend: ")
    ]


def test_the_evidence_for_a_label_is_a_file_that_is_there() -> None:
    root = Path(__file__).parents[2]
    for backend in BACKENDS.values():
        for name in re.findall(r"[\w/]+\.json", backend.evidence):
            assert (root / "benchmarks/results" / Path(name).name).is_file(), name
        assert backend.label in LABELS and backend.evidence


def test_the_page_about_phones_gives_the_labels_of_the_table() -> None:
    script = Path(__file__).parents[2] / "scripts/write_backend_table.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0


def test_what_shuts_another_package_out_says_that_it_needs_an_environment_of_its_own() -> None:
    assert install_command(BACKENDS["qnn"]) == "pip install 'edgekd[qnn]'"
    own = "pip install onnxruntime-openvino, in an environment of its own"
    assert install_command(BACKENDS["openvino"]) == own
