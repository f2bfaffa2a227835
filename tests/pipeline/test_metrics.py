"""Every metric against scikit-learn, torchrec or the formula in plain float64 loops."""

import io
import json
import math
import random
from functools import reduce

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    log_loss,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    roc_auc_score,
)
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.metrics.metrics_config import RecTaskInfo
from torchrec.metrics.ne import NEMetric

from features.errors import UserError
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.metrics.base import Grouping
from pipeline.evaluation.metrics.registry import COLUMNS, METRICS
from pipeline.evaluation.metrics.windowed import WindowedNE
from pipeline.run.headline import HEADLINE, RANKING, headline

# Shapes: B rows, T tasks.
TASKS = [("click", "binary"), ("spend", "regression"), ("like", "binary")]
CLICK = TASKS[:1]
SPEND = TASKS[1:2]
TRAINED = Grouping(train_rates={"click": 0.2, "like": 0.4})


def random_rows(rows: int = 2000, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits with ties, labels of each kind, some not observed, weights of which some are 0."""
    rng = torch.Generator().manual_seed(seed)
    logit_BT = (torch.randn(rows, 3, generator=rng, dtype=torch.float64) * 8).round() / 8
    label_BT = (torch.rand(rows, 3, generator=rng, dtype=torch.float64) < logit_BT.sub(1).sigmoid()).double()
    label_BT[:, 1] = 5 + torch.randn(rows, generator=rng, dtype=torch.float64) + logit_BT[:, 1]
    observed_BT = torch.rand(rows, 3, generator=rng) < 0.7
    weight_BT = torch.rand(rows, 3, generator=rng, dtype=torch.float64) * (torch.rand(rows, 3, generator=rng) < 0.9)
    return logit_BT, label_BT, observed_BT, weight_BT


def computed(tasks: list[tuple[str, str]], *tensors_BT: Tensor) -> dict[str, dict[str, float | int | None]]:
    metrics = Metrics(tasks, TRAINED)
    metrics.update(*tensors_BT)
    return metrics.compute()


def of_one(task: list[tuple[str, str]], logit: list, label: list, weight: list | None = None) -> dict:
    """Metrics of one task from plain lists, all observed."""
    weight_BT = torch.tensor(weight or [1.0] * len(logit), dtype=torch.float64).unsqueeze(1)
    logit_BT, label_BT = (torch.tensor(x, dtype=torch.float64).unsqueeze(1) for x in (logit, label))
    return computed(task, logit_BT, label_BT, torch.ones_like(weight_BT), weight_BT)[task[0][0]]


def counted(t: int, logit_BT: Tensor, label_BT: Tensor, observed_BT: Tensor, weight_BT: Tensor) -> list[np.ndarray]:
    """(logit, label, weight) of the rows of task t that count."""
    keep_B = observed_BT[:, t] & (weight_BT[:, t] > 0)
    return [x_BT[keep_B, t].numpy() for x_BT in (logit_BT, label_BT, weight_BT)]


def assert_same(actual: dict, expected: dict) -> None:
    """Equal to 1e-12, relative or absolute, and None in the same places."""
    assert actual.keys() == expected.keys()
    for task in expected:
        # approx has no None; nothing computed is ever NaN.
        values = [{k: math.nan if v is None else v for k, v in report[task].items()} for report in (actual, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-12, abs=1e-12, nan_ok=True), task


@pytest.mark.parametrize("t", [0, 2])
def test_binary_metrics_are_those_of_sklearn_with_weights(t: int) -> None:
    rows = random_rows()
    ours = computed(TASKS, *rows)[TASKS[t][0]]
    logit, label, weight = counted(t, *rows)
    prediction = 1 / (1 + np.exp(-logit))
    assert ours["log_loss"] == pytest.approx(log_loss(label, prediction, sample_weight=weight), rel=1e-12)
    assert ours["auc"] == pytest.approx(roc_auc_score(label, logit, sample_weight=weight), rel=1e-12)
    base = np.average(label, weights=weight)
    assert ours["base_rate"] == pytest.approx(base, rel=1e-12)
    entropy = -base * math.log(base) - (1 - base) * math.log(1 - base)
    assert ours["ne"] == pytest.approx(log_loss(label, prediction, sample_weight=weight) / entropy, rel=1e-12)
    rate = TRAINED.train_rates[TASKS[t][0]]
    of_train = log_loss(label, np.full(len(label), rate), sample_weight=weight)
    assert ours["ne_train"] == pytest.approx(ours["log_loss"] / of_train, rel=1e-12)
    assert ours["calibration"] == pytest.approx((prediction * weight).sum() / (label * weight).sum(), rel=1e-12)
    assert (ours["rows"], ours["positives"], ours["non_finite"]) == (len(label), label.sum(), 0)
    assert ours["weight_sum"] == pytest.approx(weight.sum(), rel=1e-12)


def test_regression_metrics_are_those_of_sklearn_with_weights() -> None:
    rows = random_rows()
    rows[0][:, 1] += (5 + 0.7 * torch.randn(len(rows[0]), generator=torch.Generator().manual_seed(1))).round(decimals=1)
    rows[1][::3, 1] = rows[0][::3, 1]  # some are equal
    ours = computed(TASKS, *rows)["spend"]
    prediction, label, weight = counted(1, *rows)
    mse = mean_squared_error(label, prediction, sample_weight=weight)
    std = math.sqrt(np.cov(label, aweights=weight, ddof=0))
    expected = {"rows": len(label), "weight_sum": weight.sum(), "non_finite": 0, "mse": mse, "rmse": math.sqrt(mse)}
    expected |= {"nrmse": math.sqrt(mse) / std, "r2": r2_score(label, prediction, sample_weight=weight)}
    expected |= {
        "label_mean": np.average(label, weights=weight),
        "prediction_mean": np.average(prediction, weights=weight),
        "mae": mean_absolute_error(label, prediction, sample_weight=weight),
        "coverage": weight[label <= prediction].sum() / weight.sum(),
        "calibration": (prediction * weight).sum() / (label * weight).sum(),
    }
    assert 0.5 < expected["coverage"] < 0.8
    pair_BB = np.outer(weight, weight) * (label[:, None] > label)
    right_BB = (prediction[:, None] > prediction) + 0.5 * (prediction[:, None] == prediction)
    expected["xauc"] = (pair_BB * right_BB).sum() / pair_BB.sum()
    assert ours == pytest.approx(expected, rel=1e-12)


def test_ne_is_that_of_torchrec() -> None:
    logit_BT, label_BT, observed_BT, weight_BT = random_rows()
    theirs = NEMetric(world_size=1, my_rank=0, batch_size=500, tasks=[RecTaskInfo(name="click")], window_size=2000)
    for rows in torch.arange(2000).split(500):
        weight_B = (observed_BT * weight_BT)[rows, 0]
        theirs.update(
            predictions={"click": logit_BT[rows, 0].sigmoid()},
            labels={"click": label_BT[rows, 0]},
            weights={"click": weight_B},
        )
    expected = float(theirs.compute()["ne-click|lifetime_ne"])
    assert computed(TASKS, logit_BT, label_BT, observed_BT, weight_BT)["click"]["ne"] == pytest.approx(
        expected, rel=1e-10
    )


WEIGHTED_ROWS = st.lists(  # logit, label, weight
    st.tuples(
        st.sampled_from([-1.0, -0.0, 0.0, 0.5, 3.0]),
        st.sampled_from([0.0, 0.25, 1.0]),
        st.sampled_from([0.5, 1.0, 3.0]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=examples(60), deadline=None)
@given(WEIGHTED_ROWS)
def test_auc_is_the_share_of_pairs_in_order_with_ties_counted_half(rows: list[tuple[float, float, float]]) -> None:
    wins = pairs = 0.0
    for logit, label, weight in rows:
        for other_logit, other_label, other_weight in rows:
            pair = weight * label * other_weight * (1 - other_label)
            pairs += pair
            wins += pair * (1.0 if logit > other_logit else 0.5 if logit == other_logit else 0.0)
    auc = of_one(CLICK, *(list(x) for x in zip(*rows, strict=True)))["auc"]
    assert auc == (pytest.approx(wins / pairs, rel=1e-12) if pairs else None)


@pytest.mark.parametrize("t", [0, 2])
def test_pr_auc_is_sklearns_average_precision(t: int) -> None:
    rows = random_rows()
    logit, label, weight = counted(t, *rows)
    expected = average_precision_score(label, logit, sample_weight=weight)
    assert computed(TASKS, *rows)[TASKS[t][0]]["pr_auc"] == pytest.approx(expected, rel=1e-12)


@settings(max_examples=examples(60), deadline=None)
@given(WEIGHTED_ROWS)
def test_pr_auc_is_the_mean_over_positives_of_the_precision_at_their_rank(
    rows: list[tuple[float, float, float]],
) -> None:
    total = gained = 0.0
    for logit, label, weight in rows:
        above = [(y * w, w) for z, y, w in rows if z >= logit]
        precision = sum(positive for positive, _ in above) / sum(w for _, w in above)
        total, gained = total + label * weight, gained + label * weight * precision
    pr_auc = of_one(CLICK, *(list(x) for x in zip(*rows, strict=True)))["pr_auc"]
    assert pr_auc == (pytest.approx(gained / total, rel=1e-12) if total else None)


EVERY_METRIC = [pytest.param(kind, name, id=f"{kind}-{name}") for kind, known in METRICS.items() for name in known]
WITHOUT_WEIGHTS = ("rows", "non_finite", "positives")  # counts: a row twice with half its weight counts twice
OF_KIND = {"binary": "click", "regression": "spend"}


@pytest.mark.parametrize(("kind", "name"), EVERY_METRIC)
def test_a_metric_depends_neither_on_the_order_of_rows_nor_on_shards(kind: str, name: str) -> None:
    rows = random_rows(500)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    shards = [Metrics(TASKS, TRAINED) for _ in range(3)]
    for shard, part in zip(shards, order.split([10, 200, 290]), strict=True):
        for piece in part.split(70):
            shard.update(*(x_BT[piece] for x_BT in rows))
    expected = computed(TASKS, *rows)[OF_KIND[kind]][name]
    assert expected is not None
    for a, b, c in ((0, 1, 2), (2, 0, 1)):
        merged = shards[a].merge(shards[b]).merge(shards[c]).compute()
        assert merged[OF_KIND[kind]][name] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("kind", "name"), [case for case in EVERY_METRIC if "ndcg" not in case.values])
def test_a_row_twice_with_half_its_weight_is_that_row(kind: str, name: str) -> None:
    logit_BT, label_BT, observed_BT, weight_BT = random_rows(300)
    once = computed(TASKS, logit_BT, label_BT, observed_BT, weight_BT)[OF_KIND[kind]][name]
    rows = (logit_BT, label_BT, observed_BT, weight_BT / 2)
    twice = computed(TASKS, *(x_BT.repeat(2, 1) for x_BT in rows))[OF_KIND[kind]][name]
    assert twice == pytest.approx(once * (2 if name in WITHOUT_WEIGHTS else 1), rel=1e-12)


@pytest.mark.parametrize(("kind", "name"), EVERY_METRIC)
def test_a_metric_is_none_or_zero_without_rows_and_json_safe_of_any_prediction(kind: str, name: str) -> None:
    assert Metrics(TASKS).compute()[OF_KIND[kind]][name] in (None, 0)
    for logit in (math.nan, math.inf, -math.inf, 1e308, -1e308):
        rows = random_rows(50)
        rows[0][3:9] = logit
        value = computed(TASKS, *rows)[OF_KIND[kind]][name]
        assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_headline_ranking_and_columns_are_registered_metrics_with_their_direction() -> None:
    assert HEADLINE.keys() == RANKING.keys() == COLUMNS.keys() == METRICS.keys()
    for kind, metrics in METRICS.items():
        assert metrics[HEADLINE[kind]].higher_is_better is False
        assert metrics[RANKING[kind]].higher_is_better is True
        assert all(metrics[name].label for name in COLUMNS[kind])
        assert headline(computed(TASKS, *random_rows(20))[OF_KIND[kind]]) == HEADLINE[kind]
    with pytest.raises(UserError, match=r"none of the metrics ne, nrmse"):
        headline({"mse": 0.5})


def test_auc_knows_predictions_apart_that_no_histogram_and_no_float32_sigmoid_does() -> None:
    logit = [40.0, 40.0 + 1e-12, 40.0 + 2e-12, 40.0 + 3e-12]
    assert of_one(CLICK, logit, [0, 0, 1, 1])["auc"] == 1.0
    assert of_one(CLICK, logit, [1, 0, 1, 0])["auc"] == 0.25


def test_a_soft_label_is_a_positive_and_a_negative_row() -> None:
    soft = of_one(CLICK, [0.5, -1.0, 2.0], [0.25, 0.0, 0.75], [2.0, 1.0, 4.0])
    hard = of_one(CLICK, [0.5, 0.5, -1.0, 2.0, 2.0], [1, 0, 0, 1, 0], [0.5, 1.5, 1.0, 3.0, 1.0])
    hard["ndcg"] = soft["ndcg"]  # of a list of items, which a row is one of
    assert soft | {"rows": 5, "positives": 2.0} == pytest.approx(hard, rel=1e-14)
    assert (soft["rows"], soft["positives"]) == (3, 1.0)


def test_ece_is_the_mean_gap_over_twenty_bins_of_equal_weight() -> None:
    rng = np.random.default_rng(3)
    logit = rng.permutation(np.linspace(-4, 1, 200))
    label = (rng.random(200) < 0.2).astype(float)
    order = np.argsort(logit)
    gap = (1 / (1 + np.exp(-logit)) - label)[order].reshape(20, 10).mean(axis=1)
    assert of_one(CLICK, logit.tolist(), label.tolist())["ece"] == pytest.approx(np.abs(gap).mean(), rel=1e-12)


def test_ece_divides_equal_predictions_over_bins() -> None:
    # One prediction for all: every bin holds the same mixture, whatever the order of the labels.
    assert of_one(CLICK, [0.0] * 30, [1.0] * 3 + [0.0] * 27)["ece"] == pytest.approx(0.4, rel=1e-12)


# Labels on a grid: variances of labels that differ in the last bits would amplify rounding beyond any tolerance.
row = st.tuples(
    st.tuples(*[st.one_of(st.sampled_from([-2.0, 0.0, 1.5]), st.floats(-30, 30))] * 3),
    st.tuples(st.sampled_from([0.0, 1.0]), st.integers(-80, 80).map(lambda i: i / 8), st.sampled_from([0.0, 0.3, 1.0])),
    st.tuples(*[st.booleans()] * 3),
    st.tuples(*[st.one_of(st.just(0.0), st.floats(0.01, 10))] * 3),
    st.integers(0, 3),
)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(row, max_size=40), st.permutations(range(4)), st.randoms(use_true_random=False))
def test_shards_merged_in_any_order_give_the_metrics_of_all_rows(
    rows: list[tuple], merge_order: list[int], rng: random.Random
) -> None:
    def metrics_of(chosen: list[tuple], updates: int) -> Metrics:
        metrics = Metrics(TASKS, TRAINED)
        for u in range(updates):
            part = chosen[u::updates]
            fields = list(zip(*part, strict=True))[:4] or [[]] * 4
            metrics.update(*(torch.tensor(x, dtype=torch.float64).reshape(-1, 3) for x in fields))
        return metrics

    expected = metrics_of(rows, 1).compute()
    shuffled = rng.sample(rows, len(rows))
    shards = [metrics_of([r for r in shuffled if r[4] == shard], 1 + shard) for shard in merge_order]
    alone = [shard.compute() for shard in shards]
    assert_same(reduce(Metrics.merge, shards).compute(), expected)
    assert_same(shards[0].merge(shards[1]).merge(shards[2].merge(shards[3])).compute(), expected)
    assert [shard.compute() for shard in shards] == alone


def test_state_survives_a_file_without_pickle_and_goes_on() -> None:
    rows = random_rows()
    expected = computed(TASKS, *rows)
    first = Metrics(TASKS, TRAINED)
    first.update(*(x_BT[:700] for x_BT in rows))
    state, file = first.state(), io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    second = Metrics(TASKS, TRAINED)
    second.update(*(x_BT[:10] for x_BT in rows))  # is replaced
    second.load(dict(np.load(file, allow_pickle=False)))
    assert second.compute() == first.compute()
    assert second.rows == first.rows == int((rows[2] & (rows[3] > 0))[:700].any(1).sum())
    second.update(*(x_BT[700:] for x_BT in rows))
    assert_same(second.compute(), expected)
    first.update(*(x_BT[700:] for x_BT in rows))
    before = Metrics(TASKS, TRAINED)
    before.load(state)
    assert before.compute() != first.compute() == second.compute()


def test_metrics_of_other_tasks_are_not_merged() -> None:
    with pytest.raises(ValueError, match="cannot merge"):
        Metrics(CLICK).merge(Metrics(SPEND))
    with pytest.raises(ValueError, match="cannot merge"):
        Metrics(CLICK).merge(Metrics(CLICK, TRAINED))


@pytest.mark.parametrize("unseen", ["observed", "weight"])
def test_rows_that_do_not_count_may_hold_nan(unseen: str) -> None:
    logit_BT, label_BT, observed_BT, weight_BT = random_rows()
    expected = computed(TASKS, logit_BT, label_BT, observed_BT, weight_BT)
    out_BT = ~observed_BT if unseen == "observed" else weight_BT == 0
    assert out_BT.any()
    nan = torch.tensor(math.nan, dtype=torch.float64)
    if unseen == "observed":
        weight_BT = weight_BT.where(~out_BT, nan)
    rows = (logit_BT.where(~out_BT, nan), label_BT.where(~out_BT, nan), observed_BT, weight_BT)
    assert computed(TASKS, *rows) == expected


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_neither_ne_nor_auc(label: float) -> None:
    ours = of_one(CLICK, [0.3, -1.0, 0.7], [label] * 3, [0.1, 0.2, 0.7])
    assert ours["ne"] is ours["auc"] is None
    assert ours["pr_auc"] == (1.0 if label else None)
    assert ours["base_rate"] == label
    assert ours["log_loss"] is not None
    assert (ours["calibration"] is None) == (label == 0)


def test_no_rows_give_no_values() -> None:
    never = Metrics(TASKS)
    masked = Metrics(TASKS)
    logit_BT, label_BT, observed_BT, weight_BT = random_rows(10)
    masked.update(logit_BT, label_BT, torch.zeros_like(observed_BT), weight_BT)
    masked.update(logit_BT[:0], label_BT[:0], observed_BT[:0], weight_BT[:0])
    assert never.compute() == masked.compute()
    values = [value for task in never.compute().values() for value in task.values()]
    assert set(values) == {None, 0}
    assert_same(never.merge(masked).compute(), never.compute())


@pytest.mark.parametrize("constant", [0.1, 1e9 + 0.1])
def test_constant_labels_have_no_r2(constant: float) -> None:
    halves = Metrics(SPEND), Metrics(SPEND)
    for rows, half in zip((3, 7), halves, strict=True):
        label_BT = torch.full((rows, 1), constant, dtype=torch.float64)
        half.update(label_BT + 1, label_BT, torch.ones_like(label_BT), torch.rand_like(label_BT))
    ours = halves[0].merge(halves[1]).compute()["spend"]
    assert ours["r2"] is ours["nrmse"] is None
    assert ours["label_mean"] == constant
    assert ours["rmse"] == pytest.approx(1.0, rel=1e-6)


def test_r2_of_labels_far_from_zero_does_not_cancel() -> None:
    rng = torch.Generator().manual_seed(0)
    label_BT = torch.randn(3000, 1, generator=rng, dtype=torch.float64).mul(1024).round() / 1024
    logit_BT = torch.randn(3000, 1, generator=rng, dtype=torch.float64).mul(1024).round() / 1024
    near, far = Metrics(SPEND), Metrics(SPEND)
    ones_BT = torch.ones_like(label_BT)
    for part in torch.arange(3000).split(1000):
        near.update(logit_BT[part], label_BT[part], ones_BT[part], ones_BT[part])
        far.update(logit_BT[part] + 2**31, label_BT[part] + 2**31, ones_BT[part], ones_BT[part])
    assert far.compute()["spend"]["r2"] == pytest.approx(near.compute()["spend"]["r2"], rel=1e-6)


def test_extreme_logits_cost_their_logit() -> None:
    ours = of_one(CLICK, [100.0, -100.0, 100.0, -100.0], [0, 1, 1, 0])
    assert ours["log_loss"] == pytest.approx(50.0, rel=1e-14)
    assert all(math.isfinite(value) for value in ours.values())
    # From 37 on, 1 - sigmoid is 0 in float64; above 20, torch's softplus is linear.
    for logit, label, loss in ((50.0, 1, math.exp(-50)), (20.5, 0, 20.5 + math.log1p(math.exp(-20.5)))):
        assert of_one(CLICK, [logit], [label])["log_loss"] == pytest.approx(loss, rel=1e-12, abs=0)


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.01, 100))
def test_predicting_the_base_rate_has_an_ne_of_one(positives: int, negatives: int, weight: float) -> None:
    rows = positives + negatives
    label, logit = [1.0] * positives + [0.0] * negatives, math.log(positives / negatives)
    ours = of_one(CLICK, [logit] * rows, label, [weight] * rows)
    assert ours["ne"] == pytest.approx(1.0, rel=0, abs=1e-13)
    assert ours["calibration"] == pytest.approx(1.0, rel=0, abs=1e-13)
    assert ours["ece"] == pytest.approx(0.0, abs=1e-13)
    assert ours["auc"] == pytest.approx(0.5, rel=0, abs=1e-13)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_is_counted_and_hides_what_depends_on_it(broken: float) -> None:
    rows = random_rows(100)
    whole = computed(TASKS, *rows)
    row = int((rows[2][:, :2] & (rows[3][:, :2] > 0)).all(1).nonzero()[0])
    rows[0][row, :2] = broken
    ours = computed(TASKS, *rows)
    assert ours["like"] == whole["like"]
    of_predictions = ["ne", "log_loss", "auc", "calibration", "ece", "pr_auc", "ne_train", "gauc", "ndcg"]
    assert ours["click"] == whole["click"] | dict.fromkeys(of_predictions) | {"non_finite": 1}
    hidden = dict.fromkeys(["mse", "rmse", "nrmse", "r2", "mae", "coverage", "calibration", "prediction_mean", "xauc"])
    assert ours["spend"] == whole["spend"] | hidden | {"non_finite": 1}
    json.dumps(ours, allow_nan=False)


@pytest.mark.parametrize(("t", "label"), [(0, 1.5), (0, -0.1), (0, math.nan), (1, math.nan), (1, math.inf)])
def test_a_label_out_of_range_is_named_with_its_task(t: int, label: float) -> None:
    rows = random_rows(100)
    row = int((rows[2][:, t] & (rows[3][:, t] > 0)).nonzero()[0])
    rows[1][row, t] = label
    with pytest.raises(UserError, match=f"task {TASKS[t][0]}: 1 observed rows have a label"):
        computed(TASKS, *rows)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_out_of_range_is_named_with_its_task(weight: float) -> None:
    rows = random_rows(100)
    rows[3][int(rows[2][:, 2].nonzero()[0]), 2] = weight
    with pytest.raises(UserError, match="task like: 1 observed rows have a weight"):
        computed(TASKS, *rows)


def test_tasks_and_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="allowed are binary and regression"):
        Metrics([("click", "multiclass")])
    with pytest.raises(ValueError, match="repeat"):
        Metrics([("click", "binary"), ("click", "regression")])
    logit_BT, label_BT, observed_BT, weight_BT = random_rows(10)
    with pytest.raises(ValueError, match="all must be"):
        Metrics(TASKS).update(logit_BT, label_BT, observed_BT, weight_BT[:, :1])
    with pytest.raises(ValueError, match="all must be"):
        Metrics(CLICK).update(logit_BT, label_BT, observed_BT, weight_BT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_of_any_precision_are_taken_at_their_value(dtype: torch.dtype) -> None:
    logit_BT, *rest = random_rows()
    low_BT = logit_BT.to(dtype).requires_grad_()
    assert computed(TASKS, low_BT, *rest) == computed(TASKS, low_BT.detach().double(), *rest)


def losses(logit_BT: Tensor, label_BT: Tensor) -> Tensor:
    loss_BT = (logit_BT - label_BT).square()
    for t in (0, 2):
        loss_BT[:, t] = binary_cross_entropy_with_logits(logit_BT[:, t], label_BT[:, t], reduction="none")
    return loss_BT


@pytest.mark.parametrize("updates", [2, 3, 8])
def test_a_window_is_the_last_updates(updates: int) -> None:
    window, last = WindowedNE(TASKS, window=3), Metrics(TASKS)
    batches = [random_rows(64, seed) for seed in range(updates)]
    for logit_BT, label_BT, observed_BT, weight_BT in batches:
        out_BT = ~observed_BT | (weight_BT == 0)
        nan = torch.tensor(math.nan, dtype=torch.float64)
        loss_BT = losses(logit_BT, label_BT).where(~out_BT, nan)
        window.update(loss_BT, label_BT.where(~out_BT, nan), observed_BT, weight_BT)
    for batch in batches[-3:]:
        last.update(*batch)
    expected = last.compute()
    assert window.value() == pytest.approx(
        [expected["click"]["ne"], expected["spend"]["mse"], expected["like"]["ne"]], rel=1e-12
    )


def test_windows_of_two_ranks_add_up() -> None:
    logit_BT, *rest = random_rows(200)
    whole, left, right = (WindowedNE(TASKS, window=5) for _ in range(3))
    rows = (losses(logit_BT, rest[0]), *rest)
    whole.update(*rows)
    left.update(*(x_BT[:90] for x_BT in rows))
    right.update(*(x_BT[90:] for x_BT in rows))
    assert left.value(left.sums_T3() + right.sums_T3()) == pytest.approx(whole.value(), rel=1e-12)
    assert left.value() != pytest.approx(whole.value(), rel=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_window_without_rows_or_with_one_class_is_nan(label: float) -> None:
    window = WindowedNE(TASKS, window=2)
    assert all(math.isnan(value) for value in window.value())
    label_BT = torch.full((1001, 3), label)
    weight_BT = torch.rand(1001, 3)
    for _ in range(2):
        window.update(torch.full_like(label_BT, 0.5), label_BT, torch.ones_like(label_BT), weight_BT)
    click, spend, like = window.value()
    assert math.isnan(click)
    assert math.isnan(like)
    assert spend == pytest.approx(0.5, rel=1e-12)
    # As ranks may have added it up.
    assert math.isnan(WindowedNE(CLICK, 1).value(torch.tensor([[0.5, 0.3, 0.3 - 1e-16]], dtype=torch.float64))[0])


def test_a_loss_that_is_not_finite_shows_until_it_leaves_the_window() -> None:
    window = WindowedNE(CLICK, window=2)
    label_BT, ones_BT = torch.tensor([[0.0], [1.0]]), torch.ones(2, 1)
    seen = []
    for loss in (math.nan, 0.5, 0.5):
        window.update(ones_BT * loss, label_BT, ones_BT, ones_BT)
        seen.append(window.value()[0])
    assert [math.isnan(value) for value in seen] == [True, True, False]
