from pathlib import Path

import pytest

from edgekd.distill.push import push
from edgekd.errors import OutputError


def test_a_hub_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "none")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutputError, match=r"cannot push .* to me/student: .*hf auth login"):
        push(tmp_path, "me/student")
