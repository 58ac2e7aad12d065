"""Models whose chat template refuses a system message are exported, and refuse it still."""

import shutil
from pathlib import Path

import pytest

from edgekd.errors import ModelError, VerificationError
from edgekd.export.checkpoint import open_checkpoint
from edgekd.export.export_model import Format, export_model
from edgekd.export.probe_chats import rendered_chats
from edgekd.export.verify import check_text_side
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.loading import open_model
from tests.conftest import CHAT_TEMPLATE

# As Gemma's; Mistral's demands that user and assistant alternate, which comes to the same.
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHAT_TEMPLATE
)


def with_template(folder: Path, to: Path, template: str) -> Path:
    """Return a copy of the checkpoint in ``folder`` with another chat template."""
    shutil.copytree(folder, to)
    (to / "chat_template.jinja").write_text(template, "utf-8")
    return to


@pytest.mark.parametrize("output_format", ["gguf", "onnx"])
def test_a_template_that_refuses_system_messages_is_exported_and_still_refuses(
    tiny_folder: Path, output_format: Format, tmp_path: Path
) -> None:
    folder, out = with_template(tiny_folder, tmp_path / "model", REFUSES_SYSTEM), tmp_path / "out"
    export_model(str(folder), output_format, out)
    loaded = open_model(out, context_tokens=64)
    loaded.engine.close()
    assert loaded.chat_template is not None
    plain, with_system = rendered_chats(loaded.chat_template)
    assert plain is not None and "What is 2 + 2?" in plain and with_system is None
    with pytest.raises(ModelError, match="no system role"):
        loaded.chat_template.render([{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize(("in_artifact", "in_checkpoint"), [(0, 1), (1, 0)])
def test_a_refusal_on_one_side_alone_is_found(
    in_artifact: int, in_checkpoint: int, tiny_folder: Path, tmp_path: Path
) -> None:
    folders = [
        with_template(tiny_folder, tmp_path / str(index), template)
        for index, template in enumerate((CHAT_TEMPLATE, REFUSES_SYSTEM))
    ]
    loaded = open_model(folders[in_artifact], context_tokens=64)
    with pytest.raises(VerificationError, match="renders chats unlike"):
        check_text_side(loaded, open_checkpoint(folders[in_checkpoint]))
    check_text_side(loaded, open_checkpoint(folders[in_artifact]))
    loaded.engine.close()


def test_both_conversations_are_rendered_where_nothing_is_refused(tiny_folder: Path) -> None:
    plain, with_system = rendered_chats(read_chat_template(tiny_folder))
    assert plain is not None and "system" not in plain
    assert with_system is not None and "Be brief." in with_system
    assert rendered_chats(None) == []
