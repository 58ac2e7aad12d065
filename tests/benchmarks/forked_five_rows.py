"""benchmarks/five_rows.py, its commands forked from a process that has imported everything.

Importing torch takes seconds, thirty commands on a tiny model less than twenty. Each runs the whole
command line of edgekd, from its arguments to its exit code, in a process of its own.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import accelerate  # noqa: E402, F401  what the commands import on their way
import five_rows  # noqa: E402
import llama_cpp  # noqa: E402, F401
import onnx  # noqa: E402, F401
import onnxruntime  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401
from stages import die_with_parent  # noqa: E402

import edgekd.distill.carve  # noqa: E402, F401
import edgekd.distill.distill  # noqa: E402, F401
import edgekd.export.export_model  # noqa: E402, F401
import edgekd.runtime.evaluate  # noqa: E402, F401
from edgekd.cli import main  # noqa: E402


def fork(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> tuple[int, str]:
    with tempfile.TemporaryFile() as said:
        if (pid := os.fork()) == 0:
            _become(arguments, environment, log, said.fileno())
        _, status = os.waitpid(pid, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode()


def _become(arguments: Sequence[str], environment: Mapping[str, str], log: Path, said: int) -> None:
    code = 1
    try:
        die_with_parent()
        os.dup2(said, 1)
        with open(log, "ab") as errors:
            os.dup2(errors.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["edgekd", *arguments]
        main()
        code = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        else:
            code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    # llama.cpp's threads spin while they wait for one another on a core that others use.
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    five_rows.main(run=fork)
