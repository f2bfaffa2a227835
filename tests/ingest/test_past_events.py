"""A job that starts from the events which an earlier one kept gives the rows that one job over both logs gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ingest_runs import rows_by_id, run, run_in_a_loop, values_of
from test_job_counters import CASES, CLOSED, content_for
from test_job_joins import BASE, Event, Impression, write_log, written

from pipeline.ingest import job as ingest_job
from pipeline.ingest import shuffle
from pipeline.ingest.messages import GatherPastReport, ReadWork, ScatterPastReport
from pipeline.ingest.schedule import Limits
from pipeline.ingest.state import Job
from pipeline.ingest.steps.join import scatter

pytestmark = pytest.mark.integration

DAY = 100  # seconds
COUNTERS = [name for name, case in CASES.items() if "smoothing" not in case.content]
BAGS = {"seen": None, "chosen": "click", "ignored": "NOT click"}
Events = dict[str, pl.DataFrame]


def content() -> dict[str, Any]:
    found = content_for({"click": CLOSED, "buy": CLOSED}, {name: CASES[name].content for name in COUNTERS})
    for bag, when in BAGS.items():
        history = {"user": "user", "item": "item"} | ({"when": when} if when else {})
        found.setdefault("bag", {})[bag] = {"max_length": 4, "history": history}
    return found


def run_from(
    earlier: Events, horizon: int, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Events, dict[str, int]]:
    """Runs a job from earlier events; returns those that it keeps, and how many rows it left undecided, each by name."""
    kept: dict[str, list[pl.DataFrame]] = {}
    undecided: dict[str, int] = {}

    def run_steps(config: Any, job: Job, limits: Limits, work: list[ReadWork]) -> None:
        paths = {name: [scatter(job, events.rechunk().to_arrow(), "key")] for name, events in earlier.items()}
        job = replace(job, earlier=paths, horizon=horizon)
        run_in_a_loop(config, job, limits, work)
        for gathered in job.found(GatherPastReport):
            kept.setdefault(gathered.name, []).append(pl.from_arrow(shuffle.read(str(gathered.later), mapped=False)))  # type: ignore[arg-type]
        for scattered in job.found(ScatterPastReport):
            for name, count in scattered.undecided.items():
                undecided[name] = undecided.get(name, 0) + count

    monkeypatch.setattr(ingest_job, "run_steps", run_steps)
    run(folder, out, content(), **settings)
    return {name: pl.concat(parts) for name, parts in kept.items()}, undecided


def by_id(out: Path) -> dict[int, dict[str, Any]]:
    rows, names = rows_by_id(out), {bag: values_of(out, bag) for bag in BAGS}
    return {row["row_id"]: row | {bag: [values[x] for x in row[bag]] for bag, values in names.items()} for row in rows}


def test_a_log_cut_at_a_second_and_joined_by_its_events_is_the_whole_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    earlier: Events = {}
    for name in parts:
        begins = {} if name == "whole" else earlier
        sizes = {"as_of": written(BASE + 10**6, 2), "bucket_bytes": 1000}
        horizon = BASE + parts[name].stop
        earlier, undecided = run_from(begins, horizon, tmp_path / name, tmp_path / f"out-{name}", monkeypatch, **sizes)
        assert sorted(earlier) == sorted([*COUNTERS, *BAGS])
        assert set(undecided.values()) == {0}
        if name == "first":  # what becomes known later is kept, too
            assert min(earlier[pending]["known"].max() for pending in ("clicks", "ctr", "chosen", "ignored")) >= horizon  # type: ignore[type-var]
    whole, cut = by_id(tmp_path / "out-whole"), by_id(tmp_path / "out-first") | by_id(tmp_path / "out-second")
    assert cut.keys() == whole.keys()
    for row_id, row in whole.items():
        assert {bag: cut[row_id][bag] for bag in BAGS} == {bag: row[bag] for bag in BAGS}
        for name in COUNTERS:
            assert cut[row_id][f"{name}_missing"] == row[f"{name}_missing"], name
            if not row[f"{name}_missing"]:
                assert cut[row_id][name] == pytest.approx(row[name], rel=1e-6), name


def test_rows_that_the_logs_end_leaves_undecided_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Impression(i, f"k{i}", BASE + i, "u", "x") for i in range(20)]
    write_log(tmp_path, rows, {"click": [Event("k15", BASE + 16, 1)], "buy": [Event("k0", BASE + 5, 1)]})
    _, undecided = run_from({}, BASE, tmp_path, tmp_path / "out", monkeypatch)
    # Streams are complete until their last joined outcome: windows of 10 s that close after second 16, or 5, are open.
    assert [undecided[name] for name in ("seen", "rows", "ids")] == [0, 0, 0]
    assert [undecided[name] for name in ("ignored", "amount")] == [13, 13]  # of 7..19
    assert [undecided[name] for name in ("clicks", "ctr", "clicked", "chosen")] == [12] * 4  # one has been clicked
    assert undecided["bought"] == 20
