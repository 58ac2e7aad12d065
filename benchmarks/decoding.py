"""Decoding timed: files and engines in turns in one process, so a noisy minute hits all alike."""

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgekd.runtime.stats import summarise

N_DECODE, CONTEXT_TOKENS = 64, 256


def measure_decoding(
    turns: Mapping[str, Callable[[], float]], base: str, rounds: int
) -> dict[str, Any]:
    """Return tokens per second of every turn, and its ratio to those of ``base``."""
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    gc.disable()
    for number in range(-1, rounds):  # the first warms up
        for name in in_turn(list(turns), number):
            seconds = turns[name]()
            if number >= 0:
                speeds[name].append(N_DECODE / seconds)
    return compared(speeds, base)


def compared(speeds: Mapping[str, Sequence[float]], base: str) -> dict[str, Any]:
    """Return the samples of each name summarised, and its ratio to ``base``, turn by turn."""
    return {
        name: {
            "tokens_per_s": asdict(summarise(found)),
            f"ratio_to_{base}": asdict(
                summarise([a / b for a, b in zip(found, speeds[base], strict=True)])
            ),
        }
        for name, found in speeds.items()
    }


def genai_turn(folder: Path, ids: Sequence[int], threads: int | None = None) -> Callable[[], float]:
    """Return a function that continues ``ids`` greedily and returns the seconds it decoded."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    if threads is not None:
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
    model = og.Model(config)

    def turn() -> float:
        params = og.GeneratorParams(model)
        # A minimum, or an end token would cut the turn short.
        lengths = {"max_length": CONTEXT_TOKENS, "min_length": CONTEXT_TOKENS}
        params.set_search_options(do_sample=False, **lengths)
        generator = og.Generator(model, params)
        generator.append_tokens(list(ids))
        generator.generate_next_token()  # comes from the prompt
        start_s = time.perf_counter()
        for _ in range(N_DECODE):
            generator.generate_next_token()
        return time.perf_counter() - start_s

    return turn


def edgekd_turn(
    folder: Path, ids: Sequence[int], threads: int | None = None
) -> Callable[[], float]:
    """Return the same function of our engine."""
    from edgekd.runtime.loading import open_model

    engine = open_model(folder, context_tokens=CONTEXT_TOKENS, n_threads=threads).engine

    def turn() -> float:
        engine.rewind()
        token_id = int(engine.forward(ids).argmax())
        start_s = time.perf_counter()
        for _ in range(N_DECODE):
            token_id = int(engine.forward([token_id]).argmax())
        return time.perf_counter() - start_s

    return turn


def in_turn(names: list[str], number: int) -> list[str]:
    """Return ``names``, every other time backwards, so that none is always first."""
    return names if number % 2 == 0 else names[::-1]
