"""Weightings that follow the losses alone, against loops in float64 over the same losses: dwa, famo, stch."""

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from references import weightings as paper
from torch import Tensor

from pipeline.training.optim.weighting.base import AdaptiveLoss
from pipeline.training.optim.weighting.dwa import DWALoss
from pipeline.training.optim.weighting.famo import FAMOLoss
from pipeline.training.optim.weighting.stch import STCHLoss, slopes

pytestmark = pytest.mark.usefixtures("device")

# Shapes: S steps, B rows, T tasks.
seeds = st.integers(0, 10**6)


@st.composite
def histories(draw) -> Tensor:
    """loss_ST: losses of some steps, falling at unlike rates; 0 where a task is not observed."""
    tasks, steps = draw(st.integers(1, 4)), draw(st.integers(1, 14))
    rng = torch.Generator().manual_seed(draw(seeds))
    scale_T, rate_T = torch.tensor([0.01, 0.5, 1.0, 80.0])[:tasks], torch.rand(tasks, generator=rng) / 5
    fall_ST = scale_T * torch.exp(-rate_T * torch.arange(steps).unsqueeze(1))
    loss_ST = fall_ST * (0.5 + torch.rand(steps, tasks, generator=rng))
    return (loss_ST * (torch.rand(steps, tasks, generator=rng) > 0.2)).double()


def gradients(module: AdaptiveLoss, loss_ST: Tensor) -> Tensor:
    """gradient_ST: how much each step's loss counts, from the backward of the module's scalar."""
    module.double()
    found = []
    for loss_T in loss_ST:
        module.before_step()
        leaf_1T, weight_1T = loss_T.unsqueeze(0).clone().requires_grad_(), (loss_T != 0).double().unsqueeze(0)
        total = module(leaf_1T, weight_1T, weight_1T.sum(0))
        found.append(torch.autograd.grad(total, leaf_1T)[0][0] * (loss_T != 0))
        module.after_update()
    return torch.stack(found)


def weights_of(loss_ST: Tensor, seed: int) -> Tensor:
    return 0.2 + 2 * torch.rand(loss_ST.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=examples(60), deadline=None)
@given(histories(), st.integers(1, 4), st.sampled_from([0.3, 2.0]), seeds)
def test_dwas_weights_are_those_of_equation_7_over_windows(loss_ST, window, temperature, seed):
    weight_T = weights_of(loss_ST, seed)
    module = DWALoss(weight_T.tolist(), temperature, window)
    module.weight_T = weight_T
    found_ST = gradients(module, loss_ST)
    lambda_ST = torch.tensor(paper.dwa(loss_ST.tolist(), temperature, window), dtype=torch.float64)
    torch.testing.assert_close(found_ST, weight_T * lambda_ST[:-1] * (loss_ST != 0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(module.weights(), weight_T * lambda_ST[-1], rtol=1e-9, atol=1e-12)


def test_dwa_in_micro_batches_is_dwa_on_the_batch():
    loss_SBT = torch.rand(6, 7, 3, dtype=torch.float64)
    whole, parts = (DWALoss([1.0] * 3, 0.5, 2).double() for _ in range(2))
    for loss_BT in loss_SBT:
        weight_BT = torch.ones_like(loss_BT)
        for module in (whole, parts):
            module.before_step()
        whole(loss_BT, weight_BT, weight_BT.sum(0))
        for rows in (slice(0, 3), slice(3, 7)):
            parts.of_rows(loss_BT[rows], weight_BT[rows], weight_BT.sum(0))
        for module in (whole, parts):
            module.after_update()
    assert (whole.rate_T - 1).abs().max() > 0.01
    torch.testing.assert_close(whole.rate_T, parts.rate_T)


def test_a_step_that_was_not_finished_leaves_no_trace_in_dwas_window():
    module, loss_BT = DWALoss([1.0] * 2, 1.0, 1), torch.tensor([[1.0, 2.0]])
    for scale in (100.0, 1.0):
        module.before_step()
        module(scale * loss_BT, torch.ones(1, 2), torch.ones(2))
    module.after_update()
    assert module.previous_T.tolist() == [1.0, 2.0]


@settings(max_examples=examples(60), deadline=None)
@given(histories(), st.sampled_from([0.025, 0.5]), st.sampled_from([0.0, 0.1]))
def test_famos_weights_are_those_of_algorithm_1(loss_ST, lr, gamma):
    found_ST = gradients(FAMOLoss(loss_ST.shape[1], lr, gamma), loss_ST)
    wanted_ST = torch.tensor(paper.famo(loss_ST.tolist(), lr, gamma), dtype=torch.float64)
    # Where both logits' derivatives all but vanish, Adam divides rounding by rounding.
    torch.testing.assert_close(found_ST, wanted_ST, rtol=1e-5, atol=1e-9)


def test_famo_gives_a_task_that_stalls_the_weight_of_one_that_falls():
    module = FAMOLoss(2, 0.05, 0.0)
    fall_S = torch.exp(-0.05 * torch.arange(40))
    loss_ST = torch.stack([fall_S, torch.ones(40)], 1).double()
    gradients(module, loss_ST)
    assert module.logit_T[1] - module.logit_T[0] > 1
    assert module.weights().sum().item() == pytest.approx(1)


@settings(max_examples=examples(60), deadline=None)
@given(histories(), st.sampled_from([0.1, 1.0, 30.0]), seeds)
def test_stchs_weights_are_the_derivatives_of_the_scalarisation(loss_ST, mu, seed):
    weight_T = weights_of(loss_ST, seed)
    reference_T = 0.3 + torch.rand(len(weight_T), generator=torch.Generator().manual_seed(seed)).double()
    for loss_T in loss_ST:
        found_T = slopes(loss_T, reference_T, loss_T != 0, weight_T, mu) * (loss_T != 0)
        _, wanted = paper.stch(loss_T.tolist(), reference_T.tolist(), weight_T.tolist(), mu)
        assert found_T.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "module", [FAMOLoss(2, 0.05, 0.0), STCHLoss([1.0] * 2, 1.0, 2)]
)  # fmt: skip
def test_a_loss_that_is_not_above_0_has_no_part_in_a_step_and_harms_no_other(module: AdaptiveLoss) -> None:
    loss_ST = torch.tensor([[1.0, 0.5], [-0.2, 0.4], [0.9, 0.3], [-0.1, 0.2]], dtype=torch.float64)
    found_ST = gradients(module, loss_ST)
    assert found_ST.isfinite().all()
    assert found_ST[1::2, 0].tolist() == [0, 0]
    assert (found_ST[:, 1] > 0).all()


def test_stchs_warm_up_descends_log_losses_and_ends_with_the_mean_of_its_second_half():
    loss_ST = torch.tensor([[4.0, 1.0], [8.0, 3.0], [2.0, 0.0], [1.0, 0.5], [3.0, 1.0]], dtype=torch.float64)
    module = STCHLoss([1.0, 2.0], mu=0.5, warmup=4)
    found_ST = gradients(module, loss_ST)
    torch.testing.assert_close(found_ST[:2], torch.tensor([1.0, 2.0]).double() / loss_ST[:2], rtol=1e-6, atol=0)
    assert (module.sum_T / module.count_T).tolist() == [1.5, 0.5]
    assert found_ST[4].tolist() == pytest.approx(paper.stch([3.0, 1.0], [1.5, 0.5], [1.0, 2.0], 0.5)[1])


def test_a_small_mu_leaves_the_worst_task_alone_and_a_large_one_weighs_all_log_losses_alike():
    loss_T, reference_T, seen_T = torch.tensor([3.0, 1.0]), torch.ones(2), torch.ones(2, dtype=torch.bool)
    assert slopes(loss_T, reference_T, seen_T, torch.ones(2), 0.01).tolist() == pytest.approx([2 / 3, 0.0], abs=1e-6)
    assert slopes(loss_T, reference_T, seen_T, torch.ones(2), 1e6).tolist() == pytest.approx([1 / 3, 1.0], rel=1e-4)
