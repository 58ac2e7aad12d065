"""What the committed results say of edgekd and of the tool beside it: figures, ratios, verdicts.

Measures nothing itself: each result has a benchmark of its own. scripts/write_peers.py makes the
page of it.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgekd.runtime.stats import paired_ratio

Json = dict[str, Any]
SAME = 0.01
"""Ratios nearer to 1 than this are called equal."""
BETTER, WORSE, UNCLEAR, ALONE = "better", "**worse**", "unclear", ""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure of both."""

    what: str
    peer: str
    ours: str
    theirs: str
    ratio: float | None
    """Ours over theirs; None where only ours was measured."""
    interval: tuple[float, float] | None = None
    more_is_better: bool
    if_worse: str = ""
    """Why it is worse, where that is known."""
    same: float = SAME

    @property
    def verdict(self) -> str:
        """Return whether edgekd is better, by the interval where there is one."""
        if self.ratio is None:
            return ALONE
        low, high = self.interval or (self.ratio, self.ratio)
        if 1 - self.same < low and high < 1 + self.same:
            return f"equal to {self.same:.0%}"
        if low <= 1 <= high:
            return UNCLEAR
        return BETTER if (self.ratio > 1) is self.more_is_better else WORSE


def of_samples(
    what: str,
    peer: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    shape: str,
    *,
    more_is_better: bool,
    if_worse: str = "",
) -> Compared:
    """Return both geometric means and the ratio of samples that were taken in turns."""
    ratio = paired_ratio(theirs, ours)
    assert ratio, "a single pair has no interval"
    return Compared(
        what=what,
        peer=peer,
        ours=shape.format(statistics.geometric_mean(ours)),
        theirs=shape.format(statistics.geometric_mean(theirs)),
        ratio=ratio.value,
        interval=(ratio.low, ratio.high),
        more_is_better=more_is_better,
        if_worse=if_worse,
    )


def of_values(
    what: str,
    peer: str,
    ours: float,
    theirs: float,
    shape: str,
    *,
    more_is_better: bool = False,
    interval: tuple[float, float] | None = None,
    ratio: float | None = None,
    if_worse: str = "",
) -> Compared:
    """Return two single figures; ``ratio`` where it was taken otherwise than from them."""
    return Compared(
        what=what,
        peer=peer,
        ours=shape.format(ours),
        theirs=shape.format(theirs),
        ratio=ours / theirs if ratio is None else ratio,
        interval=interval,
        more_is_better=more_is_better,
        if_worse=if_worse,
    )


def training(found: Json) -> Iterator[Compared]:
    """Yield edgekd's loop beside TRL's."""
    rows = found["rows"]
    for arm in ("edgekd, bf16 heads", "edgekd, fp32 heads"):
        row, heads = rows[arm], arm.partition(", ")[2]
        low, _, high = row["speed_over_trl"]["quartiles"]
        yield of_values(
            f"tokens/s, {heads}",
            "TRL",
            row["tokens_per_s"]["median"],
            rows["trl"]["tokens_per_s"]["median"],
            "{:.0f}",
            more_is_better=True,
            ratio=row["speed_over_trl"]["median"],
            interval=(low, high),
        )
        for peer, name in (("trl", "TRL"), ("trl, torch_compile", "TRL, compiled")):
            if peer != "trl":
                yield of_values(
                    f"tokens/s, {heads}",
                    name,
                    row["tokens_per_s"]["median"],
                    rows[peer]["tokens_per_s"]["median"],
                    "{:.0f}",
                    more_is_better=True,
                )
            yield _gigabytes(f"peak memory, {heads}", name, row, rows[peer])
        yield Compared(
            what=f"largest difference of a step's loss, {heads}",
            peer="TRL",
            ours=f"{row['largest_loss_difference_to_trl']:.2%}",
            theirs="",
            ratio=None,
            more_is_better=False,
        )


def loss(found: Json) -> Iterator[Compared]:
    """Yield the loss alone beside TRL's and Liger's."""
    for shape, compared in found["shapes"].items():
        ours = compared["rows"]["edgekd compiled"]["samples"]
        for kind, name in (("trl chunked", "TRL, chunked"), ("liger chunked", "Liger, chunked")):
            theirs = compared["rows"][kind].get("samples")
            if not theirs:
                continue
            for field, what, text, scale in (
                ("seconds", "seconds", "{:.2f}", 1),
                ("added_peak_bytes", "added peak memory, GB", "{:.2f}", 1e9),
            ):
                one = [each[field] / scale for each in ours]
                other = [each[field] / scale for each in theirs]
                yield of_samples(f"{shape}: {what}", name, one, other, text, more_is_better=False)


def exporting(found: Json) -> Iterator[Compared]:
    """Yield the exporters beside llama.cpp's converter and onnxruntime-genai's builder."""
    for kind, peer, name in (
        ("gguf q4_0", "llama.cpp", "llama.cpp"),
        ("gguf q4_k_m", "llama.cpp", "llama.cpp"),
        ("onnx q4_0", "genai builder", "genai's builder"),
    ):
        exports = found[kind]["exports"]
        for arm in ("edgekd", "edgekd, unverified"):
            said = ", verified" if arm == "edgekd" else " with --no-verify"
            why = "it also runs the file against the checkpoint" if arm == "edgekd" else ""
            yield of_samples(
                f"{kind}: seconds{said}",
                name,
                exports[arm]["seconds"]["samples"],
                exports[peer]["seconds"]["samples"],
                "{:.1f}",
                more_is_better=False,
                if_worse=why,
            )
            yield _gigabytes(f"{kind}: peak memory{said}", name, exports[arm], exports[peer], why)
        ours, theirs = exports["edgekd"]["file_bytes"], exports[peer]["file_bytes"]
        yield of_values(f"{kind}: file, MB", name, ours / 1e6, theirs / 1e6, "{:.2f}")
        decoding = found[kind]["decoding"]
        suffix = " in genai" if peer == "genai builder" else ""
        yield _speeds(
            f"{kind}: decoding the file, tokens/s",
            name,
            decoding[f"edgekd{suffix}"],
            decoding[f"{peer}{suffix}"],
        )


def onnx_decoding(found: Json) -> Iterator[Compared]:
    """Yield the loops over ONNX Runtime beside onnxruntime-genai's."""
    rows, peer = found["decoding"], "onnxruntime-genai"
    for arm in ("edgekd", "edgekd batch"):
        what = "tokens/s" + (" of the server's engine" if arm == "edgekd batch" else "")
        yield _speeds(what, peer, rows[arm], rows[peer])
    own = found.get("decoding_each_its_own_file", {})
    for built in own.keys() - {"edgekd"}:
        yield _speeds("tokens/s, each its own file", built, own["edgekd"], own[built])


def measuring(found: Json) -> Iterator[Compared]:
    """Yield edgekd bench beside llama-bench: the nearer to 1, the better."""
    for name, compared in found["results"].items():
        ratio = compared["speed_ratio"]
        yield Compared(
            what=f"{name}, tokens/s",
            peer="llama-bench",
            ours=f"{compared['ours_tokens_per_s']['mean']:.1f}",
            theirs=f"{compared['llama_bench_tokens_per_s']['mean']:.1f}",
            ratio=ratio["value"],
            interval=(ratio["low"], ratio["high"]),
            more_is_better=True,
            same=found["limit"],
        )


_TWO_PROCESSES = "edgekd's engine runs in a process of its own, which Python drives"


def serving(found: Json) -> Iterator[Compared]:
    """Yield edgekd serve beside llama-server and llama_cpp.server."""
    loads = found["loads"]
    for peer in ("llama-server", "llama_cpp.server"):
        for clients in loads["edgekd serve"]:
            ours, theirs = loads["edgekd serve"][clients], loads[peer][clients]
            load = f"{clients} client{'s' * (clients != '1')}"
            yield of_samples(
                f"{load}: tokens/s",
                peer,
                ours["tokens_per_s_samples"],
                theirs["tokens_per_s_samples"],
                "{:.0f}",
                more_is_better=True,
                if_worse=_TWO_PROCESSES,
            )
            for field, what in (
                ("ttft_p50_ms", "first token after, median ms"),
                ("itl_p95_ms", "gap between tokens, p95 ms"),
            ):
                yield of_values(
                    f"{load}: {what}",
                    peer,
                    ours[field],
                    theirs[field],
                    "{:.1f}",
                    if_worse=_TWO_PROCESSES,
                )
    beside, cancel = found["itl_beside_a_prompt"], found["cancel_p95_ms"]
    for peer in beside:
        if peer != "edgekd serve":
            gaps = {name: each["beside_p95_ms"] for name, each in beside.items()}
            for what, found_ms, text in (
                ("gap beside a long prompt, p95 ms", gaps, "{:.1f}"),
                ("slot free after a client left, p95 ms", cancel, "{:.0f}"),
            ):
                yield of_values(what, peer, found_ms["edgekd serve"], found_ms[peer], text)


def answering(found: Json) -> Iterator[Compared]:
    """Yield answers to questions beside lm-evaluation-harness's."""
    for field in ("acc", "acc_norm"):
        ours, theirs = found["edgekd"][field][0], found["lm_eval"][field][0]
        what = f"{field} of {found['n_questions']} questions"
        yield of_values(what, "lm-eval", ours, theirs, "{:.3f}", more_is_better=True)
    compared = found["compared"]
    yield Compared(
        what="questions that get another answer",
        peer="lm-eval",
        ours=str(compared["unequal_answers"] + compared["unequal_answers_norm"]),
        theirs="",
        ratio=None,
        more_is_better=False,
    )


def on_the_grid(found: Json) -> Iterator[Compared]:
    """Yield training on the int4 grid beside rounding afterwards."""
    rows = found["rows"]
    ours = rows["trained on the grid Q4_0"]
    for other, name in (
        ("float rounded to Q4_0", "Q4_0, rounded"),
        ("float rounded to Q4_0 by GPTQ", "Q4_0 by GPTQ"),
        ("float Q4_K_M with importance matrix", "Q4_K_M with importance matrix"),
    ):
        theirs = rows[other]
        larger = theirs["bytes"] / ours["bytes"] - 1
        why = f"its file is {larger:.0%} larger" if larger > SAME else ""
        for field, what, text, more in (
            ("kl_nats", "KL to teacher, nats", "{:.3f}", False),
            ("top1_agreement", "top-1", "{:.1%}", True),
            ("perplexity", "perplexity", "{:.2f}", False),
        ):
            yield of_values(
                what, name, ours[field], theirs[field], text, more_is_better=more, if_worse=why
            )
        yield of_values("file, MB", name, ours["bytes"] / 1e6, theirs["bytes"] / 1e6, "{:.1f}")


def faults(found: Json) -> Iterator[Compared]:
    """Yield what the server did under faults, which was asked of no other server."""
    kills, flood = found["kills"], found["flood"]
    for what, ours in (
        ("engine killed: back after, median s", f"{kills['recovery_s_median']:.2f}"),
        ("wrong answers while it was killed", str(kills["streams"]["wrong"])),
        (f"of {flood['n_asked']} at once: answered", str(flood["n_whole"])),
        (f"of {flood['n_asked']} at once: told to try again", str(flood["n_told_to_retry"])),
    ):
        yield Compared(
            what=what, peer="", ours=ours, theirs="not measured", ratio=None, more_is_better=True
        )


def _speeds(what: str, peer: str, ours: Json, theirs: Json, if_worse: str = "") -> Compared:
    one, other = ours["tokens_per_s"]["samples"], theirs["tokens_per_s"]["samples"]
    return of_samples(what, peer, one, other, "{:.0f}", more_is_better=True, if_worse=if_worse)


def _gigabytes(what: str, peer: str, ours: Json, theirs: Json, if_worse: str = "") -> Compared:
    one, other = ours["peak_rss_bytes"] / 1e9, theirs["peak_rss_bytes"] / 1e9
    return of_values(f"{what}, GB", peer, one, other, "{:.2f}", if_worse=if_worse)
