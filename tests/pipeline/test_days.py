"""Days of a log, each a dataset of its own, read as one: in order, each row once, whatever the number of ranks."""

from pathlib import Path

import pyarrow as pa
import pytest
from written import write_dataset

from features.batch import PADDING
from features.encoders import Encoders, arrow_schema
from features.errors import UserError
from features.schema import Schema
from features.statistics import Moments
from pipeline.dataset import Dataset, open_dataset
from pipeline.loader import Loader, Position

CONTENT = {
    "source": {"files": "*-{date}.csv"},
    "dense": {"x": {}},
    "tasks": {"click": {"kind": "binary", "label": "click"}},
    "split": {"by": "hash", "key": "k", "valid": 0.0, "test": 0.0},
}
SCHEMA = Schema.parse(CONTENT, "days.yaml")
ROWS = {"2026-11-01": 90, "2026-11-02": 7, "2026-11-03": 150}


def write_day(root: Path, number: int, day: str, rows: int, schema: Schema = SCHEMA, mean: float = 0.0) -> None:
    ids = [1000 * number + row for row in range(rows)]
    content = [
        {"x": float(i), "label.click": i % 2, "weight": 1.0, "event_time": 0, "row_id": i} for i in ids
    ]  # fmt: skip
    encoders = Encoders(schema, {}, {"x": Moments(2, 0, mean, 2.0)}, {})
    write_dataset(root / day, schema, {"train": pa.Table.from_pylist(content, arrow_schema(schema))}, 16, 60, encoders)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("days")
    for number, (day, rows) in enumerate(ROWS.items()):
        write_day(folder, number, day, rows)
    return folder


def batches(dataset: Dataset, position: Position | None = None, **settings: int) -> list[list[int]]:
    loader = Loader(dataset, "train", 16, **{"lanes": 4, "window": 20, "seed": 3, **settings})
    found = loader.batches(position or loader.start())
    return [batch.row_id_B[batch.row_id_B != PADDING].tolist() for batch in found]


@pytest.mark.parametrize("window", [0, 20])
def test_days_follow_each_other_and_every_row_is_read_once(root, window):
    dataset = open_dataset(root, "2026-11-01..2026-11-03")
    assert dataset.manifest.rows["train"] == sum(ROWS.values())
    found = batches(dataset, window=window)
    flat = [row for batch in found for row in batch]
    assert sorted(flat) == [1000 * n + row for n, rows in enumerate(ROWS.values()) for row in range(rows)]
    days = [{row // 1000 for row in batch} for batch in found]
    # Lanes of a day end within a row of each other: a batch at its end holds rows of both days, and so may the next one.
    assert all(max(before) <= min(after) for before, after in zip(days, days[2:], strict=False))
    assert sum(len(batch) > 1 for batch in days) <= 4


def test_a_day_alone_and_a_range_of_one_are_the_same(root):
    assert batches(open_dataset(root, "2026-11-03")) == batches(open_dataset(root, "2026-11-03..2026-11-03"))
    assert sorted(row for batch in batches(open_dataset(root, "2026-11-03")) for row in batch) == list(
        range(2000, 2150)
    )


def test_two_ranks_read_what_one_reads_and_a_position_continues(root):
    dataset = open_dataset(root, "2026-11-01..2026-11-03")
    whole = batches(dataset)
    shared = [sorted(a + b) for a, b in zip(batches(dataset, ranks=2), batches(dataset, rank=1, ranks=2), strict=True)]
    assert shared == [sorted(batch) for batch in whole]
    loader = Loader(dataset, "train", 16, lanes=4, window=20, seed=3)
    assert batches(dataset, loader.after(loader.start(), 7)) == whole[7:]


def test_a_missing_day_other_encoders_and_another_schema_are_refused_by_name(root, tmp_path):
    with pytest.raises(UserError, match=r"2026-11-04: no dataset"):
        open_dataset(root, "2026-11-01..2026-11-04")
    for days in ("yesterday", "2026-11-02..2026-11-01", "2026-11-02.."[:-1]):
        with pytest.raises(UserError, match="days="):
            open_dataset(root, days)
    write_day(tmp_path, 0, "2026-11-01", 5)
    write_day(tmp_path, 1, "2026-11-02", 5, mean=1.0)
    with pytest.raises(UserError, match=r"2026-11-02 was encoded with .*encoders.from="):
        open_dataset(tmp_path, "2026-11-01..2026-11-02")
    write_day(tmp_path, 2, "2026-11-03", 5, schema=Schema.parse(CONTENT | {"weight": "2"}, "other.yaml"))
    with pytest.raises(UserError, match=r"2026-11-03 was written for schema"):
        open_dataset(tmp_path, "2026-11-02..2026-11-03")
