"""Too many bad rows stop a job while it reads, and never one that would pass at its end; a log without rows says why."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_runs import refused, run

from pipeline.ingest import bad_rows
from pipeline.ingest import job as ingest_job
from pipeline.ingest.bad_rows import WORTH_BYTES, Tally, too_many
from pipeline.ingest.formats import text
from pipeline.ingest.formats.lines import LineRows
from pipeline.ingest.formats.text_blocks import Parsed

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

GOOD, BAD = "{},1,2\n", "{},x,2\n"
CONTENT: dict[str, Any] = {
    "source": {"files": "log-*.csv", "row_id": "id"},
    "dense": {"x": {}},
    "tasks": {"y": {"kind": "binary", "label": "y = '2'"}},
    "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs of some kilobytes are checked early."""
    monkeypatch.setattr(bad_rows, "WORTH_BYTES", 1000)
    monkeypatch.setattr(bad_rows, "AHEAD_BYTES", 200)
    monkeypatch.setattr(bad_rows, "SHARE_OF_TIME", 1e9)
    monkeypatch.setattr(text, "BLOCK_BYTES", 100)


def write(folder: Path, *files: str) -> Path:
    """Files of 400 rows; each letter stands for 100 of them: g good, b bad."""
    folder.mkdir()
    for number, kinds in enumerate(files):
        rows = "".join(
            (GOOD if kind == "g" else BAD).format(10_000 * number + 100 * i + n)
            for i, kind in enumerate(kinds)
            for n in range(100)
        )
        (folder / f"log-{number}.csv").write_text("id,x,y\n" + rows)
    return folder


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("unit_bytes", [300, 1 << 20])  # many units a file, or one
def test_a_bad_log_stops_the_job_before_it_is_read(unit_bytes, tmp_path, monkeypatch):
    folder = write(tmp_path / "log", "gbbb", "bbbb", "bbbb", "bbbb")
    read = []
    real = LineRows.parse

    def counted(*arguments: Any) -> Parsed:
        found = real(*arguments)
        read.append(found.size)
        return found

    monkeypatch.setattr(LineRows, "parse", counted)
    message = refused(folder, tmp_path / "out", CONTENT, max_bad_fraction=0.05, unit_bytes=unit_bytes)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert sum(read) < size / 2
    bad, rows = int(message.split()[0]), int(message.split()[2])
    assert 0.05 * 1600 < bad < rows <= 800
    assert f"{bad:,} of {rows:,} rows of impressions are bad after reading " in message
    assert "more than max_bad_fraction=0.05; the first: " in message
    assert "/log-0.csv, line " in message
    assert "x: 'x' is not a number. Fix the log" in message


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("rows", "reason"), [("1,x,2\n1\n", "x: 'x'"), ("1\n1,x,2\n", "1 columns instead of 3")])
def test_the_first_bad_row_is_the_first_by_its_line_whatever_is_wrong_with_others(rows, reason, tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log-0.csv").write_text("id,x,y\n" + rows * 1000)
    message = refused(tmp_path / "log", tmp_path / "out", CONTENT, max_bad_fraction=0.05)
    assert "bad after reading " in message
    assert f"/log-0.csv, line 2: {reason}" in message


@pytest.mark.usefixtures("small")
def test_bad_rows_that_stand_together_stop_no_job_that_passes_at_its_end(tmp_path):
    folder = write(tmp_path / "log", "bbbb", "gggg", "gggg", "gggg", "gggg", "gggg")
    manifest = run(folder, tmp_path / "out", CONTENT, max_bad_fraction=0.17, unit_bytes=500)
    assert (sum(manifest.dead_letters.values()), manifest.rows["train"]) == (400, 2000)
    message = refused(folder, tmp_path / "again", CONTENT, max_bad_fraction=0.16, unit_bytes=500)
    assert message.startswith("400 of 2,400 rows of impressions are bad, more than max_bad_fraction=0.16; the first: ")


@pytest.mark.usefixtures("small")
def test_what_a_reader_has_only_taken_in_is_not_read(tmp_path, monkeypatch):
    """A compressed file is in memory before the first of its rows come out, and bad ones may come first."""
    monkeypatch.setattr(bad_rows, "AHEAD_BYTES", 1 << 20)
    folder = write(tmp_path / "log", "bggggggggg", "gggggggggg", "gggggggggg")
    for path in folder.iterdir():
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    content = json.loads(json.dumps(CONTENT))
    content["source"]["files"] = "log-*.csv.gz"
    assert sum(run(folder, tmp_path / "out", content, max_bad_fraction=0.05).dead_letters.values()) == 100


@pytest.mark.usefixtures("small")
def test_units_that_have_not_begun_end_with_the_same_line(tmp_path, monkeypatch):
    """As the job's workers do it: all units are given out, whatever has become of the others."""
    folder, messages = write(tmp_path / "log", "bbbb", "bbbb", "gggg", "gggg"), []
    real = ingest_job.schedule.after

    def after(reports: Any, *rest: Any) -> Any:
        reports = list(reports)
        messages.extend(report.error for _, report in reports if hasattr(report, "error"))
        return real(reports, *rest)

    monkeypatch.setattr(ingest_job.schedule, "after", after)
    message = refused(folder, tmp_path / "out", CONTENT, max_bad_fraction=0.01, unit_bytes=500)
    assert len(messages) > 10
    assert set(messages) == {message}


def test_a_small_log_is_read_to_its_end_so_that_the_count_is_that_of_all_its_rows(tmp_path):
    folder = write(tmp_path / "log", "bbbb", "gggg")
    message = refused(folder, tmp_path / "out", CONTENT, unit_bytes=300)
    assert message.startswith("400 of 800 rows of impressions are bad, more than max_bad_fraction=0.001")


@pytest.mark.parametrize(("lines", "place"), [(2, "line 3 after byte 4,096"), (0, "line 3")])
def test_a_line_is_counted_from_its_units_beginning_and_a_row_in_its_file(lines, place, tmp_path):
    job = SimpleNamespace(stream_bytes={"click": 0}, progress=tmp_path)
    unit = SimpleNamespace(start=4096, file=SimpleNamespace(path="/x/a"))
    rows = bad_rows.BadRows(job, SimpleNamespace(stream="click", unit=unit))  # type: ignore[arg-type]
    rows.count(2, [pl.DataFrame({"line": [3], "reason": ["odd"]})], lines)
    assert rows.first == f"/x/a, {place}: odd"


logs = st.lists(
    st.tuples(st.integers(20, 80), st.integers(1, 1000), st.floats(0, 1)), min_size=2, max_size=20
)  # units: bytes a row, rows, bad share


@settings(max_examples=examples(200), deadline=None)
@given(logs, st.floats(0, 1), st.data())
def test_no_part_of_a_log_that_passes_is_too_many(units, limit, data):
    """Rows of 20 to 80 bytes: none is denser than DENSER times any other."""
    tallies = [Tally(size * rows << 20, rows << 20, int(rows * share) << 20, "here") for size, rows, share in units]
    total, rows, bad = (sum(getattr(t, name) for t in tallies) for name in ("bytes", "rows", "bad"))
    some = data.draw(st.lists(st.sampled_from(tallies), unique=True, max_size=len(tallies)))
    some = [replace(t, bytes=t.bytes // 2) if data.draw(st.booleans()) else t for t in some]
    if bad <= limit * rows or total - sum(t.bytes for t in some) < WORTH_BYTES:
        assert too_many(some, total, limit, "impressions") is None


def test_a_wholly_bad_log_is_too_many_once_a_small_part_is_read():
    unit = Tally(32 << 20, 100_000, 100_000, "x.csv, line 2: bad")
    total = 1 << 40
    found = next(n for n in range(1, 1000) if too_many([unit] * n, total, 0.001, "click"))
    assert found * unit.bytes / total == pytest.approx(0.004, rel=0.05)
    message = too_many([unit] * found, total, 0.001, "click")
    assert message == (
        f"{100_000 * found:,} of {100_000 * found:,} rows of click are bad after reading 0.4% of its files, more than "
        "max_bad_fraction=0.001; the first: x.csv, line 2: bad. Fix the log or the schema, or raise the limit."
    )


# Logs of which nothing is left


def test_empty_files_are_named(tmp_path):
    folder = write(tmp_path / "log", "", "", "", "")
    message = refused(folder, tmp_path / "out", CONTENT)
    named = ", ".join(f"{folder}/log-{number}.csv" for number in range(3))
    assert message.startswith(f"no rows are left: the files are empty: {named} and 1 more. Set input=")


def test_bad_rows_and_rules_that_leave_none_are_told_apart(tmp_path):
    folder = write(tmp_path / "log", "bb")
    message = refused(folder, tmp_path / "out", CONTENT, max_bad_fraction=1)
    first = f"the first: {folder}/log-0.csv, line 2: x: 'x' is not a number"
    assert message == (
        f"no rows are left of 200: 200 are bad (200 x: wrong value; {first}). Fix the log or the schema."
    )
    folder = write(tmp_path / "other", "gb")
    (folder / "clicks.csv").write_text("id,at\n")
    content = json.loads(json.dumps(CONTENT)) | {"event_time": "when"}
    click = {"files": "clicks.csv", "key": "id", "time": "at", "window": "1h", "open_window": "leave_out"}
    content["source"] |= {"key": "id", "outcomes": {"click": click}, "derived": {"when": "CAST(id AS BIGINT)"}}
    content["source"]["times"] = {"when": "index", "at": "index"}
    message = refused(folder, tmp_path / "out", content, max_bad_fraction=1)
    assert message.startswith(
        "no rows are left of 200: 100 are left out (window of click still open); 100 are bad (100 x: wrong value; "
    )
