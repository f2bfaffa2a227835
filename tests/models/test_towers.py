"""The shared tower and the calibration of logits; TaskTowers are in test_fusion.py."""

import math

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import check, drawn_sizes, randomised, rows
from references.layers import Towers
from references.loops import Params
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from models.towers import Calibration, SharedTower, TaskTowers

# Shapes: B rows, T tasks, D width, K pieces of a line.
KNOTS = range(-7, 8)
sizes = drawn_sizes(kinds=st.lists(st.sampled_from(["binary", "regression"]), min_size=1, max_size=4))


@settings(max_examples=examples(60), deadline=None)
@given(sizes, st.lists(st.integers(1, 5), max_size=3), st.integers(1, 3))
def test_a_shared_tower_is_one_tower_a_task_with_the_same_parameters(size, widths, outputs):
    module = randomised(SharedTower(size.T, size.D, widths, outputs=outputs), size.seed)
    check(module, Towers(size.T, size.D, widths, shared=True, outputs=outputs), rows(size, size.T, size.D))


@settings(max_examples=examples(40), deadline=None)
@given(sizes, st.data())
def test_but_for_the_biases_a_shared_tower_scores_tasks_in_any_order(size, data):
    order = data.draw(st.permutations(range(size.T)))
    module, h_BTD = randomised(SharedTower(size.T, size.D, [3]), size.seed), rows(size, size.T, size.D)
    module.bias_K1T.data.zero_()
    torch.testing.assert_close(module(h_BTD[:, order]), module(h_BTD)[:, :, order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [TaskTowers, SharedTower])
def test_towers_that_start_at_a_value_give_it_where_nothing_comes_in(kind):
    module, start_KT = kind(4, 3, [5], outputs=2), torch.randn(2, 4)
    module.start_at(start_KT)
    for name, parameter in module.named_parameters():
        if "hidden" in name:
            parameter.data.zero_()
    torch.testing.assert_close(module(torch.zeros(6, 4, 3)), start_KT.unsqueeze(1).expand(2, 6, 4))


def slopes(params: Params, task: int) -> list[Tensor]:
    """log(1 + exp(a + log(e - 1))) of every piece: 1 at a = 0."""
    return [torch.log1p((math.e - 1) * torch.exp(a)) for a in params["steepness_TK"][task]]


def calibration_twin(params: Params, kinds: list[str], logit_BT: Tensor) -> Tensor:
    """From 0, where it is the shift, along the pieces to the logit."""
    outputs = []
    for logit_T in logit_BT:
        mapped = []
        for t, z in enumerate(logit_T):
            total, at = params["shift_T"][t], 0.0
            while kinds[t] == "binary" and at != z:
                piece = sum(at > knot if z < 0 else at >= knot for knot in KNOTS)
                ends = [-math.inf, *KNOTS, math.inf][piece : piece + 2]
                to = max(z, ends[0]) if z < 0 else min(z, ends[1])
                total, at = total + slopes(params, t)[piece] * (to - at), to
            mapped.append(total if kinds[t] == "binary" else z)
        outputs.append(torch.stack(mapped))
    return torch.stack(outputs)


@settings(max_examples=examples(60), deadline=None)
@given(sizes)
def test_calibration_equals_its_reference(size):
    module = randomised(Calibration(size.kinds), size.seed)
    check(module, lambda params, z_BT: calibration_twin(params, size.kinds, z_BT), 5 * rows(size, len(size.kinds)))


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_between_the_outer_knots_calibration_is_numpys_interpolation(size):
    size.kinds = ["binary"] * len(size.kinds)
    module, z_B = randomised(Calibration(size.kinds), size.seed), np.linspace(KNOTS[0], KNOTS[-1], 101)
    found_BT = module(torch.tensor(z_B).unsqueeze(1).expand(-1, len(size.kinds))).detach().numpy()
    for t in range(len(size.kinds)):
        inner = [slope.item() for slope in slopes(dict(module.named_parameters()), t)[1:-1]]
        height_K = np.concatenate([[0.0], np.cumsum(inner)])
        height_K += module.shift_T[t].item() - height_K[KNOTS.index(0)]
        assert found_BT[:, t] == pytest.approx(np.interp(z_B, KNOTS, height_K), rel=1e-10, abs=1e-10)


def test_calibration_starts_as_the_identity():
    z_BT = torch.cat([torch.randn(500, 3) * 4, torch.tensor([[-1e4, 0.0, 1e4], [7.0, -7.0, 3.0]])])
    torch.testing.assert_close(Calibration(["binary"] * 3)(z_BT), z_BT, rtol=1e-6, atol=1e-6)


@settings(max_examples=examples(60), deadline=None)
@given(sizes, st.floats(0.1, 4))
def test_calibration_rises_strictly_whatever_is_learnt(size, scale):
    module = randomised(Calibration(["binary"]), size.seed)
    with torch.no_grad():
        module.steepness_TK *= scale
        rise_B = module(torch.linspace(-30, 30, 1001, dtype=torch.float64).unsqueeze(1)).diff(dim=0)
    assert (rise_B > 0).all()


@settings(max_examples=examples(40), deadline=None)
@given(sizes)
def test_regressions_pass_calibration_unchanged_and_teach_it_nothing(size):
    module, z_BT = randomised(Calibration(size.kinds), size.seed), 5 * rows(size, len(size.kinds))
    y_BT = module(z_BT)
    regression_T = torch.tensor([kind == "regression" for kind in size.kinds])
    assert torch.equal(y_BT[:, regression_T], z_BT[:, regression_T])
    y_BT.square().sum().backward()
    for parameter in module.parameters():
        assert not parameter.grad[regression_T].any()
        assert all(gradient.any() for gradient in parameter.grad[~regression_T])


def test_logits_in_bfloat16_are_calibrated_in_float32():
    module, z_BT = Calibration(["binary", "regression"]), torch.tensor([[1.5, -2.5], [-9.0, 0.25]])
    y_BT = module(z_BT.bfloat16())
    assert y_BT.dtype == torch.float32
    torch.testing.assert_close(y_BT, z_BT)


def entropy(logit_B: Tensor, label_B: Tensor) -> float:
    return F.binary_cross_entropy_with_logits(logit_B, label_B).item()


def test_calibration_mends_logits_that_are_too_steep_shifted_or_bent_and_leaves_the_auc_alone():
    rng = torch.Generator().manual_seed(0)
    true_BT = torch.randn(5000, 3, generator=rng, dtype=torch.float64) * 1.5 - 1
    label_BT = torch.bernoulli(true_BT.sigmoid(), generator=rng)
    bent_B = torch.where(true_BT[:, 2] > 0, 4 * true_BT[:, 2], true_BT[:, 2] / 2)
    wrong_BT = torch.stack([3 * true_BT[:, 0], true_BT[:, 1] / 2 + 2, bent_B], 1)
    module = Calibration(["binary"] * 3).double()
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        (mean := F.binary_cross_entropy_with_logits(module(wrong_BT), label_BT)).backward()
        return mean

    optimizer.step(loss)
    mended_BT = module(wrong_BT).detach()
    for t in range(3):
        best, before = entropy(true_BT[:, t], label_BT[:, t]), entropy(wrong_BT[:, t], label_BT[:, t])
        assert before > 1.05 * best
        assert entropy(mended_BT[:, t], label_BT[:, t]) < 1.002 * best
        assert roc_auc_score(label_BT[:, t], mended_BT[:, t]) == roc_auc_score(label_BT[:, t], wrong_BT[:, t])
