"""Statistics and encoders against dictionaries, Counter and float64 numpy."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hashing import plain_hash

from features.encoders import MISSING, UNKNOWN, Encoders, arrow_schema
from features.errors import UserError
from features.raw import ROW_ID, SPLIT, WEIGHT
from features.schema import Schema
from features.statistics import Moments, Statistics

CONTENT: dict[str, Any] = {
    "source": {"files": "log.csv"},
    "tables": {"item": {"vocabulary": {"min_count": 2}}},
    "dense": {
        "plain": {"standardize": False},
        "scaled": {"missing_flag": True},
        "logged": {"column": "plain", "transform": "log1p", "missing_flag": True},
    },
    "categorical": {
        "city": {},
        "few": {"column": "city", "vocabulary": {"min_count": 2, "max_size": 3}},
        "hashed": {"column": "city", "hash": 7},
        "item": {"table": "item"},
    },
    "bag": {"recent": {"table": "item", "max_length": 3}, "tags": {"separator": ", ", "hash": 5}},
    "tasks": {"a": {"kind": "binary", "label": "y = '1'"}, "b": {"kind": "regression", "label": "LENGTH(y)"}},
    "split": {"by": "row_index", "modulo": 1, "train": [0]},
}
SCHEMA = Schema.parse(CONTENT, where="mine.yaml")

WORD = st.one_of(st.none(), st.sampled_from(["a", "b", "c", "B", "ä", "日本", "10", "9", ""]), st.text(max_size=3))
NUMBER = st.one_of(
    st.none(), st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6)), st.integers(-3, 3).map(float)
)
BAG = st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "c", "z", ""]), max_size=5).map("|".join))
ROW = st.fixed_dictionaries(
    {
        "plain": NUMBER, "scaled": NUMBER, "city": WORD, "item": WORD, "recent": BAG,
        "tags": st.one_of(st.none(), st.sampled_from(["", "x", "x, y", "x,y", ", x"])),
        SPLIT: st.sampled_from([0, 0, 0, 1, 2]),
    }
)  # fmt: skip
ROWS = st.lists(ROW, max_size=25)
TYPES = {
    **dict.fromkeys(["plain", "scaled"], pl.Float64),
    **dict.fromkeys(["city", "item", "recent", "tags"], pl.String),
    **dict.fromkeys(["label.a", "label.b", WEIGHT], pl.Float32),
    SPLIT: pl.Int8,
    ROW_ID: pl.Int64,
}


def frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Parsed rows, as features.raw gives them."""
    full = [
        {"label.a": 1.0 if i % 3 else None, "label.b": float(i), WEIGHT: 1 + i / 2, ROW_ID: 10 + i, SPLIT: 0} | row
        for i, row in enumerate(rows)
    ]
    return pl.DataFrame([[r.get(c) for c in TYPES] for r in full], schema=TYPES, orient="row")


def elements(bag: str | None, separator: str = "|", limit: int = 3) -> list[str]:
    return [e for e in (bag or "").split(separator) if e][:limit]


def plain_vocabulary(values: list[str], min_count: int = 1, max_size: int | None = None) -> list[str]:
    """The most frequent values first, ties by the order of their UTF-8 bytes."""
    counts = Counter(values)
    kept = sorted((v for v, n in counts.items() if n >= min_count), key=lambda v: (-counts[v], v.encode()))
    return kept[:max_size]


def plain_vocabularies(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    train = [r for r in rows if r[SPLIT] == 0]
    cities = [r["city"] for r in train if r["city"] is not None]
    items = [r["item"] for r in train if r["item"] is not None] + [e for r in train for e in elements(r["recent"])]
    return {
        "city": plain_vocabulary(cities),
        "few": plain_vocabulary(cities, min_count=2, max_size=3),
        "item": plain_vocabulary(items, min_count=2),
    }


def plain_values(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """A dense feature of all rows after its transform, NaN where missing."""
    column = "plain" if name == "logged" else name
    x = np.array([np.nan if r[column] is None else r[column] for r in rows], dtype=np.float64)
    return np.sign(x) * np.log1p(np.abs(x)) if name == "logged" else x


def merged(parts: list[Statistics], data: st.DataObject) -> Statistics:
    """All parts merged two or more at a time, in any order, some of them sent from one process to another."""
    parts = list(parts)
    while len(parts) > 1:
        parts = data.draw(st.permutations(parts))
        count = data.draw(st.integers(2, len(parts)))
        one = parts[0].merge(*parts[1:count])
        parts = [pickle.loads(pickle.dumps(one)) if data.draw(st.booleans()) else one, *parts[count:]]
    return parts[0]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.data())
def test_any_parts_merged_in_any_order_give_what_all_rows_give_at_once(rows, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    pieces = [frame(rows[a:b]) for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    parts = [Statistics.of(SCHEMA, piece) for piece in pieces] + [Statistics()]
    encoders = Encoders.fit(SCHEMA, merged(parts, data))

    assert {name: values.to_pylist() for name, values in encoders.vocabularies.items()} == plain_vocabularies(rows)
    for name, moments in encoders.moments.items():
        x = plain_values([r for r in rows if r[SPLIT] == 0], name)
        present = x[~np.isnan(x)]
        assert (moments.count, moments.missing) == (len(present), len(x) - len(present))
        scale = np.abs(present).max(initial=1.0)
        assert moments.mean == pytest.approx(present.mean() if len(present) else 0.0, rel=1e-9, abs=1e-9 * scale)
        assert moments.std == pytest.approx(present.std() if len(present) else 0.0, rel=1e-9, abs=1e-9 * scale)


@settings(max_examples=40, deadline=None)
@given(ROWS, ROWS)
def test_ids_are_those_of_a_dictionary_and_rows_outside_train_teach_nothing(rows, others):
    fitted = Encoders.fit(SCHEMA, Statistics.of(SCHEMA, frame(rows)))
    vocabularies = {n: {v: i + UNKNOWN + 1 for i, v in enumerate(vs)} for n, vs in plain_vocabularies(rows).items()}
    assert fitted.num_embeddings("hashed") == 8
    assert fitted.num_embeddings("city") == len(vocabularies["city"]) + 2

    def known(table: str, value: str | None) -> int:
        return MISSING if value is None else vocabularies[table].get(value, UNKNOWN)

    for some in (rows, others):
        table = fitted.encode(frame(some))
        assert table.schema == arrow_schema(SCHEMA)
        assert table["city"].to_pylist() == [known("city", r["city"]) for r in some]
        assert table["few"].to_pylist() == [known("few", r["city"]) for r in some]
        assert table["item"].to_pylist() == [known("item", r["item"]) for r in some]
        assert table["recent"].to_pylist() == [[known("item", e) for e in elements(r["recent"])] for r in some]
        assert table["hashed"].to_pylist() == [
            MISSING if r["city"] is None else 1 + plain_hash(r["city"]) % 7 for r in some
        ]
        assert table["tags"].to_pylist() == [
            [1 + plain_hash(e) % 5 for e in elements(r["tags"], ", ", 50)] for r in some
        ]
        expected = frame(some)
        for name, column in (("label.a", "label.a"), ("label.b", "label.b"), ("weight", WEIGHT), ("row_id", ROW_ID)):
            assert table[name].to_pylist() == expected[column].to_list()
        assert table["event_time"].to_pylist() == [0] * len(some)


@settings(max_examples=60, deadline=None)
@given(ROWS, ROWS)
def test_numbers_are_transformed_filled_and_scaled_as_numpy_does_in_float64(rows, others):
    fitted = Encoders.fit(SCHEMA, Statistics.of(SCHEMA, frame(rows)))
    for some in (rows, others):
        table = fitted.encode(frame(some))
        for name in SCHEMA.dense:
            x = plain_values([r for r in rows if r[SPLIT] == 0], name)
            present = x[~np.isnan(x)]
            mean = present.mean() if len(present) else 0.0
            std = present.std() if len(set(present)) > 1 else 0.0
            if 0 < std < 1e-9 * abs(mean):
                continue  # a spread of rounding's size: no scale worth an opinion
            y = plain_values(some, name)
            missing = np.isnan(y)
            y = np.where(missing, mean, y)
            if name != "plain":
                y = (y - mean) / std if std else np.zeros_like(y)
            assert table[name].to_numpy() == pytest.approx(y, rel=1e-6, abs=1e-6)
            assert not np.isnan(table[name].to_numpy()).any()
            if name != "plain":
                assert table[f"{name}_missing"].to_pylist() == missing.astype(float).tolist()


@pytest.mark.parametrize("value", [0.1, 1e-3, 1 / 3, 1e6 + 0.1, -0.7])
@pytest.mark.parametrize("parts", [1, 7])
def test_a_constant_column_becomes_zero_and_does_not_blow_up_what_differs_later(value, parts):
    rows = [{"scaled": value, SPLIT: 0} for _ in range(999)]
    split = [rows[i::parts] for i in range(parts)]
    statistics = Statistics().merge(*(Statistics.of(SCHEMA, frame(part)) for part in split))
    table = Encoders.fit(SCHEMA, statistics).encode(frame([{"scaled": value}, {"scaled": value + 1}, {"scaled": None}]))
    assert table["scaled"].to_pylist() == [0.0, 0.0, 0.0]


def test_moments_keep_their_digits_far_from_zero():
    x = 1e9 + np.random.default_rng(0).standard_normal(100_000)
    parts = [Moments.of(part) for part in np.array_split(x, 1000)]
    total = Moments()
    for part in parts:
        total = total.merge(part)
    assert total.mean == pytest.approx(x.mean(), rel=1e-12)
    assert total.std == pytest.approx(x.std(), rel=1e-6)


def test_a_value_seen_in_valid_or_test_only_is_unknown_and_moves_no_moment():
    train = [{"city": "seen", "plain": 1.0, SPLIT: 0}]
    later = [{"city": "new", "plain": 1e6, SPLIT: split} for split in (1, 2)]
    fitted = Encoders.fit(SCHEMA, Statistics.of(SCHEMA, frame(train + later)))
    assert fitted.vocabularies["city"].to_pylist() == ["seen"]
    assert fitted.moments["plain"] == Moments(1, 0, 1.0, 0.0)
    assert fitted.encode(frame(later + train))["city"].to_pylist() == [UNKNOWN, UNKNOWN, UNKNOWN + 1]


def test_hash_ids_fill_one_to_the_number_of_buckets():
    fitted = Encoders.fit(SCHEMA, Statistics.of(SCHEMA, frame([])))
    table = fitted.encode(frame([{"city": f"city {i}"} for i in range(500)] + [{"city": None}]))
    assert set(table["hashed"].to_pylist()) == {MISSING, *range(1, 8)}


def test_a_table_without_rows_or_values_still_has_its_columns():
    fitted = Encoders.fit(SCHEMA, Statistics.of(SCHEMA, frame([])))
    assert fitted.encode(frame([])).schema == arrow_schema(SCHEMA)
    assert fitted.num_embeddings("city") == 2
    assert fitted.encode(frame([{"city": "x", "plain": 3.0}]))["city"].to_pylist() == [UNKNOWN]


# On disk


@pytest.fixture
def fitted() -> Encoders:
    rows = [{"city": c, "item": c, "recent": "a|b", "plain": float(i), "scaled": i / 7} for i, c in enumerate("abacab")]
    return Encoders.fit(SCHEMA, Statistics.of(SCHEMA, frame(rows)))


def test_encoders_come_back_from_disk_bit_for_bit(fitted, tmp_path):
    fitted.save(tmp_path / "encoders")
    again = Encoders.load(tmp_path / "encoders", SCHEMA)
    assert {n: v.to_pylist() for n, v in again.vocabularies.items()} == {
        n: v.to_pylist() for n, v in fitted.vocabularies.items()
    }
    assert again.moments == fitted.moments
    rows = frame([{"city": "a", "plain": 0.1, "scaled": 0.3, "recent": "b|q"}, {"city": "?"}])
    assert again.encode(rows).equals(fitted.encode(rows))
    assert [again.num_embeddings(t) for t in SCHEMA.all_tables] == [fitted.num_embeddings(t) for t in SCHEMA.all_tables]


def test_what_is_saved_can_be_read_without_this_project(fitted, tmp_path):
    fitted.save(tmp_path / "encoders")
    table = pq.read_table(tmp_path / "encoders" / "vocabularies" / "city.parquet")
    assert table.to_pylist() == [{"value": "a", "id": 2}, {"value": "b", "id": 3}, {"value": "c", "id": 4}]
    content = json.loads((tmp_path / "encoders" / "encoders.json").read_text())
    assert content["inputs"] == SCHEMA.inputs_fingerprint
    assert content["num_embeddings"] == {"item": 4, "city": 5, "few": 4, "hashed": 8, "tags": 6}
    assert content["moments"]["plain"]["mean"] == 2.5


def test_encoders_of_other_features_are_refused_with_both_fingerprints(fitted, tmp_path):
    fitted.save(tmp_path / "encoders")
    labels = Schema.parse(CONTENT | {"weight": "2"}, where="mine.yaml")
    assert Encoders.load(tmp_path / "encoders", labels).vocabularies == fitted.vocabularies
    fewer = {name: dense for name, dense in CONTENT["dense"].items() if name != next(iter(CONTENT["dense"]))}
    other = Schema.parse(CONTENT | {"dense": fewer}, where="mine.yaml")
    with pytest.raises(UserError) as caught:
        Encoders.load(tmp_path / "encoders", other)
    assert SCHEMA.inputs_fingerprint in str(caught.value)
    assert other.inputs_fingerprint in str(caught.value)
    assert str(tmp_path / "encoders") in str(caught.value)


def spoil(folder: Path, how: str) -> None:
    file = folder / "encoders.json"
    if how == "missing":
        file.unlink()
    elif how == "half":
        file.write_text(file.read_text()[:40])
    elif how == "no keys":
        file.write_text("{}")
    elif how == "version":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    elif how == "no vocabulary":
        (folder / "vocabularies" / "city.parquet").unlink()
    else:
        (folder / "vocabularies" / "city.parquet").write_bytes(b"PAR1 no")


@pytest.mark.parametrize("how", ["missing", "half", "no keys", "version", "no vocabulary", "broken vocabulary"])
def test_encoders_that_are_not_whole_are_refused_in_one_line(fitted, tmp_path, how):
    fitted.save(tmp_path / "encoders")
    spoil(tmp_path / "encoders", how)
    with pytest.raises(UserError) as caught:
        Encoders.load(tmp_path / "encoders", SCHEMA)
    assert str(tmp_path / "encoders") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_columns_of_a_dataset_are_flat_and_typed():
    found = {field.name: field.type for field in arrow_schema(SCHEMA)}
    ids = dict.fromkeys(["city", "few", "hashed", "item"], pa.int64())
    bags = dict.fromkeys(["recent", "tags"], pa.list_(pa.int64()))
    dense = ["plain", "scaled", "scaled_missing", "logged", "logged_missing"]
    floats = dict.fromkeys([*dense, "label.a", "label.b", "weight"], pa.float32())
    assert found == floats | ids | bags | {"event_time": pa.int64(), "row_id": pa.int64()}
