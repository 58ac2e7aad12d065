"""Servers beside each other: edgekd serve, llama-server and llama_cpp.server, on one GGUF file.

    python benchmarks/serve.py --model M.gguf --text F --llama-server PATH \
        --out benchmarks/results/serve.json

All run at once and idle while another one works; in every round each of them serves the same
prompts for 1, 2, 4 and 8 clients, in changing order. Tokens/s count all clients together. The
prompts are cut from F and differ in every request, so that no cache helps anybody. llama-server
must be of the llama.cpp version that llama-cpp-python brings; its build number is recorded.
"""

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from record import record
from serve_clients import Heard, complete, complete_all, get_json

OURS, LLAMA_SERVER, LLAMA_CPP_SERVER = "edgekd serve", "llama-server", "llama_cpp.server"
CLIENTS = (1, 2, 4, 8)
N_TOKENS = 64
PROMPT_CHARS = 300
LONG_PROMPT_CHARS = 4500  # about 1,000 tokens of English
N_BESIDE, BESIDE_S = 96, 20.0  # a server that prefers prompts makes a text last for minutes
N_CANCELS = 20
CTX = 2048

Json = dict[str, Any]


class Prompts:
    """Pieces of a text, never the same one twice."""

    def __init__(self, text: str) -> None:
        """Cut pieces from ``text``."""
        self._text = text
        self._draw = random.Random(7)

    def next(self, n_chars: int) -> str:
        """Return a piece."""
        start = self._draw.randrange(len(self._text) - n_chars)
        return self._text[start : start + n_chars]


def commands(model: Path, llama_server: Path, ports: Sequence[int], threads: int) -> list[Any]:
    """Return each server with its command, told to do the same."""
    t = str(threads)
    ours = [sys.executable, "-m", "edgekd", "serve", str(model), "--port", str(ports[0])]
    ours += ["--parallel", str(max(CLIENTS)), "--ctx", str(CTX), "-t", t, "--quiet"]
    native = [str(llama_server), "-m", str(model), "--port", str(ports[1]), "-t", t]
    native += ["-np", str(max(CLIENTS)), "-c", str(CTX * max(CLIENTS)), "--slots"]
    python = [sys.executable, "-m", "llama_cpp.server", "--model", str(model)]
    python += ["--port", str(ports[2]), "--n_threads", t, "--n_threads_batch", t]
    python += ["--n_ctx", str(CTX), "--interrupt_requests", "False"]
    return [(OURS, ours), (LLAMA_SERVER, native), (LLAMA_CPP_SERVER, python)]


@contextmanager
def started(command: Sequence[str], url: str, log: Path) -> Iterator[None]:
    """Run a server until the block ends."""
    with log.open("w") as sink, subprocess.Popen(command, stdout=sink, stderr=sink) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, f"see {log}"
                try:
                    asyncio.run(complete(url, {"prompt": "The", "max_tokens": 4}))
                    break
                except (OSError, RuntimeError):
                    time.sleep(0.1)
            yield
        finally:
            process.terminate()


def ask(prompt: str, n_tokens: int, ends: Sequence[int]) -> Json:
    """Return a request whose text does not end early, on any of the servers."""
    return {
        "prompt": prompt,
        "max_tokens": n_tokens,
        "temperature": 0,
        "logit_bias": {str(token_id): -100 for token_id in ends},
    }


def measure_loads(
    urls: dict[str, str], prompts: Prompts, ends: Sequence[int], rounds: int
) -> dict[str, Json]:
    """Return, by server and number of clients, the raw samples of all rounds."""
    found: dict[str, Json] = {name: {str(n): new_samples() for n in CLIENTS} for name in urls}
    for number in range(rounds):
        order = list(urls)[number % len(urls) :] + list(urls)[: number % len(urls)]
        for n_clients in CLIENTS:
            bodies = [ask(prompts.next(PROMPT_CHARS), N_TOKENS, ends) for _ in range(n_clients)]
            for name in order:
                heard, duration_s = asyncio.run(complete_all(urls[name], bodies))
                samples = found[name][str(n_clients)]
                n_tokens = sum(each.n_tokens for each in heard)
                samples["tokens_per_s"].append(n_tokens / duration_s)
                samples["ttft_s"] += [each.ttft_s for each in heard]
                samples["itl_s"] += [gap for each in heard for gap in each.gaps_s]
                print(number, name, n_clients, f"{n_tokens / duration_s:.1f}", file=sys.stderr)
    return found


def new_samples() -> dict[str, list[float]]:
    return {"tokens_per_s": [], "ttft_s": [], "itl_s": []}


async def beside_a_prompt(url: str, prompts: Prompts, ends: Sequence[int]) -> tuple[Heard, Heard]:
    """Return a text alone, and one while a second client sends prompts of 1,000 tokens."""
    body = ask(prompts.next(PROMPT_CHARS), N_BESIDE, ends)
    alone = await complete(url, body)
    beside = ask(prompts.next(PROMPT_CHARS), N_BESIDE, ends)
    running = asyncio.create_task(complete(url, beside, at_most_s=BESIDE_S))
    while not running.done():
        await complete(url, ask(prompts.next(LONG_PROMPT_CHARS), 1, ends))
    return alone, await running


async def cancel_s(url: str, prompts: Prompts, ends: Sequence[int]) -> float:
    """Return the seconds from hanging up in mid-stream until the slot is free."""
    await complete(url, ask(prompts.next(PROMPT_CHARS), 1000, ends), stop_after=5)
    begun_s = time.perf_counter()
    while any(slot["is_processing"] for slot in await get_json(url, "/slots")):
        await asyncio.sleep(0.005)
    return time.perf_counter() - begun_s


def summary(samples: dict[str, list[float]]) -> Json:
    """Return medians and the p95 of latencies."""
    return {
        "tokens_per_s": statistics.median(samples["tokens_per_s"]),
        "tokens_per_s_samples": samples["tokens_per_s"],
        **{
            f"{kind}_{name}_ms": 1e3 * quantile(samples[f"{kind}_s"], share)
            for kind in ("ttft", "itl")
            for name, share in (("p50", 0.5), ("p95", 0.95))
        },
    }


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(round(share * (len(values) - 1)), len(values) - 1)]


def ratios(loads: dict[str, Json], other: str, n_clients: int) -> Json:
    """Return our tokens/s over the other's, round by round."""
    ours = loads[OURS][str(n_clients)]["tokens_per_s"]
    theirs = loads[other][str(n_clients)]["tokens_per_s"]
    found = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return {"median": statistics.median(found), "min": found[0], "max": found[-1]}


def interference(url: str, prompts: Prompts, ends: Sequence[int], rounds: int) -> Json:
    """Return how much longer gaps are while another request's prompt is computed."""
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(rounds):
        first, second = asyncio.run(beside_a_prompt(url, prompts, ends))
        alone += first.gaps_s
        beside += second.gaps_s
    p95 = quantile(alone, 0.95), quantile(beside, 0.95)
    return {"alone_p95_ms": 1e3 * p95[0], "beside_p95_ms": 1e3 * p95[1], "ratio": p95[1] / p95[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--text", "--llama-server"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from edgekd.runtime.gguf_header import read_gguf_header

    metadata = read_gguf_header(arguments.model).metadata
    ends = sorted(
        {
            metadata[f"tokenizer.ggml.{kind}_token_id"]
            for kind in ("eos", "eot", "bos")
            if f"tokenizer.ggml.{kind}_token_id" in metadata
        }
    )
    prompts = Prompts(arguments.text.read_text("utf-8"))
    ports = [18431, 18432, 18433]
    urls = dict(
        zip(
            (OURS, LLAMA_SERVER, LLAMA_CPP_SERVER),
            map("http://127.0.0.1:{}".format, ports),
            strict=True,
        )
    )
    version = subprocess.run(
        [arguments.llama_server, "--version"], capture_output=True, text=True, check=True
    )
    servers = commands(arguments.model, arguments.llama_server, ports, arguments.threads)
    with ExitStack() as stack:
        logs = stack.enter_context(tempfile.TemporaryDirectory())
        for (name, command), port in zip(servers, ports, strict=True):
            log = Path(logs) / f"{port}.log"
            stack.enter_context(started(command, urls[name], log))
        loads = measure_loads(urls, prompts, ends, arguments.rounds)
        both = {name: urls[name] for name in (OURS, LLAMA_SERVER)}
        beside = {name: interference(url, prompts, ends, 4) for name, url in both.items()}
        cancels = {
            name: [asyncio.run(cancel_s(url, prompts, ends)) for _ in range(N_CANCELS)]
            for name, url in both.items()
        }
    record(
        {
            "model": arguments.model.name,
            "llama_server": (version.stdout + version.stderr).strip().splitlines()[0],
            "threads": arguments.threads,
            "loads": {
                name: {n: summary(samples) for n, samples in by_clients.items()}
                for name, by_clients in loads.items()
            },
            "over_llama_server": {n: ratios(loads, LLAMA_SERVER, n) for n in CLIENTS},
            "over_llama_cpp_server": {n: ratios(loads, LLAMA_CPP_SERVER, n) for n in CLIENTS},
            "itl_beside_a_prompt": beside,
            "cancel_p95_ms": {name: 1e3 * quantile(each, 0.95) for name, each in cancels.items()},
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
