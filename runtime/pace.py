"""How many prompt tokens a step may take beside running texts, so that nobody's stream stalls.

A bucket of seconds, learnt from the durations seen. Texts fill it while they run, 0.4 s a
second; prompts empty it. A prompt that begins brings up to 0.1 s of its own: so short ones never
wait, however many come, since a slot without a text is lost to everybody, and a step costs
little more for one text more. A long prompt slows the texts to 1.4 times at most on average, and
either in every step a little or, where a step is too short for that, in few of them: a text sees
one longer gap in 40.
"""

EXTRA = 0.4
"""Seconds for prompts to each second of texts."""
GRANT_S = 0.1
"""What a prompt may take at once; a gap that hardly anybody reading along notices."""
BURST_S = 0.2  # an idle bucket
SPACING = 40  # steps between two parts of a prompt: 2.5 %, well below the p95 of the gaps
LONGEST_GAP_S = 0.2  # a part of a prompt is not saved up for longer
MIN_CHUNK_TOKENS = 8  # fewer waste a pass over the weights
FIRST_CHUNK_TOKENS = 32  # as long as no durations are known
_WEIGHT = 0.2  # of the newest duration in the running mean


class Pace:
    """Running means of what a step of texts and a prompt token take, and the bucket."""

    def __init__(self, batch_tokens: int, extra: float = EXTRA) -> None:
        """Allow steps of ``batch_tokens``, and ``extra`` seconds for prompts to one of texts."""
        self._batch_tokens = batch_tokens
        self._extra = extra
        self._texts_s: float | None = None
        self._prompt_token_s: float | None = None
        self._bucket_s = BURST_S
        self._n_since_prompt = SPACING
        self._granted = 0  # prompt tokens that need not wait for the bucket

    def admit(self, n_tokens: int) -> None:
        """Let a prompt begin that has so many tokens to compute."""
        if self._prompt_token_s:
            self._granted += min(n_tokens, round(GRANT_S / self._prompt_token_s))

    def prompt_tokens(self, n_texts: int, n_wanted: int) -> int:
        """Return how many of ``n_wanted`` prompt tokens may go beside ``n_texts`` texts now."""
        self._granted = min(self._granted, n_wanted)  # some may have been cancelled
        most = min(self._batch_tokens - n_texts, n_wanted)
        if n_texts == 0:
            return most
        if self._texts_s is None or self._prompt_token_s is None:
            return min(FIRST_CHUNK_TOKENS, most)
        return min(self._granted + self._earned_tokens(n_wanted - self._granted), most)

    def note(self, n_texts: int, n_prompt_tokens: int, duration_s: float) -> None:
        """Learn from a step of ``n_texts`` texts and ``n_prompt_tokens`` of prompts."""
        if not n_prompt_tokens:
            self._texts_s = texts_s = _mean(self._texts_s, duration_s)
            self._n_since_prompt += 1
        else:
            texts_s = (self._texts_s or 0.0) if n_texts else 0.0
            # A prompt takes never less than a tenth of its step, whatever else varied.
            prompt_s = max(duration_s - texts_s, duration_s / 10)
            self._pay(n_texts, n_prompt_tokens, prompt_s)
        if n_texts:
            self._bucket_s = min(self._bucket_s + self._extra * texts_s, BURST_S)

    def _earned_tokens(self, n_wanted: int) -> int:
        """Return how many of ``n_wanted`` tokens the bucket pays for."""
        assert self._texts_s is not None and self._prompt_token_s is not None
        affordable = max(round(self._bucket_s / self._prompt_token_s), 0)
        smooth = round(self._extra * self._texts_s / self._prompt_token_s)
        if affordable >= n_wanted:
            return n_wanted
        if smooth >= MIN_CHUNK_TOKENS:
            return affordable if affordable >= MIN_CHUNK_TOKENS else 0
        is_due = self._n_since_prompt >= SPACING or self._bucket_s >= LONGEST_GAP_S
        return affordable if is_due else 0

    def _pay(self, n_texts: int, n_tokens: int, prompt_s: float) -> None:
        """Take what a step's prompt tokens cost: first from what they brought."""
        self._prompt_token_s = _mean(self._prompt_token_s, prompt_s / n_tokens)
        n_earned = n_tokens - min(self._granted, n_tokens)
        self._granted -= n_tokens - n_earned
        if n_earned:
            self._n_since_prompt = 0
        if n_texts:
            self._bucket_s = max(self._bucket_s - prompt_s * n_earned / n_tokens, -BURST_S)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
