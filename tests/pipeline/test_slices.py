"""Slices, clusters, groups and shares of an evaluation, end to end: against the formulas on the rows that are filtered by hand."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import sliced_log
from sklearn.metrics import log_loss, mean_squared_error, roc_auc_score

from features.errors import UserError
from features.schema.schema import Schema
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.evaluation import predictions
from pipeline.evaluation.follow import EvaluateConfig, evaluate
from pipeline.evaluation.metrics import evaluated as evaluations
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.metrics.base import bucket_of
from pipeline.evaluation.metrics.evaluated import Evaluated, paired
from pipeline.evaluation.metrics.row_keys import SplitKeys
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.scorer import Scorer
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess
from pipeline.run.run import Run
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

pytestmark = pytest.mark.integration

MODEL = ModelConfig(fusion={"name": "adatt", "levels": [[8], [4]]}, tower=[4])
BINARY = ("click", "buy")
SLICES: list[Any] = [
    "device",
    "position",
    "price",
    "who_country",
    "cheap",
    "signup",
    "city",
    ["device", "who_country"],
    ["cheap", "city", "position"],
    {"column": "who_age", "edges": [18, 25.5, 40]},
    {"column": "age", "edges": [20, 40]},
    {"column": "plain", "edges": [-1, 5, 20]},
    {"sql": "position <= 3"},
    {"sql": "device = 'mobile' AND price > 2.5"},
]
ORDERED = ("who_age", "age", "plain", "day", "hour")  # all of their slices are measured
MOST = 12  # slices of a dimension whose figures are compared
Row = dict[str, Any]
Rows = list[Row]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sliced")
    (folder / "log").mkdir()
    sliced_log.write_log(folder / "log")
    preprocess(
        PreprocessConfig(input=str(folder / "log"), out=folder / "dataset", rows_per_row_group=64, rows_per_shard=200),
        Schema.parse(copy.deepcopy(sliced_log.CONTENT), where="sliced.yaml"),
    )
    return folder / "dataset"


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings(
        batch_size=64, lanes=2, epochs=2, max_steps=8, checkpoint_every=4, tables={"lr": 0.1}, threads=1
    )
    train(TrainConfig(dataset=dataset, run=folder, model=MODEL, train=settings))
    return Run(folder)


@pytest.fixture(scope="module")
def rows(run: Run, dataset: Path) -> dict[str, Rows]:
    """Of the splits test and all the rows of the log with the last checkpoint's predictions."""
    found = {}
    raw = {int(row["id"]): row for row in sliced_log.rows_of_log()}
    users = Path(dataset.parent / "log" / "users.csv").read_text().splitlines()[1:]
    of_user = {user: (country, int(age)) for user, country, age in (line.split(",") for line in users)}
    for split in ("test", "all"):
        list(evaluate(EvaluateConfig(run=run.path, split=split, step=8, threads=1, predictions=True, slices=SLICES)))
        predicted = pl.read_parquet(predictions.path(run, split, 8)).to_dicts()
        found[split] = [row | typed(raw[row["row_id"]], of_user) for row in predicted]
    return found


def typed(row: dict[str, str], of_user: dict[str, tuple[str, int]]) -> Row:
    """The values of a row of the log; missing: None."""
    country, age = of_user.get(row["user"], (None, None))
    price = float(row["price"]) if row["price"] else None
    return {
        **{name: row[name] or None for name in ("user", "device", "session", "city")},
        "position": int(row["position"]) if row["position"] else None,
        "price": price,
        "signup": int(row["signup"]) if row["signup"] else None,
        "cheap": None if price is None else int(price < 5),
        "who_country": country or None,
        "who_age": age,
        "at": datetime.fromtimestamp(int(row["at"]), timezone.utc),
    }


def formulas(rows: Rows, entropy_of: Rows | None = None) -> dict[str, dict[str, float]]:
    """Figures of each task in float64."""
    found: dict[str, dict[str, float]] = {}
    for task in (*BINARY, "spend"):
        counted = [row for row in rows if row[f"label.{task}"] is not None and row["weight"] > 0]
        z, y, w = (np.array([row[key] for row in counted], float) for key in (f"logit.{task}", f"label.{task}", "weight"))
        found[task] = {"rows": len(counted)}
        if not counted:
            continue
        found[task]["weight_sum"] = w.sum()
        mean = np.average(y, weights=w)
        if task == "spend":
            spread = np.average((y - mean) ** 2, weights=w)
            found[task]["rmse"] = math.sqrt(mean_squared_error(y, z, sample_weight=w))
            found[task]["nrmse"] = found[task]["rmse"] / math.sqrt(spread) if len(counted) > 1 else math.nan
            found[task]["calibration"] = (w * z).sum() / (w * y).sum()
        elif 0 < mean < 1:
            p = 1 / (1 + np.exp(-z))
            entropy = -(mean * math.log(mean) + (1 - mean) * math.log(1 - mean))
            found[task]["ne"] = log_loss(y, p, sample_weight=w) / entropy
            found[task]["auc"] = roc_auc_score(y, z, sample_weight=w)
            found[task]["calibration"] = (w * p).sum() / (w * y).sum()
    return found


def assert_figures(found: pl.DataFrame, name: str, rows: Rows) -> None:
    """A slice's lines are the formulas on its rows; of a task without rows that count there are none."""
    assert rows, name
    for task, expected in formulas(rows).items():
        lines = found.filter(slice=name, task=task)
        values = dict(zip(lines["metric"], lines["value"], strict=True))
        assert set(lines["rows"]) == ({expected["rows"]} if expected["rows"] else set()), (name, task)
        for metric, value in expected.items() if values else ():
            assert values[metric] == pytest.approx(value, rel=2e-5, nan_ok=True), (name, task, metric)


def scored(run: Run, dataset: Path, split: Any = "test", batch_size: int = 8192, step: int = 8, **settings: Any) -> Evaluated:
    return Scorer(run, Dataset(dataset), split, batch_size, MeasureConfig(**settings)).score(step)


def value_name(value: object) -> object:
    """How a value is written in a slice's name."""
    quoted = {"missing": '"missing"', "tv, country=DE": '"tv, country=DE"', "Paris, France": '"Paris, France"'}
    return "missing" if value is None else quoted.get(str(value), value)


def vocabulary(dataset: Path, table: str) -> Counter[str]:
    """Values that train rows have, with their rows, counted in the log itself."""
    train_ids = {x for s in Dataset(dataset).shards("train") for x in pl.read_parquet(dataset / s.path)["row_id"]}
    column = {"user_id": "user", "city": "city"}[table]
    rows = (row for row in sliced_log.rows_of_log() if int(row["id"]) in train_ids)
    return Counter(row[column] for row in rows if row[column])


def of_city(dataset: Path) -> Callable[[Row], object]:
    known = {city for city, count in vocabulary(dataset, "city").items() if count >= 20}
    return lambda row: "missing" if row["city"] is None else value_name(row["city"]) if row["city"] in known else "unseen"


def of_range(value: float | None, edges: list[float]) -> str:
    if value is None:
        return "missing"
    below = [edge for edge in edges if edge <= value]
    if not below:
        return f"below {edges[0]:g}"
    return f"from {edges[-1]:g}" if len(below) == len(edges) else f"{below[-1]:g}..{edges[len(below)]:g}"


def names_by_hand(dataset: Path) -> dict[str, Callable[[Row], str | None]]:
    """Of each dimension the name of a row's slice, None for none."""
    city, counts = of_city(dataset), {name: vocabulary(dataset, name) for name in ("user_id", "city")}
    mean_price = np.mean(
        [float(p) for s in Dataset(dataset).shards("train") for p in pl.read_parquet(dataset / s.path)["raw.price"].drop_nulls()]
    )

    def named(*columns: str) -> Callable[[Row], str]:
        return lambda row: ", ".join(
            f"{c}={city(row) if c == 'city' else value_name(row[c])}" for c in columns
        )

    def cold(feature: str, column: str, least: int) -> Callable[[Row], str | None]:
        def name(row: Row) -> str | None:
            count = counts[feature][row[column]]
            state = "missing" if row[column] is None else "unseen" if count < least else "rare" if count < 10 else None
            return state and f"{feature}: {state}"

        return name

    single = ("device", "position", "price", "who_country", "cheap", "signup", "city")
    return {
        **{column: named(column) for column in single},
        "device, who_country": named("device", "who_country"),
        "cheap, city, position": named("cheap", "city", "position"),
        "who_age": lambda row: f"who_age {of_range(row['who_age'], [18, 25.5, 40])}",
        "age": lambda row: f"age {of_range(row['who_age'], [20, 40])}",
        # Without a flag of missing values these have the mean.
        "plain": lambda row: f"plain {of_range(mean_price if row['price'] is None else row['price'], [-1, 5, 20])}",
        "position <= 3": lambda row: "position <= 3" if row["position"] is not None and row["position"] <= 3 else None,
        "device = 'mobile' AND price > 2.5": lambda row: (
            "device = 'mobile' AND price > 2.5" if row["device"] == "mobile" and (row["price"] or 0) > 2.5 else None
        ),
        "user_id (cold start)": cold("user_id", "user", 1),
        "city (cold start)": cold("city", "city", 20),
        "day": lambda row: f"day={row['at']:%Y-%m-%d}",
        "hour": lambda row: f"hour={row['at']:%H}",
    }  # fmt: skip


@pytest.mark.parametrize(("split", "top", "least"), [("test", 1000, 1), ("test", 3, 20), ("all", 20, 30)])
def test_figures_of_every_kind_of_slice_are_those_of_its_rows(
    run: Run, dataset: Path, rows: dict[str, Rows], split: str, top: int, least: int
) -> None:
    found = scored(run, dataset, split, 100, slices=SLICES, top=top, min_rows=least, buckets=4).figures
    assert_figures(found, "all", rows[split])
    dimensions = names_by_hand(dataset)
    assert set(found["dimension"]) - {"all"} <= dimensions.keys()
    for dimension, name_of in dimensions.items():
        counts = Counter(name for row in rows[split] if (name := name_of(row)) is not None)
        frequent = {name: count for name, count in counts.items() if count >= least}
        names = set(found.filter(dimension=dimension)["slice"])
        uncounted = {name for name in frequent if all(r["weight"] == 0 for r in rows[split] if name_of(r) == name)}
        expected = frequent.keys() - uncounted
        if dimension in ORDERED or len(frequent) <= top:
            assert names == expected, dimension
        else:
            assert names < expected, dimension
            assert len(names) == top, dimension
            assert min(frequent[name] for name in names) >= max(frequent[name] for name in expected - names), dimension
        for name in sorted(names)[:MOST]:
            assert_figures(found.filter(dimension=dimension), name, [row for row in rows[split] if name_of(row) == name])
