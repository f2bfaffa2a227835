"""The trend over nights, and the alarm that the serving model decays."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from pipeline.release.night import Figure, ModelReference, Night, Scored, Step
from pipeline.release.trend import decay, table, trend
from pipeline.storage.files import make_folder, write_json

SE = 0.002


def write_night(
    out: Path,
    date: str,
    ne: float | None,
    checkpoint="a",
    se: float | None = SE,
    outcome="pass",
    judged=0.0,
    metric="ne",
) -> None:
    """A night whose serving checkpoint has this NE."""

    def scored(value: float | None) -> dict:
        model = ModelReference(run="/runs/r", step=1, checkpoint=checkpoint)
        reach = None if value is None or se is None else 2 * se
        ends = {} if reach is None else {"low": value - reach, "high": value + reach}
        figure = Figure(metric=metric, value=value, se=se, rows=100, **ends)
        return Scored(model=model, day="d", file="f", figures={"click": figure}).model_dump()

    steps = [
        Step(name=f"evaluate {role}", state="done", started=0.0, inputs="i", summary=scored(value))
        for role, value in (("candidate", 0.7), ("serving", ne))
    ]
    night = Night(date=date, settings={}, steps=steps, outcome=outcome, why="why", judged=judged)
    write_json(make_folder(out / date) / "night.json", night.model_dump())


def alarms(out: Path, **settings: float) -> list[tuple[str, str]]:
    return [(night.date, alarm.task) for night in trend(out, **settings).nights for alarm in night.alarms]


def test_z_is_that_of_two_samples():
    first = [Figure(metric="ne", value=v, se=s, rows=1) for v, s in ((0.80, 0.01), (0.82, 0.02))]
    mean, z = decay(first, Figure(metric="ne", value=0.85, se=0.03, rows=1))
    assert mean == pytest.approx(0.81)
    assert z == pytest.approx((0.85 - 0.81) / math.sqrt(0.03**2 + (0.01**2 + 0.02**2) / 4))
    assert decay(first, Figure(metric="ne", value=0.85, se=None, rows=1)) is None
    assert decay([], first[0]) is None


def test_a_serving_model_that_is_worse_than_on_its_first_nights_raises_an_alarm(tmp_path):
    for number, ne in enumerate((0.80, 0.801, 0.799, 0.800, 0.82, 0.70)):
        write_night(tmp_path, f"2026-11-0{number + 1}", ne)
    write_night(tmp_path, "2026-11-07", 0.9, checkpoint="b")  # another model: its own first night
    assert alarms(tmp_path) == [("2026-11-05", "click")]
    assert alarms(tmp_path, first_nights=6) == []
    [alarm] = trend(tmp_path).nights[4].alarms
    assert (alarm.first, alarm.now) == (pytest.approx(0.8), 0.82)
    assert "ne of the serving model (/runs/r step 1) is 0.8200, on its first nights 0.8000" in str(alarm)


def test_every_night_after_the_first_ones_is_compared_with_these(tmp_path):
    for number, ne in enumerate((0.80, 0.80, 0.80, 0.82, 0.82, 0.82, 0.82)):
        write_night(tmp_path, f"2026-11-0{number + 1}", ne)
    assert [date for date, _ in alarms(tmp_path)] == [f"2026-11-0{number}" for number in (4, 5, 6, 7)]


def write_pointer(out: Path, *blessed: tuple[str, str]) -> None:
    """A serving.json with these checkpoints and the nights that blessed them, the newest first."""
    entries = [
        {"run": "/runs/r", "step": 1, "checksum": checkpoint, "night": night, "verdict": "pass", "time": 0.0}
        for checkpoint, night in blessed
    ]
    write_json(out / "serving.json", entries[0] | {"version": 1, "earlier": entries[1:], "withdrawn": []})


@pytest.mark.parametrize("pointer", [[("a", "2026-11-10")], [("b", "2026-11-20"), ("a", "2026-11-10")], []])
def test_late_days_that_the_model_may_have_been_trained_on_are_not_its_first_nights(tmp_path, pointer):
    late = [(f"2026-11-{day:02}", 0.78, 9.0) for day in (2, 3, 10)]
    for date, ne, judged in (*late, *((f"2026-11-{day}", 0.80, float(day - 10)) for day in range(11, 15))):
        write_night(tmp_path, date, ne, judged=judged)
    if pointer:
        write_pointer(tmp_path, *pointer)
    assert alarms(tmp_path) == []
    write_night(tmp_path, "2026-11-15", 0.82, judged=10.0)
    write_night(tmp_path, "2026-11-04", 0.84, judged=11.0)
    # Only where nothing is known but the order of judging a day before these may raise one.
    assert alarms(tmp_path) == [*([] if pointer else [("2026-11-04", "click")]), ("2026-11-15", "click")]


def test_late_days_that_were_judged_first_are_not_the_first_nights_of_a_blessed_model(tmp_path, caplog):
    for number in range(2, 9):
        write_night(tmp_path, f"2026-11-0{number}", 0.78 if number < 5 else 0.80)
    assert len(alarms(tmp_path)) == 4
    write_pointer(tmp_path, ("a", "2026-11-04"))
    assert alarms(tmp_path) == []
    (tmp_path / "serving.json").write_text("{")
    assert len(alarms(tmp_path)) == 4
    assert "alarms go by the order of judging" in caplog.text


def test_first_nights_of_another_metric_are_not_compared_with(tmp_path):
    for number, metric in enumerate(("rmse", "rmse", "ne", "ne")):
        write_night(tmp_path, f"2026-11-0{number + 1}", 0.1 if metric == "rmse" else 0.8, metric=metric)
    assert alarms(tmp_path) == []
    assert alarms(tmp_path, first_nights=2) == []


def test_the_share_of_false_alarms_is_what_the_confidence_allows(tmp_path):
    rng = np.random.default_rng(0)
    now, first = rng.normal(0.8, SE, 4000), rng.normal(0.8, SE, (4000, 3))
    limit = norm.ppf(0.95)
    found = [
        decay(
            [Figure(metric="ne", value=v, se=SE, rows=1) for v in values], Figure(metric="ne", value=v, se=SE, rows=1)
        )[1]
        > limit
        for v, values in zip(now.tolist(), first.tolist(), strict=True)
    ]
    assert np.mean(found) == pytest.approx(0.05, abs=0.012)


def test_nights_without_figures_and_damaged_ones_do_not_stop_it(tmp_path, caplog):
    write_night(tmp_path, "2026-11-02", 0.8)
    write_night(tmp_path, "2026-11-01", None, se=None)
    write_night(tmp_path, "2026-11-03", 0.8, outcome=None)  # not judged yet
    (make_folder(tmp_path / "2026-11-04") / "night.json").write_text("{")
    found = trend(tmp_path)
    assert [night.date for night in found.nights] == ["2026-11-01", "2026-11-02"]
    assert "left out: " in caplog.text
    assert found.tasks == ["click"]
    lines = table(found).splitlines()
    assert lines[2].split()[:2] == ["2026-11-01", "pass"]
    assert lines[2].split()[-1] == "-"
    assert lines[3].split()[-3:] == ["0.8000", "±", f"{2 * SE:.4f}"]


def test_a_folder_without_nights_has_an_empty_trend(tmp_path):
    assert trend(tmp_path).nights == []
