"""llama-server's ``timings`` and ``prompt_progress`` of one text, out of its events."""

from dataclasses import dataclass
from typing import Any

from edgekd.runtime.messages import Event, Finished, PromptRead, Started, Token

Json = dict[str, Any]


@dataclass
class Timings:
    """How far one text is, and how long that took; rates do not count the first token."""

    n_prompt: int = 0
    n_cached: int = 0
    n_made: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0

    def note(self, happened: Event) -> None:
        """Take in one event of the text."""
        if isinstance(happened, Started):
            self.n_prompt, self.n_cached = happened.n_prompt, happened.n_cached
        elif isinstance(happened, Token):
            self.n_made += 1
            if self.n_made == 1:
                self.prompt_s = happened.elapsed_s
            self.decode_s = happened.elapsed_s - self.prompt_s
        elif isinstance(happened, Finished):
            self.n_made = happened.n_generated
            self.prompt_s, self.decode_s = happened.prompt_s, happened.decode_s

    def beside(self, happened: Event, *, each_token: bool) -> Json:
        """Return what a part of a stream that says what ``happened`` tells beside it."""
        if isinstance(happened, PromptRead):
            return {"prompt_progress": self._progress(happened)}
        is_timed = isinstance(happened, Finished) or (each_token and isinstance(happened, Token))
        return {"timings": self.as_json()} if is_timed else {}

    def _progress(self, read: PromptRead) -> Json:
        """Return how far the prompt is; what was cached counts as processed."""
        return {
            "total": self.n_prompt,
            "cache": self.n_cached,
            "processed": read.n_computed,
            "time_ms": round(read.elapsed_s * 1e3),
        }

    def as_json(self) -> Json:
        """Return ``timings``."""
        n_read, n_decoded = self.n_prompt - self.n_cached, max(self.n_made - 1, 0)
        prompt_ms, decode_ms = self.prompt_s * 1e3, self.decode_s * 1e3
        return {
            "cache_n": self.n_cached,
            "prompt_n": n_read,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": _per(prompt_ms, n_read),
            "prompt_per_second": _per(n_read * 1e3, prompt_ms),
            "predicted_n": self.n_made,
            "predicted_ms": decode_ms,
            "predicted_per_token_ms": _per(decode_ms, n_decoded),
            "predicted_per_second": _per(n_decoded * 1e3, decode_ms),
        }


def _per(amount: float, count: float) -> float:
    return amount / count if count else 0.0
