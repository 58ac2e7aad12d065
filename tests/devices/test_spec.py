import re
import tomllib
from pathlib import Path

import pytest

from edgekd.devices.spec import FACTS, find_spec, list_specs, parse_spec
from edgekd.errors import DeviceError

GOOD = """
title = "A board"
kind = "board"
[match]
board = "A board"
[facts.memory_bytes]
values = [4, 8]
source = "page"
basis = "quoted"
[facts.bandwidth_bytes_per_s]
values = [17e9]
source = "page"
basis = "derived"
note = "32 bit at 4267 MT/s"
[absent]
ai_ops_per_s = "it has no accelerator"
power_w = "not published"
[sources.page]
url = "https://example.org"
date = "2026-01-01"
says = "4 or 8"
"""


def test_every_shipped_device_obeys_the_schema_and_has_sources() -> None:
    specs = list_specs()
    assert len(specs) >= 16
    for spec in specs:
        assert set(spec.facts) | set(spec.absent) == set(FACTS)
        assert {fact.source for fact in spec.facts.values()} <= set(spec.sources)
        for source in spec.sources.values():
            assert source.url.startswith("https://")
            assert re.fullmatch(r"20\d\d(-\d\d){1,2}", source.date)


def test_no_device_is_recognized_as_another() -> None:
    """A pattern as wide as "Orin" would give the first of three boards."""
    for spec in list_specs():
        for key in spec.match:
            own = {key: spec.title}
            others = [s.name for s in list_specs() if s.name != spec.name and s.matches(own)]
            assert others == []


def test_a_good_file_is_read() -> None:
    spec = parse_spec("a", GOOD)
    assert spec.value("memory_bytes") == 8
    assert spec.value("ai_ops_per_s") is None
    assert spec.matches({"board": "this is A BOARD"}) and not spec.matches({"board": None})


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('kind = "board"', 'kind = "toaster"', "allowed are board"),
        ('title = "A board"', 'titel = "A board"', "unknown key titel"),
        ("[facts.bandwidth_bytes_per_s]", "[facts.bandwidth_gb]", "unknown fact bandwidth_gb"),
        ("values = [4, 8]", "values = [8, 4]", "must grow"),
        ("values = [4, 8]", "values = [0]", "positive numbers"),
        ("values = [4, 8]", "values = [true]", "positive numbers"),
        ('source = "page"\nbasis = "quoted"', 'source = "hearsay"\nbasis = "quoted"', "hearsay"),
        ('basis = "quoted"', 'basis = "guessed"', "allowed are quoted, derived"),
        ('note = "32 bit at 4267 MT/s"', "", "does not say how"),
        ('power_w = "not published"', "", "power_w is neither given nor absent"),
        ('power_w = "not published"', 'power_w = ""', "gives no reason"),
        ("[absent]", '[absent]\nmemory_bytes = "?"', "both given and absent"),
        ('says = "4 or 8"', 'say = "4 or 8"', "unknown key say"),
        ('board = "A board"', 'board = "A ("', "no regular expression"),
        ('board = "A board"', 'bord = "A"', "match has the unknown key bord"),
        ("[absent]", "[absent", "Expected ']'"),
    ],
)
def test_a_bad_file_is_refused_and_says_why(old: str, new: str, complaint: str) -> None:
    assert old in GOOD
    with pytest.raises(DeviceError, match=re.escape(complaint)):
        parse_spec("a", GOOD.replace(old, new, 1))


def test_all_faults_are_named_together() -> None:
    text = GOOD.replace('kind = "board"', 'kind = "x"').replace("[4, 8]", "[]")
    with pytest.raises(DeviceError, match=r"kind is 'x'.*positive numbers"):
        parse_spec("a", text)


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(DeviceError, match="raspberry-pi-5"):
        find_spec("raspberry-pi-50")


def test_the_files_are_declared_as_package_data() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    declared = tomllib.loads(text)["tool"]["setuptools"]["package-data"]["edgekd.devices"]
    assert "specs/*.toml" in declared
