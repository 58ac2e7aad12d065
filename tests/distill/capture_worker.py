"""One rank of a capture, with shards so small that every rank has some.

    torchrun --nproc-per-node 2 capture_worker.py TEACHER TEXT OUT

Started by test_distributed.py.
"""

import os
import sys
import time
from pathlib import Path

from edgekd.distill.cache import CaptureSettings, capture

SETTINGS = CaptureSettings(row_tokens=32, shard_tokens=128)

if __name__ == "__main__":
    teacher, text, out = sys.argv[1:]
    # The last rank is late, so that the first one has something to wait for.
    time.sleep(3 if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1) else 0)
    capture(teacher, [text], Path(out), SETTINGS)
