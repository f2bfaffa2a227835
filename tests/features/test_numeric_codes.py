"""Bins of numbers, for piecewise codes and as ids: what is counted, where edges lie, and that nothing else changes."""

import json
import math
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.fit.encoders import Encoders, arrow_schema
from features.fit.statistics import Statistics
from features.kinds.bins import bin_edges, rounded
from features.schema.schema import Schema
from models.inputs import Piecewise
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess

CONTENT: dict[str, Any] = {
    "source": {"files": "log.csv"},
    "dense": {
        "plain": {"standardize": False},
        "scaled": {"missing_flag": True},
        "logged": {"column": "plain", "transform": "log1p", "missing_flag": True},
    },
    "categorical": {"city": {}},
    "bag": {"tags": {"hash": 5}},
    "tasks": {"a": {"kind": "binary", "label": "y = '1'"}},
    "split": {"by": "row_index", "modulo": 1, "train": [0]},
}
PIECEWISE = {"plain": 3, "scaled": 16, "logged": 32}


def coded(content: dict[str, Any]) -> dict[str, Any]:
    """The schema with every number piecewise that has bins here."""
    dense = {n: f | ({"piecewise": PIECEWISE[n]} if n in PIECEWISE else {}) for n, f in content["dense"].items()}
    return content | {"dense": dense}


SCHEMA = Schema.parse(CONTENT, where="mine.yaml")
CODED = Schema.parse(coded(CONTENT), where="mine.yaml")
NUMBER = st.none() | st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6)) | st.integers(-3, 3).map(float)
ROWS = st.lists(st.fixed_dictionaries({"plain": NUMBER, "scaled": NUMBER}), max_size=25)
FINITE = st.floats(-1e30, 1e30, allow_nan=False) | st.integers(-70_000, 70_000).map(float)
COUNTS = st.dictionaries(st.integers(-500, 500).map(lambda i: i / 8), st.integers(1, 1000), max_size=60)


def of(values: np.ndarray) -> pl.DataFrame:
    return pl.Series("value", values).value_counts()


def frame(rows: list[dict[str, Any]]) -> pa.Table:
    """Typed rows, as features.raw hands them over; what a row does not name is missing."""
    columns = {"plain": "plain", "scaled": "scaled", "logged": "plain", "scaled_bin": "scaled"}
    words = pa.DictionaryArray.from_arrays(pa.nulls(len(rows), pa.int32()), pa.array([], pa.large_string()))
    lists = pa.LargeListArray.from_arrays(pa.array([0] * (len(rows) + 1)), words[:0])
    return pa.table(
        {name: pa.array([row.get(column) for row in rows], pa.float64()) for name, column in columns.items()}
        | {"city": words, "tags": lists, "label.a": pa.nulls(len(rows), pa.float32())}
        | {"weight": np.ones(len(rows), np.float32)}
        | {name: np.arange(len(rows)) for name in ("event_time", "row_id")}
    )


def plain_values(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """A dense feature of all rows after its transform, NaN where missing."""
    column = "plain" if name == "logged" else name
    x = np.array([np.nan if r[column] is None else r[column] for r in rows], dtype=np.float64)
    return np.sign(x) * np.log1p(np.abs(x)) if name == "logged" else x


def fit(values: list[float | None], **feature: Any) -> tuple[Encoders, list[float]]:
    """Encoders of one number with piecewise bins, and the column of the same values in a dataset."""
    dense = {"scaled": {"piecewise": 16} | feature}
    schema = Schema.parse(CONTENT | {"dense": dense}, where="mine.yaml")
    rows = frame([{"scaled": value} for value in values])
    encoders = Encoders.fit(schema, Statistics.of(schema, rows))
    return encoders, encoders.encode(rows)["scaled"].to_pylist()


def ids(values: list[float | None], bins: int = 16) -> tuple[Encoders, np.ndarray]:
    """Encoders of a number as ids, and the ids of the same values."""
    categorical = CONTENT["categorical"] | {"scaled_bin": {"column": "scaled", "bins": bins}}
    schema = Schema.parse(CONTENT | {"categorical": categorical}, where="mine.yaml")
    rows = frame([{"scaled": value} for value in values])
    encoders = Encoders.fit(schema, Statistics.of(schema, rows))
    return encoders, encoders.encode(rows)["scaled_bin"].to_numpy()


def code(edges: list[float], column: list[float]) -> torch.Tensor:
    """The number's ramps without their linear layer: a row of bins for each value."""
    bins = len(edges) - 1
    module = Piecewise([edges], bins)
    with torch.no_grad():
        module.linear.weight_SDH.copy_(torch.eye(bins))
        module.linear.bias_SH.zero_()
        return module(torch.tensor(column, dtype=torch.float32).unsqueeze(1)).squeeze(1)


# Counting


def plainly_rounded(x: float) -> float:
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.floor(mantissa * 2**16), exponent - 16)


@settings(max_examples=examples(60), deadline=None)
@given(ROWS, st.data())
def test_counts_of_any_parts_in_any_order_are_those_of_all_rows(rows, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    pieces = [frame(rows[a:b]) for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    parts = [pickle.loads(pickle.dumps(Statistics.of(CODED, piece))) for piece in pieces] + [Statistics()]
    together = Statistics().merge(*data.draw(st.permutations(parts)))
    whole = Statistics.of(CODED, frame(rows))
    for name, bins in PIECEWISE.items():
        x = plain_values(rows, name)
        expected = Counter(plainly_rounded(value) for value in x if not np.isnan(value))
        assert dict(together.numbers[name].iter_rows()) == expected
        assert bin_edges(together.numbers[name], bins).tolist() == bin_edges(whole.numbers[name], bins).tolist()


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(FINITE, min_size=1))
def test_rounding_lowers_a_number_by_no_more_than_its_sixteenth_binary_digit_and_keeps_the_order(values):
    x = np.sort(np.array(values))
    y = rounded(x)
    assert ((x - y >= 0) & (x - y <= np.abs(x) * 2.0**-15)).all()
    assert (np.diff(y) >= 0).all()
    assert np.array_equal(rounded(y), y)
    whole = x[(np.abs(x) <= 2**16) & (x == np.floor(x))]
    assert np.array_equal(rounded(whole), whole)


def test_any_amount_of_rows_counts_few_values_an_octave_and_both_zeros_as_one():
    x = np.random.default_rng(0).uniform(1, 2, 300_000)
    assert len(of(rounded(x))) <= 2**15 + 1
    assert len(of(rounded(np.array([0.0, -0.0])))) == 1


# Edges


@settings(max_examples=examples(200), deadline=None)
@given(COUNTS, st.integers(1, 20), st.randoms())
def test_edges_ascend_from_the_smallest_to_the_largest_value_and_make_about_as_many_bins_as_asked(counts, bins, random):
    pairs = list(counts.items())
    random.shuffle(pairs)
    columns = {"value": pl.Float64, "count": pl.UInt32}
    edges = bin_edges(pl.DataFrame(pairs, schema=columns, orient="row"), bins)
    assert np.array_equal(edges, bin_edges(pl.DataFrame(sorted(pairs), schema=columns, orient="row"), bins))
    assert (np.diff(edges) > 0).all()
    assert 2 <= len(edges) <= 2 * bins + 4
    if len(counts) >= 2:
        assert (edges[0], edges[-1]) == (min(counts), max(counts))
        assert set(edges) <= counts.keys()
    if len(counts) <= bins:  # few enough to tell each from the next
        assert set(edges) >= counts.keys()


@pytest.mark.parametrize("bins", [1, 4, 16, 64])
@pytest.mark.parametrize("draw", ["normal", "lognormal", "uniform", "exponential"])
def test_without_heavy_values_bins_hold_about_as_many_rows_each(draw, bins):
    x = getattr(np.random.default_rng(0), draw)(size=20_000)
    edges = bin_edges(of(rounded(x)), bins)
    assert 0.9 * bins <= len(edges) - 1 <= 1.1 * bins + 1
    held = np.histogram(x, edges)[0]
    assert held.min() > 0.5 * len(x) / bins or bins == 1
    assert held.max() < 1.5 * len(x) / bins


@pytest.mark.parametrize("share", [0.5, 0.95, 0.999])
def test_a_value_in_most_rows_leaves_the_bins_to_the_others(share):
    rng = np.random.default_rng(0)
    x = np.where(rng.random(100_000) < share, 0.0, rng.normal(5, 9, 100_000))
    edges, rest = bin_edges(of(rounded(x)), 16), x[x != 0]
    assert 0.0 in edges
    assert len(edges) - 1 >= 12
    assert np.histogram(rest, edges)[0].max() < 3 * len(rest) / 16


def test_several_heavy_values_are_each_an_edge():
    rng = np.random.default_rng(0)
    x = np.concatenate([np.repeat([0.0, 1.0, 50.0], 3000), rng.normal(20, 10, 1000)])
    edges = bin_edges(of(rounded(x)), 12)
    assert {0.0, 1.0, 50.0} <= set(edges)
    assert len(edges) - 1 >= 10


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e9, -1e-30, None])
@pytest.mark.parametrize("standardize", [True, False])
def test_a_column_without_two_values_has_one_bin_and_a_code_that_is_finite(value, standardize):
    encoders, column = fit([value] * 9, standardize=standardize, missing_flag=True)
    edges = encoders.edges["scaled"]
    assert len(edges) == 2
    assert np.float32(edges[0]) < np.float32(edges[1])
    assert code(edges, [*column, -1e9, 0.0, 1e9]).isfinite().all()
    assert set(ids([value] * 9)[1]) == {0 if value is None else 1}


@pytest.mark.parametrize("transform", ["none", "log1p"])
@pytest.mark.parametrize("offset", [0.0, 1e6, -1e12])
def test_edges_ascend_in_the_datasets_float32_too_however_far_values_are_apart(transform, offset):
    rng = np.random.default_rng(0)
    x = offset + rng.choice([-1.0, 1.0], 3000) * rng.lognormal(0, 12, 3000)
    encoders, column = fit(x.tolist(), transform=transform)
    edges = encoders.edges["scaled"]
    assert (np.diff(np.array(edges, dtype=np.float32)) > 0).all()
    assert (min(column), max(column)) == pytest.approx((edges[0], edges[-1]), rel=1e-4)
    assert code(edges, column).isfinite().all()


def test_edges_are_in_the_scale_of_the_datasets_column():
    x = np.random.default_rng(0).normal(40, 9, 4000)
    encoders, column = fit([*x, *[None] * 50])
    ramp_BK = code(encoders.edges["scaled"], column)
    assert ramp_BK.min() == 0
    assert ramp_BK.max() == 1
    # About equal masses: the ramps of a row add up to its rank.
    rank_B = torch.tensor(x).argsort().argsort() / len(x)
    filled_B = ramp_BK[: len(x)].sum(1) / ramp_BK.shape[1]
    assert (filled_B - rank_B).abs().max() < 2 / 16
    assert len(ramp_BK[len(x) :].unique(dim=0)) == 1


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.none() | st.integers(-40, 40).map(lambda i: i / 4), min_size=1, max_size=60), st.integers(1, 30))
def test_ids_of_bins_follow_the_order_of_numbers_and_missing_is_id_0(values, bins):
    encoders, found = ids(values, bins)
    edges, table = encoders.edges["scaled_bin"], encoders.num_embeddings("scaled_bin")
    for value, bin_id in zip(values, found, strict=True):
        expected = 0 if value is None else 1 + sum(edge <= value for edge in edges[1:])
        assert bin_id == expected < table
    distinct = {value for value in values if value is not None}
    if 2 <= len(distinct) <= bins + 1:  # few enough for an id each
        assert len({*found} - {0}) == len(distinct)


def test_a_value_of_many_rows_has_an_id_of_its_own():
    rng = np.random.default_rng(0)
    values = [0.0] * 9000 + np.log1p(rng.lognormal(8, 1, 1000)).tolist()
    _, found = ids(values, 20)
    assert len(set(found[:9000])) == 1
    assert not set(found[:9000]) & set(found[9000:])
    assert len(set(found[9000:])) >= 15


def test_numbers_beyond_what_was_fitted_have_the_first_and_the_last_id():
    encoders, _ = ids([1.0, 2.0, 3.0])
    rows = frame([{"scaled": value} for value in (-1e9, 0.5, 2.5, 99.0)])
    assert encoders.encode(rows)["scaled_bin"].to_pylist() == [1, 1, 2, 3]


# What a schema says, and what stays as it was


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dense": {"scaled": {"piecewise": 0}}}, "dense.scaled.piecewise"),
        ({"categorical": {"x": {"column": "scaled", "bins": 3, "hash": 9}}}, "one of vocabulary, hash, bins and"),
        ({"bag": {"x": {"bins": 3}}}, "bag.x.bins"),
        ({"tables": {"t": {"bins": 3}}, "bag": {"x": {"table": "t"}}}, "only a categorical feature can be a number's"),
    ],
)
def test_bins_that_cannot_be_are_refused_by_their_key(change, words):
    with pytest.raises(UserError) as caught:
        Schema.parse(CONTENT | change, where="mine.yaml")
    assert words in str(caught.value)


def test_schemas_without_encodings_keep_their_fingerprint():
    # As it was before there were encodings: datasets of then can still be read.
    assert SCHEMA.fingerprint == "3820305bacc5ec54"
    none = {name: feature | {"piecewise": None} for name, feature in CONTENT["dense"].items()}
    assert Schema.parse(CONTENT | {"dense": none}, where="mine.yaml").fingerprint == SCHEMA.fingerprint
    assert CODED.fingerprint != SCHEMA.fingerprint


@settings(max_examples=examples(40), deadline=None)
@given(ROWS)
def test_the_dataset_holds_the_same_columns_whatever_a_model_makes_of_them(rows):
    assert arrow_schema(CODED) == arrow_schema(SCHEMA)
    tables = [Encoders.fit(s, Statistics.of(s, frame(rows))).encode(frame(rows)) for s in (SCHEMA, CODED)]
    assert tables[0].equals(tables[1])


@settings(max_examples=examples(20), deadline=None)
@given(ROWS)
def test_edges_come_back_from_disk_bit_for_bit_and_only_where_there_are_any(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("encoders")
    for name, schema in (("plain", SCHEMA), ("coded", CODED)):
        encoders = Encoders.fit(schema, Statistics.of(schema, frame(rows)))
        encoders.save(folder / name)
        assert Encoders.load(folder / name, schema).edges == encoders.edges
    assert "edges" not in json.loads((folder / "plain" / "encoders.json").read_text())
    assert encoders.edges.keys() == PIECEWISE.keys()


# Many files


@pytest.fixture(scope="module")
def coded_log(small_content) -> dict[str, Any]:
    """The small log's schema with a number as ids and one piecewise."""
    content = small_content()
    content["categorical"]["price_bin"] = {"column": "price", "dim": 4, "bins": 2}
    content["dense"]["age"]["piecewise"] = 5
    content["split"] = {"by": "hash", "key": "id", "valid": 0.1, "test": 0.1}
    return content


def ingested(folder: Path, out: Path, content: dict[str, Any], **settings: Any) -> dict[str, Any]:
    preprocess(PreprocessConfig(input=str(folder), out=out, **settings), Schema.parse(content, where="mine.yaml"))
    return json.loads((out / "encoders" / "encoders.json").read_text())


@pytest.mark.integration
def test_edges_do_not_depend_on_how_rows_are_spread_over_files_or_workers(small_log, coded_log, tmp_path):
    three = ingested(small_log, tmp_path / "three", coded_log)
    assert ingested(small_log, tmp_path / "workers", coded_log, workers=2) == three
    folder = tmp_path / "seven"
    folder.mkdir()
    for path in small_log.glob("clicks-*"):
        shutil.copy(path, folder)
    rows = pl.concat([pl.read_csv(path, infer_schema=False) for path in sorted(small_log.glob("impressions-*"))])
    for i, part in enumerate(rows.iter_slices(-(-len(rows) // 7))):
        part.write_csv(folder / f"impressions-{i}.csv")
    found = ingested(folder, tmp_path / "out", coded_log)["edges"]
    assert found.keys() == three["edges"].keys() == {"price_bin", "age"}
    for name, edges in three["edges"].items():
        assert found[name] == pytest.approx(edges, rel=1e-6)
