"""The logs of the ingest benchmark: what is generated, and the schemas that taskfuse reads it with.

A log is CSV in order of time over 14 days: an id and a time, 12 id columns whose values follow Zipf's law, 10 lognormal
numbers, and whether the impression was clicked. Beside it lie its clicks as a stream of their own, for the join.
"""

import gzip
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import yaml

ROOT = Path(__file__).parents[2]
FILES = 12
IMPRESSIONS, CLICKS = "rows-*.csv", "clicks-*.csv"
SIZES = np.geomspace(100, 200_000, 12).round().astype(int)  # values of each id column
IDS = [f"id_{number}" for number in range(len(SIZES))]
NUMBERS = [f"number_{number}" for number in range(10)]
TYPES = {
    "impression_id": pa.int64(), "event_time": pa.int64(), **dict.fromkeys(IDS, pa.string()),
    **dict.fromkeys(NUMBERS, pa.float64()), "click": pa.int64(),
}  # fmt: skip
MISSING, EMPTY_IDS = 0.02, "id_3"  # share of empty cells, in all numbers and in one of the id columns
CLICKED, MAX_DELAY = 0.15, 3600
WINDOW = 3600  # after which an impression without a click has none

# Made of the clicks on earlier impressions with the same id.
COUNTERS: dict[str, dict[str, Any]] = {
    "user_ctr": {"by": IDS[-1], "of": "clicked", "take": "mean", "window": 7 * 86_400, "smoothing": 20},
    "item_ctr": {"by": IDS[-4], "of": "clicked", "take": "mean", "decay": 86_400, "smoothing": 20},
    "user_rows": {"by": IDS[-1], "take": "count"},
}

# What is written: ids of values that are seen often enough come after UNKNOWN, and 0 is a missing one.
MIN_COUNT, UNKNOWN, ROW_GROUP = 2, 1, 8192
COLUMNS = pa.schema(
    [(name, pa.float32()) for name in NUMBERS]
    + [(name, pa.int64()) for name in IDS]
    + [("label.click", pa.float32()), ("weight", pa.float32()), ("event_time", pa.int64()), ("row_id", pa.int64())]
)
COUNTED_COLUMNS = pa.schema([*COLUMNS, *((name, pa.float32()) for name in COUNTERS)])

DAY = 86_400
START = 20_000 * DAY  # 2024-10-04
VALID_FROM, TEST_FROM, END = START + 12 * DAY, START + 13 * DAY, START + 14 * DAY
SPLITS = ("train", "valid", "test")
CENSUS = "census-income.test.gz"


@dataclass(frozen=True)
class Log:
    """CSV files in a folder, rows-NN.csv (impressions) and clicks-NN.csv, and their schemas in conf/data.

    Attributes:
        rows: of the impressions.
        bytes: of the impressions, and of the clicks.
    """

    folder: Path
    rows: int
    bytes: int
    click_bytes: int = 0

    @property
    def conf(self) -> Path:
        """A --config-dir with the data groups bench, bench_join and bench_counters; the census has none."""
        return self.folder / "conf"


def generated(cache: Path, rows: int) -> Log:
    """The log of so many rows, generated where `cache` has none."""
    folder = _once(cache / f"log-{rows}", lambda aside: _write_log(aside, rows))
    _write_conf(folder / "conf" / "data")
    return Log(folder, rows, *(sum(f.stat().st_size for f in folder.glob(p)) for p in (IMPRESSIONS, CLICKS)))


def census(cache: Path, size: int = 200_000_000) -> Log:
    """The census file, unpacked and repeated until there are `size` bytes; TASKFUSE_DATA says where it is."""
    folder = ROOT / os.environ.get("TASKFUSE_DATA", "../shared/data")
    text = gzip.decompress((folder / CENSUS).read_bytes())
    copies = -(-size // len(text))

    def write(aside: Path) -> None:
        for number in range(copies):
            (aside / f"rows-{number:02d}.csv").write_bytes(text)

    return Log(_once(cache / f"census-{copies}", write), copies * text.count(b"\n"), copies * len(text))


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Fills a folder that is not there yet, aside, so that one that is there is whole."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        write(aside)
        aside.rename(folder)
    return folder


def _write_log(folder: Path, rows: int) -> None:
    files = FILES if rows >= 1000 else 1
    for number, ids in enumerate(np.array_split(np.arange(rows), files)):
        table = _rows(np.random.default_rng([0, number]), ids, rows)
        pa.csv.write_csv(table, folder / f"rows-{number:02d}.csv", pa.csv.WriteOptions(quoting_style="none"))
        clicks = _clicks(np.random.default_rng([1, number]), table)
        pa.csv.write_csv(clicks, folder / f"clicks-{number:02d}.csv", pa.csv.WriteOptions(quoting_style="none"))


def _write_conf(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    schemas = {"bench": bench_schema(), "bench_join": join_schema(), "bench_counters": counters_schema()}
    for name, schema in schemas.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"input": None, "schema": schema}, sort_keys=False))


def _rows(rng: np.random.Generator, ids: np.ndarray, rows: int) -> pa.Table:
    """The impressions of one file, those with these ids of a log of so many rows."""
    count = len(ids)
    columns: dict[str, Any] = {"impression_id": ids, "event_time": START + ids * (END - START) // rows}
    for name, size in zip(IDS, SIZES, strict=True):
        share_cdf = np.cumsum(1 / np.arange(1, size + 1))
        rank = np.searchsorted(share_cdf / share_cdf[-1], rng.random(count))
        names = pa.array([f"{name[3:]}v{value}" for value in range(size)])
        empty = rng.random(count) < MISSING if name == EMPTY_IDS else None
        columns[name] = names.take(pa.array(rank, mask=empty))
    for name in NUMBERS:
        values = rng.lognormal(2, 1.5, count).round(4)
        columns[name] = pa.array(values, mask=rng.random(count) < MISSING)
    columns["click"] = (rng.random(count) < CLICKED).astype(np.int64)
    return pa.table(columns)


def _clicks(rng: np.random.Generator, rows: pa.Table) -> pa.Table:
    """The clicks on these impressions, in order of their time."""
    clicked = rows.select(["impression_id", "event_time"]).filter(np.asarray(rows["click"]) == 1)
    time = np.asarray(clicked["event_time"]) + rng.integers(1, MAX_DELAY, len(clicked))
    dwell = rng.lognormal(3, 1, len(clicked)).round(2)
    table = pa.table({"impression_id": clicked["impression_id"], "click_time": time, "dwell": dwell})
    return table.sort_by("click_time")


def bench_schema() -> dict[str, Any]:
    """What taskfuse is told about the log."""
    return {
        "source": {"files": IMPRESSIONS, "row_id": "impression_id", "types": {"click": "int"}},
        "dense": {name: {"transform": "log1p"} for name in NUMBERS},
        "categorical": {name: {"vocabulary": {"min_count": MIN_COUNT}} for name in IDS},
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "event_time": "event_time",
        "split": {"by": "time", "valid_from": _date(VALID_FROM), "test_from": _date(TEST_FROM)},
    }


def join_schema() -> dict[str, Any]:
    """The same, but that the label is whether the stream of clicks has the impression."""
    schema = bench_schema()
    outcome = {"files": CLICKS, "key": "impression_id", "columns": {"dwell": "float"}}
    schema["source"] |= {"types": {}, "key": "impression_id", "outcomes": {"clicked": outcome}}
    schema["tasks"]["click"]["label"] = "clicked"
    return schema


def counters_schema() -> dict[str, Any]:
    """The same, with COUNTERS as they are among the numbers."""
    schema = join_schema()
    timed = {"time": "click_time", "window": WINDOW, "open_window": "keep"}
    schema["source"]["outcomes"]["clicked"] |= timed
    schema["source"]["counters"] = COUNTERS
    schema["dense"] |= {name: {"standardize": False} for name in COUNTERS}
    return schema


def _date(seconds: int) -> str:
    return str(np.datetime64(seconds, "s").astype("datetime64[D]"))
