"""The commands ``edgekd bench MODEL...`` and ``edgekd bench compare BASE NEW``."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from edgekd.cli_options import Json, Provider, Quiet, RequireNpu, Threads, parse_numbers
from edgekd.errors import EdgekdError
from edgekd.progress import make_progress
from edgekd.runtime.bench_remote_address import AdbAddress, SshAddress, parse_address

if TYPE_CHECKING:
    from edgekd.runtime.bench_quality import QualitySettings

_USAGE = 2
_DEFAULT = "run"


class _MeasuresByDefault(TyperGroup):
    """A group whose first argument is a model unless it names a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the command that was left out."""
        if args and args[0] not in self.commands:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_MeasuresByDefault,
    no_args_is_help=True,
    help="Measure MODEL..., or compare two measurements.",
    subcommand_metavar="MODEL... | compare BASE NEW",
)


@app.command(_DEFAULT)
def run(
    models: Annotated[list[str], typer.Argument(help="Models to measure, each in a process.")],
    prompt_tokens: Annotated[int, typer.Option("-p", help="Tokens of prefill.")] = 512,
    decode_tokens: Annotated[int, typer.Option("-n", help="Tokens of decode.")] = 128,
    depth: Annotated[
        str, typer.Option("-d", help="Tokens in the cache before; several: 0,1024.")
    ] = "0",
    repetitions: Annotated[int, typer.Option("-r", help="Measured repetitions.")] = 5,
    threads: Threads = None,
    output: Annotated[
        Literal["table", "json", "jsonl", "csv", "md", "html"],
        typer.Option("-o", "--output", help="jsonl is llama-bench's; html for a browser."),
    ] = "table",
    ttft: Annotated[
        str | None,
        typer.Option(help="Further prompt lengths for time to first token, such as 32,128."),
    ] = None,
    soak: Annotated[
        float, typer.Option(help="Minutes to decode at most until speed and heat are steady.")
    ] = 0.0,
    cold: Annotated[
        bool, typer.Option(help="Also load once with the file out of the page cache.")
    ] = True,
    roofline: Annotated[
        bool, typer.Option(help="Probe bandwidth and multiplications first.")
    ] = True,
    teacher: Annotated[
        str | None, typer.Option(help="Also measure quality: model to compare with, over --text.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The same with a reference pack, instead of a teacher.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text; without a teacher: perplexity alone.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use, at most.")] = 4096,
    ep: Provider = "cpu",
    require_npu: RequireNpu = False,
    save: Annotated[
        Path | None, typer.Option(help="Also write the JSON document here, for compare.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Another machine: ssh://user@host[:port], or adb://SERIAL."),
    ] = None,
    remote_edgekd: Annotated[
        str | None, typer.Option(help="Where edgekd lies on the ssh machine, if not found.")
    ] = None,
    remote_binary: Annotated[
        Path | None, typer.Option(help="Over adb: your llama-bench that is built for the phone.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed, latency, memory and energy of MODELS on this machine, or on --device.

    With --teacher, --reference or --text also their quality, on the very files that run.
    Several models take turns. Two measurements are compared by: edgekd bench compare BASE NEW
    """
    from edgekd.runtime.bench_formats import render
    from edgekd.runtime.bench_settings import BenchSettings

    settings = BenchSettings(
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        depths=parse_numbers(depth, "-d"),
        ttft_tokens=_ttft_lengths(ttft, prompt_tokens),
        repetitions=repetitions,
        n_threads=threads,
        cold_start=cold,
        roofline=roofline,
        soak_minutes=soak,
        provider=ep,
        require_npu=require_npu,
    )
    quality = _quality(teacher, reference, text, tokens)
    address = _address(device, remote_edgekd, remote_binary, output)
    if quality is not None and address is not None:
        _check_quality_there(quality, address)
    progress = make_progress(quiet)
    if isinstance(address, AdbAddress):
        from edgekd.runtime.bench_remote_adb import run_bench_over_adb
        from edgekd.runtime.bench_remote_formats import render_phone

        assert remote_binary is not None
        measured = run_bench_over_adb(models, settings, address, progress, binary=remote_binary)
        _give(measured, save, as_json, lambda: render_phone(measured, output))
    elif address is not None:
        from edgekd.runtime.bench_remote import run_bench_over_ssh

        document = run_bench_over_ssh(
            models,
            settings,
            address,
            progress,
            remote_edgekd=remote_edgekd,
            reference=reference,
        )
        progress.say(f"measured on {address}")
        _give(document, save, as_json, lambda: render(document, output))
    else:
        from edgekd.runtime.bench import run_bench

        local = run_bench(models, settings, progress, quality=quality).as_dict()
        _give(local, save, as_json, lambda: render(local, output))


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="FILE or FILE#MODEL: edgekd's or llama-bench's.")],
    new: Annotated[str, typer.Argument(help="The same for the candidate.")],
    max_regress: Annotated[str, typer.Option(help="Slowdown that is still within limits.")] = "5%",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare NEW with BASE: exit 0 within limits, 1 regression, 2 usage, 3 inconclusive.

    MODEL is a name, a path or a number from 0. Two models of one run, which took turns, are
    compared pair by pair: edgekd bench compare run.json#0 run.json#1

    Quality is compared where both sides have it, and what got worse is named. The exit code is
    about speed alone.
    """
    from edgekd.runtime.bench_compare import compare as compare_files
    from edgekd.runtime.bench_compare_text import short_verdict, to_text

    limit = _percent(max_regress)
    try:
        comparison = compare_files(base, new, limit)
    except EdgekdError as error:
        print(f"edgekd: {error}", file=sys.stderr)
        raise typer.Exit(_USAGE) from error
    if as_json:
        print(json.dumps(comparison.as_dict()))
    else:
        print(short_verdict(comparison) if quiet else to_text(comparison))
    raise typer.Exit(comparison.exit_code)


def _address(
    device: str | None, remote_edgekd: str | None, remote_binary: Path | None, output: str
) -> SshAddress | AdbAddress | None:
    """Return where to measure, after a look at the options that go with it."""
    address = None if device is None else parse_address(device)
    is_adb = isinstance(address, AdbAddress)
    if is_adb and remote_binary is None:
        raise typer.BadParameter(
            "adb needs a llama-bench that is built for the phone", param_hint="--remote-binary"
        )
    if is_adb and output == "html":
        raise typer.BadParameter("a phone's rows have no html; take md", param_hint="-o")
    if remote_binary is not None and not is_adb:
        raise typer.BadParameter("goes with --device adb://SERIAL", param_hint="--remote-binary")
    if remote_edgekd is not None and not isinstance(address, SshAddress):
        raise typer.BadParameter("goes with --device ssh://host", param_hint="--remote-edgekd")
    return address


def _quality(
    teacher: str | None, reference: Path | None, text: Path | None, tokens: int
) -> "QualitySettings | None":
    """Return what to measure of quality; None where nothing was asked."""
    if teacher is None and reference is None and text is None:
        return None
    from edgekd.runtime.bench_quality import QualitySettings

    return QualitySettings(teacher=teacher, reference=reference, text=text, n_tokens=tokens)


def _check_quality_there(quality: "QualitySettings", address: SshAddress | AdbAddress) -> None:
    """Refuse what another machine cannot be asked."""
    if isinstance(address, AdbAddress):
        message = "quality is not measured over adb, where llama-bench runs; use edgekd eval here"
        raise typer.BadParameter(message, param_hint="--reference, --teacher, --text")
    if quality.reference is None:
        message = (
            "no teacher runs there; make a pack here: edgekd eval --teacher T --text F "
            "--write-reference P, then bench with --reference P"
        )
        raise typer.BadParameter(message, param_hint="--teacher, --text")


def _give(
    document: dict[str, Any], save: Path | None, as_json: bool, text: Callable[[], str]
) -> None:
    """Write the document where it is wanted, and print it or its ``text``."""
    from edgekd.files import write_text_atomic

    if save is not None:
        write_text_atomic(save, json.dumps(document, indent=2) + "\n")
    print(json.dumps(document) if as_json else text())


def _ttft_lengths(text: str | None, prompt_tokens: int) -> tuple[int, ...]:
    """Return the lengths asked for, or two short ones below the prompt's."""
    if text is not None:
        return parse_numbers(text, "--ttft") if text else ()
    return tuple(length for length in (32, 128) if length < prompt_tokens)


def _percent(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not text.endswith("%") or not 0 <= share < 1:
        raise typer.BadParameter(f"{text!r} is no share such as 5%", param_hint="--max-regress")
    return share
