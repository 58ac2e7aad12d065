"""Our GGUF files against those of llama.cpp's own converter, key by key and byte by byte.

The converter comes out of llama-cpp-python's source archive. What it does otherwise is listed here
with the reason; a difference that is not listed is a failure, and so is a listed one that is gone.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from edgekd.distill.demo_teacher import fetch_teacher
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.from_gguf import write_text_side
from edgekd.export.plan import Quant, make_plan
from edgekd.export.to_gguf import write_gguf
from edgekd.progress import Silence
from edgekd.runtime.gguf_header import read_gguf_header
from tests.conftest import save_tokenizer
from tests.export.tiny_models import CARD, SAMPLING, save_model
from tests.export.tiny_tokenizers import save_pieces, train_byte_level

ROOT = Path(__file__).parents[2]
QUANTS: tuple[Quant, ...] = ("f32", "f16", "q8_0")


@dataclass(frozen=True)
class Case:
    """A checkpoint: a tiny model with a tokenizer."""

    model: str
    """As in ``MODELS``."""
    tokenizer: str
    """The splitter of a byte-level BPE, or "pieces" with or without a space put first."""

    @property
    def has_pieces(self) -> bool:
        return self.tokenizer.startswith("pieces")


CASES = {
    "smollm2": Case("llama tied", "smollm"),
    "smollm2 in its own tokenizer": Case("llama tied", "fetched"),
    "llama2": Case("llama linear rope", "pieces after a space"),
    "llama3": Case("llama3 rope", "llama-bpe"),
    "mistral": Case("mistral", "pieces after a space"),
    "smollm3": Case("smollm3", "llama-bpe"),
    "qwen2.5": Case("qwen2", "qwen2"),
    "qwen2.5 untied": Case("qwen2 untied", "qwen2"),
    "qwen3": Case("qwen3", "qwen2"),
    "gemma3": Case("gemma3", "pieces"),
    "gemma3 softcap": Case("gemma3 softcap", "pieces"),
    "phi3": Case("phi3", "pieces after a space"),
    "phi3 longrope": Case("phi3 longrope", "pieces after a space"),
    "phi4": Case("phi4", "llama-bpe"),
}


@dataclass(frozen=True)
class Difference:
    """A metadata entry that only we write."""

    key: str
    value: Callable[[dict[str, Any]], Any]
    """What it must be, from all our entries."""
    where: Callable[[Case, str], bool]
    """By case and GGUF architecture: exactly where the converter leaves it out."""
    why: str


def _default_head_dim(ours: dict[str, Any]) -> int:
    architecture = ours["general.architecture"]
    heads = ours[f"{architecture}.attention.head_count"]
    return int(ours[f"{architecture}.embedding_length"] // heads)


def _n_tokens(ours: dict[str, Any]) -> int:
    return len(ours["tokenizer.ggml.tokens"])


def _head_dim(ours: dict[str, Any]) -> int:
    return int(ours[f"{ours['general.architecture']}.attention.key_length"])


_SAID_OUTRIGHT = "llama.cpp's default, said outright for readers with other defaults"
DIFFERENCES = (
    *(
        Difference(
            f"{{architecture}}.attention.{kind}_length",
            _default_head_dim,
            lambda case, architecture: architecture in ("smollm3", "qwen2", "phi3"),
            _SAID_OUTRIGHT,
        )
        for kind in ("key", "value")
    ),
    Difference(
        "{architecture}.vocab_size",
        _n_tokens,
        lambda case, architecture: architecture not in ("llama", "smollm3"),
        _SAID_OUTRIGHT,
    ),
    Difference(
        "{architecture}.rope.dimension_count",
        _head_dim,
        lambda case, architecture: architecture in ("qwen2", "qwen3", "gemma3"),
        _SAID_OUTRIGHT,
    ),
    Difference(
        "tokenizer.ggml.add_space_prefix",
        lambda ours: ours["tokenizer.ggml.model"] == "llama",
        lambda case, architecture: architecture != "gemma3",
        _SAID_OUTRIGHT,
    ),
    Difference(
        "tokenizer.ggml.add_bos_token",
        lambda ours: False,
        lambda case, architecture: case.tokenizer in ("smollm", "qwen2"),
        "where no post-processor says so the converter says nothing, and llama.cpp goes by the "
        "splitter: with llama-bpe it would add a token",
    ),
    Difference(
        "tokenizer.ggml.add_eos_token",
        lambda ours: False,
        lambda case, architecture: True,
        "as with the first token",
    ),
    Difference(
        "tokenizer.ggml.eot_token_id",
        lambda ours: 0,
        lambda case, architecture: case.tokenizer != "fetched",
        "the converter does not read the further stop tokens of generation_config.json; llama.cpp "
        "then stops only at those whose text it happens to know",
    ),
)


def _write_card(folder: Path) -> None:
    (folder / "README.md").write_text(CARD)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 0], **SAMPLING}))


def _save_case(case: Case, folder: Path) -> Checkpoint:
    if case.has_pieces:
        save_model(case.model, folder, vocab_size=570)
        save_pieces(folder, adds_space_prefix=case.tokenizer == "pieces after a space")
    elif case.tokenizer == "fetched":
        save_model(case.model, folder, vocab_size=49_152)
        write_text_side(read_gguf_header(fetch_teacher(Silence())), folder)
        return open_checkpoint(folder)
    else:
        save_model(case.model, folder)
        adds_bos = case.tokenizer == "llama-bpe"
        save_tokenizer(folder, train_byte_level(case.tokenizer, adds_bos=adds_bos))
    if case.model == "phi4":  # by this class the converter tells Phi-4's tokenizer from Phi-3's
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    _write_card(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="session")
def converter() -> Path:
    """The folder of llama.cpp's converter."""
    script = ROOT / "scripts" / "fetch_converter.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    if result.returncode == 3:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


@pytest.fixture(scope="module")
def checkpoints(converter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Every case; asks for the converter, so that nothing else is fetched where that cannot be."""
    folder = tmp_path_factory.mktemp("oracle")
    # A name with the parts that llama.cpp's naming knows: base, size, kind, version.
    names = {name: folder / f"tiny{i}-200K-instruct-v0.1" for i, name in enumerate(CASES)}
    return {name: _save_case(CASES[name], path) for name, path in names.items()}


@pytest.fixture(scope="module")
def theirs(converter: Path, checkpoints: dict[str, Checkpoint]) -> dict[tuple[str, str], Path]:
    """What the converter makes of every checkpoint."""
    jobs: list[dict[str, str]] = []
    files: dict[tuple[str, str], Path] = {}
    for name, checkpoint in checkpoints.items():
        for quant in QUANTS:
            out = checkpoint.folder / f"theirs-{quant}.gguf"
            job = {"model": str(checkpoint.folder), "out": str(out), "outtype": quant}
            splitter = CASES[name].tokenizer
            jobs.append(job if splitter == "fetched" else {**job, "pre": splitter})
            files[name, quant] = out
    script = str(Path(__file__).with_name("run_converter.py"))
    command = [sys.executable, script, str(converter)]
    result = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return files


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", CASES)
def test_the_file_is_the_converter_s(
    name: str,
    quant: Quant,
    checkpoints: dict[str, Checkpoint],
    theirs: dict[tuple[str, str], Path],
    tmp_path: Path,
) -> None:
    checkpoint = checkpoints[name]
    write_gguf(checkpoint, make_plan(checkpoint, quant), tmp_path / "ours.gguf")
    our_metadata, our_tensors = _read(tmp_path / "ours.gguf")
    their_metadata, their_tensors = _read(theirs[name, quant])
    assert our_tensors == their_tensors
    only_ours = {}
    for difference in DIFFERENCES:
        architecture = our_metadata["general.architecture"]
        if difference.where(CASES[name], architecture):
            key = difference.key.format(architecture=architecture)
            only_ours[key] = difference.value(our_metadata)
    assert not set(only_ours) & set(their_metadata), "a listed difference is gone"
    assert our_metadata == their_metadata | only_ours


def test_every_listed_difference_occurs() -> None:
    architectures = ("llama", "smollm3", "qwen2", "qwen3", "gemma3", "phi3")
    for difference in DIFFERENCES:
        assert any(difference.where(c, a) for c in CASES.values() for a in architectures)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    reader = GGUFReader(path)
    metadata = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")  # the header, whose counts follow from the rest
    }
    tensors = {
        tensor.name: (tensor.shape.tolist(), tensor.tensor_type.name, tensor.data.tobytes())
        for tensor in reader.tensors
    }
    return metadata, tensors
