"""How much memory this process takes: its peak, and what its resident pages are made of.

A GGUF file is mapped, not read: its pages count as resident but can be dropped and are shared
with every other process that maps the file. Hence the split.
"""

import sys
from pathlib import Path

from edgekd.devices.reading import Reading

_UNIT = "bytes"
_PARTS = {
    "resident_bytes": ("Rss",),
    "private_bytes": ("Private_Clean", "Private_Dirty"),
    "shared_bytes": ("Shared_Clean", "Shared_Dirty"),
    "anonymous_bytes": ("Anonymous",),
}


def peak_rss_bytes() -> int:
    """Return the largest resident size that this process has had since it was started."""
    # Not ru_maxrss where there is a choice: on Linux it starts with the size of the parent.
    try:
        peak_bytes = _sizes(Path("/proc/self/status")).get("VmHWM")
    except OSError:
        peak_bytes = None
    return _peak_from_system() if peak_bytes is None else peak_bytes


def current_memory(root: Path = Path("/")) -> dict[str, Reading]:
    """Return the resident memory of this process and its parts.

    ``mapped_file_bytes`` are pages of mapped files, the weights of a GGUF model among them.
    """
    file = root / "proc/self/smaps_rollup"
    try:
        sizes = _sizes(file)
        found = {part: sum(sizes[name] for name in names) for part, names in _PARTS.items()}
    except (OSError, KeyError) as error:
        reason = f"cannot read {file}: {error}"
        parts = (*_PARTS, "mapped_file_bytes")
        return {part: Reading.unavailable(_UNIT, str(file), reason) for part in parts}
    found["mapped_file_bytes"] = found["resident_bytes"] - found["anonymous_bytes"]
    return {part: Reading.measured(size, _UNIT, str(file)) for part, size in found.items()}


def _sizes(file: Path) -> dict[str, int]:
    """Return the sizes in bytes that ``file`` lists as ``Name:  123 kB``."""
    sizes = {}
    for line in file.read_text("utf-8", errors="replace").splitlines():
        match line.split():
            case [name, number, "kB"] if number.isdigit():
                sizes[name.rstrip(":")] = int(number) * 1024
    return sizes


def _peak_from_system() -> int:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
