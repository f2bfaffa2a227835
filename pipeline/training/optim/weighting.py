"""Task weighting: the loss that a configuration asks for, and the two kinds that use each task's gradient.

GradNorm and PCGrad act on what tasks share: the ranker's dense parameters outside of the towers. Where experts are gated there
is no last shared layer, of which GradNorm's paper takes the norm for its cost's sake; the norm over all of them measures
what the tasks do to the shared part. A parameter that only one task reaches has gradient 0 from the others.
"""

# Shapes: T tasks, S = T - 1, P shared parameters, all in one row.

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from features.errors import UserError
from features.schema.schema import Task
from models.losses import TaskLoss, UncertaintyLoss
from models.ranker import Ranker
from pipeline.training.optim.settings import Fixed, GradNorm, PCGrad, Uncertainty, Weighting


def task_loss(weighting: Weighting, tasks: Mapping[str, Task], seed: int) -> TaskLoss:
    """The loss of these tasks under a weighting.

    Args:
        seed: of random draws, which PCGrad needs.

    Raises:
        UserError: a weight for a task that does not exist.
    """
    kinds = [task.kind for task in tasks.values()]
    if isinstance(weighting, Uncertainty):
        return UncertaintyLoss(kinds)
    if isinstance(weighting, GradNorm):
        return GradNormLoss(kinds, weighting.alpha, weighting.lr)
    if not isinstance(weighting, Fixed | PCGrad):
        return TaskLoss(kinds, [1.0] * len(kinds))
    if unknown := sorted(weighting.weights.keys() - tasks.keys()):
        raise UserError(f"train.weighting.weights.{unknown[0]}: no such task, there are {', '.join(tasks)}")
    weights = [weighting.weights.get(name, task.loss_weight) for name, task in tasks.items()]
    return PCGradLoss(kinds, weights, seed) if isinstance(weighting, PCGrad) else TaskLoss(kinds, weights)


def shared_parameters(ranker: Ranker, dense: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """Those of a run's trained dense parameters that belong to all tasks. One tower for all tasks is one of them."""
    own = ("loss.", "ranker.calibration.") + (() if ranker.fusion.shared_tower else ("ranker.towers.",))
    return [parameter for name, parameter in dense if parameter.requires_grad and not name.startswith(own)]


class GradientLoss(TaskLoss):
    """A task loss that takes each task's gradient of the shared parameters, T backward passes over the dense part.

    It does so in its forward. What leaves the model goes through a node of DDP's whose first backward sets off the
    reduction of all gradients, be they there or not. The tables are not reached: they are updated by the one backward of the
    whole loss.

    Attributes:
        shared: the parameters.
    """

    shared: Sequence[nn.Parameter] = ()

    def forward(self, loss_BT: Tensor, observed_weight_BT: Tensor, total_T: Tensor) -> Tensor:
        """The scalar to differentiate; arguments as those of `TaskLoss.forward`."""
        mean_T = self.means(loss_BT, observed_weight_BT, total_T)
        self.global_T, self.gradient_TP = global_gradients(mean_T, self.shared)
        return (mean_T * self.weights()).sum()

    def after_backward(self, step: int) -> None:
        """What the weighting does once the gradients of step `step` are there."""
        raise NotImplementedError


def global_gradients(mean_T: Tensor, shared: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of each task over the global batch, the same on every rank: mean_T and gradient_TP.

    Args:
        mean_T: this rank's part of the losses, which are the mean over ranks; attached to a graph, which is kept.
    """
    rows = []
    for loss in mean_T.unbind():
        parts = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([loss.detach().view(1), *(part.flatten() for part in parts)]))
    joined = torch.stack(rows)
    if (ranks := dist.get_world_size()) > 1:
        dist.all_reduce(joined)
        joined /= ranks
    return joined[:, 0], joined[:, 1:]


class GradNormLoss(GradientLoss):
    """Weights that make the tasks learn at like rates (GradNorm, Chen et al., ICML 2018, algorithm 1).

    The weights and the first losses are part of the model's state. A task's first loss is that of the first step that
    observes it. All weights are 1 at the start.

    Args:
        kinds: "binary" or "regression" per task. alpha, lr: see `balanced`.
    """

    initial_T: Tensor

    def __init__(self, kinds: Sequence[str], alpha: float, lr: float) -> None:
        super().__init__(kinds, [1.0] * len(kinds))
        self.alpha, self.lr = alpha, lr
        self.register_buffer("weight_T", torch.ones(len(kinds)))
        self.register_buffer("initial_T", torch.zeros(len(kinds)))

    def after_backward(self, step: int) -> None:  # noqa: ARG002
        """Changes the weights for the next step."""
        self.initial_T.copy_(torch.where(self.initial_T == 0, self.global_T, self.initial_T))
        norm_T = self.gradient_TP.norm(dim=1)
        self.weight_T.copy_(balanced(self.weight_T, norm_T, self.global_T, self.initial_T, self.alpha, self.lr))


def balanced(weight_T: Tensor, norm_T: Tensor, mean_T: Tensor, initial_T: Tensor, alpha: float, lr: float) -> Tensor:
    """The next weights: a step down the gradient of GradNorm's loss (eq. 2), then the sum is T again.

    With G_t = w_t |gradient of L_t|, its mean G over tasks, and r_t = (L_t / L_t(0)) over its own mean, the loss is
    sum |G_t - G r_t^alpha|, in which G r_t^alpha (eq. 1) is held constant. A plain step could make a weight negative, and
    its size would depend on the scale of the losses. So the step is taken in log w_t and in units of G:
    w_t exp(-lr w_t dloss/dw_t / G). Tasks of loss 0, above all those that the batch does not observe, count in no mean and
    get no step.

    Args:
        weight_T: w_t. norm_T: of the gradients of the losses without their weights. mean_T, initial_T: L_t and L_t(0).
    """
    tiny = torch.finfo(mean_T.dtype).tiny
    seen_T = mean_T != 0
    count = seen_T.sum().clamp(min=1)
    own_T = weight_T * norm_T * seen_T
    mean = (own_T.sum() / count).clamp(min=tiny)
    ratio_T = mean_T / initial_T.clamp(min=tiny)
    rate_T = ratio_T / (ratio_T.sum() / count).clamp(min=tiny)
    slope_T = own_T / mean * torch.sign(own_T - mean * rate_T**alpha)
    next_T = weight_T * torch.exp(-lr * slope_T)
    return next_T * len(next_T) / next_T.sum()


class PCGradLoss(GradientLoss):
    """Gradients of the shared parameters without what one task's has against another's (PCGrad, Yu et al., NeurIPS 2020).

    The gradients are those of the losses times their loss weights. Towers and tables get the plain sum of the gradients.

    Args:
        kinds: "binary" or "regression" per task. loss_weights: per task. seed: of the order of projections.
    """

    def __init__(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> None:
        super().__init__(kinds, loss_weights)
        self.seed = seed

    def after_backward(self, step: int) -> None:
        """Adds to the gradient of the shared parameters what the projections change, nothing where tasks agree."""
        order_TS = orders(len(self.weight_T), self.seed * 1_000_003 + step).to(self.weight_T.device)
        dot_TT = (self.gradient_TP @ self.gradient_TP.T) * self.weight_T * self.weight_T.unsqueeze(1)
        change_P = ((projected(dot_TT, order_TS) - 1) * self.weight_T) @ self.gradient_TP
        sizes = [parameter.numel() for parameter in self.shared]
        for parameter, part in zip(self.shared, change_P.split(sizes), strict=True):
            if parameter.grad is not None:
                parameter.grad += part.view_as(parameter)


def orders(num_tasks: int, seed: int) -> Tensor:
    """order_TS: for each task the others, in random order; the same on every rank."""
    draw_TT = torch.rand(num_tasks, num_tasks, generator=torch.Generator().manual_seed(seed))
    return draw_TT.fill_diagonal_(2).argsort(1)[:, :-1]


def projected(dot_TT: Tensor, order_TS: Tensor) -> Tensor:
    """How often each task's gradient counts in the sum of the projected ones (PCGrad, algorithm 1): share_T.

    It is 1 for each where there is no conflict. The algorithm only ever adds multiples of the tasks' gradients to each
    other, so their dot products are all it needs.

    Args:
        dot_TT: <g_s, g_t>. order_TS: in which order the gradient of task t meets those of the others.
    """
    dot_TT = dot_TT.double()
    mix_TT = torch.eye(len(dot_TT), dtype=torch.float64, device=dot_TT.device)  # row t: g_t as it is by now
    for other_T in order_TS.unbind(1):
        against_T = (mix_TT * dot_TT[other_T]).sum(1).clamp(max=0)
        square_T = dot_TT.diagonal()[other_T].clamp(min=torch.finfo(torch.float64).tiny)
        mix_TT.scatter_add_(1, other_T.unsqueeze(1), -(against_T / square_T).unsqueeze(1))
    return mix_TT.sum(0).float()
