"""Combinations of gradients found from their products, against brute force and the papers' conditions in float64."""

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from references import weightings as paper

from pipeline.training.optim.weighting.aligned import AlignedLoss, balance
from pipeline.training.optim.weighting.cagrad import CAGradLoss, conflict_averse
from pipeline.training.optim.weighting.fairgrad import RIDGE, FairGradLoss, fair
from pipeline.training.optim.weighting.mgda import MGDALoss, shortest

# Shapes: T tasks, P parameters.


@st.composite
def gradients(draw, most_tasks: int = 5) -> np.ndarray:
    """gradient_TP of unlike norms, more tasks than parameters now and then, some equal or opposite."""
    tasks, size = draw(st.integers(1, most_tasks)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    gradient_TP = rng.normal(size=(tasks, size)) * rng.choice([0.2, 1.0, 5.0], size=(tasks, 1))
    if tasks > 1 and draw(st.integers(0, 4)) == 0:
        gradient_TP[1] = draw(st.sampled_from([1.0, -1.0, 3.0, -0.5])) * gradient_TP[0]
    return gradient_TP


def independent(gradient_TP: np.ndarray) -> bool:
    tasks, size = gradient_TP.shape
    return tasks <= size and np.linalg.cond(gradient_TP / np.linalg.norm(gradient_TP, axis=1, keepdims=True)) < 10


# MGDA


@settings(max_examples=examples(150), deadline=None)
@given(gradients())
def test_the_shortest_combination_is_the_best_of_all_subsets(gradient_TP):
    weight_T = shortest(gradient_TP @ gradient_TP.T)
    assert (weight_T >= 0).all()
    assert weight_T.sum() == pytest.approx(1)
    scale = np.abs(gradient_TP).max()
    wanted = paper.norm(paper.shortest(gradient_TP.tolist()))
    assert np.linalg.norm(weight_T @ gradient_TP) == pytest.approx(wanted, rel=1e-7, abs=1e-5 * scale)


@settings(max_examples=examples(50), deadline=None)
@given(gradients(most_tasks=20))
def test_no_task_becomes_worse_along_the_shortest_combination(gradient_TP):
    shortest_P = shortest(gradient_TP @ gradient_TP.T) @ gradient_TP
    scale = (gradient_TP**2).sum(1).max()
    assert (gradient_TP @ shortest_P >= shortest_P @ shortest_P - 1e-9 * scale).all()


def test_mgda_of_equal_gradients_is_the_plain_sum():
    assert MGDALoss([1.0] * 3).shares(np.ones((3, 3))).sum() == pytest.approx(3)


# CAGrad


@settings(max_examples=examples(150), deadline=None)
@given(gradients(), st.sampled_from([0.1, 0.5, 0.9]))
def test_cagrad_is_optimal_its_direction_is_allowed_and_attains_the_dual_bound(gradient_TP, c):
    """No allowed d has min_t <g_t, d> above <g_w, g0> + c |g0| |g_w|, whatever w: with equality d is a best one."""
    mean_P, tasks = gradient_TP.mean(0), len(gradient_TP)
    radius, scale = c * np.linalg.norm(mean_P), (gradient_TP**2).sum(1).max()
    share_T = conflict_averse(gradient_TP @ gradient_TP.T, c)
    d_P = share_T @ gradient_TP / tasks
    assert np.linalg.norm(d_P - mean_P) <= radius * (1 + 1e-6) + 1e-9
    weight_T = share_T - 1
    if weight_T.sum() > 0:
        g_P = weight_T / weight_T.sum() @ gradient_TP
        assert (weight_T >= -1e-9 * weight_T.sum()).all()
        bound = g_P @ mean_P + radius * np.linalg.norm(g_P)
        assert (gradient_TP @ d_P).min() == pytest.approx(bound, rel=1e-6, abs=1e-6 * scale)


def test_cagrad_of_radius_0_and_of_equal_gradients_is_the_plain_sum_apart_from_its_length():
    rng = np.random.default_rng(0)
    gradient_TP = rng.normal(size=(3, 5))
    assert conflict_averse(gradient_TP @ gradient_TP.T, 0.0).tolist() == [1, 1, 1]
    assert conflict_averse(np.ones((3, 3)), 0.5).sum() == pytest.approx(4.5)  # (1 + c) T g
    assert conflict_averse(np.zeros((3, 3)), 0.5).tolist() == [1, 1, 1]


@settings(max_examples=examples(30), deadline=None)
@given(gradients(most_tasks=3), st.sampled_from([0.2, 0.8]), st.integers(0, 10**6))
def test_no_direction_that_cagrad_may_take_helps_its_worst_task_more(gradient_TP, c, seed):
    mean_P, rng = gradient_TP.mean(0), np.random.default_rng(seed)
    found = (gradient_TP @ (conflict_averse(gradient_TP @ gradient_TP.T, c) @ gradient_TP)).min() / len(gradient_TP)
    for _ in range(200):
        ball_P = rng.normal(size=len(mean_P))
        d_P = mean_P + c * np.linalg.norm(mean_P) * ball_P / np.linalg.norm(ball_P)
        assert (gradient_TP @ d_P).min() <= found + 1e-6 * (gradient_TP**2).sum(1).max()


# Nash-MTL and FairGrad


@settings(max_examples=examples(100), deadline=None)
@given(gradients().filter(independent), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_fair_shares_solve_the_papers_equation(gradient_TP, alpha):
    dot_TT = gradient_TP @ gradient_TP.T
    w_T = fair(dot_TT, alpha)
    assert (w_T > 0).all()
    np.testing.assert_allclose(
        (dot_TT + RIDGE * np.diag(dot_TT.diagonal())) @ w_T, w_T ** (-1 / alpha), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("alpha", [0.5, 10.0])
def test_fair_shares_are_a_solution_at_both_limits_of_alpha_for_gradients_of_unlike_lengths(alpha):
    rng = np.random.default_rng(0)
    for _ in range(40):
        gradient_TP = rng.normal(size=(4, 6)) * 10 ** rng.uniform(-3, 3, size=(4, 1))
        dot_TT = gradient_TP @ gradient_TP.T / (gradient_TP**2).sum(1).mean()
        w_T = fair(dot_TT, alpha)
        found_T = (dot_TT + RIDGE * np.diag(dot_TT.diagonal())) @ w_T * w_T ** (1 / alpha)
        np.testing.assert_allclose(found_T, 1, rtol=1e-2)


@settings(max_examples=examples(8), deadline=None)
@given(gradients(most_tasks=3).filter(independent), st.sampled_from([1.0, 2.0]))
def test_fair_shares_are_those_found_one_after_the_other_by_bisection(gradient_TP, alpha):
    wanted = paper.fair(gradient_TP.tolist(), alpha, RIDGE)
    np.testing.assert_allclose(fair(gradient_TP @ gradient_TP.T, alpha), wanted, rtol=1e-6)


@settings(max_examples=examples(40), deadline=None)
@given(gradients().filter(independent), st.integers(0, 10**6))
def test_the_nash_direction_does_not_depend_on_the_scale_of_a_loss(gradient_TP, seed):
    scale_T1 = 10 ** np.random.default_rng(seed).uniform(-4, 4, size=(len(gradient_TP), 1))
    one, other = (fair(g @ g.T, 1.0) @ g for g in (gradient_TP, scale_T1 * gradient_TP))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_gradients_that_cancel_or_are_missing_have_finite_shares_and_orthogonal_ones_of_one_norm_share_1():
    loss = FairGradLoss([1.0] * 3, 1.0)
    gradient_TP = np.array([[1.0, 0], [-1, 0], [0, 0]])
    share_T = loss.solved(gradient_TP @ gradient_TP.T, np.ones(3))
    assert np.isfinite(share_T).all()
    assert np.abs(share_T @ gradient_TP).max() < 1e-3
    assert loss.shares(9 * np.eye(3)) == pytest.approx([1, 1, 1], rel=1e-5)


# Aligned-MTL


@settings(max_examples=examples(100), deadline=None)
@given(gradients().filter(independent), st.integers(0, 10**6))
def test_aligned_gradients_are_those_of_the_singular_value_decomposition(gradient_TP, seed):
    weight_T = np.random.default_rng(seed).uniform(0.1, 3, size=len(gradient_TP))
    found_P = balance(gradient_TP @ gradient_TP.T) @ weight_T @ gradient_TP
    np.testing.assert_allclose(
        found_P,
        paper.aligned(gradient_TP.tolist(), weight_T.tolist()),
        rtol=1e-6,
        atol=1e-9 * np.abs(gradient_TP).max(),
    )


@settings(max_examples=examples(50), deadline=None)
@given(gradients(most_tasks=4).filter(independent))
def test_aligned_gradients_are_orthogonal_and_equally_long(gradient_TP):
    aligned_TP = balance(gradient_TP @ gradient_TP.T) @ gradient_TP
    product_TT = aligned_TP @ aligned_TP.T
    np.testing.assert_allclose(product_TT, product_TT[0, 0] * np.eye(len(product_TT)), atol=1e-7 * product_TT[0, 0])


def test_directions_that_no_gradient_has_do_not_shorten_the_others():
    assert np.allclose(balance(np.diag([4.0, 0.0, 4.0])), np.diag([1.0, 0.0, 1.0]))
    assert np.allclose(balance(np.diag([4.0, 1e-8, 4.0])), np.diag([1.0, 0.0, 1.0]))  # a product's rounding in float32
    assert not balance(np.zeros((2, 2))).any()


SOLVERS = [MGDALoss, AlignedLoss, lambda w: CAGradLoss(w, 0.5), lambda w: FairGradLoss(w, 2.0)]


@settings(max_examples=examples(30), deadline=None)
@given(gradients(most_tasks=4), st.sampled_from(SOLVERS), st.booleans())
def test_a_task_without_a_gradient_or_without_weight_changes_nothing_for_the_others(gradient_TP, kind, unweighted):
    size = gradient_TP.shape[1]
    more_TP = np.insert(gradient_TP, 1, np.ones(size) * unweighted, 0)
    loss_weights = np.linspace(0.5, 2, len(gradient_TP))
    more_T = np.insert(loss_weights, 1, 0.0 if unweighted else 1.0)
    if kind is AlignedLoss and unweighted:  # it aligns before it weighs
        return
    alone_T = kind(loss_weights).solved(gradient_TP @ gradient_TP.T, loss_weights)
    found_T = kind(more_T).solved(more_TP @ more_TP.T, more_T)
    np.testing.assert_allclose(
        found_T @ more_TP, alone_T @ gradient_TP, rtol=1e-6, atol=1e-6 * np.abs(gradient_TP).max()
    )


def test_a_batch_without_any_gradient_has_the_plain_sum():
    for kind in (MGDALoss, lambda w: CAGradLoss(w, 0.5), lambda w: FairGradLoss(w, 2.0)):
        assert kind([3.0, 0.5]).solved(np.zeros((2, 2)), np.array([3.0, 0.5])).tolist() == [3.0, 0.5]


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_that_are_not_finite_leave_the_plain_sum_for_the_check_of_the_step(kind, bad):
    dot_TT = torch.tensor([[bad, 1.0], [1.0, 2.0]])
    assert kind([3.0, 0.5]).coefficients(dot_TT, 0).tolist() == [3.0, 0.5]


def test_shares_in_float32_become_coefficients_with_the_loss_weights():
    loss = MGDALoss([3.0, 0.5])
    gradient_TP = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    found_T = loss.coefficients(gradient_TP @ gradient_TP.T, 0)
    # The hull of (3, 0) and (0, 1): nearest to 0 at weights .1 and .9, times two tasks.
    torch.testing.assert_close(found_T, torch.tensor([0.2 * 3.0, 1.8 * 0.5]))
