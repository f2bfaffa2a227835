"""Task weighting against the papers' formulas in float64 loops, and in runs: on one rank, on two, and after a stop."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from references.weightings import surgery
from tiny_training import assert_close, assert_identical, last, losses, tensors, torchrun
from torch import nn
from two_ranks import stopped, trainer
from two_ranks_weighting import RUNS, STEPS, STOP, WITH_STATE
from weighting_steps import SCHEMAS, TASKS, Steps, adams, run

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.training.config import Settings
from pipeline.training.optim.weighting.gradnorm import balanced
from pipeline.training.optim.weighting.pcgrad import PCGradLoss, orders, projected

pytestmark = pytest.mark.usefixtures("device")

# Shapes: T tasks, S = T - 1, P parameters.
seeds = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def one_rank(folder: Path, device: torch.device) -> Path:
    """A run of each weighting on one rank."""
    for name, (_, options) in RUNS.items():
        run(folder, f"one-{name}", name, options, max_steps=STEPS, checkpoint_every=STOP)
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    """The runs of two_ranks_weighting.py, all of one process group."""
    torchrun(str(Path(__file__).parent / "two_ranks_weighting.py"), str(folder)).check_returncode()
    return folder


# GradNorm by itself


def by_hand(
    weights: list[float], norms: list[float], now: list[float], first: list[float], alpha: float, lr: float
) -> list[float]:
    """The next weights, from equations 1 and 2 by autograd: the step is taken in log w and in units of the mean norm."""
    log_T = torch.tensor(weights, dtype=torch.float64).log().requires_grad_()
    seen = [t for t in range(len(weights)) if now[t] != 0]
    own = {t: log_T[t].exp() * norms[t] for t in seen}
    mean = sum(value.item() for value in own.values()) / max(len(seen), 1)
    ratio = {t: now[t] / first[t] for t in seen}
    loss = torch.zeros((), dtype=torch.float64)
    for t in seen:
        rate = ratio[t] / (sum(ratio.values()) / len(seen))
        loss = loss + (own[t] - mean * rate**alpha).abs()
    slope_T = torch.autograd.grad(loss, log_T)[0] if seen else torch.zeros(len(weights))
    moved = [w * math.exp(-lr * s / (mean or 1.0)) for w, s in zip(weights, slope_T.tolist(), strict=True)]
    return [m * len(moved) / sum(moved) for m in moved]


@settings(max_examples=examples(150), deadline=None)
@given(st.integers(1, 6), st.sampled_from([0.0, 0.12, 1.5]), st.sampled_from([0.025, 0.5]), seeds, st.data())
def test_gradnorms_step_is_the_gradient_of_its_own_loss(num_tasks, alpha, lr, seed, data):
    rng = torch.Generator().manual_seed(seed)
    weight_T, norm_T, mean_T, first_T = 0.1 + 3 * torch.rand(4, num_tasks, generator=rng, dtype=torch.float64)
    seen_T = torch.tensor([data.draw(st.booleans()) for _ in range(num_tasks)])
    norm_T, mean_T = norm_T * seen_T, mean_T * seen_T
    found_T = balanced(weight_T, norm_T, mean_T, first_T, alpha, lr)
    wanted = by_hand(weight_T.tolist(), norm_T.tolist(), mean_T.tolist(), first_T.tolist(), alpha, lr)
    assert found_T.tolist() == pytest.approx(wanted, rel=1e-9)
    assert found_T.sum().item() == pytest.approx(num_tasks)
    assert (found_T > 0).all()


def test_gradnorm_repeated_brings_the_norms_to_their_targets_whatever_the_scale_of_a_loss():
    norm_T, mean_T, initial_T = (
        torch.tensor([0.03, 2.0, 500.0]),
        torch.tensor([0.5, 0.9, 40.0]),
        torch.tensor([1.0, 1, 50]),
    )
    weight_T = torch.ones(3)
    for _ in range(3000):
        weight_T = balanced(weight_T, norm_T, mean_T, initial_T, alpha=1.0, lr=0.005)
    own_T, rate_T = weight_T * norm_T, mean_T / initial_T
    torch.testing.assert_close(own_T / own_T.mean(), rate_T / rate_T.mean(), rtol=0.02, atol=0)


def test_a_task_that_no_row_of_the_batch_observes_changes_no_other_tasks_share():
    weight_T, norm_T, initial_T = torch.tensor([0.5, 1.5, 1.0]), torch.tensor([2.0, 0.1, 0.0]), torch.ones(3)
    mean_T = torch.tensor([0.7, 0.2, 0.0])
    both_T = balanced(weight_T, norm_T, mean_T, initial_T, 1.5, 0.1)
    alone_T = balanced(weight_T[:2], norm_T[:2], mean_T[:2], initial_T[:2], 1.5, 0.1)
    torch.testing.assert_close(both_T[0] / both_T[1], alone_T[0] / alone_T[1])


# PCGrad by itself


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.data(), seeds)
def test_projections_by_dot_products_are_those_of_the_algorithm(num_tasks, size, data, seed):
    gradient_TP = torch.randn(num_tasks, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradient_TP *= torch.tensor([[data.draw(st.sampled_from([0.0, 0.1, 1.0, 20.0]))] for _ in range(num_tasks)])
    order_TS = orders(num_tasks, seed)
    found_P = projected(gradient_TP @ gradient_TP.T, order_TS).double() @ gradient_TP
    wanted_TP = torch.tensor(surgery(gradient_TP.tolist(), order_TS.tolist()), dtype=torch.float64)
    # In few dimensions gradients can all but cancel: rounding is that of the largest.
    torch.testing.assert_close(found_P, wanted_TP.sum(0), rtol=1e-5, atol=1e-4 * (1 + gradient_TP.abs().max().item()))


@settings(max_examples=examples(50), deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), seeds)
def test_gradients_that_do_not_conflict_stay_as_they_are_to_the_last_bit(num_tasks, size, seed):
    gradient_TP = torch.rand(num_tasks, size, generator=torch.Generator().manual_seed(seed))
    assert (projected(gradient_TP @ gradient_TP.T, orders(num_tasks, seed)) == 1).all()


@settings(max_examples=examples(50), deadline=None)
@given(st.integers(2, 20), seeds)
def test_two_tasks_gradients_conflict_with_neither_after_their_projection(size, seed):
    gradient_TP = torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found_P = projected(gradient_TP @ gradient_TP.T, orders(2, seed)).double() @ gradient_TP
    assert (gradient_TP @ found_P >= -1e-5 * gradient_TP.square().sum()).all()


def test_each_task_meets_the_others_in_an_order_of_its_own_that_depends_on_the_seed_alone():
    drawn = [orders(3, seed).tolist() for seed in range(200)]
    assert drawn == [orders(3, seed).tolist() for seed in range(200)]
    for t in range(3):
        others = [other for other in range(3) if other != t]
        counts = [sum(order[t] == wanted for order in drawn) for wanted in (others, others[::-1])]
        assert sum(counts) == 200
        assert min(counts) > 70
    assert len({str(order) for order in drawn}) == 8


def test_only_shared_parameters_lose_what_conflicts(device: torch.device):
    """Two tasks that pull shared numbers in opposite directions, the first twice as hard, and a penalty that is no task's."""
    shared, towers = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor([2.0, -1.0]))
    module = PCGradLoss([1.0, 1.0], seed=0)
    module.shared = [shared]
    loss_BT = (shared[0] * towers + torch.stack([shared[1], -0.5 * shared[1]])).unsqueeze(0)
    observed_weight_BT = torch.ones(1, 2)
    loss = module(loss_BT, observed_weight_BT, observed_weight_BT.sum(0)) + 3 * shared[0]
    loss.backward()
    assert shared.grad.tolist() == [4.0, 0.5]
    module.after_backward(0)
    wanted_TP = torch.tensor(surgery([[2.0, 1.0], [-1.0, -0.5]], [[1], [0]]))
    torch.testing.assert_close(shared.grad, wanted_TP.sum(0) + torch.tensor([3.0, 0.0]))
    assert towers.grad.tolist() == [1.0, 1.0]


# Steps of a run against a float64 twin


def test_gradnorms_weights_after_each_step_are_those_of_the_formulas(folder: Path) -> None:
    steps = Steps(folder, "gradnorm-steps", "gradnorm", 5)
    weights, first = [1.0] * 3, [0.0] * 3
    assert not steps.states[0]["model.loss.initial_T"].any()
    for number in range(5):
        now = [steps.values[number][task] for task in TASKS]
        first = [f or value for f, value in zip(first, now, strict=True)]
        norms = [gradient.norm().item() for gradient in steps.shared(number)]
        weights = by_hand(weights, norms, now, first, alpha=1.5, lr=0.025)
        state = steps.states[number + 1]
        assert state["model.loss.initial_T"].tolist() == pytest.approx(first, rel=1e-5)
        assert state["model.loss.weight_T"].tolist() == pytest.approx(weights, rel=1e-5)
    assert max(weights) - min(weights) > 0.1


def test_pcgrad_gives_the_optimiser_projected_gradients_of_what_is_shared_and_the_sum_of_the_rest(folder: Path) -> None:
    steps, conflicts, order_matters = Steps(folder, "pcgrad-steps", "pcgrad", 12), 0, 0
    for number in range(12):
        gradients_T = [SCHEMAS[task] * g for task, g in zip(TASKS, steps.shared(number), strict=True)]
        conflicts += any(float(g @ h) < 0 for g in gradients_T for h in gradients_T)
        order = orders(3, 5 * 1_000_003 + number).tolist()
        wanted, reversed_ = (
            [sum(column) for column in zip(*surgery([g.tolist() for g in gradients_T], o), strict=True)]
            for o in (order, [others[::-1] for others in order])
        )
        order_matters += wanted != pytest.approx(reversed_, rel=0.1, abs=1e-3)
        names = list(steps.gradients[number]["click"])
        found_P = torch.cat([adams(steps.states, number, n).flatten() for n in names if not n.startswith("towers.")])
        torch.testing.assert_close(found_P, torch.tensor(wanted, dtype=torch.float64), rtol=1e-3, atol=1e-5)
        for name in (n for n in names if n.startswith("towers.")):
            plain = sum(SCHEMAS[task] * steps.gradients[number][task][name] for task in TASKS)
            torch.testing.assert_close(adams(steps.states, number, name), plain, rtol=1e-3, atol=1e-5)
    assert conflicts > 5
    assert order_matters > 1


def test_the_first_step_of_pcgrad_moves_tables_as_the_plain_sum_does(folder: Path) -> None:
    found = last(run(folder, "pcgrad-first", "pcgrad", max_steps=1))
    plain = last(run(folder, "fixed-first", "fixed", max_steps=1))
    tables = [name for name in plain if "embeddings" in name]
    assert_identical({name: found[name] for name in tables}, {name: plain[name] for name in tables})
    assert any(not torch.equal(found[name], plain[name]) for name in plain)


def test_uncertaintys_variances_start_at_one_and_move_with_the_dense_optimiser(folder: Path) -> None:
    steps = Steps(folder, "uncertainty-steps", "uncertainty", 1)
    name, values = "loss.log_variance_T", steps.values[0]
    assert not steps.states[0][f"model.{name}"].any()
    wanted = [0.5 - values["click"], 0.5 - values["conversion"], 0.5 - values["dwell"] / 2]
    assert (10 * steps.states[1][f"dense.{name}.exp_avg"]).tolist() == pytest.approx(wanted, rel=1e-5)
    moved = [-math.copysign(0.003, gradient) for gradient in wanted]  # Adam's first step takes the sign
    assert steps.states[1][f"model.{name}"].tolist() == pytest.approx(moved, rel=1e-4)


# Runs


def test_fixed_weights_replace_the_schemas_and_equal_ones_are_one(folder: Path) -> None:
    trainer(folder, "default", max_steps=4).run_to_end()
    assert_identical(
        last(run(folder, "fixed", "fixed", {"weights": {"conversion": 2.0}}, max_steps=4)), last(folder / "default")
    )
    equal = run(folder, "equal", "equal", max_steps=4)
    ones = run(folder, "ones", "fixed", {"weights": dict.fromkeys(TASKS, 1.0)}, max_steps=4)
    assert_identical(last(equal), last(ones))
    assert losses(equal) == losses(ones)
    assert losses(equal) != losses(folder / "default")
    assert not any("loss." in name for name in last(folder / "default"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_a_weighting_that_stopped_in_mid_epoch_ends_as_if_it_had_not(one_rank: Path, name: str) -> None:
    stopped(one_rank, f"one-{name}", f"one-{name}-resumed", STOP)
    run(one_rank, f"one-{name}-resumed", name, RUNS[name][1], max_steps=STEPS, checkpoint_every=STOP)
    assert_identical(last(one_rank / f"one-{name}-resumed"), last(one_rank / f"one-{name}"))
    assert losses(one_rank / f"one-{name}-resumed") == losses(one_rank / f"one-{name}")


@pytest.mark.system
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_weight_tasks_as_one_rank_does(two_ranks: Path, one_rank: Path, name: str) -> None:
    assert losses(two_ranks / f"two-{name}") == pytest.approx(losses(one_rank / f"one-{name}"), rel=1e-3)
    # In the second epoch. Rounding grows tenfold in ten steps where gradients jump, as rep_mtl's do at a ReLU.
    two, same = (
        tensors(checkpoint.folder(folder / f"{ranks}-{name}" / "checkpoints", 2 * STOP))
        for folder, ranks in ((two_ranks, "two"), (one_rank, "one"))
    )
    assert_close(two, same, rtol=5e-3, atol=5e-4)
    one, other = (torch.load(two_ranks / f"{name}.{rank}.pt", weights_only=True) for rank in range(2))
    assert_identical(one, other)


@pytest.mark.system
@pytest.mark.parametrize("name", WITH_STATE)
def test_a_run_with_a_weighting_goes_on_bit_for_bit_on_two_ranks(two_ranks: Path, name: str) -> None:
    assert_identical(last(two_ranks / f"two-{name}-resumed"), last(two_ranks / f"two-{name}"))


def test_a_learnt_weighting_is_another_run_than_a_fixed_one(one_rank: Path) -> None:
    run(one_rank, "one-fixed", "fixed", max_steps=STEPS)
    fixed = losses(one_rank / "one-fixed")
    assert all(losses(one_rank / f"one-{name}")[5:] != fixed[5:] for name in RUNS)


def test_the_pipelined_loop_learns_uncertainties_too(one_rank: Path) -> None:
    found = run(one_rank, "pipelined", "uncertainty", max_steps=STEPS, checkpoint_every=STOP, pipelined=True)
    assert_identical(last(found), last(one_rank / "one-uncertainty"))


@pytest.mark.parametrize("name", ["gradnorm", "pcgrad", "cagrad", "flat_minima", "rep_mtl"])
def test_weighting_by_gradients_works_under_bfloat16_dropout_and_clipping(folder: Path, name: str) -> None:
    found = run(folder, f"all-{name}", name, max_steps=5, precision="bf16", dropout=0.2, clip_norm=0.1)
    assert all(map(math.isfinite, losses(found)))


@pytest.mark.parametrize("change", [{"name": "equal"}, {"name": "gradnorm", "alpha": 0.5}])
def test_a_run_cannot_go_on_with_another_weighting(one_rank: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="model and optimisers"):
        trainer(one_rank, "one-gradnorm", weighting=change)


# Settings


@pytest.mark.parametrize(
    ("weighting", "says"),
    [
        ({"name": "equal", "weights": {"click": 1.0}}, "weighting.equal.weights"),
        ({"name": "gradnorm", "weights": {"click": 1.0}}, "weighting.gradnorm.weights"),
        ({"name": "fixed", "alpha": 1.0}, "weighting.fixed.alpha"),
        ({"name": "uncertainty", "lr": 0.1}, "weighting.uncertainty.lr"),
        ({"name": "gradnorm", "alpha": -1}, "weighting.gradnorm.alpha"),
        ({"name": "fixed", "weights": {"click": -1.0}}, "weighting.fixed.weights.click"),
        ({"name": "fairgrad", "alpha": 0.1}, "weighting.fairgrad.alpha"),
        ({"name": "fairgrad", "alpha": 100}, "weighting.fairgrad.alpha"),
        ({"name": "stch", "warmup": 0}, "weighting.stch.warmup"),  # without a reference there is nothing to smooth
        ({"name": "random"}, "'fixed', 'equal', 'uncertainty', 'gradnorm', 'pcgrad'"),
    ],
)
def test_an_option_that_the_weighting_does_not_have_is_refused(weighting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as error:
        Settings(weighting=weighting)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["gradnorm", "pcgrad"])
def test_the_pipelined_loop_is_refused_for_what_acts_between_backward_and_step(name: str) -> None:
    with pytest.raises(ValidationError, match="runs the backward itself"):
        Settings(weighting={"name": name}, pipelined=True)


@pytest.mark.parametrize("name", ["fixed", "pcgrad"])
def test_a_weight_for_a_task_that_does_not_exist_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"weights.clack: no such task, there are click, conversion, dwell"):
        run(folder, "never", name, {"weights": {"clack": 1.0}})
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    "weighting", [{"name": "fixed", "weights": {"click": 2.0}}, {"name": "gradnorm", "alpha": 0.5}]
)
def test_settings_written_down_read_back_as_they_were(weighting: dict[str, Any]) -> None:
    made = Settings(weighting=weighting)
    assert Settings.model_validate(made.model_dump(mode="json")) == made
