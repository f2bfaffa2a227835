"""What weightings are made of: their settings, and losses with hooks into a step."""

# Shapes: B rows, T tasks, T1 the tasks and one more, P shared parameters, all in one row, E width of all embeddings.

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, ClassVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from features.batch import Batch
from features.errors import UserError
from features.schema.task import Task
from models.losses import TaskLoss
from models.ranker import Ranker
from pipeline.training.optim.strict import Strict

TaskWeights = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class WeightingSettings(Strict):
    """Base of `train.weighting`; a subclass has a `name` that only it has, and its options.

    Attributes:
        refuses: settings of train that the weighting does not work with, and why, as a sentence that begins with the
            setting; {name} is the weighting's.
        positive: it divides by losses or takes their logarithms, or finds a variance from them: they must be above 0.
    """

    name: str
    refuses: ClassVar[Mapping[str, str]] = {}
    positive: ClassVar[bool] = False

    def task_weights(self, tasks: Mapping[str, Task]) -> list[float]:
        """The weight of each task's loss, or what the weighting multiplies with its own: 1 unless it has `weights`."""
        return [1.0] * len(tasks)

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:
        """The loss.

        Args:
            kinds: of the tasks. loss_weights: from `task_weights`. seed: of random draws.
        """
        raise NotImplementedError


class Weighted(WeightingSettings):
    """Base of those for which the schema's loss weights count; `weights` replace some of them or all."""

    weights: TaskWeights = Field({})

    def task_weights(self, tasks: Mapping[str, Task]) -> list[float]:
        """The loss weight of each task. Raises UserError on a weight for a task that does not exist."""
        if unknown := sorted(self.weights.keys() - tasks.keys()):
            raise UserError(f"train.weighting.weights.{unknown[0]}: no such task, there are {', '.join(tasks)}")
        return [self.weights.get(name, task.loss_weight) for name, task in tasks.items()]


WHOLE_BATCH_LOSSES = (
    "adds a micro-batch's loss before the others are known, and weighting {name} weights by all of them"
)
GRADIENT_REFUSALS = {
    "pipelined": "runs the backward itself, where weighting {name} has to act",
    "accumulate": "never holds the whole batch's graph, which weighting {name} needs for each task's gradient",
    "dense_parallel": "shards the weights whose gradients weighting {name} compares",
    "compile": "frees what a backward needs in the first one, and weighting {name} has one more for each task",
}


class AdaptiveLoss(TaskLoss):
    """A task loss that follows the training; every hook does nothing unless a subclass defines it."""

    def attach(self, shared: Sequence[nn.Parameter], batch_size: int, lanes: int) -> None:
        """Called once, before the first step. Raises UserError where the loss cannot be shared by the ranks.

        Args:
            shared: from `shared_parameters`. batch_size: rows of a global batch. lanes: that it takes its rows from, one
                after the other.
        """

    def before_step(self) -> None:
        """Called before the forward of a step."""

    def after_backward(self, step: int) -> None:
        """Called once the gradients of step `step` are complete, before the optimiser reads them."""

    def after_update(self) -> None:
        """Called once all parameters are updated: the place to change persistent state."""


class GradientLoss(AdaptiveLoss):
    """A task loss that takes each task's gradient of the shared parameters, T backward passes over the dense part.

    It does so in its forward. What leaves the model goes through a node of DDP's whose first backward sets off the
    reduction of all gradients, be they there or not. The tables are not reached: they are updated by the one backward of the
    whole loss.

    Attributes:
        shared: the parameters.
    """

    shared: Sequence[nn.Parameter] = ()

    def attach(self, shared: Sequence[nn.Parameter], batch_size: int, lanes: int) -> None:  # noqa: ARG002
        """Takes the parameters."""
        self.shared = shared

    def forward(self, loss_BT: Tensor, observed_weight_BT: Tensor, total_T: Tensor) -> Tensor:
        """The scalar to differentiate; arguments as those of `TaskLoss.forward`."""
        mean_T = self.means(loss_BT, observed_weight_BT, total_T)
        self.global_T, self.gradient_TP = global_gradients(mean_T, self.shared)
        return (mean_T * self.weights()).sum()


class SharedGradientLoss(GradientLoss):
    """A gradient loss that gives the shared parameters another combination of the tasks' gradients than their sum.

    Towers and tables get the gradient of the sum of losses times loss weights, as do terms that belong to no task.
    """

    def coefficients(self, dot_TT: Tensor, step: int) -> Tensor:
        """How often each task's gradient counts, its loss weight included: that of the plain sum is `weight_T`.

        Args:
            dot_TT: products <g_s, g_t> of the gradients of the losses without their weights. step: from 0.
        """
        raise NotImplementedError

    def after_backward(self, step: int) -> None:
        """Adds to the gradient of the shared parameters what the combination changes."""
        coefficient_T = self.coefficients(self.gradient_TP @ self.gradient_TP.T, step)
        add_to_gradients(self.shared, (coefficient_T - self.weight_T) @ self.gradient_TP)


class EmbeddingLoss(AdaptiveLoss):
    """A loss that sees the embeddings of a step, and can run the dense part on them with other parameters.

    Attributes:
        shared: the parameters that it can replace.
        second_derivatives: it differentiates derivatives by the embeddings: attention is computed by operators that allow it.
    """

    shared: Sequence[nn.Parameter] = ()
    second_derivatives: ClassVar[bool] = False

    def from_embeddings(
        self,
        run: Callable[[Sequence[Tensor]], Tensor],
        embedding_BE: Tensor,
        loss_BT: Tensor,
        batch: Batch,
        total_T1: Tensor,
    ) -> Tensor | float:
        """What is added to the loss, called after `forward`.

        Args:
            run: from values of the shared parameters, in their order, to loss_BT: with the embeddings held, and with the
                random draws of the step's forward.
            embedding_BE: a part of the graph of loss_BT. batch: this rank's rows.
            total_T1: what losses are divided by (pipeline.training.step.global_weight_sums).
        """
        raise NotImplementedError


def shared_parameters(ranker: Ranker, dense: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The trained dense parameters before the towers, a fusion's for one task among them; and a tower of all tasks."""
    own = ("loss.", "ranker.calibration.") + (() if ranker.fusion.shared_tower else ("ranker.towers.",))
    return [parameter for name, parameter in dense if parameter.requires_grad and not name.startswith(own)]


def global_mean(value: Tensor) -> Tensor:
    """The mean over ranks, detached: of this rank's parts of the losses, the losses over the global batch."""
    value = value.detach().clone()
    if (ranks := dist.get_world_size()) > 1:
        dist.all_reduce(value)
        value /= ranks
    return value


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """gradient_P of a scalar; its graph is kept. A parameter that it does not depend on has 0."""
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def global_gradients(mean_T: Tensor, shared: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of each task over the global batch, the same on every rank: mean_T and gradient_TP.

    Args:
        mean_T: this rank's part of the losses, which are the mean over ranks; attached to a graph, which is kept.
    """
    rows = [torch.cat([loss.detach().view(1), flat_gradient(loss, shared)]) for loss in mean_T.unbind()]
    joined = global_mean(torch.stack(rows))
    return joined[:, 0], joined[:, 1:]


def add_to_gradients(parameters: Sequence[nn.Parameter], change_P: Tensor) -> None:
    """Adds to each parameter's gradient its part of a change, where it has a gradient."""
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, change_P.split(sizes), strict=True):
        if parameter.grad is not None:
            parameter.grad += part.view_as(parameter)
