"""Which Hexagon NPU is in which Snapdragon, and which Snapdragon this machine is.

A context binary is compiled for one of them, and QNN takes numbers that exist nowhere without a
word: so numbers come from this table alone. They are QNN's own (``QnnTypes.h``): ONNX Runtime's
provider calls them ``soc_model`` and ``htp_arch``. What stands here was accepted by the compiler
of onnxruntime-qnn 2.7.0; that a number means the chip that it stands beside was checked on none.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from edgekd.devices.detect import read_text
from edgekd.errors import RecipeError

_GETPROP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Soc:
    """One system on a chip."""

    name: str
    """Model number in lower case, as Android's ``ro.soc.model`` gives it in upper case."""
    title: str
    """What it is sold as."""
    soc_model: int
    """QNN's number of it."""
    htp_arch: int
    """Version of its Hexagon Tensor Processor; binaries of another do not run."""


SOCS = (
    Soc("sm8550", "Snapdragon 8 Gen 2", 43, 73),
    Soc("sm8650", "Snapdragon 8 Gen 3", 57, 75),
    Soc("sm8750", "Snapdragon 8 Elite", 69, 79),
    Soc("sm8850", "Snapdragon 8 Elite Gen 5", 87, 81),
    Soc("sc8380xp", "Snapdragon X Elite", 60, 73),
)


def find_soc(name: str) -> Soc:
    """Return the chip called ``name``, in any case.

    Raises:
        RecipeError: it is not in the table.
    """
    found = next((soc for soc in SOCS if soc.name == name.lower()), None)
    if found is None:
        known = ", ".join(f"{soc.name} ({soc.title})" for soc in SOCS)
        raise RecipeError(f"SoC {name!r} is unknown; known are {known}")
    return found


def detect_soc(root: Path = Path("/")) -> str | None:
    """Return the model number of this machine's chip in lower case; None where none is told.

    Android tells by ``getprop ro.soc.model``, Linux by the kernel's soc driver
    (https://docs.kernel.org/admin-guide/abi-testing.html, /sys/devices/socX).
    """
    machine = read_text(root / "sys/devices/soc0/machine")
    return (machine or _android_soc() or "").strip().lower() or None


def _android_soc() -> str | None:
    if (getprop := shutil.which("getprop")) is None:
        return None
    try:
        told = subprocess.run(
            [getprop, "ro.soc.model"], capture_output=True, text=True, timeout=_GETPROP_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout
