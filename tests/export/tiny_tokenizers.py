"""Tokenizers of every kind that is exported, trained in memory on a few lines."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel

from edgekd.export.pretokenizer import build_splitter
from tests.conftest import CHAT_TEMPLATE, SPECIAL_TOKENS, TEXTS

_PIECE_TEXTS = [
    *TEXTS,
    "for (int i = 0; i < 10; i++) {\n\t\tsum += values[i];\n\t}\n",
    "Le c\u0153ur a ses raisons que la raison ne conna\u00eet point; 12 345,67 \u20ac.",
    "aaa aaaa ababab ======== -------- ........ \u65e5\u672c\u65e5\u672c",
]


def train_byte_level(splitter: str, *, adds_bos: bool = False, vocab_size: int = 400) -> Tokenizer:
    """Return a byte-level BPE that splits as llama.cpp's ``splitter``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = build_splitter(splitter)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    if adds_bos:
        bos = SPECIAL_TOKENS[1]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, 1)]
        )
    return tokenizer


def train_pieces(*, adds_space_prefix: bool, vocab_size: int = 560) -> bytes:
    """Return a SentencePiece model: BPE with byte fallback, as Llama 2's or as Gemma's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_PIECE_TEXTS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=adds_space_prefix,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def pieces_to_tokenizer(model: bytes, *, adds_space_prefix: bool) -> Tokenizer:
    """Return the tokenizer that Hugging Face ships for a SentencePiece ``model``."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    bpe = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
        if adds_space_prefix
        else spaces
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    marks = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    tokenizer.add_tokens([AddedToken("<table>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", pieces.bos_id())]
    )
    return tokenizer


def save_pieces(folder: Path, *, adds_space_prefix: bool) -> Tokenizer:
    """Write ``tokenizer.model``, the files of Hugging Face's form of it, and return that."""
    model = train_pieces(adds_space_prefix=adds_space_prefix)
    tokenizer = pieces_to_tokenizer(model, adds_space_prefix=adds_space_prefix)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(token_id): {"content": token.content, "special": token.special}
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
    }
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer
