"""Command line: how good models are.

Part of edgekd.cli; the same rules hold.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli_options import (
    Context,
    Json,
    Provider,
    Quiet,
    RequireNpu,
    Revision,
    Threads,
    need,
)
from edgekd.progress import make_progress

app = typer.Typer()


@app.command(name="eval")
def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(help="HF folders, hub ids, .gguf files, ONNX folders.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Model to compare with, over --text.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Reference pack to compare with, instead of a teacher.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text, a UTF-8 file.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use, at most.")] = 4096,
    window: Annotated[int, typer.Option(help="Tokens in one window of it.")] = 256,
    questions: Annotated[
        Path | None, typer.Option(help="Multiple-choice questions: JSONL.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask only so many of them.")] = None,
    shots: Annotated[int, typer.Option(help="Answered questions in front of each.")] = 0,
    shots_from: Annotated[
        Path | None, typer.Option(help="Where to draw them from, else the head of --questions.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
    write_reference: Annotated[
        Path | None, typer.Option(help="Write the teacher's likeliest tokens as a pack.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Tokens a position in that pack.")] = 64,
    ctx: Context = 2048,
    threads: Threads = None,
    ep: Provider = "cpu",
    require_npu: RequireNpu = False,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the quality of MODELS: perplexity, distance to a teacher, right answers.

    Every figure is of the file that runs, and comes with a standard error.
    """
    need("gguf", "numpy")
    from rich.console import Console

    from edgekd.runtime.eval_table import render_evaluation
    from edgekd.runtime.evaluate import EvalOptions
    from edgekd.runtime.evaluate import evaluate as run_evaluation

    options = EvalOptions(
        teacher=teacher,
        reference=reference,
        text=text,
        n_tokens=tokens,
        window_tokens=window,
        questions=questions,
        n_questions=limit,
        shots=shots,
        shots_from=shots_from,
        seed=seed,
        write_reference=write_reference,
        top_k=top_k,
        context_tokens=ctx,
        n_threads=threads,
        provider=ep,
        require_npu=require_npu,
        revision=revision,
    )
    result = run_evaluation(models or [], options, make_progress(quiet))
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    if result.models:
        Console().print(render_evaluation(result))
    if result.wrote:
        print(f"{result.wrote}: reference pack of {teacher}")
