"""Every command that the fault matrix breaks, on a world of tiny models."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random

from tests.conftest import TEXTS, save_tiny_model
from tests.faults.forks import Zygote

HUB_ID = "nobody/nothing"
_UNCLEAR, _USAGE = 3, 2
"""Exit codes of ``bench compare``."""
_FOR_NPU = ["--target", "qnn", "--ctx", "64", "--prefill", "16", "--no-emulate"]
_SIZES = ["-p", "8", "-n", "4", "-r", "1", "--no-roofline", "--no-cold"]


@dataclass(frozen=True)
class Command:
    """How one command is started, and what it reads and writes."""

    name: str
    argv: list[str]
    """``{model}``, ``{text}``, ``{cache}`` and ``{out}`` stand for paths."""
    model: str | None = None
    """What of the world stands for ``{model}``."""
    out: str | None = None
    """Name of the result in the place where it runs; None where it writes nothing."""
    check: list[str] = field(default_factory=list)
    """The command that checks the result, ``{out}``; it exits with 0."""
    stdin: str = ""
    is_endless: bool = False
    """Whether it runs until it is told to stop."""
    takes_hub_id: bool = True
    memory_bytes: int | None = None
    """Address space in which its engine's process cannot open a model, but it can say so."""
    resumes: bool = False
    """Whether it goes on with what an earlier run of it left, and so leaves what it has."""
    appends: bool = False
    """Whether its result is lines, always the same: what a killed run left is their beginning."""
    refuses_old: bool = False
    """Whether it writes nothing where a result lies already."""
    is_small: bool = False
    """Whether its result fits on a disk that is full for others."""
    endings: tuple[int, ...] = (0,)
    """The exit codes that say all is well."""
    refusal: int = 1
    """The exit code of an error."""

    def arguments(self, world: "World", place: Path, model: Path | str | None) -> list[str]:
        """Return the arguments, with ``model`` in the place of the world's own."""
        chosen = model or (world.folder / self.model if self.model else "")
        values = {
            "model": str(chosen),
            "text": str(world.folder / "text.txt"),
            "prompts": str(world.folder / "prompts.jsonl"),
            "cache": str(world.folder / "cache"),
            "out": str(place / (self.out or "out")),
        }
        return [part.format(**values) for part in self.argv]

    def checking(self, world: "World", place: Path) -> list[str]:
        """Return the arguments of the command that checks the result."""
        out, model = place / (self.out or ""), world.folder / "tiny.gguf"
        return [part.format(out=out, model=model) for part in self.check]


_DISTILL = ["--student", "{model}", "--data", "{text}", "--row-tokens", "32", "--steps", "2"]
_VERIFY = ["verify", "{out}"]
COMMANDS = [
    Command(
        "prune",
        ["prune", "{model}", "--keep", "0,1", "--out", "{out}", "--quiet"],
        "tiny",
        "pruned",
        _VERIFY,
    ),
    Command(
        "distill",
        ["distill", "--teacher", "{model}", *_DISTILL, "--out", "{out}", "--quiet"],
        "tiny",
        "student",
        _VERIFY,
    ),
    Command(
        "distill --cache",
        ["distill", "--cache", "{cache}", *_DISTILL, "--out", "{out}", "--quiet"],
        "tiny",
        "student",
        _VERIFY,
    ),
    Command(
        "cache",
        ["cache", "--teacher", "{model}", "--data", "{text}", "--row-tokens", "32"]
        + ["--out", "{out}", "--quiet"],
        "tiny",
        "recorded",
        ["cache", "inspect", "{out}"],
        resumes=True,
    ),
    Command(
        "answer",
        ["answer", "{prompts}", "--teacher", "{model}", "--max-tokens", "4", "--ctx", "256"]
        + ["--out", "{out}", "--quiet"],
        "tiny.gguf",
        "answers.jsonl",
        resumes=True,
        appends=True,
        is_small=True,
    ),
    Command("cache inspect", ["cache", "inspect", "{model}"], "cache", takes_hub_id=False),
    Command(
        "export --format gguf",
        ["export", "{model}", "--format", "gguf", "--out", "{out}", "--quiet"],
        "tiny",
        "small.gguf",
        _VERIFY,
    ),
    Command(
        "export --format onnx",
        ["export", "{model}", "--format", "onnx", "--out", "{out}", "--quiet"],
        "tiny",
        "small-onnx",
        _VERIFY,
    ),
    Command("verify", ["verify", "{model}"], "tiny.gguf", takes_hub_id=False),
    Command("verify (onnx)", ["verify", "{model}"], "tiny-onnx", takes_hub_id=False),
    Command(
        "eval",
        ["eval", "{model}", "--teacher", "{model}", "--text", "{text}", "--tokens", "64"]
        + ["--window", "32", "--write-reference", "{out}", "--quiet"],
        "tiny.gguf",
        "pack",
        ["eval", "{model}", "--reference", "{out}", "--quiet"],
        is_small=True,
    ),
    Command(
        "bench",
        ["bench", "{model}", *_SIZES, "--save", "{out}", "--quiet"],
        "tiny.gguf",
        "run.json",
        ["bench", "compare", "{out}", "{out}"],
        is_small=True,
    ),
    Command(
        "bench compare",
        ["bench", "compare", "{model}", "{model}"],
        "run.json",
        takes_hub_id=False,
        endings=(0, _UNCLEAR),
        refusal=_USAGE,
    ),
    Command(
        "report",
        ["report", "--int4", "{model}", "--text", "{text}", "--tokens", "64", "--no-roofline"]
        + ["-p", "8", "-n", "4", "-r", "1", "--save", "{out}", "--quiet"],
        "tiny.gguf",
        "rows.json",
        ["report", "{out}", "-o", "json"],
        is_small=True,
    ),
    Command("bench (onnx)", ["bench", "{model}", *_SIZES, "--quiet"], "tiny-onnx"),
    Command(
        "serve",
        ["serve", "{model}", "--port", "0", "--json", "--quiet"],
        "tiny.gguf",
        is_endless=True,
        memory_bytes=120 << 20,
    ),
    Command(
        "chat",
        ["chat", "{model}", "--max-tokens", "4", "--json", "--quiet"],
        "tiny.gguf",
        stdin="hi\n/exit\n",
        memory_bytes=120 << 20,
    ),
    Command("devices fit", ["devices", "fit", "{model}", "--on", "raspberry-pi-5"], "tiny.gguf"),
    Command("devices detect", ["devices", "detect"], takes_hub_id=False),
    Command("devices list", ["devices", "list"], takes_hub_id=False),
    Command("devices show", ["devices", "show", "raspberry-pi-5"], takes_hub_id=False),
    Command("doctor", ["doctor"], takes_hub_id=False),
    Command("demo", ["demo", "--out", "{out}", "--quiet"], out="demo", takes_hub_id=False),
]
if find_spec("onnxruntime_qnn"):
    COMMANDS.append(
        Command(
            "package",
            ["package", "{model}", "--target", "android", "--out", "{out}", "--quiet"],
            "tiny-qnn",
            "phone",
            takes_hub_id=False,
            refuses_old=True,
        )
    )
BY_NAME = {command.name: command for command in COMMANDS}


@dataclass(frozen=True)
class World:
    """Models, text and a cache that every command reads and none may change."""

    folder: Path


def make_world(folder: Path, zygote: Zygote) -> World:
    """Return a world in ``folder``, made by the commands themselves."""
    world = World(folder)
    save_tiny_model(folder / "tiny")
    (folder / "text.txt").write_text("\n\n\n".join(TEXTS), "utf-8")
    prompts = [json.dumps({"prompt": text}) for text in TEXTS]
    (folder / "prompts.jsonl").write_text("\n".join(prompts), "utf-8")
    for name, made, *more in (
        ("export --format gguf", "tiny.gguf"),
        ("export --format onnx", "tiny-onnx"),
        ("cache", "cache"),
        ("bench", "run.json"),
        *([("export --format onnx", "tiny-qnn", *_FOR_NPU)] if "package" in BY_NAME else []),
    ):
        command, scratch = BY_NAME[name], folder / f"scratch-{made}"
        scratch.mkdir()
        argv = command.arguments(world, folder, None)
        argv[argv.index(str(folder / (command.out or "")))] = str(folder / made)
        outcome = zygote.run([*argv, *more], folder, scratch)
        assert outcome.code == 0, outcome.stderr
        shutil.rmtree(scratch)
    return world


def spoilt(source: Path, into: Path, how: str, draw: Random) -> Path:
    """Return a copy of ``source`` below ``into`` that is cut short, flipped or something else.

    Of a folder one file is spoilt: its weights, or for ``wrong type`` its description.
    """
    copy = into / source.name
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copy(source, copy)
        manifest = source.with_name(f"{source.stem}.edgekd.json")
        if manifest.is_file():
            shutil.copy(manifest, into / manifest.name)
    victim = _victim(copy, how)
    _SPOIL[how](victim, draw)
    return copy


def _victim(copy: Path, how: str) -> Path:
    if copy.is_file():
        return copy
    described = ["cache.json", "model.onnx", "npu.json", "config.json"]
    stored = [
        "decode_qnn.bin",
        "shard-00000.safetensors",
        "model.onnx.data",
        "model.onnx_data",
        "model.safetensors",
    ]
    for name in described if how == "wrong type" else stored + described:
        if (copy / name).is_file():
            return copy / name
    raise AssertionError(f"nothing to spoil in {list(copy.iterdir())}")


def _cut(path: Path, draw: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) * 9 // 10)])


def _flip(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _retype(path: Path, draw: Random) -> None:
    others: list[bytes] = [
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        json.dumps([1, 2, 3]).encode(),
        b"PK\x03\x04" + bytes(64),
        struct.pack("<Q", 2**60) + b"{}",
        b"",
    ]
    path.write_bytes(draw.choice(others))


_SPOIL: dict[str, Callable[[Path, Random], None]] = {
    "cut short": _cut,
    "flipped bit": _flip,
    "wrong type": _retype,
}
