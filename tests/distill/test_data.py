import json
from pathlib import Path

import pytest

from edgekd.distill.data import encode_sample, read_documents
from edgekd.errors import DataError
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import save_tiny_model


def test_a_reply_of_one_token_is_learned_together_with_its_stop_token(tiny_folder: Path) -> None:
    tokenizer = FileTokenizer(tiny_folder)
    sample = {"prompt": "fox", "response": "a"}
    document = encode_sample(sample, tokenizer, read_chat_template(tiny_folder))
    targets = [i for i, wanted in zip(document.ids, document.learned, strict=True) if wanted]
    assert targets == [*tokenizer.encode("a"), 2]  # 2 is both the stop and the padding token


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|endoftext|>"])
def test_a_reply_ends_with_whichever_stop_token_its_template_gives(
    stop: str, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("<|im_end|>", stop)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, sample = FileTokenizer(folder), {"prompt": "fox", "response": "a"}
    document = encode_sample(sample, tokenizer, read_chat_template(folder))
    targets = [i for i, wanted in zip(document.ids, document.learned, strict=True) if wanted]
    assert targets == [*tokenizer.encode("a"), tokenizer.core.token_to_id(stop)]


def test_prompts_are_never_learned(tiny_folder: Path) -> None:
    tokenizer = FileTokenizer(tiny_folder)
    messages = [
        {"role": "user", "content": "dogs"},
        {"role": "assistant", "content": "bark"},
        {"role": "user", "content": "foxes"},
        {"role": "assistant", "content": "jump"},
    ]
    document = encode_sample({"messages": messages}, tokenizer, read_chat_template(tiny_folder))
    targets = [i for i, wanted in zip(document.ids, document.learned, strict=True) if wanted]
    assert (
        tokenizer.core.decode(targets, skip_special_tokens=False) == "bark<|im_end|>jump<|im_end|>"
    )


def test_the_kind_of_a_file_is_its_content_not_its_name(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("one fox", "two dogs")))
    assert len(read_documents([str(path)], FileTokenizer(tiny_folder), None)) == 2


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no text"),
        (b"\xff\xfe\x00binary", "no UTF-8 text"),
        (b'{"text": "a fox"}\n{broken', "line 2"),
        (b'{"other": 1}', "fields other"),
        (None, "no data at"),
    ],
)
def test_bad_data_is_named(
    content: bytes | None, complaint: str, tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        read_documents([str(path)], FileTokenizer(tiny_folder), None)
