"""What tests of several parts share: a small log whose every row is known, the dataset of it, and the census file."""

import copy
import csv
import gc
import gzip
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # as make does, before torch is imported: threads that wait for each other spin

import torch

pytest_plugins = ["store_fixtures"]  # s3, memory and what fails on demand

gc.disable()  # until all tests are imported: see pytest_collection_finish

SMALL_SCHEMA: dict[str, Any] = {
    "source": {
        "files": "impressions-*",
        "row_id": "id",
        "key": "id",
        "trim": True,
        "missing": ["", "NA"],
        "types": {"qty": "int"},
        "times": {"at": "index"},
        "outcomes": {"click": {"files": "clicks-*.csv", "key": "id", "columns": {"dwell": "float"}}},
    },
    "tables": {"item": {"dim": 4}},
    "dense": {"price": {"transform": "log1p"}, "age": {"missing_flag": True}},
    "categorical": {"user": {"dim": 4, "hash": 50}, "city": {"dim": 4}, "item": {"table": "item"}},
    "bag": {"recent": {"table": "item", "max_length": 3}},
    "tasks": {
        "click": {"kind": "binary", "label": "click"},
        "bought": {"kind": "binary", "label": "qty > 1", "observed_when": "click"},
        "dwell": {"kind": "regression", "label": "LN(1 + click_dwell)", "observed_when": "click"},
    },
    "weight": "CASE WHEN qty = 3 THEN 2 ELSE 1 END",
    "event_time": "at",
    "split": {"by": "time", "valid_from": "1970-01-02", "test_from": "1970-01-03"},
}
DAYS, ROWS_PER_DAY = 3, 300
LANES = {"small_dataset": "integration", "device": "integration", "two_ranks": "system", "ranks": "system"}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by what they need: see LANES. Others that are no unit tests carry their mark.

    Files with tests of the lane system come first, so that no worker waits in the end for one that has just begun a long file.
    """
    for item in items:
        for fixture in LANES.keys() & getattr(item, "fixturenames", ()):
            item.add_marker(LANES[fixture])
    long = {item.path for item in items if item.get_closest_marker("system")}
    items.sort(key=lambda item: item.path not in long)


def pytest_sessionstart(session: pytest.Session) -> None:
    """The process that hands tests out to others collects none: garbage is collected in it from the start."""
    if hasattr(session.config, "workerinput") or session.config.getoption("numprocesses", None) is None:
        return
    gc.enable()


def pytest_collection_finish() -> None:
    """From here on garbage is collected, but a million objects of libraries and tests are not gone over for it every time."""
    gc.freeze()
    gc.enable()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names a case of bytes by its argument: a file's bytes may hold the time, and all workers must collect the same names."""
    return argname if isinstance(val, bytes) else None


def small_row(number: int) -> dict[str, str]:
    """Row `number` of the log; every column but `id` repeats with a period of its own."""
    day, second = divmod(number, ROWS_PER_DAY)
    return {
        "id": str(number + 1000),
        "at": str(day * 86_400 + second),
        "user": f"u{number % 37}",
        "city": ["Paris, France", "Köln", "NA", 'the "Hague"', f"day {day} only"][number % 5],
        "item": f"i{number % 11}",
        "price": ["1.5", "20", "", "3e2"][number % 4],
        "age": str(20 + number % 13) if number % 7 else "NA",
        "recent": "|".join(f"i{(number + k) % 11}" for k in range(number % 5)),
        "qty": str(number % 4),
    }


def write_csv(path: Path, rows: list[dict[str, str]], quote_all: bool = False) -> None:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="", encoding="utf-8") as file:
        quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
        writer = csv.DictWriter(file, list(rows[0]), quoting=quoting, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_small_log(folder: Path) -> None:
    """Three days: plain, gzip and all quoted (header too); every third is clicked, one twice; one click is of no row."""
    rows = [small_row(number) for number in range(DAYS * ROWS_PER_DAY)]
    for day, name in enumerate(["impressions-1.csv", "impressions-2.csv.gz", "impressions-3.csv"]):
        write_csv(folder / name, rows[day * ROWS_PER_DAY : (day + 1) * ROWS_PER_DAY], quote_all=day == 2)
    clicks = [{"id": row["id"], "dwell": str(n % 50)} for n, row in enumerate(rows) if n % 3 == 0]
    write_csv(folder / "clicks-1.csv", [*clicks[50:], {"id": "99999", "dwell": "1"}])
    write_csv(folder / "clicks-2.csv", [*clicks[:50], {"id": clicks[60]["id"], "dwell": "9999"}])


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Weights drawn in a test are the same in every run, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def log_configuration() -> Iterator[None]:
    """A job that runs in the tests' process configures the log: undone, so that caplog sees later tests' lines."""
    yield
    for name in ("features", "models", "pipeline"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def small_content() -> Callable[[], dict[str, Any]]:
    """Gives a fresh copy of the small log's schema, as plain data."""
    return lambda: copy.deepcopy(SMALL_SCHEMA)


@pytest.fixture(scope="session")
def small_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 3 x 300 impressions and their clicks. Copy it to change it."""
    folder = tmp_path_factory.mktemp("small_log")
    write_small_log(folder)
    return folder


@pytest.fixture(scope="session")
def small_dataset(small_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of `small_log` in its order, in row groups of 32 and shards of 100. Copy it to change it."""
    from features.schema.schema import Schema
    from pipeline.ingest.config import PreprocessConfig
    from pipeline.ingest.job import preprocess

    out = tmp_path_factory.mktemp("small") / "dataset"
    config = PreprocessConfig(input=str(small_log), out=out, order="input", rows_per_row_group=32, rows_per_shard=100)
    preprocess(config, Schema.parse(copy.deepcopy(SMALL_SCHEMA), where="small.yaml"))
    return out


@pytest.fixture(scope="session")
def census_folder() -> Path:
    """The folder of the census file, or a skip with the reason."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TASKFUSE_DATA", default))
    if not (folder / "census-income.test.gz").exists():
        pytest.skip(f"no census-income.test.gz in {folder} (set TASKFUSE_DATA)")
    return folder
