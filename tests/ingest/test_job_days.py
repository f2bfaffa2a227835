"""Days that become datasets of their own, and until when the outcomes of a log are complete."""

import json
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from ingest_runs import content_of, refused, rows_by_id, run, values_of

from features.errors import UserError
from pipeline.dataset.dataset import Dataset

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

FIRST = date(2026, 3, 1)


def day_content(**click: Any) -> dict[str, Any]:
    outcome = {"files": "clicks-{date}.csv", "key": "id", "time": "when", "window": "1d", **click}
    return {
        "source": {"files": "log-{date}.csv", "key": "id", "row_id": "id", "outcomes": {"click": outcome}},
        "categorical": {"city": {}},
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
    }


def midnight(number: int) -> int:
    """When a day begins."""
    return int(datetime.combine(FIRST, time(), timezone.utc).timestamp()) + 86_400 * number


def day_rows(number: int) -> list[tuple[int, int, str]]:
    """Ten rows of a day: id, time, city."""
    return [(100 * number + i, midnight(number) + 8_000 * i, f"city {i % 3 + number}") for i in range(10)]


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


def test_days_become_datasets_of_their_own_with_the_encoders_of_the_first(days, tmp_path):
    out = tmp_path / "out"
    for number in range(3):
        day = FIRST + timedelta(days=number)
        manifest = run(days, out, day_content(), date=day)
        assert manifest.complete_until == {"click": midnight(number + 2)}
        folder = out / str(day)
        found = rows_by_id(folder)
        assert [(row["row_id"], row["event_time"]) for row in found] == [(k, at) for k, at, _ in day_rows(number)]
        # Clicks of the next day are found too, as far as the window reaches; one after two days is too late.
        assert [row["label.click"] for row in found] == [float(i in (0, 2, 3, 4, 6, 8)) for i in range(10)]
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
    assert "source.files is log-*.csv: put {date} where" in refused(days, out, content, date=FIRST)
    for click in ({"window": None}, {"late": "keep"}):
        message = refused(days, out, day_content(**click), date=FIRST)
        assert "outcome click may be in any later day" in message
    undated = day_content(files="clicks-*.csv")
    assert "the files of outcome click have no {date}. Set as_of=" in refused(days, out, undated, date=FIRST)
    message = refused(days, out, day_content(), date="2026-04-01")
    assert "log-{date}.csv: no such file of 2026-04-01" in message


def test_outcomes_in_files_without_days_need_no_window(days, tmp_path):
    content = day_content(files="clicks-*.csv", window=None)
    manifest = run(days, tmp_path / "out", content, date=FIRST)
    assert manifest.read["click"] == 21
    # With no window the click after two days counts as well.
    labels = [row["label.click"] for row in rows_by_id(tmp_path / "out" / str(FIRST))]
    assert labels == [float(i in (0, 2, 3, 4, 5, 6, 8)) for i in range(10)]


def test_without_clicks_of_days_to_come_labels_are_known_as_far_as_there_are_clicks(days, tmp_path):
    (days / f"clicks-{FIRST + timedelta(days=1)}.csv").unlink()
    manifest = run(days, tmp_path / "out", day_content(), date=FIRST)
    assert manifest.read["click"] == 5
    assert manifest.complete_until == {"click": midnight(1)}
    # The first row's window of a day ends at midnight; all others' were still open when the log ended.
    labels = [row["label.click"] for row in rows_by_id(tmp_path / "out" / str(FIRST))]
    assert labels == [1.0] + [None] * 9
    for number in range(2, 9):
        (days / f"clicks-{FIRST + timedelta(days=number)}.csv").unlink(missing_ok=True)
    message = refused(days, tmp_path / "more", day_content(), date=FIRST + timedelta(days=1))
    assert "clicks-{date}.csv: no such file of 2026-03-02 to 2026-03-0" in message


def test_days_are_not_put_into_a_dataset(days, tmp_path):
    out = tmp_path / "out"
    run(days, out, day_content())
    before = content_of(out)
    assert f"{out} is a dataset itself" in refused(days, out, day_content(), date=FIRST)
    assert content_of(out) == before


def test_only_a_first_day_needs_rows_to_train_on_and_every_day_some_rows(days, tmp_path):
    content = day_content()
    content["split"] = {"by": "time", "valid_from": str(FIRST + timedelta(days=1)), "test_from": "2026-03-09"}
    out = tmp_path / "out"
    out.mkdir()
    assert "split train is empty: none of 10 rows" in refused(days, out, content, date=FIRST + timedelta(days=1))
    assert run(days, out, content, date=FIRST).rows == {"train": 10, "valid": 0, "test": 0}
    manifest = run(days, out, content, date=FIRST + timedelta(days=1))
    assert manifest.rows == {"train": 0, "valid": 10, "test": 0}
    (days / f"log-{FIRST + timedelta(days=2)}.csv").write_text("id,at,city\n")
    before = content_of(out)
    with pytest.raises(UserError, match="no rows are left"):
        run(days, out, content, date=FIRST + timedelta(days=2))
    assert content_of(out) == before


# Until when outcomes are complete


def labelled_rows(log: Path, out: Path, content: dict[str, Any], **settings: Any) -> list[tuple[int, bool]]:
    """Of all days each row's time, and whether its label is known."""
    run(log, out, content, **settings)
    found = [(row["event_time"], row["label.click"] is not None) for row in rows_by_id(out)]
    assert len(found) == 30
    return found


def closed_by(end: int) -> list[tuple[int, bool]]:
    """The same where a window of a day is closed for rows up to `end`."""
    return [(at, at + 86_400 <= end) for number in range(3) for _, at, _ in day_rows(number)]


def test_a_log_is_complete_until_its_last_joined_click_or_as_it_is_told(days, tmp_path):
    """Neither a click of no row nor one with a wrong clock says that the log is complete until then."""
    last = day_rows(2)[3][1] + 23 * 3600
    with (days / f"clicks-{FIRST + timedelta(days=4)}.csv").open("a") as file:
        file.write(f"77777,{last + 9_999}\n100,4102444800\n")
    assert labelled_rows(days, tmp_path / "default", day_content()) == closed_by(last)
    assert Dataset(tmp_path / "default").manifest.complete_until == {"click": last}
    for number in (2, 9):
        out = tmp_path / str(number)
        told = str(FIRST + timedelta(days=number))
        assert labelled_rows(days, out, day_content(), as_of=told) == closed_by(midnight(number))
        assert Dataset(out).manifest.complete_until == {"click": midnight(number)}


def test_a_log_without_a_joined_click_is_complete_until_its_last_impression(days, tmp_path):
    for path in days.glob("clicks-*"):
        path.write_text("id,when\n77777,4102444800\n")
    last = day_rows(2)[-1][1]
    assert labelled_rows(days, tmp_path / "out", day_content(), min_joined=0) == closed_by(last)
    assert Dataset(tmp_path / "out").manifest.complete_until == {"click": last}


def test_each_outcome_is_complete_until_a_time_of_its_own_and_told_ones_all_until_one(days, tmp_path):
    content = day_content()
    buy = {"files": "buys.csv", "key": "id", "time": "when", "window": "1h"}
    content["source"]["outcomes"] |= {"buy": buy, "share": buy | {"open_window": "keep"}}
    content["tasks"]["buy"] = {"kind": "binary", "label": "buy"}
    rows = [row for number in range(3) for row in day_rows(number)]
    (days / "buys.csv").write_text(f"id,when\n{rows[14][0]},{rows[14][1] + 5}\n")
    ends = {"click": day_rows(2)[3][1] + 23 * 3600, "buy": rows[14][1] + 5}
    assert run(days, tmp_path / "own", content).complete_until == ends  # and for open_window: keep it does not matter
    found = [(row["label.click"] is not None, row["label.buy"] is not None) for row in rows_by_id(tmp_path / "own")]
    assert found == [(at + 86_400 <= ends["click"], at + 3600 <= ends["buy"]) for _, at, _ in rows]
    told = run(days, tmp_path / "told", content, as_of=str(FIRST + timedelta(days=2)))
    assert told.complete_until == dict.fromkeys(ends, midnight(2))
    found = [(row["label.click"] is not None, row["label.buy"] is not None) for row in rows_by_id(tmp_path / "told")]
    assert found == [(at + 86_400 <= midnight(2), at + 3600 <= midnight(2)) for _, at, _ in rows]


def test_rows_whose_window_is_open_can_be_left_out(days, tmp_path):
    manifest = run(days, tmp_path / "left", day_content(open_window="leave_out"), as_of=str(FIRST + timedelta(days=2)))
    kept = [at for at, closed in closed_by(midnight(2)) if closed]
    assert [row["event_time"] for row in rows_by_id(tmp_path / "left")] == kept
    assert manifest.left_out == {"window of click still open": 30 - len(kept)}
