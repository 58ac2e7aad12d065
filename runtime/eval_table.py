"""Quality of models as a table for people; the JSON of a result says more."""

from pathlib import PurePath

from rich.markup import escape
from rich.table import Table

from edgekd.runtime.choices import ChoiceQuality
from edgekd.runtime.estimate import Estimate
from edgekd.runtime.evaluate import Evaluation, ModelQuality
from edgekd.runtime.text_quality import Fidelities


def render_evaluation(result: Evaluation) -> Table:
    """Return the figures of ``result``, a column a model; ``±`` is the standard error."""
    table = Table(caption=f"± standard error; on text: {result.settings['standard_errors']}")
    table.add_column("")
    columns = [_figures(model) for model in result.models]
    for model in result.models:
        table.add_column(escape(f"{PurePath(model.model).name}\n{model.engine}"), justify="right")
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    return table


def _figures(model: ModelQuality) -> dict[str, str]:
    found = {}
    if model.text:
        found["perplexity"] = _shown(model.text.perplexity, 3)
        if model.text.to_teacher:
            found |= _to_teacher(model.text.to_teacher)
        found["tokens predicted"] = str(model.text.n_positions)
    if model.questions:
        found |= _answers(model.questions)
    return found


def _to_teacher(quality: Fidelities) -> dict[str, str]:
    bound = "" if quality.kl_kind == "exact" else ", at least"
    percentiles = quality.delta_p_percentiles
    return {
        "teacher's perplexity": _shown(quality.teacher_perplexity, 3),
        "perplexity / teacher's": _shown(quality.perplexity_ratio, 4),
        f"KL to teacher, nats{bound}": _shown(quality.kl_nats, 5),
        "top-1 agreement": _percent(quality.top1_agreement),
        "\u0394p mean": _percent(quality.delta_p_mean),
        "\u0394p RMS": _percent(quality.delta_p_rms),
        "\u0394p 5 / 50 / 95 %": " / ".join(
            f"{percentiles[percent].value:+.2%}" for percent in ("5", "50", "95")
        ),
    }


def _answers(quality: ChoiceQuality) -> dict[str, str]:
    return {
        "acc": _percent(quality.acc),
        "acc_norm": _percent(quality.acc_norm),
        "acc by bytes": _percent(quality.acc_bytes),
        "acc by tokens": _percent(quality.acc_tokens),
        "questions": str(quality.n_questions),
    }


def _shown(estimate: Estimate, digits: int) -> str:
    error = estimate.standard_error
    spread = "" if error is None else f" \u00b1 {error:.{digits}f}"
    return f"{estimate.value:.{digits}f}{spread}"


def _percent(estimate: Estimate) -> str:
    error = estimate.standard_error
    spread = "" if error is None else f" \u00b1 {error:.2%}"
    return f"{estimate.value:.2%}{spread}"
