"""docs/commands.md leads from every command to a section that explains it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from edgekd.cli import app
from tests.docs.pages import ROOT, anchor_of, blocks_of, name_of

PAGE = ROOT / "docs" / "commands.md"
ROW = re.compile(r"^\| `edgekd ([\w -]+)` \| [^|]+ \| \[[^]]+\]\(([^#)]*)#([^)]+)\) \|$", re.M)
ROWS = {name: (path, anchor) for name, path, anchor in ROW.findall(PAGE.read_text("utf-8"))}


def commands_below(group: Any, *path: str) -> Iterator[str]:
    """Yield every command that can be run, by its words; a group only where it does something."""
    if path and (not hasattr(group, "commands") or group.invoke_without_command):
        yield " ".join(path)
    for name, command in getattr(group, "commands", {}).items():
        yield from commands_below(command, *path, name)


def section_of(page: Path, anchor: str) -> str:
    """Return what stands below the heading ``anchor``, to the next one."""
    parts = re.split(r"^(#+) (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    for title, text in zip(parts[2::3], parts[3::3], strict=True):
        if anchor_of(title) == anchor:
            return str(text)
    raise AssertionError(f"{page.name} has no section {anchor}")


def test_every_command_has_a_row_and_no_other() -> None:
    found = {"bench", *commands_below(typer.main.get_command(app))}  # "bench run" in full
    assert set(ROWS) == found and len(ROWS) == len(ROW.findall(PAGE.read_text("utf-8")))


@pytest.mark.parametrize("command", ROWS)
def test_a_row_leads_to_a_section_that_shows_the_command(command: str) -> None:
    path, anchor = ROWS[command]
    assert f"edgekd {command}" in section_of(PAGE.with_name(path) if path else PAGE, anchor)


def test_commands_explained_on_the_page_are_typed_there() -> None:
    typed = "".join(block.text for block in blocks_of("bash") if name_of(block.page) in str(PAGE))
    for command, (path, _) in ROWS.items():
        assert path or f"edgekd {command}" in typed
