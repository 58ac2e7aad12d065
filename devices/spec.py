"""What is published about a device: one TOML file each, every fact with its source.

A fact that nobody publishes is absent and says why; it is never guessed. Names carry units: a
file with an unknown name is refused, so a misspelt unit cannot slip in.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, get_args

from edgekd.errors import DeviceError

Kind = Literal["board", "phone", "laptop", "computer"]
Basis = Literal["quoted", "derived"]

# Facts and what they mean, for the files, the table and docs/devices.md.
FACTS = {
    "memory_bytes": "sizes of memory it is sold with",
    "bandwidth_bytes_per_s": "peak of the memory interface",
    "ai_ops_per_s": "the vendor's figure for AI arithmetic; its precision is in the note",
    "power_w": "least and most of the configurable power",
}
# What a machine is recognized by: regular expressions over what detect() finds.
_MATCH_KEYS = ("board", "soc_model", "processor")
_NEEDED_KEYS = {"title", "kind", "facts", "sources"}
_TOP_KEYS = _NEEDED_KEYS | {"match", "absent"}
_SOURCE_KEYS = {"url", "date", "says"}
_FACT_KEYS = {"values", "source", "basis", "note"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where something is written."""

    url: str
    date: str
    """Of the page where it has one, else the day it was read."""
    says: str


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One published property; several values are choices, or for power the least and the most."""

    values: tuple[float, ...]
    source: str
    basis: Basis
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All that is known about one device."""

    name: str
    title: str
    kind: Kind
    facts: Mapping[str, Fact]
    absent: Mapping[str, str]
    """Fact to the reason why it is not known."""
    sources: Mapping[str, Source]
    match: Mapping[str, str]

    def value(self, fact: str) -> float | None:
        """Return the largest value of ``fact``; None where it is not known."""
        return max(self.facts[fact].values) if fact in self.facts else None

    def matches(self, found: Mapping[str, str | None]) -> bool:
        """Return whether what was found on a machine says that it is this device."""
        return any(
            re.search(pattern, found.get(key) or "", re.IGNORECASE)
            for key, pattern in self.match.items()
        )


def list_specs() -> list[Spec]:
    """Return every device that edgekd knows, by name."""
    return [_read(name) for name in spec_names()]


def spec_names() -> list[str]:
    """Return the names of the devices that edgekd knows."""
    entries = (files("edgekd.devices") / "specs").iterdir()
    return sorted(entry.name[:-5] for entry in entries if entry.name.endswith(".toml"))


def find_spec(name: str) -> Spec:
    """Return the device called ``name``.

    Raises:
        DeviceError: there is none.
    """
    if name not in (known := spec_names()):
        raise DeviceError(f"no device is called {name!r}; known are {', '.join(known)}")
    return _read(name)


def parse_spec(name: str, text: str) -> Spec:
    """Return the device that the TOML ``text`` describes.

    Raises:
        DeviceError: the text breaks the schema; every fault is named.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DeviceError(f"{name}: {error}") from error
    if faults := _faults(document):
        raise DeviceError(f"{name}: {'; '.join(faults)}")
    facts = {
        key: Fact(**{**fact, "values": tuple(map(float, fact["values"]))})
        for key, fact in document["facts"].items()
    }
    return Spec(
        name=name,
        title=document["title"],
        kind=document["kind"],
        facts=facts,
        absent=document.get("absent", {}),
        sources={key: Source(**source) for key, source in document["sources"].items()},
        match=document.get("match", {}),
    )


def _read(name: str) -> Spec:
    file = files("edgekd.devices") / "specs" / f"{name}.toml"
    return parse_spec(name, file.read_text("utf-8"))


def _faults(document: dict[str, Any]) -> list[str]:
    """Return all that is wrong with ``document``, so that it can be mended in one go."""
    faults = _key_faults("the file", document, _TOP_KEYS, _NEEDED_KEYS)
    if faults:
        return faults
    if document["kind"] not in get_args(Kind):
        faults.append(f"kind is {document['kind']!r}; allowed are {', '.join(get_args(Kind))}")
    faults += _match_faults(document.get("match", {}))
    for key, source in document["sources"].items():
        faults += _key_faults(f"source {key}", source, _SOURCE_KEYS, _SOURCE_KEYS)
    for key, fact in document["facts"].items():
        faults += _fact_faults(key, fact, document["sources"])
    return faults + _coverage_faults(document)


def _key_faults(where: str, table: Any, allowed: set[str], needed: set[str]) -> list[str]:
    if not isinstance(table, dict):
        return [f"{where} is no table"]
    unknown, missing = sorted(set(table) - allowed), sorted(needed - set(table))
    faults = [f"{where} has the unknown key {key}" for key in unknown]
    return faults + [f"{where} lacks {key}" for key in missing]


def _match_faults(match: dict[str, Any]) -> list[str]:
    faults = [f"match has the unknown key {key}" for key in sorted(set(match) - set(_MATCH_KEYS))]
    for key, pattern in match.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            faults.append(f"match.{key} is no regular expression: {error}")
    return faults


def _fact_faults(key: str, fact: Any, sources: dict[str, Any]) -> list[str]:
    if faults := _key_faults(f"fact {key}", fact, _FACT_KEYS, {"values", "source", "basis"}):
        return faults
    values = fact["values"]
    if not isinstance(values, list) or not values or not all(_is_positive(v) for v in values):
        faults.append(f"fact {key} needs a list of positive numbers")
    elif list(values) != sorted(set(values)):
        faults.append(f"the values of fact {key} must grow")
    if fact["source"] not in sources:
        faults.append(f"fact {key} names the unknown source {fact['source']!r}")
    if fact["basis"] not in get_args(Basis):
        faults.append(f"fact {key} is {fact['basis']!r}; allowed are {', '.join(get_args(Basis))}")
    if fact["basis"] == "derived" and not fact.get("note"):
        faults.append(f"fact {key} is derived but its note does not say how")
    return faults


def _coverage_faults(document: dict[str, Any]) -> list[str]:
    """Every fact is given or its absence explained; nothing else is."""
    given, absent = set(document["facts"]), document.get("absent", {})
    faults = [f"unknown fact {key}" for key in sorted((given | set(absent)) - set(FACTS))]
    faults += [f"{key} is both given and absent" for key in sorted(given & set(absent))]
    left = sorted(set(FACTS) - given - set(absent))
    faults += [f"{key} is neither given nor absent with a reason" for key in left]
    return faults + [f"absent.{key} gives no reason" for key, why in absent.items() if not why]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
