"""Scales and pictures, read back as XML: what stands where, and what odd input makes of it."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgekd.runtime.charts import Bar, Point, Series, bar_chart, line_chart, scatter_chart
from edgekd.runtime.histograms import choose_scale, count_bins, histogram_chart
from edgekd.runtime.marks import N_SERIES, WIDTH, dash, mark, px, shorten
from edgekd.runtime.scales import make_log_scale, make_scale, show_number
from edgekd.runtime.trade_offs import frontier

TAGS = {"svg", "title", "desc", "text", "line", "rect", "path", "g"}
HOSTILE = """<script>alert("x")</script> & 'y'"""
ANY_NUMBERS = st.lists(st.floats(), max_size=8)
PLAIN_NUMBERS = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=8)
POSITIVE_NUMBERS = st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=8)


def drawn(picture: str) -> ElementTree.Element:
    """Parse a picture; its coordinates must all be numbers."""
    root = ElementTree.fromstring(picture)
    for one in root.iter():
        for name in {"x", "y", "x1", "x2", "y1", "y2", "width", "height"} & one.attrib.keys():
            assert math.isfinite(float(one.attrib[name])), one.attrib
    assert "nan" not in picture and "inf" not in picture
    return root


def by_class(root: ElementTree.Element, css: str) -> list[ElementTree.Element]:
    return [one for one in root.iter() if css in one.get("class", "").split()]


def place_of(shape: ElementTree.Element) -> tuple[float, float]:
    """Return about where a mark stands: where its outline begins."""
    x, y = shape.attrib["d"].removeprefix("M").replace("a", " ").replace("h", " ").split()[:2]
    return float(x), float(y)


@given(PLAIN_NUMBERS, st.booleans())
def test_ticks_are_even_and_reach_over_all_values(values: Sequence[float], from_zero: bool) -> None:
    scale = make_scale(values, 0, 100, from_zero=from_zero)
    slack = 1e-6 * (scale.high - scale.low)
    assert scale.ticks[0] <= min(values) + slack and scale.ticks[-1] >= max(values) - slack
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in [*values, *scale.ticks])
    assert 2 <= len(scale.ticks) <= 9
    steps = [right - left for left, right in pairwise(scale.ticks)]
    assert min(steps) == pytest.approx(max(steps), rel=1e-3) and min(steps) > 0
    if from_zero:
        assert scale.low <= 0 <= scale.high


@given(ANY_NUMBERS)
def test_no_input_leads_out_of_the_picture(values: Sequence[float]) -> None:
    scale = make_scale(values, 10, 20)
    assert scale.low < scale.high
    for value in [*values, 0.0]:
        shown = scale(value)
        assert math.isfinite(shown)
        assert not math.isfinite(value) or 10 - 1e-6 <= shown <= 20 + 1e-6


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([math.nan, math.inf], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([7.0], [0, 2, 4, 6, 8]),
        ([123.0, 87.0], [0, 25, 50, 75, 100, 125]),
        ([-3.0, 3.0], [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round(values: list[float], ticks: list[float]) -> None:
    assert make_scale(values, 0, 1).ticks == pytest.approx(ticks)


@given(POSITIVE_NUMBERS)
def test_logarithmic_ticks_reach_over_all_values(values: Sequence[float]) -> None:
    scale = make_log_scale(values, 0, 100)
    assert scale.ticks[0] <= min(values) * (1 + 1e-6)
    assert scale.ticks[-1] >= max(values) * (1 - 1e-6)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in [*values, *scale.ticks])
    assert 2 <= len(scale.ticks) <= 17
    assert all(f"{tick:e}"[0] in "125" for tick in scale.ticks)


def test_equal_ratios_are_equally_far_on_a_logarithmic_scale() -> None:
    scale = make_log_scale([1, 1000], 0, 300)
    assert [scale(value) for value in (1, 10, 100, 1000)] == pytest.approx([0, 100, 200, 300])
    assert scale(0) == 0  # no logarithm; the left end


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0.0, "0"), (0.25, "0.25"), (0.1 * 3, "0.3"), (1500.0, "1,500"), (20_000.0, "20k")),
        *((2_500_000.0, "2.5M"), (1e6, "1M"), (2.5e-5, "2.5e-05"), (-40.0, "-40"), (3e12, "3e+12")),
    ],
)
def test_ticks_are_shown_short(value: float, shown: str) -> None:
    assert show_number(value) == shown


def test_bars_are_as_long_as_their_values_and_grouped() -> None:
    bars = [
        Bar("pp", 50, "50.0", 0, (40, 60), group="a"),
        Bar("tg", 100, "100.0", 0, group="a"),
        Bar("pp", 25, "25.0", 1, group="b"),
    ]
    root = drawn(bar_chart("Speed", "note", bars, "tokens/s"))
    widths = [float(one.attrib["width"]) for one in by_class(root, "fill")]
    assert widths == pytest.approx([w * widths[1] for w in (0.5, 1, 0.25)], abs=0.2)
    assert [one.text for one in by_class(root, "group")] == ["a", "b"]
    first, *_ = by_class(root, "interval")
    ends = sorted(float(first.attrib[name]) for name in ("x1", "x2"))
    left = float(by_class(root, "fill")[0].attrib["x"])
    assert ends == pytest.approx([left + 0.4 * widths[1], left + 0.6 * widths[1]], abs=0.2)


def test_higher_and_later_points_stand_higher_and_further_right() -> None:
    points = (Point(0, 10, (8, 12)), Point(100, 20), Point(200, 15))
    root = drawn(line_chart("Decode", "note", [Series("a", points)], "depth", "tokens/s"))
    places = [place_of(one) for one in by_class(root, "ring")]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    heights = [-y for _, y in places]
    assert heights[0] < heights[2] < heights[1]
    assert len(by_class(root, "stroke")) == 1 and len(by_class(root, "interval")) == 3


@pytest.mark.parametrize("chart", [line_chart, scatter_chart])
def test_what_is_no_number_is_left_out(chart: Callable[..., str]) -> None:
    good = Point(1, 2, (math.nan, 3), (0, math.inf))
    points = (good, Point(math.nan, 1), Point(1, math.inf), Point(2, math.nan))
    root = drawn(chart("t", "d", [Series("a", points)], "x", "y"))
    assert len(by_class(root, "ring")) == 1
    assert by_class(root, "interval") == [] and by_class(root, "stroke") == []


def test_nothing_to_show_is_still_a_picture_with_axes() -> None:
    for picture in (
        line_chart("t", "d", [], "x", "y"),
        scatter_chart("t", "d", [Series("a", ())], "x", "y"),
        bar_chart("t", "d", [], "x"),
        histogram_chart("t", "d", {}, {}, "x"),
        histogram_chart("t", "d", {"a": [math.nan]}, {}, "x"),
    ):
        root = drawn(picture)
        assert [one.text for one in by_class(root, "tick")][:2] == ["0", "0.2"]
        assert root[0].text == "t" and by_class(root, "fill") == []


def test_text_is_escaped() -> None:
    for picture in (
        bar_chart(HOSTILE, HOSTILE, [Bar(HOSTILE, 1, HOSTILE, group=HOSTILE)], HOSTILE),
        line_chart(HOSTILE, HOSTILE, [Series(HOSTILE, (Point(1, 1),))], HOSTILE, HOSTILE),
        histogram_chart(HOSTILE, HOSTILE, {HOSTILE: [1.0]}, {HOSTILE: {HOSTILE: 1.0}}, HOSTILE),
    ):
        root = drawn(picture)
        assert {one.tag for one in root.iter()} <= TAGS
        assert root[0].text == HOSTILE and any(one.text == HOSTILE for one in root.iter("text"))


def test_no_two_series_look_alike() -> None:
    looks = {mark(0, 0, place) for place in range(N_SERIES**2)}
    assert len(looks) == N_SERIES**2
    assert len({dash(place) for place in range(N_SERIES)}) == N_SERIES


def test_long_names_are_cut_by_the_room_they_take() -> None:
    assert shorten("a" * 24) == "a" * 24
    assert shorten("a" * 25) == "a" * 23 + "\u2026"
    assert shorten("\u65e5" * 13) == "\u65e5" * 11 + "\u2026"  # two columns each


@given(st.lists(st.floats(0, 1e6), max_size=40))
@example([0.0, 1.0])  # the largest lies on the scale's end
@example([5e-324, 2e-322])  # of which no logarithm helps
def test_every_sample_is_in_one_bin(samples: list[float]) -> None:
    scale = choose_scale(samples)
    counts = count_bins(samples, scale)
    assert sum(counts) == len(samples)
    assert len(counts) == len(count_bins([], scale))


def test_bins_follow_the_values() -> None:
    scale = choose_scale([0.0, 60.0])
    counts = count_bins([0.0, 0.5, 59.9], scale)
    filled = {place: count for place, count in enumerate(counts) if count}
    assert filled[0] == 2 and len(filled) == 2


@pytest.mark.parametrize(
    ("values", "is_log", "low"),
    [
        ([10.0, 11.0, 12.0], False, 10.0),
        ([1.0, 11.0], False, 0.0),
        ([1.0, 500.0], True, 1.0),
        ([0.0, 500.0], False, 0.0),
        ([math.nan, 5.0], False, 2.0),
    ],
)
def test_the_scale_of_a_distribution_suits_it(
    values: list[float], is_log: bool, low: float
) -> None:
    scale = choose_scale(values)
    assert scale.is_log == is_log and scale.low == pytest.approx(low)


def test_a_histogram_has_its_marks_and_leaves_out_what_is_no_number() -> None:
    samples = {"a": [1.0, 2.0, math.nan], "b": [3.0]}
    picture = histogram_chart("t", "d", samples, {"a": {"p50": 1.5, "p99": 2.0}}, "ms")
    root = drawn(picture)
    assert len(by_class(root, "quantile")) == 2
    assert "1 of 2" in picture and "1 of 1" in picture and "p50 1.50, p99 2.00" in picture
    rights = [float(one.attrib["x"]) + float(one.attrib["width"]) for one in by_class(root, "fill")]
    assert max(rights) <= WIDTH


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8),
    st.booleans(),
    st.booleans(),
)
def test_the_frontier_is_what_no_other_point_beats(
    places: list[tuple[int, int]], more_x: bool, more_y: bool
) -> None:
    x_sign, y_sign = (1 if more else -1 for more in (more_x, more_y))

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        x, y = (one[0] - other[0]) * x_sign, (one[1] - other[1]) * y_sign
        return x >= 0 and y >= 0 and (x > 0 or y > 0)

    points = [Point(x, y) for x, y in places]
    found = frontier(points, more_x_is_better=more_x, more_y_is_better=more_y)
    expected = {place for place in places if not any(beats(other, place) for other in places)}
    assert found == sorted(expected)


def test_a_coordinate_is_never_out_of_bounds() -> None:
    assert [px(value) for value in (math.nan, math.inf, 1e300, 2.0, 1.25)] == [
        *("0", "0", "1000000", "2", "1.2")
    ]
