"""The contenders of ingest.py write the columns that jobs.preprocess writes, and the workload is what it is said to be."""

import importlib
import sys
import tempfile
from pathlib import Path

import ingest
import ingest_workload as w
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from ingest_contenders import CONTENDERS
from process_cost import measure

pytestmark = pytest.mark.system

ROWS = 2000


@pytest.fixture(scope="module")
def log():
    with tempfile.TemporaryDirectory() as folder:
        yield w.generated(Path(folder), ROWS)


@pytest.fixture(scope="module")
def expected(log):
    return preprocessed(log, "bench")


def preprocessed(log, data, columns=w.COLUMNS):
    """What jobs.preprocess writes, by split."""
    out = log.folder / f"out-{data}"
    measure(ingest.taskfuse(log, data)(out), ingest.ROOT, ingest.environment())
    return read(out, columns)


def read(out, columns=w.COLUMNS):
    """Columns of each split, in order of row_id."""
    found = {}
    for split in w.SPLITS:
        files = sorted(out.glob(f"*{split}/*.parquet"))  # train/, or split=train/
        tables = [pq.ParquetFile(file).read().select(columns.names).cast(columns) for file in files]
        found[split] = pa.concat_tables(tables).sort_by("row_id")
    return found


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "beam-counters"])
def test_every_contender_writes_what_preprocess_writes(name, log, expected, tmp_path):
    assert_alike(name, log, expected, w.COLUMNS, tmp_path / "out")


def test_counters_of_the_contender_are_those_of_preprocess(log, tmp_path):
    expected = preprocessed(log, "bench_counters", w.COUNTED_COLUMNS)
    assert_alike("beam-counters", log, expected, w.COUNTED_COLUMNS, tmp_path / "out")
    assert all(len(np.unique(expected["test"][name])) > 10 for name in w.COUNTERS)


def assert_alike(name, log, expected, columns, out):
    contender = importlib.import_module(CONTENDERS[name])
    contender.encode(log.folder, out, contender.fit(log.folder))
    for split, theirs in read(out, columns).items():
        ours = expected[split]
        assert len(ours) > 100
        for column in columns.names:
            a, b = (table[column].to_numpy() for table in (ours, theirs))
            exact = column not in (*w.NUMBERS, *w.COUNTERS)
            np.testing.assert_allclose(a, b, rtol=0, atol=0 if exact else 1e-5, err_msg=f"{split} {column}")


def test_clicks_of_the_stream_are_those_of_the_column(log, expected):
    for split, joined in preprocessed(log, "bench_join").items():
        assert joined["label.click"].equals(expected[split]["label.click"])
        assert 0.05 < np.mean(joined["label.click"]) < 0.3


def test_splits_are_of_the_times_in_the_log(log, expected):
    time = np.sort(
        np.concatenate([np.asarray(pa.csv.read_csv(f)["event_time"]) for f in log.folder.glob(w.IMPRESSIONS)])
    )
    days = (time - w.START) // w.DAY
    assert len(time) == ROWS
    assert [len(expected[split]) for split in w.SPLITS] == [np.sum(days < 12), np.sum(days == 12), np.sum(days == 13)]


def test_the_default_log_has_a_gigabyte(log):
    assert 1e9 < log.bytes / ROWS * ingest.Options().rows < 1.1e9


def test_census_is_repeated_whole(census_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TASKFUSE_DATA", str(census_folder.absolute()))
    repeated = w.census(tmp_path, size=1)
    assert repeated.rows == 99_762
    assert repeated.bytes == sum(file.stat().st_size for file in repeated.folder.iterdir())


def test_ratios_are_taken_within_rounds(capsys):
    runs = {name: ingest.Run("generated", 100, 1000, lambda out: []) for name in ("taskfuse", "arrow")}
    rates = [{"taskfuse": 50, "arrow": 100}, {"taskfuse": 5, "arrow": 10}, {"taskfuse": 30, "arrow": 40}]
    same = {"s": 1.0, "cpu_s": 1.0, "rows_per_s": 100.0, "peak_bytes": 1e6}
    ingest.report(runs, [{name: {**same, "rows_per_cpu_s": rate} for name, rate in taken.items()} for taken in rates])
    taskfuse = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("taskfuse"))
    assert taskfuse.split()[-3:] == ["30", "0.50", "1"]  # 30 / 40 would be the ratio of medians


def test_cost_of_a_command_holds_that_of_its_children(tmp_path):
    child = "b = bytearray(80_000_000); import time; t = time.process_time()\nwhile time.process_time() < t + 0.5: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    cost = measure([sys.executable, "-c", parent], tmp_path, {})
    assert cost.cpu_seconds > 0.5
    assert 80e6 < cost.peak_bytes < 160e6


def test_a_command_that_fails_ends_the_benchmark_with_its_words(tmp_path):
    with pytest.raises(SystemExit, match="no such thing"):
        measure([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path, {})


def test_an_unknown_setting_or_run_is_refused_in_one_line():
    with pytest.raises(SystemExit, match="row=5: say KEY=VALUE with rows, sample"):
        ingest.parse(["row=5"])
    with pytest.raises(SystemExit, match="only=arow: no such run, there are taskfuse"):
        ingest.chosen(ingest.parse(["only=arow"]))
