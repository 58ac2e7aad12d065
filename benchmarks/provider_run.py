"""One ONNX folder on one execution provider beside the CPU: what benchmarks/providers.py starts.

    python benchmarks/provider_run.py FOLDER openvino

Runs in the environment of that provider, which holds no torch and no other ONNX Runtime; prints one
JSON document as its last line. Both engines are edgekd's own and get the same ids: once as one
prompt, once token by token. NOT measured: speed.
"""

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import EdgekdError
from edgekd.manifest import tool_versions
from edgekd.runtime.engine import Engine
from edgekd.runtime.fidelity import Fidelity, distances, log_softmax
from edgekd.runtime.loading import open_model
from edgekd.runtime.providers import CPU, PROVIDERS, create_session, nodes_of
from edgekd.runtime.static_model import is_static, read_static

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

# T tokens, V vocabulary

_TEXT = (
    "A lighthouse keeper climbs the same stairs every evening. He trims the lamp, winds the "
    "clockwork that turns the lens, and writes the weather into a book that nobody reads."
)
_N_TOKENS, _CONTEXT_TOKENS = 24, 64
# What ONNX Runtime says, at its most talkative, of a node that a provider does not get.
_REFUSED = re.compile(r"(?P<why>\w+ kernel not found).* node name: (?P<node>\S+)")
_KEPT_BACK = re.compile(
    r"Force fallback to CPU execution for node: (?P<node>\S+) (?P<why>because .+)"
)
_NO_REASON = "the provider did not claim it, and gives no reason"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("provider")
    arguments = parser.parse_args()
    try:
        result = measure(arguments.folder, arguments.provider)
    except EdgekdError as error:
        result = {"unavailable": str(error)}
    print(json.dumps(result | {"tools": _versions(arguments.provider)}), flush=True)


def measure(folder: Path, provider: str) -> dict[str, Any]:
    """Return placement and fidelity of ``folder`` on ``provider``."""
    candidate = open_model(folder, context_tokens=_CONTEXT_TOKENS, n_threads=1, provider=provider)
    reference = open_model(folder, context_tokens=_CONTEXT_TOKENS, n_threads=1)
    assert candidate.provider_use
    ids = candidate.tokenizer.encode(_TEXT)[:_N_TOKENS]
    with closing(candidate.engine), closing(reference.engine):
        return {
            "engine": candidate.engine.name,
            "nodes": candidate.provider_use.nodes,
            "operators": {name: placed(path, provider) for name, path in _graphs(folder).items()},
            "to_cpu": {
                how.__name__: asdict(
                    compare(how(reference.engine, ids), how(candidate.engine, ids))
                )
                for how in (at_once, one_by_one)
            },
        }


def at_once(engine: Engine, ids: Sequence[int]) -> "Logits":
    """Return the logits [T, V] after each of ``ids``, run as one prompt."""
    engine.rewind()
    return engine.forward(ids, every_logit=True)


def one_by_one(engine: Engine, ids: Sequence[int]) -> "Logits":
    """Return the logits [T, V] after each of ``ids``, each run on the cache of those before."""
    engine.rewind()
    return np.stack([engine.forward([token]) for token in ids])


def compare(reference_TV: "Logits", candidate_TV: "Logits") -> Fidelity:
    """Return the mean distance from the CPU's logits."""
    found = distances(log_softmax(reference_TV), log_softmax(candidate_TV))
    return Fidelity(float(found.kl_T.mean()), float(found.is_same_T.mean()), len(found.kl_T))


def placed(path: Path, provider: str) -> list[dict[str, Any]]:
    """Return for each operator and provider how many nodes there are, and why on the CPU."""
    with tempfile.TemporaryFile() as log:
        with _stderr_into(log):
            session = create_session(path, provider, n_threads=1, log_severity=0)
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
    told = [match for pattern in (_REFUSED, _KEPT_BACK) for match in pattern.finditer(said)]
    reasons_told = {match["node"]: match["why"].strip() for match in told}
    reasons = {
        name: None if where != CPU else reasons_told.get(name, _NO_REASON)
        for name, (where, _) in nodes_of(session).items()
    }
    counts = Counter(
        (op_type, where, reasons[name]) for name, (where, op_type) in nodes_of(session).items()
    )
    return [
        {"operator": op_type, "provider": where, "nodes": n, "why_on_cpu": reason}
        for (op_type, where, reason), n in sorted(counts.items(), key=lambda one: str(one[0]))
    ]


def _graphs(folder: Path) -> dict[str, Path]:
    names = read_static(folder).all_parts() if is_static(folder) else ["model"]
    return {name: folder / f"{name}.onnx" for name in names}


@contextmanager
def _stderr_into(file: IO[bytes]) -> Iterator[None]:
    """Send what the libraries of this process say into ``file``."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _versions(provider: str) -> dict[str, str]:
    """Return the versions of the tools here, and of the package that brings the provider."""
    from importlib.metadata import version

    package = PROVIDERS[provider].pip_name or "onnxruntime"
    return tool_versions() | {package: version(package)}


if __name__ == "__main__":
    main()
