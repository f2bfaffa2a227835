"""Slices, clusters, groups and shares of an evaluation, end to end: against formulas on rows that are filtered by hand."""

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
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation import predictions
from pipeline.evaluation import scorer as scoring
from pipeline.evaluation.follow import EvaluateConfig, evaluate
from pipeline.evaluation.metrics import evaluated as evaluations
from pipeline.evaluation.metrics.base import bucket_of
from pipeline.evaluation.metrics.evaluated import Evaluated, Provenance, paired
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.metrics.slice_names import can_occur
from pipeline.evaluation.metrics.slices import dimensions as slice_dimensions
from pipeline.evaluation.scorer import Scorer
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
MOST = 6  # slices of a dimension whose figures are compared
Row = dict[str, Any]
Rows = list[Row]


@pytest.fixture(scope="module")
def dataset(sliced_dataset: Path) -> Path:
    return sliced_dataset


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
        z, y, w = (
            np.array([row[key] for row in counted], float) for key in (f"logit.{task}", f"label.{task}", "weight")
        )
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
            wanted = None if math.isnan(value) else pytest.approx(value, rel=2e-5)
            assert values[metric] == wanted, (name, task, metric)


def scored(
    run: Run, dataset: Path, split: Any = "test", batch_size: int = 8192, step: int = 8, **settings: Any
) -> Evaluated:
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
    return lambda row: (
        "missing" if row["city"] is None else value_name(row["city"]) if row["city"] in known else "unseen"
    )


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
    of_train = [pl.read_parquet(dataset / shard.path)["raw.price"] for shard in Dataset(dataset).shards("train")]
    mean_price = pl.concat(of_train).mean()

    def named(*columns: str) -> Callable[[Row], str]:
        return lambda row: ", ".join(f"{c}={city(row) if c == 'city' else value_name(row[c])}" for c in columns)

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
    settings = MeasureConfig(slices=SLICES)
    named = {known.name: known.slice_names for known in slice_dimensions(settings, Dataset(dataset))}
    assert named.keys() == dimensions.keys()
    assert all(can_occur(name, named) for name in found["slice"].unique())
    assert named["age"] == ["age below 20", "age 20..40", "age from 40", "age missing"]
    assert named["hour"] == [f"hour={hour:02d}" for hour in range(24)]
    assert (named["day"][0], named["day"][-1]) == ("day=1970-01-01", "day=2099-12-31")
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
            assert_figures(
                found.filter(dimension=dimension), name, [row for row in rows[split] if name_of(row) == name]
            )


def row_ids(run: Run, dataset: Path, **settings: Any) -> list[int]:
    batches = Scorer(run, Dataset(dataset), "test", 50, MeasureConfig(**settings)).batches()
    return [x for batch in batches for x in batch.row_id_B.tolist() if x >= 0]


def test_the_size_of_batches_changes_no_figure(run: Run, dataset: Path) -> None:
    whole, small = (scored(run, dataset, batch_size=size, slices=SLICES, min_rows=20, buckets=5) for size in (8192, 17))
    keys = ["task", "metric", "slice"]
    assert whole.figures.select(keys).equals(small.figures.select(keys))
    for column in ("value", "se"):
        np.testing.assert_allclose(*(x.figures[column].to_numpy() for x in (whole, small)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("settings", "by"), [
    ({}, "user"), ({"cluster_by": "session"}, "session"), ({"cluster_by": "session", "share_by": "user"}, "user"),
    ({"cluster_by": "row"}, "row_id"), ({"share_by": "position"}, "position"), ({"share_by": "price"}, "price"),
])  # fmt: skip
def test_a_share_has_whole_clusters_and_figures_of_its_rows(
    run: Run, dataset: Path, rows: dict[str, Rows], settings: dict[str, Any], by: str
) -> None:
    taken, more = (row_ids(run, dataset, share=share, **settings) for share in (0.4, 0.7))
    assert taken == row_ids(run, dataset, share=0.4, **settings)
    assert len(set(taken)) == len(taken)
    assert set(taken) < set(more) < {row["row_id"] for row in rows["test"]}
    states: dict[Any, list[bool]] = {}
    for row in rows["test"]:
        key = row["row_id"] if row[by] is None else f"{by} {row[by]}"  # rows without the key are clusters of their own
        states.setdefault(key, []).append(row["row_id"] in taken)
    assert all(len(set(found)) == 1 for found in states.values())
    clusters = len(states)
    chosen = sum(found[0] for found in states.values())
    assert abs(chosen - 0.4 * clusters) < 4 * math.sqrt(0.4 * 0.6 * clusters)
    found = scored(run, dataset, share=0.4, slices=["device"], min_rows=1, **settings).figures
    of_share = [row for row in rows["test"] if row["row_id"] in set(taken)]
    assert_figures(found, "all", of_share)
    assert_figures(found, "device=desktop", [row for row in of_share if row["device"] == "desktop"])


@pytest.mark.parametrize("cluster", ["user", "position", "price", "row"])
def test_a_value_without_a_bucket_is_that_of_the_clusters_in_the_others(
    run: Run, dataset: Path, rows: dict[str, Rows], cluster: str
) -> None:
    scorer = Scorer(
        run, Dataset(dataset), "test", 64, MeasureConfig(cluster_by=cluster, buckets=3, slices=["device"], min_rows=1)
    )
    bucket_of_row: dict[int, int] = {}
    for batch in scorer.batches():
        found_B = bucket_of((batch.key_BC[:, 0].numpy() & 0xFFFFFFFF).astype(np.uint32), 3)
        bucket_of_row |= dict(zip(batch.row_id_B.tolist(), found_B.tolist(), strict=True))
    buckets: dict[Any, set[int]] = {}
    missing: list[int] = []
    for row in rows["test"]:
        key = row["row_id" if cluster == "row" else cluster]
        buckets.setdefault(key, set()).add(bucket_of_row[row["row_id"]])
        missing += [bucket_of_row[row["row_id"]]] if key is None else []
    assert all(len(found) == 1 for key, found in buckets.items() if key is not None)
    assert set().union(*buckets.values()) == {0, 1, 2}
    assert cluster == "row" or set(missing) == {0, 1, 2}
    found = scorer.score(8).figures
    for name in ("all", "device=mobile"):
        for k in range(3):
            others = [
                row for row in rows["test"]
                if bucket_of_row[row["row_id"]] != k and (name == "all" or row["device"] == "mobile")
            ]  # fmt: skip
            for task, metric in (("click", "ne"), ("click", "calibration"), ("spend", "nrmse")):
                [left] = found.filter(slice=name, task=task, metric=metric)["left_out"]
                assert left[k] == pytest.approx(formulas(others)[task][metric], rel=2e-5), (name, task, metric, k)


@pytest.mark.parametrize(("group", "key"), [("session", "session"), ("who_country", "who_country"), (None, "user")])
def test_gauc_is_the_mean_over_the_groups_of_a_column(
    run: Run, dataset: Path, rows: dict[str, Rows], group: str | None, key: str
) -> None:
    found = scored(run, dataset, group=group).value("click", "gauc")
    groups: dict[Any, Rows] = {}
    for row in rows["test"]:
        if row["weight"] > 0:
            groups.setdefault(("row", row["row_id"]) if row[key] is None else row[key], []).append(row)
    total = weights = 0.0
    for of_group in groups.values():
        y, z, w = (
            np.array([row[name] for row in of_group], float) for name in ("label.click", "logit.click", "weight")
        )
        if 0 < y.mean() < 1:
            total += w.sum() * roc_auc_score(y, z, sample_weight=w)
            weights += w.sum()
    assert found == pytest.approx(total / weights, rel=1e-6)


def test_rows_that_are_groups_of_their_own_are_not_ranked(run: Run, dataset: Path) -> None:
    found = scored(run, dataset, group="row")
    assert found.value("click", "gauc") is found.value("click", "ndcg") is None
    assert scored(run, dataset, cluster_by="row").value("click", "gauc") is None
    assert scored(run, dataset, cluster_by="row", group="session").value("click", "gauc") is not None


def test_evaluations_of_the_same_rows_pair_over_checkpoints_and_others_are_refused(run: Run, dataset: Path) -> None:
    settings: dict[str, Any] = {"share": 0.5, "slices": ["device"], "min_rows": 20, "buckets": 10}
    ours, theirs = (scored(run, dataset, step=step, **settings) for step in (8, 4))

    def provenance(split: Any = "test", batch_size: int = 64, **settings: Any) -> Provenance:
        return Scorer(run, Dataset(dataset), split, batch_size, MeasureConfig(**settings)).provenance_of(4, "")

    line = paired(ours, theirs).filter(task="click", metric="ne", slice="device=desktop").to_dicts()[0]
    names = {"slice": "device=desktop", "task": "click", "metric": "ne"}
    values = [x.figures.filter(**names)["value"][0] for x in (ours, theirs)]
    assert (line["ours"], line["theirs"], line["delta"]) == (*values, values[0] - values[1])
    assert values[0] != values[1]
    left = [x.figures.filter(**names)["left_out"][0].to_list() for x in (ours, theirs)]
    deltas = np.array([a - b for a, b in zip(*left, strict=True) if a is not None])
    count = len(deltas)
    assert (len(left[0]), line["buckets"]) == (10, count)
    assert line["se"] == pytest.approx(math.sqrt((count - 1) / count * ((deltas - deltas.mean()) ** 2).sum()))
    for other in (
        {"share": 0.6},
        {"share_by": "session"},
        {"cluster_by": "session"},
        {"buckets": 11},
        {"share": 1.0},
        {"memory": 1e-5},
    ):
        with pytest.raises(UserError, match="were not evaluated on the same rows"):
            paired(ours, Evaluated(theirs.figures, provenance(**settings | other)))
    with pytest.raises(UserError, match="were not evaluated on the same rows"):
        paired(ours, Evaluated(theirs.figures, provenance("valid", **settings)))
    assert paired(ours, Evaluated(theirs.figures, provenance(**settings, batch_size=3))).height


@pytest.mark.parametrize("memory", [8.0, 3.5e-5, 1.7e-5])  # of the last, half of the rows
def test_ranks_have_the_figures_of_one_whatever_memory_they_have(
    run: Run, dataset: Path, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = MeasureConfig(slices=["device", "city"], min_rows=5, buckets=4, share=0.8, memory=memory)
    whole = Scorer(run, Dataset(dataset), "test", 64, settings)
    one, _ = whole.metrics(8)
    scorer = Scorer(run, Dataset(dataset), "test", 23, settings)
    states: list[Any] = []
    monkeypatch.setattr(
        scoring, "to_first", lambda state: states.append(state) or (None if scorer.weights.rank else states)
    )
    seen: list[list[int]] = []
    for scorer.weights.rank, scorer.weights.ranks in ((2, 3), (1, 3), (0, 3)):
        seen.append([])
        merged, _ = scorer.metrics(8, lambda batch, _: seen[-1].extend(x for x in batch.row_id_B.tolist() if x >= 0))
    assert all(seen)
    together = [x for part in seen for x in part]
    assert sorted(together) == sorted(row_ids(run, dataset, share=0.8))
    assert merged.rows == one.rows
    assert (merged.ranking() == "exact") == (one.ranking() == "exact") == (memory > 2e-5)
    ours, theirs = (metrics.frame(metrics.figures()) for metrics in (merged, one))
    assert ours.drop("value", "se", "left_out").equals(theirs.drop("value", "se", "left_out"))
    for column in ("value", "se"):
        np.testing.assert_allclose(ours[column].to_numpy(), theirs[column].to_numpy(), rtol=1e-5, atol=1e-6)
    assert scorer.provenance_of(8, "") == whole.provenance_of(8, "")
    assert (scorer.measured == settings.hash) == (memory > 2e-5)  # evaluated again with more of it


def test_the_file_of_an_evaluation_has_what_was_scored(run: Run, dataset: Path) -> None:
    [record] = evaluate(EvaluateConfig(run=run.path, split="valid", step=8, threads=1, slices=["device"], min_rows=10))
    found = evaluations.read(run.path / "evaluations" / record["evaluation"])
    expected = scored(run, dataset, "valid", slices=["device"], min_rows=10)
    assert found.provenance == expected.provenance
    assert found.provenance.min_rows == 10
    assert found.figures.equals(expected.figures)
    assert (record["cluster"], record["group"]) == ("user", "user")
    assert record["metrics"]["click"]["ne"] == found.value("click", "ne")
    assert record["rows_evaluated"] == sum(row["weight"] > 0 for row in predicted_rows(run, dataset))


def predicted_rows(run: Run, dataset: Path) -> Rows:
    shards = Dataset(dataset).shards("valid")
    return pl.concat([pl.read_parquet(dataset / shard.path, columns=["weight"]) for shard in shards]).to_dicts()


def test_what_is_off_makes_no_slices_and_no_intervals(dataset: Path, run: Run) -> None:
    found = scored(run, dataset, cold_start=False, by_time=[], buckets=1).figures
    assert set(found["slice"]) == {"all"}
    assert found["se"].null_count() == found.height
