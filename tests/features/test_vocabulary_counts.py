"""Counts of a vocabulary's values: against plain counts of the rows, on disk, of other encoders, and handed over."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_by_hand import CONTENT, SCHEMA, draw_rows, fit_encoders

from features.errors import UserError
from features.fit import reuse
from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.schema.schema import Schema

CITY, TAGS = "vocabularies/city.parquet", "vocabularies/tags.parquet"
ROWS = draw_rows(400)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fit_encoders(ROWS)[0].save(tmp_path / "encoders")
    return tmp_path / "encoders"


def counts_of(encoders: Encoders, table: str) -> dict[str, int]:
    values = encoders.vocabularies[table].to_pylist()
    return dict(zip(values, encoders.counts[table].tolist(), strict=True))


def test_a_value_counts_as_often_as_rows_and_lists_have_it():
    encoders, _ = fit_encoders(ROWS)
    cities = Counter(city for city in ROWS["city"].to_pylist() if city is not None)
    tags = Counter(tag for row in ROWS["tags"].to_pylist() for tag in row)
    assert counts_of(encoders, "city") == {city: count for city, count in cities.items() if count >= 3}
    assert counts_of(encoders, "tags") == dict(tags)
    assert encoders.counts.keys() == {"city", "tags"}, "only tables with a vocabulary have counts"
    assert all(count_V.dtype == np.int64 for count_V in encoders.counts.values())


def test_of_a_shared_table_the_values_of_all_its_features_count():
    content = CONTENT | {
        "tables": {"item": {"vocabulary": {"min_count": 2}}},
        "categorical": {"city": {"table": "item"}},
        "bag": {"tags": {"table": "item"}},
        "dense": {},
    }
    city, tags = pa.array(["a", "b", None]), pa.array([["a", "a"], ["c"], []], pa.large_list(pa.string()))
    coded = pa.LargeListArray.from_arrays(tags.offsets, tags.values.dictionary_encode())
    rows = {"city": city.dictionary_encode(), "tags": coded, "weight": [1.0] * 3}
    labels = {f"label.{task}": [0.0] * 3 for task in CONTENT["tasks"]}
    schema = Schema.parse(content, where="mine.yaml")
    encoders = Encoders.fit(schema, Statistics.of(schema, pa.table(rows | labels)))
    assert counts_of(encoders, "item") == {"a": 3}


def test_counts_come_back_from_disk_in_the_order_of_the_ids(folder):
    fitted, again = fit_encoders(ROWS)[0], Encoders.load(folder, SCHEMA)
    for table in ("city", "tags"):
        assert again.counts[table].tolist() == fitted.counts[table].tolist()
        assert again.counts[table].dtype == np.int64
    written = pq.read_table(folder / CITY)
    assert written.schema.field("count").type == pa.int64()
    assert {row["value"]: row["count"] for row in written.to_pylist()} == counts_of(again, "city")
    assert written["id"].to_pylist() == list(range(2, 2 + written.num_rows))


def test_files_of_before_there_were_counts_load_and_are_written_again_without(folder, tmp_path):
    pq.write_table(pq.read_table(folder / CITY).drop_columns(["count"]), folder / CITY)
    old = Encoders.load(folder, SCHEMA)
    assert old.counts["city"].tolist() == []
    assert len(old.counts["tags"]) == len(old.vocabularies["tags"])
    assert old.encode(ROWS) == fit_encoders(ROWS)[0].encode(ROWS)
    old.save(tmp_path / "again")
    assert pq.read_schema(tmp_path / "again" / CITY).names == ["value", "id"]
    assert pq.read_schema(tmp_path / "again" / TAGS).names == ["value", "id", "count"]


@pytest.mark.parametrize("old", [False, True])
def test_tables_that_a_grown_schema_keeps_have_the_counts_they_were_fitted_with(folder, old):
    if old:
        pq.write_table(pq.read_table(folder / CITY).drop_columns(["count"]), folder / CITY)
    known = Encoders.load(folder, SCHEMA)
    grown = Schema.parse(CONTENT | {"bag": {"tags": {"max_length": 2}}}, where="mine.yaml")
    fitted = Encoders.fit(grown, Statistics.of(grown, draw_rows(300, seed=1, cities=50)))
    kept = reuse.keep(fitted, known, reuse.unchanged(grown, SCHEMA), "0" * 16)
    assert kept.vocabularies["city"] == known.vocabularies["city"]
    assert kept.counts["city"].tolist() == known.counts["city"].tolist()
    assert kept.counts["tags"].tolist() == fitted.counts["tags"].tolist() != known.counts["tags"].tolist()
    made_by_hand = reuse.keep(
        fitted,
        Encoders(SCHEMA, known.vocabularies, known.moments, known.edges),
        reuse.unchanged(grown, SCHEMA),
        "0" * 16,
    )
    assert made_by_hand.counts["city"].tolist() == [], "not those of another vocabulary"


def refusal(folder: Path, **columns: Any) -> str:
    values = pq.read_table(folder / CITY)["value"]
    table = pa.table({"value": values, "id": pa.array(np.arange(len(values)) + 2), **columns})
    pq.write_table(table, folder / CITY)
    with pytest.raises(UserError) as caught:
        Encoders.load(folder, SCHEMA)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_counts_that_are_missing_negative_or_of_another_type_are_refused(folder):
    size = pq.read_metadata(folder / CITY).num_rows
    assert "the count of a value is missing or negative" in refusal(
        folder, count=pa.array([None, *range(size - 1)], pa.int64())
    )
    assert "the count of a value is missing or negative" in refusal(folder, count=pa.array([-1, *range(size - 1)]))
    for kind in (pa.int32(), pa.float64(), pa.string(), pa.uint64()):
        assert "are not those of a vocabulary (value: text, id and count: int64)" in refusal(
            folder, count=pa.array([1] * size).cast(kind)
        )
    lists = pa.array([[1]] * size, pa.list_(pa.int64()))
    assert "are not those of a vocabulary" in refusal(folder, count=lists)
    counts = pa.array([1] * size)
    assert "are not those of a vocabulary" in refusal(folder, counts=counts)
    table = pq.read_table(folder / CITY).drop_columns(["counts"])
    twice = pa.Table.from_arrays(
        [*table.columns, counts, counts],
        schema=pa.schema([*table.schema, ("count", pa.int64()), ("count", pa.int64())]),
    )
    pq.write_table(twice, folder / CITY)
    with pytest.raises(UserError, match="are not those of a vocabulary"):
        Encoders.load(folder, SCHEMA)
