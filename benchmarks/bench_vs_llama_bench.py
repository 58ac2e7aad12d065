"""Does ``edgekd bench`` say what llama.cpp's own llama-bench says of the same file?

Both measure pp512 and tg128 in turns, in mirrored order. Both start anew each time and warm up as
they always do: where a process's memory happens to lie is worth up to 5 % of its speed, for as long
as it lives. Of the repetitions in one process the median counts, so that another program's moment
does not. The ratio of the rates is paired by turn. Needs a llama-bench built from the sources of
the installed llama-cpp-python:

    cmake -B build -DCMAKE_BUILD_TYPE=Release vendor/llama.cpp
    cmake --build build --target llama-bench
    python benchmarks/bench_vs_llama_bench.py M.gguf build/bin/llama-bench --turns 60 \
        --out benchmarks/results/bench_vs_llama_bench.json

Exits with 1 unless both intervals lie within 2 %. Not measured: load, memory, other engines.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import record

from edgekd.runtime.bench_process import BenchProcess
from edgekd.runtime.bench_settings import BenchSettings, Scenario
from edgekd.runtime.llama_bench_rows import samples_of, scenario_of
from edgekd.runtime.loading import default_threads
from edgekd.runtime.stats import paired_ratio, summarise

LIMIT = 0.02


def main() -> None:
    arguments = parse_arguments()
    settings = BenchSettings(n_threads=arguments.threads, repetitions=arguments.repetitions)
    scenarios = settings.scenarios()
    ours: dict[str, list[float]] = {scenario.name: [] for scenario in scenarios}
    theirs: dict[str, list[float]] = {scenario.name: [] for scenario in scenarios}
    build = ""
    for turn in range(arguments.turns):
        for scenario in scenarios:
            for who in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
                if who == "ours":
                    ours[scenario.name].append(run_ours(arguments.model, settings, scenario))
                else:
                    row = run_llama_bench(arguments, scenario)
                    theirs[scenario.name].append(statistics.median(samples_of(row)))
                    build = f"{row['build_commit']} ({row['build_number']})"
            print(turn + 1, scenario.name, file=sys.stderr)
    results = {s.name: compare(s, ours[s.name], theirs[s.name]) for s in scenarios}
    result = {
        "model": arguments.model.name,
        "llama_bench_build": build,
        "n_threads": arguments.threads,
        "turns": arguments.turns,
        "repetitions_of_a_turn": arguments.repetitions,
        "limit": LIMIT,
        "results": results,
    }
    record(result, arguments.out)
    if not all(entry["within"] for entry in results.values()):
        sys.exit(f"not within {LIMIT:.0%}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("llama_bench", type=Path)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("-r", "--repetitions", type=int, default=3, help="in each turn")
    parser.add_argument("-t", "--threads", type=int, default=default_threads())
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def run_ours(model: Path, settings: BenchSettings, scenario: Scenario) -> float:
    """Return the median seconds of the repetitions in a process of their own."""
    with BenchProcess(str(model), settings) as process:
        process.ask("warm_up", scenario=asdict(scenario), limit_s=settings.warm_up_s)
        samples_s = [
            float(process.ask("run", scenario=asdict(scenario))["seconds"])
            for _ in range(settings.repetitions)
        ]
    return statistics.median(samples_s)


def run_llama_bench(arguments: argparse.Namespace, scenario: Scenario) -> dict[str, Any]:
    is_prefill = scenario.kind == "prefill"
    numbers = {
        "-p": scenario.n_tokens if is_prefill else 0,
        "-n": 0 if is_prefill else scenario.n_tokens,
        "-t": arguments.threads,
        "-r": arguments.repetitions,
    }
    command = [str(arguments.llama_bench), "-m", str(arguments.model), "-o", "json"]
    command += [str(part) for pair in numbers.items() for part in pair]
    reply = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    (row,) = json.loads(reply.stdout)
    assert scenario_of(row).name == scenario.name
    return dict(row)


def compare(scenario: Scenario, ours_s: list[float], theirs_s: list[float]) -> dict[str, Any]:
    ratio = paired_ratio(ours_s, theirs_s)  # of their times over ours: of our speed over theirs
    within = ratio is not None and ratio.low >= 1 - LIMIT and ratio.high <= 1 + LIMIT
    return {
        "ours_tokens_per_s": asdict(summarise([scenario.n_tokens / s for s in ours_s])),
        "llama_bench_tokens_per_s": asdict(summarise([scenario.n_tokens / s for s in theirs_s])),
        "speed_ratio": asdict(ratio) if ratio else None,
        "within": within,
    }


if __name__ == "__main__":
    main()
