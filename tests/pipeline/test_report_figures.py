"""What pages say of figures: gaps, intervals, harm, importance, affinity, and where drawings put them."""

from dataclasses import replace

import pytest
from hostile_text import HOSTILE
from pages_by_hand import KINDS, METRICS, Parsed, checked, explanation_of, figures, model, record

from features.printable import has_surrogates
from pipeline.evaluation.explain.tables import tables
from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.evaluation.report import course, forest, heat_map, mixture, page, reliability, settings, slices, svg
from pipeline.evaluation.report.content import Estimate, TrainLine
from pipeline.evaluation.report.harm import Harm


def test_a_task_is_good_only_where_its_whole_interval_is_below_the_mean_label():
    near = {**METRICS, "click": METRICS["click"] | {"ne": 0.997}}
    of = replace(model(), records=[record(200, near)], evaluated=None)
    assert "1 of 2 tasks is better than predicting the mean label" in checked(page.run_page(of)).shown()
    assert "2 of 2 tasks are better" in checked(page.run_page(model())).shown()


def test_small_slices_and_none_are_told_apart():
    small = {"click": {**METRICS["click"], "rows": 150}}
    of = replace(model(), evaluated=figures(small, ["device=tv"]))  # type: ignore[arg-type]
    assert "No slice has 100 observed rows." in checked(page.run_page(of)).shown()
    assert "kept no figures of slices" in checked(page.run_page(replace(of, evaluated=None))).shown()


def test_the_slices_that_the_evaluation_measured_are_those_that_are_listed():
    small = {"click": {**METRICS["click"], "rows": 150}}
    of, found = replace(model(), kinds={"click": "binary"}), figures(small, ["a=75", "a=50", "a=37"])  # type: ignore[arg-type]

    def measured(min_rows: int) -> Evaluated:
        return replace(found, provenance=found.provenance.model_copy(update={"min_rows": min_rows}))

    for min_rows, names in ((1, {"a=75", "a=50", "a=37"}), (50, {"a=75", "a=50"}), (51, {"a=75"})):
        parsed = checked(page.run_page(replace(of, evaluated=measured(min_rows))))
        assert {text for _, text in parsed.texts if text.startswith("a=")} == names
        assert f"Slices of fewer than {min_rows} observed rows are not listed" in parsed.shown()
    assert "No slice has 1,076 observed rows." in checked(page.run_page(replace(of, evaluated=measured(1076)))).shown()
    two = [replace(of, name=f"m{rows}", evaluated=measured(rows)) for rows in (50, 51)]
    both = checked(page.comparison_page(two, None))
    assert sorted(text for tag, text in both.texts if text.startswith("a=")) == ["a=50", "a=75", "a=75"]
    assert "Slices of fewer than 50 or 51 observed rows" in both.shown()


def test_what_is_inside_has_importance_with_intervals_and_affinity():
    names = [f"f{n}" for n in range(15)]
    found = explanation_of(names, [*KINDS, "dropped"])
    parsed = checked(page.run_page(replace(model(), explanation=found)))
    shown = parsed.shown()
    for words in (
        "Importance of features, the 12 largest of each task", "click: rise of NE", "f0", "90% interval",
        "1,234 rows of test, 50.0% of its clusters, 20 buckets of user", "the mean of 3 permutations",
        "f0: +0.100 [+0.080, +0.120]", "NE 0.8000 with nothing permuted",
        "click after a step on dwell: −0.20, standard error 0.010",
        "+0.40", "19 batches of 64 rows",
    ):  # fmt: skip
        assert words in shown, words
    cells = [text for tag, text in parsed.texts if tag == "td"]
    assert all(cells.count(name) == 1 for name in names)
    assert "dropped: rise" not in shown
    drawn = [text for tag, text in parsed.texts if tag == "text"]
    assert (drawn.count("f11"), drawn.count("f12")) == (2, 0)
    both = checked(page.comparison_page([replace(model(), explanation=found), model("mmoe")], None)).shown()
    assert "adatt: Affinity of tasks" in both
    assert "mmoe: Affinity of tasks" not in both


@pytest.mark.parametrize(("confidence", "percent"), [(0.9, "90"), (0.29, "29"), (0.999, "99.9"), (0.9995, "99.95")])
def test_the_confidence_of_an_explanation_is_not_rounded_away(confidence: float, percent: str):
    found = explanation_of(["f"], list(KINDS), confidence=confidence)
    assert f"permuted (± {percent}% interval):" in tables(found)
    assert f"with its {percent}% interval;" in checked(page.run_page(replace(model(), explanation=found))).shown()


def test_an_affinity_that_is_unknown_is_a_dash_and_shades_are_of_each_column():
    values = [[0.5, None], [-0.25, 0.001]]
    drawn = Parsed(
        str(heat_map.heat_map(values, ["a", "b"], ["a", "b"], "x", str, lambda r, c: f"{r}{c}", by_column=True))
    )
    fills = [found["fill"] for tag, found in drawn.elements if tag == "rect"]
    assert fills == [heat_map.POSITIVE[-1], heat_map.UNKNOWN, heat_map.NEGATIVE[4], heat_map.POSITIVE[-1]]
    assert [text for tag, text in drawn.texts if tag == "text"] == ["a", "b", "a", "0.5", "–", "b", "-0.25", "0.001"]


def test_names_of_an_explanation_are_text():
    wild = [name for name in HOSTILE if not has_surrogates(name)]
    found = explanation_of([*wild, "</svg><script>x()</script>"], list(KINDS), cluster=wild[0])
    assert sum(tag == "script" for tag, _ in checked(page.run_page(replace(model(), explanation=found))).elements) == 1


def test_the_share_of_the_gap_that_is_closed_is_that_from_the_mean_label_to_the_best():
    parsed = checked(page.run_page(model()))
    assert "0.7900, gap closed 89.4%" in parsed.shown()  # (1 - 0.8123) / (1 - 0.79)
    cells = [text for tag, text in parsed.texts if tag == "td"]
    assert cells[cells.index("gap closed") + 1 : cells.index("gap closed") + 3] == [
        "89%",
        "70%",
    ]  # of dwell (1 - 0.93) / 0.1


def test_calibration_is_off_where_its_interval_leaves_out_1():
    assert "the interval leaves out 1 for click, dwell" in checked(page.run_page(model())).shown()
    unknown = replace(model(), evaluated=None)
    assert "leaves out 1" not in checked(page.run_page(unknown)).shown()


def test_a_comparison_has_the_best_model_first_and_a_change_that_is_not_paired_has_no_interval():
    worse = {task: {name: 1.5 * x for name, x in found.items()} for task, found in METRICS.items()}
    other = replace(model("worse"), records=[record(200, worse)], evaluated=None)
    parsed = checked(page.comparison_page([other, model()], model()))
    cells = [text for tag, text in parsed.texts if tag == "td"]
    assert cells.index("adatt") < cells.index("worse")
    baseline = model()
    cells = [text for tag, text in checked(page.comparison_page([other, baseline], baseline)).texts if tag == "td"]
    at = cells.index("worse")
    assert cells[at + 3 : at + 5] == ["+50.0%", "–"]


def test_checkpoints_are_newest_first_and_the_lowest_is_named():
    low = {**METRICS, "click": METRICS["click"] | {"ne": 0.7}}
    shown = checked(page.run_page(replace(model(), records=[record(100, low), record(200)])))
    assert "lowest click 0.7000 at step 100, dwell 0.9300 at step 100" in shown.shown()
    cells = [text for tag, text in shown.texts if tag == "td"]
    assert cells.index("20,000") < cells.index("10,000")


def test_regression_losses_of_training_are_drawn_as_their_roots():
    lines = [TrainLine(10 * n, {"click": 0.5}, {"dwell": 0.81}) for n in (1, 2)]
    of = replace(model(), training=lines)
    assert course._trained(of, "click", lines) == [(10.0, 0.5), (20.0, 0.5)]
    assert [round(y, 9) for _, y in course._trained(of, "dwell", lines)] == [0.9, 0.9]


def test_chance_is_that_of_an_interval_above_zero_and_only_clear_harm_counts():
    def harm(value: float, reach: float) -> Harm:
        return Harm("d", "s", 200, 0.1, Estimate(1.0), 1.0, Estimate(value, value - reach, value + reach))

    found = [*[harm(0.1, 0.05)] * 2, *[harm(0.1, 0.2)] * 30, *[harm(-0.1, 0.05)] * 7, *[harm(-0.1, 0.2)]]
    assert slices._lead(found).startswith("2 of 40 figures of slices do harm")
    assert slices._lead(found).endswith("by chance alone it would be about 1.0.")


def test_settings_that_only_one_of_two_has_differ():
    shown = settings.compared({"a": 1, "b": {"c": 2}}, "ours", {"a": 1, "d": None}, "theirs")
    assert [(one.name, one.value, one.other) for one in shown.differing] == [("b.c", "2", "–"), ("d", "–", "null")]
    assert [one.name for one in shown.same] == ["a"]


def test_an_axis_runs_from_its_low_end_and_labels_stay_apart_and_inside():
    axis = svg.Axis(1, 3, 100, 200)
    assert [axis.at(value) for value in (0, 1, 1.5, 3, 9)] == [100, 100, 125, 200, 200]
    assert svg.Axis(1, 100, 0, 10, log=True).at(10) == pytest.approx(5)
    drawn = Parsed(str(svg.element("g", svg.labels([(90, "a", ""), (91, "b", ""), (99, "c", "")], 0, 0, 100))))
    places = [float(found["y"] or 0) - 3.5 for tag, found in drawn.elements if tag == "text"]
    assert places == [76, 88, 100]


def test_bars_of_a_reliability_curve_reach_as_far_as_the_interval():
    bins = [reliability.Bin(0.4, 0.5, 0.05, 50, 2.0), reliability.Bin(0.5, 0.5, 0.1, 50, 3.0)]
    drawn = Parsed(str(reliability.curve([("m", bins)])))
    tips = [text for tag, text in drawn.texts if tag == "title"]
    assert tips == [
        "mean prediction 40.0%; mean label 50.0% [40.0%, 60.0%]; weight 50",
        "mean prediction 50.0%; mean label 50.0% [20.0%, 80.0%]; weight 50",
    ]


def test_shades_of_gate_weights_are_of_the_whole_map():
    drawn = Parsed(str(mixture.gate_map([[0.8, 0.1], [0.4, 0.2]], ["a", "b"], ["x", "y"])))
    fills = [found["fill"] for tag, found in drawn.elements if tag == "rect"]
    assert fills == [heat_map.POSITIVE[n] for n in (7, 1, 4, 2)]


def test_a_forest_of_changes_has_a_line_at_0_however_far_it_is():
    rows = [("a", Estimate(0.5, 0.4, 0.6), "c0")]
    assert str(forest.forest(rows, is_change=True)).count('class="zero"') == 1
    assert 'class="zero"' not in str(forest.forest(rows))
