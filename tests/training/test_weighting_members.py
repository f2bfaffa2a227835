"""Every weighting in a run: it learns, gives the optimiser the paper's gradients, and refuses what it cannot work with."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from references import weightings as paper
from tiny_training import losses
from torch import Tensor
from two_ranks import trainer
from weighting_steps import SCHEMAS, TASKS, Steps, adams, run, task_losses

from features.errors import UserError
from features.schema.task import Task
from models.losses import UncertaintyLoss
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.dataset import Dataset
from pipeline.training.config import Settings
from pipeline.training.observer import Observer
from pipeline.training.optim.weighting import WEIGHTINGS, task_loss
from pipeline.training.optim.weighting.base import shared_parameters
from pipeline.training.optim.weighting.fairgrad import RIDGE
from pipeline.training.optim.weighting.pcgrad import orders
from pipeline.training.step import StepOutput, TrainStep
from pipeline.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")

# Shapes: B rows, T tasks, P shared parameters.
EPOCH = 13
QUICK: dict[str, dict[str, Any]] = {"dwa": {"window": 6}, "stch": {"warmup": 10}}


class MeanLoss(Observer):
    """The mean over tasks of each step's loss, whatever the weights."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        weight_BT = output.weight_BT * output.observed_BT
        mean_T = (output.loss_BT * weight_BT).sum(0) / weight_BT.sum(0).clamp(min=1e-9)
        self.losses.append(mean_T.mean().item())


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_losses_fall_under_every_weighting(folder: Path, name: str) -> None:
    seen = MeanLoss()
    settings = {"weighting": {"name": name} | QUICK.get(name, {}), "max_steps": 4 * EPOCH, "log_every": EPOCH}
    trainer(folder, f"member-{name}", seen, **settings, dense={"lr": 0.01}).run_to_end()
    first, end = (sum(part) / EPOCH for part in (seen.losses[:EPOCH], seen.losses[-EPOCH:]))
    assert end < 0.95 * first
    assert all(map(math.isfinite, losses(folder / f"member-{name}")))


def combination(name: str, gradients: list[list[float]], weights: list[float]) -> list[float]:
    """What a paper makes of the tasks' gradients, on the scale that the weighting's docstring gives."""
    own = [[w * x for x in g] for w, g in zip(weights, gradients, strict=True)]
    if name == "mgda":
        return [len(own) * x for x in paper.shortest(own)]
    if name == "aligned":
        return paper.aligned(gradients, weights)
    square = sum(paper.dot(g, g) for g in own) / len(own)
    unit = [[x / math.sqrt(square) for x in g] for g in own]
    return paper.combined(paper.fair(unit, 1.0, RIDGE), own)


@pytest.mark.parametrize("name", ["mgda", "nash_mtl", "aligned"])
def test_the_optimiser_is_given_the_papers_gradient_of_what_is_shared_and_the_sum_of_the_rest(
    folder: Path, name: str
) -> None:
    steps, weights = Steps(folder, f"steps-{name}", name, 3), [SCHEMAS[task] for task in TASKS]
    for number in range(3):
        wanted_P = torch.tensor(combination(name, [g.tolist() for g in steps.shared(number)], weights))
        names = list(steps.gradients[number]["click"])
        found_P = torch.cat([adams(steps.states, number, n).flatten() for n in names if not n.startswith("towers.")])
        torch.testing.assert_close(found_P, wanted_P.double(), rtol=2e-3, atol=1e-5)
        plain_P = sum(w * g for w, g in zip(weights, steps.shared(number), strict=True))
        assert (found_P - plain_P).abs().max() > 1e-3
        for name_ in (n for n in names if n.startswith("towers.")):
            plain = sum(SCHEMAS[task] * steps.gradients[number][task][name_] for task in TASKS)
            torch.testing.assert_close(adams(steps.states, number, name_), plain, rtol=1e-3, atol=1e-5)


def test_flat_minima_adds_each_tasks_gradient_where_its_own_loss_is_sharpest_nearby(folder: Path) -> None:
    rho = 0.3
    steps = Steps(folder, "steps-flat", "flat_minima", 2, rho=rho)
    for number in range(2):
        ranker, batch = steps.rankers[number], steps.batches[number]
        named = {n: p for n, p in ranker.named_parameters() if not n.startswith(("embeddings.", "towers."))}
        sizes = [p.numel() for p in named.values()]
        theta_P = torch.cat([p.detach().flatten() for p in named.values()])

        def loss_at(theta_P: Tensor, task: str) -> Tensor:
            values = {
                name: part.view_as(p)
                for (name, p), part in zip(named.items(), theta_P.split(sizes), strict=True)  # noqa: B023
            }
            return task_losses(torch.func.functional_call(ranker, values, (batch,)), batch)[task]  # noqa: B023

        plain = steps.shared(number)
        sharp = [paper.sharpness_aware(lambda p, t=task: loss_at(p, t), theta_P, rho) for task in TASKS]
        order = orders(3, 5 * 1_000_003 + number).tolist()
        total_P = torch.zeros_like(theta_P)
        for part in (plain, [s - g for s, g in zip(sharp, plain, strict=True)]):
            own = [(SCHEMAS[task] * g).tolist() for task, g in zip(TASKS, part, strict=True)]
            total_P += torch.tensor(paper.surgery(own, order), dtype=torch.float64).sum(0)
        found_P = torch.cat([adams(steps.states, number, n).flatten() for n in named])
        torch.testing.assert_close(found_P, total_P, rtol=5e-3, atol=1e-4)
        without_P = torch.tensor(
            paper.surgery([(SCHEMAS[t] * g).tolist() for t, g in zip(TASKS, plain, strict=True)], order)
        )
        assert (found_P - without_P.sum(0)).abs().max() > 3e-3


@pytest.mark.parametrize("fusion", [{"name": "shared_bottom", "widths": [8]}, {"name": "autotask", "width": 8}])
def test_methods_combine_gradients_of_all_dense_parameters_but_a_tasks_tower_and_calibration(
    folder: Path, fusion: dict[str, Any]
) -> None:
    data = Dataset(folder / "data")
    config = ModelConfig(fusion=fusion, tower=[4], field_dim=5, calibration="monotone")
    ranker = Ranker(data.schema, data.encoders, config, device="cpu")
    step = TrainStep(ranker, UncertaintyLoss(["binary"] * 3), bf16=False)
    dense = [(name, p) for name, p in step.named_parameters() if ".embeddings." not in name]
    found = {id(p) for p in shared_parameters(ranker, dense)}
    kept = {name for name, p in dense if id(p) not in found}
    own = {"loss.", "ranker.calibration."} | ({"ranker.towers."} if fusion["name"] == "shared_bottom" else set())
    assert kept == {name for name, _ in dense if name.startswith(tuple(own))}
    assert {name.split(".")[-2] + "." for name in kept} >= {"loss.", "calibration."}


# What does not go together


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_losses_that_fall_below_0_are_refused_where_a_weighting_needs_them_above_0(name: str) -> None:
    tasks = {"spend": Task(kind="regression", label="x", loss="ziln")}
    weighting = Settings(weighting={"name": name}).weighting
    if name not in ("uncertainty", "gradnorm", "dwa", "famo", "stch"):
        assert task_loss(weighting, tasks, 0).weights().numel() == 1
        return
    with pytest.raises(
        UserError, match=rf"^train.weighting.name={name} .* ziln of spend .*: choose one of fixed, equal, pcg"
    ):
        task_loss(weighting, tasks, 0)


@pytest.mark.parametrize(
    ("setting", "value"), [("pipelined", True), ("accumulate", 2), ("dense_parallel", "fsdp"), ("compile", "default")]
)  # fmt: skip
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_setting_that_a_weighting_refuses_is_refused_in_one_line_and_every_other_accepted(
    name: str, setting: str, value: Any
) -> None:
    if setting not in WEIGHTINGS[name].refuses:
        assert getattr(Settings(**{"weighting": {"name": name}, setting: value}), setting) == value
        return
    with pytest.raises(ValidationError, match=rf"{setting}=\S+ .*weighting {name} .*: leave it out") as error:
        Settings(**{"weighting": {"name": name}, setting: value})
    assert "\n" not in error.value.errors()[0]["msg"]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weightings_settings_have_its_name_and_read_back_as_they_were(name: str) -> None:
    made = Settings(weighting={"name": name})
    assert type(made.weighting) is WEIGHTINGS[name]
    assert Settings.model_validate(made.model_dump(mode="json")) == made


def test_dwa_is_the_same_in_micro_batches(folder: Path) -> None:
    whole, parts = (
        run(folder, f"dwa-in-{count}", "dwa", {"window": 2, "temperature": 0.1}, max_steps=8, accumulate=count)
        for count in (1, 3)
    )
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("name", ["dwa", "famo"])
def test_weightings_of_losses_run_in_the_pipelined_loop(folder: Path, name: str) -> None:
    options = {"window": 2} if name == "dwa" else None
    found, plain = (run(folder, f"{name}-{loop}", name, options, max_steps=8, pipelined=loop) for loop in (True, False))
    assert losses(found) == losses(plain)


def test_weights_that_are_all_0_are_refused_where_a_weighting_reads_them() -> None:
    weights, tasks = dict.fromkeys(TASKS, 0.0), {name: Task(kind="binary", label="x") for name in TASKS}
    with pytest.raises(UserError, match="every task has loss weight 0"):
        task_loss(WEIGHTINGS["fixed"](weights=weights), tasks, 0)
