"""Write the table of docs/devices.md from devices/specs; with ``--check`` fail if it is stale."""

from pathlib import Path

from generated import put, write_or_check

from edgekd.devices.spec import Spec, list_specs

TARGET = Path(__file__).parents[1] / "docs" / "devices.md"


def cell(spec: Spec, key: str, scale: float) -> str:
    """Return the values of one fact in its unit; a derived one is marked."""
    if key not in spec.facts:
        return "–"
    fact = spec.facts[key]
    mark = " †" if fact.basis == "derived" else ""
    return " / ".join(f"{value / scale:g}" for value in fact.values) + mark


def render() -> str:
    """Return the table."""
    rows = [
        f"| `{spec.name}` | {spec.title} | {cell(spec, 'memory_bytes', 2**30)} "
        f"| {cell(spec, 'bandwidth_bytes_per_s', 1e9)} | {cell(spec, 'ai_ops_per_s', 1e12)} "
        f"| {cell(spec, 'power_w', 1)} |"
        for spec in list_specs()
    ]
    head = "| name | device | memory GiB | bandwidth GB/s | AI TOPS | power W |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows]) + "\n"


def main() -> None:
    """Put the table between its marks."""
    write_or_check(TARGET, put(TARGET.read_text("utf-8"), "table", render()))


if __name__ == "__main__":
    main()
