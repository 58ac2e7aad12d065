r"""The five rows on a teacher of one's own: is a distilled student worth it, and does int4 keep it?

    python benchmarks/five_rows.py --teacher T --text F --held-out G --questions arc=Q.jsonl \
        --work W --minutes 100 --out benchmarks/results/five_rows.json
    accelerate launch benchmarks/five_rows.py ... --tokens 50M --rows-per-step 16

Every row's student starts as the same pruned one and sees the same number of tokens, in the same
order, batches and learning rates, in two parts:

    student baseline    hard labels, hard labels
    student distilled   the teacher's distributions, the teacher's distributions
    distilled + int4    the same first part as distilled, then on the int4 grid that ships

"student quantized" is the baseline rounded to Q4_0. Each row is the file that ships, on the engine
that runs it: llama.cpp for F16 and Q4_0, ONNX Runtime for a sixth line, the int4 row's own blocks
in an ONNX folder. KL and top-1 are to the teacher's checkpoint in torch, on held-out text; rows are
compared on that window by window. Speeds come from one ``edgekd bench`` in which all files take
turns.

Questions: benchmarks/questions.py writes ARC-Easy, PIQA and MMLU; any others will do.

Goes on where it was killed: give the same --work. Without --tokens it trains for as many as fit
into --minutes, after timing the teacher's row and a few steps of each kind; the time in which
nothing ran does not count. Not measured: variation over seeds, of training and of pruning.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from five_rows_budget import FIRST, RUNS, SECOND, Cost, cut, measuring_s, steps_within
from five_rows_differences import differences
from five_rows_options import parse_arguments, settings_of
from record import record
from stages import Json, Runner, Stages, run_as_process

from edgekd.cli_options import parse_count
from edgekd.export.checkpoint import open_checkpoint

PROBE_STEPS = 3
KINDS: dict[str, tuple[str, ...]] = {
    "baseline": ("--hard-label-weight", "1"),
    "distilled": (),
    "grid": ("--grid", "q4_0"),
}
FILES = {
    "teacher": ("teacher", "gguf", "f16"),
    "student baseline": ("baseline-second", "gguf", "f16"),
    "student quantized": ("baseline-second", "gguf", "q4_0"),
    "student distilled": ("distilled-second", "gguf", "f16"),
    "distilled + int4": ("grid-second", "gguf", "q4_0"),
    "distilled + int4 (ONNX)": ("grid-second", "onnx", "q4_0"),
}
"""Of every row: the checkpoint, the format and the quantization of its file."""
MAX_CURVE_POINTS = 60


class FiveRows:
    """One run: what was asked for, and its stages."""

    def __init__(self, arguments: argparse.Namespace, run: Runner) -> None:
        """Begin in ``arguments.work`` or go on in it."""
        self.asked = arguments
        self.work: Path = arguments.work
        self.stages = Stages(self.work, settings_of(arguments), run)

    def carry_out(self) -> Json:
        """Run the stages that have not ended yet and return the result."""
        pruned = self._student()
        self._export("teacher")
        self._measure("teacher")
        steps = self._plan(pruned)
        for kind, part in RUNS:
            self._train(pruned, kind, part, cut(steps, self.asked.grid_share)[part])
        for row in FILES:
            self._export(row)
            self._measure(row)
        bench = self.stages.alone("bench", lambda: self._bench(FILES, self.asked.repetitions))
        return self._result(pruned, steps, bench)

    def _student(self) -> Path:
        asked = self.asked
        student: Path = asked.student or self.work / "student-pruned"
        if not asked.student:
            command = ["prune", str(asked.teacher), "--params", asked.params, "--out", str(student)]
            command += self._data()
            self.stages.alone("prune", lambda: self.stages.edgekd(command))
        elif (n_parameters := open_checkpoint(student).n_parameters) > parse_count(asked.params):
            sys.exit(
                f"{student} has {n_parameters:,} parameters, more than --params {asked.params}"
            )
        return student

    def _data(self) -> list[str]:
        return [part for text in self.asked.text for part in ("--data", str(text))]

    def _plan(self, pruned: Path) -> int:
        asked = self.asked
        tokens_per_step = self._tokens_per_step()
        if asked.tokens:
            return max(2, -(-parse_count(asked.tokens) // tokens_per_step))
        self.stages.alone("pilot-bench", lambda: self._bench(["teacher"], 1))
        for kind in KINDS:
            self._run_training(f"probe-{kind}", pruned, pruned, kind, PROBE_STEPS, 0)
        return int(self.stages.alone("plan", self._fitted)["steps"])

    def _fitted(self) -> Json:
        asked, seconds, results = self.asked, self.stages.seconds(), self.stages.results()
        costs = {}
        for kind in KINDS:
            step_s = results[f"probe-{kind}"]["fastest_step_s"]
            fixed_s = max(0.0, seconds[f"probe-{kind}"] - PROBE_STEPS * step_s)
            costs[kind] = Cost(step_s, fixed_s)
        quality_s = sum(each for name, each in seconds.items() if name.startswith("quality-"))
        measure_s = measuring_s(
            seconds["export-teacher"], quality_s, seconds["pilot-bench"], asked.repetitions
        )
        left_s = asked.minutes * 60 - sum(seconds.values()) - measure_s
        steps = steps_within(left_s, costs, asked.grid_share)
        if not steps:
            sys.exit(
                f"--minutes {asked.minutes:g} leaves {left_s:.0f} s for training beside "
                f"{measure_s:.0f} s for measuring, too little; give more, or a smaller --limit"
            )
        return {"steps": steps, "left_s": left_s, "measuring_s": measure_s}

    def _tokens_per_step(self) -> int:
        asked = self.asked
        rows: int = asked.rows_per_step * asked.accumulation_steps * self.stages.world_size
        return rows * int(asked.row_tokens)

    def _train(self, pruned: Path, kind: str, part: str, steps: int) -> None:
        before = "baseline-first" if kind == "baseline" else "distilled-first"
        student = pruned if part == FIRST else self.work / before
        self._run_training(f"{kind}-{part}", pruned, student, kind, steps, int(part == SECOND))

    def _run_training(
        self, name: str, pruned: Path, student: Path, kind: str, steps: int, seed: int
    ) -> None:
        asked = self.asked
        rate = asked.learning_rate / (2 if student != pruned else 1)
        numbers = {
            "--steps": steps,
            "--row-tokens": asked.row_tokens,
            "--rows-per-step": asked.rows_per_step,
            "--accumulation-steps": asked.accumulation_steps,
            "--learning-rate": rate,
            "--warmup-steps": max(1, steps // 10),
            "--save-steps": max(50, steps // 5),
            "--seed": seed,
        }
        command = ["distill", "--teacher", str(asked.teacher), "--student", str(student)]
        command += [*self._data(), "--out", str(self.work / name), "--resume", *KINDS[kind]]
        command += [str(word) for pair in numbers.items() for word in pair]
        self.stages.together(name, [*command, *shlex.split(asked.extra)])

    def _file(self, row: str) -> Path:
        folder, output_format, quant = FILES[row]
        return self.work / f"{folder}-{quant}{'.gguf' if output_format == 'gguf' else '-onnx'}"

    def _checkpoint(self, row: str) -> Path:
        teacher: Path = self.asked.teacher
        return teacher if row == "teacher" else self.work / FILES[row][0]

    def _export(self, row: str) -> None:
        _, output_format, quant = FILES[row]
        command = ["export", str(self._checkpoint(row)), "--format", output_format]
        command += ["--quant", quant, "--out", str(self._file(row))]
        self.stages.alone(f"export-{slug(row)}", lambda: self.stages.edgekd(command))

    def _measure(self, row: str) -> None:
        asked = self.asked
        text = ["--teacher", str(asked.teacher), "--text", str(asked.held_out)]
        text += ["--tokens", str(asked.eval_tokens), "--window", str(asked.window)]
        limit = ["--limit", str(asked.limit)] if asked.limit else []
        self._evaluate(row, "text", text)
        for name, options in asked.questions:
            self._evaluate(row, name, [*options, *limit])

    def _evaluate(self, row: str, what: str, options: Sequence[str]) -> None:
        command = ["eval", str(self._file(row)), *options, *self._threads()]
        self.stages.alone(f"quality-{slug(row)}-{what}", lambda: self.stages.edgekd(command))

    def _threads(self) -> list[str]:
        return ["--threads", str(self.asked.threads)] if self.asked.threads else []

    def _bench(self, rows: Sequence[str] | dict[str, Any], repetitions: int) -> Json:
        asked = self.asked
        command = ["bench", *(str(self._file(row)) for row in rows), "-r", str(repetitions)]
        command += ["-p", str(asked.prompt_tokens), "-n", str(asked.decode_tokens), "--no-cold"]
        return self.stages.edgekd([*command, *self._threads()])

    def _result(self, pruned: Path, steps: int, bench: Json) -> Json:
        results, seconds = self.stages.results(), self.stages.seconds()
        rows = [
            self._row(row, results, speed)
            for row, speed in zip(FILES, bench["results"], strict=True)
        ]
        return {
            "settings": results["settings"],
            "teacher": self.asked.teacher.resolve().name,
            "student_parameters": open_checkpoint(pruned).n_parameters,
            "trained_tokens_per_row": steps * self._tokens_per_step(),
            "steps": cut(steps, self.asked.grid_share),
            "n_processes": self.stages.world_size,
            "minutes": sum(seconds.values()) / 60,
            "stages_s": seconds,
            "rows": rows,
            "differences": differences(lambda row: dict(results[f"quality-{slug(row)}-text"])),
            "speeds_valid": bench["valid"],
            "conditions": bench["conditions"],
            "curves": {
                name: curve_of(self.work / name / "training_log.jsonl")
                for name in (f"{kind}-{part}" for kind, part in RUNS)
            },
        }

    def _row(self, row: str, results: dict[str, Json], speed: Json) -> Json:
        def quality(what: str) -> Json:
            (found,) = results[f"quality-{slug(row)}-{what}"]["models"]
            return dict(found)

        text = quality("text")["text"]
        decode = next(each for each in speed["scenarios"] if each["kind"] == "decode")
        prefill = next(each for each in speed["scenarios"] if each["kind"] == "prefill")
        return {
            "row": row,
            "file": self._file(row).name,
            "engine": speed["engine"],
            "n_threads": speed["n_threads"],
            "n_parameters": open_checkpoint(self._checkpoint(row)).n_parameters,
            "file_bytes": speed["file_bytes"],
            "n_positions": text["n_positions"],
            "perplexity": text["perplexity"],
            "kl_nats": text["to_teacher"]["kl_nats"],
            "top1_agreement": text["to_teacher"]["top1_agreement"],
            "tasks": {name: quality(name)["questions"] for name, _ in self.asked.questions},
            "ms_per_token": 1000 / decode["tokens_per_s"]["mean"],
            "tokens_per_s": decode["tokens_per_s"],
            "prefill_tokens_per_s": prefill["tokens_per_s"],
            "peak_rss_bytes": speed["memory"]["peak_rss_bytes"]["value"],
            "energy_per_token": decode["energy_per_token"],
        }


def curve_of(path: Path) -> list[Json]:
    """Return the course of a training, its steps joined to MAX_CURVE_POINTS points."""
    log = path.read_text("utf-8").splitlines()
    steps = [each for line in log if "loss" in (each := json.loads(line))]
    size = -(-len(steps) // MAX_CURVE_POINTS)
    joined = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [
        {
            "step": part[-1]["step"],
            "elapsed_s": part[-1].get("elapsed_s"),
            "loss": sum(each["loss"] for each in part) / len(part),
        }
        for part in joined
    ]


def slug(row: str) -> str:
    """Return ``row`` as a part of a stage's name."""
    return "-".join(re.findall(r"\w+", row))


def main(words: Sequence[str] | None = None, run: Runner = run_as_process) -> None:
    arguments = parse_arguments(__doc__ or "", words)
    rows = FiveRows(arguments, run)
    result = rows.carry_out()
    if rows.stages.rank == 0:
        record(result, arguments.out)


if __name__ == "__main__":
    main()
