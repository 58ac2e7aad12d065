"""Fetch llama.cpp's own GGUF converter and print the folder it lies in.

It is part of llama-cpp-python's source archive, not of its wheel. The archive (77 MB) is taken from
the package index in the version that is installed, checked, and only the converter is kept, with
the script that reads results of llama-bench: 1 MB under ``$XDG_CACHE_HOME/edgekd``. Exits with 3
where the index cannot be reached.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

# Archives whose hash was recorded here; of others pip checks the index's own.
SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
UNREACHABLE = 3
_KEPT = ("conversion", "gguf-py", "convert_hf_to_gguf.py", "LICENSE")
_KEPT_SCRIPTS = ("compare-llama-bench.py",)


def main() -> None:
    """Print the folder with ``convert_hf_to_gguf.py``, after fetching it if need be."""
    installed = version("llama-cpp-python")
    folder = _cache_folder() / f"llama.cpp-{installed}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converter-") as partial:
            archive = _download(installed, Path(partial))
            _check(archive, installed)
            _keep(_extract(archive, Path(partial) / "tree"), folder)
    print(folder)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgekd"


def _download(installed: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--timeout=30"]
    command += ["--no-deps", "--no-binary=llama-cpp-python", "--dest", str(folder)]
    command += [f"llama-cpp-python=={installed}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("llama_cpp_python-*.tar.gz"))
    if result.returncode or not archives:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        print(f"pip cannot download llama-cpp-python {installed}: {reason}", file=sys.stderr)
        sys.exit(UNREACHABLE)
    return archives[0]


def _check(archive: Path, installed: str) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != (pinned := SHA256.get(installed, digest)):
        sys.exit(f"{archive.name} has sha256 {digest}, pinned is {pinned}; nothing was kept")


def _extract(archive: Path, folder: Path) -> Path:
    """Unpack the converter out of ``archive``; the filter refuses paths that lead elsewhere."""
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar if _is_kept(member.name)]
        tar.extractall(folder, wanted, filter="data")
    return next(folder.iterdir()) / "vendor" / "llama.cpp"


def _is_kept(name: str) -> bool:
    parts = Path(name).parts
    if parts[1:3] != ("vendor", "llama.cpp") or len(parts) < 4:
        return False
    return parts[3] in _KEPT or (parts[3] == "scripts" and parts[-1] in _KEPT_SCRIPTS)


def _keep(found: Path, folder: Path) -> None:
    try:
        found.rename(folder)
    except OSError:
        if not folder.is_dir():  # another run that came first is as good
            raise
        shutil.rmtree(found)


if __name__ == "__main__":
    main()
