import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgekd.errors import DataError, DeviceError, EngineError
from edgekd.files import sha256_of
from edgekd.progress import Lines
from edgekd.runtime.bench_remote import run_bench_over_ssh
from edgekd.runtime.bench_remote_address import AdbAddress, SshAddress, parse_address
from edgekd.runtime.bench_remote_artifact import read_artifact
from edgekd.runtime.bench_settings import BenchSettings
from edgekd.runtime.evaluate import EvalOptions, evaluate
from tests.conftest import TEXTS
from tests.runtime.small_disk import small_disk, why_no_small_disk
from tests.runtime.ssh_machine import MISSING, SSHD, SshMachine, ssh_machine, write_program

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schemas/bench-1.json").read_text())
SMALL = BenchSettings(
    prompt_tokens=8, decode_tokens=4, depths=(0, 8), ttft_tokens=(4,), repetitions=2, n_threads=1
)
# A soak says nothing for 40 s at least: without being ended, it would go on so long.
LONG = BenchSettings(prompt_tokens=8, decode_tokens=4, repetitions=1, n_threads=1, soak_minutes=10)
MEASURED = "speed 1/1"
needs_sshd = pytest.mark.skipif(
    SSHD is None or bool(MISSING),
    reason="no sshd here; on Debian: apt-get install openssh-server openssh-client",
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshMachine]:
    with ssh_machine(tmp_path) as running:
        monkeypatch.setenv("PATH", running.client_path)
        yield running


def bench(machine: SshMachine, model: Path, settings: BenchSettings = SMALL) -> dict[str, Any]:
    address = parse_address(machine.address)
    assert isinstance(address, SshAddress)
    return run_bench_over_ssh([str(model)], settings, address)


def wait_until(holds: Callable[[], bool], within_s: float = 30.0) -> bool:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if holds():
            return True
        time.sleep(0.1)
    return False


@needs_sshd
def test_a_whole_bench_runs_there_and_its_document_comes_back(
    machine: SshMachine, tiny_gguf: Path, tmp_path: Path
) -> None:
    machine.install_edgekd()
    saved = tmp_path / "run.json"
    options = ["-p", "8", "-n", "4", "-r", "2", "-t", "1", "--no-roofline", "--save", str(saved)]
    command = [sys.executable, "-m", "edgekd", "bench", str(tiny_gguf), *options]
    done = subprocess.run(
        [*command, "--device", machine.address], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "copying tiny-q4_0.gguf" in done.stderr and "speed 2/2" in done.stderr
    assert "tiny-q4_0.gguf" in done.stdout and "tg4" in done.stdout
    document = json.loads(saved.read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert document["machine"]["address"] == machine.address
    assert document["results"][0]["model"] == str(tiny_gguf)
    assert document["results"][0]["n_threads"] == 1
    assert wait_until(lambda: machine.running() == [])


@needs_sshd
def test_what_was_asked_is_what_runs_there(machine: SshMachine, tiny_gguf: Path) -> None:
    machine.install_edgekd()
    settings = bench(machine, tiny_gguf)["settings"]
    assert settings == json.loads(json.dumps(SMALL.as_dict()))


@needs_sshd
def test_quality_is_measured_there_against_a_pack_that_is_copied_once(
    machine: SshMachine, float_gguf: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    machine.install_edgekd()
    text, pack = tmp_path / "text.txt", tmp_path / "teacher.pack"
    text.write_text(" ".join(TEXTS), "utf-8")
    evaluate([], EvalOptions(teacher=str(float_gguf), text=text, write_reference=pack))
    address = parse_address(machine.address)
    assert isinstance(address, SshAddress)
    for _ in range(2):
        document = run_bench_over_ssh([str(tiny_gguf)], SMALL, address, reference=pack)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    (here,) = evaluate([str(tiny_gguf)], EvalOptions(reference=pack)).models
    assert here.text and here.text.to_teacher
    there = document["results"][0]["quality"]["to_teacher"]["kl_nats"]
    assert there["value"] == pytest.approx(here.text.to_teacher.kl_nats.value, abs=1e-6)
    assert document["quality_reference"]["pack"] == str(pack)
    assert document["quality_settings"]["reference"] == str(pack)
    held = {folder.name for folder in machine.cache.iterdir()}
    assert held == {sha256_of(tiny_gguf), sha256_of(pack)}
    with pytest.raises(DataError, match="no reference pack at"):
        run_bench_over_ssh([str(tiny_gguf)], SMALL, address, reference=tmp_path / "none")


@needs_sshd
def test_a_model_is_copied_once_whatever_its_name(
    machine: SshMachine, tiny_gguf: Path, tmp_path: Path
) -> None:
    machine.install_edgekd()
    bench(machine, tiny_gguf)
    (folder,) = machine.cache.iterdir()
    (first,) = folder.iterdir()
    assert folder.name == sha256_of(tiny_gguf) == sha256_of(first)
    before = first.stat()
    other = tmp_path / "other name; $(touch pwned).gguf"
    other.write_bytes(tiny_gguf.read_bytes())
    assert bench(machine, other)["results"][0]["model"] == str(other)
    assert list(machine.cache.rglob("*")) == [folder, first]
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@needs_sshd
def test_a_folder_and_a_strange_name_arrive_whole(
    machine: SshMachine, tiny_onnx: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    machine.install_edgekd()
    assert bench(machine, tiny_onnx)["results"][0]["engine"] == "onnxruntime"
    strange = tmp_path / "-x: 'ü $(touch pwned).gguf"
    strange.write_bytes(tiny_gguf.read_bytes())
    assert bench(machine, strange)["results"][0]["engine"] == "llama.cpp"
    names = {entry.name for entry in machine.cache.iterdir()}
    assert names == {read_artifact(str(m)).sha256 for m in (tiny_onnx, tiny_gguf)}
    assert not list(machine.home.rglob("pwned"))


@needs_sshd
def test_a_cut_connection_says_what_to_do_and_leaves_nothing_running(
    machine: SshMachine, tiny_gguf: Path
) -> None:
    machine.install_edgekd()
    address, said = parse_address(machine.address), io.StringIO()
    assert isinstance(address, SshAddress)
    with ThreadPoolExecutor(1) as pool:
        model = [str(tiny_gguf)]
        measured = pool.submit(run_bench_over_ssh, model, LONG, address, Lines(said))
        assert wait_until(lambda: MEASURED in said.getvalue())
        assert wait_until(lambda: bool(machine.running("bench_worker")))  # one ends, one begins
        machine.cut()
        with pytest.raises(DeviceError, match="was lost .* run the same command again") as caught:
            measured.result(30)
    assert "\n" not in str(caught.value)
    assert wait_until(lambda: machine.running() == [], 10), machine.running()


@needs_sshd
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_runs_there_when_the_command_here_is_ended(
    machine: SshMachine, tiny_gguf: Path, end: signal.Signals
) -> None:
    machine.install_edgekd()
    options = ["-p", "8", "-n", "4", "-r", "1", "-t", "1", "--soak", "10", "--no-roofline"]
    command = [sys.executable, "-m", "edgekd", "bench", str(tiny_gguf), *options]
    with subprocess.Popen(
        [*command, "--device", machine.address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as here:
        assert here.stderr and any(MEASURED in line for line in here.stderr)
        assert machine.running("bench_worker")
        here.send_signal(end)
        assert here.wait(20) != 0
    assert wait_until(lambda: machine.running() == [], 10), machine.running()


@needs_sshd
def test_a_full_disk_is_reported_before_anything_is_copied(
    machine: SshMachine, tiny_gguf: Path
) -> None:
    """The df there is a stand-in, which says what df says of a disk with 64 KiB left."""
    machine.install_edgekd()
    line = "/dev/mmcblk0p2 30000000 29999936 64 100% /"
    machine.install(
        "df", f"echo Filesystem 1024-blocks Used Available Capacity Mounted; echo {line}"
    )
    with pytest.raises(DeviceError, match=r"has 65\.5 kB free .* needs .* make room there"):
        bench(machine, tiny_gguf)
    assert list(machine.cache.iterdir()) == []


@needs_sshd
def test_a_disk_that_fills_while_the_model_is_copied_is_named(
    machine: SshMachine, tiny_gguf: Path
) -> None:
    """The disk is really full; the df there says at first what was true a moment ago."""
    if reason := why_no_small_disk():
        pytest.skip(reason)
    machine.install_edgekd()
    once = machine.home / "asked"
    line = "/dev/mmcblk0p2 30000000 20000000 10000000 67% /"
    machine.install(
        "df", f'[ -e "{once}" ] && exec /bin/df "$@"; touch "{once}"; echo Filesystem; echo {line}'
    )
    with small_disk(machine.cache, tiny_gguf.stat().st_size // 2):
        with pytest.raises(DeviceError, match="did not arrive on .* 0 B are free there, make room"):
            bench(machine, tiny_gguf)
        assert list(machine.cache.iterdir()) == []


@needs_sshd
def test_a_copy_that_breaks_leaves_nothing_there(
    machine: SshMachine, tiny_gguf: Path, tmp_path: Path
) -> None:
    """What comes first in PATH is an scp that gives up after a part of the file."""
    machine.install_edgekd()
    real = tmp_path / "client/scp.real"
    (tmp_path / "client/scp").rename(real)
    part = tmp_path / "part.gguf"
    part.write_bytes(tiny_gguf.read_bytes()[:1000])
    last = 'for last; do :; done; echo "No space left on device" >&2'
    script = f'{last}; {real} -q -P {machine.address.rpartition(":")[2]} {part} "$last"; exit 1'
    write_program(tmp_path / "client/scp", script)
    with pytest.raises(DeviceError, match="did not arrive on .*No space left on device"):
        bench(machine, tiny_gguf)
    assert list(machine.cache.iterdir()) == []
    write_program(tmp_path / "client/scp", script.replace("exit 1", "exit 0"))
    with pytest.raises(DeviceError, match="changed on its way"):
        bench(machine, tiny_gguf)
    assert list(machine.cache.iterdir()) == []


@needs_sshd
def test_the_reason_of_a_failure_there_comes_back(machine: SshMachine, tiny_gguf: Path) -> None:
    machine.install_edgekd()
    long = BenchSettings(prompt_tokens=8, decode_tokens=608)
    with pytest.raises(EngineError, match=r"ssh://.*608 tokens of prompt.* context of 512"):
        bench(machine, tiny_gguf, long)


@needs_sshd
def test_what_an_edgekd_there_answers_is_checked(machine: SshMachine, tiny_gguf: Path) -> None:
    program = machine.home / ".local/bin/edgekd"
    write_program(program, """echo '{"schema": "edgekd.bench/1", "results": [{}]}'""")
    with pytest.raises(DeviceError, match=r"ssh://\S+ gave a document that breaks its schema at"):
        bench(machine, tiny_gguf)
    write_program(program, "exec yes")
    with pytest.raises(DeviceError, match=r"ssh gave more than 67\.1 MB"):
        bench(machine, tiny_gguf)
    assert wait_until(lambda: machine.running() == [], 10), machine.running()
    write_program(program, "printf 'edgekd: no \\033[2Jmodel\\n' >&2; exit 1")
    with pytest.raises(EngineError, match="no \ufffd\\[2Jmodel"):
        bench(machine, tiny_gguf)


@needs_sshd
def test_the_name_of_a_program_there_reaches_no_shell(machine: SshMachine, tiny_gguf: Path) -> None:
    for name in ("x; touch pwned", "$(touch pwned)", "-v'`touch pwned`"):
        address = parse_address(machine.address)
        assert isinstance(address, SshAddress)
        with pytest.raises(DeviceError, match="has no program") as caught:
            run_bench_over_ssh([str(tiny_gguf)], SMALL, address, remote_edgekd=name)
        assert name in str(caught.value)
    assert not list(machine.home.rglob("pwned")) and not Path("pwned").exists()


@needs_sshd
@pytest.mark.parametrize(
    ("python", "said"),
    [
        (
            "echo python 3 13",
            r"Python 3\.13, but no edgekd; install it by: ssh -p .*edgekd\[gguf\]'",
        ),
        ("echo python 3 9", r"Python 3\.9, and no edgekd; install Python 3\.11"),
        ("exit 127", r"no python3, and no edgekd; install Python 3\.11"),
    ],
)
def test_a_machine_without_edgekd_is_told_what_to_install(
    machine: SshMachine, tiny_gguf: Path, python: str, said: str
) -> None:
    """The python3 there is a stand-in without edgekd, whatever the one of this machine has."""
    machine.install("python3", f'case "$2" in *version_info*) {python};; *) exit 1;; esac')
    with pytest.raises(DeviceError, match=said):
        bench(machine, tiny_gguf)
    assert list(machine.cache.iterdir()) == []


@needs_sshd
def test_edgekd_is_found_as_a_module_or_by_name(machine: SshMachine, tiny_gguf: Path) -> None:
    machine.install_edgekd()
    (machine.home / ".local/bin/edgekd").rename(machine.home / "my edgekd")
    path = os.pathsep.join(sys.path)
    machine.install("python3", f'PYTHONPATH="{path}" exec {sys.executable} "$@"')
    assert bench(machine, tiny_gguf)["results"]
    (machine.programs / "python3").unlink()
    address = parse_address(machine.address)
    assert isinstance(address, SshAddress)
    given = str(tiny_gguf)
    found = run_bench_over_ssh([given], SMALL, address, remote_edgekd="~/my edgekd")
    assert found["results"]
    with pytest.raises(DeviceError, match="has no program /nowhere/edgekd"):
        run_bench_over_ssh([given], SMALL, address, remote_edgekd="/nowhere/edgekd")


@needs_sshd
def test_a_machine_whose_key_is_unknown_is_refused(
    machine: SshMachine, tiny_gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "known_hosts").write_text("")
    with pytest.raises(DeviceError, match="Host key verification failed.; see that this works"):
        bench(machine, tiny_gguf)


def test_a_missing_ssh_is_named(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="ssh is not installed here.*openssh-client"):
        run_bench_over_ssh([str(tiny_gguf)], SMALL, SshAddress("nowhere"), Lines())


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://pi@raspberrypi:2222", SshAddress("raspberrypi", "pi", 2222)),
        ("ssh://Jetson", SshAddress("Jetson")),
        ("ssh://me@[fe80::1%eth0]:22", SshAddress("[fe80::1%eth0]", "me", 22)),
        ("adb://192.168.1.7:5555", AdbAddress("192.168.1.7:5555")),
        ("adb://R58M123ABC", AdbAddress("R58M123ABC")),
    ],
)
def test_an_address_is_read_and_written(text: str, address: SshAddress | AdbAddress) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "pi@host",
        "ssh://",
        "ssh://-oProxyCommand=touch",
        "ssh://-l@host",
        "ssh://host:0",
        "ssh://host:65536",
        "ssh://host/folder",
        "ssh://ho st",
        "adb://-s",
        "adb://",
        "ssh://user:word@host",
        "ssh://me@-oProxyCommand=touch",
        "ssh://host;touch pwned",
        "ssh://host$(touch pwned)",
        "ssh://host\nother",
        "ssh://h\u00f6st",
        "adb://serial;touch pwned",
        "adb://serial touch",
        "adb://serial`touch pwned`",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="is no device; give ssh://user@host"):
        parse_address(text)
