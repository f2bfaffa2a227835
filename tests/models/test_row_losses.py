"""Losses of rows against the papers' formulas in float64, one row and task at a time, and the units of outputs."""

import math
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from features.batch import Batch
from features.fit.label_scale import LabelScale
from features.schema.task import Task
from models.label_units import LabelUnits
from models.row_losses import GivenConfig, RowLosses

# Shapes: B rows, T tasks, K numbers a task.
SCALE = LabelScale(mean=4.4, std=1.7, positive=0.03)
seeds = st.integers(0, 10**6)


def regression(loss: Any = "squared", **more: Any) -> Task:
    return Task(kind="regression", label="x", loss=loss, **more)


def binary(given: str | None = None) -> Task:
    return Task(kind="binary", label="x", given=given)


def of_one(task: Task, out: list[float], label: float, scale: LabelScale = SCALE) -> float:
    """The loss of one row of one task."""
    units = LabelUnits({"task": task}, {"task": scale}).double()
    losses = RowLosses({"task": task}, units, GivenConfig()).double()
    out_K11 = torch.tensor(out, dtype=torch.float64).view(-1, 1, 1)
    return float(losses(out_K11, torch.tensor([[label]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool))[0])


def prediction(task: Task, out: list[float], scale: LabelScale = SCALE) -> float:
    units = LabelUnits({"task": task}, {"task": scale}).double()
    return float(units(torch.tensor(out, dtype=torch.float64).view(-1, 1, 1)))


numbers = st.floats(-20, 20)


@settings(max_examples=examples(100), deadline=None)
@given(numbers, numbers, st.floats(0.1, 5), st.floats(0.05, 0.95))
def test_regression_losses_are_their_formulas_on_standardised_labels(out, label, delta, q):
    error = out - (label - 4.4) / 1.7
    assert of_one(regression(), [out], label) == pytest.approx(error**2, rel=1e-5, abs=1e-6)
    huber = error**2 if abs(error) <= delta else 2 * delta * abs(error) - delta**2
    assert of_one(regression({"name": "huber", "delta": delta}), [out], label) == pytest.approx(
        huber, rel=1e-5, abs=1e-6
    )
    pinball = q * -error if error < 0 else (1 - q) * error
    assert of_one(regression({"name": "quantile", "q": q}), [out], label) == pytest.approx(pinball, rel=1e-5, abs=1e-6)


@settings(max_examples=examples(100), deadline=None)
@given(
    st.floats(-6, 6), st.floats(-3, 3), st.floats(-3, 3), st.one_of(st.just(0.0), st.just(-2.0), st.floats(1e-3, 1e4))
)
def test_the_zero_inflated_lognormal_loss_is_the_density_of_scipy_up_to_constants(p, mean, spread, label):
    chance = 1 / (1 + math.exp(-p))
    sigma = max(math.log1p(math.exp(spread)), 1e-3)
    found = of_one(regression("ziln"), [p, mean, spread], label)
    if label <= 0:
        assert found == pytest.approx(-math.log(1 - chance), rel=1e-6)
        return
    density = stats.lognorm.logpdf(label, s=1.7 * sigma, scale=math.exp(4.4 + 1.7 * mean))
    constants = math.log(label) + math.log(1.7) + math.log(2 * math.pi) / 2
    assert found == pytest.approx(-math.log(chance) - density - constants, rel=1e-5, abs=1e-5)


@settings(max_examples=examples(60), deadline=None)
@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(-2, 1))
def test_predictions_are_in_the_unit_of_the_label(out, mean, spread):
    assert prediction(binary(), [out]) == pytest.approx(out)
    assert prediction(regression(), [out]) == pytest.approx(4.4 + 1.7 * out, rel=1e-6, abs=1e-6)
    assert prediction(regression(transform="log1p"), [out]) == pytest.approx(math.exp(4.4 + 1.7 * out) - 1, rel=1e-5)
    lognormal = stats.lognorm(s=1.7 * math.log1p(math.exp(spread)), scale=math.exp(4.4 + 1.7 * mean))
    expected = lognormal.mean() / (1 + math.exp(-out))
    assert prediction(regression("ziln"), [out, mean, spread]) == pytest.approx(expected, rel=1e-5)


def test_a_label_of_0_gives_a_lognormal_finite_gradients_and_none_to_its_mean_and_spread():
    units = LabelUnits({"task": regression("ziln")}, {"task": SCALE})
    out_KBT = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1).requires_grad_()
    losses = RowLosses({"task": regression("ziln")}, units, GivenConfig())
    losses(out_KBT, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))[0].sum().backward()
    assert out_KBT.grad.flatten().tolist() == [pytest.approx(sigmoid(0.5)), 0.0, 0.0]


def test_losses_and_predictions_of_half_precision_are_computed_in_float32():
    tasks = {"click": binary(), "dwell": regression(), "spend": regression("ziln")}
    units = LabelUnits(tasks, {"dwell": LabelScale(7000.0, 300.0), "spend": SCALE})
    losses, out_KBT = RowLosses(tasks, units, GivenConfig()), torch.randn(3, 20, 3).bfloat16()
    label_BT, observed_BT = torch.rand(20, 3), torch.ones(20, 3, dtype=torch.bool)
    for half, single in (
        (losses(out_KBT, label_BT, observed_BT)[0], losses(out_KBT.float(), label_BT, observed_BT)[0]),
        (units(out_KBT), units(out_KBT.float())),
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, single)


def test_no_loss_is_infinite_at_the_ends_of_a_scale():
    assert math.isfinite(of_one(regression(transform="log1p"), [0.0], -1.0))  # a teacher's prediction may be exactly -1
    at_floor = of_one(regression("ziln"), [0.0, 0.0, -1000.0], math.exp(6.1))
    assert at_floor == pytest.approx(math.log(2) + 1e6 / 2 + math.log(1e-3), rel=1e-4)


def test_no_prediction_is_infinite():
    for task, out in ((regression(transform="log1p"), [1e6]), (regression("ziln"), [9.0, 1e6, 1e6])):
        units = LabelUnits({"task": task}, {"task": SCALE})
        assert units(torch.tensor(out).view(-1, 1, 1)).isfinite().all()


def test_at_the_start_each_task_answers_with_what_its_train_labels_say():
    tasks = {
        "click": binary(),
        "dwell": regression(),
        "time": regression(transform="log1p"),
        "spend": regression("ziln"),
    }
    scales = {"dwell": SCALE, "time": LabelScale(2.0, 0.5), "spend": SCALE}
    units = LabelUnits(tasks, scales)
    start_KT = units.start({"click": 0.02})
    click, dwell, time, spend = units(start_KT.unsqueeze(1))[0].tolist()
    assert 1 / (1 + math.exp(-click)) == pytest.approx(0.02)
    assert dwell == pytest.approx(4.4)
    assert time == pytest.approx(math.exp(2.0) - 1)
    assert spend == pytest.approx(0.03 * math.exp(4.4 + 1.7**2 / 2), rel=1e-5)


# click -> cart -> buy, beside another task and a regression.
CHAIN = {"cart": binary("click"), "other": binary(), "click": binary(), "buy": binary("cart"), "dwell": regression()}
ABOVE = {"cart": ["click"], "buy": ["cart", "click"]}


def test_only_tasks_that_are_given_others_have_an_imputed_loss():
    assert LabelUnits(CHAIN, {}, frozenset(ABOVE)).sizes == [2, 1, 1, 2, 1]
    assert LabelUnits({"spend": regression("ziln")} | CHAIN, {}).sizes == [3, 1, 1, 1, 1, 1]


def chain_losses(name: str, **more: float) -> RowLosses:
    imputed = frozenset(ABOVE if name == "dr" else ())
    units = LabelUnits(CHAIN, {"dwell": SCALE}, imputed)
    return RowLosses(CHAIN, units, GivenConfig(name=name, **more)).double()


def drawn(seed: int, rows: int = 7) -> tuple[Tensor, Batch]:
    """Outputs, and a batch whose conversions are observed given what comes before, some of them nowhere."""
    rng = torch.Generator().manual_seed(seed)
    label_BT = (torch.rand(rows, 5, generator=rng) < 0.5).float()
    observed_BT = torch.rand(rows, 5, generator=rng) < 0.8
    names = list(CHAIN)
    for task, above in ABOVE.items():
        for other in above:
            column = names.index(other)
            observed_BT[:, names.index(task)] &= observed_BT[:, column] & (label_BT[:, column] == 1)
    batch = Batch(
        sparse=None, dense_BD=torch.zeros(rows, 1), label_BT=torch.where(observed_BT, label_BT, 0.0),
        observed_BT=observed_BT, weight_BT=torch.ones(rows, 5), row_id_B=torch.arange(rows),
    )  # type: ignore[arg-type]  # fmt: skip
    return 2 * torch.randn(2, rows, 5, generator=rng, dtype=torch.float64), batch


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def loop(name: str, out_KBT: Tensor, batch: Batch, weight: float, floor: float) -> tuple[list, list, list]:
    """Loss, part shown and whether it counts, of every row and task of a chain, from the papers."""
    names, found, shown, counts = list(CHAIN), [], [], []
    for b in range(len(batch.label_BT)):
        of_row, shown_row, counts_row = [], [], []
        for t, task in enumerate(names):
            z, y = float(out_KBT[0, b, t]), float(batch.label_BT[b, t])
            p, own = sigmoid(z), bool(batch.observed_BT[b, t])
            if task not in ABOVE:
                loss = (z - (y - 4.4) / 1.7) ** 2 if task == "dwell" else -(y * math.log(p) + (1 - y) * math.log(1 - p))
                of_row, shown_row, counts_row = [*of_row, loss], [*shown_row, loss], [*counts_row, own]
                continue
            above = [names.index(other) for other in ABOVE[task]]
            known = [bool(batch.observed_BT[b, a]) for a in above]
            values = [float(batch.label_BT[b, a]) for a in above]
            refuted = any(k and v == 0 for k, v in zip(known, values, strict=True)) or (own and y == 0)
            counts_row.append(refuted or (all(known) and own))
            before = math.prod(sigmoid(float(out_KBT[0, b, a])) for a in above)
            whole = before * p
            label = 1.0 if counts_row[-1] and not refuted else 0.0
            loss = -math.log(whole) if label else -math.log(1 - whole)
            shown_row.append(loss)
            reached = all(known) and all(v == 1 for v in values) and own
            error, ratio = -(y * math.log(p) + (1 - y) * math.log(1 - p)), reached / max(before, floor)
            if name == "ipw":
                loss += weight * ratio * error
            if name == "dr":
                imputed = math.log1p(math.exp(float(out_KBT[1, b, t])))
                loss += weight * (imputed + ratio * (error - imputed) + ratio * (error - imputed) ** 2)
            of_row.append(loss)
        found, shown, counts = [*found, of_row], [*shown, shown_row], [*counts, counts_row]
    return found, shown, counts


@pytest.mark.parametrize("name", ["esmm", "ipw", "dr"])
@settings(max_examples=examples(40), deadline=None)
@given(seeds)
def test_conversions_are_learnt_over_all_impressions_as_the_papers_say(name, seed):
    out_KBT, batch = drawn(seed)
    losses = chain_losses(name, weight=0.3, min_propensity=0.2)
    found, shown, counts = loop(name, out_KBT, batch, 0.3, 0.2)
    training = losses.training_batch(batch)
    assert training.observed_BT.tolist() == counts
    loss_BT, shown_BT = losses(out_KBT, training.label_BT, training.observed_BT)
    counts_BT = training.observed_BT
    # The buffers of the label's scale were made in float32.
    assert_close(loss_BT[counts_BT], torch.tensor(found, dtype=torch.float64)[counts_BT], rtol=1e-6, atol=1e-6)
    assert_close(shown_BT[counts_BT], torch.tensor(shown, dtype=torch.float64)[counts_BT], rtol=1e-6, atol=1e-6)


def test_by_default_conversions_are_learnt_where_they_are_observed():
    out_KBT, batch = drawn(0)
    losses = chain_losses("observed")
    assert losses.training_batch(batch) is batch
    loss_BT, _ = losses(out_KBT, batch.label_BT, batch.observed_BT)
    plain_BT = torch.nn.functional.binary_cross_entropy_with_logits(
        out_KBT[0], batch.label_BT.double(), reduction="none"
    )
    assert_close(loss_BT[:, :4], plain_BT[:, :4])


def test_the_propensity_gets_no_gradient_from_what_it_weighs():
    out_KBT, batch = drawn(3, 50)
    out_KBT.requires_grad_()
    gradients = []
    for weight in (0.0, 5.0):
        losses = chain_losses("ipw", weight=weight)
        training = losses.training_batch(batch)
        loss_BT, _ = losses(out_KBT, training.label_BT, training.observed_BT)
        gradients.append(torch.autograd.grad((loss_BT * training.observed_BT).sum(), out_KBT)[0])
    names = list(CHAIN)
    assert torch.equal(gradients[0][0, :, names.index("click")], gradients[1][0, :, names.index("click")])
    assert not torch.equal(gradients[0][0, :, names.index("buy")], gradients[1][0, :, names.index("buy")])


def test_the_doubly_robust_form_trains_a_prediction_by_its_own_loss_and_the_imputation_by_its_error():
    out_KBT, batch = drawn(3, 50)
    out_KBT.requires_grad_()
    gradient = {}
    for name in ("ipw", "dr"):
        losses = chain_losses(name, weight=0.3, min_propensity=0.2)
        training = losses.training_batch(batch)
        loss_BT, _ = losses(out_KBT, training.label_BT, training.observed_BT)
        gradient[name] = torch.autograd.grad((loss_BT * training.observed_BT).sum(), out_KBT)[0]
    assert_close(gradient["dr"][0], gradient["ipw"][0])
    out_KBT = out_KBT.detach()
    buy, above, checked = list(CHAIN).index("buy"), [list(CHAIN).index(name) for name in ABOVE["buy"]], set()
    for b in training.observed_BT[:, buy].nonzero().flatten().tolist():
        z, y, w = (float(v) for v in (out_KBT[0, b, buy], batch.label_BT[b, buy], out_KBT[1, b, buy]))
        reached = all(batch.observed_BT[b, a] and batch.label_BT[b, a] == 1 for a in above)
        ratio = reached / max(math.prod(sigmoid(float(out_KBT[0, b, a])) for a in above), 0.2)
        error = -(y * math.log(sigmoid(z)) + (1 - y) * math.log(1 - sigmoid(z)))
        of_imputed = 1 - ratio - 2 * ratio * (error - math.log1p(math.exp(w)))
        assert float(gradient["dr"][1, b, buy]) == pytest.approx(0.3 * of_imputed * sigmoid(w), rel=1e-6)
        checked.add(reached)
    assert checked == {False, True}


@pytest.mark.parametrize("z", [-200.0, -30.0, 30.0, 200.0])
def test_losses_of_products_are_finite_with_finite_gradients_far_from_a_half(z):
    losses = RowLosses(CHAIN, LabelUnits(CHAIN, {}), GivenConfig(name="esmm"))
    out_KBT = torch.full((1, 2, 5), z, requires_grad=True)
    label_BT, observed_BT = torch.tensor([[0.0] * 5, [1.0] * 5]), torch.ones(2, 5, dtype=torch.bool)
    loss_BT, _ = losses(out_KBT, label_BT, observed_BT)
    loss_BT[:, :4].sum().backward()
    assert loss_BT.isfinite().all()
    assert out_KBT.grad.isfinite().all()
