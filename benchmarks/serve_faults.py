"""What ``edgekd serve`` does when everything goes wrong: kills, floods, leavers, dawdlers, leaks.

    python benchmarks/serve_faults.py M.gguf --out benchmarks/results/serve_faults.json

Starts the real command and asks it over HTTP. Prints figures and whether each is within its limit;
exits with 1 where one is not.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import record
from serve_faults_parts import Server, flood, gone, kills, memory, slow

PARTS: dict[str, Callable[[Server, argparse.Namespace], dict[str, Any]]] = {
    "kills": kills,
    "flood": flood,
    "gone": gone,
    "slow": slow,
    "memory": memory,
}


def main() -> int:
    asked = _parse()
    result: dict[str, Any] = {"model": Path(asked.model).name, "parallel": asked.parallel}
    for name in asked.parts.split(","):
        with _serving(asked) as server:
            begun_s = time.monotonic()
            result[name] = PARTS[name](server, asked)
            result[name]["took_s"] = round(time.monotonic() - begun_s, 1)
        print(name, json.dumps(result[name]), file=sys.stderr, flush=True)
    record(result, asked.out)
    return 0 if all(result[name]["ok"] for name in asked.parts.split(",")) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000, help="for the memory part")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@contextmanager
def _serving(asked: argparse.Namespace) -> Iterator[Server]:
    command = [sys.executable, "-m", "edgekd", "serve", asked.model, "--port", "0", "--json"]
    command += ["--quiet", "--ctx", "512", "--parallel", str(asked.parallel)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield Server(json.loads(process.stdout.readline())["url"], process.pid)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
