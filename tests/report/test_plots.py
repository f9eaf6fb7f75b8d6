"""Plots: scales rise, nothing leaves its frame, no text covers another, no text is markup."""

import itertools
import math
import re

import hypothesis
import hypothesis.strategies as st
import pytest

import pages
from csfast.report import plots
from csfast.report.plots import Axis, Box, Line, Point

HOSTILE = '"><script>alert(1)</script>&<b>'
FINITE = st.floats(-1e6, 1e6, allow_nan=False)
SMALL = hypothesis.settings(max_examples=40, deadline=None)


def point(x, y, *, spread=0.0, name="", ring=False):
    return Point(x, y, y - spread, y + spread, f"{name} at {x}", name, ring)


def line(points, name="a line", **options):
    return Line(name, "s0", "circle", tuple(points), **options)


def drawn(lines, *, width=plots.WIDE, height=400, margin=True):
    points = [p for each in lines for p in each.points]
    x = plots.linear("along", min(p.x for p in points), max(p.x for p in points))
    y = plots.losses([p.y for p in points])
    return plots.chart(lines, x, y, title="t", width=width, height=height, margin=margin)


def numbers(svg, *names):
    return [float(v) for v in re.findall(rf'\b(?:{"|".join(names)})="([^"]*)"', svg)]


# Axes


AXES = {
    "linear": plots.linear("", -0.3, 17.2),
    "whole": plots.linear("", -0.4, 30.4, whole=True),
    "flat": plots.linear("", 3.0, 3.0),
    "log": plots.logarithmic("", 17e6, 120e6),
    "long log": plots.logarithmic("", 1e-4, 300.0),
    "one log": plots.logarithmic("", 5.0, 5.0),
    "losses": plots.losses([-0.03, 0.4, 2.2]),
    "no losses": plots.losses([]),
}


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
def test_an_axis_rises_from_its_start_to_its_end(axis):
    assert axis.part(axis.low) == 0 and axis.part(axis.high) == 1
    values = [axis.low + (axis.high - axis.low) * i / 50 for i in range(51)]
    parts = [axis.part(v) for v in values]
    assert all(a < b for a, b in itertools.pairwise(parts))
    assert axis.part(axis.low - 1) == 0 and axis.part(axis.high + 1) == 1


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
def test_ticks_rise_within_the_axis_and_say_their_value(axis):
    values = [value for value, _ in axis.ticks]
    assert len(values) >= 2 and values == sorted(set(values))
    assert axis.low <= values[0] and values[-1] <= axis.high
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    for value, text in axis.ticks:
        assert float(text.rstrip("kMG")) * units.get(text[-1], 1) == pytest.approx(value)


@hypothesis.given(FINITE, FINITE)
def test_linear_axes_hold_what_they_are_for(a, b):
    low, high = min(a, b), max(a, b)
    hypothesis.assume(high == low or high - low > 1e-9 * max(abs(low), abs(high)))
    axis = plots.linear("", low, high)
    slack = 1e-9 * (axis.high - axis.low)
    assert axis.low <= low + slack and high <= axis.high + slack
    assert 2 <= len(axis.ticks) <= 8


def test_the_scale_of_losses_is_odd_about_zero():
    axis = Axis("", -3.0, 3.0, "bent", ())
    for value in (0.0, 0.001, 0.1, 2.0):
        assert axis.part(value) + axis.part(-value) == pytest.approx(1.0)
    # As much room from .1 to 1 as from 1 to 10, once far from zero.
    wide = Axis("", 0.0, 1000.0, "bent", ())
    assert wide.part(100) - wide.part(10) == pytest.approx(
        wide.part(1000) - wide.part(100), rel=1e-3
    )


@pytest.mark.parametrize(
    ("value", "text"), [(17e6, "17M"), (1.6e9, "1.6G"), (999.0, "999"), (0.25, "0.25"), (2e3, "2k")]
)
def test_large_numbers_are_short(value, text):
    assert plots.short(value) == text


# Boxes


def test_boxes_meet_where_they_share_a_point():
    a = Box(0, 0, 10, 10)
    assert a.meets(Box(5, 5, 15, 15)) and a.meets(Box(2, 2, 3, 3))
    assert not a.meets(Box(10, 0, 20, 10)) and not a.meets(Box(0, 11, 10, 20))
    assert a.holds(Box(0, 0, 10, 10)) and not a.holds(Box(0, 0, 10, 11))


def test_texts_cover_what_their_anchor_says():
    n = 4 * plots.LETTER
    assert plots.text_box(100, 50, "four", "tick").right == 100 + n
    assert plots.text_box(100, 50, "four", "tick end").left == 100 - n
    middle = plots.text_box(100, 50, "four", "tick middle")
    assert (middle.left, middle.right) == (100 - n / 2, 100 + n / 2)


# Charts


@SMALL
@hypothesis.given(
    st.lists(
        st.lists(
            st.tuples(st.floats(0, 1), st.floats(-0.1, 5), st.booleans()), min_size=1, max_size=8
        ),
        min_size=1,
        max_size=30,
    ),
    st.booleans(),
)
def test_no_text_covers_another_and_none_leaves(groups, margin):
    lines = [
        line(
            [
                point(x, y, spread=0.1, name=f"method-{i}-{x:.2f}", ring=ring)
                for x, y, ring in group
            ],
            name=f"family-number-{i}",
        )
        for i, group in enumerate(groups)
    ]
    svg = drawn(lines, width=plots.WIDE if margin else plots.NARROW, margin=margin)
    assert not pages.collisions(svg)
    if margin:
        for i in range(len(groups)):
            assert f">family-number-{i}</text>" in svg


@SMALL
@hypothesis.given(st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=1, max_size=12))
def test_nothing_leaves_the_frame_whatever_the_numbers(values):
    svg = drawn([line([point(x, y, spread=abs(s)) for x, y, s in values])])
    assert all(-1 <= v <= plots.WIDE + 1 for v in numbers(svg, "cx", "x1", "x2", "x"))
    path = re.findall(r'points="([^"]*)"', svg)
    assert all(-1 <= float(v) <= plots.WIDE + 1 for p in path for v in re.split("[ ,]", p))


def test_numbers_that_nothing_tells_apart_stand_in_the_middle():
    axis = plots.Axis("loss", 1e6, 1e6 * (1 + 2e-16), "bent", ())
    assert axis.high > axis.low and axis.part(1e6) == 0.5
    assert plots.linear("loss", 1.0, 1.0 + 1e-12).part(1.0) == pytest.approx(0.5)


def test_more_is_higher_and_further_right():
    svg = drawn([line([point(0.1, 0.5), point(0.7, 0.01)])])
    (corners,) = re.findall(r'<polyline class="line s0" points="([^"]*)"', svg)
    (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in corners.split())
    assert x1 < x2 and y1 < y2  # pixels point down: the first has more loss


def test_intervals_are_a_band_where_points_are_joined_and_bars_where_not():
    points = [point(0.1, 0.5, spread=0.1), point(0.7, 0.2, spread=0.1)]
    assert 'class="band s0"' in drawn([line(points)])
    assert 'class="whisker' not in drawn([line(points)])
    loose = drawn([line(points, joined=False)])
    assert loose.count('class="whisker s0"') == 2 and "polyline" not in loose
    exact = drawn([line([point(0.1, 0.5), point(0.7, 0.2)])])
    assert "band" not in exact and "whisker" not in exact


def test_every_point_says_what_it_is():
    svg = drawn([line([point(0.1, 0.5, name="a"), point(0.7, 0.2, name="b", ring=True)])])
    assert "<title>a at 0.1</title>" in svg and "<title>b at 0.7</title>" in svg
    assert svg.count('class="ring"') == 1
    unseen = Line("l", "s0", "", (point(0.2, 0.3, name="c"),))
    assert "<title>c at 0.2</title>" in drawn([unseen])


def test_names_that_stand_out_come_first():
    crowd = [point(0.5, 1.0, name=f"other-{i}") for i in range(30)]
    svg = drawn([line(crowd), line([point(0.5, 1.0, name="ringed", ring=True)], name="b")])
    assert ">ringed</text>" in svg


def test_a_name_keeps_clear_of_lines_where_it_can():
    steep = line([point(0.0, 0.0), point(1.0, 4.0)], name="steep")
    other = line([point(0.5, 0.5, name="a-point")], name="other", joined=False)
    svg = drawn([steep, other], margin=False)
    pattern = r'<text x="([^"]*)" y="([^"]*)" class="([^"]*)">a-point'
    x, y, style = re.search(pattern, svg).groups()
    box = plots.text_box(float(x), float(y), "a-point", style)
    (corners,) = re.findall(r'<polyline class="line s0" points="([^"]*)"', svg)
    (x1, y1), (x2, y2) = ([float(v) for v in pair.split(",")] for pair in corners.split())
    for i in range(200):
        a, b = x1 + (x2 - x1) * i / 199, y1 + (y2 - y1) * i / 199
        assert not (box.left < a < box.right and box.top < b < box.bottom)


def test_a_figure_has_a_wide_and_a_narrow_plot():
    lines = [line([point(0.1, 0.5), point(0.7, 0.2)], name="one")]
    both = plots.figure(lambda width, margin: drawn(lines, width=width, margin=margin), lines)
    assert both.count("<svg viewBox") == 3  # wide, narrow, one key
    assert '<div class="wide"><svg viewBox="0 0 980 ' in both
    assert '<div class="narrow"><svg viewBox="0 0 336 ' in both
    bare = plots.figure(lambda width, margin: drawn(lines, width=width), lines, key=False)
    assert bare.count("<svg viewBox") == 2


def test_a_key_names_every_line_once():
    lines = [line([point(0, 0)]), line([point(1, 1)], joined=False), line([], name="b")]
    key = plots.legend(lines)
    assert key.count("<span>") == 2
    assert key.count('class="line s0"') == 2  # the first of a name counts: joined


def test_marks_are_all_different():
    shapes = {plots.shape(mark, 50, 50, "s0") for mark in plots.MARKS}
    assert len(shapes) == len(plots.MARKS) >= 6
    with pytest.raises(KeyError):
        plots.shape("heart", 0, 0, "s0")
    assert plots.shape("", 0, 0, "s0") == ""


# Heat maps


def heat(values, **options):
    n, m = len(values), len(values[0])
    given = {
        "rows": [f"row {i}" for i in range(n)],
        "columns": [f"{i}" for i in range(m)],
        "row_label": "r",
        "column_label": "c",
        "title": "t",
        "width": plots.NARROW,
    }
    return plots.heat(values, **{**given, **options})


def test_a_heat_map_is_stronger_for_more():
    svg = heat([[0.0, 0.25, 1.0], [2.0, None, -1.0]])
    cells = re.findall(r'<rect class="heat"[^>]*fill-opacity="([^"]*)"', svg)
    assert [float(v) for v in cells] == [0.0, 0.25, 1.0, 1.0, 0.0]
    assert "<title>row 0, 1: 0.250</title>" in svg


@pytest.mark.parametrize("n", [1, 6, 12, 80, 200])
def test_heat_maps_keep_their_texts_apart(n):
    wide = heat([[i / n for i in range(n)]] * 4, numbers=True)
    assert not pages.collisions(wide)
    long = heat([[0.5]] * n, rows=[f"a method with a long name {i}" for i in range(n)])
    assert not pages.collisions(long)


def test_numbers_are_written_where_they_fit():
    assert ">.25</text>" in heat([[0.25, 1.0]], numbers=True)
    assert ">1.00</text>" in heat([[0.25, 1.0]], numbers=True)
    assert ">.25</text>" not in heat([[0.25] * 60], numbers=True)


def test_a_curve_is_cut_off_at_the_edges():
    svg = heat([[0.5] * 4] * 3, curve=[(-1.0, 1.0), (0.5, 2.5), (1.5, 1.0), (9.0, 0.0)])
    under, over = re.findall(r'<polyline class="(?:under|over)" points="([^"]*)"', svg)
    assert under == over and len(over.split()) == 2
    assert "polyline" not in heat([[0.5]], curve=[(0.5, 0.5)])


def test_a_strip_holds_every_cell_once():
    svg = plots.strip(
        [[0.04, 0.5, 0.96], [0.5, 0.52, math.pi]], low=0.0, high=1.0, title="t", width=300
    )
    by_level = dict(re.findall(r'fill-opacity="([^"]*)" d="([^"]*)"', svg))
    assert {level: path.count("M") for level, path in by_level.items()} == {
        "0.0": 1,
        "0.5": 3,
        "1.0": 2,
    }


def test_bars_are_as_high_as_their_values():
    svg = plots.bars([0.0, 0.5, 1.0], label="layer", title="t", width=plots.NARROW)
    low, half, full = map(float, re.findall(r'<rect class="bar"[^>]* height="([^"]*)"', svg))
    assert low == 0 and half == pytest.approx(full / 2, abs=0.1)
    assert not pages.collisions(plots.bars([0.3] * 200, label="layer", title="t", width=336))


def test_sides_are_as_long_as_their_values_and_keep_their_words():
    shown = [plots.Side("dense", "ghost", 4.0, "4.0 ms"), plots.Side("ours", "s0", 1.0, "1.0 ms")]
    for width in (plots.NARROW, plots.HALF):
        svg = plots.sides(shown, title="t", width=width)
        long, quarter = map(float, re.findall(r'<rect class="side [^>]* width="([^"]*)"', svg))
        assert quarter == pytest.approx(long / 4, abs=0.1)
        assert not pages.collisions(svg)
    nothing = plots.sides([plots.Side("a", "s0", 0.0, "0")], title="t", width=336)
    assert 'width="0.0"' in nothing


@pytest.mark.parametrize("width", [plots.NARROW, plots.HALF])
def test_differences_stand_where_their_numbers_are(width):
    shown = [
        Point(x, 0.0, x - 0.1, x + 0.1, f"p{x}", name)
        for x, name in ((0.2, "a"), (0.4, "a task with a name that is much too long to be shown"))
    ]
    axis = plots.linear("along", -0.2, 0.6)
    svg = plots.differences(shown, axis, title="t", width=width)
    assert not pages.collisions(svg)
    (zero,) = re.findall(r'<line class="zero" x1="([^"]*)"', svg)
    ends = re.findall(r'class="interval few-bit" x1="([^"]*)" x2="([^"]*)"', svg)
    (low, high), (again, end) = ([float(v) for v in pair] for pair in ends)
    # Of tenths the intervals cover 1 to 3 and 3 to 5; pixels are rounded to tenths of their own.
    unit = low - float(zero)
    assert [high, again, end] == pytest.approx([float(zero) + n * unit for n in (3, 3, 5)], abs=0.6)
    assert "<title>p0.4</title>" in svg and "…</text>" in svg


@hypothesis.given(st.lists(st.integers(), max_size=60), st.integers(1, 12))
def test_parts_are_short_and_keep_everything_in_order(members, most):
    parts = plots.parts(members, most)
    assert [member for part in parts for member in part] == members
    assert len(parts) == -(-len(members) // most)
    assert all(0 < len(part) <= most for part in parts)
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_text_is_clipped_to_its_letters():
    assert [plots.clipped("letters", n) for n in (7, 6, 1)] == ["letters", "lette…", "l…"]


def test_long_names_leave_room_for_a_heat_map():
    svg = heat([[0.5, 1.0]], rows=["a name of a task that goes on and on and on and on and on"])
    assert not pages.collisions(svg)
    assert all(v > 20 for v in numbers(svg, "width"))


def test_the_key_of_a_heat_map_goes_from_faint_to_strong():
    key = plots.scale(0, 1, "share")
    strengths = [float(v) for v in re.findall(r'fill-opacity="([^"]*)"', key)]
    assert len(strengths) == 10 and strengths == sorted(strengths)


# Safety


def test_no_text_becomes_markup():
    hostile = line([point(0.1, 0.5, name=HOSTILE), point(0.6, 0.4, name=HOSTILE)], name=HOSTILE)
    parts = [
        drawn([hostile]),
        plots.legend([hostile]),
        heat([[0.5]], rows=[HOSTILE], columns=[HOSTILE], row_label=HOSTILE, column_label=HOSTILE),
        plots.bars([0.5], label=HOSTILE, title=HOSTILE, width=300),
        plots.scale(0, 1, HOSTILE),
        plots.sides([plots.Side(HOSTILE, "s0", 1.0, HOSTILE)], title=HOSTILE, width=640),
        plots.differences(
            [Point(0.1, 0.0, 0.0, 0.2, HOSTILE, HOSTILE)],
            plots.linear(HOSTILE, 0.0, 1.0),
            title=HOSTILE,
            width=640,
        ),
        plots.strip([[0.5]], low=0.0, high=1.0, title=HOSTILE, width=300),
    ]
    for part in parts:
        assert "<script" not in part and "<b>" not in part
        pages.Page(str(part))
