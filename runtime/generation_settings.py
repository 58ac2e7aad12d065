"""``generation_settings`` as llama-server shows them: in answers, in /props and in /slots."""

from dataclasses import asdict
from typing import Any

from edgekd.runtime.generation_fields import IDLE, SWITCHES, GenerationFields
from edgekd.runtime.sampling import SamplingParams

Json = dict[str, Any]

_SHOWN_AS = {"max_predict_ms": "t_max_predict_ms", "logprobs": "n_probs"}
"""Settings that llama-server has another name for; see also the end of ``settings_of``."""


def settings_of(asked: GenerationFields, params: SamplingParams, n_ctx: int, alias: str) -> Json:
    """Return the settings that a text is made with, those included that are off."""
    off = IDLE | {name: values[0] for name, values in SWITCHES.items()}
    ours = {_SHOWN_AS.get(name, name): value for name, value in asdict(params).items()}
    form = next((each.text for each in asked.forms() if each.kind == "gbnf"), "")
    return (
        off
        | ours
        | {
            "n_ctx": n_ctx,
            "model": alias,
            "seed": -1 if params.seed is None else params.seed,
            "logit_bias": [{"bias": bias, "token": each} for each, bias in params.logit_bias],
            "n_predict": asked.limit(),
            "max_tokens": asked.limit(),
            "t_max_predict_ms": params.max_predict_ms or 0,
            "n_probs": params.logprobs or 0,
            "stream": asked.stream,
            "grammar": form,
            "timings_per_token": asked.timings_per_token,
            "return_progress": asked.return_progress,
            "cache_prompt": asked.cache_prompt,
        }
    )
