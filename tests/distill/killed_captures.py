"""Capture one cache again and again, each time killed at a random moment.

    python killed_captures.py TEACHER TEXT OUT N_KILLS

Children are forked from a process that has imported everything and computed nothing, so that a
kill hits the capture and not the imports: some while it starts, most after a shard or two more, in
the middle of the next. Prints how many shards there were after each kill, as JSON. Started by
test_cache.py.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from edgekd.distill.cache import CaptureSettings, capture

SETTINGS = CaptureSettings(row_tokens=32, top_k=8, tail_samples=4, shard_tokens=64)
_SOON_S = 0.02  # about what a shard takes


def main(teacher: str, text: str, out: str, n_kills: str) -> None:
    """Kill ``n_kills`` captures."""
    random.seed(0)
    n_shards: list[int] = []
    while len(n_shards) < int(n_kills):
        child = _start(teacher, text, Path(out))
        _wait_for_a_moment(child, Path(out))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "a capture came to its end; it needs a longer text"
        n_shards.append(_n_shards(Path(out)))
    print(json.dumps(n_shards))


def _wait_for_a_moment(child: int, out: Path) -> None:
    """Return at some moment before ``child`` has ended."""
    if random.random() < 0.3:
        time.sleep(random.uniform(0, 10 * _SOON_S))
        return
    enough = _n_shards(out) + random.randint(1, 2)
    while _n_shards(out) < enough and not os.waitid(
        os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        time.sleep(0.001)
    time.sleep(random.uniform(0, _SOON_S))


def _n_shards(out: Path) -> int:
    return len(list(out.glob("shard-*.safetensors")))


def _start(teacher: str, text: str, out: Path) -> int:
    child = os.fork()
    if child == 0:
        capture(teacher, [text], out, SETTINGS)
        os._exit(0)
    return child


if __name__ == "__main__":
    main(*sys.argv[1:])
