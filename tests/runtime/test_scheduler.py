import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekd.errors import EngineError, QueueFullError, RecipeError
from edgekd.runtime.batch_engine import BatchEngine, EngineOptions, Work
from edgekd.runtime.batch_loading import BatchModel, open_batch_model
from edgekd.runtime.generate import generate
from edgekd.runtime.grammar import Grammar, GrammarCompiler
from edgekd.runtime.loading import open_model
from edgekd.runtime.messages import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    PromptScored,
    Started,
    Token,
    events_from_json,
    events_to_json,
    request_from_json,
    request_to_json,
)
from edgekd.runtime.sampling import SamplingParams
from edgekd.runtime.scheduler import Scheduler

# Flash attention rounds to half precision, differently for one row and for several.
OPTIONS = EngineOptions(context_tokens=128, n_slots=3, kv_type="f32", flash_attention=False)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = list(range(20, 110))


@dataclass
class Clock:
    """A clock that the test moves."""

    now_s: float = 0.0
    tick_s: float = 0.0
    """What every look takes."""

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


@dataclass
class FaultyEngine:
    """A real engine that fails on the steps it is told to."""

    engine: BatchEngine
    fails: list[int]
    prompt_token_s: float = 0.0
    n_steps: int = 0
    widths: list[list[int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self, work: Sequence[Work]) -> list[NDArray[np.float32]]:
        self.n_steps += 1
        self.widths.append([len(item.ids) for item in work])
        time.sleep(self.prompt_token_s * sum(len(item.ids) for item in work if len(item.ids) > 1))
        logits = self.engine.step(work)
        if self.n_steps in self.fails:
            raise EngineError("the device is gone")
        return logits


@pytest.fixture(scope="module", params=["float_gguf", "float_onnx"])
def model(request: pytest.FixtureRequest) -> Iterator[BatchModel]:
    path: Path = request.getfixturevalue(request.param)
    opened = open_batch_model(path, OPTIONS)
    yield opened
    opened.engine.close()


@pytest.fixture
def scheduler(model: BatchModel) -> Scheduler:
    return Scheduler(model.engine, model.tokenizer)


def ask(
    name: str, prompt: Sequence[int], params: SamplingParams = GREEDY, **rest: Any
) -> GenerationRequest:
    return GenerationRequest(id=name, prompt_ids=tuple(prompt), params=params, **rest)


def run(scheduler: Scheduler, requests: Sequence[GenerationRequest]) -> list[Event]:
    for request in requests:
        scheduler.submit(request)
    events = []
    while not scheduler.is_idle:
        events += scheduler.step()
    return events


def ids_of(events: Sequence[Event], name: str) -> list[int]:
    return [each.token_id for each in events if isinstance(each, Token) and each.id == name]


def text_of(events: Sequence[Event], name: str) -> str:
    return "".join(
        each.text for each in events if isinstance(each, Token | Finished) and each.id == name
    )


def end_of(events: Sequence[Event], name: str) -> Finished:
    (end,) = (each for each in events if isinstance(each, Finished) and each.id == name)
    return end


def started(events: Sequence[Event]) -> dict[str, Started]:
    return {each.id: each for each in events if isinstance(each, Started)}


def mixed_requests() -> list[GenerationRequest]:
    """Eight requests of every kind, more than there are slots."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 1.5, "seed": 7, "top_p": 0.9},
        {"repeat_penalty": 1.3},
        {"temperature": 0.7, "seed": 3, "min_p": 0.05},
        {"presence_penalty": 1.0, "logit_bias": ((9, 3.0),)},
        {"temperature": 1.0, "seed": 8, "top_k": 20, "typical_p": 0.8},
        {"max_tokens": 3},
    ]
    prompts = [[5, 9, 80], [44] * 3, LONG[:40], [300], [7, 8], [5, 9, 81], LONG[:30], [1, 2]]
    return [
        ask(f"r{i}", prompt, SamplingParams(**({"max_tokens": 20, "ignore_eos": True} | each)))
        for i, (prompt, each) in enumerate(zip(prompts, settings, strict=True))
    ]


def test_no_answer_depends_on_its_neighbours(model: BatchModel) -> None:
    together = run(Scheduler(model.engine, model.tokenizer), mixed_requests())
    for request in mixed_requests():
        alone = run(Scheduler(model.engine, model.tokenizer), [request])
        assert ids_of(together, request.id) == ids_of(alone, request.id), request.id
        assert text_of(together, request.id) == text_of(alone, request.id)


def test_the_text_is_the_one_that_the_plain_loop_gives(
    model: BatchModel, scheduler: Scheduler
) -> None:
    params = SamplingParams(max_tokens=20, repeat_penalty=1.2, stop=("zzz",))
    events = run(scheduler, [ask("a", LONG[:9], params)])
    plain = open_model(model.path, context_tokens=128, n_threads=1)
    pieces = list(generate(plain, LONG[:9], params))
    assert text_of(events, "a") == "".join(piece.text for piece in pieces)
    assert end_of(events, "a").n_generated == len(pieces)


def test_a_prompt_that_begins_like_an_earlier_one_is_not_computed_again(
    scheduler: Scheduler,
) -> None:
    first = run(scheduler, [ask("a", LONG[:50])])
    again = run(scheduler, [ask("b", LONG[:50])])
    longer = run(scheduler, [ask("c", [*LONG[:50], 3, 4])])
    assert [end_of(each, name).n_cached for each, name in ((first, "a"), (again, "b"))] == [0, 49]
    assert end_of(longer, "c").n_cached == 50
    assert ids_of(again, "b") == ids_of(first, "a")
    counters = scheduler.snapshot().counters
    assert (counters.prompt_tokens, counters.cached_tokens) == (50 + 1 + 2, 49 + 50)


def test_a_conversation_is_not_thrown_away_for_a_short_shared_start(scheduler: Scheduler) -> None:
    run(scheduler, [ask("long", LONG)])
    run(scheduler, [ask("other", [*LONG[:10], 1, 2, 3, 4, 5])])
    back = run(scheduler, [ask("back", [*LONG, 7])])
    assert end_of(back, "back").n_cached >= len(LONG)


def test_equal_prompts_at_once_are_computed_once(scheduler: Scheduler) -> None:
    events = run(scheduler, [ask(name, LONG) for name in "abc"])
    assert [end_of(events, name).n_cached for name in "abc"] == [0, len(LONG) - 1, len(LONG) - 1]
    assert ids_of(events, "a") == ids_of(events, "b") == ids_of(events, "c")


def test_reuse_can_be_switched_off_and_a_slot_asked_for(scheduler: Scheduler) -> None:
    run(scheduler, [ask("a", LONG, slot=2)])
    events = run(scheduler, [ask("b", LONG, slot=2, reuse_prefix=False), ask("c", [1], slot=1)])
    assert {each.id: (each.slot, each.n_cached) for each in started(events).values()} == {
        "b": (2, 0),
        "c": (1, 0),
    }


def test_requests_start_in_the_order_they_came(scheduler: Scheduler) -> None:
    events = run(scheduler, [ask(f"r{i}", [i + 1, 5]) for i in range(9)])
    assert list(started(events)) == [f"r{i}" for i in range(9)]
    assert sum(isinstance(each, Finished) for each in events) == 9


def test_a_full_queue_refuses_and_recovers(model: BatchModel) -> None:
    n_slots = model.engine.n_slots
    scheduler = Scheduler(model.engine, model.tokenizer, max_waiting=1)
    for index in range(n_slots + 1):  # nothing has a slot yet, but all but one will
        scheduler.submit(ask(f"r{index}", [index + 5]))
    for _ in range(2):
        with pytest.raises(QueueFullError, match=f"{n_slots + 1} requests are running or waiting"):
            scheduler.submit(ask("late", [5]))
        scheduler.step()
        assert scheduler.snapshot().n_running == n_slots
    run(scheduler, [])
    assert ids_of(run(scheduler, [ask("d", [5])]), "d")


def test_a_deadline_ends_waiting_and_running_requests(model: BatchModel) -> None:
    clock = Clock()
    scheduler = Scheduler(model.engine, model.tokenizer, clock=clock)
    for index in range(4):
        scheduler.submit(ask(f"r{index}", [5, index], deadline_s=None if index == 0 else 10))
    scheduler.step()
    clock.now_s = 10.5
    failed = [each for each in scheduler.step() if isinstance(each, Failed)]
    assert [(each.id, each.code) for each in failed] == [
        ("r3", "deadline"),
        ("r1", "deadline"),
        ("r2", "deadline"),
    ]
    assert scheduler.snapshot().n_running == 1


def test_a_text_ends_at_its_time_limit_once_it_holds_a_line_break(model: BatchModel) -> None:
    (line_break,) = model.tokenizer.encode("\n", add_special=False)
    clock = Clock(tick_s=0.001)
    scheduler = Scheduler(model.engine, model.tokenizer, clock=clock)
    limited = SamplingParams(max_tokens=40, ignore_eos=True, max_predict_ms=1500)
    broken = replace(limited, logit_bias=((line_break, 100.0),))
    unbroken = replace(limited, logit_bias=((line_break, -100.0),))
    for name, params in (("broken", broken), ("unbroken", unbroken)):
        scheduler.submit(ask(name, [5], params))
    events = scheduler.step()
    while not scheduler.is_idle:
        clock.now_s += 1
        events += scheduler.step()
    assert (end_of(events, "broken").n_generated, end_of(events, "unbroken").n_generated) == (3, 40)
    assert end_of(events, "broken").stop_kind == "limit"
    assert [each.elapsed_s for each in events if isinstance(each, Token)][-1] > 39


def test_cancelling_frees_the_slot_at_once(scheduler: Scheduler) -> None:
    for index in range(4):
        scheduler.submit(ask(f"r{index}", [5, index]))
    scheduler.step()
    assert scheduler.snapshot().n_waiting == 1
    assert scheduler.cancel("r1") == [Failed("r1", "cancelled", "cancelled")]
    assert scheduler.cancel("r1") == scheduler.cancel("nobody") == []
    assert list(started(scheduler.step())) == ["r3"]
    events = run(scheduler, [])
    assert all(each.id != "r1" for each in events)


def test_a_long_prompt_stalls_no_running_text(model: BatchModel) -> None:
    engine = FaultyEngine(model.engine, [], prompt_token_s=0.004)
    scheduler = Scheduler(engine, model.tokenizer)
    scheduler.submit(ask("text", [5, 6], SamplingParams(max_tokens=120, ignore_eos=True)))
    for _ in range(3):
        scheduler.step()
    scheduler.submit(ask("prompt", LONG))
    n_steps = 0
    while not ids_of(events := scheduler.step(), "prompt"):
        n_steps += 1
        assert len(ids_of(events, "text")) == 1
    assert n_steps >= 1
    assert max(max(widths) for widths in engine.widths) < len(LONG)


def test_an_engine_that_fails_ends_the_running_requests_and_nothing_else(
    model: BatchModel,
) -> None:
    expected = run(Scheduler(model.engine, model.tokenizer), [ask("d", LONG)])
    scheduler = Scheduler(FaultyEngine(model.engine, [3]), model.tokenizer)
    events = run(scheduler, [ask(name, LONG, slot=0) for name in "ab"])
    assert Failed("a", "engine_error", "the device is gone") in events
    assert end_of(events, "b").n_cached == 0  # what a failed engine holds is not trusted
    assert ids_of(events, "b") == ids_of(expected, "d")


def test_how_a_text_ended_is_said(model: BatchModel, scheduler: Scheduler) -> None:
    text = text_of(run(scheduler, [ask("a", [5, 9])]), "a")
    stop = SamplingParams(max_tokens=12, ignore_eos=True, stop=(text[4:8],))
    bias = SamplingParams(logit_bias=((2, 100.0),))
    full = SamplingParams(max_tokens=500, ignore_eos=True)
    events = run(
        scheduler,
        [ask("limit", [5, 9]), ask("word", [5, 9], stop), ask("eos", [5], bias)],
    )
    assert end_of(events, "limit").stop_kind == "limit"
    assert (end_of(events, "word").stop_kind, end_of(events, "word").stop_string) == (
        "word",
        text[4:8],
    )
    assert text_of(events, "word") == text[: text.find(text[4:8])]
    assert (end_of(events, "eos").stop_kind, end_of(events, "eos").n_generated) == ("eos", 1)
    overflow = end_of(run(scheduler, [ask("full", LONG, full)]), "full")
    assert (overflow.stop_kind, overflow.n_generated) == ("limit", 128 - len(LONG) + 1)


def test_prompt_tokens_are_scored_in_any_chunks(model: BatchModel, scheduler: Scheduler) -> None:
    model.engine.forget(0)
    logits_TV = np.concatenate(
        [model.engine.step([Work(0, LONG[start : start + 45], 45)])[0].copy() for start in (0, 45)]
    )
    logits_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    model.engine.forget(0)
    params = SamplingParams(max_tokens=1, logprobs=1)
    events = run(scheduler, [ask("a", LONG, params, prompt_logprobs=2)])
    scored = [token for each in events if isinstance(each, PromptScored) for token in each.tokens]
    assert [token_id for token_id, _, _ in scored] == LONG
    assert scored[0] == (LONG[0], None, ())
    found = [logprob for _, logprob, _ in scored[1:]]
    expected = [logits_TV[i, token_id] for i, token_id in enumerate(LONG[1:])]
    np.testing.assert_allclose(np.array(found, float), expected, atol=5e-2)
    assert scored[5][2][0][0] == int(logits_TV[4].argmax()) and len(scored[5][2]) == 2
    (token,) = (each for each in events if isinstance(each, Token))
    assert token.logprob == pytest.approx(float(logits_TV[-1].max()), abs=5e-2)


def test_a_grammar_holds_beside_free_texts(model: BatchModel) -> None:
    compiler = GrammarCompiler(model.tokenizer, model.engine.vocab_size)
    scheduler = Scheduler(model.engine, model.tokenizer, compile_grammar=compiler.compile)
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}
    grammar = Grammar("json_schema", json.dumps(schema | {"additionalProperties": False}))
    params = SamplingParams(max_tokens=100, temperature=1.0, seed=1)
    events = run(
        scheduler,
        [ask("json", [5], params, grammar=grammar), ask("free", [5, 9])],
    )
    assert json.loads(text_of(events, "json"))["n"] in (1, 22)
    assert end_of(events, "json").stop_kind == "eos"
    with pytest.raises(RecipeError, match="not accepted"):
        scheduler.submit(ask("bad", [5], grammar=Grammar("regex", "((")))
    with pytest.raises(RecipeError, match="without grammars"):
        Scheduler(model.engine, model.tokenizer).submit(ask("g", [5], grammar=grammar))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_ids": ()}, "no tokens"),
        ({"prompt_ids": (1,) * 129}, "129 tokens, the context holds 128"),
        ({"prompt_ids": (1, 405)}, "0 to 404"),
        ({"prompt_ids": (-1,)}, "0 to 404"),
        ({"slot": 3}, "no slot 3"),
        ({"params": SamplingParams(logit_bias=((405, 1.0),))}, "token 405"),
    ],
)
def test_impossible_requests_are_refused(
    scheduler: Scheduler, changes: dict[str, Any], words: str
) -> None:
    values: dict[str, Any] = {"id": "a", "prompt_ids": (5,), "params": GREEDY} | changes
    with pytest.raises(RecipeError, match=words):
        scheduler.submit(GenerationRequest(**values))
    assert scheduler.is_idle


def test_messages_survive_json(scheduler: Scheduler) -> None:
    params = SamplingParams(logit_bias=((3, 1.5),), stop=("a", "é"), seed=2**62, logprobs=2)
    request = ask(
        "a", [5, 9], params, grammar=Grammar("regex", "a"), deadline_s=1.5, prompt_logprobs=1
    )
    plain = json.loads(json.dumps(request_to_json(request)))
    assert request_from_json(plain) == request
    scored = ask("b", [5, 9], SamplingParams(max_tokens=2, logprobs=2), prompt_logprobs=1)
    events: list[Event] = [*run(scheduler, [scored]), Failed("c", "deadline", "late")]
    assert events_from_json(json.loads(json.dumps(events_to_json(events)))) == events
    for broken in ({}, plain | {"more": 1}, plain | {"params": {"top_k": -1}}, {"params": 3}):
        with pytest.raises(RecipeError):
            request_from_json(broken)
