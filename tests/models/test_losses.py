"""TaskLoss and the losses of rows against the formulas in float64 loops, and where it must be exactly zero or stay finite."""

import math

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from features.schema.task import Task
from models.label_units import LabelUnits
from models.losses import TaskLoss, UncertaintyLoss
from models.row_losses import GivenConfig, RowLosses

# Shapes: B rows, T tasks.
KINDS = ["binary", "regression"]
ROUNDING = 2e-5  # of (1 - y) z, as float32 computes it for |z| up to 100
finite = {"allow_nan": False, "allow_infinity": False, "width": 32}
seeds = st.integers(0, 10**6)


def row_losses(kinds: list[str], logit_BT: Tensor, label_BT: Tensor) -> Tensor:
    """Of plain tasks, whose labels are learnt as they are."""
    tasks = {f"task{t}": Task(kind=kind, label="x") for t, kind in enumerate(kinds)}
    losses = RowLosses(tasks, LabelUnits(tasks, {}), GivenConfig())
    loss_BT, shown_BT = losses(logit_BT.unsqueeze(0), label_BT, torch.ones_like(label_BT, dtype=torch.bool))
    assert shown_BT is loss_BT
    return loss_BT


def entry(kind: str, logit: float, label: float) -> float:
    """The loss of one row and task: -y log s(z) - (1 - y) log(1 - s(z)), or (z - y)^2."""
    if kind == "regression":
        return (logit - label) ** 2
    minus_log_p = max(-logit, 0) + math.log1p(math.exp(-abs(logit)))
    minus_log_q = max(logit, 0) + math.log1p(math.exp(-abs(logit)))
    return label * minus_log_p + (1 - label) * minus_log_q


def slope(kind: str, logit: float, label: float) -> float:
    """Its derivative with respect to the logit."""
    if kind == "regression":
        return 2 * (logit - label)
    return (1 / (1 + math.exp(-logit)) if logit > -700 else 0.0) - label


def drawn(kinds: list[str], rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels (soft for binary tasks) and mass, which is 0 for about a third of the entries."""
    rng = torch.Generator().manual_seed(seed)
    logit_BT = 4 * torch.randn(rows, len(kinds), generator=rng)
    label_BT = torch.rand(rows, len(kinds), generator=rng)
    regression_T = torch.tensor([kind == "regression" for kind in kinds])
    label_BT = torch.where(regression_T, 20 * label_BT - 10, label_BT)
    observed_BT = torch.rand(rows, len(kinds), generator=rng) < 0.66
    observed_weight_BT = 3 * torch.rand(rows, len(kinds), generator=rng) * observed_BT
    return logit_BT, label_BT, observed_weight_BT


def loop(kinds: list[str], weights: list[float], drawn: tuple[Tensor, ...], total: list[float]) -> tuple[float, Tensor]:
    """The total loss and its gradient, one entry at a time; tasks without mass are passed over."""
    logit_BT, label_BT, observed_weight_BT = (x.tolist() for x in drawn)
    loss, gradient_BT = 0.0, torch.zeros(drawn[0].shape, dtype=torch.float64)
    for b in range(len(logit_BT)):
        for t, kind in enumerate(kinds):
            if total[t] > 0:
                factor = weights[t] * observed_weight_BT[b][t] / total[t]
                loss += factor * entry(kind, logit_BT[b][t], label_BT[b][t])
                gradient_BT[b, t] = factor * slope(kind, logit_BT[b][t], label_BT[b][t])
    return loss, gradient_BT


@settings(max_examples=examples(200), deadline=None)
@given(st.floats(-100, 100, **finite), st.floats(0, 1, **finite))
def test_binary_loss_takes_soft_labels_and_equals_the_formula(logit, label):
    loss_BT = row_losses(["binary"], torch.tensor([[logit]]), torch.tensor([[label]]))
    assert_close(loss_BT.item(), entry("binary", logit, label), rtol=1e-5, atol=ROUNDING)


@settings(max_examples=examples(100), deadline=None)
@given(st.floats(-1000, 1000, **finite), st.floats(-1000, 1000, **finite))
def test_regression_loss_is_the_squared_error(logit, label):
    loss_BT = row_losses(["regression"], torch.tensor([[logit]]), torch.tensor([[label]]))
    # float32 rounds the difference once and its square once.
    assert_close(loss_BT.item(), entry("regression", logit, label), rtol=1e-6, atol=1e-30)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.integers(1, 6), st.data(), seeds)
def test_loss_and_gradient_equal_a_loop_for_any_mixture_of_tasks(kinds, rows, data, seed):
    weights = [data.draw(st.sampled_from([0.0, 0.25, 1.0, 3.0])) for _ in kinds]
    elsewhere = torch.tensor([data.draw(st.sampled_from([0.0, 5.0])) for _ in kinds])
    logit_BT, label_BT, observed_weight_BT = drawn(kinds, rows, seed)
    total_T = observed_weight_BT.sum(0) + elsewhere
    module = TaskLoss(weights)

    loss_BT = row_losses(kinds, logit_BT.requires_grad_(), label_BT)
    assert loss_BT.dtype == torch.float32
    loss = module(loss_BT, observed_weight_BT, total_T)
    loss.backward()

    for b in range(rows):
        for t, kind in enumerate(kinds):
            real = loss_BT[b, t].item()
            assert_close(real, entry(kind, logit_BT[b, t].item(), label_BT[b, t].item()), rtol=1e-5, atol=ROUNDING)
    expected, gradient_BT = loop(kinds, weights, (logit_BT, label_BT, observed_weight_BT), total_T.tolist())
    assert loss.shape == ()
    assert_close(loss.item(), expected, rtol=1e-5, atol=ROUNDING)
    assert_close(logit_BT.grad.double(), gradient_BT, rtol=1e-5, atol=ROUNDING)
    assert (logit_BT.grad[observed_weight_BT == 0] == 0).all()


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.integers(1, 6), st.data(), seeds)
def test_uncertainty_loss_and_all_its_gradients_equal_the_formula_task_by_task(kinds, rows, data, seed):
    """exp(-s) L + s / 2 for a binary task, exp(-s) L / 2 + s / 2 for a regression, nothing for one without mass."""
    logit_BT, label_BT, observed_weight_BT = drawn(kinds, rows, seed)
    observed_weight_BT *= torch.tensor([data.draw(st.booleans()) for _ in kinds])
    total_T = observed_weight_BT.sum(0)
    module = UncertaintyLoss(kinds)
    s_T = torch.tensor([data.draw(st.sampled_from([-2.0, 0.0, 0.5, 3.0])) for _ in kinds])
    module.log_variance_T.data.copy_(s_T)
    loss = module(row_losses(kinds, logit_BT.requires_grad_(), label_BT), observed_weight_BT, total_T)
    loss.backward()

    expected, slope_T = 0.0, []
    factor_T = [math.exp(-s) * (0.5 if k == "regression" else 1.0) for s, k in zip(s_T.tolist(), kinds, strict=True)]
    for t, s in enumerate(s_T.tolist()):
        only = [float(other == t) for other in range(len(kinds))]
        mean, _ = loop(kinds, only, (logit_BT, label_BT, observed_weight_BT), total_T.tolist())
        expected += factor_T[t] * mean + (s / 2 if total_T[t] > 0 else 0.0)
        slope_T.append(-factor_T[t] * mean + (0.5 if total_T[t] > 0 else 0.0))
    _, gradient_BT = loop(kinds, factor_T, (logit_BT, label_BT, observed_weight_BT), total_T.tolist())
    assert_close(loss.item(), expected, rtol=1e-5, atol=1e-3)
    assert_close(module.log_variance_T.grad.tolist(), slope_T, rtol=1e-5, atol=1e-3)
    assert_close(logit_BT.grad.double(), gradient_BT, rtol=1e-5, atol=20 * ROUNDING)
    assert_close(module.weights().tolist(), factor_T, rtol=1e-6, atol=0.0)


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(2, 8), st.data(), seeds)
def test_losses_of_the_ranks_add_up_to_the_loss_of_the_global_batch(rows, data, seed):
    cut = data.draw(st.integers(0, rows))
    module = TaskLoss([1.0, 0.5])
    logit_BT, label_BT, observed_weight_BT = drawn(KINDS, rows, seed)
    loss_BT, total_T = row_losses(KINDS, logit_BT, label_BT), observed_weight_BT.sum(0)
    parts = module(loss_BT[:cut], observed_weight_BT[:cut], total_T) + module(
        loss_BT[cut:], observed_weight_BT[cut:], total_T
    )
    assert_close(parts, module(loss_BT, observed_weight_BT, total_T), rtol=1e-5, atol=ROUNDING)


@pytest.mark.parametrize("absent", [0, 1])
@pytest.mark.parametrize("weight", [2.0, 1000.0])
def test_a_task_observed_nowhere_adds_exactly_zero_and_has_no_gradient(absent, weight):
    logit_BT, label_BT, observed_weight_BT = drawn(KINDS, 50, 0)
    observed_weight_BT[:, absent] = 0
    module = TaskLoss([weight, weight])
    loss_BT = row_losses(KINDS, logit_BT.requires_grad_(), label_BT)
    loss = module(loss_BT, observed_weight_BT, observed_weight_BT.sum(0))
    loss.backward()
    without = TaskLoss([weight * (task != absent) for task in range(2)])
    assert torch.equal(loss, without(loss_BT, observed_weight_BT, observed_weight_BT.sum(0)))
    assert (logit_BT.grad[:, absent] == 0).all()
    assert logit_BT.grad[:, 1 - absent].any()


def test_an_uncertainty_is_at_rest_where_it_is_what_the_task_shows():
    """sigma^2 of a regression is its mean squared error, of a binary task twice its log loss; then each adds its half."""
    logit_BT, label_BT, observed_weight_BT = drawn(KINDS, 50, 0)
    module = UncertaintyLoss(KINDS)
    loss_BT, total_T = row_losses(KINDS, logit_BT, label_BT), observed_weight_BT.sum(0)
    module.log_variance_T.data.copy_(
        (module.means(loss_BT, observed_weight_BT, total_T) * torch.tensor([2.0, 1.0])).log()
    )
    module(loss_BT, observed_weight_BT, total_T).backward()
    assert_close(module.log_variance_T.grad, torch.zeros(2), rtol=0, atol=1e-6)


def test_a_batch_in_which_nothing_is_observed_has_loss_zero_and_no_gradient():
    logit_BT, label_BT, _ = drawn(KINDS, 5, 0)
    module = TaskLoss([1.0, 1.0])
    loss = module(row_losses(KINDS, logit_BT.requires_grad_(), label_BT), torch.zeros(5, 2), torch.zeros(2))
    loss.backward()
    assert loss.item() == 0
    assert (logit_BT.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit", [-100.0, 100.0])
@pytest.mark.parametrize("label", [0.0, 0.5, 1.0])
def test_extreme_logits_give_finite_losses_and_gradients(logit, label, dtype):
    logit_BT = torch.full((3, 2), logit, dtype=dtype, requires_grad=True)
    label_BT, observed_weight_BT = torch.full((3, 2), label), torch.tensor([[1.0], [0.0], [2.0]]).expand(3, 2)
    module = TaskLoss([1.0, 1.0])
    loss_BT = row_losses(KINDS, logit_BT, label_BT)
    assert loss_BT.dtype == torch.float32
    module(loss_BT, observed_weight_BT, observed_weight_BT.sum(0)).backward()
    for t, kind in enumerate(KINDS):
        assert_close(
            loss_BT[:, t].double(), torch.full((3,), entry(kind, logit, label)).double(), rtol=1e-5, atol=ROUNDING
        )
    assert logit_BT.grad.isfinite().all()
    assert (logit_BT.grad[1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_bfloat16_logits_are_computed_in_float32(kind):
    loss_BT = row_losses([kind], torch.tensor([[1.5]], dtype=torch.bfloat16), torch.tensor([[0.3]]))
    assert_close(loss_BT.item(), entry(kind, 1.5, 0.3), rtol=1e-6, atol=0.0)
