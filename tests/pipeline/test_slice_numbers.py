"""The slices of a dimension and the number of each row's: ties, order, limits, missing values, codes of texts."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from features.errors import UserError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.evaluation.metrics import row_keys, slices
from pipeline.evaluation.metrics.base import bucket_of
from pipeline.evaluation.metrics.row_keys import SplitKeys
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.metrics.slices import SliceNumbers

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def dataset(sliced_dataset: Path) -> Path:
    return sliced_dataset


def keys_of(dataset: Path, **settings: Any) -> SplitKeys:
    return SplitKeys(MeasureConfig(**settings), Dataset(dataset), ["test"])


def test_of_equally_frequent_values_the_smaller_are_slices(dataset: Path) -> None:
    shards = Dataset(dataset).shards("test")
    prices = pl.concat([pl.read_parquet(dataset / shard.path)["raw.price"] for shard in shards])
    counts = Counter(prices.drop_nulls())
    wanted = sorted(counts, key=lambda price: (-counts[price], price))[:40]
    assert counts[wanted[39]] == counts[wanted[38]]
    names = next(
        n for n in keys_of(dataset, slices=["price"], top=41, min_rows=1).numbers if n.dimension.name == "price"
    ).names
    assert names == ("price=missing", *(f"price={price}" for price in wanted))


def test_ranges_days_and_hours_are_listed_in_order_and_wholly(dataset: Path) -> None:
    edges = [17, 18, 20, 30, 40, 60]
    found = {
        n.dimension.name: n.names
        for n in keys_of(dataset, slices=[{"column": "who_age", "edges": edges}], top=2, min_rows=1).numbers
    }
    inner = tuple(f"who_age {a}..{b}" for a, b in zip(edges, edges[1:], strict=False))
    assert found["who_age"] == ("who_age below 17", *inner, "who_age from 60", "who_age missing")
    assert found["hour"] == tuple(f"hour={hour:02d}" for hour in range(24))
    assert found["day"] == tuple(f"day=2026-11-{day:02d}" for day in (6, 7, 8, 9))


def test_what_is_off_makes_no_slices(dataset: Path) -> None:
    assert keys_of(dataset, cold_start=False, by_time=[]).numbers == []
    found = keys_of(dataset, by_time=["hour"], cold_start=False, min_rows=20).numbers
    assert [numbers.dimension.name for numbers in found] == ["hour"]


def test_a_dataset_without_kept_columns_and_with_times_that_are_no_dates(small_dataset: Path) -> None:
    keys = SplitKeys(MeasureConfig(min_rows=1), Dataset(small_dataset), ["test"])
    assert keys.cluster == keys.group == "row"
    assert {numbers.dimension.name for numbers in keys.numbers} <= {"city (cold start)", "item (cold start)"}
    assert any(name.startswith("city: missing") for numbers in keys.numbers for name in numbers.names)
    with pytest.raises(UserError, match=r"cluster_by=user: not a kept column of .*set cluster_by=row"):
        SplitKeys(MeasureConfig(cluster_by="user"), Dataset(small_dataset), ["test"])


def test_ids_beyond_a_table_are_named_before_they_are_looked_up(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_keys, "table_sizes", lambda _: {"city": 2})
    with pytest.raises(UserError, match=r"id \d of city is not in its table, which has 0 \.\. 1"):
        _ = keys_of(dataset).numbers


def table_of(**columns: Any) -> pa.Table:
    return pa.table({f"raw.{name}": values for name, values in columns.items()})


def numbers_of(dataset: Path, entry: Any, tables: list[pa.Table], top: int = 20, least: int = 1) -> SliceNumbers:
    [dimension] = slices.dimensions(MeasureConfig(slices=[entry], cold_start=False, by_time=[]), Dataset(dataset))
    [counts] = slices.count_values([dimension], tables)
    return SliceNumbers(dimension, counts, top, least)


@pytest.mark.parametrize("dictionary", [False, True])
def test_100_000_values_are_counted_over_row_groups(dataset: Path, dictionary: bool) -> None:
    """Each value in two of 20 row groups, so that partial counts have to be added up."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.permutation(100_000), rng.permutation(100_000), np.full(7, 77), np.full(5, 3)])
    texts = [pa.array([f"v{v}" for v in part]) for part in np.array_split(values, 20)]
    tables = [table_of(device=text.dictionary_encode() if dictionary else text) for text in texts]
    numbers = numbers_of(dataset, "device", tables, top=4)
    assert numbers.names == ("device=v77", "device=v3", "device=v0", "device=v1")
    found = np.concatenate([numbers.of(table) for table in tables])
    assert found.tolist() == [{77: 0, 3: 1, 0: 2, 1: 3}.get(v, -1) for v in values.tolist()]


@pytest.mark.parametrize("dictionary", [False, True])
def test_missing_values_are_one_slice_alone_and_in_crosses(dataset: Path, dictionary: bool) -> None:
    texts = pa.array(["a", None, "b", None, "a", "missing"])
    table = table_of(
        device=texts.dictionary_encode() if dictionary else texts, position=pa.array([1, 1, None, None, 1, 1])
    )
    alone = numbers_of(dataset, "device", [table])
    assert [alone.names[n] for n in alone.of(table)] == [
        "device=a", "device=missing", "device=b", "device=missing", "device=a", 'device="missing"'
    ]  # fmt: skip
    cross = numbers_of(dataset, ["device", "position"], [table])
    assert [cross.names[n] for n in cross.of(table)] == [
        "device=a, position=1", "device=missing, position=1", "device=b, position=missing",
        "device=missing, position=missing", "device=a, position=1", 'device="missing", position=1',
    ]  # fmt: skip
    nothing = table_of(device=pa.nulls(3, pa.string()).dictionary_encode() if dictionary else pa.nulls(3, pa.string()))
    assert numbers_of(dataset, "device", [table]).of(nothing).tolist() == alone.of(table)[[1, 1, 1]].tolist()
    assert numbers_of(dataset, "device", [table], least=2).names == ("device=missing", "device=a")


def test_negative_zero_is_zero_and_edges_belong_to_the_range_above(dataset: Path) -> None:
    table = table_of(price=pa.array([0.0, -0.0, 5.0, math.nextafter(5, 0), None]))
    numbers = numbers_of(dataset, "price", [table])
    assert numbers.names[0] == "price=0.0"
    assert numbers.of(table)[:2].tolist() == [0, 0]
    ranges = numbers_of(dataset, {"column": "price", "edges": [0, 5]}, [table])
    assert [ranges.names[n] for n in ranges.of(table)] == [
        "price 0..5", "price 0..5", "price from 5", "price 0..5", "price missing"
    ]  # fmt: skip
    assert ranges.names == ("price 0..5", "price from 5", "price missing")
    large = numbers_of(
        dataset,
        {"column": "price", "edges": [-2.5, 1794002400, 1794002401]},
        [table_of(price=[-3.0, 1.0, 2e9, 1794002400.5])],
    )
    assert large.names == (
        "price below -2.5", "price -2.5..1794002400", "price 1794002400..1794002401", "price from 1794002401"
    )  # fmt: skip


def test_past_the_limit_of_values_the_most_frequent_are_kept(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "MAX_VALUES", 3)
    tables = [table_of(position=pa.array([50, 50, 50, 60, 60, 99, 9 + n])) for n in range(40)]
    assert numbers_of(dataset, "position", tables).names == ("position=50", "position=60", "position=99")


def test_a_share_of_clusters_is_spread_over_all_buckets(dataset: Path) -> None:
    keys = keys_of(dataset, cluster_by="row", share=0.2)
    batches = SplitReader(Dataset(dataset), "test", 64, keys=keys).batches()
    clusters = np.concatenate([batch.key_BC[:, 0][batch.row_id_B >= 0].numpy() for batch in batches])
    assert set(bucket_of(clusters.astype(np.uint32), 10)) == set(range(10))


@pytest.mark.parametrize("lowest", [-(1 << 63), (1 << 63) - 3, -2])
def test_integers_at_the_ends_of_their_range_are_slices(lowest: int) -> None:
    class Value(slices.Dimension):
        name, columns, has_order = "value", ("value",), True

        def values(self, table: pa.Table) -> pa.Array:
            return table["value"].combine_chunks()

    given = [lowest, lowest + 2, lowest + 1, None, 7]
    table = pa.table({"value": pa.array(given, pa.int64())})
    counts = slices.count_values([Value()], [table.slice(0, 3)])[0]
    numbers = SliceNumbers(Value(), counts, top=10, min_rows=1)
    assert numbers.names == tuple(f"value={lowest + place}" for place in range(3))
    assert numbers.of(table.slice(0, 3)).tolist() == [0, 2, 1]
    assert numbers.of(table.slice(3)).tolist() == [-1, -1]
    assert numbers.of(table.slice(4)).tolist() == [-1]
