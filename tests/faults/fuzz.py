"""Fuzz one target, or all of them, for a while; record the run and what it found.

    scripts/fuzz TARGET... --minutes N     (all: every target)

What reaches new branches and is small joins tests/faults/corpus/TARGET, where test_corpus.py
replays it; findings lie in --work until they are mended and put there too. The record,
benchmarks/results/fuzz.json, keeps every run. Needs atheris: the group "fuzz".
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.faults.fuzz_targets import NAMES

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).with_name("corpus")
RECORD = ROOT / "benchmarks" / "results" / "fuzz.json"
MAX_INPUT_BYTES = 4096
TIMEOUT_S = 20  # of one input; those that are read take milliseconds
MEMORY_MB = 4096
MAX_KEPT = 40
"""Files of a target in the corpus that is committed."""
_N_RUNS = re.compile(r"stat::number_of_executed_units: (\d+)|^#(\d+)\t", re.M)
_COVERAGE = re.compile(r"cov: (\d+)")


def fuzz(target: str, minutes: float, work: Path) -> dict[str, Any]:
    """Fuzz ``target`` and return the record of the run; what native code dies of is a finding."""
    findings, corpus = work / f"{target}-findings", work / f"{target}-corpus"
    for folder in (findings, corpus):
        folder.mkdir(parents=True, exist_ok=True)
    start_s, n_runs, n_native, covered = time.monotonic(), 0, 0, 0
    started, commit = datetime.now(UTC), _commit()
    while (left_s := minutes * 60 - (time.monotonic() - start_s)) > 1:
        log = _run_child(target, findings, corpus, round(left_s))
        n_runs += max((int(a or b) for a, b in _N_RUNS.findall(log)), default=0)
        covered = max([covered, *map(int, _COVERAGE.findall(log))])
        if n_native == (n_native := len(_native(target, work))):
            break  # it ran to its end
    if not n_runs:
        raise SystemExit(f"nothing was run: {log.strip().splitlines()[-1:]}")
    (work / f"{target}.log").write_text(log)
    found = [json.loads(path.read_text()) for path in sorted(findings.glob("*.json"))]
    return {
        "target": target,
        "date": started.isoformat(timespec="seconds"),
        "minutes": round((time.monotonic() - start_s) / 60, 2),
        "executions": n_runs,
        "branches_covered": covered,
        "findings": sorted({entry["place"] for entry in found}),
        **_sorted_out(target, work),
        "corpus_files": _keep_smallest(corpus, CORPUS / target),
        "versions": {name: version(name) for name in ("atheris", "edgekd")}
        | {"python": platform.python_version(), "commit": commit},
    }


def _native(target: str, work: Path) -> list[Path]:
    """Return the inputs at which native code crashed, hung or took too much memory."""
    return sorted(work.glob(f"{target}-native-*"))


def _sorted_out(target: str, work: Path) -> dict[str, int]:
    """Return how many of them do it again; a virtual machine that pauses looks like a hang."""
    again = [path for path in _native(target, work) if not _survives(target, path, work)]
    return {
        "crashes_hangs_or_memory": len(again),
        "not_reproduced": len(_native(target, work)) - len(again),
    }


def _survives(target: str, path: Path, work: Path) -> bool:
    command = [sys.executable, "-m", "tests.faults.fuzz_child", target]
    command += [str(work / f"{target}-findings"), f"-timeout={TIMEOUT_S}"]
    command += [f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={work}/again-", str(path)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _run_child(target: str, findings: Path, corpus: Path, seconds: int) -> str:
    command = [sys.executable, "-m", "tests.faults.fuzz_child", target, str(findings)]
    command += [str(corpus), str(CORPUS / target), f"-max_total_time={seconds}"]
    command += [f"-max_len={MAX_INPUT_BYTES}", f"-timeout={TIMEOUT_S}", "-print_final_stats=1"]
    command += [f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={corpus.parent}/{target}-native-"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, stderr=subprocess.PIPE, text=True, errors="replace", check=False, env=environment
    ).stderr


def _keep_smallest(found: Path, kept: Path) -> int:
    """Copy the smallest of the new inputs until ``MAX_KEPT`` are kept; return how many there are.

    Each of them once reached a branch that none before had.
    """
    kept.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in kept.iterdir()}
    new = [path for path in found.iterdir() if path.name[:12] not in names]
    for path in sorted(new, key=lambda path: path.stat().st_size)[: max(0, MAX_KEPT - len(names))]:
        (kept / path.name[:12]).write_bytes(path.read_bytes())
    return len(list(kept.iterdir()))


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def record(run: dict[str, Any]) -> None:
    """Add ``run`` to those of its target, or correct the one that began when it did."""
    runs = json.loads(RECORD.read_text()) if RECORD.is_file() else []
    kept = [entry for entry in runs if _key(entry) != _key(run)]
    RECORD.write_text(json.dumps(sorted([*kept, run], key=_key), indent=2) + "\n")


def _key(run: dict[str, Any]) -> tuple[int, str]:
    return NAMES.index(run["target"]), run["date"]


def recheck(targets: list[str], work: Path) -> None:
    """Correct the last run of ``targets`` after running again what was found in ``work``."""
    last = {run["target"]: run for run in json.loads(RECORD.read_text())}
    for target in targets:
        record(last[target] | _sorted_out(target, work))


def main() -> None:
    """Fuzz what the command line names."""
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("targets", nargs="+", choices=[*NAMES, "all"])
    parser.add_argument("--minutes", type=float, default=30, help="for each target")
    parser.add_argument("--work", type=Path, help="folder of findings, logs and the whole corpus")
    parser.add_argument("--recheck", action="store_true", help="only run what was found again")
    given = parser.parse_args()
    if given.recheck:
        recheck(given.targets, given.work)
        return
    names = NAMES if "all" in given.targets else given.targets
    work = given.work or Path(tempfile.mkdtemp(prefix="edgekd-fuzz-"))
    n_found = 0
    for name in names:
        run = fuzz(name, given.minutes, work)
        record(run)
        n_found += len(run["findings"]) + run["crashes_hangs_or_memory"]
        print(json.dumps(run))
    sys.exit(f"{n_found} findings, in {work}" if n_found else 0)


if __name__ == "__main__":
    main()
