import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

import pytest

from edgekd.errors import EngineUnavailableError, ModelError, QueueFullError, RecipeError
from edgekd.runtime.batch_engine import EngineOptions
from edgekd.runtime.engine_process import EngineProcess
from edgekd.runtime.engine_worker import WorkerSettings
from edgekd.runtime.grammar import Grammar
from edgekd.runtime.messages import Event, Failed, Finished, GenerationRequest, Token
from edgekd.runtime.sampling import SamplingParams

# Flash attention rounds to half precision, differently for one row and for several.
OPTIONS = EngineOptions(context_tokens=256, n_slots=3, kv_type="f32", flash_attention=False)
PROMPTS = [(5, 9, 80), (44, 44), tuple(range(20, 80)), (300,)]
NAMES = (f"request-{number}" for number in count())


def settings(path: Path, max_waiting: int = 8) -> WorkerSettings:
    return WorkerSettings(model=str(path), options=OPTIONS, max_waiting=max_waiting)


@pytest.fixture(scope="module", params=["float_gguf", "float_onnx"])
def engine(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    with EngineProcess(settings(request.getfixturevalue(request.param))) as process:
        yield process


def ask(prompt: tuple[int, ...], n_tokens: int = 30, **rest: object) -> GenerationRequest:
    params = SamplingParams(max_tokens=n_tokens, temperature=0.9, seed=4, ignore_eos=True)
    values = {"id": next(NAMES), "prompt_ids": prompt, "params": params} | rest
    return GenerationRequest(**values)  # type: ignore[arg-type]


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


def test_requests_run_side_by_side_and_get_their_own_events(engine: EngineProcess) -> None:
    expected = [tokens_of(list(engine.stream(ask(prompt)))) for prompt in PROMPTS]
    found: dict[int, list[Event]] = {}

    def client(index: int) -> None:
        found[index] = list(engine.stream(ask(PROMPTS[index])))

    clients = [threading.Thread(target=client, args=(index,)) for index in range(4)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert [tokens_of(found[index]) for index in range(4)] == expected
    assert all(isinstance(found[index][-1], Finished) for index in range(4))
    assert engine.snapshot and engine.snapshot.counters.generated_tokens >= 8 * 30


def test_a_closed_stream_frees_its_slot(engine: EngineProcess) -> None:
    with closing(engine.stream(ask((5,), 200))) as events:
        next(events)
        assert engine.n_requests == 1
    assert engine.wait_idle(5)


def test_a_refused_request_says_why_and_harms_nobody(engine: EngineProcess) -> None:
    (failed,) = engine.stream(ask((999,)))
    assert isinstance(failed, Failed) and failed.code == "invalid_request"
    assert "0 to 404" in failed.message
    (failed,) = engine.stream(ask((5,), grammar=Grammar("regex", "((")))
    assert isinstance(failed, Failed) and "not accepted" in failed.message
    (*_, end) = engine.stream(ask((5,), 100, grammar=Grammar("regex", "[ab]{3}")))
    assert isinstance(end, Finished) and end.stop_kind == "eos"


def test_killed_under_load_it_comes_back_and_no_stream_has_foreign_text(
    engine: EngineProcess,
) -> None:
    expected = {prompt: tokens_of(list(engine.stream(ask(prompt, 120)))) for prompt in PROMPTS}
    restarts, n_kills, outcomes = engine.restarts, 4, []
    is_over = threading.Event()

    def client(prompt: tuple[int, ...]) -> None:
        while not is_over.is_set():
            try:
                events = list(engine.stream(ask(prompt, 120)))
            except EngineUnavailableError:
                time.sleep(0.01)
                continue
            outcomes.append((prompt, tokens_of(events), events[-1]))

    clients = [threading.Thread(target=client, args=(prompt,)) for prompt in PROMPTS]
    for each in clients:
        each.start()
    recoveries_s = []
    for number in range(n_kills):
        engine.wait_ready(30)
        time.sleep(0.1 + 0.05 * number)
        pid = engine.pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        while engine.restarts == restarts + number:
            time.sleep(0.002)
        engine.wait_ready(30)
        recoveries_s.append(time.monotonic() - killed_s)
    time.sleep(0.3)
    is_over.set()
    for each in clients:
        each.join()
    assert engine.restarts == restarts + n_kills
    broken = [end for _, _, end in outcomes if isinstance(end, Failed)]
    assert broken and {end.code for end in broken} == {"engine_died"}
    assert "SIGKILL" in broken[0].message
    for prompt, tokens, end in outcomes:
        assert tokens == expected[prompt][: len(tokens)]
        assert isinstance(end, Failed) or len(tokens) == 120
    assert any(isinstance(end, Finished) for _, _, end in outcomes)
    assert max(recoveries_s) < 15


def test_an_idle_engine_that_was_ready_is_replaced_at_once_each_time(float_gguf: Path) -> None:
    with EngineProcess(settings(float_gguf)) as engine:
        for number in range(4):
            engine.wait_ready()
            time.sleep(1.1)
            pid = engine.pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            killed_s = time.monotonic()
            while engine.restarts == number:
                time.sleep(0.002)
            while engine.pid is None:
                time.sleep(0.002)
            assert time.monotonic() - killed_s < 0.9, "the first pause of the back-off takes 1 s"


def test_an_engine_that_never_gets_ready_is_no_busy_loop(float_gguf: Path) -> None:
    with closing(EngineProcess(settings(float_gguf))) as engine:
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < 2.5:  # at once, after 1 s, after 2 s
            pid = engine.pid
            if pid and engine.state != "ready":
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        assert 2 <= engine.restarts <= 3


def test_a_full_queue_is_refused_at_once(float_gguf: Path) -> None:
    with EngineProcess(settings(float_gguf, max_waiting=1)) as engine:
        streams = [engine.stream(ask((5,), 250)) for _ in range(4)]
        for stream in streams[:3]:
            next(stream)
        waiting = threading.Thread(target=lambda: next(streams[3]))
        waiting.start()
        while engine.n_requests < 4:
            assert waiting.is_alive()
            time.sleep(0.001)
        with pytest.raises(QueueFullError, match="4 requests"):
            list(engine.stream(ask((5,))))
        for stream in streams[:3]:
            stream.close()
        waiting.join()


def test_a_hung_engine_is_killed(float_gguf: Path) -> None:
    with EngineProcess(settings(float_gguf), hang_s=0.4) as engine:
        pid = engine.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        (*_, end) = engine.stream(ask((5,)))
        assert isinstance(end, Failed) and end.code == "engine_died"
        engine.wait_ready(30)
        assert len(tokens_of(list(engine.stream(ask((5,)))))) == 30


def test_a_model_that_cannot_be_opened_is_said_once(tmp_path: Path, float_gguf: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(ModelError, match=r"no\.gguf"),
        EngineProcess(settings(tmp_path / "no.gguf")),
    ):
        pass
    impossible = WorkerSettings(
        model=str(float_gguf),
        options=EngineOptions(kv_type="q8_0", flash_attention=False),
        max_waiting=1,
    )
    with pytest.raises(RecipeError, match="flash attention"), EngineProcess(impossible):
        pass


def test_a_closed_engine_fails_what_runs_and_refuses_what_comes(float_gguf: Path) -> None:
    engine = EngineProcess(settings(float_gguf))
    engine.wait_ready()
    pid = engine.pid
    stream = engine.stream(ask((5,), 250))
    next(stream)
    engine.close()
    assert isinstance(list(stream)[-1], Failed | Finished)
    assert pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EngineUnavailableError, match="stopped"):
        list(engine.stream(ask((5,))))
