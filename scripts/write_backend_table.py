"""Write the tables of docs/phones.md from devices/backends.py; ``--check`` fails on a stale one."""

import sys
from pathlib import Path

from edgekd.devices.backends import BACKENDS, LABELS, Backend, install_command
from edgekd.runtime.providers import PROVIDERS

TARGET = Path(__file__).parents[1] / "docs" / "phones.md"
END = "<!-- end of table -->"


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
    text = page = TARGET.read_text("utf-8")
    for name, table in (("labels", labels_table()), ("backends", backends_table())):
        start = f"<!-- {name}: scripts/write_backend_table.py -->\n"
        before, mark, rest = page.partition(start)
        assert mark, f"{TARGET.name} has no place for the table of {name}"
        page = before + start + table + END + rest.partition(END)[2]
    if "--check" not in sys.argv:
        TARGET.write_text(page, "utf-8")
    elif text != page:
        sys.exit("docs/phones.md is stale; run: python scripts/write_backend_table.py")


if __name__ == "__main__":
    main()
