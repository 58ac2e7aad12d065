"""Build the wheel and compare its contents with the tracked sources, file by file."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PARTS = ("distill", "export", "runtime", "devices")
SCHEMAS = "docs/schemas"


def expected_files() -> set[str]:
    """Return the names that the wheel must hold, from what git tracks."""
    command = ["git", "ls-files", "src/edgekd", SCHEMAS, *PARTS]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = set()
    for name in tracked:
        path = Path(name)
        if path.is_symlink():
            continue
        base = {"src": "src/edgekd", "docs": "docs"}.get(path.parts[0], ".")
        inside = path.relative_to(base)
        names.add(f"edgekd/{inside}")
    return names


def main() -> None:
    """Exit with an error that names every missing or foreign file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, "."]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            found = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = expected_files()
    if found != expected:
        sys.exit(
            f"wheel: missing {expected - found or 'none'}, foreign {found - expected or 'none'}"
        )
    print(f"wheel: {len(found)} files, as tracked")


if __name__ == "__main__":
    main()
