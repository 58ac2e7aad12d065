"""Two commands that every process of a launch runs together, and what rank 0 does alone."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]

from stages import Stages  # noqa: E402


def main() -> None:
    teacher, student, text, work = sys.argv[1:]
    stages = Stages(Path(work), {"text": text})
    for name in ("first", "second"):
        command = ["distill", "--teacher", teacher, "--student", student, "--data", text]
        command += ["--out", str(Path(work) / name), "--steps", "2", "--row-tokens", "32"]
        stages.together(name, [*command, "--rows-per-step", "4", "--compile", "none"])
        stages.alone(f"after-{name}", lambda: {"rank": int(os.environ["RANK"])})
    found = stages.results()
    assert list(found) == ["settings", "first", "after-first", "second", "after-second"], found
    (Path(work) / f"seen-by-{stages.rank}").touch()


if __name__ == "__main__":
    main()
