"""``edgekd bench`` on another machine over ssh: the same command there, its document brought back.

The machine runs an edgekd of its own. Models are copied once, by their hash, and what runs there
ends with the connection.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd.errors import DeviceError, EngineError
from edgekd.progress import Progress, Silence
from edgekd.runtime.bench_remote_address import SshAddress
from edgekd.runtime.bench_remote_artifact import read_artifact, read_pack_artifact
from edgekd.runtime.bench_remote_document import DocumentReader
from edgekd.runtime.bench_remote_ssh import LOST, SshHost, missing_edgekd
from edgekd.runtime.bench_remote_tied import Ended
from edgekd.runtime.bench_settings import BenchSettings

_OWN_ERROR = "edgekd: "


def run_bench_over_ssh(
    models: Sequence[str],
    settings: BenchSettings,
    address: SshAddress,
    progress: Progress | None = None,
    *,
    remote_edgekd: str | None = None,
    reference: Path | None = None,
) -> dict[str, Any]:
    """Return the document of a bench of ``models`` on the machine at ``address``.

    It is the one that edgekd wrote there, with the models under their names here and
    ``machine.address``. With the pack ``reference``, which is copied as models are, their quality
    is measured there too.

    Raises:
        ModelError: a model is not there, or is none.
        DataError: the pack is not there.
        DeviceError: the machine cannot be reached, has no edgekd or no room, or was lost meanwhile.
        EngineError: edgekd failed there; the reason is its own.
        MissingExtraError: jsonschema, which checks the document, is not installed.
    """
    progress = progress or Silence()
    reader = DocumentReader()
    artifacts = [read_artifact(model) for model in models]
    host = SshHost(address, progress)
    pack = read_pack_artifact(reference) if reference else None
    carried = [*artifacts, pack] if pack else artifacts
    facts = host.look([artifact.sha256 for artifact in carried], remote_edgekd)
    if facts.edgekd is None:
        extras = sorted({artifact.extra for artifact in artifacts})
        raise missing_edgekd(address, facts, extras, remote_edgekd)
    places = [host.copy(artifact, facts) for artifact in artifacts]
    options = bench_options(settings)
    if pack:
        options += ["--reference", host.copy(pack, facts)]
    ended = host.run((*facts.edgekd, "bench", *places, *options, "--json"))
    if ended.code:
        raise _failure(host, ended)
    document = reader.read(ended.output, str(address), len(artifacts))
    document["machine"]["address"] = str(address)
    for result, artifact in zip(document["results"], artifacts, strict=True):
        result["model"] = str(artifact.path)
    if reference and document.get("quality_reference"):
        document["quality_settings"]["reference"] = str(reference)
        document["quality_reference"]["pack"] = str(reference)
    return document


def bench_options(settings: BenchSettings) -> list[str]:
    """Return the options of ``edgekd bench`` that mean ``settings``."""
    options = {
        "-p": settings.prompt_tokens,
        "-n": settings.decode_tokens,
        "-d": _joined(settings.depths),
        "-r": settings.repetitions,
        "--ttft": _joined(settings.ttft_tokens),
        "--soak": settings.soak_minutes,
    }
    words = [word for name, value in options.items() for word in (name, str(value))]
    if settings.n_threads is not None:
        words += ["-t", str(settings.n_threads)]
    words.append("--cold" if settings.cold_start else "--no-cold")
    words.append("--roofline" if settings.roofline else "--no-roofline")
    return words


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _failure(host: SshHost, ended: Ended) -> DeviceError | EngineError:
    """Return the reason that edgekd gave there, or what became of the connection."""
    if ended.code == LOST:
        return DeviceError(
            f"the connection to {host.address} was lost while it measured ({ended.last_line}); "
            "what ran there was ended with it, run the same command again: the model is there"
        )
    said = [line for line in ended.errors if line.startswith(_OWN_ERROR)]
    reason = said[-1].removeprefix(_OWN_ERROR) if said else ended.last_line
    return EngineError(f"{host.address}: {reason}")
