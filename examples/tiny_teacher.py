"""Make a teacher for the tutorial: a tiny Llama, trained here in about a minute.

    python examples/tiny_teacher.py teacher text

TEACHER becomes a Hugging Face folder, TEXT a folder with text-train.txt and text-held-out.txt: the
documentation of the Python that runs this. No network is needed. The teacher has learned which
words follow each other there, and nothing else.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from edgekd.distill.demo_text import write_corpus

# B rows, T tokens of a row
ROWS, ROW_TOKENS = 8, 96
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(text: str, folder: Path) -> Tokenizer:
    """Write a byte-level BPE with SmolLM's splitter, which llama.cpp knows, and return it."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text[:2_000_000]], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return tokenizer


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """Return the untrained teacher."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, ids: torch.Tensor, steps: int) -> None:
    """Teach ``model`` to continue the text ``ids``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    begun_s = time.monotonic()
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(ids) - ROW_TOKENS, (ROWS,)).tolist()
        rows_BT = torch.stack([ids[start : start + ROW_TOKENS] for start in starts])
        loss = model(input_ids=rows_BT, labels=rows_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            took_s = time.monotonic() - begun_s
            print(f"step {step} of {steps}: {loss.item():.2f} nats a token, {took_s:.0f} s")


def main() -> None:
    """Write teacher and text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    asked = parser.parse_args()
    for folder in (asked.teacher, asked.text):
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a model gains nothing from more
    path, held_out = write_corpus(asked.text)
    text = path.read_text("utf-8")
    tokenizer = train_tokenizer(text, asked.teacher)
    model = make_model(tokenizer.get_vocab_size())
    train(model, torch.tensor(tokenizer.encode(text).ids), asked.steps)
    model.save_pretrained(asked.teacher)
    print(f"{asked.teacher}: {model.num_parameters():,} parameters; text in {path} and {held_out}")


if __name__ == "__main__":
    main()
