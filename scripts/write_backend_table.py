"""Write the tables of docs/phones.md from devices/backends.py; ``--check`` fails on a stale one."""

from pathlib import Path

from generated import put, write_or_check

from edgekd.devices.backends import BACKENDS, LABELS, Backend, install_command
from edgekd.runtime.providers import PROVIDERS

TARGET = Path(__file__).parents[1] / "docs" / "phones.md"


def labels_table() -> str:
    """Return what each label means."""
    rows = [f"| `{label}` | {meaning} |" for label, meaning in LABELS.items()]
    return "\n".join(["| label | means |", "|---|---|", *rows]) + "\n"


def backends_table() -> str:
    """Return every backend with its label and the reason for it."""
    rows = [backend_row(name, backend) for name, backend in BACKENDS.items()]
    head = ["| backend | `--ep` | install | label | why |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def backend_row(name: str, backend: Backend) -> str:
    """Return one row; only providers of ONNX Runtime can be asked for by ``--ep``."""
    flag = f"`{name}`" if name in PROVIDERS else ""
    command, comma, note = install_command(backend).partition(",")
    cells = (backend.title, flag, f"`{command}`{comma}{note}", f"`{backend.label}`")
    return f"| {' | '.join(cells)} | {backend.evidence} |"


def main() -> None:
    """Put each table between its marks."""
    page = put(TARGET.read_text("utf-8"), "labels", labels_table())
    write_or_check(TARGET, put(page, "backends", backends_table()))


if __name__ == "__main__":
    main()
