"""One fuzzing process: libFuzzer, guided by the branches that Python takes (atheris).

    python -m tests.faults.fuzz_child TARGET FINDINGS CORPUS... [libFuzzer options]

A Python exception is written into the folder FINDINGS, once for each place that raises it, and the
run goes on; a crash of native code, a hang or too much memory ends it, as libFuzzer does. Started
by fuzz.py, which reads the statistics off its standard error.
"""

import json
import sys
import traceback
from pathlib import Path

import atheris

from tests.faults.fuzz_targets import INSTRUMENTED, Target, open_target


def recording(run: Target, findings: Path) -> Target:
    """Return ``run`` with every new kind of exception written into ``findings``."""
    seen: set[str] = set()

    def target(data: bytes) -> None:
        try:
            run(data)
        except Exception as error:  # any that is not refused on purpose is what is looked for
            if (place := where(error)) not in seen:
                seen.add(place)
                name = findings / f"finding-{len(list(findings.iterdir())) // 2:03d}"
                name.write_bytes(data)
                document = {"place": place, "error": repr(error)[:500]}
                name.with_suffix(".json").write_text(json.dumps(document) + "\n")

    return target


def where(error: BaseException) -> str:
    """Return the kind of ``error`` and the innermost function of edgekd that let it pass."""
    frames = [
        f"{Path(frame.filename).name}:{frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "/tests/" not in frame.filename and "site-packages" not in frame.filename
    ]
    return f"{type(error).__name__} in {frames[-1] if frames else 'a check of the fuzzer'}"


def main() -> None:
    """Fuzz until the time is over."""
    name, findings, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=INSTRUMENTED[name]), open_target(name) as run:
        atheris.Setup([sys.argv[0], *arguments], recording(run, Path(findings)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
