"""Days that become datasets of their own, and until when the outcomes of a log are complete."""

import json
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from job_bench import content_of, no_beam, refused, rows_by_id, run, values_of

from features.errors import UserError
from pipeline.dataset import Dataset

FIRST = date(2026, 3, 1)


@pytest.fixture(scope="module", autouse=True)
def steps_alone() -> Iterator[None]:
    with no_beam():
        yield


def day_content(**click: Any) -> dict[str, Any]:
    outcome = {"files": "clicks-{date}.csv", "key": "id", "time": "when", "window": "1d", **click}
    return {
        "source": {"files": "log-{date}.csv", "key": "id", "row_id": "id", "outcomes": {"click": outcome}},
        "categorical": {"city": {}},
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
    }


def day_rows(number: int) -> list[tuple[int, int, str]]:
    """Ten rows of a day: id, time, city."""
    start = int(datetime.combine(FIRST, datetime.min.time(), timezone.utc).timestamp()) + 86_400 * number
    return [(100 * number + i, start + 8_000 * i, f"city {i % 3 + number}") for i in range(10)]


@pytest.fixture
def days(tmp_path) -> Path:
    """Three days; row i of a day is clicked 3 h later if it is even, 23 h later at 3 and two days later at 5."""
    folder = tmp_path / "days"
    folder.mkdir()
    clicks: dict[date, list[tuple[int, int]]] = {FIRST + timedelta(days=n): [] for n in range(5)}
    for number in range(3):
        rows = day_rows(number)
        lines = "".join(f"{key},{at},{city}\n" for key, at, city in rows)
        (folder / f"log-{FIRST + timedelta(days=number)}.csv").write_text("id,at,city\n" + lines)
        hours = {0: 3, 2: 3, 4: 3, 6: 3, 8: 3, 3: 23, 5: 48}
        for i, wait in hours.items():
            when = rows[i][1] + 3600 * wait
            clicks[datetime.fromtimestamp(when, timezone.utc).date()].append((rows[i][0], when))
    for day, found in clicks.items():
        text = "".join(f"{key},{when}\n" for key, when in found)
        (folder / f"clicks-{day}.csv").write_text("id,when\n" + text)
    return folder


def click_times(days: Path, number: int) -> list[int]:
    lines = (days / f"clicks-{FIRST + timedelta(days=number)}.csv").read_text().split()[1:]
    return [int(line.split(",")[1]) for line in lines]


def test_days_become_datasets_of_their_own_with_the_encoders_of_the_first(days, tmp_path):
    out = tmp_path / "out"
    for number in range(3):
        manifest = run(days, out, day_content(), date=FIRST + timedelta(days=number))
        folder = out / str(FIRST + timedelta(days=number))
        found = rows_by_id(folder)
        assert [(row["row_id"], row["event_time"]) for row in found] == [(k, at) for k, at, _ in day_rows(number)]
        # Clicks of the next day are found too, as far as the window reaches; one after two days is too late. Where the
        # clicks that there are end before a row's window does, nothing is known of it.
        latest = max(click_times(days, number) + click_times(days, number + 1))
        clicked = [float(i in (0, 2, 3, 4, 6, 8)) for i in range(10)]
        assert [row["label.click"] for row in found] == [
            label if at + 86_400 <= latest else None
            for label, (_, at, _) in zip(clicked, day_rows(number), strict=True)
        ]
        assert manifest.rows["train"] == 10
        assert manifest.read["impressions"] == 10
    assert sorted(path.name for path in out.iterdir()) == [str(FIRST + timedelta(days=n)) for n in range(3)]
    first = out / str(FIRST)
    cities = {value: i for i, value in values_of(first, "city").items()}
    assert set(cities) == {"city 0", "city 1", "city 2"}
    for number in range(3):
        folder = out / str(FIRST + timedelta(days=number))
        assert content_of(folder / "encoders") == content_of(first / "encoders")
        assert [row["city"] for row in rows_by_id(folder)] == [cities.get(city, 1) for _, _, city in day_rows(number)]
    assert "drift" in json.loads((folder / "statistics.json").read_text())
    assert not list(out.rglob("dead_letters"))


def test_only_the_outcomes_of_days_within_the_window_are_read(days, tmp_path):
    read = {}
    for window in ("1h", "1d", "25h", "3d"):
        manifest = run(days, tmp_path / window, day_content(window=window), date=FIRST)
        read[window] = manifest.read["click"]
    clicks = [len((days / f"clicks-{FIRST + timedelta(days=n)}.csv").read_text().splitlines()) - 1 for n in range(5)]
    # A window of a day reaches from the first day's end to the end of the next, and not a second further.
    assert read == {"1h": sum(clicks[:2]), "1d": sum(clicks[:2]), "25h": sum(clicks[:3]), "3d": sum(clicks[:4])}


def test_a_day_can_be_made_again_and_others_stay(days, tmp_path):
    out = tmp_path / "out"
    for number in range(2):
        run(days, out, day_content(), date=FIRST + timedelta(days=number))
    before = content_of(out)
    with pytest.raises(UserError, match="exists"):
        run(days, out, day_content(), date=FIRST)
    run(days, out, day_content(), date=FIRST + timedelta(days=1), overwrite=True)
    assert content_of(out) == before


def test_what_has_no_days_is_refused(days, tmp_path):
    out = tmp_path / "out"
    content = day_content()
    content["source"]["files"] = "log-*.csv"
    assert "log-*.csv, which does not say where a {date} stands" in refused(days, out, content, date=FIRST)
    assert "outcome click has no window" in refused(days, out, day_content(window=None), date=FIRST)
    message = refused(days, out, day_content(), date="2026-04-01")
    assert "log-{date}.csv: no such file" in message


def test_as_of_says_until_when_outcomes_are_complete(days, tmp_path):
    """Without it the latest time of the log does, be it a click's."""
    latest = max(time for number in range(5) for time in click_times(days, number))
    for as_of in (None, FIRST + timedelta(days=2), FIRST + timedelta(days=9)):
        out = tmp_path / str(as_of)
        run(days, out, day_content(), **({"as_of": str(as_of)} if as_of else {}))
        until = latest if as_of is None else datetime.combine(as_of, datetime.min.time(), timezone.utc).timestamp()
        found = rows_by_id(out)
        assert len(found) == 30
        assert [row["label.click"] is None for row in found] == [row["event_time"] + 86_400 > until for row in found]
    run(days, tmp_path / "left", day_content(young="leave_out"), as_of=str(FIRST + timedelta(days=2)))
    kept = [at for n in range(3) for _, at, _ in day_rows(n) if at + 86_400 <= day_rows(2)[0][1]]
    assert [row["event_time"] for row in rows_by_id(tmp_path / "left")] == kept
    manifest = Dataset(tmp_path / "left").manifest
    assert manifest.left_out == {"window of click still open": 30 - len(kept)}
