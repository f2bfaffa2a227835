"""Verdicts: each gate against its definition point by point, what is missing, NE of 1, exit codes and the table."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from evaluated_by_hand import around, evaluated, line
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student_t

from features.errors import UserError
from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.release.gate_figures import Estimate
from pipeline.release.gates import check_same_tasks, decide, judge
from pipeline.release.gates_config import Gates, default_gates
from pipeline.release.verdict import GateVerdict, Verdict, table

CLICK = {"click": "binary"}
ORDER = ["pass", "undecided", "fail"]
numbers = st.floats(-2, 2).map(lambda x: round(x, 6))


def gates(*of_all: dict, **tasks: object) -> Gates:
    return Gates.model_validate({"default": [*of_all], "tasks": tasks}, strict=True)


def of(task: str, metric: str, value: float | None, se: float | None = None, **more: object) -> dict:
    left_out = [] if se is None or value is None else around(value, se)
    return line(task, metric, value, left_out, **more)


def one(verdict: Verdict, metric: str = "ne", of_slice: str = "all") -> GateVerdict:
    """The one gate on a metric and slice, but for NE below 1, which every binary task has."""
    found = [g for g in verdict.gates if (g.metric, g.slice) == (metric, of_slice) and g.gate != "ne at most 1"]
    assert len(found) == 1
    return found[0]


def shifted(by: float, noise: float, se: float = 0.05) -> tuple[Evaluated, Evaluated]:
    """A candidate and serving whose NE differ by `by`, with a paired standard error of `noise` far below either's own."""
    base = around(0.8, se)
    wiggle = np.tile([1, 1, -1, -1], 5) * noise / 19**0.5
    ours = evaluated([line("click", "ne", 0.8 + by, base + by + wiggle)])
    return ours, evaluated([line("click", "ne", 0.8, base)], run="runs/serving")


@settings(max_examples=examples(300), deadline=None)
@given(numbers, st.floats(0, 1), st.integers(2, 200), numbers, numbers, st.sampled_from([0.8, 0.95, 0.99]))
def test_a_gate_passes_where_all_of_the_interval_is_allowed_and_fails_where_none_of_it_is(
    estimate: float, se: float, buckets: int, a: float, b: float, confidence: float
) -> None:
    least, most = min(a, b), max(a, b)
    reach = student_t.ppf(confidence, buckets - 1) * se
    points = estimate + reach * np.linspace(-1, 1, 2001)
    outcome, *_ = decide(Estimate(estimate, se, buckets, 1000), confidence, least, most)
    if outcome == "pass":
        assert points.min() >= least - 1e-12
        assert points.max() <= most + 1e-12
    elif outcome == "fail":
        assert points.max() < least + 1e-12 or points.min() > most - 1e-12
    else:
        assert points.min() < least or points.max() > most
        assert points.min() <= most
        assert points.max() >= least


@settings(max_examples=examples(200), deadline=None)
@given(numbers, st.floats(1e-4, 1), st.integers(2, 200), st.integers(1, 10**6), numbers)
def test_an_undecided_gate_is_decided_by_as_many_more_rows_and_not_by_fewer(
    estimate: float, se: float, buckets: int, rows: int, most: float
) -> None:
    outcome, _, _, more = decide(Estimate(estimate, se, buckets, rows), 0.95, -math.inf, most)
    if outcome != "undecided":
        assert more is None
    elif more is None:
        assert abs(estimate - most) < 1e-5 * student_t.ppf(0.95, buckets - 1) * se * rows**0.5
    else:
        enough = Estimate(estimate, se * (rows / (rows + more * 1.001)) ** 0.5, buckets, rows)
        fewer = Estimate(estimate, se * (rows / (rows + more * 0.999 - 1)) ** 0.5, buckets, rows)
        assert decide(enough, 0.95, -math.inf, most)[0] != "undecided"
        assert decide(fewer, 0.95, -math.inf, most)[0] == "undecided"


def test_no_number_of_rows_decides_a_change_that_is_the_margin() -> None:
    assert decide(Estimate(0.5, 0.1, 20, 1000), 0.95, -math.inf, 0.5)[0::3] == ("undecided", None)


@settings(max_examples=examples(150), deadline=None)
@given(
    st.sampled_from([("ne", 1), ("auc", -1)]),
    st.floats(0.2, 1.3), st.floats(-0.1, 0.1), st.floats(0, 0.5), st.floats(0, 0.05), st.floats(-0.05, 0.05),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_a_verdict_never_improves_when_the_candidate_gets_worse(
    direction: tuple[str, int],
    base: float,
    by: float,
    worse: float,
    noise: float,
    margin: float,
    absolute: bool,
    allow: bool,
) -> None:
    metric, sign = direction
    if absolute:
        gate = {"metric": metric, **({"max": base + margin} if sign > 0 else {"min": base - margin})}
    else:
        key = "worse_by_at_most" if margin >= 0 else "better_by_at_least"
        gate = {"metric": metric, "change": {key: abs(margin)}}
    asked = gates(click={"gates": [gate], "allow_ne_above_one": allow})
    serving = evaluated([of("click", metric, base, 0.02)])
    outcomes = []
    for change in (by, by + worse):
        value = base + sign * change
        wiggle = np.tile([1, 1, -1, -1], 5) * noise
        candidate = evaluated([line("click", metric, value, around(value, 0.02) + wiggle)])
        outcomes.append(ORDER.index(judge(asked, CLICK, candidate, serving).outcome))
    assert outcomes[0] <= outcomes[1]


@pytest.mark.parametrize(
    ("by", "noise", "change", "outcome"),
    [
        (0.0, 0.001, {"worse_by_at_most": 0.002}, "pass"),  # t(19) at 0.95 is 1.73: the bound is 0.0017
        (0.0005, 0.001, {"worse_by_at_most": 0.002}, "undecided"),
        (0.003, 0.001, {"worse_by_at_most": 0.002}, "undecided"),
        (0.004, 0.001, {"worse_by_at_most": 0.002}, "fail"),
        (0.004, 0.0, {"worse_by_at_most": 0.002}, "fail"),
        (0.001, 0.0, {"worse_by_at_most": 0.002}, "pass"),
        (0.003, 0.001, {"worse_by_at_most": "1%"}, "pass"),  # of 0.8
        (0.0115, 0.001, {"worse_by_at_most": "1%"}, "fail"),
        (-0.003, 0.001, {"better_by_at_least": 0.001}, "pass"),
        (-0.002, 0.001, {"better_by_at_least": 0.001}, "undecided"),
        (0.001, 0.001, {"better_by_at_least": 0.001}, "fail"),
        (-0.012, 0.001, {"better_by_at_least": "1%"}, "pass"),
        (-0.003, 0.001, {"better_by_at_least": 0}, "pass"),
        (-0.001, 0.001, {"better_by_at_least": 0}, "undecided"),
        (0.0, 0.0, {"better_by_at_least": 0}, "fail"),  # the identical model
        (0.0, 0.0, {"better_by_at_least": "0%"}, "fail"),
    ],
)
def test_a_change_is_judged_with_its_paired_interval(by: float, noise: float, change: dict, outcome: str) -> None:
    verdict = judge(
        gates({"metric": "ne", "change": change}), CLICK, *shifted(by, noise, 0.002 if "%" in str(change) else 0.05)
    )
    found = one(verdict)
    assert (found.outcome, verdict.outcome) == (outcome, outcome)
    assert (found.more_rows is None) == (outcome != "undecided")
    assert (found.candidate, found.serving) == (pytest.approx(0.8 + by), 0.8)
    scale = 0.8 if "%" in str(change) else 1
    assert found.estimate == pytest.approx(by / scale)
    assert found.high - found.estimate == pytest.approx(1.7291 * noise / scale, rel=0.02, abs=1e-12)


def test_more_auc_is_better_and_less_is_worse() -> None:
    gate = {"metric": "auc", "change": {"worse_by_at_most": 0.01}}
    for by, outcome in ((0.1, "pass"), (-0.005, "pass"), (-0.02, "fail")):
        ours = evaluated([line("click", "auc", 0.7 + by, around(0.7, 0.02) + by)])
        verdict = judge(gates(gate), CLICK, ours, evaluated([of("click", "auc", 0.7, 0.02)]))
        assert one(verdict, "auc").outcome == outcome


def test_a_share_of_a_negative_figure_is_of_its_size() -> None:
    gate = {"metric": "r2", "change": {"worse_by_at_most": "10%"}}
    for ours, outcome in ((-0.45, "pass"), (-0.52, "pass"), (-0.6, "fail")):
        lines = [[line("watch", "r2", value, [value] * 4)] for value in (ours, -0.5)]
        verdict = judge(gates(gate), {"watch": "regression"}, evaluated(lines[0]), evaluated(lines[1]))
        assert one(verdict, "r2").outcome == outcome


@pytest.mark.parametrize(
    ("value", "se", "outcome"),
    [(1.0, 0.02, "pass"), (1.08, 0.02, "undecided"), (1.2, 0.02, "fail"), (0.8, 0.02, "fail"), (0.92, 0.02, "undecided"),
     (1.0, 0.5, "undecided")],
)  # fmt: skip
def test_a_band_is_closed_on_both_sides(value: float, se: float, outcome: str) -> None:
    found = evaluated([of("click", "calibration", value, se)])
    verdict = judge(gates({"metric": "calibration", "band": [0.9, 1.1]}), CLICK, found, None)
    assert one(verdict, "calibration").outcome == outcome


@pytest.mark.parametrize(
    ("value", "se", "more", "outcome"),
    [
        (0.9, 0.01, {}, "pass"),
        (0.99, 0.01, {}, "undecided"),
        (1.01, 0.01, {}, "undecided"),
        (1.09, 0.01, {}, "fail"),
        (1.0, 0.0, {}, "fail"),
        (1.09, 0.01, {"allow_ne_above_one": True}, "pass"),
        (None, None, {}, "fail"),
        (None, None, {"gates": [{"metric": "ne", "max": 0.99, "missing": "pass"}]}, "pass"),
        (None, None, {"gates": [{"metric": "ne", "slice": "device=a", "max": 0.99, "missing": "pass"}]}, "fail"),
        (None, None, {"allow_ne_above_one": True}, "pass"),
        (1.09, 0.01, {"gates": [{"metric": "ne", "max": 0.99, "missing": "pass"}]}, "fail"),
        (1.09, 0.01, {"gates": [{"metric": "ne", "max": 0.99, "min_rows": 10**6, "below_min_rows": "pass"}]}, "fail"),
        (0.9, 0.01, {"gates": [{"metric": "ne", "max": 0.99, "min_rows": 10**6, "below_min_rows": "pass"}]}, "pass"),
    ],
)
def test_ne_of_1_or_more_never_passes_unless_allowed(
    value: float | None, se: float | None, more: dict, outcome: str
) -> None:
    asked = gates(click={"gates": []} | more)
    assert judge(asked, CLICK, evaluated([of("click", "ne", value, se)]), None).outcome == outcome


def test_two_models_of_ne_above_one_do_not_pass_as_equally_good() -> None:
    gate = {"metric": "ne", "change": {"worse_by_at_most": 0.1}}
    lines = [[of("click", "ne", value, 0.001)] for value in (1.09, 1.02)]
    verdict = judge(gates(gate), CLICK, evaluated(lines[0]), evaluated(lines[1]))
    assert [g.outcome for g in verdict.gates] == ["fail", "fail"]
    assert "not below 1" in verdict.gates[0].why
    allowed = judge(gates({**gate, "allow_ne_above_one": True}), CLICK, evaluated(lines[0]), evaluated(lines[1]))
    assert [g.outcome for g in allowed.gates] == ["pass"]


def test_an_ne_near_1_says_how_many_more_rows_would_decide_that_it_is_not_below() -> None:
    lines = [of("click", "ne", 1.004, 0.01)]
    found = judge(gates({"metric": "ne", "max": 1.5}), CLICK, evaluated(lines), None).gates[0]
    # The bound is at 1 where the standard error is 0.004 / t, and it falls with the square root of the rows.
    more = (student_t.ppf(0.95, 19) * 0.01 / 0.004) ** 2 * 1000 - 1000
    assert (found.outcome, found.more_rows) == ("undecided", pytest.approx(more, abs=1))
    assert found.why.startswith("not below 1, the NE of the base rate: value 1.0040 (0.9867 to 1.0213, each at 95%)")
    assert found.why.endswith(f"; about {found.more_rows:,} more rows would decide")


def test_a_slices_ne_of_one_does_not_pass_by_a_wide_bound() -> None:
    gate = {"metric": "ne", "slices": "device", "max": 1.5}
    lines = [of("click", "ne", value, 0.01, of_slice=f"device={value}") for value in (0.9, 1.005, 1.2)]
    verdict = judge(gates(gate), CLICK, evaluated(lines), None)
    assert [g.outcome for g in verdict.gates if g.slice != "all"] == ["pass", "undecided", "fail"]


def test_predictions_that_are_not_finite_fail_whatever_the_gates_are() -> None:
    lines = [line("click", "non_finite", 3.0, [3.0] * 4), line("click", "ne", None, [None] * 4)]
    verdict = judge(gates({"metric": "ne", "max": 1, "missing": "pass"}), CLICK, evaluated(lines), None)
    assert verdict.outcome == "fail"
    assert [g.why for g in verdict.gates if g.outcome == "fail"] == ["3 predictions are not finite"]


@pytest.mark.parametrize(("most", "judged"), [(1.0, []), (1.5, ["undecided"])])
def test_only_a_bound_of_1_or_less_takes_the_place_of_ne_below_1(most: float, judged: list[str]) -> None:
    verdict = judge(gates({"metric": "ne", "max": most}), CLICK, evaluated([of("click", "ne", 0.99, 0.05)]), None)
    assert [g.outcome for g in verdict.gates[1:]] == judged
    assert (len(verdict.gates), verdict.outcome) == (1 + len(judged), "undecided")


def test_an_ne_above_1_without_an_interval_fails_on_as_many_rows_as_are_asked_for() -> None:
    gate = {"metric": "ne", "change": {"worse_by_at_most": 5}, "min_rows": 10}
    found = [evaluated([of("click", "ne", 1.2)]) for _ in range(2)]
    assert one(judge(gates(gate), CLICK, *found)).outcome == "fail"
    gate.pop("min_rows")
    assert one(judge(gates(gate), CLICK, *found)).outcome == "undecided"


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        ([], [("ne", 0.8)], "no rows, or too few for a slice (min_rows and top of the evaluation)"),
        ([("ne", None)], [("ne", 0.8)], "undefined on these rows"),
        ([("ne", math.nan)], [("ne", 0.8)], "undefined on these rows"),
        ([("ne", 0.8)], [("ne", None)], "undefined for the serving checkpoint"),
        ([("ne", 0.8)], [], "undefined for the serving checkpoint"),
        ([("ne", 0.8)], [("ne", 0.0)], "the relative change is undefined"),
    ],
)
@pytest.mark.parametrize("missing", ["fail", "pass"])
def test_what_is_missing_fails_unless_allowed(ours: list, theirs: list, why: str, missing: str) -> None:
    gate = {
        "metric": "ne",
        "slice": "device=mobile",
        "change": {"worse_by_at_most": "1%"},
        "min_rows": 9,
        "missing": missing,
    }
    both = [
        evaluated(
            [of("click", "ne", 0.8, 0.01), *(of("click", m, v, 0.01, of_slice="device=mobile") for m, v in lines)]
        )
        for lines in (ours, theirs)
    ]
    found = one(judge(gates(gate), CLICK, *both), of_slice="device=mobile")
    assert (found.outcome, found.why) == (missing, why)


def test_a_pattern_that_covers_no_slice_is_missing_once() -> None:
    verdict = judge(
        gates({"metric": "ne", "slices": ["os=*"], "max": 0.9}), CLICK, evaluated([of("click", "ne", 0.8, 0.01)]), None
    )
    found = one(verdict, of_slice="os=*")
    assert (found.outcome, found.why) == (
        "fail",
        "no rows, or too few for a slice (min_rows and top of the evaluation)",
    )


@pytest.mark.parametrize(
    ("slices", "covered"),
    [
        ("device", ["device=a", "device=b"]),
        ("device=*", ["device=a", "device=b"]),  # and not their crosses
        ("device, os", ["device=a, os=i", 'device="c, d", os=i']),
        ("device=*, os=*", ["device=a, os=i", 'device="c, d", os=i']),
        ("*=a, *", ["device=a, os=i"]),
        ('device="c*, os=i', ['device="c, d", os=i']),
        ("*=b*", ["device=b"]),
        (["device=a", "hour"], ["device=a", "hour=13"]),
        ("*", ["device=a", "device=b", "device=a, os=i", 'device="c, d", os=i', "hour=13"]),
        ("device=[ab]", ["device=[ab]"]),
    ],
)
def test_every_slice_that_is_covered_is_judged_by_itself(slices: object, covered: list[str]) -> None:
    names = ["all", "device=a", "device=b", "device=a, os=i", 'device="c, d", os=i', "hour=13"]
    names += covered if covered == ["device=[ab]"] else []
    lines = [
        of("click", "ne", 1.2 if name == "device=b" else 0.8, 0.01, of_slice=name)
        | ({"dimension": "device, os"} if "os" in name else {})
        for name in names
    ]
    verdict = judge(gates({"metric": "ne", "slices": slices, "max": 0.99}), CLICK, evaluated(lines), None)
    found = [g for g in verdict.gates if g.gate == "ne at most 0.99"]
    assert [g.slice for g in found] == covered
    assert [g.outcome for g in found] == ["fail" if name == "device=b" else "pass" for name in covered]


@pytest.mark.parametrize(
    ("rows", "se", "more", "outcome", "missing_rows"),
    [
        (99, 0.01, {"min_rows": 100}, "undecided", 1),
        (100, 0.01, {"min_rows": 100}, "pass", None),
        (99, 0.01, {"min_rows": 100, "below_min_rows": "pass"}, "pass", None),
        (99, None, {"min_rows": 100}, "undecided", 1),
        (100, None, {"min_rows": 100}, "pass", None),  # a metric without intervals: the value, on rows enough
        (100, None, {}, "undecided", None),
    ],
)
def test_too_few_rows_leave_a_gate_undecided(
    rows: int, se: float | None, more: dict, outcome: str, missing_rows: int | None
) -> None:
    lines = [of("click", "auc", 0.8, se, rows=rows)]
    found = one(judge(gates({"metric": "auc", "min": 0.7, **more}), CLICK, evaluated(lines), None), "auc")
    assert (found.outcome, found.more_rows) == (outcome, missing_rows)


def test_counts_are_judged_without_an_interval() -> None:
    gate = {"metric": "positives", "min": 100}
    for value, outcome in ((100.0, "pass"), (99.0, "fail")):
        verdict = judge(gates(gate), CLICK, evaluated([of("click", "positives", value, 30.0)]), None)
        assert one(verdict, "positives").outcome == outcome


def test_without_a_serving_checkpoint_only_absolute_bounds_decide() -> None:
    asked = gates(
        {"metric": "ne", "change": {"worse_by_at_most": 0.002}}, {"metric": "calibration", "band": [0.9, 1.1]}
    )
    lines = [of("click", "ne", 0.8, 0.01), of("click", "calibration", 1.5, 0.01)]
    verdict = judge(asked, CLICK, evaluated(lines), None)
    assert one(verdict).why == "no serving checkpoint to compare with yet"
    assert (one(verdict).outcome, one(verdict, "calibration").outcome) == ("pass", "fail")


def test_default_gates_hold_for_tasks_that_have_the_metric_and_drop_them() -> None:
    kinds = {"click": "binary", "buy": "binary", "watch": "regression"}
    lines = [of("click", "ne", 0.8, 0.01), of("buy", "ne", 0.8, 0.01), of("watch", "nrmse", 0.8, 0.01)]
    asked = gates({"metric": "ne", "max": 0.7}, {"metric": "nrmse", "max": 0.7}, buy={"default": False, "gates": []})
    verdict = judge(asked, kinds, evaluated(lines), None)
    assert [(g.task, g.metric, g.outcome) for g in verdict.gates] == [
        ("click", "ne", "fail"), ("buy", "ne", "pass"), ("watch", "nrmse", "fail")
    ]  # fmt: skip
    built_in = judge(default_gates(kinds, 0.002), kinds, evaluated(lines), evaluated(lines))
    assert [g.gate for g in built_in.gates] == [
        "ne worse by at most 0.002", "ne at most 1", "ne worse by at most 0.002", "ne at most 1", "nrmse worse by at most 0.002"
    ]  # fmt: skip
    assert (built_in.outcome, built_in.exit_code) == ("pass", 0)


def test_evaluations_of_other_rows_or_tasks_are_refused() -> None:
    asked = gates({"metric": "ne", "change": {"worse_by_at_most": 0.002}})
    ours = evaluated([of("click", "ne", 0.8, 0.01)])
    with pytest.raises(UserError, match="not evaluated on the same rows"):
        judge(asked, CLICK, ours, evaluated([of("click", "ne", 0.8, 0.01)], split="valid"))
    with pytest.raises(UserError, match="on the tasks buy, not on click"):
        judge(asked, CLICK, ours, evaluated([of("buy", "ne", 0.8, 0.01)]))
    check_same_tasks({"a": "binary", "b": "binary"}, {"a": "binary", "b": "binary"}, "x", "y")
    for other in ({"b": "binary", "a": "binary"}, {"a": "binary"}, {"a": "binary", "b": "regression"}):
        with pytest.raises(UserError, match=r"x predicts a \(binary\), b \(binary\); y predicts"):
            check_same_tasks({"a": "binary", "b": "binary"}, other, "x", "y")


@pytest.mark.parametrize(("values", "code"), [((0.5, 0.6), 0), ((0.5, 0.9), 3), ((0.9, 0.99), 2), ((0.5, 0.99), 2)])
def test_the_worst_gate_is_the_verdict_and_its_exit_code(values: tuple[float, float], code: int) -> None:
    kinds = {"click": "binary", "buy": "binary"}
    lines = [of(task, "ne", value, 0.02) for task, value in zip(kinds, values, strict=True)]
    verdict = judge(gates({"metric": "ne", "max": 0.91}), kinds, evaluated(lines), None)
    assert verdict.exit_code == code
    content = json.loads(json.dumps(asdict(verdict), allow_nan=False))
    assert content["outcome"] == {0: "pass", 3: "undecided", 2: "fail"}[code]
    first = table(verdict).splitlines()[2].split()[0]
    assert first.lower() == content["outcome"]
    assert verdict.line.startswith(content["outcome"])
