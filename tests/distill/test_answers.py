import json
from pathlib import Path

import pytest

from edgekd.distill.answers import write_answers
from edgekd.distill.cache_source import Endpoint
from edgekd.errors import DataError, EngineError
from edgekd.runtime.sampling import SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "foxes?"}]
    lines = [{"prompt": "dogs?"}, {"messages": system}, {"prompt": "1234?"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


@pytest.mark.parametrize("kind", ["tiny_folder", "tiny_gguf"])
def test_every_prompt_gets_an_answer_in_its_order(
    kind: str, prompts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "answers.jsonl"
    teacher = str(request.getfixturevalue(kind))
    assert write_answers(teacher, prompts, out, PARAMS, context_tokens=128) == 3
    found = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert [messages[-2]["content"] for messages in found] == ["dogs?", "foxes?", "1234?"]
    assert all(messages[-1]["role"] == "assistant" for messages in found)
    assert len(found[1]) == 3


def test_a_killed_run_goes_on_where_it_was(tiny_gguf: Path, prompts: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    write_answers(str(tiny_gguf), prompts, whole, PARAMS, context_tokens=128)
    content = whole.read_bytes()
    for cut in (0, 10, content.index(b"\n") + 1, len(content) - 3, len(content)):
        killed.write_bytes(content[:cut])
        write_answers(str(tiny_gguf), prompts, killed, PARAMS, context_tokens=128)
        assert killed.read_bytes() == content, cut


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read"),
        ("", "holds no prompts"),
        ("{", "line 1 has neither"),
        ('{"text": "x"}', "line 1 has neither"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "end with an answer"),
    ],
)
def test_bad_prompts_are_named(
    content: str | None, complaint: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=complaint):
        write_answers(str(tiny_gguf), path, tmp_path / "out.jsonl", PARAMS)


def test_answers_to_other_prompts_are_not_mixed(
    tiny_gguf: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    other = [{"role": "user", "content": "other?"}, {"role": "assistant", "content": "no"}]
    for content in (json.dumps({"messages": other}), "no JSON", "[]", '{"text": 1}'):
        out.write_text(content + "\n")
        with pytest.raises(DataError, match="line 1 answers another prompt"):
            write_answers(str(tiny_gguf), prompts, out, PARAMS)
        assert out.read_text() == content + "\n"


def test_an_endpoint_that_fails_is_named(prompts: Path, tmp_path: Path) -> None:
    endpoint = Endpoint("http://127.0.0.1:9/v1", "tiny")
    with pytest.raises(EngineError, match="tiny at http://127.0.0.1:9/v1 failed"):
        write_answers(endpoint, prompts, tmp_path / "out.jsonl", PARAMS)
