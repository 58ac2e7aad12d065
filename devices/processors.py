"""What ``/proc/cpuinfo`` says about the processor: its name and its instruction sets."""

# Names of the kernel: x86 "flags", ARM "Features".
_INSTRUCTION_SETS = (
    *("avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_ARM_IMPLEMENTER = "0x41"
# ARM's part numbers, from the kernel's arch/arm64/include/asm/cputype.h.
_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710",
    "0xd48": "Cortex-X2",
    "0xd49": "Neoverse-N2",
    "0xd4d": "Cortex-A715",
    "0xd4e": "Cortex-X3",
    "0xd4f": "Neoverse-V2",
    "0xd80": "Cortex-A520",
    "0xd81": "Cortex-A720",
    "0xd82": "Cortex-X4",
    "0xd83": "Neoverse-V3AE",
    "0xd84": "Neoverse-V3",
}


def instruction_sets(cpuinfo: str) -> tuple[str, ...]:
    """Return the instruction sets that every core in ``cpuinfo`` has, among those that matter."""
    per_core = [set(names.split()) for names in _values(cpuinfo, "flags", "Features")]
    common = set.intersection(*per_core) if per_core else set()
    return tuple(name for name in _INSTRUCTION_SETS if name in common)


def processor_name(cpuinfo: str) -> str | None:
    """Return the processor's name, or on ARM those of its cores; None where it has none."""
    names = _values(cpuinfo, "model name") or _arm_cores(cpuinfo)
    return " + ".join(sorted(set(names))) or None


def _arm_cores(cpuinfo: str) -> list[str]:
    """Return the name of each core; ARM's own only, others reuse the numbers."""
    pairs = zip(_values(cpuinfo, "CPU implementer"), _values(cpuinfo, "CPU part"), strict=False)
    return [
        _ARM_PARTS.get(part, f"ARM part {part}")
        if implementer == _ARM_IMPLEMENTER
        else f"implementer {implementer} part {part}"
        for implementer, part in pairs
    ]


def _values(cpuinfo: str, *keys: str) -> list[str]:
    """Return the value of each line whose key is one of ``keys``."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return [value.strip() for key, _, value in lines if key.strip() in keys]
