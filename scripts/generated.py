"""Pages of the documentation that scripts write, whole or between marks."""

import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPT = Path(sys.argv[0]).name
Rows = Sequence[tuple[str, ...]]


def put(page: str, name: str, made: str) -> str:
    """Return ``page`` with ``made`` between the marks of ``name``, which name this script too."""
    start, end = f"<!-- {name}: scripts/{SCRIPT} -->\n\n", f"\n<!-- end of {name} -->"
    before, mark, rest = page.partition(start)
    if not mark or end not in rest:
        sys.exit(f"the page needs the marks {start.strip()} and {end.strip()}, a blank line inside")
    return before + start + made + end + rest.partition(end)[2]


def write_or_check(target: Path, page: str) -> None:
    """Write ``page``; with ``--check`` on the command line fail if ``target`` is another one."""
    if "--check" not in sys.argv:
        target.write_text(page, "utf-8")
    elif not target.is_file() or target.read_text("utf-8") != page:
        sys.exit(f"{target.name} is stale; run: python scripts/{SCRIPT}")


def table(head: tuple[str, ...], rows: Rows) -> str:
    """Return ``rows`` in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
