"""What comes from another machine, or from the user, harms nothing here or there."""

import copy
import json
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekd.errors import DataError, DeviceError, MissingExtraError, RecipeError
from edgekd.runtime.bench import run_bench
from edgekd.runtime.bench_compare import compare
from edgekd.runtime.bench_formats import FORMS, render
from edgekd.runtime.bench_remote import run_bench_over_ssh
from edgekd.runtime.bench_remote_address import SshAddress
from edgekd.runtime.bench_remote_document import DocumentReader, parse_json
from edgekd.runtime.bench_remote_tied import (
    MAX_OUTPUT_CHARS,
    Ended,
    clean,
    run_streaming,
    shell_line,
    tied,
)
from edgekd.runtime.bench_settings import BenchSettings
from edgekd.runtime.llama_bench_rows import parse_rows, samples_of, scenario_of

SMALL = BenchSettings(
    prompt_tokens=8, decode_tokens=4, repetitions=2, n_threads=1, cold_start=False, roofline=False
)
ARGUMENTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
ESCAPE = "\x1b]0;owned\x07\x9b2J\u202e"


@pytest.fixture(scope="module")
def document(tiny_gguf: Path) -> dict[str, Any]:
    return dict(json.loads(json.dumps(run_bench([str(tiny_gguf)], SMALL).as_dict())))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside ``value``; of a list only the first."""
    keys = list(value) if isinstance(value, dict) else [0] if isinstance(value, list) else []
    inner = [(*path, key) for key in keys if value]
    return [p for q in inner for p in (q, *places(value[q[-1]], q))]


def with_change(document: dict[str, Any], path: tuple[Any, ...], new: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    holder: Any = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return changed


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_document_that_is_accepted_can_be_shown_and_compared(
    document: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(places(document)))
    answer = json.dumps(with_change(document, path, data.draw(JSON)))
    try:
        accepted = DocumentReader().read(answer, "ssh://there", 1)
    except DeviceError as error:
        assert "\n" not in str(error) and str(error) == clean(str(error))
        assert len(str(error)) < 400
        return
    for form in FORMS:
        with suppress(RecipeError):  # of a form that this version does not have
            assert clean(text := render(accepted, form)) == text
    (tmp_path / "run.json").write_text(json.dumps(accepted))
    compare(str(tmp_path / "run.json"), str(tmp_path / "run.json"), 0.05)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Welcome to there",
        "[1]",
        "[" * 100_000,
        '{"schema": "edgekd.bench/1"}',
        '{"schema": "edgekd.bench/1", "valid": NaN}',
        '{"schema": ["edgekd.bench/1"]}',
        '{"schema": "edgekd.bench/2"}',
    ],
)
def test_what_is_no_document_is_refused_in_one_line(answer: str) -> None:
    with pytest.raises(DeviceError, match="edgekd on there (gave|writes) .*") as caught:
        DocumentReader().read(answer, "there", 1)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_document_of_other_models_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(DeviceError, match="measured 1 models of 2"):
        DocumentReader().read(json.dumps(document), "there", 2)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "9" * 40, "[" * 5000 + "]" * 5000])
def test_numbers_that_are_none_and_depths_are_refused(text: str) -> None:
    assert parse_json(text) is None
    assert parse_json(f'{{"x": {text}}}') is None


def test_text_of_a_document_cannot_steer_a_terminal(document: dict[str, Any]) -> None:
    hostile = with_change(document, ("machine", "processor"), f"Arm {ESCAPE}")
    accepted = DocumentReader().read(json.dumps(hostile), "there", 1)
    assert accepted["machine"]["processor"].startswith("Arm \ufffd]0;owned\ufffd\ufffd2J")
    assert clean(render(accepted, "table")) == render(accepted, "table")


def test_what_a_program_there_says_cannot_steer_a_terminal() -> None:
    said: list[str] = []
    script = f"printf '%s\\n' {shlex.quote(ESCAPE)} >&2; printf 'a\\033b\\nc\\td'; exit 3"
    ended = run_streaming(("sh", "-c", script), said.append)
    assert ended == Ended(3, "a\ufffdb\nc\td", tuple(said))
    assert said == ["\ufffd]0;owned\ufffd\ufffd2J\ufffd"]


def test_a_flood_is_cut_off() -> None:
    began_s = time.monotonic()
    with pytest.raises(DeviceError, match=r"yes gave more than 67\.1 MB"):
        run_streaming(("yes", "x" * 1000))
    assert time.monotonic() - began_s < 60 and MAX_OUTPUT_CHARS == 64 << 20


def test_a_line_without_end_is_said_in_parts() -> None:
    said: list[str] = []
    run_streaming(("sh", "-c", "yes | tr -d '\\n' | head -c 100000 >&2"), said.append)
    assert len("".join(said)) == 100_000 and max(map(len, said)) == 2000


def test_a_program_that_says_nothing_is_given_up_where_a_limit_was_set() -> None:
    ended = run_streaming(("sleep", "600"), timeout_s=0.2)
    assert ended.code != 0 and ended.last_line == "no answer within 0.2 s"


@settings(max_examples=40, deadline=None)
@given(arguments=st.lists(ARGUMENTS, min_size=1, max_size=3))
def test_no_argument_is_read_by_a_shell_there(arguments: list[str]) -> None:
    """The line goes to a shell whole, as sshd and adbd hand it to one."""
    line = shell_line('for each; do printf "%s\\0" "$each"; done', *arguments)
    said = subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout
    assert said.decode().split("\0")[:-1] == arguments
    line = tied(["printf", "%s\\0", *arguments])
    with subprocess.Popen(["setsid", "-w", "sh", "-c", line], stdin=-1, stdout=-1) as there:
        assert there.stdout and there.stdout.read().decode().split("\0")[:-1] == arguments
        assert there.wait() == 0


@given(row=st.dictionaries(st.sampled_from(["n_prompt", "n_gen", "n_depth", "samples_ns"]), JSON))
def test_a_row_of_llama_bench_is_computed_or_refused(row: dict[str, Any]) -> None:
    for found in parse_rows(json.dumps([{"n_prompt": 0, **row}])) or []:
        try:
            rates = [scenario_of(found).n_tokens / seconds for seconds in samples_of(found)]
        except DataError as error:
            assert len(str(error)) < 400
            continue
        assert rates and min(rates) > 0


def test_without_jsonschema_nothing_is_copied(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MissingExtraError, match=r"edgekd\[remote\]"):
        run_bench_over_ssh([str(tiny_gguf)], SMALL, SshAddress("nowhere"))
