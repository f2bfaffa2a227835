"""Encoders, and the statistics that they are fitted on, against dictionaries, Counter and float64 numpy."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hashing import plain_hash

from features.errors import UserError
from features.fit.encoders import MISSING, UNKNOWN, UNKNOWN_SEED, Encoders, arrow_schema
from features.fit.statistics import Statistics
from features.kinds.moments import Moments
from features.schema.schema import Schema

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
        "dealt": {"column": "city", "vocabulary": {"min_count": 2, "unknown": 3}},
        "hashed": {"column": "city", "hash": 7},
        "open": {"column": "city", "managed": {"rows": 1000}},
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
BAG = st.lists(st.sampled_from(["a", "b", "c", "z", "B"]), max_size=3)
ROW = st.fixed_dictionaries({"plain": NUMBER, "scaled": NUMBER, "city": WORD, "item": WORD, "recent": BAG, "tags": BAG})
ROWS = st.lists(ROW, max_size=25)


def coded(values: list[str | None], twice: bool = False) -> pa.DictionaryArray:
    """Codes into a dictionary that holds a value nobody has and, on request, each value twice."""
    distinct = ["nobody's", *sorted({v for v in values if v is not None})]
    places = [
        None if v is None else distinct.index(v) + len(distinct) * (twice and i % 2) for i, v in enumerate(values)
    ]
    dictionary = pa.array(distinct * (1 + twice), pa.large_string())
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), dictionary)


def table(rows: list[dict[str, Any]], twice: bool = False) -> pa.Table:
    """Parsed rows, as features.raw gives them; what a row does not name is missing."""
    columns: dict[str, pa.Array] = {}
    for name, feature in SCHEMA.dense.items():
        columns[name] = pa.array([row.get(feature.column or name) for row in rows], pa.float64())
    for name, feature in SCHEMA.categorical.items():
        columns[name] = coded([row.get(feature.column or name) for row in rows], twice)
    for name in SCHEMA.bag:
        bags = [row.get(name, []) for row in rows]
        offsets = pa.array(np.cumsum([0, *map(len, bags)]), pa.int64())
        columns[name] = pa.LargeListArray.from_arrays(offsets, coded([e for bag in bags for e in bag], twice))
    count = range(len(rows))
    labels = {"label.a": [1.0 if i % 3 else None for i in count], "label.b": [float(i) for i in count]}
    columns |= {name: pa.array(values, pa.float32()) for name, values in labels.items()}
    columns |= {"weight": pa.array([1 + i / 2 for i in count], pa.float32())}
    columns |= {"event_time": pa.array([5 * i for i in count], pa.int64())}
    columns |= {"row_id": pa.array([10 + i for i in count], pa.int64()), "split": pa.array([0] * len(rows), pa.int8())}
    return pa.table(columns)


def fit(rows: list[dict[str, Any]]) -> Encoders:
    return Encoders.fit(SCHEMA, Statistics.of(SCHEMA, table(rows)))


def plain_vocabulary(values: list[str], min_count: int = 1, max_size: int | None = None) -> list[str]:
    """The most frequent values first, ties by the order of their UTF-8 bytes."""
    counts = Counter(values)
    kept = sorted((v for v, n in counts.items() if n >= min_count), key=lambda v: (-counts[v], v.encode()))
    return kept[:max_size]


def plain_vocabularies(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    cities = [r["city"] for r in rows if r["city"] is not None]
    items = [r["item"] for r in rows if r["item"] is not None] + [e for r in rows for e in r["recent"]]
    return {
        "city": plain_vocabulary(cities),
        "few": plain_vocabulary(cities, min_count=2, max_size=3),
        "dealt": plain_vocabulary(cities, min_count=2),
        "item": plain_vocabulary(items, min_count=2),
    }


def plain_values(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """A dense feature of all rows after its transform, NaN where missing."""
    column = "plain" if name == "logged" else name
    x = np.array([np.nan if r[column] is None else r[column] for r in rows], dtype=np.float64)
    return np.sign(x) * np.log1p(np.abs(x)) if name == "logged" else x


@settings(max_examples=examples(60), deadline=None)
@given(ROWS, st.data())
def test_vocabularies_are_the_same_whatever_parts_were_counted_in_whatever_order(rows, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    pieces = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    parts = data.draw(
        st.permutations([Statistics.of(SCHEMA, table(piece, i % 2 == 1)) for i, piece in enumerate(pieces)])
    )
    fitted = Encoders.fit(SCHEMA, parts[0].merge(*parts[1:]))
    assert {name: values.to_pylist() for name, values in fitted.vocabularies.items()} == plain_vocabularies(rows)


@settings(max_examples=examples(60), deadline=None)
@given(ROWS, ROWS, st.booleans())
def test_ids_are_those_of_a_dictionary(rows, others, twice):
    fitted = fit(rows)
    first = dict.fromkeys(["city", "few", "item"], 2) | {"dealt": 4}
    vocabularies = {n: {v: i + first[n] for i, v in enumerate(vs)} for n, vs in plain_vocabularies(rows).items()}
    assert fitted.num_embeddings("hashed") == 8
    assert fitted.num_embeddings("open") == 2 + 16 * 63
    assert fitted.num_embeddings("city") == len(vocabularies["city"]) + 2
    assert fitted.num_embeddings("dealt") == len(vocabularies["dealt"]) + 4

    def known(table: str, value: str | None) -> int:
        if value is None:
            return MISSING
        shared = plain_hash(value, UNKNOWN_SEED) % 3 if table == "dealt" else 0
        return vocabularies[table].get(value, UNKNOWN + shared)

    for some in (rows, others, []):
        parsed = table(some, twice)
        found = fitted.encode(parsed)
        assert found.schema == arrow_schema(SCHEMA)
        for name in ("city", "few", "dealt"):
            assert found[name].to_pylist() == [known(name, r["city"]) for r in some]
        assert found["item"].to_pylist() == [known("item", r["item"]) for r in some]
        assert found["recent"].to_pylist() == [[known("item", e) for e in r["recent"]] for r in some]
        assert found["hashed"].to_pylist() == [
            MISSING if r["city"] is None else 1 + plain_hash(r["city"]) % 7 for r in some
        ]
        assert found["open"].to_pylist() == [
            MISSING if r["city"] is None else 1 + plain_hash(r["city"]) % (2**63 - 1) for r in some
        ]
        assert found["tags"].to_pylist() == [[1 + plain_hash(e) % 5 for e in r["tags"]] for r in some]
        for name in ("label.a", "label.b", "weight", "event_time", "row_id"):
            assert found[name].equals(parsed[name])


@settings(max_examples=examples(40), deadline=None)
@given(ROWS, st.integers(0, 10), st.integers(0, 10))
def test_rows_are_encoded_one_by_one_as_they_are_together(rows, start, count):
    """One row's values are fewer than the vocabulary's and all rows' are more, which are looked up in two ways."""
    fitted = fit(rows + [{"city": f"city {i}", "item": f"item {i}", "recent": [f"item {i}"]} for i in range(30)] * 2)
    parsed = table(rows)
    whole = fitted.encode(parsed)
    single = pa.concat_tables([fitted.encode(table([])), *(fitted.encode(table([row])) for row in rows)])
    features = list(SCHEMA.columns)
    assert single.select(features).equals(whole.select(features))
    assert fitted.encode(parsed.slice(start, count)).equals(whole.slice(start, count))


@pytest.mark.parametrize("size", [3, 50, 400])
@pytest.mark.parametrize("shown", [1, 20, 1000])
def test_a_value_has_one_id_however_many_values_a_block_and_its_vocabulary_hold(size, shown):
    fitted = fit([{"city": f"v{i}"} for i in range(size)] * 2)
    vocabulary = fitted.vocabularies["dealt"].to_pylist()
    cities = [None, *(f"v{i * 37 % 500}" for i in range(shown)), None, "v1", "v1"]
    found = fitted.encode(table([{"city": city} for city in cities], twice=True))["dealt"].to_pylist()
    for city, number in zip(cities, found, strict=True):
        if city in vocabulary:
            assert number == 4 + vocabulary.index(city)
        else:
            assert number == (MISSING if city is None else UNKNOWN + plain_hash(city, UNKNOWN_SEED) % 3)


def test_unknown_values_are_dealt_to_all_their_ids_and_a_known_one_to_none_of_them():
    fitted = fit([{"city": "known"}] * 2)
    ids = fitted.encode(table([{"city": f"city {i}"} for i in range(3000)]))["dealt"].to_pylist()
    counts = Counter(ids)
    assert set(counts) == {UNKNOWN, UNKNOWN + 1, UNKNOWN + 2}
    assert min(counts.values()) > 900
    assert fitted.encode(table([{"city": "known"}, {"city": None}]))["dealt"].to_pylist() == [UNKNOWN + 3, MISSING]


@settings(max_examples=examples(60), deadline=None)
@given(ROWS, ROWS)
def test_numbers_are_transformed_filled_and_scaled_as_numpy_does_in_float64(rows, others):
    fitted = fit(rows)
    for some in (rows, others):
        found = fitted.encode(table(some))
        for name in SCHEMA.dense:
            x = plain_values(rows, name)
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
            assert found[name].to_numpy() == pytest.approx(y, rel=1e-6, abs=1e-6)
            assert not np.isnan(found[name].to_numpy()).any()
            if name != "plain":
                assert found[f"{name}_missing"].to_pylist() == missing.astype(float).tolist()


@pytest.mark.parametrize("value", [0.1, 1e-3, 1 / 3, 1e6 + 0.1, -0.7])
@pytest.mark.parametrize("parts", [1, 7])
def test_a_constant_column_becomes_zero_and_does_not_blow_up_what_differs_later(value, parts):
    rows = [{"scaled": value} for _ in range(999)]
    split = [rows[i::parts] for i in range(parts)]
    statistics = Statistics().merge(*(Statistics.of(SCHEMA, table(part)) for part in split))
    found = Encoders.fit(SCHEMA, statistics).encode(table([{"scaled": value}, {"scaled": value + 1}, {"scaled": None}]))
    assert found["scaled"].to_pylist() == [0.0, 0.0, 0.0]


def test_moments_keep_their_digits_far_from_zero():
    x = 1e9 + np.random.default_rng(0).standard_normal(100_000)
    parts = [Moments.of(part) for part in np.array_split(x, 1000)]
    total = Moments()
    for part in parts:
        total = total.merge(part)
    assert total.mean == pytest.approx(x.mean(), rel=1e-12)
    assert total.std == pytest.approx(x.std(), rel=1e-6)


def test_hash_ids_fill_one_to_the_number_of_buckets():
    found = fit([]).encode(table([{"city": f"city {i}"} for i in range(500)] + [{"city": None}]))
    assert set(found["hashed"].to_pylist()) == {MISSING, *range(1, 8)}


def test_a_dataset_without_rows_or_values_still_has_its_columns():
    fitted = fit([])
    assert fitted.encode(table([])).schema == arrow_schema(SCHEMA)
    assert fitted.num_embeddings("city") == 2
    assert fitted.num_embeddings("dealt") == 4
    assert fitted.encode(table([{"city": "x", "plain": 3.0}]))["city"].to_pylist() == [UNKNOWN]


# On disk


@pytest.fixture
def fitted() -> Encoders:
    rows = [
        {"city": c, "item": c, "recent": ["a", "b"], "plain": float(i), "scaled": i / 7} for i, c in enumerate("abacab")
    ]
    return fit(rows)


def test_encoders_come_back_from_disk_bit_for_bit(fitted, tmp_path):
    fitted.save(tmp_path / "encoders")
    again = Encoders.load(tmp_path / "encoders", SCHEMA)
    assert {n: v.to_pylist() for n, v in again.vocabularies.items()} == {
        n: v.to_pylist() for n, v in fitted.vocabularies.items()
    }
    assert again.moments == fitted.moments
    rows = table([{"city": "a", "plain": 0.1, "scaled": 0.3, "recent": ["b", "q"]}, {"city": "?"}])
    assert again.encode(rows).equals(fitted.encode(rows))
    assert [again.num_embeddings(t) for t in SCHEMA.all_tables] == [fitted.num_embeddings(t) for t in SCHEMA.all_tables]


def test_what_is_saved_can_be_read_without_this_project(fitted, tmp_path):
    fitted.save(tmp_path / "encoders")
    vocabularies = tmp_path / "encoders" / "vocabularies"
    assert pq.read_table(vocabularies / "city.parquet").to_pylist() == [
        {"value": "a", "id": 2, "count": 3}, {"value": "b", "id": 3, "count": 2}, {"value": "c", "id": 4, "count": 1},
    ]  # fmt: skip
    assert pq.read_table(vocabularies / "dealt.parquet").to_pylist() == [
        {"value": "a", "id": 4, "count": 3},
        {"value": "b", "id": 5, "count": 2},
    ]
    content = json.loads((tmp_path / "encoders" / "encoders.json").read_text())
    assert content["inputs"] == SCHEMA.inputs_fingerprint
    sizes = {"item": 4, "city": 5, "few": 4, "dealt": 6, "hashed": 8, "open": 1010, "tags": 6}
    assert content["num_embeddings"] == sizes
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
    ids = dict.fromkeys(["city", "few", "dealt", "hashed", "open", "item"], pa.int64())
    bags = dict.fromkeys(["recent", "tags"], pa.list_(pa.int64()))
    dense = ["plain", "scaled", "scaled_missing", "logged", "logged_missing"]
    floats = dict.fromkeys([*dense, "label.a", "label.b", "weight"], pa.float32())
    assert found == floats | ids | bags | {"event_time": pa.int64(), "row_id": pa.int64()}
