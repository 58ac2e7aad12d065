"""Training runs that take turns step by step, so that a noisy minute hits all of them alike."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


def take_turns(
    commands: Mapping[str, Sequence[str]], n_steps: int
) -> dict[str, list[dict[str, float]]]:
    """Return what each command's process reports for each of its steps.

    Every process must train with the callback of :func:`turn_callback`.
    """
    workers = {
        name: subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
        )
        for name, command in commands.items()
    }
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(n_steps):
        for name, worker in workers.items():
            assert worker.stdin and worker.stdout
            print("go", file=worker.stdin, flush=True)
            line = worker.stdout.readline()
            while line and not line.startswith('{"seconds"'):
                line = worker.stdout.readline()
            if line:
                steps[name].append(json.loads(line))
                print(number + 1, name, line.strip(), file=sys.stderr)
    for worker in workers.values():
        worker.communicate()
    return steps


def turn_callback() -> Any:
    """Return a callback that waits for its turn before each step and reports after it."""
    from transformers import TrainerCallback

    from edgekd.devices.memory import peak_rss_bytes

    class TakeTurns(TrainerCallback):  # type: ignore[misc]
        start_s = seconds = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            sys.stdin.readline()
            self.start_s = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.start_s

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
            if "loss" in logs:
                step = {"seconds": self.seconds, "loss": logs["loss"]}
                print(json.dumps(step | {"peak_rss_bytes": peak_rss_bytes()}), flush=True)

    return TakeTurns()
