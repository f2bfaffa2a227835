"""Days without files: what needs them is undecided, as a loop over rows and days finds it; what does not need them is not."""

from datetime import date, datetime, time, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_runs import rows_by_id, run, values_of

from features.schema.schema import Schema
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.past_state import state_lines
from pipeline.dataset.verify import verify
from pipeline.ingest.absent_days import absent_days, day_of, days_after
from pipeline.ingest.files import RawFile

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

FIRST, DAYS = date(2026, 3, 27), 6  # the clocks of Berlin change on the 29th
HOUR, DAY = 3600, 86_400


def name_of(number: int) -> str:
    return (FIRST + timedelta(days=number)).isoformat()


def midnight(number: int, zone: str = "UTC") -> int:
    return int(datetime.combine(FIRST + timedelta(days=number), time(), ZoneInfo(zone)).timestamp())


def content_for(zone: str = "UTC", **click: Any) -> dict[str, Any]:
    outcome = {"files": "clicks-{date}.csv", "key": "id", "time": "when", "window": "30h", **click}
    return {
        "source": {
            "files": "log-{date}.csv", "key": "id", "row_id": "id", "timezone": zone, "outcomes": {"click": outcome},
        },
        "categorical": {"city": {}},
        "tasks": {"click": {"kind": "binary", "label": "click"}, "long": {"kind": "binary", "label": "CAST(at AS BIGINT) % 2"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
    }  # fmt: skip


Events = dict[int, list[tuple[int, int]]]  # by the number of the day in whose file they are: key, time


def write_log(folder: Path, impressions: Events, clicks: Events) -> None:
    for number, rows in impressions.items():
        lines = "".join(f"{key},{at},c{key % 3}\n" for key, at in rows)
        (folder / f"log-{name_of(number)}.csv").write_text("id,at,city\n" + lines)
    for number, rows in clicks.items():
        lines = "".join(f"{key},{at}\n" for key, at in rows)
        (folder / f"clicks-{name_of(number)}.csv").write_text("id,when\n" + lines)


@st.composite
def logs(draw: st.DrawFn) -> tuple[str, Events, Events]:
    """A zone, impressions and clicks by day, some days of each without a file."""
    zone = draw(st.sampled_from(["UTC", "Europe/Berlin", "America/Los_Angeles"]))
    impressions, clicks = {}, {number: list[tuple[int, int]]() for number in range(DAYS + 3)}
    for number in range(DAYS):
        rows = []
        for place in range(4):
            key, at = 10 * number + place, midnight(number, zone) + draw(st.sampled_from([0, 1, 9, 23])) * HOUR
            rows.append((key, at))
            later = at + draw(st.sampled_from([0, 1, 10, 30, 31])) * HOUR if draw(st.booleans()) else None
            if later is not None:
                day = datetime.fromtimestamp(later, ZoneInfo(zone)).date()
                clicks[(day - FIRST).days].append((key, later))
        impressions[number] = rows
    lost = st.sets(st.integers(0, DAYS - 1), max_size=3)
    for number in draw(lost):
        del impressions[number]
    for number in draw(st.sets(st.integers(0, DAYS + 1), max_size=3)):
        del clicks[number]
    return zone, impressions, clicks


def expected_labels(zone: str, impressions: Events, clicks: Events, window: int, end: int) -> dict[int, float | None]:
    """By a loop: undecided is what still waited when the log ended, or may have its click in a file that is not there."""
    found: dict[int, float | None] = {}
    events = [event for rows in clicks.values() for event in rows]
    for key, at in (row for rows in impressions.values() for row in rows):
        touched = [n for n in range(-3, DAYS + 9) if at < midnight(n + 1, zone) and at + window >= midnight(n, zone)]
        needed = [n for n in touched if min(impressions) <= n < max(clicks)]
        if at + window > end or any(number not in clicks for number in needed):
            found[key] = None
        else:
            found[key] = float(any(k == key and at <= when <= at + window for k, when in events))
    return found


@given(logs(), st.sampled_from([1, 2, 30]))
@settings(max_examples=examples(15), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_what_may_be_in_an_absent_file_is_undecided_as_a_loop_over_days_finds_it(
    log: tuple[str, Events, Events], hours: int
) -> None:
    zone, impressions, clicks = log
    with TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "out"
        write_log(folder, impressions, clicks)
        manifest = run(folder, out, content_for(zone, window=hours * HOUR), min_joined=0)
        end = manifest.complete_until["click"]
        rows = rows_by_id(out)
        expected = expected_labels(zone, impressions, clicks, hours * HOUR, end)
        assert {row["row_id"]: row["label.click"] for row in rows} == expected
        assert all(row["label.long"] is not None for row in rows)  # which reads no click
        assert sum(manifest.undecided.get("click", {}).values()) == sum(label is None for label in expected.values())
        open_rows = sum(at + hours * HOUR > end for rows in impressions.values() for _, at in rows)
        assert manifest.undecided.get("click", {}).get("window still open", 0) == open_rows
        absent = {number for number in range(min(impressions), max(impressions)) if number not in impressions}
        assert days_in(manifest.absent_days.get("impressions", [])) == {name_of(number) for number in absent}
        last = min(max(impressions) + (1 if hours <= 24 else 2), max(clicks))
        absent = {number for number in range(min(impressions), last + 1) if number not in clicks}
        assert days_in(manifest.absent_days.get("click", [])) == {name_of(number) for number in absent}
        list(verify(Dataset(out)))


def days_in(spans: list[str]) -> set[str]:
    found = set()
    for span in spans:
        first, _, last = span.partition("..")
        day = date.fromisoformat(first)
        while day <= date.fromisoformat(last or first):
            found.add(day.isoformat())
            day += timedelta(days=1)
    return found


@pytest.fixture
def log(tmp_path) -> Path:
    """Eight days, each with ten impressions an hour apart from noon on; the first half is clicked an hour later."""
    folder = tmp_path / "log"
    folder.mkdir()
    rows = {n: [(10 * n + i, midnight(n) + (12 + i) * HOUR) for i in range(10)] for n in range(8)}
    clicks = {n: [(key, at + HOUR) for key, at in rows[n][:5]] for n in range(8)}
    write_log(folder, rows, clicks | {8: []})
    return folder


def labels_of(out: Path) -> dict[int, list[float | None]]:
    found: dict[int, list[float | None]] = {}
    for row in rows_by_id(out):
        found.setdefault(row["row_id"] // 10, []).append(row["label.click"])
    return found


HALF = [1.0] * 5 + [0.0] * 5


def test_a_day_of_clicks_that_is_not_there_makes_no_negatives(log, tmp_path):
    (log / f"clicks-{name_of(3)}.csv").unlink()
    manifest = run(log, tmp_path / "out", content_for(window="12h"))
    found = labels_of(tmp_path / "out")
    assert found[3] == [None] * 10
    # A window of twelve hours that begins at noon touches the next midnight's second.
    assert [found[n] for n in (0, 1, 4, 5, 6)] == [HALF] * 5
    assert found[2] == [None] * 10
    assert manifest.absent_days == {"click": [name_of(3)]}
    assert manifest.undecided["click"]["files of a day absent"] == 20


def test_an_outcome_without_a_window_is_undecided_up_to_the_absent_day_or_from_the_one_at_the_end_on(log, tmp_path):
    content = content_for(window=None)
    (log / f"clicks-{name_of(2)}.csv").unlink()
    run(log, tmp_path / "hole", content)
    assert list(labels_of(tmp_path / "hole").values()) == [[None] * 10] * 3 + [HALF] * 5
    for number in (7, 8):
        (log / f"clicks-{name_of(number)}.csv").unlink()
    run(log, tmp_path / "both", content)
    assert list(labels_of(tmp_path / "both").values()) == [[None] * 10] * 3 + [HALF] * 4 + [[None] * 10]


def test_without_an_event_time_the_day_of_a_row_is_that_of_its_file(log, tmp_path):
    content = content_for(window=None, time=None)
    del content["event_time"]
    for number in (1, 7, 8):
        (log / f"clicks-{name_of(number)}.csv").unlink()
    run(log, tmp_path / "out", content, unit_bytes=60)
    assert list(labels_of(tmp_path / "out").values()) == [[None] * 10] * 2 + [HALF] * 5 + [[None] * 10]


def test_rows_of_an_absent_day_can_be_left_out_or_kept_as_if_nothing_had_happened(log, tmp_path):
    (log / f"clicks-{name_of(3)}.csv").unlink()
    left = run(log, tmp_path / "left", content_for(window="1h", open_window="leave_out"))
    assert left.left_out["files of click absent"] == 10
    assert 3 not in labels_of(tmp_path / "left")
    kept = run(log, tmp_path / "kept", content_for(window="1h", open_window="keep"))
    assert labels_of(tmp_path / "kept")[3] == [0.0] * 10
    assert kept.absent_days == {"click": [name_of(3)]}
    assert kept.undecided == {}


def test_days_at_the_end_are_absent_only_where_they_are_said_to_be_complete(log, tmp_path):
    for number in (6, 7, 8):
        (log / f"clicks-{name_of(number)}.csv").unlink()
    told = f"{name_of(8)}T00:00Z"
    ordinary = run(log, tmp_path / "ordinary", content_for(window="1h"))
    assert ordinary.absent_days == {"click": [f"{name_of(6)}..{name_of(7)}"]}
    assert ordinary.undecided["click"].keys() == {"window still open"}
    assert labels_of(tmp_path / "ordinary")[5] == [*HALF[:5], *[None] * 5]  # the last click is that of the fifth
    said = run(log, tmp_path / "said", content_for(window="1h"), as_of=told)
    assert said.absent_days == {"click": [f"{name_of(6)}..{name_of(7)}"]}
    assert list(labels_of(tmp_path / "said").values()) == [HALF] * 6 + [[None] * 10] * 2


def test_a_log_whose_clicks_end_before_its_impressions_begin_has_no_negatives(log, tmp_path):
    for number in range(9):
        (log / f"clicks-{name_of(number)}.csv").unlink()
    (log / f"clicks-{name_of(-3)}.csv").write_text("id,when\n")
    manifest = run(log, tmp_path / "out", content_for())
    assert manifest.complete_until == {"click": midnight(-2)}
    assert all(labels == [None] * 10 for labels in labels_of(tmp_path / "out").values())


def test_a_history_of_rows_without_a_click_leaves_out_those_that_may_have_one(log, tmp_path):
    (log / f"clicks-{name_of(3)}.csv").unlink()
    content = content_for(window="1h")
    content["source"]["derived"] = {"everyone": "'u'"}
    content["bag"] = {
        name: {"max_length": 100, "history": {"user": "everyone", "item": "id", "when": when}}
        for name, when in (("ignored", "NOT click"), ("clicked", "click"))
    }
    manifest = run(log, tmp_path / "out", content)
    last = rows_by_id(tmp_path / "out")[-1]
    ids = {name: sorted(int(values_of(tmp_path / "out", name)[i]) for i in last[name]) for name in content["bag"]}
    assert ids["clicked"] == [10 * n + i for n in range(8) if n != 3 for i in range(5)]
    assert ids["ignored"] == [
        10 * n + i for n in range(8) if n != 3 for i in range(5, 10) if 10 * n + i < 75
    ]  # the window of later ones is open
    (line,) = [line for line in state_lines(manifest.state) if "left out" in line]
    assert manifest.undecided["click"]["files of a day absent"] == 10
    assert f"{manifest.state.undecided['ignored']} of ignored" in line
    assert "its window was still open, or files of a day are absent. Run jobs.preprocess for this dataset again" in line


@pytest.mark.parametrize("as_of", [None, f"{name_of(9)}T00:00Z"])
def test_a_day_by_itself_has_no_labels_that_the_log_read_whole_has_not(log, tmp_path, as_of):
    (log / f"clicks-{name_of(4)}.csv").unlink()
    content = content_for(window="36h")
    run(log, tmp_path / "whole", content, as_of=as_of)
    manifest = run(log, tmp_path / "days", content, date=name_of(3), as_of=as_of)
    assert labels_of(tmp_path / "days" / name_of(3))[3] == labels_of(tmp_path / "whole")[3] == [None] * 10
    assert manifest.absent_days == {"click": [name_of(4)]}
    assert manifest.undecided == {"click": {"files of a day absent" if as_of else "window still open": 10}}
    kept = run(log, tmp_path / "kept", content | {"source": content["source"] | {"outcomes": {
        "click": content["source"]["outcomes"]["click"] | {"open_window": "keep"}}}}, date=name_of(3), as_of=as_of)  # fmt: skip
    assert labels_of(tmp_path / "kept" / name_of(3))[3] == HALF
    assert kept.absent_days == {"click": [name_of(4)]}


@pytest.mark.parametrize("as_of", [None, f"{name_of(9)}T00:00Z"])
def test_a_day_whose_own_outcome_file_is_absent_is_as_in_the_log_read_whole(log, tmp_path, as_of):
    (log / f"clicks-{name_of(3)}.csv").unlink()
    content = content_for(window="36h")
    run(log, tmp_path / "whole", content, as_of=as_of)
    manifest = run(log, tmp_path / "days", content, date=name_of(3), as_of=as_of)
    assert labels_of(tmp_path / "days" / name_of(3))[3] == labels_of(tmp_path / "whole")[3] == [None] * 10
    assert manifest.absent_days == {"click": [name_of(3)]}
    keep = content_for(window="36h", open_window="keep")
    run(log, tmp_path / "kept whole", keep, as_of=as_of)
    run(log, tmp_path / "kept", keep, date=name_of(3), as_of=as_of)
    assert labels_of(tmp_path / "kept" / name_of(3))[3] == labels_of(tmp_path / "kept whole")[3]


def test_with_a_date_days_after_the_last_file_are_the_ordinary_end_or_complete_only_until_as_of(log, tmp_path):
    for number in (4, 5):
        (log / f"clicks-{name_of(number)}.csv").unlink()
    content = content_for(window="12h", files="clicks-{date}.csv")
    manifest = run(log, tmp_path / "out", content, date=name_of(3))
    assert manifest.absent_days == {}
    assert manifest.complete_until == {"click": midnight(4)}
    said = run(log, tmp_path / "said", content, date=name_of(3), as_of=f"{name_of(4)}T00:00Z")
    assert said.absent_days == {}
    assert said.complete_until == {"click": midnight(4)}


# The dates in file names


@pytest.mark.parametrize(
    ("pattern", "path", "day"),
    [
        ("log-{date}.csv", "/x/log-2026-03-01.csv", date(2026, 3, 1)),
        ("{date}/log-*.csv", "/x/2026-03-01/log-2026-03-02.csv", date(2026, 3, 1)),
        ("{date}/log-{date}.csv", "/x/2026-03-01/log-2026-03-01.csv", date(2026, 3, 1)),
        ("{date}/log-{date}.csv", "/x/2026-03-01/log-2026-03-02.csv", None),
        ("**/log-{date}*.csv", "s3://bucket/a/b/log-2026-03-012.csv", date(2026, 3, 1)),
        ("**/{date}.csv", "/2025-01-01/2026-03-01.csv", date(2026, 3, 1)),
        ("log-{date}.csv", "/x/log-20260301.csv", None),
        ("log-{date}.csv", "/x/log-2026-02-30.csv", None),
        ("log-[{date}].csv", "/x/log-2.csv", None),
        ("log-*.csv", "/x/log-2026-03-01.csv", None),
        ("{date}/c*.csv", "/2026-12-31/in/2026-03-01/clicks.csv", date(2026, 3, 1)),
        ("{date}/*", "/2026-12-31/2026-03-01/2026-03-02.csv", date(2026, 3, 1)),
        ("{date}/**/c*.csv", "/2026-12-31/2026-03-01/a/b/clicks.csv", date(2026, 3, 1)),
        ("{date}/**/a/**/c*.csv", "/2026-12-31/2026-03-01/a/b/a/clicks.csv", date(2026, 3, 1)),
        ("{date}/**/c*.csv", "2026-03-01/clicks.csv", date(2026, 3, 1)),
        ("./{date}//c[!a]?-*.csv", "/2026-12-31/2026-03-01/cb1-.csv", date(2026, 3, 1)),
        ("**/".join(["", *["a/"] * 30, "{date}.csv"]), "/2026-12-31" + "/a" * 200 + "/x-2026-03-01.csv", None),
    ],
)
def test_the_day_of_a_file_is_what_stands_in_place_of_the_date(pattern, path, day):
    assert day_of(path, pattern) == day


def test_below_a_folder_whose_name_is_a_date_the_same_days_are_absent(log, tmp_path):
    content = content_for(window="1h", files="{date}/c*.csv")
    content["source"]["files"] = "{date}/log*.csv"
    found = []
    for name in ("plain", "2026-12-31/in"):
        folder = tmp_path / name
        for number in range(8):
            (folder / name_of(number)).mkdir(parents=True)
            for stream in ("log", "clicks")[: 1 if number == 3 else 2]:
                text = (log / f"{stream}-{name_of(number)}.csv").read_text()
                (folder / name_of(number) / f"{stream}.csv").write_text(text)
        found.append(run(folder, folder / "out", content))
        assert labels_of(folder / "out")[3] == [None] * 10
    assert found[0].absent_days == found[1].absent_days == {"click": [name_of(3)]}
    assert found[0].undecided == found[1].undecided


@pytest.mark.parametrize("window", [1, 86_399, 86_400, 86_401, 2 * 86_400, 2 * 86_400 + 1])
def test_outcomes_of_a_days_last_second_may_happen_as_many_days_after_it_as_its_window_reaches(window):
    schema = Schema.parse(content_for(window=f"{window}s"), where="mine.yaml")
    assert days_after(schema.source.outcomes["click"]) == (DAY - 1 + window) // DAY


def spans(content: dict[str, Any], impressions: list[str], clicks: list[str]) -> dict[str, list[str]]:
    schema = Schema.parse(content, where="mine.yaml")
    streams = {
        "impressions": [RawFile(f"/x/log-{day}.csv", 1, "") for day in impressions],
        "click": [RawFile(f"/x/clicks-{day}.csv", 1, "") for day in clicks],
    }
    return absent_days(schema, streams, None).days


def test_days_as_far_apart_as_dates_can_be_are_one_span():
    far = ["0001-01-01", "9999-12-31"]
    absent = "0001-01-02..9999-12-30"
    assert spans(content_for("Asia/Tokyo"), far, far) == {"impressions": [absent], "click": [absent]}


def test_where_only_clicks_have_dates_the_days_between_them_are_known():
    content = content_for()
    content["source"]["files"] = "log-*.csv"
    assert spans(content, ["all"], ["2026-03-01", "2026-03-04", "other"]) == {"click": ["2026-03-02..2026-03-03"]}
    assert spans(content_for(), ["2026-03-01"], ["other"]) == {}
