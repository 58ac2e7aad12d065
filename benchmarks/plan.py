"""How near ``edgekd distill --plan`` is to what runs then take.

    python benchmarks/plan.py --teacher T --student S --text F --out benchmarks/results/plan.json

Every configuration is planned and then run for a few steps in a process of its own; memory is the
peak of that process, speed that of its fastest step (the plan knows nothing of other programs).
Where the student writes some of the text, steps differ: there it is that of all but the first two.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record

COMMON = {"steps": 5, "row_tokens": 256, "rows_per_step": 4, "compile": "none", "force": True}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, compiled": {"compile": "full"},
    "lora": {"adapter": "lora"},
    "cached": {},
    "checkpointed": {"gradient_checkpointing": True},
    "on-policy": {"on_policy": 0.5, "divergence": "reverse_kl", "steps": 14},
}
_N_WARM_UP = 2


def measure(name: str, teacher: str, student: str, text: str) -> dict[str, Any]:
    """Plan and run one configuration in this process."""
    from edgekd.devices.memory import peak_rss_bytes
    from edgekd.distill.distill import distill, plan
    from edgekd.distill.recipe import resolve_job

    with tempfile.TemporaryDirectory() as folder:
        cache = str(Path(folder) / "cache")
        if name == "cached":
            command = [
                sys.executable,
                "-m",
                "edgekd",
                "cache",
                "--teacher",
                teacher,
                "--data",
                text,
            ]
            subprocess.run([*command, "--row-tokens", "256", "--out", cache, "--quiet"], check=True)
        source = {"cache": cache} if name == "cached" else {"teacher": teacher}
        settings = COMMON | CONFIGURATIONS[name]
        job = resolve_job(None, {**source, "student": student, "data": [text], **settings})
        planned = plan(job)
        report = distill(job, Path(folder) / "out")
        log = (Path(folder) / "out" / "training_log.jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line) for line in log]
    if job.recipe.on_policy:
        seconds = steps[-1]["elapsed_s"] - steps[_N_WARM_UP - 1]["elapsed_s"]
        tokens_per_s = sum(step["tokens"] for step in steps[_N_WARM_UP:]) / seconds
    else:
        tokens_per_s = report["last"]["tokens"] / report["fastest_step_s"]
    return {
        "planned": planned.as_dict(),
        "peak_rss_bytes": peak_rss_bytes(),
        "tokens_per_s": tokens_per_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=list(CONFIGURATIONS))
    for name in ("--teacher", "--student", "--text"):
        parser.add_argument(name, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    paths = [arguments.teacher, arguments.student, arguments.text]
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, *paths)))
        return
    rows = {}
    options = [
        part
        for pair in zip(("--teacher", "--student", "--text"), paths, strict=True)
        for part in pair
    ]
    for name in CONFIGURATIONS:
        command = [sys.executable, __file__, "--worker", name, *options]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        row = json.loads(found.splitlines()[-1])
        planned = row["planned"]
        row["memory_planned_over_measured"] = planned["peak_bytes"] / row["peak_rss_bytes"]
        row["speed_planned_over_measured"] = planned["tokens_per_s"] / row["tokens_per_s"]
        rows[name] = row
        print(
            name,
            row["memory_planned_over_measured"],
            row["speed_planned_over_measured"],
            file=sys.stderr,
        )
    record({"rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
