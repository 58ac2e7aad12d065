"""A tiny model of the Llama family with a tokenizer of its own, built in memory from a seed."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.plan import Quant, make_plan

# A shell without job control starts what runs in the background with Ctrl-C ignored, and the
# programs that tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers of pytest-xdist on the same cores would wait for each other's threads.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    n_workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: n_workers] or cores)
    torch.set_num_threads(len(os.sched_getaffinity(0)))

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and 1234 dogs bark at 56 foxes.",
    "def add(a, b):\n    return a + b  # the sum of both\n",
    "Grüße aus Köln: ² ³ ½ — 日本語 и русский текст 🎉👩‍👩‍👧",
    "A distribution is a function that gives the probability of each outcome.",
]


def make_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """Return a byte-level BPE with SmolLM's splitter, trained on ``TEXTS``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer files of a checkpoint."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_tiny_model(folder: Path, *, seed: int = 0, n_layers: int = 3, **options: object) -> Path:
    """Write a Llama checkpoint of a few thousand weights into ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    settings: dict[str, object] = {
        "vocab_size": tokenizer.get_vocab_size() + 5,  # padded, as real models are
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | options)))
    model.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny checkpoint; shared, so never written to."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Checkpoint:
    return open_checkpoint(tiny_folder)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """SmolLM2-135M-Instruct, the demo's teacher; fetched (98 MB) where no demo has run yet."""
    from edgekd.distill.demo_teacher import fetch_teacher
    from edgekd.export.from_gguf import gguf_to_checkpoint
    from edgekd.progress import Silence

    folder = tmp_path_factory.mktemp("smollm2") / "teacher"
    gguf_to_checkpoint(fetch_teacher(Silence()), folder)
    return open_checkpoint(folder)


def make_gguf(checkpoint: Checkpoint, quant: Quant, folder: Path) -> Path:
    """Write ``checkpoint`` as a GGUF file into ``folder`` and return where."""
    from edgekd.export.to_gguf import write_gguf

    path = folder / f"{checkpoint.folder.name}-{quant}.gguf"
    write_gguf(checkpoint, make_plan(checkpoint, quant), path)
    return path


def make_onnx(checkpoint: Checkpoint, quant: Quant, folder: Path) -> Path:
    """Write ``checkpoint`` as an ONNX folder into ``folder`` and return where."""
    from edgekd.export.to_onnx import write_onnx

    path = folder / f"{checkpoint.folder.name}-{quant}"
    path.mkdir()
    write_onnx(checkpoint, make_plan(checkpoint, quant), path)
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as a Q4_0 GGUF."""
    return make_gguf(tiny, "q4_0", tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="session")
def tiny_onnx(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as an int4 ONNX folder."""
    return make_onnx(tiny, "q4_0", tmp_path_factory.mktemp("onnx"))
