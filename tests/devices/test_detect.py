import json
import os
from pathlib import Path

import psutil
import pytest

from edgekd.devices.detect import Gpu, detect
from edgekd.devices.host import Reply, replay
from edgekd.devices.nvidia import QUERY

X86 = """processor : 0
model name : AMD Ryzen 7 7840U
flags : fpu sse2 f16c fma avx2 avx512f avx512_vnni avx512_bf16
"""
ARM = """processor : 0
Features : fp asimd asimddp
CPU implementer : 0x41
CPU part : 0xd05

processor : 1
Features : fp asimd asimddp i8mm
CPU implementer : 0x41
CPU part : 0xd0b
"""


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_laptop_is_read_from_its_files(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": X86,
        "proc/meminfo": "MemTotal:  1000 kB\nMemAvailable:  250 kB\nHugePages_Total: 0\n",
        "proc/sys/kernel/osrelease": "6.8.0-45-generic\n",
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04 LTS"\n',
    }
    machine = detect(plant(tmp_path, files))
    assert machine.processor == "AMD Ryzen 7 7840U"
    assert machine.instruction_sets == ("avx2", "f16c", "fma", "avx512f", "avx512_vnni") + (
        "avx512_bf16",
    )
    assert (machine.memory_bytes, machine.memory_available_bytes) == (1_024_000, 256_000)
    assert (machine.system, machine.kernel) == ("Ubuntu 24.04 LTS", "6.8.0-45-generic")


def test_an_arm_board_has_the_instructions_of_all_its_cores(tmp_path: Path) -> None:
    board = "Raspberry Pi 5 Model B Rev 1.0"
    machine = detect(plant(tmp_path, {"proc/cpuinfo": ARM, "proc/device-tree/model": board + "\0"}))
    assert machine.board == board
    assert machine.processor == "Cortex-A55 + Cortex-A76"
    assert machine.instruction_sets == ("asimddp",)


@pytest.mark.parametrize(
    ("played", "files", "real"),
    [
        ("aarch64", {"proc/sys/kernel/arch": "x86_64\n", "proc/cpuinfo": ARM}, "x86_64"),
        ("aarch64", {"proc/cpuinfo": "vendor_id : AuthenticAMD\n" + X86}, "x86_64"),
        ("x86_64", {"proc/cpuinfo": ARM}, "aarch64"),
        ("aarch64", {"proc/sys/kernel/arch": "aarch64\n", "proc/cpuinfo": ARM}, None),
        ("armv7l", {"proc/sys/kernel/arch": "aarch64\n"}, None),
        ("i686", {"proc/sys/kernel/arch": "x86_64\n", "proc/cpuinfo": "vendor_id : x\n"}, None),
        ("aarch64", {}, None),
    ],
)
def test_a_process_whose_instructions_are_emulated_says_so(
    played: str, files: dict[str, str], real: str | None, tmp_path: Path
) -> None:
    machine = detect(plant(tmp_path, files), replay({"uname -m": played}))
    assert machine.emulated_on == real


def test_rosetta_tells_that_it_translates(tmp_path: Path) -> None:
    replies = {"uname -m": "x86_64", "sysctl -n sysctl.proc_translated": "1"}
    assert detect(tmp_path, replay(replies)).emulated_on == "arm64"
    replies["sysctl -n sysctl.proc_translated"] = "0"
    assert detect(tmp_path, replay(replies)).emulated_on is None


def test_this_machine_is_not_emulated() -> None:
    assert detect().emulated_on is None


def test_an_empty_tree_gives_nothing_rather_than_zeros(tmp_path: Path) -> None:
    machine = detect(tmp_path)
    assert machine.instruction_sets is None
    assert machine.memory_bytes is None
    assert machine.board is None
    assert machine.governor is None
    assert machine.on_battery is None
    assert machine.gpus == ()


def test_every_governor_in_use_is_named(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
    names = ["schedutil", "performance", "schedutil"]
    plant(tmp_path, {cpu.format(i): f"{name}\n" for i, name in enumerate(names)})
    assert detect(tmp_path).governor == "performance, schedutil"


def test_only_the_machines_own_battery_counts(tmp_path: Path) -> None:
    supply = "sys/class/power_supply/"
    mouse = {"type": "Battery", "scope": "Device", "status": "Discharging"}
    plant(tmp_path, {f"{supply}mouse/{name}": text for name, text in mouse.items()})
    assert detect(tmp_path).on_battery is None
    plant(tmp_path, {f"{supply}AC/type": "Mains\n", f"{supply}BAT0/type": "Battery\n"})
    assert detect(tmp_path).on_battery is False
    plant(tmp_path, {f"{supply}BAT0/status": "Discharging\n"})
    assert detect(tmp_path).on_battery is True


def test_graphics_cards_are_those_that_nvidia_smi_lists(tmp_path: Path) -> None:
    lines = (
        "NVIDIA GeForce RTX 4060, 8188, 560.35, 60.1, 50, 0x0\n"
        "Orin (nvgpu), [N/A], 540.3, [N/A], [N/A], [N/A]\n"
    )
    assert detect(tmp_path, replay({" ".join(QUERY): lines})).gpus == (
        Gpu(name="NVIDIA GeForce RTX 4060", memory_bytes=8188 * 2**20, driver="560.35"),
        Gpu(name="Orin (nvgpu)", memory_bytes=None, driver="540.3"),
    )


def test_an_nvidia_smi_without_a_driver_lists_no_card(tmp_path: Path) -> None:
    assert detect(tmp_path, lambda command: Reply(9, "no, driver, a, b, c, d\n")).gpus == ()


def test_another_root_never_asks_this_machines_programs(tmp_path: Path) -> None:
    machine = detect(plant(tmp_path, {"proc/cpuinfo": ARM}))
    assert (machine.architecture, machine.kernel, machine.n_usable_cores) == (
        "unknown",
        "unknown",
        2,
    )


def test_this_machine_agrees_with_psutil_and_can_be_written_as_json() -> None:
    machine = detect()
    assert 1 <= machine.n_usable_cores <= (os.cpu_count() or 1)
    assert machine.memory_bytes == psutil.virtual_memory().total
    assert machine.memory_available_bytes is not None
    assert 0 < machine.memory_available_bytes <= machine.memory_bytes
    assert json.loads(json.dumps(machine.as_dict()))["kernel"] == machine.kernel
