"""The verbs of ``edgekd --help`` by where they are run; only this file knows the groups."""

from typing import Any

from typer.core import TyperGroup

PLACES = {
    "On the workstation, with torch": (
        "demo",
        "prune",
        "cache",
        "answer",
        "distill",
        "export",
        "package",
    ),
    "On the target, where the model runs": ("serve", "chat", "bench"),
    "On both": ("eval", "report", "verify", "devices", "doctor"),
}
"""Each verb once, in the order of the street from teacher to device."""

_MAX_CHARS = 160  # of a verb's line, before it is wrapped


class ByPlace(TyperGroup):
    """A group whose help lists its commands by place."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the places; a verb that has none comes last."""
        return [name for names in self._by_place().values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each place."""
        width = max(map(len, self.commands))
        for place, names in self._by_place().items():
            rows = [
                (name.ljust(width), self.commands[name].get_short_help_str(_MAX_CHARS))
                for name in names
            ]
            with formatter.section(place):
                formatter.write_dl(rows)

    def _by_place(self) -> dict[str, list[str]]:
        """Return the commands that there are, place by place."""
        placed = {name for names in PLACES.values() for name in names}
        others = tuple(name for name in self.commands if name not in placed)
        found = {
            place: [name for name in names if name in self.commands]
            for place, names in (PLACES | {"Others": others}).items()
        }
        return {place: names for place, names in found.items() if names}
