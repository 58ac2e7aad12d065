"""The commands of ``edgekd devices``: what machines are, what this one is, what fits on one."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd.cli_options import Json, Model, Quiet, Revision, parse_bytes, print_result

if TYPE_CHECKING:
    from edgekd.devices.fit import FitReport, Option, Range, Target
    from edgekd.devices.measured import OwnRun
    from edgekd.devices.reading import Reading
    from edgekd.devices.sensors import Sensors
    from edgekd.devices.spec import Spec
    from edgekd.devices.workload import Workload

app = typer.Typer(no_args_is_help=True, help="What machines are, and what fits on them.")
_THIS = "this"
_ONLY_PHONE = "usb"


@app.command("list")
def list_devices(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the devices whose published facts are known."""
    from edgekd.devices.spec import list_specs

    specs = list_specs()
    lines = [f"{spec.name:26} {_facts_line(spec):34} {spec.title}" for spec in specs]
    print_result([_as_document(spec) for spec in specs], as_json, "\n".join(lines))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name out of 'edgekd devices list'.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is published about a device, and where."""
    from edgekd.devices.measured import groups_of
    from edgekd.devices.spec import find_spec

    spec, groups = find_spec(name), groups_of(name)
    lines = [spec.title, *_fact_lines(spec)]
    lines += [f"  {key}: unknown, {reason}" for key, reason in spec.absent.items()]
    for group in groups:
        lines.append(f"  measured with {group.backend} {group.power_mode}".rstrip())
        for model, point in zip(group.models, group.points, strict=True):
            lines.append(f"    {model} {point.format}: {1 / point.seconds:.1f} tokens/s")
        lines.append(f"    source: {group.source}")
    document = _as_document(spec) | {"measured": [asdict(group) for group in groups]}
    print_result(document, as_json, "\n".join(lines))


@app.command()
def detect(
    adb: Annotated[
        str | None,
        typer.Option(help="Describe the phone with this adb serial; 'usb' for the only one."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Describe this machine, or a phone, and read its sensors."""
    from edgekd.devices.android import over_adb
    from edgekd.devices.detect import detect as detect_machine
    from edgekd.devices.detect import detect_phone
    from edgekd.devices.host import Host, run_command
    from edgekd.devices.sensors import read_phone_sensors, read_sensors

    if adb is None:
        machine, sensors = detect_machine(), read_sensors(Host.at())
    else:
        run = over_adb(run_command, None if adb == _ONLY_PHONE else adb)
        _need_phone(run(("getprop",)).output, adb)
        machine, sensors = detect_phone(run), read_phone_sensors(run)
    facts = machine.as_dict()
    lines = [f"{key}: {value}" for key, value in facts.items()]
    lines += _sensor_lines(sensors)
    print_result(facts | {"sensors": sensors.as_dict()}, as_json, "\n".join(lines))


@app.command()
def fit(
    model: Model,
    on: Annotated[
        str, typer.Option("--on", help="A name out of 'edgekd devices list', or 'this' machine.")
    ] = _THIS,
    quant: Annotated[
        str | None, typer.Option(help="Store its weights so: q4_0 (int4), q4_k_m, q8_0, f16 ...")
    ] = None,
    ctx: Annotated[int, typer.Option(min=1, help="Tokens of context.")] = 2048,
    tokens_per_s: Annotated[
        float | None, typer.Option("--tokens-per-s", help="Wanted decode speed.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What it may take, such as 2GB; default: what there is.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="Output of 'edgekd bench ... --json' on that device, to predict from."),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say whether MODEL fits a device, how fast it will be, and what would meet a wish."""
    from edgekd.devices.fit import Wish
    from edgekd.devices.fit import fit as fit_model
    from edgekd.runtime.model_workload import read_workload

    if tokens_per_s is not None and not tokens_per_s > 0:
        raise typer.BadParameter(f"{tokens_per_s} is no speed", param_hint="--tokens-per-s")
    workload = read_workload(model, quant, revision)
    own = _own_runs(measured) if measured else []
    memory_bytes = None if memory is None else parse_bytes(memory)
    wish = Wish(context_tokens=ctx, tokens_per_s=tokens_per_s, memory_bytes=memory_bytes)
    report = fit_model(workload, _target(on, needs_probe=not own), wish, own)
    print_result(report.as_dict(), as_json, "\n".join(_fit_lines(report)))


def _target(name: str, needs_probe: bool) -> "Target":
    from edgekd.devices.fit import target_of
    from edgekd.devices.measured import groups_of
    from edgekd.devices.spec import find_spec
    from edgekd.devices.this_machine import this_machine

    if name == _THIS:
        return this_machine(needs_probe)
    return target_of(find_spec(name), groups_of(name))


def _own_runs(measured: Path) -> "list[tuple[OwnRun, Workload]]":
    from edgekd.devices.measured import read_bench
    from edgekd.runtime.model_workload import read_workload

    return [(run, read_workload(run.model)) for run in read_bench(measured)]


def _need_phone(properties: str, adb: str) -> None:
    from edgekd.errors import DeviceError

    if not properties:
        raise DeviceError(
            f"no phone answers as {adb!r}; install adb, allow debugging on the phone, and look "
            "at 'adb devices'"
        )


def _as_document(spec: "Spec") -> dict[str, Any]:
    return asdict(spec)


def _facts_line(spec: "Spec") -> str:
    from edgekd.units import format_bytes

    bandwidth = spec.value("bandwidth_bytes_per_s")
    sizes = spec.facts["memory_bytes"].values if "memory_bytes" in spec.facts else ()
    memory = "/".join(f"{size / 2**30:g}" for size in sizes)
    speed = f"{format_bytes(bandwidth)}/s" if bandwidth else "bandwidth unknown"
    return f"{f'{memory} GiB' if memory else 'memory unknown'}, {speed}"


def _fact_lines(spec: "Spec") -> list[str]:
    lines = []
    for key, fact in spec.facts.items():
        values = ", ".join(f"{value:,.0f}" for value in fact.values)
        note = f"; {fact.note}" if fact.note else ""
        source = spec.sources[fact.source]
        lines.append(f"  {key}: {values} ({fact.basis}{note})")
        lines.append(f"    {source.url} ({source.date}): {source.says}")
    return lines


def _sensor_lines(sensors: "Sensors") -> list[str]:
    named = {"power": sensors.power}
    for kind in ("rails", "temperatures", "throttling"):
        named |= {f"{kind}, {name}": value for name, value in getattr(sensors, kind).items()}
    return [f"{name}: {_reading_text(reading)}" for name, reading in named.items()]


def _reading_text(reading: "Reading") -> str:
    if reading.value is None:
        return f"unavailable, {reading.reason}"
    text = f"{reading.value:g} {reading.unit}"
    return f"{text} (estimated: {reading.reason})" if reading.status == "estimated" else text


def _fit_lines(report: "FitReport") -> list[str]:
    from edgekd.units import format_bytes

    room = "unknown" if report.available_bytes is None else format_bytes(report.available_bytes)
    verdict = {True: "fits", False: "does not fit", None: "cannot be told"}[report.fits]
    lines = [
        f"{report.model} ({report.format}) on {report.device}: {verdict}",
        f"  needs {format_bytes(report.needed_bytes)}: weights "
        f"{format_bytes(report.weights_bytes)}, KV cache of {report.context_tokens} tokens "
        f"{format_bytes(report.kv_cache_bytes)}, engine about "
        f"{format_bytes(report.overhead_bytes)}",
        f"  room {room}: {report.available_note}",
    ]
    for one in report.predictions:
        where = f"{one.backend} {one.power_mode}".strip()
        lines.append(f"  {where}, from {one.basis} ({one.n_points} points): {one.source}")
        lines += [
            f"    {name}: {_range_text(value)}"
            for name, value in (
                ("decode", one.decode),
                ("prefill", one.prefill),
                ("load", one.load),
            )
        ]
    lines += [
        f"  {'meets' if one.meets else 'fails'}: {_option_text(one)}" for one in report.options
    ]
    if report.largest_student:
        lines.append(f"  largest student that meets it: {_option_text(report.largest_student)}")
    elif report.options:
        lines.append("  no student with this model's embedding and head meets it")
    return lines


def _range_text(value: "Range") -> str:
    if value.value is None:
        return f"unknown, {value.reason}"
    return f"{value.value:.3g} {value.unit} ({value.low:.3g} to {value.high:.3g})"


def _option_text(option: "Option") -> str:
    from edgekd.units import format_bytes, format_count

    speed = option.decode_tokens_per_s
    rate = "speed unknown" if speed is None else f"{speed:.3g} tokens/s"
    size = f"{format_count(option.n_weights)} weights, {format_bytes(option.memory_bytes)}"
    return f"{option.quant}, {size}, {rate}"
