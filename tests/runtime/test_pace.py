from edgekd.runtime.pace import SPACING, Pace


def learnt_pace(prompt_token_s: float) -> Pace:
    """A pace that saw steps of 40 ms for one text, and has an empty bucket."""
    pace = Pace(batch_tokens=512, extra=0.5)
    for _ in range(60):
        pace.note(1, 0, 0.040)
        pace.note(1, 32, 0.040 + 32 * prompt_token_s)
    pace._bucket_s = 0.0
    return pace


def run_pace(pace: Pace, prompt_token_s: float, n_tokens: int) -> list[int]:
    """The prompt tokens of each step while one text runs beside a prompt of ``n_tokens``."""
    parts: list[int] = []
    while sum(parts) < n_tokens:
        parts.append(pace.prompt_tokens(1, n_tokens - sum(parts)))
        pace.note(1, parts[-1], 0.040 + parts[-1] * prompt_token_s)
    return parts


def test_without_texts_or_for_short_prompts_there_is_no_wait() -> None:
    pace = Pace(batch_tokens=512)
    assert pace.prompt_tokens(0, 2000) == 512
    assert pace.prompt_tokens(2, 2000) == 32
    pace.note(1, 0, 0.040)
    pace.note(1, 10, 0.050)
    assert pace.prompt_tokens(1, 60) == 60


def test_a_prompt_takes_its_share_of_every_step_where_that_is_enough() -> None:
    parts = run_pace(learnt_pace(0.001), 0.001, 3000)[10:-1]
    assert 18 <= min(parts) <= max(parts) <= 22  # half of 40 ms, at 1 ms a token


def test_where_a_step_is_too_short_few_of_them_are_long() -> None:
    parts = run_pace(learnt_pace(0.004), 0.004, 2000)[SPACING:-1]
    long_steps = [part for part in parts if part]
    assert max(long_steps) * 0.004 <= 0.21
    assert sum(parts) * 0.004 <= 0.55 * 0.040 * len(parts)


def test_long_steps_are_far_between_on_a_fast_machine() -> None:
    pace = Pace(batch_tokens=512)
    for _ in range(60):
        pace.note(1, 0, 0.003)
        pace.note(1, 4, 0.003 + 4 * 0.0005)
    pace._bucket_s = 0.0
    parts: list[int] = []
    while sum(parts) < 1000:
        parts.append(pace.prompt_tokens(1, 1000 - sum(parts)))
        pace.note(1, parts[-1], 0.003 + parts[-1] * 0.0005)
    assert sum(part > 0 for part in parts) / len(parts) < 0.045


def test_short_prompts_begin_at_once_however_many_come() -> None:
    pace = learnt_pace(0.001)
    for _ in range(7):
        pace.admit(60)
    assert pace.prompt_tokens(1, 7 * 60) == 7 * 60
    pace.note(1, 7 * 60, 0.040 + 7 * 0.060)
    assert pace.prompt_tokens(8, 60) <= 22  # half of 40 ms: what the bucket earned since


def test_a_long_prompt_takes_no_more_at_once_than_a_short_one() -> None:
    pace = learnt_pace(0.001)
    pace.admit(2000)
    parts = run_pace(pace, 0.001, 2000)
    assert 95 <= parts[0] <= 105  # 0.1 s
    assert max(parts[1:-1]) <= 40


def test_what_a_cancelled_prompt_brought_is_nobody_elses() -> None:
    pace = learnt_pace(0.001)
    pace.admit(60)
    assert pace.prompt_tokens(1, 0) == 0
    assert pace.prompt_tokens(1, 60) == 0
