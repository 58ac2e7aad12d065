"""What a GGUF file says about its model beside the converter's keys."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import ExportError, ModelError
from edgekd.export.checkpoint import open_checkpoint, read_licence
from edgekd.export.from_gguf import gguf_to_checkpoint
from edgekd.export.plan import make_plan
from edgekd.export.to_gguf import write_gguf
from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.llamacpp_engine import LlamaCppVocabulary
from tests.export.tiny_models import CARD, SAMPLING


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that may be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny-llama"))


def export(folder: Path) -> Path:
    checkpoint = open_checkpoint(folder)
    path = folder / "model.gguf"
    write_gguf(checkpoint, make_plan(checkpoint, "q4_0"), path)
    return path


def metadata_of(folder: Path) -> dict[str, Any]:
    return read_gguf_header(export(folder)).metadata


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def test_the_manifest_names_licence_and_sources(folder: Path) -> None:
    sources = [
        {"role": "teacher", "name": "smollm2-1.7b", "weights_sha256": "ab"},
        {"role": "student", "name": "smollm2-135m", "weights_sha256": "cd"},
    ]
    write_json(folder / "edgekd.json", {"licence": "Apache-2.0", "made_from": sources})
    (folder / "README.md").write_text("---\nlicense: other\ntags: [edge]\n---\n")
    found = metadata_of(folder)
    assert found["general.license"] == "Apache-2.0" and found["general.tags"] == ["edge"]
    assert found["general.base_model.count"] == 2
    assert found["general.base_model.0.name"] == "Smollm2 1.7b"
    assert found["general.base_model.0.description"] == "teacher"
    assert found["general.base_model.1.name"] == "Smollm2 135m"


def test_a_card_s_base_model_comes_before_the_manifest_s_sources(folder: Path) -> None:
    sources = [{"role": "teacher", "name": "local", "weights_sha256": "ab"}]
    write_json(folder / "edgekd.json", {"made_from": sources})
    (folder / "README.md").write_text("---\nbase_model: org/Base-135M\n---\n")
    found = metadata_of(folder)
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/org/Base-135M"


def test_a_quantized_file_is_named_and_sized_like_its_checkpoint(folder: Path) -> None:
    found = metadata_of(folder)
    assert found["general.name"] == "Tiny Llama"
    assert found["general.file_type"] == 2  # LLAMA_FTYPE_MOSTLY_Q4_0
    assert found["general.size_label"] == "137K"


def test_a_card_that_is_no_yaml_is_refused(folder: Path) -> None:
    (folder / "README.md").write_text("---\ntags: [edge\n---\n")
    with pytest.raises(ModelError, match=r"the head of .*README.md is no YAML: .*expected"):
        export(folder)


def test_every_stop_token_ends_a_reply(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0, 300]})
    vocabulary = LlamaCppVocabulary(export(folder))
    assert vocabulary.stop_ids >= {0, 2, 300}
    assert 301 not in vocabulary.stop_ids


def test_more_stop_tokens_than_gguf_has_room_for_are_refused(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0, 300, 301]})
    with pytest.raises(ExportError, match=r"names 4 stop tokens \(\[2, 0, 300, 301\]\)"):
        export(folder)


def test_special_ids_come_from_the_config_where_the_tokenizer_names_none(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"bos_token": None, "pad_token": None}
    write_json(path, config)
    found = metadata_of(folder)
    assert found["tokenizer.ggml.bos_token_id"] == 1
    assert found["tokenizer.ggml.padding_token_id"] == 2


def test_what_a_file_says_of_its_model_survives_being_read_back(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "README.md").write_text(CARD)
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0], **SAMPLING})
    first = export(folder)
    gguf_to_checkpoint(first, tmp_path / "back")
    expected, found = read_gguf_header(first).metadata, metadata_of(tmp_path / "back")
    assert {key: found.get(key) for key in expected} == expected
    assert read_licence(tmp_path / "back") == "apache-2.0"
