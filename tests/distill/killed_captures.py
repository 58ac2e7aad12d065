"""Capture one cache again and again, killed at random moments, until one capture ends.

    python killed_captures.py TEACHER TEXT OUT N_KILLS

Children are forked from a process that has imported everything and computed nothing, so that a
kill hits the capture and not the imports. Started by test_cache.py.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from edgekd.distill.cache import CaptureSettings, capture

SETTINGS = CaptureSettings(row_tokens=32, top_k=8, tail_samples=4, shard_tokens=64)


def main(teacher: str, text: str, out: str, n_kills: str) -> None:
    """Kill ``n_kills`` captures, each later than the one before on average."""
    moments = random.Random(0)
    n_killed = 0
    for number in range(int(n_kills)):
        child = os.fork()
        if child == 0:
            capture(teacher, [text], Path(out), SETTINGS)
            os._exit(0)
        time.sleep(moments.uniform(0.0, 0.05 * (number + 1)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        n_killed += os.WIFSIGNALED(status)
    print(n_killed)


if __name__ == "__main__":
    main(*sys.argv[1:])
