"""Gates on a day's data: each is violated by what it is for, and by nothing just within it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.release import data_checks
from pipeline.release.config import DataGates
from pipeline.release.data_checks import Checked, check_data, rows_of_nights
from pipeline.release.night import Night, Step

LINE = {"feature": "city", "psi": 0.1, "chance": 0.02, "missing": 0.1, "missing_before": 0.1, "unknown": None,
        "unknown_before": None}  # fmt: skip


def checked_day(
    gates: DataGates,
    monkeypatch: pytest.MonkeyPatch,
    drift: dict[str, Any] | None = None,
    base_rate: float | None = 0.2,
    rows_before: tuple[int, ...] = (),
    absent: int = 0,
    rows: int = 1000,
) -> Checked:
    """A day whose base rate was 0.2 in training."""

    def task(mean: float | None) -> dict[str, Any]:
        return {
            "click": {"kind": "binary", "mean": mean},
            "dwell": {"kind": "regression", "mean": mean and -100 * mean},
        }

    cards = {"day": {"tasks": task(base_rate), "drift": [LINE | (drift or {})]}, "reference": {"tasks": task(0.2)}}
    monkeypatch.setattr(data_checks, "read_card", lambda path, schema: cards[path.name])
    manifest = SimpleNamespace(
        rows={"train": rows - 100, "test": 100},
        read={"impressions": 1000},
        absent_columns={"impressions": {"os": absent}},
    )
    day, reference = (
        SimpleNamespace(path=Path(name), encoded_by=Path(name), schema=None, manifest=manifest) for name in cards
    )
    return check_data(gates, day, reference, rows_before)


def violations(gates: DataGates, monkeypatch: pytest.MonkeyPatch, **of_day: Any) -> list[str]:
    return checked_day(gates, monkeypatch, **of_day).violations


@pytest.mark.parametrize(
    ("within", "beyond", "words"),
    [
        (
            {"drift": {"psi": 0.519}},
            {"drift": {"psi": 0.521}},
            r"city: drift, PSI 0\.501 above chance \(allowed: 0\.5\)",
        ),
        ({"drift": {"missing": 0.3}}, {"drift": {"missing": 0.31}}, r"city: 31\.0% missing values, 10\.0% in training"),
        (
            {"drift": {"unknown": 0.39, "unknown_before": 0.1}},
            {"drift": {"unknown": 0.41, "unknown_before": 0.1}},
            r"city: 41\.0% unseen ids, 10\.0% in training",
        ),
        ({"base_rate": 0.1}, {"base_rate": 0.099}, r"click: base rate 0\.099, in training 0\.2"),
        ({"base_rate": 0.4}, {"base_rate": 0.401}, r"click: base rate 0\.401"),
        (
            {"rows_before": (500, 9, 90_000)},
            {"rows_before": (499, 9, 90_000)},
            "rows: 1,000, the median of the last 3 nights",
        ),
        ({"rows_before": (2000,)}, {"rows_before": (2001,)}, "rows: 1,000, the median of the last 1 nights is 2,001"),
        ({"absent": 200}, {"absent": 201}, "impressions: column os is absent from the files of 20% of the rows"),
    ],
)
def test_a_gate_is_violated_beyond_its_threshold_and_not_within(monkeypatch, within, beyond, words):
    assert violations(DataGates(), monkeypatch, **within) == []
    found = violations(DataGates(), monkeypatch, **beyond)
    assert len(found) == 1
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found[0])


def test_a_gate_that_is_none_is_not_judged(monkeypatch):
    bad = {"psi": 9.0, "missing": 1.0, "unknown": 1.0, "unknown_before": 0.0}
    given = {"drift": bad, "base_rate": 0.9, "rows_before": (1,), "absent": 1000}
    assert len(violations(DataGates(), monkeypatch, **given)) == 6
    off = DataGates(psi=None, missing=None, unknown=None, absent=None, base_rate=None, rows=None)
    assert violations(off, monkeypatch, **given) == []


def test_a_task_that_has_no_observed_label_any_more_violates_the_gate_of_its_base_rate(monkeypatch):
    assert violations(DataGates(), monkeypatch, base_rate=None) == [
        "click: no observed label, in training their mean is 0.2",
        "dwell: no observed label, in training their mean is -20",
    ]
    assert violations(DataGates(base_rate=None), monkeypatch, base_rate=None) == []


def test_nights_of_unusual_rows_do_not_make_them_usual(monkeypatch):
    nights: list[Night] = []
    for number, rows in enumerate([1000, 1000, *[300] * 6, 1000], 1):
        date = f"2026-11-0{number}"
        found = checked_day(DataGates(), monkeypatch, rows=rows, rows_before=rows_of_nights(nights, date, most=7))
        assert (found.refused, found.unusual_rows) == (rows == 300, rows == 300)
        step = Step(name="check", state="done", started=0.0, inputs="", summary=found.model_dump())
        nights.append(Night(date=date, settings={}, steps=[step]))
    found = checked_day(DataGates(action="warn"), monkeypatch, rows=300, rows_before=(1000,))
    assert (found.refused, found.unusual_rows) == (False, True)
    found = checked_day(DataGates(), monkeypatch, base_rate=0.9)
    assert (found.refused, found.unusual_rows) == (True, False)


def test_only_the_nights_before_a_date_count(monkeypatch):
    def night(date: str, rows: int | None) -> Night:
        summary = {} if rows is None else Checked(rows=rows, violations=[]).model_dump()
        state = "failed" if rows is None else "done"
        return Night(
            date=date, settings={}, steps=[Step(name="check", state=state, started=0.0, inputs="", summary=summary)]
        )

    nights = [night(f"2026-11-0{n}", n) for n in range(1, 8)] + [night("2026-11-08", None)]
    assert rows_of_nights(nights, "2026-11-06", most=3) == [3, 4, 5]
    assert rows_of_nights(nights, "2026-11-09", most=2) == [6, 7]
    assert rows_of_nights(nights, "canary", most=9) == [1, 2, 3, 4, 5, 6, 7]
    assert rows_of_nights([], "2026-11-06", most=3) == []
