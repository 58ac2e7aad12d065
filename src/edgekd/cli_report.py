"""Command line: the five rows.

Part of edgekd.cli; the same rules hold.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from edgekd.cli_options import Json, Quiet, Threads, need, parse_numbers
from edgekd.progress import make_progress

app = typer.Typer()

_SAVED = ".json"


@app.command()
def report(
    file: Annotated[
        Path | None,
        typer.Argument(help="Settings (.toml), or a saved report (.json) to show again."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model distilled from.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Student trained on hard labels only.")
    ] = None,
    quantized: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The baseline, quantized.")
    ] = None,
    distilled: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Student distilled from the teacher.")
    ] = None,
    int4: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The distilled student in int4.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text: perplexity, and KL to --teacher.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Reference pack, instead of a teacher and --text.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Multiple-choice questions: JSONL.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the text to use, at most.  [default: 4096]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask only so many questions.")] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("-p", "--prompt-tokens", help="Tokens of prefill.  [default: 512]"),
    ] = None,
    decode_tokens: Annotated[
        int | None,
        typer.Option("-n", "--decode-tokens", help="Tokens of decode.  [default: 128]"),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option("-d", "--depth", help="Tokens in the cache before; several: 0,1024."),
    ] = None,
    repetitions: Annotated[
        int | None,
        typer.Option("-r", "--repetitions", help="Measured repetitions.  [default: 5]"),
    ] = None,
    threads: Threads = None,
    ttft: Annotated[
        str | None,
        typer.Option(help="Further prompt lengths for time to first token, such as 32,128."),
    ] = None,
    roofline: Annotated[
        bool | None, typer.Option("--roofline/--no-roofline", help="Probe the machine's limits.")
    ] = None,
    output: Annotated[
        Literal["table", "json", "md", "html"],
        typer.Option("-o", "--output", help="html is for a browser."),
    ] = "table",
    save: Annotated[
        Path | None, typer.Option(help="Also write the JSON document here, to show again.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the five rows: teacher, student baseline, quantized, distilled, distilled + int4.

    Each on the engine that runs it, on this machine; rows without a model are left out.
    Options go over FILE, whose keys have their names: edgekd report rows.toml -o html > rows.html
    """
    need("gguf", "numpy")
    from edgekd.files import write_text_atomic
    from edgekd.runtime.bench_formats import to_json
    from edgekd.runtime.report import measure_report
    from edgekd.runtime.report_formats import read_report, render_report
    from edgekd.runtime.report_recipe import resolve_report

    given: dict[str, Any] = {
        "teacher": teacher,
        "baseline": baseline,
        "quantized": quantized,
        "distilled": distilled,
        "int4": int4,
        "text": text,
        "reference": reference,
        "questions": questions,
        "tokens": tokens,
        "limit": limit,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "depth": None if depth is None else parse_numbers(depth, "--depth"),
        "repetitions": repetitions,
        "threads": threads,
        "ttft": None if ttft is None else parse_numbers(ttft, "--ttft"),
        "roofline": roofline,
    }
    if file is not None and file.suffix == _SAVED:
        _refuse_with_saved(given)
        document = read_report(file)
    else:
        document = measure_report(resolve_report(file, given), make_progress(quiet)).as_dict()
    if save is not None:
        write_text_atomic(save, to_json(document) + "\n")
    print(json.dumps(document) if as_json else render_report(document, output))


def _refuse_with_saved(given: dict[str, Any]) -> None:
    """Refuse options that a saved report cannot follow: nothing is measured."""
    asked = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if asked:
        message = f"{', '.join(asked)} cannot be given with a saved report, which is only shown"
        raise typer.BadParameter(message, param_hint="FILE")
