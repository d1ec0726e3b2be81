"""Do charts show values at the right places, all names, one scale, and well-formatted numbers?"""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from parity.wellformed import parse

from edgelm.pages import page
from edgelm.pages.charts import Flag, Series, Span, line_chart
from edgelm.pages.frame import BROAD, SLIM, Axis, nice_ticks, text_width, value_axis
from edgelm.pages.heat import Scale, heat_map
from edgelm.pages.numbers import estimate, number, percent, power_label
from edgelm.pages.plots import Point, scatter_chart

NAN = float("nan")
TIMES = " \N{MULTIPLICATION SIGN} 10"


def layouts(html):
    """Return the wide and the narrow drawing of the figure."""
    parse(html)
    _, broad, slim = re.split(r'<div class="(?:broad|slim)">', html)
    return broad, slim


def markup(macro, *values):
    """Return the output of a macro of the templates."""
    return str(getattr(page._templates().get_template("figure.html.j2").module, macro)(*values)).strip()


def line(series, **options):
    return markup("figure", line_chart("t", series, x_label="x", y_label="y", **options))


def scatter(points, frontier):
    found = scatter_chart("t", points, frontier, x_label="x", y_label="y", best="best", other="other")
    return markup("figure", found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(
            (0, "0"),
            (0.0162, "0.0162"),
            (61_160.4, "61,160"),
            (999.96, "1,000"),
            (1e9, f"1{TIMES}⁹"),
            (25.7543, "25.75"),
        ),
        *((3.72e-5, f"3.72{TIMES}⁻⁵"), (-1.7e-12, f"-1.7{TIMES}⁻¹²"), (None, "-"), (NAN, "-"), (float("inf"), "∞")),
    ],
)
def test_numbers_are_formatted_for_readers(value, text):
    assert number(value) == text


def test_few_digits_and_shares_keep_their_meaning():
    assert number(26.0, 1) == "30"
    assert number(1234.5, 3) == "1,230"
    assert percent(0.9072) == "90.72 %"
    assert percent(0.999999) == "> 99.99 %"
    assert (percent(1.0), percent(1.05), percent(NAN)) == ("100 %", "105 %", "-")
    assert [power_label(x) for x in (10.0, 1e-3, 1e-4, 2e-4)] == ["10", "0.001", "10⁻⁴", f"2{TIMES}⁻⁴"]


def test_a_mean_and_its_error_share_a_power_of_ten():
    assert estimate(0.0162, 0.0005) == "0.0162 ± 0.0005"
    assert estimate(5.13e-5, 2e-6) == f"(5.13 ± 0.2){TIMES}⁻⁵"
    assert estimate(-1.7e-5, 8e-5, 2) == f"(-1.7 ± 8){TIMES}⁻⁵"
    assert (estimate(0.0, 0.0), estimate(0.02, 0.0), estimate(NAN, 0.1)) == ("0", "0.02", "-")


def test_a_logarithmic_axis_maps_decades_to_equal_steps():
    axis = Axis(1e-4, 1.0, 0.0, 400.0, log=True)
    assert [axis.at(10.0**power) for power in (-4, -3, -1, 0)] == pytest.approx([0, 100, 300, 400])
    assert axis.at(1e-9) == 0.0


def test_axes_cover_all_values_and_begin_at_zero_or_a_decade():
    assert (value_axis(BROAD, [3e-3, 0.2], log=True).low, value_axis(BROAD, [3e-3, 0.2], log=True).high) == (1e-3, 1.0)
    assert value_axis(BROAD, [5.0, NAN], log=False).low == 0.0
    assert value_axis(BROAD, [-2.0, 5.0], log=False).low == -2.0
    assert nice_ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_gap_in_a_curve_is_kept():
    for svg in layouts(line([Series("s", 1, [0, 1, 2, 3], [1.0, 2.0, NAN, 3.0])])):
        path = re.search(r'class="s k1[^"]*" d="([^"]*)"', svg)[1]
        assert path.count("M") == 2
        assert path.count("L") == 1


def test_an_empty_chart_is_not_drawn():
    assert line([Series("s", 1, [0.0], [NAN])]) == ""
    assert scatter([Point("nothing", 4.0, NAN, "")], []) == ""
    assert heat_map("t", [], [], Scale(0.1, 1.0), row_name="layers", column_name="experts") is None


def test_each_layout_is_drawn_in_its_own_size_with_text_of_the_page():
    broad, slim = layouts(line([Series("s", 1, range(32), [0.1] * 32)]))
    assert f'viewBox="0 0 {BROAD.width} ' in broad
    assert f'viewBox="0 0 {SLIM.width} ' in slim
    assert SLIM.width < 390
    assert len(re.findall(r'class="middle"', broad)) > len(re.findall(r'class="middle"', slim)) > 3


def test_axes_and_curves_have_names():
    html = line([Series("one <b>", 1, [0, 1], [1, 2]), Series("two", 2, [0, 1], [2, 1])])
    assert "↑ y<" in html
    assert html.count("x →<") == 2  # in both layouts
    assert ">one &lt;b&gt;</span>" in html
    assert ">two</span>" in html


def test_values_below_a_logarithmic_axis_are_mentioned():
    assert "≤ 10⁻⁹" in line([Series("s", 1, [0, 1], [1e-12, 2e-9])], log=True, floor=1e-9)
    assert "≤" not in line([Series("s", 1, [0, 1], [1e-8, 2e-9])], log=True, floor=1e-9)


def test_charts_can_share_a_scale():
    alone, shared = (line([Series("s", 1, [0], [0.5])], log=True, scale=scale) for scale in ((), (1e-6,)))
    assert "10⁻⁶" not in alone
    assert "10⁻⁶" in shared


def test_sections_are_named_or_numbered_with_a_key():
    spans = [Span("a", 0, 5), Span("a name that is much longer than its section", 5, 6), Span("b", 6, 20)]
    broad, slim = layouts(line([Series("s", 1, range(20), [1.0] * 20)], spans=spans))
    for svg in (broad, slim):
        assert "<b>2</b> a name that is much longer than its section" in svg
    short = [Span("a", 0, 10), Span("b", 10, 20)]
    for svg in layouts(line([Series("s", 1, range(20), [1.0] * 20)], spans=short)):
        assert ">a</text>" in svg
        assert 'class="key"' not in svg


def test_a_flag_is_at_its_position_inside_the_frame():
    for place, side in ((1, "start"), (31, "end")):
        for svg in layouts(line([Series("s", 1, range(32), [0.1] * 32)], flag=Flag("first divergence", place))):
            assert re.search(rf'class="failed {side}" x="[\d.]+" y="\d+">first divergence<', svg)


def test_names_of_close_points_do_not_overlap():
    points = [Point(f"candidate {i}", 4.5 + 0.001 * i, 1e-2, "") for i in range(8)]
    points.append(Point("far to the right", 9.0, 1e-3, ""))
    for svg in layouts(scatter(points, [0, 8])):
        assert svg.count("<circle") == 9
        boxes = []
        for x, y, name in re.findall(r'class="name" x="([\d.-]+)" y="([\d.-]+)">([^<]*)<', svg):
            boxes.append((float(x), float(y), text_width(name)))
        assert len(boxes) == 9
        for number_, (x, y, width) in enumerate(boxes):
            assert 0 <= x <= x + width <= BROAD.width
            for other_x, other_y, other_width in boxes[:number_]:
                assert abs(y - other_y) >= 13 or x + width <= other_x or other_x + other_width <= x
        for point in points:
            assert f">{point.name}</text>" in svg or f"</b> {point.name}</li>" in svg


def test_names_without_room_become_numbers_with_a_key():
    names = [f"{'long name ' * 12}{i}" for i in range(6)]
    broad, slim = layouts(scatter([Point(name, i + 4, 1e-2, "") for i, name in enumerate(names)], [0]))
    for svg in (broad, slim):
        for label, name in enumerate(names, 1):
            assert f">{label}</text>" in svg
            assert f"<b>{label}</b> {name}</li>" in svg


def test_points_on_the_frontier_differ_by_more_than_colour():
    (broad, _) = layouts(scatter([Point("best", 4, 1e-3, ""), Point("other", 8, 1e-2, "")], [0]))
    assert re.findall(r'<circle class="([^"]*)"', broad) == ["m k4 full", "m k1"]


def test_a_plot_with_zero_loss_or_one_point_is_drawn():
    for svg in layouts(scatter([Point("exact", 16, 0.0, ""), Point("int4", 4, 1e-2, "")], [1, 0])):
        assert svg.count("<circle") == 2
        assert ">exact (0)</text>" in svg
    layouts(scatter([Point("one", 4.0, 0.01, "")], [0]))


def shades(svg):
    return [float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', svg)]


def heat(rows, scale):
    tips = [[f"{row},{column}" for column in range(len(rows[0]))] for row in range(len(rows))]
    return layouts(markup("figure", heat_map("t", rows, tips, scale, row_name="layers", column_name="experts")))


def test_a_heat_map_is_darkest_at_the_maximum_and_crosses_out_missing_values():
    rows = [[0.0, 0.01], [0.1, None], [1.0, NAN]]
    scale = Scale.of(value for row in rows for value in row)
    for svg in heat(rows, scale):
        found = shades(svg)
        assert found[0] == 0.0
        assert 0 < found[1] < found[2] < found[3] == found[4] == 1.0
        assert svg.count('class="cross"') == 1


def test_equal_values_have_equal_shades_in_all_maps_of_a_scale():
    first, second = [[1e-2, 1e-3]], [[1e-3, 1e-5]]
    scale = Scale.of([*first[0], *second[0]])
    assert (scale.low, scale.high) == (1e-5, 1e-2)
    assert shades(heat(first, scale)[0])[1] == shades(heat(second, scale)[0])[0]
    legend = markup("scale_legend", scale, "exact", "no token")
    parse(legend)
    for text in ("0.01", number(1e-5, 2), "exact", "no token"):
        assert f"{text}</span>" in legend


def test_a_scale_of_equal_values_spans_a_decade():
    assert Scale.of([0.5, 0.5, 0.0, None]) == Scale(0.05, 0.5)


def test_a_wide_heat_map_is_rotated_in_a_narrow_window():
    broad, slim = heat([[0.1] * 64 for _ in range(16)], Scale(0.01, 1.0))
    assert "→ experts · ↓ layers" in broad
    assert "→ layers · ↓ experts" in slim
    widths = [float(width) for width in re.findall(r'class="cell"[^>]* width="([\d.]+)"', slim)]
    assert min(widths) > 8
    rows = sorted({float(y) for y in re.findall(r'class="cell"[^>]* y="([\d.]+)"', slim)})
    assert len(rows) == 64
    assert min(b - a for a, b in pairwise(rows)) >= 12
