"""Write the tables of docs/serve.md from code and results; ``--check`` fails if they are stale."""

import json
from pathlib import Path
from typing import Any

from generated import Rows, put, table, write_or_check

from edgekd.runtime import grammar_limits, http_guard, http_timeouts, pace, rendering, server
from edgekd.runtime.api_errors import RETRY_AFTER_S
from edgekd.runtime.asked import MAX_BIASES, MAX_DEPTH, MAX_STOPS
from edgekd.runtime.engine_process import HANG_S
from edgekd.runtime.generation_fields import MAX_CHOICES, MAX_PROMPTS
from edgekd.runtime.openai_requests import MAX_TOOLS
from edgekd.runtime.render_worker import MAX_BYTES
from edgekd.runtime.sampling import MAX_LOGPROBS, MAX_PROBS
from edgekd.runtime.slots import KEEP_SHARE, WAIT_TOKENS

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "serve.md"
FAULTS = ROOT / "benchmarks" / "results" / "serve_faults.json"
SPEED = ROOT / "benchmarks" / "results" / "serve.json"
KIB, MIB = 1024, 1024**2


def limits() -> Rows:
    """Return what a request may be, from the constants that bound it."""
    return [
        ("request line and headers", f"{http_timeouts.MAX_HEAD_BYTES // KIB} KiB"),
        ("time for them", f"{http_timeouts.HEAD_S:g} s"),
        ("body", f"{http_guard.MAX_BODY_BYTES // MIB} MiB"),
        ("time for the body", f"{http_guard.BODY_S:g} s"),
        ("what is read and dropped of a longer one", f"{http_guard.MAX_SKIPPED_BYTES // MIB} MiB"),
        ("time for the rest of a body whose request is answered", f"{http_timeouts.REST_S:g} s"),
        ("nesting of JSON", f"{MAX_DEPTH} levels"),
        ("`stop`", f"{MAX_STOPS} strings"),
        ("`logit_bias`", f"{MAX_BIASES} tokens"),
        ("`n`; prompts in one request", f"{MAX_CHOICES}; {MAX_PROMPTS}"),
        ("`logprobs`; `n_probs`", f"{MAX_LOGPROBS}; {MAX_PROBS} alternatives"),
        ("`tools`", f"{MAX_TOOLS}"),
        (
            "grammar or schema",
            f"{grammar_limits.MAX_BYTES // KIB} KiB, {grammar_limits.MAX_DEPTH} levels, "
            f"{grammar_limits.MAX_RULES:,} rules, {grammar_limits.MAX_REPEAT:,} repetitions "
            f"(`maxLength`, `maxItems` ...), {grammar_limits.MAX_EXPANDED:,} symbols with all "
            "repetitions written out",
        ),
        (
            "chat template",
            f"{rendering.RENDER_S:g} s and {MAX_BYTES // MIB} MiB of memory for a chat",
        ),
        ("a request's life", f"`--timeout`, {server.TIMEOUT_S:g} s"),
        ("silence of a busy engine before it is replaced", f"{HANG_S:g} s"),
        ("running texts after SIGTERM", f"{server.DRAIN_S} s"),
        ("`Retry-After` of a 429 or 503", f"{RETRY_AFTER_S} s"),
    ]


def scheduling() -> Rows:
    """Return the constants of edgekd.runtime.pace and .slots."""
    return [
        ("a prompt starts with, beside running texts", f"{pace.GRANT_S:g} s of computing"),
        ("then prompts get", f"{pace.EXTRA:g} s for each second of texts"),
        ("or, where a step is too short for that, one step in", f"{pace.SPACING}"),
        ("a part of a prompt is saved up for", f"{pace.LONGEST_GAP_S:g} s at most"),
        ("a slot is taken over by a prompt that uses", f"{KEEP_SHARE:.0%} of its tokens"),
        (
            "a request waits for another one's prompt to share",
            f"{WAIT_TOKENS} tokens more than it could now",
        ),
    ]


def faults() -> Rows:
    """Return what benchmarks/serve_faults.py measured."""
    found: dict[str, Any] = json.loads(FAULTS.read_text("utf-8"))
    kills, flood, gone = found["kills"], found["flood"], found["gone"]
    slow, memory = found["slow"], found["memory"]
    streams = kills["streams"]
    return [
        (
            f"engine killed {kills['n_kills']} times under load",
            f"back after {kills['recovery_s_median']:.2f} s (median), "
            f"{kills['recovery_s_worst']:.2f} s at worst; {streams['cut']} streams cut with an "
            f"error, {streams['whole']} whole, {streams['wrong']} wrong",
        ),
        (
            f"{flood['n_asked']} requests at once, --parallel {found['parallel']}",
            f"{flood['n_whole']} answered whole, {flood['n_told_to_retry']} told to try again",
        ),
        (
            "client gone in mid-stream",
            f"its slot is free after {gone['slot_free_s_median'] * 1000:.0f} ms (median), "
            f"{gone['slot_free_s_worst'] * 1000:.0f} ms at worst",
        ),
        (
            f"{slow['slow_heads_closed']} slow heads, {slow['slow_bodies_told_408']} slow bodies",
            f"another client's short request takes {slow['latency_s_median_beside'] * 1000:.0f} ms "
            f"(median) instead of {slow['latency_s_median_alone'] * 1000:.0f} ms",
        ),
        (
            f"{memory['n_requests']:,} requests after {memory['n_early']}",
            f"private memory of the engine {memory['growth']['engine_uss']:+.1%}, "
            f"of the server {memory['growth']['server_uss']:+.1%}",
        ),
    ]


def speeds() -> Rows:
    """Return what benchmarks/serve.py measured, by number of clients."""
    found: dict[str, Any] = json.loads(SPEED.read_text("utf-8"))
    loads, over = found["loads"], found["over_llama_server"]
    return [
        (
            n,
            *(
                f"{loads[name][n]['tokens_per_s']:.0f}, {loads[name][n]['ttft_p50_ms']:.0f} ms, "
                f"{loads[name][n]['itl_p95_ms']:.1f} ms"
                for name in loads
            ),
            f"{over[n]['median']:.2f} ({over[n]['min']:.2f}-{over[n]['max']:.2f})",
        )
        for n in over
    ]


def stalls() -> Rows:
    """Return how streams fare beside a long prompt, from the same run."""
    found: dict[str, Any] = json.loads(SPEED.read_text("utf-8"))
    return [
        (
            name,
            f"{each['alone_p95_ms']:.1f} ms",
            f"{each['beside_p95_ms']:.1f} ms",
            f"{found['cancel_p95_ms'][name]:.0f} ms",
        )
        for name, each in found["itl_beside_a_prompt"].items()
    ]


TABLES = {
    "limits": lambda: table(("of a request", "limit"), limits()),
    "scheduling": lambda: table(("what", "how much"), scheduling()),
    "speed": lambda: table(
        ("clients", *json.loads(SPEED.read_text("utf-8"))["loads"], "tokens/s over llama-server"),
        speeds(),
    ),
    "stalls": lambda: table(
        ("server", "gap p95 alone", "beside a prompt of 1,000 tokens", "a slot is free after"),
        stalls(),
    ),
    "faults": lambda: table(("what happened", "what the server did"), faults()),
}


def main() -> None:
    """Put each table between its marks."""
    page = TARGET.read_text("utf-8")
    for name, render in TABLES.items():
        page = put(page, name, render())
    write_or_check(TARGET, page)


if __name__ == "__main__":
    main()
