from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from edgekd.distill.trim_vocabulary import choose_tokens, write_trimmed
from edgekd.errors import ModelError
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.export_model import export_model
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.tokenizer import FileTokenizer, decode
from tests.conftest import TEXTS, save_tiny_model

NEEDED = [TEXTS[0], "a sum of dogs"]


def _trim(checkpoint: Checkpoint, out: Path) -> tuple[list[int], Checkpoint]:
    tokenizer = FileTokenizer(checkpoint.folder)
    used = [token for text in NEEDED for token in tokenizer.encode(text)]
    trimmed = choose_tokens(tokenizer, used, checkpoint.config["vocab_size"])
    write_trimmed(checkpoint, trimmed, out)
    return trimmed.old_ids, open_checkpoint(out)


@pytest.mark.parametrize("is_tied", [True, False])
def test_kept_tokens_have_the_logits_they_had(is_tied: bool, tmp_path: Path) -> None:
    whole = open_checkpoint(save_tiny_model(tmp_path / "model", tie_word_embeddings=is_tied))
    old_ids, student = _trim(whole, tmp_path / "student")
    assert student.config["vocab_size"] == len(old_ids) < 390
    before = AutoModelForCausalLM.from_pretrained(whole.folder, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(student.folder, dtype=torch.float32)
    for text in NEEDED:
        ids = FileTokenizer(student.folder).encode(text)
        assert [old_ids[i] for i in ids] == FileTokenizer(whole.folder).encode(text)
        expected = before(torch.tensor([[old_ids[i] for i in ids]])).logits[..., old_ids]
        torch.testing.assert_close(after(torch.tensor([ids])).logits, expected)


def test_other_text_chats_and_special_tokens_still_work(tiny: Checkpoint, tmp_path: Path) -> None:
    old_ids, student = _trim(tiny, tmp_path / "student")
    whole, trimmed = FileTokenizer(tiny.folder), FileTokenizer(student.folder)
    for text in TEXTS:
        assert decode(trimmed, trimmed.encode(text)) == text
    for role in ("bos", "eos", "pad"):
        new, old = trimmed.special_id(role), whole.special_id(role)
        assert new is not None and old_ids[new] == old
    assert {old_ids[i] for i in trimmed.stop_ids} == whole.stop_ids
    messages = [{"role": "user", "content": "dogs"}]
    template, before = read_chat_template(student.folder), read_chat_template(tiny.folder)
    assert template and before
    chat = template.render(messages)
    assert chat == before.render(messages)
    assert decode(trimmed, trimmed.encode(chat)) == decode(whole, whole.encode(chat))
    export_model(str(student.folder), "gguf", tmp_path / "student.gguf", quant="q8_0")


def test_another_kind_of_tokenizer_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match="WordLevel"):
        choose_tokens(FileTokenizer(folder), [0], 400)
