"""Statistics and digests against Counter, numpy's quantiles and plain loops over rows."""

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.fit.digest import Digest
from features.fit.statistics import Statistics
from features.hashing import hash_strings
from features.kinds.bins import rounded
from features.kinds.moments import LabelSums
from features.schema.schema import Schema

CONTENT: dict[str, Any] = {
    "source": {"files": "log.csv"},
    "tables": {"item": {}, "steps": {"bins": 4}},
    "dense": {"plain": {}, "logged": {"transform": "log1p", "piecewise": 4}},
    "categorical": {
        "city": {},
        "hashed": {"hash": 7},
        "item": {"table": "item"},
        "low": {"table": "steps"},
        "high": {"table": "steps"},
    },
    "bag": {"recent": {"table": "item"}, "tags": {"hash": 5}},
    "tasks": {
        "a": {"kind": "binary", "label": "y"},
        "b": {"kind": "regression", "label": "y"},
        "c": {"kind": "binary", "label": "y"},
    },
    "split": {"by": "row_index", "modulo": 1, "train": [0]},
}
SCHEMA = Schema.parse(CONTENT, where="mine.yaml")
NUMBERS, SINGLE, BAGS = ("plain", "logged", "low", "high"), ("city", "hashed", "item"), ("recent", "tags")
WORDS = ["a", "b", "ä", "日本", "10", "", "unused"]
NUMBER = st.none() | st.floats(-1e6, 1e6, allow_nan=False) | st.integers(-3, 3).map(float) | st.just(float("nan"))
WORD = st.sampled_from(WORDS[:-1])
ROW = st.fixed_dictionaries(
    dict.fromkeys(NUMBERS, NUMBER)
    | {name: st.none() | WORD for name in SINGLE}
    | {name: st.lists(WORD, max_size=4) for name in BAGS}
    | {f"label.{task}": st.none() | st.integers(0, 3).map(float) for task in SCHEMA.tasks}
)
ROWS = st.lists(ROW, max_size=25)


def coded(values: list[str | None], twice: bool) -> pa.Array:
    """A dictionary array whose dictionary holds values that are unused and, on request, each one twice."""
    dictionary = WORDS * (1 + twice)
    places = [None if v is None else WORDS.index(v) + len(WORDS) * (twice and i % 2) for i, v in enumerate(values)]
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), pa.array(dictionary, pa.large_string()))


def table(rows: list[dict[str, Any]], twice: bool = False) -> pa.Table:
    columns: dict[str, pa.Array] = {name: pa.array([r[name] for r in rows], pa.float64()) for name in NUMBERS}
    columns |= {name: coded([r[name] for r in rows], twice) for name in SINGLE}
    for name in BAGS:
        offsets = np.cumsum([0, *(len(r[name]) for r in rows)])
        elements = coded([e for r in rows for e in r[name]], twice)
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), elements)
    for task in SCHEMA.tasks:
        columns[f"label.{task}"] = pa.array([r[f"label.{task}"] for r in rows], pa.float32())
    columns["weight"] = pa.array([1 + i % 3 for i in range(len(rows))], pa.float32())
    return pa.table(columns)


def elements_of(rows: list[dict[str, Any]], name: str) -> Counter[str]:
    return Counter(e for r in rows for e in (r[name] if name in BAGS else [r[name]]) if e is not None)


def present(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([r[name] for r in rows if r[name] is not None and not np.isnan(r[name])], dtype=np.float64)


@settings(max_examples=examples(60), deadline=None)
@given(ROWS, st.booleans(), st.integers(0, 3))
def test_every_count_is_that_of_a_loop_over_rows(rows, twice, start):
    found = Statistics.of(SCHEMA, table(rows, twice).slice(start))  # a slice must not count its parent's rows
    rows = rows[start:]
    assert found.rows == len(rows)
    for name in ("city", "item", "recent"):
        assert dict(found.values[name].iter_rows()) == elements_of(rows, name)
    for name in ("hashed", "tags"):
        groups = np.zeros(64, int)
        for value, count in elements_of(rows, name).items():
            groups[int(hash_strings(pa.array([value]), seed=17)[0]) % 64] += count
        assert found.groups[name].tolist() == groups.tolist()
    for name in NUMBERS:
        x = present(rows, name)
        assert found.missing[name] == len(rows) - len(x)
        assert found.digests[name].count == found.raw[name].count == len(x)
        if len(x):
            assert found.raw[name].mean == pytest.approx(x.mean())
            assert found.raw[name].std == pytest.approx(x.std(), abs=1e-6)
    assert {n: found.missing[n] for n in SINGLE} == {n: sum(r[n] is None for r in rows) for n in SINGLE}
    assert {n: found.missing[n] for n in BAGS} == {n: sum(not r[n] for r in rows) for n in BAGS}
    steps = rounded(np.concatenate([present(rows, "low"), present(rows, "high")]))
    assert dict(found.numbers["steps"].iter_rows()) == Counter(steps.tolist())
    x = present(rows, "logged")
    logged = np.copysign(np.log1p(abs(x)), x)
    assert dict(found.numbers["logged"].iter_rows()) == pytest.approx(Counter(rounded(logged).tolist()))
    assert found.moments["logged"].mean == pytest.approx(logged.mean() if len(x) else 0.0)


@settings(max_examples=examples(40), deadline=None)
@given(ROWS)
def test_a_shared_tables_values_are_those_of_its_features_together(rows):
    found = Statistics.of(SCHEMA, table(rows))
    together = elements_of(rows, "item") + elements_of(rows, "recent")
    assert dict(found.table_values(SCHEMA, "item").iter_rows()) == together
    assert dict(found.table_values(SCHEMA, "city").iter_rows()) == elements_of(rows, "city")
    assert Statistics().table_values(SCHEMA, "city").schema == found.table_values(SCHEMA, "item").schema


@settings(max_examples=examples(40), deadline=None)
@given(ROWS, st.data())
def test_parts_that_travelled_between_processes_merge_to_the_whole(rows, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    pieces = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    parts = [
        pickle.loads(pickle.dumps(Statistics.of(SCHEMA, table(piece, i % 2 == 1)))) for i, piece in enumerate(pieces)
    ]
    parts = data.draw(st.permutations([*parts, Statistics()]))
    found, whole = parts[0].merge(*parts[1:]), Statistics.of(SCHEMA, table(rows))
    assert (found.rows, found.missing) == (whole.rows, whole.missing)
    for kind in ("values", "numbers"):
        for name, frame in getattr(whole, kind).items():
            assert getattr(found, kind)[name].sort("value").equals(frame.sort("value"))
    assert all((found.groups[name] == count_G).all() for name, count_G in whole.groups.items())
    for kind in ("raw", "moments"):
        for name, moments in getattr(whole, kind).items():
            other = getattr(found, kind)[name]
            assert other.count == moments.count
            assert other.mean == pytest.approx(moments.mean)
            assert other.std == pytest.approx(moments.std, rel=1e-5, abs=1e-6)
    for attribute in ("count_TT", "sum_TT", "square_TT", "product_TT"):
        np.testing.assert_allclose(getattr(found.labels, attribute), getattr(whole.labels, attribute))
    assert {n: d.count for n, d in found.digests.items()} == {n: d.count for n, d in whole.digests.items()}


def test_a_part_is_sent_as_few_bytes_whatever_it_was_cut_from():
    words = pa.array([f"value {i}" for i in range(100_000)]).dictionary_encode()
    schema = Schema.parse(
        CONTENT | {"dense": {}, "categorical": {"city": {}}, "bag": {}, "tables": {}}, where="mine.yaml"
    )
    labels = {f"label.{task}": pa.nulls(100_000, pa.float32()) for task in schema.tasks}
    rows = pa.table({"city": words, **labels, "weight": pa.array(np.ones(100_000, np.float32))})
    assert len(pickle.dumps(Statistics.of(schema, rows.slice(50_000, 100)))) < 10_000


@settings(max_examples=examples(60), deadline=None)
@given(ROWS)
def test_sums_of_labels_are_over_rows_where_both_tasks_are_observed(rows):
    sums, names = Statistics.of(SCHEMA, table(rows)).labels, [f"label.{task}" for task in SCHEMA.tasks]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            pairs = [(r[a], r[b]) for r in rows if r[a] is not None and r[b] is not None]
            assert sums.count_TT[i, j] == len(pairs)
            assert sums.sum_TT[i, j] == sum(x for x, _ in pairs)
            assert sums.square_TT[i, j] == sum(x * x for x, _ in pairs)
            assert sums.product_TT[i, j] == sum(x * y for x, y in pairs)


def test_correlations_are_those_of_numpy_on_the_common_rows_and_none_where_a_label_is_constant():
    rng = np.random.default_rng(0)
    label_BT = rng.normal(3, 2, (4000, 4)) @ rng.normal(size=(4, 4)) + 10
    label_BT[:, 3] = 0.1
    label_BT[rng.random((4000, 4)) < 0.3] = np.nan
    found = LabelSums.of(label_BT[:1000]).merge(LabelSums()).merge(LabelSums.of(label_BT[1000:])).correlations()
    for i in range(3):
        for j in range(3):
            both = ~np.isnan(label_BT[:, i]) & ~np.isnan(label_BT[:, j])
            assert found[i, j] == pytest.approx(np.corrcoef(label_BT[both, i], label_BT[both, j])[0, 1], abs=1e-9)
    assert np.isnan(found[3]).all()
    assert np.isnan(found[:, 3]).all()


@pytest.mark.parametrize("draw", ["normal", "lognormal", "uniform", "exponential"])
@pytest.mark.parametrize(("parts", "error"), [(7, 0.003), (1, 0.015)])  # a sample is drawn from one large part
def test_quantiles_of_merged_digests_are_off_by_few_thousandths_of_the_rows(draw, parts, error):
    x = getattr(np.random.default_rng(0), draw)(size=60_000)
    found = [pickle.loads(pickle.dumps(Digest(part))) for part in np.array_split(x, parts)]
    digest = found[0].merge(*found[1:])
    assert (digest.minimum, digest.maximum) == (x.min(), x.max())
    assert digest.count == pytest.approx(len(x), abs=4 * parts)
    for share in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99):
        assert (x <= digest.quantile(share)).mean() == pytest.approx(share, abs=error)
        value = np.quantile(x, share)
        assert digest.at_most(value) == pytest.approx(share, abs=error)
        assert digest.below(value) == pytest.approx(share, abs=error)


def test_a_value_of_many_rows_is_its_quantiles_and_counts_about_whole():
    x = np.random.default_rng(0).choice([-1.0, 0.0, 2.0], 50_000, p=[0.1, 0.8, 0.1])
    digest = Digest(x)
    assert [round(digest.quantile(share), 9) for share in (0.05, 0.2, 0.5, 0.85, 0.95)] == [-1, 0, 0, 0, 2]
    assert digest.at_most(0.0) - digest.below(0.0) == pytest.approx((x == 0).mean(), abs=0.02)
    assert digest.below(-1.0) == 0
    assert digest.at_most(2.0) == 1


@pytest.mark.parametrize("value", [0.0, -7.5, 1e-300, 1.7e9])
def test_of_equal_values_every_quantile_is_that_value(value):
    digest = Digest(np.array([value, np.nan] * 5000))
    assert digest.count == 5000
    assert {digest.quantile(share) for share in (0.01, 0.5, 0.99)} == {value}


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8])
def test_a_sample_is_not_misled_by_values_that_repeat_with_a_period(period):
    digest = Digest(np.arange(100_000) % period + 0.0)
    for value in range(period - 1):
        assert digest.at_most(value + 0.5) == pytest.approx((value + 1) / period, abs=0.03)


def test_parts_weigh_by_their_rows_whether_a_sample_was_drawn_from_them_or_not():
    rng = np.random.default_rng(0)
    digest = Digest(rng.uniform(0, 1, 90_000)).merge(*(Digest(rng.uniform(1, 2, 1000)) for _ in range(10)))
    assert digest.at_most(1.0) == pytest.approx(0.9, abs=0.01)


def test_digests_of_the_same_parts_are_the_same_bytes_wherever_they_were_made():
    parts = np.array_split(np.random.default_rng(0).normal(size=20_000), 5)
    here = Digest(parts[0]).merge(*map(Digest, parts[1:]))
    sent = [pickle.loads(pickle.dumps(Digest(part))) for part in parts]
    assert pickle.dumps(sent[0].merge(*sent[1:])) == pickle.dumps(here)
    assert len(pickle.dumps(here)) < 10_000
