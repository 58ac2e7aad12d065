r"""Any model that edgekd runs, as a model of lm-evaluation-harness (EleutherAI).

    python -m edgekd.runtime.lm_eval_model run --model edgekd \
        --model_args pretrained=model.gguf --tasks arc_easy

takes the arguments of lm-evaluation-harness's own command. From Python, import this module, then
call ``lm_eval.simple_evaluate(model="edgekd", model_args={"pretrained": "model.gguf"})``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgekd.errors import MissingExtraError

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise MissingExtraError("lm_eval", "lm-eval") from error

from edgekd.errors import ModelError, RecipeError
from edgekd.runtime.continuations import Scored, Scorer
from edgekd.runtime.generate import generate
from edgekd.runtime.loading import DEFAULT_CONTEXT_TOKENS, open_model
from edgekd.runtime.sampling import SamplingParams
from edgekd.runtime.tokenizer import decode

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_MAX_GEN_TOKS = 256  # as lm-evaluation-harness's HFLM
_IGNORED = {"do_sample", "num_beams"}


@register_model("edgekd")
class EdgekdLM(TemplateLM):  # type: ignore[misc]
    """One model behind lm-evaluation-harness's interface; requests run one by one."""

    def __init__(
        self,
        pretrained: str,
        max_length: int | None = None,
        revision: str | None = None,
        n_threads: int | None = None,
        **ignored: Any,
    ) -> None:
        """Open the model called ``pretrained``: folder, file or hub id.

        ``max_length`` is the tokens of context. What the command passes to every model
        (batch size, device) is ignored.

        Raises:
            ModelError: it cannot be found, read or run, or names neither BOS nor EOS.
        """
        super().__init__()
        self._loaded = open_model(
            pretrained,
            context_tokens=int(max_length or DEFAULT_CONTEXT_TOKENS),
            n_threads=n_threads,
            revision=revision,
        )
        self._name = pretrained
        self._scorer = Scorer(self._loaded.engine)
        if self._loaded.tokenizer.first_id is None:
            raise ModelError(f"{pretrained} names neither BOS nor EOS, which lm_eval needs")

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        stop_ids = self._loaded.tokenizer.stop_ids
        return min(stop_ids) if stop_ids else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id that a text without context begins after."""
        first = self._loaded.tokenizer.first_id
        assert first is not None  # checked at the start
        return first

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self._loaded.engine.context_tokens

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a generated text where the task does not say."""
        return _MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-evaluation-harness caches requests."""
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of ``string``; BOS is not doubled where the text begins with it."""
        tokenizer = self._loaded.tokenizer
        if add_special_tokens is None:
            first = tokenizer.raw_token_bytes(self.prefix_token_id).decode("utf-8", "replace")
            add_special_tokens = not (first and string.startswith(first))
        return tokenizer.encode(string, add_special=add_special_tokens)

    def loglikelihood_rolling(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each whole text, in windows as its HFLM cuts them."""
        found = []
        for request in requests:
            windows = map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            found.append(sum(self._score(context, ids).log_p for context, ids in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop string or the limit."""
        found = []
        for request in requests:
            context, asked = request.args
            params = sampling_params(asked)
            room = self.max_length - params.max_tokens
            if room < 1:
                raise RecipeError(
                    f"max_gen_toks {params.max_tokens} leaves no room for a prompt in a context "
                    f"of {self.max_length} tokens; raise max_length"
                )
            self._scorer = Scorer(self._loaded.engine)  # its cache is about to be overwritten
            pieces = generate(self._loaded, self.tok_encode(context)[-room:], params)
            found.append("".join(piece.text for piece in pieces))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the source of the model's chat template."""
        template = self._loaded.chat_template
        return template.source if template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as one text.

        Raises:
            ModelError: the model has no chat template.
        """
        template = self._loaded.chat_template
        if template is None:
            raise ModelError(f"{self._name} has no chat template")
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``."""
        return decode(self._loaded.tokenizer, tokens)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found = []
        for texts, context, ids in requests:
            scored = self._score(context, ids)
            found.append((scored.log_p, scored.is_greedy))
            self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def _score(self, context: Sequence[int], ids: Sequence[int]) -> Scored:
        return self._scorer.score(context, [ids])[0]


def sampling_params(asked: dict[str, Any]) -> SamplingParams:
    """Return lm-evaluation-harness's generation settings as ours.

    Raises:
        RecipeError: one of them is not ours.
    """
    settings = dict(asked)
    until = settings.pop("until", None) or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    max_tokens = int(settings.pop("max_gen_toks", _MAX_GEN_TOKS))
    is_sampled = settings.get("do_sample", settings.get("temperature", 0) > 0)
    temperature = float(settings.pop("temperature", 1.0 if is_sampled else 0.0))
    chosen = {name: settings.pop(name) for name in ("top_k", "top_p") if name in settings}
    if unknown := settings.keys() - _IGNORED:
        raise RecipeError(
            f"generation settings {', '.join(sorted(unknown))} are not supported; "
            "allowed are until, max_gen_toks, temperature, top_k, top_p, do_sample"
        )
    return SamplingParams(
        temperature=temperature if is_sampled else 0.0,
        max_tokens=max_tokens,
        stop=tuple(stop for stop in stops if stop),
        **(chosen if is_sampled else {}),
    )


def main() -> None:
    """Run lm-evaluation-harness's command, to which ``edgekd`` is a model now."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
