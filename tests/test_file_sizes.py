"""Files are about one subject; one that grows past 400 lines is about two, or says why not."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("distill", "export", "runtime", "devices", "src", "tests", "benchmarks", "scripts")
MAX_LINES = 400


def test_no_file_is_long_without_a_reason_in_its_first_line() -> None:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(found) > 300
    for path in found:
        lines = path.read_text("utf-8").splitlines()
        is_explained = "long because" in lines[0].lower() if lines else True
        assert len(lines) <= MAX_LINES or is_explained, path
