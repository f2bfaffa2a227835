"""Grouped AUC and NDCG against scikit-learn and loops over pairs, XAUC against loops over pairs and torchrec."""

import itertools

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score
from torchrec.metrics.xauc import compute_error_sum, compute_weighted_num_pairs

from pipeline.evaluation.metrics.grouped import grouped
from pipeline.evaluation.metrics.intervals import standard_error
from pipeline.evaluation.metrics.xauc import xauc

# Shapes: N rows, K buckets.
K = 5


def rows(count: int, seed: int, soft: bool = False) -> tuple[np.ndarray, ...]:
    """Logits with ties, labels, weights of which some are 0, groups, and buckets that follow from the groups."""
    rng = np.random.default_rng(seed)
    logit_N = np.round(rng.normal(size=count), 1).astype(np.float32)
    label_N = rng.random(count) if soft else (rng.random(count) < 0.3)
    weight_N = rng.uniform(0.2, 3, count) * (rng.random(count) < 0.9)
    group_N = rng.integers(0, max(count // 6, 1), count)
    return logit_N, label_N.astype(np.float32), weight_N, group_N * 7 - 11, group_N % 7 % K


def auc_by_pairs(logit: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    won = pairs = 0.0
    for i in range(len(logit)):
        for j in range(len(logit)):
            both = float(weight[i]) * float(label[i]) * float(weight[j]) * (1 - float(label[j]))
            pairs += both
            won += both * (1.0 if logit[i] > logit[j] else 0.5 if logit[i] == logit[j] else 0.0)
    return won / pairs if pairs else np.nan


def ndcg_by_orders(logit: np.ndarray, label: np.ndarray, k: int) -> float:
    """The mean over all orders that the logits allow, of at most 6 rows."""
    orders = [o for o in itertools.permutations(range(len(logit))) if (np.diff(logit[list(o)]) <= 0).all()]
    dcg = [sum(float(label[i]) / np.log2(place + 2) for place, i in enumerate(order[:k])) for order in orders]
    ideal = sum(y / np.log2(place + 2) for place, y in enumerate(sorted(map(float, label), reverse=True)[:k]))
    return np.mean(dcg) / ideal if ideal else np.nan


def mean_over_groups(of_group, weight_of, logit, label, weight, group) -> float:
    top = bottom = 0.0
    for g in set(group.tolist()):
        ours = (group == g) & (weight > 0)
        value = of_group(logit[ours], label[ours], weight[ours]) if ours.any() else np.nan
        if not np.isnan(value):
            top, bottom = top + weight_of(weight[ours]) * value, bottom + weight_of(weight[ours])
    return top / bottom if bottom else np.nan


def sklearn_auc(logit: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    return roc_auc_score(label, logit, sample_weight=weight) if 0 < label.sum() < len(label) else np.nan


def sklearn_ndcg(k: int):
    def of_group(logit: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
        if not label.sum():
            return np.nan
        return ndcg_score([label], [logit], k=k) if len(label) > 1 else 1.0  # scikit-learn refuses a list of one

    return of_group


@pytest.mark.parametrize("k", [1, 3, 100])
def test_grouped_metrics_are_those_of_sklearn_group_by_group_and_without_each_bucket(k: int):
    logit, label, weight, group, bucket = rows(400, k)
    found = grouped(logit, label, weight, group, bucket, K, k)
    for name, of_group, weight_of in (("gauc", sklearn_auc, np.sum), ("ndcg", sklearn_ndcg(k), np.mean)):
        value, left_out = found[name]
        assert value == pytest.approx(mean_over_groups(of_group, weight_of, logit, label, weight, group), rel=1e-12)
        for b in range(K):
            rest = [x[bucket != b] for x in (logit, label, weight, group)]
            assert left_out[b] == pytest.approx(mean_over_groups(of_group, weight_of, *rest), rel=1e-12), (name, b)


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(1, 40), st.integers(0, 10_000), st.integers(1, 8), st.booleans())
def test_grouped_metrics_are_loops_over_pairs_and_orders(count: int, seed: int, k: int, soft: bool):
    logit, label, weight, group, bucket = rows(count, seed, soft)
    group = np.arange(count) // 5  # lists of at most 5 rows: all orders of one can be tried
    found = grouped(logit, label, weight, group, bucket, K, k)
    gauc = mean_over_groups(auc_by_pairs, np.sum, logit, label, weight, group)
    ndcg = mean_over_groups(lambda z, y, _: ndcg_by_orders(z, y, k), np.mean, logit, label, weight, group)
    assert found["gauc"][0] == pytest.approx(gauc, rel=1e-9, nan_ok=True)
    assert found["ndcg"][0] == pytest.approx(ndcg, rel=1e-9, nan_ok=True)


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(1, 200), st.integers(0, 10_000), st.booleans())
def test_the_order_of_rows_and_the_codes_of_groups_do_not_matter(count: int, seed: int, soft: bool):
    logit, label, weight, group, bucket = rows(count, seed, soft)
    order = np.random.default_rng(seed).permutation(count)
    # Codes that are far apart, as hashes are.
    hashed = (group.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    found = grouped(logit, label, weight, group, bucket, K, 3)
    again = grouped(*(x[order] for x in (logit, label, weight, hashed, bucket)), K, 3)
    for name in ("gauc", "ndcg"):
        assert found[name][0] == pytest.approx(again[name][0], rel=1e-12, nan_ok=True)
        assert found[name][1] == pytest.approx(again[name][1], rel=1e-9, nan_ok=True)


def test_a_group_whose_rows_are_in_several_buckets_is_in_the_one_of_its_hash():
    logit, label = np.float32([2, 1] * 3), np.float32([1, 0, 0, 1, 1, 0])
    group = np.array([int((b + 0.5) / K * 2**64) for b in (4, 0, 1)], np.uint64).view(np.int64).repeat(2)
    bucket = np.array([2, 1, 3, 3, 4, 1])  # the rows of the second group share theirs
    value, left_out = grouped(logit, label, np.ones(6), group, bucket, K, 2)["gauc"]
    assert value == pytest.approx(2 / 3)
    assert left_out == pytest.approx([np.nan, 0.5, np.nan, 1.0, 0.5], nan_ok=True)


@pytest.mark.parametrize("nested", [True, False])
def test_standard_errors_of_grouped_metrics_are_their_spread_over_days(nested: bool):
    """Queries of one user each, whose difficulty they share, or of many users: then it is the query's own."""
    days, queries, buckets = 80, 400, 20
    values, errors = {}, {}
    for day in range(days):
        rng = np.random.default_rng([11, day])
        skill_U = rng.normal(1, 1, 100)
        query_N = np.repeat(np.arange(queries), rng.integers(4, 12, queries))
        hash_Q, bucket_U = rng.integers(-(1 << 63), 1 << 63, queries), rng.integers(0, buckets, 100)
        user_N = query_N % 100 if nested else rng.integers(0, 100, len(query_N))
        skill_N = skill_U[user_N] if nested else rng.normal(1, 1, queries)[query_N]
        label_N = (rng.random(len(query_N)) < 0.4).astype(np.float32)
        logit_N = (skill_N * label_N + rng.normal(size=len(query_N))).astype(np.float32)
        rows = (logit_N, label_N, np.ones(len(query_N)), hash_Q[query_N], bucket_U[user_N])
        for name, (value, left_out) in grouped(*rows, buckets, 3).items():
            values.setdefault(name, []).append(value)
            errors.setdefault(name, []).append(float(standard_error(left_out)))
    for name in values:
        assert np.mean(errors[name]) / np.std(values[name]) == pytest.approx(1, abs=0.2), name


def test_a_single_bucket_has_no_value_without_it_and_a_prediction_that_is_not_finite_undoes_all():
    logit, label, weight, group, _ = rows(200, 1)
    found = grouped(logit, label, weight, group, np.zeros(200, np.int64), K, 3)
    assert all(np.isfinite(value) and np.isnan(left_out).all() for value, left_out in found.values())
    logit[np.flatnonzero(weight)[0]] = np.nan
    found = grouped(logit, label, weight, group, np.zeros(200, np.int64), K, 3)
    assert all(np.isnan(value) and len(left_out) == K for value, left_out in found.values())
    weight[np.isnan(logit)] = 0
    assert np.isfinite(grouped(logit, label, weight, group, np.zeros(200, np.int64), K, 3)["ndcg"][0])
    for count in (0, 1):
        assert np.isnan(
            grouped(*(x[:count] * 0 for x in (logit, label, weight, group)), group[:count] * 0, K, 3)["gauc"][0]
        )


def test_zeros_of_both_signs_are_a_tie_and_negative_logits_keep_their_order():
    logit = np.float32([0.0, -0.0, -3, -2])
    label = np.float32([1, 0, 0, 1])
    assert grouped(logit, label, np.ones(4), np.array([1, 1, 2, 2]), np.zeros(4, int), 1, 1)["gauc"][0] == 0.75


def test_float64_logits_that_float32_does_not_tell_apart_are_no_ties():
    logit = np.array([40, 40 + 1e-12, 40 + 2e-12, 40 + 3e-12, 1e300, -1e300])
    label, one = np.array([0, 0, 1, 1, 1, 0]), np.zeros(6, np.int64)
    assert grouped(logit, label, np.ones(6), one, one, 1, 1)["gauc"][0] == 1


def test_without_a_bucket_of_nearly_all_weight_the_others_remain():
    logit, label = np.float32([2, 1] * 3), np.float32([1, 0, 0, 1, 1, 0])
    place = np.arange(3).repeat(2)
    _, left_out = grouped(logit, label, np.array([1, 1, 1, 1, 1e17, 1e17]), place, place, 3, 2)["gauc"]
    assert left_out[2] == 0.5


def xauc_by_pairs(prediction: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    won = pairs = 0.0
    for i in range(len(label)):
        for j in range(len(label)):
            if label[i] > label[j]:
                both = float(weight[i]) * float(weight[j])
                pairs += both
                won += both * (1.0 if prediction[i] > prediction[j] else 0.5 if prediction[i] == prediction[j] else 0.0)
    return won / pairs if pairs else np.nan


@settings(max_examples=examples(80), deadline=None)
@given(st.integers(1, 60), st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40))
def test_xauc_is_a_loop_over_pairs_also_without_each_bucket(count: int, seed: int, labels: int, predictions: int):
    rng = np.random.default_rng(seed)
    label, prediction = (rng.integers(-values, values, count).astype(np.float32) for values in (labels, predictions))
    weight = rng.uniform(0.2, 3, count) * (rng.random(count) < 0.9)
    bucket = rng.integers(0, K, count).astype(np.int16)
    value, left_out = xauc(prediction, label, weight, bucket, K)
    assert value == pytest.approx(xauc_by_pairs(prediction, label, weight), rel=1e-9, nan_ok=True)
    rests = []
    for b in range(K):
        rest = xauc_by_pairs(*(x[bucket != b] for x in (prediction, label, weight)))
        rests.append(rest if (weight[bucket == b] > 0).any() else None)
    expected = [
        np.nan if rest is None or np.isnan([x for x in rests if x is not None]).any() else rest for rest in rests
    ]
    assert left_out == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_xauc_is_torchrecs_where_nothing_is_tied_and_auc_where_labels_have_two_values():
    rng = np.random.default_rng(3)
    prediction, label = (rng.permutation(700).astype(np.float64) for _ in range(2))
    weight = rng.uniform(0.2, 3, 700)
    tensors = [torch.from_numpy(x).unsqueeze(0) for x in (label, prediction, weight)]
    theirs = float(compute_error_sum(*tensors) / compute_weighted_num_pairs(tensors[2]))
    assert xauc(prediction, label, weight, np.zeros(700, np.int64), 1)[0] == pytest.approx(theirs, rel=1e-12)
    logit, click, weight, _, bucket = rows(700, 4)
    keep = weight > 0
    auc = roc_auc_score(click[keep], logit[keep], sample_weight=weight[keep])
    assert xauc(logit, click, weight, bucket, K)[0] == pytest.approx(auc, rel=1e-12)


def test_xauc_of_constant_labels_or_of_a_prediction_that_is_not_finite_is_undefined():
    zeros = np.zeros(4, np.int64)
    assert np.isnan(xauc(np.arange(4.0), np.ones(4), np.ones(4), zeros, 2)[0])
    value, left_out = xauc(np.array([0, 1, 2, np.inf]), np.arange(4.0), np.ones(4), zeros, 2)
    assert np.isnan(value)
    assert np.isnan(left_out).all()
    assert xauc(np.array([0, 1, 2, np.inf]), np.arange(4.0), np.array([1, 1, 1, 0]), zeros, 2)[0] == 1
