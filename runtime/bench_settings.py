"""What a benchmark runs: settings, and the scenarios that they ask for.

A scenario is named as llama-bench names it: ``pp512`` is a prefill of 512 tokens, ``tg128`` are
128 decode steps, and ``pp512@d4096`` is the same behind 4096 tokens that are in the cache.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgekd.errors import RecipeError

ScenarioKind = Literal["prefill", "decode"]
DEFINITIONS = {
    "prefill_tokens_per_s": "prompt tokens / time of their forward passes, as llama-bench's pp",
    "decode_tokens_per_s": "decode steps / their total time, choice of each token included; the "
    "first token of a text comes out of the prefill and is not among them, as llama-bench's tg "
    "(llama-server counts n - 1 of n tokens over the same time)",
    "ttft_s": "from token ids to the id of the first new token: prefill and choice; the text "
    "is tokenized before",
    "gap_ms": "real time between two tokens, each step of every repetition; percentiles over all",
    "interval": "Student's t on the mean of the repetitions, two-sided, 95 %",
    "load_s": "reading the file until the engine can run; importing the engine is import_s",
    "roofline_share": "decode: bytes read per token x tokens/s / probed read bandwidth; prefill: "
    "2 x parameters multiplied x tokens/s / probed fp32 GEMM flop/s, which int8 kernels may pass",
    "energy": "package energy of the timed spans, idle draw included",
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One thing that is timed, as often as there are repetitions."""

    kind: ScenarioKind
    n_tokens: int
    n_depth: int = 0
    """Tokens in the KV cache before."""

    @property
    def name(self) -> str:
        """Return the name in tables: ``pp512``, ``tg128@d4096``."""
        depth = f"@d{self.n_depth}" if self.n_depth else ""
        return f"{'pp' if self.kind == 'prefill' else 'tg'}{self.n_tokens}{depth}"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is run: the same for every model that is to be compared."""

    prompt_tokens: int = 512
    decode_tokens: int = 128
    depths: tuple[int, ...] = (0,)
    """Tokens in the cache before, each with a prefill and a decode of its own."""
    ttft_tokens: tuple[int, ...] = ()
    """Further prompt lengths, for time to first token as a function of length."""
    repetitions: int = 5
    """Measured ones, each in a block in which every model runs once."""
    n_threads: int | None = None
    """None: all processors that the process may use."""
    cold_start: bool = False
    """Also load each model once with its file dropped from the page cache."""
    roofline: bool = False
    """Probe what memory and processor can do at most."""
    soak_minutes: float = 0.0
    """Decode until the speed is steady, at most so long; 0 leaves it out."""
    warm_up_s: float = 20.0
    """Most time for a scenario to become steady before it is measured."""
    provider: str = "cpu"
    """Execution provider of ONNX folders."""
    require_npu: bool = False
    """Refuse to leave any of an ONNX folder to the CPU."""

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            RecipeError: some are out of range; all of them are named.
        """
        faults = [
            f"{name} is {value!r}, a whole number from {low} on is needed"
            for name, value, low in self._whole_numbers()
            if not isinstance(value, int) or isinstance(value, bool) or value < low
        ]
        faults += [
            f"{name} is {value!r}, a number from 0 on is needed"
            for name in ("soak_minutes", "warm_up_s")
            if not (value := getattr(self, name)) >= 0
        ]
        if not self.depths:
            faults.append("depths is empty, at least one is needed (0 is an empty cache)")
        if faults:
            raise RecipeError("; ".join(faults))

    def scenarios(self) -> list[Scenario]:
        """Return what is timed, without repeats, in the order in which it runs."""
        found = [Scenario(kind="prefill", n_tokens=n) for n in sorted(self.ttft_tokens)]
        for depth in self.depths:
            found.append(Scenario(kind="prefill", n_tokens=self.prompt_tokens, n_depth=depth))
            found.append(Scenario(kind="decode", n_tokens=self.decode_tokens, n_depth=depth))
        return list(dict.fromkeys(found))

    @property
    def text_tokens(self) -> int:
        """Return how many tokens of text are needed at most."""
        longest = max(self.prompt_tokens, *self.ttft_tokens, 1)
        return max(self.depths) + longest

    @property
    def context_tokens(self) -> int:
        """Return the tokens that the KV cache must hold."""
        return max(self.text_tokens, max(self.depths) + self.decode_tokens)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def _whole_numbers(self) -> list[tuple[str, Any, int]]:
        numbers: list[tuple[str, Any, int]] = [
            (name, getattr(self, name), 1)
            for name in ("prompt_tokens", "decode_tokens", "repetitions", "n_threads")
            if not (name == "n_threads" and self.n_threads is None)
        ]
        numbers += [("depths", depth, 0) for depth in self.depths]
        return numbers + [("ttft_tokens", length, 1) for length in self.ttft_tokens]


def settings_from_dict(document: dict[str, Any]) -> BenchSettings:
    """Return the settings that ``BenchSettings.as_dict`` made ``document`` of."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in document.items()
    }
    return BenchSettings(**values)
