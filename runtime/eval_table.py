"""Quality of models as a table for people; the JSON of a result says more."""

from pathlib import PurePath

from rich.markup import escape
from rich.table import Table

from edgekd.runtime.choices import ChoiceQuality
from edgekd.runtime.estimated import percent_text, value_text
from edgekd.runtime.evaluate import Evaluation, ModelQuality
from edgekd.runtime.providers import label_of_engine
from edgekd.runtime.text_quality import Fidelities


def render_evaluation(result: Evaluation) -> Table:
    """Return the figures of ``result``, a column a model; ``±`` is the standard error."""
    table = Table(caption=f"± standard error; on text: {result.settings['standard_errors']}")
    table.add_column("")
    columns = [_figures(model) for model in result.models]
    for model in result.models:
        head = PurePath(model.model).name, model.engine, label_of_engine(model.engine)
        table.add_column(escape("\n".join(head)), justify="right")
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    return table


def _figures(model: ModelQuality) -> dict[str, str]:
    found = {}
    if model.text:
        found["perplexity"] = value_text(model.text.perplexity, 3)
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
        "teacher's perplexity": value_text(quality.teacher_perplexity, 3),
        "perplexity / teacher's": value_text(quality.perplexity_ratio, 4),
        f"KL to teacher, nats{bound}": value_text(quality.kl_nats, 5),
        "top-1 agreement": percent_text(quality.top1_agreement),
        "\u0394p mean": percent_text(quality.delta_p_mean),
        "\u0394p RMS": percent_text(quality.delta_p_rms),
        "\u0394p 5 / 50 / 95 %": " / ".join(
            f"{percentiles[percent].value:+.2%}" for percent in ("5", "50", "95")
        ),
    }


def _answers(quality: ChoiceQuality) -> dict[str, str]:
    return {
        "acc": percent_text(quality.acc),
        "acc_norm": percent_text(quality.acc_norm),
        "acc by bytes": percent_text(quality.acc_bytes),
        "acc by tokens": percent_text(quality.acc_tokens),
        "questions": str(quality.n_questions),
    }
