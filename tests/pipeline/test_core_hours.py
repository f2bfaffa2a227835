"""Core-hours of a run by hand: lines of train.jsonl, and the ranks that were there when each was written."""

import json
import math
from pathlib import Path

import pytest

from features.errors import UserError
from pipeline.run.core_hours import core_hours
from pipeline.run.run import Run
from pipeline.storage.files import append_line


def made(path: Path, lines: list[dict], starts: list[dict] = ()) -> Run:  # type: ignore[assignment]
    run = Run(path)
    run.train_metrics.parent.mkdir(parents=True)
    for line in lines:
        append_line(run.train_metrics, line)
    for start in starts:
        append_line(run.restarts, {"step": 0, "nodes": 1, "reason": "start"} | start)
    return run


def test_core_hours_are_the_rows_between_lines_over_their_rate_times_the_ranks_of_then(tmp_path: Path) -> None:
    rng = [(64, 0, 7.5, 11.0), (1_000, 24, 313.3, 12.0), (1_900, 100, 97.1, 15.0), (5_000, 100, 1234.5, 19.5)]
    lines = [{"step": n, "rows": r, "left_out": o, "rows_per_s": v, "time": t} for n, (r, o, v, t) in enumerate(rng)]
    starts = [{"ranks": 1, "time": 10.0}, {"ranks": 4, "time": 14.0}, {"ranks": 3, "time": 19.0}]
    expected = (64 / 7.5 + 960 / 313.3 + 4 * 976 / 97.1 + 3 * 3100 / 1234.5) / 3600
    found = core_hours(made(tmp_path / "run", lines, starts))
    assert math.isclose(found, expected, rel_tol=1e-14)


def test_a_run_without_records_took_nothing_and_one_without_starts_had_a_rank(tmp_path: Path) -> None:
    assert core_hours(Run(tmp_path)) == 0
    lines = [{"rows": 3600, "rows_per_s": 2.0}, {"rows": 3600, "rows_per_s": 0.0}]  # nothing between the two
    assert core_hours(made(tmp_path / "run", lines)) == 0.5


@pytest.mark.parametrize("fault", [{"rows": "7"}, {"rows_per_s": -1.0}, {"rows_per_s": None}])
def test_a_damaged_line_is_named(tmp_path: Path, fault: dict) -> None:
    run = made(tmp_path / "run", [{"rows": 1, "rows_per_s": 1.0} | fault])
    with pytest.raises(UserError, match=rf"train\.jsonl: {next(iter(fault))}"):
        core_hours(run)
    assert json.loads(run.train_metrics.read_text())
