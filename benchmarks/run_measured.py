"""Run a command and print its seconds and its peak resident bytes as JSON.

    python -I -S benchmarks/run_measured.py COMMAND...

The peak is the largest of any process that the command started. It is measured from a small
process, since Linux counts what the parent held when a program is started into its ``ru_maxrss``:
a benchmark that has loaded models itself would find no smaller peak than its own.
"""

import json
import resource
import subprocess
import sys
import time


def main() -> None:
    start_s = time.perf_counter()
    done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=False)
    seconds = time.perf_counter() - start_s
    if done.returncode:
        raise SystemExit(done.returncode)
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit_bytes
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
