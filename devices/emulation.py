"""Whether the instructions of this process are emulated: then no time is the machine's.

An emulator answers ``uname`` with the architecture it plays. What it seldom plays are the kernel's
own files, which tell the real one.
"""

from edgekd.devices.host import Host

_X86, _ARM, _RISCV, _POWER = "x86_64", "aarch64", "riscv64", "ppc64le"
# A 32-bit program on a 64-bit kernel of the same family runs on the processor itself.
_FAMILIES = {"x86": _X86, "amd64": _X86, "i386": _X86, "i686": _X86, "arm": _ARM, "aarch64": _ARM}
_FAMILIES |= {"riscv": _RISCV, "ppc": _POWER}
# Keys of /proc/cpuinfo that one family alone has.
_CPUINFO_KEYS = {"vendor_id": _X86, "CPU implementer": _ARM, "isa": _RISCV}
_ROSETTA = ("sysctl", "-n", "sysctl.proc_translated")


def emulated_on(host: Host, architecture: str, cpuinfo: str | None) -> str | None:
    """Return the real processor's architecture where ``architecture`` is emulated on it.

    None where it is not, and where nothing tells: an emulator of a whole machine looks like one.
    """
    if cpuinfo is None and architecture == _X86 and host.run(_ROSETTA).output == "1":
        return "arm64"
    played = _family(architecture)
    real = _family(host.text("proc/sys/kernel/arch") or "") or _family_of_cpuinfo(cpuinfo or "")
    return real if played and real and played != real else None


def _family(architecture: str) -> str | None:
    name = architecture.lower()
    return next((family for start, family in _FAMILIES.items() if name.startswith(start)), None)


def _family_of_cpuinfo(cpuinfo: str) -> str | None:
    keys = {line.partition(":")[0].strip() for line in cpuinfo.splitlines()}
    return next((family for key, family in _CPUINFO_KEYS.items() if key in keys), None)
