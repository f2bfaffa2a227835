"""A job that starts from the events which an earlier one kept gives the rows that one job over both logs gives."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ingest_runs import rows_by_id, run, values_of
from test_job_counters import CASES, CLOSED, content_for
from test_job_joins import BASE, Event, Impression, write_log, written

from pipeline.dataset.entries import State

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

DAY = 100  # seconds
COUNTERS = [name for name, case in CASES.items() if "smoothing" not in case.content]
BAGS = {"seen": None, "chosen": "click", "ignored": "NOT click"}


def content() -> dict[str, Any]:
    found = content_for({"click": CLOSED, "buy": CLOSED}, {name: CASES[name].content for name in COUNTERS})
    for bag, when in BAGS.items():
        history = {"user": "user", "item": "item"} | ({"when": when} if when else {})
        found.setdefault("bag", {})[bag] = {"max_length": 4, "history": history}
    return found


def run_from(earlier: Path | None, folder: Path, out: Path, **settings: Any) -> State:
    """Runs a job that begins with the state of an earlier dataset; returns the one that it leaves."""
    state = run(folder, out, content(), state={"from": str(earlier or "empty")}, min_joined=0, **settings).state
    assert state is not None
    return state


def by_id(out: Path) -> dict[int, dict[str, Any]]:
    rows, names = rows_by_id(out), {bag: values_of(out, bag) for bag in BAGS}
    return {row["row_id"]: row | {bag: [values[x] for x in row[bag]] for bag, values in names.items()} for row in rows}


def test_a_log_cut_at_a_second_and_joined_by_its_events_is_the_whole_log(tmp_path: Path) -> None:
    rows = [Impression(i, f"k{i}", BASE + 2 * i + i % 3, f"u{i % 3}", f"i{i % 5}") for i in range(95)]
    clicks = [
        Event(f"k{i}", rows[i].at + i % 11, i % 3) for i in range(0, 95, 2)
    ]  # some after the cut on rows before it
    parts = {"first": range(DAY), "second": range(DAY, 2 * DAY), "whole": range(2 * DAY)}
    for name, seconds in parts.items():
        (tmp_path / name).mkdir()
        shown = [row for row in rows if row.at - BASE in seconds]
        write_log(
            tmp_path / name, shown, {"click": clicks, "buy": clicks[::3]}
        )  # those of the other part match nothing
    for name in parts:
        earlier = tmp_path / "out-first" if name == "second" else None
        sizes = {"as_of": written(BASE + 10**6, 2), "bucket_bytes": 1000}
        state = run_from(earlier, tmp_path / name, tmp_path / f"out-{name}", **sizes)
        assert sorted(file.name for file in state.files) == sorted([*COUNTERS, *BAGS])
        assert set(state.undecided.values()) == {0}
        if name == "first":  # what becomes known later is kept, too
            known = {f.name: pl.read_parquet(tmp_path / "out-first" / f.path, columns=["known"]) for f in state.files}
            assert all(
                known[pending]["known"].max() >= state.horizon for pending in ("clicks", "ctr", "chosen", "ignored")
            )
    whole, cut = by_id(tmp_path / "out-whole"), by_id(tmp_path / "out-first") | by_id(tmp_path / "out-second")
    assert cut.keys() == whole.keys()
    for row_id, row in whole.items():
        assert {bag: cut[row_id][bag] for bag in BAGS} == {bag: row[bag] for bag in BAGS}
        for name in COUNTERS:
            assert cut[row_id][f"{name}_missing"] == row[f"{name}_missing"], name
            if not row[f"{name}_missing"]:
                assert cut[row_id][name] == pytest.approx(row[name], rel=1e-6), name


def test_rows_that_the_logs_end_leaves_undecided_are_counted(tmp_path: Path) -> None:
    rows = [Impression(i, f"k{i}", BASE + i, "u" if i != 14 else "", "x") for i in range(20)]
    write_log(tmp_path, rows, {"click": [Event("k15", BASE + 16, 1)], "buy": [Event("k0", BASE + 5, 1)]})
    undecided = run_from(None, tmp_path, tmp_path / "out").undecided
    # Streams are complete until their last joined outcome: windows of 10 s that close after second 16, or 5, are open.
    assert [undecided[name] for name in ("seen", "rows", "ids")] == [0, 0, 0]
    assert [undecided[name] for name in ("ignored", "amount")] == [12, 12]  # of 7..19 but 14, which has no user
    assert [undecided[name] for name in ("clicks", "ctr", "clicked", "chosen")] == [11] * 4  # one has been clicked
    assert undecided["bought"] == 19
