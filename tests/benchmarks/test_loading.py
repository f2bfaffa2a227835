"""The benchmark of loading in a small form: its rows are those that it says, and it runs to its end."""

from pathlib import Path

import loading
import numpy as np
import pytest

SMALL = ["--rows", "500", "--row-group", "100", "--columns", "3", "2", "2", "--batch", "64", "--rounds", "1"]


def test_rows_are_as_wide_as_said_and_an_epoch_reads_each(tmp_path: Path) -> None:
    dataset = loading.write_dataset(tmp_path / "data", loading.Sizes(5000, 1000, 4, 3, 2))
    made = loading.loader(dataset, 512, 8, 0)
    rows, *_ = loading.read(made)
    assert rows == 5000
    batch = next(made.batches(made.start()))
    assert batch.dense_BD.shape == (512, 2)
    assert batch.sparse.keys() == [f"c{i}" for i in range(4)] + [f"b{i}" for i in range(3)]
    assert float(np.mean([batch.sparse[f"b{i}"].lengths().float().mean() for i in range(3)])) == pytest.approx(
        5, rel=0.1
    )


def test_the_benchmark_prints_a_line_for_each_number_of_processes(capsys: pytest.CaptureFixture[str]) -> None:
    loading.main([*SMALL, "--workers", "0"])  # one process would take most of the test's time to start
    title, headers, _, line = capsys.readouterr().out.splitlines()
    assert title.startswith("500 rows of")
    assert "rows/s per core" in headers
    assert line.split()[0] == "0"


@pytest.mark.parametrize(
    ("option", "says"), [("--formats", "zstd 1, pages of 1024 kB"), ("--profile", "read_row_group")]
)
def test_the_benchmark_prints_formats_and_a_profile(option: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    loading.main([*SMALL, option])
    assert says in capsys.readouterr().out
