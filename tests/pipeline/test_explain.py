"""Permutation importance against scikit-learn row by row, task affinity against copies that torch's SGD steps."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from dataset_by_hand import SCHEMA, draw_rows, fit_encoders
from sklearn.metrics import log_loss, mean_squared_error
from small_architecture import with_architecture
from torch import Tensor

from features.batch import Batch, Rows
from features.errors import UserError
from models.ranker import ModelConfig, Ranker
from pipeline.evaluation.explain import affinity
from pipeline.evaluation.explain.affinity import affinities
from pipeline.evaluation.explain.explain import permuted_groups
from pipeline.evaluation.explain.importance import Figures, Sample, importances
from pipeline.evaluation.metrics.base import bucket_of
from pipeline.evaluation.metrics.intervals import quantile, standard_error

# Shapes: N rows, B rows of a batch, T tasks, K buckets.
K, ROWS = 20, 1500
SPARSE = list(SCHEMA.sparse)
TABLE = draw_rows(ROWS)
ENCODERS, _ = fit_encoders(TABLE)
CONF = Path(__file__).parents[2] / "jobs" / "conf" / "model"
NEED_MORE = {"emm", "esmm", "escm2"}  # trained models, or tasks that are given others
MODELS = sorted({path.stem for path in CONF.glob("*.yaml")} - NEED_MORE)


def rows_of(click: np.ndarray | None = None, seed: int = 1) -> Rows:
    """Rows with weights, the last 10 of them 0, clusters of about three rows, and labels of click where they are given."""
    rng = np.random.default_rng(seed)
    rows = Rows.decode(ENCODERS.encode(TABLE), SCHEMA)
    weight_N = rng.uniform(0.5, 2, ROWS).astype(np.float32)
    weight_N[-10:] = 0
    hash_N = rng.integers(0, 1 << 32, ROWS // 3)[rng.integers(0, ROWS // 3, ROWS)]
    label_NT = rows.label_NT.clone()
    if click is not None:
        label_NT[:, 0] = torch.from_numpy(click.astype(np.float32))
    keys = torch.from_numpy(np.stack([hash_N, hash_N], 1))
    return replace(rows, label_NT=label_NT, weight_N=torch.from_numpy(weight_N), key_NC=keys)


def price(rows: Rows | Batch) -> Tensor:
    dense = rows.dense_ND if isinstance(rows, Rows) else rows.dense_BD
    return dense[:, SCHEMA.dense_ranges["price"].start]


def score(batch: Batch) -> Tensor:
    """click rests on price and a little on the user, bought on how many tags there are, spent on nothing at all."""
    user_B = batch.sparse["user"].values()
    click_B = 3 * price(batch) + 0.4 * torch.sin(user_B.float())
    bought_B = batch.sparse["tags"].lengths() - 1.5
    return torch.stack([click_B, bought_B, torch.full_like(click_B, 5.0)], 1)


def planted() -> Rows:
    """Labels of click that price decides, up to noise."""
    rows = rows_of()
    noise = np.random.default_rng(2).logistic(size=ROWS)
    return rows_of(3 * price(rows).numpy() + noise > 0)


def figure_by_sklearn(logit: np.ndarray, label: np.ndarray, weight: np.ndarray, kind: str) -> float:
    if kind == "regression":
        mean = np.average(label, weights=weight)
        variance = np.average((label - mean) ** 2, weights=weight)
        return math.sqrt(mean_squared_error(label, logit, sample_weight=weight) / variance)
    rate = np.full(len(label), np.average(label, weights=weight))
    loss = log_loss(label, 1 / (1 + np.exp(-logit)), sample_weight=weight)
    return loss / log_loss(label, rate, sample_weight=weight)


def figures_by_sklearn(rows: Rows, logit_NT: np.ndarray) -> Figures:
    bucket_N = bucket_of((rows.key_NC[:, 0].numpy()).astype(np.uint32), K)
    value_T, left_out_TK = np.zeros(3), np.full((3, K), np.nan)
    for t, task in enumerate(SCHEMA.tasks.values()):
        label_N, weight_N = rows.label_NT[:, t].double().numpy(), rows.weight_N.double().numpy()
        seen_N = ~np.isnan(label_N) & (weight_N > 0)
        columns = [x[seen_N] for x in (logit_NT[:, t].astype(np.float64), label_N, weight_N)]
        value_T[t] = figure_by_sklearn(*columns, task.kind)
        for k in set(bucket_N[seen_N].tolist()):
            rest_N = bucket_N[seen_N] != k
            left_out_TK[t, k] = figure_by_sklearn(*(x[rest_N] for x in columns), task.kind)
    return Figures(value_T, left_out_TK)


def test_importance_and_its_values_without_each_bucket_are_those_of_sklearn_on_permuted_columns():
    rows = planted()
    sample = Sample(rows, SCHEMA, score, K, batch_size=333)
    before, rises = importances(
        sample, {"price": ["price"], "tags": ["tags"], "city": ["city"]}, permutations=2, seed=7
    )
    generator = torch.Generator().manual_seed(7)
    orders = [torch.randperm(ROWS, generator=generator).numpy() for _ in range(2)]
    user, length = rows.id_NF[:, SPARSE.index("user")].numpy(), rows.length_NG[:, 0].numpy()

    def logits(price_N: np.ndarray, length_N: np.ndarray) -> np.ndarray:
        return np.stack([3 * price_N + 0.4 * np.sin(user.astype(np.float32)), length_N - 1.5, np.full(ROWS, 5.0)], 1)

    plain = figures_by_sklearn(rows, logits(price(rows).numpy(), length))
    assert before.value_T == pytest.approx(plain.value_T, rel=1e-5)
    for name in rises:
        after = [
            figures_by_sklearn(
                rows,
                logits(
                    price(rows).numpy()[order] if name == "price" else price(rows).numpy(),
                    length[order] if name == "tags" else length,
                ),
            )
            for order in orders
        ]
        value_T = np.mean([x.value_T for x in after], 0) - plain.value_T
        left_out_TK = np.mean([x.left_out_TK for x in after], 0) - plain.left_out_TK
        assert rises[name].value_T == pytest.approx(value_T, rel=1e-4, abs=1e-6)
        assert rises[name].left_out_TK == pytest.approx(left_out_TK, rel=1e-4, abs=1e-6, nan_ok=True)


def test_a_feature_that_decides_the_label_is_far_above_0_and_one_that_is_noise_within_its_interval():
    names = permuted_groups(SCHEMA, None, {})
    assert list(names) == list(SCHEMA.features)
    _, rises = importances(Sample(planted(), SCHEMA, score, K, 512), names, permutations=3, seed=0)
    click = {name: rise.value_T[0] for name, rise in rises.items()}
    reach = {name: quantile(0.95, K) * standard_error(rise.left_out_TK)[0] for name, rise in rises.items()}
    assert max(click, key=click.__getitem__) == "price"
    assert click["price"] - reach["price"] > 0.2
    assert 0 < abs(click["user"]) <= reach["user"]
    assert click["tags"] == click["city"] == reach["city"] == 0


def test_the_standard_error_of_noise_is_its_spread_over_samples_and_its_interval_rarely_misses_0():
    plain, draws = rows_of(), 150
    found = np.zeros((2, draws))
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        known_N, noise_N = torch.from_numpy(rng.normal(size=(2, ROWS)).astype(np.float32))
        label_NT, dense_ND = plain.label_NT.clone(), plain.dense_ND.clone()
        label_NT[:, 0] = torch.from_numpy(known_N.numpy() + rng.logistic(size=ROWS) > 0)
        dense_ND[:, SCHEMA.dense_ranges["price"].start] = noise_N
        keys = torch.from_numpy(rng.integers(0, 1 << 32, (ROWS, 2)))
        rows = replace(plain, label_NT=label_NT, dense_ND=dense_ND, key_NC=keys, row_id_N=torch.arange(ROWS))

        def overfitted(batch: Batch, known_N: Tensor = known_N) -> Tensor:
            return (known_N[batch.row_id_B] + 0.5 * price(batch)).unsqueeze(1).expand(-1, 3)

        rise = importances(Sample(rows, SCHEMA, overfitted, K, ROWS), {"price": ["price"]}, 1, draw)[1]["price"]
        found[:, draw] = rise.value_T[0], standard_error(rise.left_out_TK)[0]
    value_D, error_D = found
    assert error_D.mean() == pytest.approx(value_D.std(), rel=0.15)
    assert 0 < (abs(value_D) > quantile(0.95, K) * error_D).mean() < 0.1


@pytest.mark.parametrize("batch_size", [1, 100, ROWS])
def test_values_are_permuted_over_the_whole_sample_whatever_the_batch_size(batch_size: int):
    rows = planted().slice(0, 300)
    one, other = (
        importances(Sample(rows, SCHEMA, score, K, size), {"price": ["price"]}, 2, 3)[1]["price"]
        for size in (batch_size, 300)
    )
    assert one.value_T == pytest.approx(other.value_T, rel=1e-9)


def test_a_groups_features_move_together_and_lists_as_a_whole_and_nothing_else_moves():
    rows = rows_of()
    sample = Sample(rows, SCHEMA, score, K, 100)
    order_N = torch.randperm(ROWS)
    moved = sample.permuted(["tags", "user", "price"], order_N)
    user, city = SPARSE.index("user"), SPARSE.index("city")
    assert moved.id_NF[:, user].tolist() == rows.id_NF[:, user][order_N].tolist()
    assert moved.id_NF[:, city].tolist() == rows.id_NF[:, city].tolist()
    assert price(moved).tolist() == price(rows)[order_N].tolist()
    before, after = (
        [x.tolist() for x in found.lists()[0].split(found.length_NG[:, 0].tolist())] for found in (rows, moved)
    )
    assert after == [before[i] for i in order_N]
    for name in ("label_NT", "weight_N", "row_id_N", "key_NC"):
        assert torch.equal(getattr(moved, name).nan_to_num(-1.0), getattr(rows, name).nan_to_num(-1.0))
    assert moved.dense_ND.data_ptr() != rows.dense_ND.data_ptr()


def test_what_a_feature_has_does_not_depend_on_which_others_are_permuted():
    sample = Sample(planted(), SCHEMA, score, K, 500)
    alone = importances(sample, {"price": ["price"]}, 2, 3)[1]["price"]
    among = importances(sample, permuted_groups(SCHEMA, ["user", "price"], {"both": ["user", "price"]}), 2, 3)[1]
    assert list(among) == ["user", "price", "both"]
    assert among["price"].value_T.tolist() == alone.value_T.tolist()
    assert among["both"].value_T[0] > among["user"].value_T[0]


def test_rows_of_weight_0_do_not_count_whatever_is_predicted_for_them():
    rows = planted()
    rows = replace(rows, row_id_N=torch.arange(ROWS))
    weightless_N = rows.weight_N == 0

    def broken(batch: Batch) -> Tensor:
        return torch.where(weightless_N[batch.row_id_B].unsqueeze(1), torch.nan, score(batch))

    wanted, _ = importances(Sample(rows, SCHEMA, score, K, 500), {}, 1, 0)
    found, _ = importances(Sample(rows, SCHEMA, broken, K, 500), {}, 1, 0)
    assert weightless_N.any()
    assert np.isfinite(wanted.value_T).all()
    assert found.value_T.tolist() == wanted.value_T.tolist()


def test_a_prediction_that_is_not_finite_leaves_its_task_undefined_and_no_other():
    def broken(batch: Batch) -> Tensor:
        return torch.where(torch.arange(3) == 0, torch.nan, score(batch))

    before, rises = importances(Sample(planted(), SCHEMA, broken, K, 500), {"tags": ["tags"]}, 1, 0)
    assert np.isnan(before.value_T).tolist() == [True, False, False]
    assert np.isnan(rises["tags"].value_T).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("features", "groups", "words"),
    [
        (["pric"], {}, "features: the schema has no feature pric.*price"),
        (None, {"a": ["price", "usr"]}, r"groups\.a: the schema has no feature usr"),
        (None, {"price": ["user"]}, r"groups\.price: a feature has that name"),
    ],
)
def test_features_that_do_not_exist_are_named(features: list[str] | None, groups: dict, words: str):
    with pytest.raises(UserError, match=words):
        permuted_groups(SCHEMA, features, groups)


def ranker() -> Ranker:
    config = ModelConfig(fusion={"name": "shared_bottom", "widths": [16, 8]}, tower=[4], embedding_std=0.5)
    return Ranker(SCHEMA, ENCODERS, config, device="cpu").eval()


def batches(count: int, rows: Rows, size: int = 200) -> list[Batch]:
    return [rows.slice(at, at + size).batch(SCHEMA, size) for at in range(0, count * size, size)]


def losses_by_row(model: Ranker, batch: Batch) -> list[Tensor]:
    """Each task's mean loss from the model's outputs, by torch's own losses."""
    out_BT = model.outputs(batch)[0]
    found = []
    for t, (name, task) in enumerate(SCHEMA.tasks.items()):
        seen_B = batch.observed_BT[:, t]
        label_B, weight_B = batch.label_BT[seen_B, t], batch.weight_BT[seen_B, t]
        if task.kind == "binary":
            row_B = torch.nn.functional.binary_cross_entropy_with_logits(out_BT[seen_B, t], label_B, reduction="none")
        else:
            scale = ENCODERS.labels[name]
            row_B = (out_BT[seen_B, t] - (label_B - scale.mean) / scale.std) ** 2
        found.append((row_B.double() * weight_B.double()).sum() / weight_B.double().sum())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_affinity_is_what_a_step_of_sgd_on_a_copy_does_and_leaves_the_model_as_it_was(name: str):
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("defaults", "interaction")}
    settings = with_architecture(settings, list(SCHEMA.tasks))
    model = Ranker(SCHEMA, ENCODERS, ModelConfig(**settings), device="cpu").eval()
    weights = copy.deepcopy(model.state_dict())
    some = batches(2, rows_of())
    z_TT, error_TT = affinities(model, some, dense_rate=0.01, table_rate=0.1)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module.sparse for module in model.modules() if isinstance(module, torch.nn.EmbeddingBag))
    assert all(p.grad is None for p in model.parameters())
    own = ("calibration.",) if name == "autotask" else ("calibration.", "towers.")  # it has one tower for all tasks
    z_MTT = np.zeros((2, 3, 3))
    for m, batch in enumerate(some):
        before = [float(loss.detach()) for loss in losses_by_row(model, batch)]
        for i in range(3):
            other = copy.deepcopy(model)
            named = dict(other.named_parameters())
            tables = [p for name, p in named.items() if name.startswith("embeddings.")]
            dense = [p for name, p in named.items() if not name.startswith(("embeddings.", *own))]
            losses_by_row(other, batch)[i].backward()
            torch.optim.SGD([{"params": tables, "lr": 0.1}, {"params": dense, "lr": 0.01}]).step()
            for j, loss in enumerate(losses_by_row(other, batch)):
                z_MTT[m, i, j] = 1 - float(loss.detach()) / before[j]
    assert z_TT == pytest.approx(z_MTT.mean(0), rel=1e-4, abs=1e-8)
    assert error_TT == pytest.approx(z_MTT.std(0, ddof=1) / math.sqrt(2), rel=1e-4, abs=1e-8)
    assert (np.diag(z_TT) > 0).all()


def with_labels(rows: Rows, opposed: bool) -> Rows:
    """bought is click, or its opposite."""
    label_NT = rows.label_NT.clone()
    label_NT[:, 1] = 1 - label_NT[:, 0] if opposed else label_NT[:, 0]
    return replace(rows, label_NT=label_NT)


@pytest.mark.parametrize("opposed", [False, True])
def test_tasks_of_the_same_labels_help_each_other_and_opposed_ones_harm(opposed: bool):
    model = ranker()
    with torch.no_grad():  # equal towers: what a step on the shared part does is then a matter of the labels alone
        for parameter in model.towers.parameters():
            parameter[1] = parameter[0]
    z_TT, error_TT = affinities(model, batches(5, with_labels(planted(), opposed)), 0.01, 0.1)
    assert z_TT[0, 0] > 0
    assert z_TT[1, 1] > 0
    for i, j in ((0, 1), (1, 0)):
        assert (z_TT[i, j] < 0) == opposed
        assert abs(z_TT[i, j]) > 2 * error_TT[i, j]
    if not opposed:
        assert z_TT[0, 1] == pytest.approx(z_TT[0, 0], rel=1e-6)


def test_a_task_without_rows_has_no_affinity_and_one_batch_no_error():
    rows = rows_of()
    label_NT = rows.label_NT.clone()
    label_NT[:, 1] = torch.nan
    z_TT, error_TT = affinities(ranker(), batches(1, replace(rows, label_NT=label_NT)), 0.01, 0.1)
    assert np.isnan(z_TT).tolist() == [[False, True, False], [True] * 3, [False, True, False]]
    assert np.isnan(error_TT).all()


def test_a_batch_whose_loss_of_a_task_is_0_does_not_count_for_it(monkeypatch: pytest.MonkeyPatch):
    some = batches(2, rows_of())
    wanted, _ = affinities(model := ranker(), some[1:], 0.01, 0.1)
    losses, calls = affinity._losses, []

    def with_a_zero(*given: object) -> Tensor:
        calls.append(1)
        return losses(*given) * torch.tensor([1.0, 1.0, float(len(calls) > 1)], dtype=torch.float64)

    monkeypatch.setattr(affinity, "_losses", with_a_zero)
    z_TT, _ = affinities(model, some, 0.01, 0.1)
    assert z_TT[:2, 2] == pytest.approx(wanted[:2, 2], rel=1e-6)
