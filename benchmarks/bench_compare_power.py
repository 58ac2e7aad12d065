"""Does ``edgekd bench compare`` call a slowdown a regression, and no change none?

The same file is measured as two models that take turns. In half of the tries the second one's
process really works more: it computes 8 % of all tokens a second time. Every try is a run of its
own, written to files and compared by the command's function at ``--max-regress 5%``.

    python benchmarks/bench_compare_power.py M.gguf --tries 20 \
        --out benchmarks/results/bench_compare_power.json

Exits with 1 unless at least 19 of 20 slowdowns are called a regression, and at most 1 of 20
unchanged models. Not measured: slowdowns of memory, of loading, and of other sizes.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record

from edgekd.runtime.bench import BenchSettings, run_bench
from edgekd.runtime.bench_compare import Comparison, compare
from edgekd.runtime.bench_formats import to_json

MAX_REGRESS = 0.05
NEEDED = 0.95


def main() -> None:
    arguments = parse_arguments()
    settings = BenchSettings(
        prompt_tokens=arguments.prompt_tokens,
        decode_tokens=arguments.decode_tokens,
        repetitions=arguments.repetitions,
        n_threads=arguments.threads,
    )
    tries: dict[str, list[dict[str, Any]]] = {"slowed": [], "unchanged": []}
    for number in range(arguments.tries):
        for name, share in (("slowed", arguments.slowdown), ("unchanged", 0.0)):
            comparison = one_try(arguments.model, settings, share)
            tries[name].append(summary(comparison))
            print(number + 1, name, comparison.verdict, file=sys.stderr)
    called = {
        name: sum(t["verdict"] == "regression" for t in found) for name, found in tries.items()
    }
    result = {
        "model": arguments.model.name,
        "settings": settings.as_dict(),
        "slowdown": arguments.slowdown,
        "max_regress": MAX_REGRESS,
        "tries": arguments.tries,
        "called_regression": called,
        "comparisons": tries,
    }
    record(result, arguments.out)
    few = called["slowed"] < NEEDED * arguments.tries
    many = called["unchanged"] > (1 - NEEDED) * arguments.tries
    if few or many:
        sys.exit(f"regressions called of {arguments.tries} tries each: {called}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--slowdown", type=float, default=0.08)
    parser.add_argument("-p", "--prompt-tokens", type=int, default=128)
    parser.add_argument("-n", "--decode-tokens", type=int, default=64)
    parser.add_argument("-r", "--repetitions", type=int, default=40)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def one_try(model: Path, settings: BenchSettings, share: float) -> Comparison:
    run = run_bench([str(model)] * 2, settings, extra_work={1: share})
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        file = Path(folder) / "run.json"
        file.write_text(to_json(run.as_dict()), "utf-8")
        return compare(f"{file}#0", f"{file}#1", MAX_REGRESS)


def summary(comparison: Comparison) -> dict[str, Any]:
    ratios = {entry.scenario: entry.speed_ratio for entry in comparison.compared}
    return {
        "verdict": comparison.verdict,
        "invalid_reasons": comparison.invalid_reasons,
        "speed_ratios": {n: [r.low, r.value, r.high] if r else None for n, r in ratios.items()},
    }


if __name__ == "__main__":
    main()
