"""Outcomes that find no impressions stop the job, with what the two sides look like."""

import json
from pathlib import Path
from typing import Any

import pytest
from ingest_runs import refused, rows_by_id, run

from pipeline.ingest import join_check

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

START = 1_772_323_200  # 2026-03-01


def content_for(**click: Any) -> dict[str, Any]:
    outcome = {"files": "clicks*", "key": "id", "time": "when", "window": "1h", **click}
    return {
        "source": {"files": "log*", "key": "id", "row_id": "row", "outcomes": {"click": outcome}},
        "categorical": {"city": {}},
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "row", "valid": 0, "test": 0},
    }


def write(folder: Path, impressions: list[tuple[Any, int]], clicks: list[tuple[Any, int]], day: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    lines = "".join(f"{row},{key},{at},c\n" for row, (key, at) in enumerate(impressions))
    (folder / f"log{day}.csv").write_text("row,id,at,city\n" + lines)
    (folder / f"clicks{day}.csv").write_text("id,when\n" + "".join(f"{key},{when}\n" for key, when in clicks))
    return folder


def impressions(count: int = 20) -> list[tuple[Any, int]]:
    return [(f"a{n}", START + 60 * n) for n in range(count)]


def test_clicks_of_another_key_stop_the_job_with_both_sides(tmp_path):
    clicks = [(f"{n}.0", START + 60 * n) for n in range(5)]
    message = refused(write(tmp_path / "log", impressions(), clicks), tmp_path / "out", content_for())
    assert message == (
        "source.outcomes.click: 0 of 5 rows belong to an impression (5 unmatched). Impressions have keys such as 'a0', 'a1', "
        "'a2', and times 2026-03-01T00:00:00Z to 2026-03-01T00:19:00Z; rows of click without an impression have keys such as "
        "'0', '1', '2', and times 2026-03-01T00:00:00Z to 2026-03-01T00:04:00Z. Keys are compared as text: fix key, or "
        "derive one that both sides have; if the log is right, set min_joined below 0.5 (0: no check)."
    )


def test_outcomes_that_are_all_bad_stop_the_job_even_where_bad_rows_are_allowed(tmp_path):
    folder = write(tmp_path / "log", impressions(), [(key, at * 1000) for key, at in impressions(7)])
    message = refused(folder, tmp_path / "out", content_for(), max_bad_fraction=1)
    assert message.startswith("source.outcomes.click: all of its 7 rows are bad, so no impression has one.")
    assert "the first: " in refused(folder, tmp_path / "out", content_for(), max_bad_fraction=0)
    manifest = run(folder, tmp_path / "out", content_for(), max_bad_fraction=1, min_joined=0)
    assert sum(manifest.dead_letters.values()) == 7


@pytest.mark.parametrize(
    ("shift", "status", "advice"), [(7200, "late", "or the window"), (-7200, "early", "time, its unit or time zone")]
)
def test_clicks_of_another_clock_stop_the_job(shift, status, advice, tmp_path):
    clicks = [(key, at + shift) for key, at in impressions()]
    message = refused(write(tmp_path / "log", impressions(), clicks), tmp_path / "out", content_for())
    assert f"0 of 20 rows belong to an impression (20 {status}). " in message
    assert advice in message


def test_the_share_is_that_of_rows_which_are_no_duplicates_and_keys_are_those_of_rows_that_were_not_joined(tmp_path):
    clicks = [(key, at + 5) for key, at in impressions(10)]
    other = [(f"other {n}", START) for n in range(10)]
    folder = write(tmp_path / "log", impressions(), [*clicks, *clicks, *other])
    manifest = run(folder, tmp_path / "half", content_for())
    assert manifest.outcomes["click"] == {"joined": 10, "duplicate": 10, "early": 0, "late": 0, "unmatched": 10}
    write(folder, impressions(), [*clicks, *clicks, *other, ("one more", START)])
    message = refused(folder, tmp_path / "out", content_for())
    assert "10 of 21 rows belong to an impression (11 unmatched)" in message
    assert "without an impression have keys such as 'one more', 'other 0', 'other 1', and times" in message
    assert "if the log is right, set min_joined below 0.5" in message
    assert "10 of 21 rows" in refused(folder, tmp_path / "out", content_for(), min_joined=0.48)
    run(folder, tmp_path / "out", content_for(), min_joined=0.47)


def test_a_stream_without_rows_passes_and_zero_allows_all(tmp_path):
    folder = write(tmp_path / "log", impressions(), [])
    assert run(folder, tmp_path / "none", content_for()).read["click"] == 0
    write(folder, impressions(), [("b", START)])
    assert "0 of 1 rows" in refused(folder, tmp_path / "out", content_for(), min_joined=1e-9)
    run(folder, tmp_path / "out", content_for(window="5m"), min_joined=0)
    assert {row["label.click"] for row in rows_by_id(tmp_path / "out")} == {0.0, None}


def test_too_many_bad_rows_are_named_before_what_they_lead_to(tmp_path):
    folder = write(tmp_path / "log", impressions(), [("b", START)])
    with (folder / "clicks.csv").open("a") as file:
        file.write("a1,now\na2,now\n")
    assert refused(folder, tmp_path / "out", content_for()).startswith("2 of 3 rows of click are bad")
    assert refused(folder, tmp_path / "out", content_for(), max_bad_fraction=1).startswith(
        "source.outcomes.click: 0 of 1"
    )


def test_a_bad_row_counts_for_the_lines_that_it_takes(tmp_path):
    folder = write(tmp_path / "log", impressions(100), [(f"q{n}", START) for n in range(50)])
    lines = (folder / "log.csv").read_text().splitlines()
    lines[51] = '50,"a50' + "\n" * 31 + f'",{START},c'
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    message = refused(folder, tmp_path / "out", content_for(), max_bad_fraction=0.05)
    assert message.startswith("32 of 131 lines of impressions are bad")
    assert "multiline" in message


def test_what_a_log_has_is_shown_in_a_line_of_limited_length_that_controls_no_terminal(tmp_path):
    keys = ["\x1b[31m" + "x" * 10_000, "\u202e", "c"]
    (tmp_path / "log").mkdir()
    rows = [{"row": n, "id": key, "at": START, "city": "c"} for n, key in enumerate(keys)]
    clicks = [{"id": "not " + key, "when": START} for key in keys]
    for name, found in (("log", rows), ("clicks", clicks)):
        (tmp_path / "log" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    content = content_for()
    content["source"]["format"] = "jsonl"
    message = refused(tmp_path / "log", tmp_path / "out", content)
    assert "keys such as '\\x1b[31m" + "x" * 34 + "…', '\\u202e', 'c'" in message
    assert len(message) < 900


def test_many_buckets_have_one_message(tmp_path):
    clicks = [(f"b{n}", START + n) for n in range(50)]
    folder = write(tmp_path / "log", impressions(50), clicks)
    message = refused(folder, tmp_path / "out", content_for(), bucket_bytes=100, unit_bytes=100)
    assert "0 of 50 rows belong to an impression (50 unmatched)" in message
    assert "times 2026-03-01T00:00:00Z to 2026-03-01T00:49:00Z; rows of click" in message
    assert message.count("'a") == message.count("'b") == 3


@pytest.mark.parametrize("content", [content_for(time=None, window=None), content_for(window=None)])
def test_outcomes_without_times_or_windows_are_checked_too(content, tmp_path):
    folder = write(tmp_path / "log", impressions(), [("b", START)])
    assert "rows of click without an impression have keys such as 'b'" in refused(folder, tmp_path / "out", content)


def test_a_part_of_a_log_stops_only_where_nothing_of_much_is_joined(tmp_path, monkeypatch):
    """Of a day the other days' outcomes are read, too; and so does a night that uses the encoders of another dataset."""
    monkeypatch.setattr(join_check, "ENOUGH", 20)
    content = content_for(files="clicks-{date}.csv", window="1d")
    content["source"]["files"] = "log-{date}.csv"
    folder = write(tmp_path / "log", impressions(20), [(f"b{n}", START) for n in range(19)], "-2026-03-01")
    manifest = run(folder, tmp_path / "days", content, date="2026-03-01")
    assert manifest.outcomes["click"]["joined"] == 0
    write(folder, impressions(19), [(f"b{n}", START) for n in range(20)], "-2026-03-01")
    run(folder, tmp_path / "few", content, date="2026-03-01")
    write(folder, impressions(20), [(f"b{n}", START) for n in range(20)], "-2026-03-01")
    (tmp_path / "more" / "days").mkdir(parents=True)
    message = refused(folder, tmp_path / "more" / "days", content, date="2026-03-01")
    assert message.startswith("source.outcomes.click: 0 of 20 rows")
    clicks = [("a1", START + 100), *((f"b{n}", START) for n in range(100))]
    write(folder, impressions(20), clicks, "-2026-03-01")
    run(folder, tmp_path / "other", content, date="2026-03-01")
    content = content_for()
    folder = write(tmp_path / "night", impressions(20), clicks)
    reference = tmp_path / "reference"
    run(folder, reference, content, min_joined=0)
    run(folder, tmp_path / "again", content, encoders={"from": reference})
    assert "1 of 101 rows" in refused(folder, tmp_path / "out", content)
