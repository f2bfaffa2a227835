"""Figures of slices and without buckets, against the metrics of the rows that are left; what is kept in little memory."""

import math
from dataclasses import replace
from functools import reduce

import numpy as np
import polars as pl
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from pipeline.evaluation.metrics import slice_ranking
from pipeline.evaluation.metrics.accumulator import Metrics, errors_of, values_of
from pipeline.evaluation.metrics.base import Grouping, bucket_of
from pipeline.evaluation.metrics.evaluated import ALL, Evaluated, Provenance, as_array, paired, with_intervals
from pipeline.evaluation.metrics.intervals import quantile, standard_error
from pipeline.evaluation.metrics.kept_rows import KeptRows, bytes_of_row, halvings_of
from pipeline.evaluation.metrics.logit_grid import GRID
from pipeline.evaluation.metrics.radix import ascending, by_radix
from pipeline.evaluation.metrics.registry import METRICS, TOTALS, WHOLE_ONLY

# Shapes: B rows, T tasks, C keys of a row.
TASKS = [("click", "binary"), ("spend", "regression"), ("like", "binary")]
BUCKETS = 7
GROUPING = Grouping((("device=a", "device=b", "device=c"), ("cold",)), BUCKETS, train_rates={"click": 0.2, "like": 0.4})
DIMENSIONS = ("device", "age (cold start)")
SLICES = {ALL: None, "device=a": (2, 0), "device=b": (2, 1), "device=c": (2, 2), "cold": (3, 0)}
FIRST_ORDER = ("pr_auc", "ece", "gauc", "ndcg")  # their values without a bucket have tests of their own


def random_rows(rows: int = 900, seed: int = 0, users: int = 60) -> tuple[Tensor, ...]:
    """Logits with ties, labels of each kind (soft ones too), masks, weights, and keys of users."""
    rng = np.random.default_rng(seed)
    logit_BT = np.round(rng.normal(size=(rows, 3)) * 4) / 4
    label_BT = (rng.random((rows, 3)) < 1 / (1 + np.exp(1 - logit_BT))).astype(float)
    label_BT[:, 2] = np.where(rng.random(rows) < 0.2, rng.random(rows).round(2), label_BT[:, 2])
    label_BT[:, 1] = 5 + rng.normal(size=rows) + logit_BT[:, 1]
    observed_BT = rng.random((rows, 3)) < 0.7
    weight_BT = rng.random((rows, 3)) * (rng.random((rows, 3)) < 0.9)
    user_B = rng.integers(0, users, rows)
    hash_U = rng.integers(0, 1 << 32, users)
    device_B = np.where(rng.random(rows) < 0.1, -1, rng.integers(0, 3, rows))
    cold_B = np.where(rng.random(rows) < 0.1, 0, -1)
    key_BC = np.column_stack((hash_U[user_B], user_B, device_B, cold_B))
    return tuple(map(torch.from_numpy, (logit_BT, label_BT, observed_BT, weight_BT, key_BC)))


def metrics_of(rows: tuple[Tensor, ...], grouping: Grouping = GROUPING, batch: int = 100) -> Metrics:
    metrics = Metrics(TASKS, grouping, DIMENSIONS if grouping.slices else ())
    for start in range(0, len(rows[0]), batch):
        part = [x[start : start + batch] for x in rows]
        part[4] = part[4] if grouping.slices else part[4][:, :2]
        metrics.update(*part)
    return metrics


def without_groups(rows: tuple[Tensor, ...], keep_B: np.ndarray) -> dict:
    """Metrics of some rows alone."""
    plain = Grouping(train_rates=GROUPING.train_rates)
    return metrics_of(tuple(x[torch.from_numpy(keep_B)] for x in rows), plain).compute()


def in_slice(rows: tuple[Tensor, ...], name: str) -> np.ndarray:
    key_BC = rows[4].numpy()
    place = SLICES[name]
    return np.ones(len(key_BC), bool) if place is None else key_BC[:, place[0]] == place[1]


def same(found: float, expected: float | None) -> bool:
    missing = expected is None
    return math.isnan(found) if missing else found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_slices_figures_are_the_metrics_of_its_rows(seed: int) -> None:
    rows = random_rows(seed=seed)
    figures = metrics_of(rows).figures()
    for s, name in enumerate(SLICES):
        expected = without_groups(rows, in_slice(rows, name))
        for task, kind in TASKS:
            for metric in METRICS[kind].keys() - {*WHOLE_ONLY}:
                assert same(figures[task][metric].value_S[s], expected[task][metric]), (name, task, metric)


@pytest.mark.parametrize("seed", range(3))
def test_a_value_without_a_bucket_is_the_metric_of_the_other_buckets_rows(seed: int) -> None:
    rows = random_rows(seed=seed)
    figures, bucket_B = metrics_of(rows).figures(), bucket_of(rows[4][:, 0].numpy().astype(np.uint32), BUCKETS)
    for s, name in enumerate(SLICES):
        for k in range(BUCKETS):
            mine_B = in_slice(rows, name)
            expected = without_groups(rows, mine_B & (bucket_B != k))
            counts_BT = (rows[2] & (rows[3] > 0)).numpy()
            for t, (task, kind) in enumerate(TASKS):
                empty = not (counts_BT[:, t] & mine_B & (bucket_B == k)).any()
                of_bins = {"auc"} if s else {"xauc"}  # in slices; XAUC has none
                for metric in METRICS[kind].keys() - {*FIRST_ORDER, *of_bins} - ({"xauc"} if s else set()):
                    found = figures[task][metric].left_out_SK[s, k]
                    assert same(found, None if empty else expected[task][metric]), (name, task, metric, k)


@pytest.mark.parametrize(("metric", "name", "tolerance"), [
    ("pr_auc", ALL, 0.02), ("ece", ALL, 0.35),
    ("auc", "device=a", 0.07), ("pr_auc", "device=b", 0.07), ("ece", "device=c", 0.35),
])  # fmt: skip
def test_what_is_of_first_order_has_the_right_standard_error(metric: str, name: str, tolerance: float) -> None:
    rows = random_rows(6000, users=3000)
    grouping = replace(GROUPING, buckets=40)
    figures, bucket_B = metrics_of(rows, grouping).figures(), bucket_of(rows[4][:, 0].numpy().astype(np.uint32), 40)
    found_K = figures["click"][metric].left_out_SK[list(SLICES).index(name)]
    mine_B = in_slice(rows, name)
    exact_K = [without_groups(rows, mine_B & (bucket_B != k))["click"][metric] for k in range(40)]
    assert np.std(found_K - exact_K) < tolerance * np.std(exact_K)
    assert float(standard_error(found_K)) == pytest.approx(float(standard_error(np.array(exact_K))), rel=tolerance)


def test_past_as_many_predictions_as_bins_a_slices_auc_is_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(3000)
    rows = (torch.randn(3000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), *rows[1:])
    exact = metrics_of(rows).figures()["click"]
    monkeypatch.setattr(slice_ranking, "MAX_BINS", 64)
    binned = metrics_of(rows).figures()["click"]
    assert binned["auc"].value_S[0] == exact["auc"].value_S[0]
    for metric in ("auc", "pr_auc", "ece"):
        assert (binned[metric].value_S != exact[metric].value_S).any()
        assert binned[metric].value_S == pytest.approx(exact[metric].value_S, abs=0.02)
    assert np.abs(binned["auc"].value_S - exact["auc"].value_S).max() < 1 / 64 / 2


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 9), st.integers(0, 2))
def test_shards_merged_give_the_figures_of_all_rows(seed: int, count: int, buckets: int, halvings: int) -> None:
    rows, grouping = random_rows(count, seed), replace(GROUPING, buckets=buckets, halvings=halvings)
    shard_B = np.random.default_rng(seed).integers(0, 3, count)
    parts = [metrics_of(tuple(x[torch.from_numpy(shard_B == i)] for x in rows), grouping, 7) for i in range(3)]
    merged, whole = parts[2].merge(parts[0]).merge(parts[1]), metrics_of(rows, grouping)
    assert merged.rows == whole.rows
    for task, known in whole.figures().items():
        for metric, figure in known.items():
            found = merged.figures()[task][metric]
            np.testing.assert_allclose(found.value_S, figure.value_S, rtol=1e-9, atol=1e-12, err_msg=metric)
            np.testing.assert_allclose(found.left_out_SK, figure.left_out_SK, rtol=1e-8, atol=1e-11, err_msg=metric)


def test_the_frame_has_a_line_for_each_figure_and_only_slices_with_rows() -> None:
    rows = random_rows()
    rows[4][:, 3] = -1
    metrics = metrics_of(rows)
    figures = metrics.figures()
    frame = metrics.frame(figures)
    assert frame["slice"].unique().to_list().count("cold") == 0
    assert set(frame["dimension"]) == {ALL, "device"}
    line = frame.filter(task="click", metric="auc", slice="device=b").to_dicts()[0]
    assert line["value"] == figures["click"]["auc"].value_S[2]
    assert line["rows"] == figures["click"]["rows"].value_S[2]
    assert line["se"] == pytest.approx(float(standard_error(figures["click"]["auc"].left_out_SK[2])))
    assert len(line["left_out"]) == BUCKETS
    assert frame.filter(metric="rows")["left_out"].list.len().to_list() == [0] * frame.filter(metric="rows").height
    whole = frame.filter(slice=ALL, task="click")
    assert dict(zip(whole["metric"], whole["value"], strict=True)) == pytest.approx(
        values_of(figures)["click"], nan_ok=True
    )
    assert errors_of(figures)["click"]["ne"] == frame.filter(task="click", metric="ne", slice=ALL)["se"][0]
    assert not {*TOTALS} & errors_of(figures)["click"].keys()


def test_a_figure_beyond_the_largest_number_has_no_standard_error() -> None:
    metrics = Metrics(TASKS[:1], Grouping(buckets=2))
    one_BT = torch.ones(2, 1, dtype=torch.float64)
    metrics.update(one_BT * 1e300, one_BT * 0, one_BT, one_BT * 1e8, torch.tensor([[0, 0], [1 << 31, 1]]))
    figures = metrics.figures()
    assert float(standard_error(figures["click"]["log_loss"].left_out_SK[0])) == 0  # of one row each
    line = metrics.frame(figures).row(by_predicate=pl.col("metric") == "log_loss", named=True)
    assert line["value"] is line["se"] is None
    assert "log_loss" not in errors_of(figures)["click"]


def test_bins_of_the_reliability_curve_have_standard_errors_of_the_buckets_whose_rows_are_in_them() -> None:
    metrics = Metrics(TASKS[:1], Grouping(buckets=BUCKETS))
    label_BT, key_BC = random_rows()[1][:, :1], random_rows()[4][:, :2]
    bucket_B = key_BC[:, 1] % 3
    key_BC[:, 0] = (2 * bucket_B + 1) * (1 << 32) // (2 * BUCKETS)
    ones_BT = torch.ones(len(label_BT), 1)
    metrics.update(ones_BT * 0, label_BT, ones_BT, ones_BT, key_BC)
    [curve] = metrics.reliability().values()
    assert [line[:2] for line in curve] == [pytest.approx([0.5, float(label_BT.mean())])] * 20
    left_K = np.array([label_BT[bucket_B != b].mean() for b in range(3)])
    error = math.sqrt(2 / 3 * ((left_K - left_K.mean()) ** 2).sum())
    assert [line[2] for line in curve] == [pytest.approx(error) if b == 10 else None for b in range(20)]  # of one tie


def test_an_interval_is_students() -> None:
    left_K = np.array([0.5, 0.51, np.nan, 0.49, 0.5])
    mean = np.nanmean(left_K)
    expected = math.sqrt(3 / 4 * np.nansum((left_K - mean) ** 2))
    assert float(standard_error(left_K)) == pytest.approx(expected)
    assert float(quantile(0.95, 4)) == pytest.approx(3.182446, abs=1e-6)  # of Student's t table, 3 degrees of freedom
    assert float(quantile(0.95, 4, sides=1)) == pytest.approx(2.353363, abs=1e-6)
    assert math.isnan(float(quantile(0.95, 1)))
    assert math.isnan(float(standard_error(np.array([0.5, np.nan]))))


def test_differences_are_paired_by_bucket() -> None:
    rows = random_rows(2000)
    worse = (rows[0] + 0.01 * torch.randn(rows[0].shape, generator=torch.Generator().manual_seed(0)), *rows[1:])
    two = [
        Evaluated(
            m.frame(m.figures()),
            Provenance(run="r", step=step, checkpoint="", dataset="d", split="test", buckets=BUCKETS),
        )
        for step, m in enumerate((metrics_of(rows), metrics_of(worse)))
    ]
    assert paired(*two).height == two[0].figures.height
    one_name = [
        replace(e, figures=e.figures.with_columns(slice=pl.col("slice").replace("cold", "device=a"))) for e in two
    ]
    assert paired(*one_name).drop("slice").equals(paired(*two).drop("slice"))
    line = paired(*two).filter(task="click", metric="ne", slice=ALL).to_dicts()[0]
    ours, theirs = (e.figures.filter(task="click", metric="ne", slice=ALL) for e in two)
    assert line["delta"] == ours["value"][0] - theirs["value"][0]
    left_K = as_array(ours["left_out"][0]) - as_array(theirs["left_out"][0])
    assert line["se"] == pytest.approx(math.sqrt((BUCKETS - 1) / BUCKETS * ((left_K - left_K.mean()) ** 2).sum()))
    assert line["se"] < ours["se"][0] / 3
    assert line["buckets"] == BUCKETS
    whole = with_intervals(two[0].figures).filter(task="click", metric="ne", slice=ALL).to_dicts()[0]
    reach = float(quantile(0.95, BUCKETS)) * whole["se"]
    assert (whole["low"], whole["high"]) == pytest.approx((whole["value"] - reach, whole["value"] + reach))


def test_past_the_limit_of_memory_auc_is_of_all_rows_on_a_grid_and_intervals_of_a_sample() -> None:
    rng = np.random.default_rng(0)
    logit_BT = torch.from_numpy(rng.normal(size=(20_000, 3)))
    rows = (logit_BT, *random_rows(20_000, users=4000)[1:])
    exact = metrics_of(rows)
    small = metrics_of(rows, replace(GROUPING, halvings=3), 50)
    kept = small.state()["rows/cluster"]
    assert 1 / 10 <= len(kept) / 20_000 <= 1 / 6
    found, expected = small.figures(), exact.figures()
    for metric in ("auc", "pr_auc", "ece"):
        assert found["click"][metric].value_S[0] == pytest.approx(expected["click"][metric].value_S[0], abs=1e-6)
        assert found["click"][metric].value_S[1] == pytest.approx(expected["click"][metric].value_S[1], abs=0.1)
    assert found["click"]["ne"].value_S == pytest.approx(expected["click"]["ne"].value_S, rel=1e-12)
    errors, smaller = (float(standard_error(f["click"]["auc"].left_out_SK[0])) for f in (expected, found))
    assert errors / 3 < smaller < errors * 3
    left_K = found["click"]["auc"].left_out_SK[0]  # around the value of all rows, as a paired ratio needs them
    assert np.nanmean(left_K) == pytest.approx(found["click"]["auc"].value_S[0], abs=smaller / 10)
    ranking = small.ranking()
    assert ranking["share"] == 1 / 8
    tied = {}
    for t in (0, 2):
        counts_B = rows[2][:, t] & (rows[3][:, t] > 0)
        logit, label, weight = (x[counts_B, t].numpy() for x in rows[:2] + rows[3:4])
        _, place = np.unique(np.rint(logit * GRID), return_inverse=True)
        positive, negative = np.bincount(place, label * weight), np.bincount(place, (1 - label) * weight)
        tied[t] = positive @ negative / positive.sum() / negative.sum()
    assert ranking["sketch"] == pytest.approx(max(tied.values()) / 2, rel=1e-9)
    assert abs(found["click"]["auc"].value_S[0] - expected["click"]["auc"].value_S[0]) <= ranking["sketch"]
    assert exact.ranking() == "exact"


def test_a_sample_is_as_large_as_memory_is() -> None:
    rows = metrics_of(tuple(x.float() if x.dtype == torch.float64 else x for x in random_rows(4000)))
    of_each = bytes_of_row(len(TASKS), len(DIMENSIONS))
    empty = KeptRows(TASKS, GROUPING)
    empty.load(empty.state())
    state = empty.merge(rows.statistics[KeptRows]).state()  # a rank without rows leaves float32 what it is
    count = len(state["rows/cluster"])
    assert sum(x.nbytes for x in state.values() if len(x) == count) == of_each * count
    assert [halvings_of(1000, of_each, of_each * kept) for kept in (1e9, 1000, 999, 500, 499, 1e-9, 5e-324)] == [
        0, 0, 1, 1, 2, 31, 31
    ]  # fmt: skip


@pytest.mark.parametrize("t", [0, 2])
def test_ranking_metrics_of_a_slice_are_scikit_learns(t: int) -> None:
    logit_BT, label_BT, observed_BT, weight_BT, key_BC = rows = random_rows(3000)
    rows[1][:, 2] = (label_BT[:, 2] > 0.5).double()
    figures = metrics_of(rows).figures()[TASKS[t][0]]
    keep_B = (observed_BT[:, t] & (weight_BT[:, t] > 0) & (key_BC[:, 2] == 1)).numpy()
    label, logit, weight = (x[:, t].numpy()[keep_B] for x in (label_BT, logit_BT, weight_BT))
    assert figures["auc"].value_S[2] == pytest.approx(roc_auc_score(label, logit, sample_weight=weight), rel=1e-10)
    assert figures["pr_auc"].value_S[2] == pytest.approx(
        average_precision_score(label, logit, sample_weight=weight), rel=1e-10
    )


def test_the_reliability_curve_is_of_bins_of_equal_weight() -> None:
    rng = np.random.default_rng(5)
    logit_B = rng.normal(size=4000)
    label_B = (rng.random(4000) < 1 / (1 + np.exp(-logit_B))).astype(float)
    metrics = Metrics(TASKS[:1], Grouping(buckets=50))
    key_BC = np.column_stack((rng.integers(0, 1 << 32, 4000), np.zeros(4000, np.int64)))
    ones_BT = torch.ones(4000, 1)
    metrics.update(
        *(torch.from_numpy(x).unsqueeze(1) for x in (logit_B, label_B)), ones_BT, ones_BT, torch.from_numpy(key_BC)
    )
    [curve] = metrics.reliability().values()
    order = np.argsort(logit_B).reshape(20, 200)
    bucket_B = bucket_of(key_BC[:, 0].astype(np.uint32), 50)
    for line, index in zip(curve, order, strict=True):
        assert line[0] == pytest.approx((1 / (1 + np.exp(-logit_B[index]))).mean(), rel=1e-9)
        assert line[1] == pytest.approx(label_B[index].mean(), rel=1e-9, abs=1e-12)
        assert line[3] == pytest.approx(200)
        assert line[4] == len(set(bucket_B[index]))
        binomial = math.sqrt(label_B[index].mean() * (1 - label_B[index].mean()) / 200)
        assert line[2] == pytest.approx(binomial, rel=0.45)
    assert min(line[4] for line in curve) < 50


@pytest.mark.parametrize("halvings", [0, 1])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_hides_its_slices_alone(halvings: int, broken: float) -> None:
    rows = random_rows()
    counts_B = (rows[2] & (rows[3] > 0))[:, :2].all(1).numpy() & in_slice(rows, "device=b")
    row = int(np.flatnonzero(counts_B & (rows[4][:, 0].numpy() % 2 == 1))[0])  # not in the half that is kept
    rows[0][row, :2] = broken
    rows[4][row, 3] = -1
    halves = [tuple(x[part::2] for x in rows) for part in range(2)]
    metrics = reduce(Metrics.merge, [metrics_of(half, replace(GROUPING, halvings=halvings)) for half in halves])
    again = Metrics(TASKS, metrics.grouping, DIMENSIONS)
    again.load(metrics.state())
    for figures in (metrics.figures(), again.figures()):
        for metric in ("ne", "auc", "pr_auc", "ece", "calibration"):
            figure = figures["click"][metric]
            assert np.isnan(figure.value_S).tolist() == [True, False, True, False, False], metric
            assert np.isnan(figure.left_out_SK[2]).sum() >= BUCKETS - 1  # one may be without the row
        for task, metric in (("click", "gauc"), ("click", "ndcg"), ("spend", "xauc")):
            assert np.isnan(figures[task][metric].value_S).all()
    assert metrics.reliability()["click"] == []


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), max_size=40))
def test_float32_numbers_are_sorted_by_radix_as_numpy_sorts_them(values: list[float]) -> None:
    x_N = np.array(values, np.float32)
    np.testing.assert_array_equal(x_N[ascending(x_N)], np.sort(x_N))


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 1 << 15, 1 << 16, 1 << 40, (1 << 64) - 1])), max_size=40
    )
)
def test_equal_numbers_keep_the_order_that_is_given(pairs: list[tuple[int, int]]) -> None:
    first_N, second_N = (np.array(x, np.uint64) for x in (zip(*pairs, strict=True) if pairs else ([], [])))
    np.testing.assert_array_equal(by_radix(second_N, by_radix(first_N)), np.lexsort((first_N, second_N)))


def test_a_single_row_has_no_variance_whatever_the_rows_of_other_shards_were_near() -> None:
    def shard(labels: list[float], buckets: list[int]) -> Metrics:
        metrics = Metrics(TASKS[1:2], Grouping(buckets=2))
        label_BT, ones_BT = torch.tensor(labels, dtype=torch.float64)[:, None], torch.ones(len(labels), 1)
        key_BC = torch.tensor([[bucket << 31, 0] for bucket in buckets])
        metrics.update(label_BT + 1, label_BT, ones_BT, ones_BT, key_BC)
        return metrics

    for last in (5.001, 5.003, 5.007, 5.011, 5.013):
        merged = shard([5.0], [0]).merge(shard([2e6 + 0.1, last], [0, 1]))
        nrmse = merged.figures()["spend"]["nrmse"]
        assert math.isfinite(nrmse.value_S[0])
        assert math.isnan(nrmse.left_out_SK[0, 0])  # without bucket 0 one row is left


@pytest.mark.parametrize("of_users", [1, 2])
def test_what_one_bucket_alone_decides_has_no_interval(of_users: int) -> None:
    rng = np.random.default_rng(0)
    count, tasks, slices = 4000, [("click", "binary")], Grouping((("device=a",),), BUCKETS)
    user_B = np.arange(count) % 70
    hash_U = (np.arange(70) % BUCKETS * 2 + 1) * (1 << 32) // (2 * BUCKETS)  # a tenth of them in each bucket
    key_BC = np.column_stack((hash_U[user_B], user_B, np.where(user_B < 40, 0, -1)))
    label_B = np.isin(user_B, range(of_users)) & (rng.random(count) < 0.5)
    logit_B, weight_B = rng.normal(size=count) + 3 * label_B, rng.random(count) + 0.5
    rows = [torch.from_numpy(x)[:, None] for x in (logit_B, label_B * 1.0, weight_B > 0, weight_B)]
    metrics = Metrics(tasks, slices, ("device",))
    metrics.update(*rows, torch.from_numpy(key_BC))
    figures, frame = metrics.figures(), metrics.frame(metrics.figures())
    decided = {"ne", "auc", "pr_auc", "calibration"}
    for name in decided:
        figure = figures["click"][name]
        assert np.isfinite(figure.value_S).all()
        assert np.isfinite(standard_error(figure.left_out_SK)).tolist() == [of_users > 1] * 2
    assert np.isfinite(standard_error(figures["click"]["log_loss"].left_out_SK)).all()  # defined without positives too
    lines = frame.filter(frame["metric"].is_in([*decided]))
    assert lines["se"].is_null().all() == (of_users == 1)
    provenance = Provenance(run="r", step=1, checkpoint="c", dataset="d", split="test", buckets=BUCKETS)
    one = Evaluated(frame, provenance)
    difference = paired(one, one).filter(metric="ne")
    assert difference["se"].is_null().all() == (of_users == 1)
    assert difference["relative_se"].is_null().all() == (of_users == 1)
    assert ("ne" in errors_of(figures)["click"]) == (of_users > 1)
    groups = figures["click"]["gauc"].left_out_SK[0]
    assert np.isnan(groups).all() == (of_users == 1)


@pytest.mark.parametrize(("share", "width", "by_bins"), [(0.02, 0.003, False), (0.3, 0.03, True)])
def test_a_slice_whose_predictions_lie_close_together_has_figures_and_errors_of_its_own(
    monkeypatch: pytest.MonkeyPatch, share: float, width: float, by_bins: bool
) -> None:
    if by_bins:
        monkeypatch.setattr(slice_ranking, "MAX_SHARED", 1.0)
    rng = np.random.default_rng(0)
    count, buckets = 60_000, 20
    slice_B, skill_B = np.where(rng.random(count) < share, 0, -1), rng.normal(size=count)
    logit_B = np.where(slice_B == 0, -1 + width * skill_B, 2 * rng.normal(size=count)).astype(np.float32)
    label_B = rng.random(count) < 1 / (1 + np.exp(1 - skill_B))
    hash_B = rng.integers(0, 1 << 32, count)
    metrics = Metrics([("click", "binary")], Grouping((("cold",),), buckets), ("age (cold start)",))
    columns = [
        torch.from_numpy(x)[:, None]
        for x in (logit_B, label_B.astype(np.float32), label_B < 2, np.ones(count, np.float32))
    ]
    metrics.update(*columns, torch.from_numpy(np.column_stack((hash_B, hash_B, slice_B))))
    figures, bucket_B = metrics.figures()["click"], bucket_of(hash_B.astype(np.uint32), buckets)
    mine_B = slice_B == 0
    for name, expected in (("auc", roc_auc_score), ("pr_auc", average_precision_score)):
        left_K = [
            expected(label_B[keep_B], logit_B[keep_B]) for keep_B in (mine_B & (bucket_B != k) for k in range(buckets))
        ]
        error = standard_error(np.array(left_K))
        assert figures[name].value_S[1] == pytest.approx(
            expected(label_B[mine_B], logit_B[mine_B]), abs=0.01 if by_bins else 1e-9
        )
        assert standard_error(figures[name].left_out_SK[1]) == pytest.approx(error, rel=0.08)


def test_slices_of_two_models_that_are_nearly_equal_are_told_apart_as_finely_as_all_rows() -> None:
    rng = np.random.default_rng(1)
    count, buckets = 40_000, 50
    logit_B, slice_B = rng.normal(size=count), np.where(rng.random(count) < 0.3, 0, -1)
    label_B, hash_B = rng.random(count) < 1 / (1 + np.exp(2 - logit_B)), rng.integers(0, 1 << 32, count)
    left_out = []
    for noise in rng.normal(size=(2, count)) * 0.01:
        metrics = Metrics([("click", "binary")], Grouping((("cold",),), buckets), ("age (cold start)",))
        columns = [torch.from_numpy(x)[:, None] for x in (logit_B + noise, label_B * 1.0, label_B < 2, np.ones(count))]
        metrics.update(*columns, torch.from_numpy(np.column_stack((hash_B, hash_B, slice_B))))
        metrics_of_slice = Metrics([("click", "binary")], Grouping((), buckets))
        mine_B = torch.from_numpy(slice_B == 0)
        alone = [x[mine_B] for x in (*columns, torch.from_numpy(np.column_stack((hash_B, hash_B))))]
        metrics_of_slice.update(*alone)
        pair = metrics.figures()["click"], metrics_of_slice.figures()["click"]
        left_out.append([(pair[0][name].left_out_SK[1], pair[1][name].left_out_SK[0]) for name in ("auc", "pr_auc")])
    for (ours, ours_alone), (theirs, theirs_alone) in zip(*left_out, strict=True):
        error, expected = standard_error(ours - theirs), standard_error(ours_alone - theirs_alone)
        assert error == pytest.approx(expected, rel=0.1)


def test_what_rounding_leaves_of_a_class_or_of_rows_in_one_bucket_is_no_figure() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        count, whole = 60, Grouping((("device=a",),), BUCKETS)
        label_B, slice_B = rng.random(count) < 0.3, np.where(rng.random(count) < 0.5, 0, -1)
        nearly_B = label_B & (np.cumsum(label_B) > 1)
        for alone_B in (label_B, nearly_B, np.ones(count, bool)):  # the positives, or all rows, are in one bucket
            hash_B = np.where(alone_B, 0, rng.integers(1 << 30, 1 << 32, count))
            weight_B = np.where(label_B & ~alone_B, 1e-14, rng.random(count) + 0.1)
            metrics = Metrics([("click", "binary")], whole, ("device",))
            columns = (rng.normal(size=count), label_B * 1.0, label_B < 2, weight_B)
            key_BC = np.column_stack((hash_B, np.arange(count), slice_B))
            metrics.update(*(torch.from_numpy(x)[:, None] for x in columns), torch.from_numpy(key_BC))
            figures = metrics.figures()["click"]
            for name in ("auc", "pr_auc", "ece") if alone_B.all() else ("auc", "pr_auc"):
                assert np.isnan(figures[name].left_out_SK).all(), (seed, name)


def test_kept_rows_do_not_hold_the_batches_that_they_are_of() -> None:
    logit_BT, label_BT, observed_BT, weight_BT, key_BC = random_rows()
    metrics = metrics_of((logit_BT, label_BT, observed_BT | True, weight_BT + 1, key_BC))
    [kept] = [s for s in metrics.statistics.values() if isinstance(s, KeptRows)]
    assert len(kept.parts) > 1
    assert all(x.base is None for part in kept.parts for x in part)
