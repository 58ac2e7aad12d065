"""How many prompt tokens a step may take beside running texts, so that nobody's stream stalls.

A step lasts as long as its tokens take together. From the durations seen, the pace keeps a step
with a part of a prompt within a given multiple of a step without; the more requests wait for
their first token, compared to those that have theirs, the larger the multiple.
"""

MAX_STALL = 1.4
"""Duration of a step with prompt tokens, in steps without, for one prompt beside one text."""
MIN_CHUNK_TOKENS = 8  # fewer waste a pass over the weights
FIRST_CHUNK_TOKENS = 32  # as long as no durations are known
_WEIGHT = 0.2  # of the newest duration in the running mean


class Pace:
    """Running means of what a step of texts and what a prompt token takes."""

    def __init__(self, batch_tokens: int, max_stall: float = MAX_STALL) -> None:
        """Allow steps of ``batch_tokens``, and ``max_stall`` times the duration without prompt."""
        self._batch_tokens = batch_tokens
        self._extra = max_stall - 1
        self._texts_s: float | None = None
        self._prompt_token_s: float | None = None

    def prompt_tokens(self, n_texts: int, n_prompts: int) -> int:
        """Return how many prompt tokens may go beside ``n_texts`` texts that each add one."""
        most = self._batch_tokens - n_texts
        if n_texts == 0:
            return most
        if self._texts_s is None or self._prompt_token_s is None:
            return min(FIRST_CHUNK_TOKENS, most)
        allowed_s = self._extra * self._texts_s * n_prompts / n_texts
        n_tokens = allowed_s / self._prompt_token_s
        return min(max(round(n_tokens), MIN_CHUNK_TOKENS), most)

    def note(self, n_texts: int, n_prompt_tokens: int, duration_s: float) -> None:
        """Learn from a step."""
        if n_prompt_tokens == 0:
            self._texts_s = _mean(self._texts_s, duration_s)
            return
        beside_s = (self._texts_s or 0.0) if n_texts else 0.0
        # A prompt token never takes less than a tenth of its share, whatever else varied.
        prompt_s = max(duration_s - beside_s, duration_s / 10)
        self._prompt_token_s = _mean(self._prompt_token_s, prompt_s / n_prompt_tokens)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
