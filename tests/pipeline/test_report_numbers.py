"""Numbers, axes and labels of a page."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.report import svg
from pipeline.evaluation.report.content import Estimate
from pipeline.evaluation.report.numbers import compact, count, difference, figure, percent, significant

finite = st.floats(-1e8, 1e8, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-8)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.769342, "0.7693"), (0.00012349, "0.0001235"), (12.3456, "12.35"), (1234567.8, "1,234,568"), (0, "0"),
        (-0.5, "−0.5000"), (9.99996, "10.00"), (1.2e-7, "1.200e−7"), (3.1e12, "3.100e12"), (None, "–"),
        (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_a_figure_has_four_significant_digits(value, shown):
    assert significant(value) == shown


@given(finite)
def test_four_digits_are_within_half_a_unit_of_the_fourth(value):
    shown = float(significant(value).replace(",", "").replace("−", "-"))
    assert shown == pytest.approx(value, rel=5.0001e-4)


def test_an_interval_is_as_fine_as_its_width_and_as_its_value():
    assert tuple(figure(Estimate(0.76934, 0.7611, 0.7775))) == ("0.7693", "[0.7611, 0.7775]")
    assert tuple(figure(Estimate(0.7693412, 0.7693201, 0.7693623))) == ("0.769341", "[0.769320, 0.769362]")
    assert tuple(figure(Estimate(0.7693412))) == ("0.7693", "–")
    assert tuple(difference(Estimate(-0.0031234, -0.0052, -0.001), "%")) == ("−0.31%", "[−0.52%, −0.10%]")
    assert tuple(difference(Estimate(0.000421))) == ("+0.000421", "–")
    assert tuple(difference(Estimate())) == ("–", "–")


def test_what_rounds_to_zero_has_no_sign():
    assert tuple(difference(Estimate(0.00021, -0.000001, 0.00042))) == ("+0.00021", "[0.00000, +0.00042]")


def test_counts_shares_and_ticks():
    assert (count(75000.0), count(None)) == ("75,000", "–")
    assert (percent(0.12345), percent(1e-5), percent(None)) == ("12.3%", "0.00100%", "–")
    assert [compact(x) for x in (450_000, 1_200_000, 999, 2.5e9, 3.82e-8)] == ["450k", "1.2M", "999", "2.5B", "3.82e−8"]


@given(finite, st.floats(1e-4, 1e4), st.integers(2, 8))
def test_ticks_are_round_inside_the_axis_and_about_as_many_as_wanted(low, relative, wanted):
    width = relative * max(abs(low), 1e-3)
    axis = svg.Axis(low, low + width, 0, 100)
    ticks = axis.ticks(wanted)
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)
    assert len(ticks) <= wanted + 1
    steps = {round((b - a) / width, 6) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert len(steps) <= 1 or max(steps) - min(steps) < 1e-4


def test_the_labels_of_ticks_differ():
    for low, high in ((0.75, 0.85), (0, 1), (0, 450_000), (0.76931, 0.76938), (-0.4, 0.1), (1e6, 1.2e6)):
        ticks = svg.Axis(low, high, 0, 100).ticks()
        labels = [svg.tick_label(tick, ticks) for tick in ticks]
        assert len(labels) >= 2
        assert len(set(labels)) == len(labels), labels


def test_an_axis_maps_its_ends_to_its_pixels_and_what_is_outside_to_the_nearer():
    axis = svg.Axis(1, 100, 10, 30, log=True)
    assert [axis.at(x) for x in (1, 10, 100, 1e9, 0.1)] == pytest.approx([10, 20, 30, 30, 10])
    assert axis.ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert svg.Axis(1e-6, 1, 0, 1, log=True).ticks() == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])
    assert svg.Axis(5, 5, 0, 10).at(5) == 0


@given(st.lists(st.floats(20, 180), min_size=1, max_size=10))
def test_labels_keep_their_order_their_distance_and_their_box(places):
    drawn = svg.labels([(place, f"n{i}", "c0") for i, place in enumerate(places)], 0, 20, 180)
    found = [float(part.split('y="')[1].split('"')[0]) - 3.5 for part in str(drawn).split("<text")[1:]]
    assert all(b - a > svg.LINE - 0.02 for a, b in zip(found, found[1:], strict=False))
    assert max(found) <= 180.01


def test_an_element_escapes_what_it_is_given():
    drawn = str(svg.element("text", "<b>\x1b", svg.element("title", '"&'), x=1.5, class_='a"b', y=None))
    assert drawn == '<text x="1.5" class="a&#34;b">&lt;b&gt;\\x1b<title>&#34;&amp;</title></text>'
