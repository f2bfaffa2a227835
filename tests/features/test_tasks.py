"""Tasks: what a schema may say of their losses and conditions, and the scale that a regression is learnt in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import yaml
from dataset_from_rows import parse_text
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.fit import reuse
from features.fit.encoders import Encoders
from features.fit.label_scale import LabelMoments, LabelScale
from features.fit.statistics import Statistics
from features.schema.schema import Schema
from features.schema.task import given_chain

CONTENT = yaml.safe_load("""
source: {files: "*.csv", types: {click: int, buy: int, cart: int, dwell: float, spend: float, w: float}}
categorical: {user: {dim: 4}}
tasks:
  buy: {kind: binary, label: buy, given: cart}
  click: {kind: binary, label: click}
  cart: {kind: binary, label: cart, given: click}
  dwell: {kind: regression, label: dwell, observed_when: click = 1}
  time: {kind: regression, label: dwell, transform: log1p}
  spend: {kind: regression, label: spend, loss: ziln}
weight: w
split: {by: row_index, modulo: 2, train: [0, 1], valid: [], test: []}
""")


def schema(**tasks: dict[str, Any] | None) -> Schema:
    """The schema with other keys of some tasks; None removes one."""
    found = CONTENT["tasks"] | {n: CONTENT["tasks"].get(n, {}) | (t or {}) for n, t in tasks.items()}
    return Schema.parse(CONTENT | {"tasks": {n: t for n, t in found.items() if tasks.get(n, t) is not None}}, "my.yaml")


def parsed(spec: Schema, rows: list[dict[str, Any]]) -> pa.Table:
    names = ["click", "buy", "cart", "dwell", "spend", "w"]
    columns = {n: [None if r.get(n) is None else str(r[n]) for r in rows] for n in names}
    frame = pl.DataFrame(columns | {"user": ["u"] * len(rows)}, schema=dict.fromkeys([*names, "user"], pl.String))
    return parse_text(spec, frame)


@pytest.mark.parametrize(
    ("tasks", "fault"),
    [
        ({"click": {"loss": "huber"}}, "my.yaml: tasks.click.loss: a binary task has none"),
        ({"click": {"transform": "log1p"}}, "my.yaml: tasks.click.transform: a binary task has none"),
        ({"spend": {"transform": "log1p"}}, "my.yaml: tasks.spend.transform: the loss ziln takes the logarithm itself"),
        ({"buy": {"given": "crat"}}, "my.yaml: tasks.buy.given: crat is not another binary task (did you mean cart?)"),
        ({"buy": {"given": "buy"}}, "my.yaml: tasks.buy.given: buy is not another binary task"),
        ({"buy": {"given": "dwell"}}, "my.yaml: tasks.buy.given: dwell is not another binary task"),
        (
            {"dwell": {"given": "click"}},
            "my.yaml: tasks.dwell.given: a regression task is observed where observed_when",
        ),
        ({"click": {"given": "buy"}}, "are given each other. Remove one of the two."),
        (
            {"dwell": {"loss": "hubber"}},
            "hubber is not one of 'squared', 'huber', 'quantile', 'ziln' (did you mean huber?)",
        ),
        ({"dwell": {"loss": {"delta": 2}}}, "my.yaml: tasks.dwell.loss: name is missing"),
        ({"dwell": {"loss": 5}}, "my.yaml: tasks.dwell.loss: Input should be a mapping"),
        ({"dwell": {"loss": {"name": "huber", "delta": 0}}}, "my.yaml: tasks.dwell.loss.delta: "),
        ({"dwell": {"loss": {"name": "quantile", "q": 1.5}}}, "my.yaml: tasks.dwell.loss.q: "),
        (
            {"dwell": {"loss": {"name": "huber", "dleta": 2}}},
            "dleta: unknown key (did you mean delta?), allowed are name, delta",
        ),
        ({"dwell": {"loss": {"name": "quantile", "delta": 2}}}, "dwell.loss.delta: unknown key, allowed are name, q"),
    ],
)
def test_what_does_not_fit_is_named(tasks, fault):
    with pytest.raises(UserError) as error:
        schema(**tasks)
    assert fault in str(error.value)


def test_a_loss_by_its_name_is_the_same_schema_as_one_with_keys():
    assert (
        schema(dwell={"loss": "huber"}).fingerprint == schema(dwell={"loss": {"name": "huber", "delta": 1}}).fingerprint
    )
    assert schema(dwell={"loss": "huber"}).fingerprint != schema().fingerprint
    assert schema(dwell={"loss": "squared"}).fingerprint == schema().fingerprint
    assert Schema.parse(
        schema(dwell={"loss": "huber"}).model_dump(mode="json", exclude_unset=True), "again"
    ).fingerprint


def test_the_chain_of_a_task_ends_at_one_that_a_run_left_out():
    spec = schema()
    assert given_chain(spec.tasks, "buy") == ["cart", "click"]
    assert given_chain(spec.only(["buy", "click"]).tasks, "buy") == []
    assert given_chain(spec.only(["buy", "cart"]).tasks, "buy") == ["cart"]


def test_a_label_is_observed_where_all_that_its_task_is_given_is_1():
    rows = [
        {"click": click, "cart": cart, "buy": 1, "dwell": 2.0, "spend": 1.0, "w": 1.0}
        for click in (0, 1, None)
        for cart in (0, 1, None)
    ]
    found = parsed(schema(), rows)
    for row, cart, buy in zip(rows, found["label.cart"].to_pylist(), found["label.buy"].to_pylist(), strict=True):
        assert cart == (row["cart"] if row["click"] == 1 else None)
        assert buy == (1 if row["click"] == 1 and row["cart"] == 1 else None)


def test_labels_whose_logarithm_is_taken_are_above_minus_1():
    rows = [{"click": 1, "cart": 0, "buy": 0, "dwell": dwell, "spend": 1.0, "w": 1.0} for dwell in (2.0, -1.0, -0.5)]
    assert parsed(schema(), rows).num_rows == 2


labels = st.lists(st.one_of(st.none(), st.floats(-0.875, 1e4, width=32)), min_size=1, max_size=40)


@settings(max_examples=examples(60), deadline=None)
@given(labels, st.data())
def test_scales_are_weighted_moments_of_what_is_learnt_over_parts_in_any_cut(values, data):
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=len(values), max_size=len(values)))
    cut = data.draw(st.integers(0, len(values)))
    label_N, weight_N = np.array([np.nan if v is None else v for v in values]), np.array(weights)
    for name, learnt in (("dwell", lambda y: y), ("time", np.log1p), ("spend", np.log)):
        task = schema().tasks[name]
        parts = [LabelMoments.of_labels(label_N[s], weight_N[s], task) for s in (slice(cut), slice(cut, None))]
        scale = parts[0].merge(parts[1]).scale()
        pairs = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None and w]
        inside = [(float(learnt(v)), w) for v, w in pairs if name != "spend" or v > 0]
        if not inside:
            assert (scale.mean, scale.std) == (0.0, 1.0)
            continue
        whole = sum(w for _, w in inside)
        mean = sum(v * w for v, w in inside) / whole
        std = (sum(w * (v - mean) ** 2 for v, w in inside) / whole) ** 0.5
        assert scale.mean == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert scale.std == (1.0 if len({v for v, _ in inside}) == 1 else pytest.approx(std, rel=1e-6))
        assert scale.positive == pytest.approx((whole + 0.5) / (sum(w for _, w in pairs) + 1))


@pytest.mark.parametrize("positive", [0.0, 1.0])
def test_no_share_of_labels_above_0_is_certain_however_heavy_the_rows(positive: float) -> None:
    scale = LabelMoments.of_labels(np.array([positive]), np.array([1e18]), schema().tasks["spend"]).scale()
    assert 0 < scale.positive < 1


ROWS = [
    {"click": i % 2, "cart": 0, "buy": 0, "dwell": float(i), "spend": float(i % 3), "w": 1.0 + i % 2} for i in range(20)
]


def fitted(spec: Schema) -> Encoders:
    return Encoders.fit(spec, Statistics.of(spec, parsed(spec, ROWS)))


def test_scales_are_kept_with_the_encoders_and_read_for_the_tasks_of_a_run(tmp_path):
    spec, encoders = schema(), fitted(schema())
    encoders.save(tmp_path / "encoders")
    assert Encoders.load(tmp_path / "encoders", spec).labels == encoders.labels
    assert encoders.labels.keys() == {"dwell", "time", "spend"}
    assert encoders.labels["dwell"].mean == pytest.approx(10.0)  # 1, 3, … 19, all of weight 2
    assert Encoders.load(tmp_path / "encoders", spec.only(["dwell", "click"])).labels.keys() == {"dwell"}


def test_encoders_of_before_there_were_scales_have_none(tmp_path):
    fitted(schema()).save(tmp_path / "encoders")
    file = tmp_path / "encoders" / "encoders.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "labels"}))
    assert Encoders.load(tmp_path / "encoders", schema()).labels == {}


@pytest.mark.parametrize("entry", [{"std": 0.0}, {"std": -1.0}, {"mean": float("nan")}, {"positive": 1.0}])
def test_a_scale_that_would_divide_by_zero_is_refused(tmp_path: Path, entry: dict[str, float]):
    fitted(schema()).save(tmp_path / "encoders")
    file = tmp_path / "encoders" / "encoders.json"
    content = json.loads(file.read_text())
    content["labels"]["dwell"] |= entry
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="encoders"):
        Encoders.load(tmp_path / "encoders", schema())


def test_encoders_that_are_kept_bring_the_scales_of_labels_that_mean_the_same():
    known, spec = schema(), schema(time={"transform": "none"}, dwell={"loss": "huber"})
    old, new = fitted(known), fitted(spec)
    old.labels["dwell"] = LabelScale(7.0, 7.0, 0.7)
    kept = reuse.keep(new, old, reuse.unchanged(spec, known), "0" * 16)
    assert kept.labels["dwell"] == LabelScale(7.0, 7.0, 0.7)
    assert kept.labels["time"] == new.labels["time"] != old.labels["time"]
    before = reuse.keep(new, replace(old, labels={}), reuse.unchanged(spec, known), "0" * 16)
    assert before.labels.keys() == {"time"}  # what earlier runs learnt as it is stays so


def test_a_scale_is_fitted_again_where_other_rows_are_observed():
    known, spec = schema(), schema(dwell={"observed_when": "cart = 0"})
    assert reuse.unchanged(spec, known).labels >= {"time", "spend"}
    assert "dwell" not in reuse.unchanged(spec, known).labels
