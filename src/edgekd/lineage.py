"""Walk the chain from an artifact back to its teacher, by the hashes in their manifests.

A manifest knows its sources by name and by the hash of their weights, not by path: results move.
A source is looked for by name beside what was made from it; the hash says whether it is the one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgekd.errors import VerificationError
from edgekd.files import sha256_of_all
from edgekd.manifest import check_files, manifest_path, read_manifest
from edgekd.untrusted import is_plain_name

State = Literal["unchanged", "changed", "not here"]
_MOST_LINKS = 64  # a manifest is untrusted: it could name itself


@dataclass
class Link:
    """One model of the chain."""

    role: str
    name: str
    weights_sha256: str | None
    state: State
    path: str | None = None
    licence: str | None = None
    sources: list["Link"] = field(default_factory=list)

    def changed(self) -> list["Link"]:
        """Return this link and those behind it that are not what was recorded."""
        behind = [link for source in self.sources for link in source.changed()]
        return [self, *behind] if self.state == "changed" else behind


def walk(result: Path, look_in: Sequence[Path] = ()) -> Link:
    """Return ``result`` (an artifact or a checkpoint) with all that it was made from.

    Sources are looked for beside ``result`` and in the folders ``look_in``.

    Raises:
        VerificationError: ``result`` has no manifest, or one that is not ours.
    """
    manifest = read_manifest(manifest_path(result))
    folder = result if result.is_dir() else result.parent
    try:
        check_files(folder, manifest)
        state: State = "unchanged"
    except VerificationError:
        state = "changed"
    link = Link(manifest["kind"], result.name, None, state, str(result), manifest.get("licence"))
    places = [result.absolute().parent, *look_in]
    link.sources = _sources(manifest, places, [_MOST_LINKS])
    return link


def render(link: Link, depth: int = 0) -> str:
    """Return the chain as lines, every source below what was made from it."""
    digest = f"  {link.weights_sha256[:12]}" if link.weights_sha256 else ""
    licence = f"  {link.licence}" if link.licence else ""
    line = f"{'  ' * depth}{link.role}: {link.name}{digest}  {link.state}{licence}"
    return "\n".join([line, *(render(source, depth + 1) for source in link.sources)])


def _sources(manifest: dict[str, Any], places: Sequence[Path], left: list[int]) -> list[Link]:
    found = []
    for entry in manifest.get("made_from", []):
        left[0] -= 1
        if left[0] < 0:
            raise VerificationError(
                f"the manifests name more than {_MOST_LINKS} sources; is one made from itself?"
            )
        found.append(_source(entry, places, left))
    return found


def _source(entry: dict[str, Any], places: Sequence[Path], left: list[int]) -> Link:
    name, expected = str(entry.get("name")), entry.get("weights_sha256")
    link = Link(str(entry.get("role")), name, expected, "not here")
    if not is_plain_name(name):
        return link  # no name of ours: it would lead out of the folder
    for folder in (place / name for place in places):
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            continue
        link.path = str(folder)
        link.state = "unchanged" if sha256_of_all(weights) == expected else "changed"
        if link.state == "unchanged":
            break
    if link.state == "unchanged" and manifest_path(Path(str(link.path))).is_file():
        manifest = read_manifest(manifest_path(Path(str(link.path))))
        link.licence = manifest.get("licence")
        link.sources = _sources(manifest, places, left)
    return link
