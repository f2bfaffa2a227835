"""Towers: from the fusion's output for each task to the task's numbers, most often one, its logit."""

# Shapes: B rows, T tasks, D width, N = B T, K numbers a task; of a calibration pieces of a line; of a layer S towers, H widths.

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.fx
from pydantic import Field, PlainValidator, TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from features.errors import UserError
from models.label_units import at_least_float32
from models.layers import StackedLinear, StackedMLP, Width, linear

Layers = Annotated[list[Width], Field(max_length=64)]
OF_ALL, BY_TASK = TypeAdapter(Layers), TypeAdapter(dict[str, Layers])


def checked(tower: Any) -> list[int] | dict[str, list[int]]:
    """Of the two forms the one meant: a union of them would put its kinds into the place of an error."""
    return BY_TASK.validate_python(tower) if isinstance(tower, Mapping) else OF_ALL.validate_python(tower)


TowerLayers = Annotated[list[int] | dict[str, list[int]], PlainValidator(checked)]  # of all tasks, or by task


class Towers(nn.Module):
    """What a ranker needs of towers. Shapes: h_BTD -> out_KBT."""

    def start_at(self, start_KT: Tensor) -> None:
        """Sets the biases of the outputs."""
        raise NotImplementedError


class OutputLayer(StackedLinear):
    """The last layer of towers, in float32 under autocast too.

    bfloat16 has 8 bits: a logit of -5, a probability of 0.7%, would move in steps of 1/32 and the probability in steps of 3%.
    """

    def forward(self, x_SBD: Tensor) -> Tensor:
        return output(x_SBD, self.weight_SDH, self.bias_SH)


def output(x_SBD: Tensor, weight_SDH: Tensor, bias_SH: Tensor | None) -> Tensor:
    """y_SBH of `linear`, without autocast."""
    device = x_SBD.device.type
    if not torch.is_autocast_enabled(device):  # a block of it would be an operator of its own in an exported program
        return linear(at_least_float32(x_SBD), weight_SDH, bias_SH)
    with torch.autocast(device, enabled=False):
        return linear(at_least_float32(x_SBD), weight_SDH, bias_SH)


torch.fx.wrap("output")  # one node for TorchRec's pipelined loop, which traces the forward


class TaskTowers(Towers):
    """One multi-layer perceptron a task, all computed together.

    Args:
        num_tasks: T. in_dim: D. widths: hidden layers, may be empty. dropout: after each hidden layer.
        outputs: K, numbers a task (models.label_units).
    Shapes: h_BTD -> out_KBT.
    """

    def __init__(
        self, num_tasks: int, in_dim: int, widths: Sequence[int], dropout: float = 0.0, outputs: int = 1
    ) -> None:
        super().__init__()
        self.hidden = StackedMLP(num_tasks, in_dim, widths, dropout)
        self.out = OutputLayer(num_tasks, widths[-1] if widths else in_dim, outputs)

    def forward(self, h_BTD: Tensor) -> Tensor:
        out_TBK: Tensor = self.out(self.hidden(h_BTD.transpose(0, 1)))
        return out_TBK.permute(2, 1, 0)

    @torch.no_grad()
    def start_at(self, start_KT: Tensor) -> None:
        """Sets the biases of the last layer."""
        assert self.out.bias_SH is not None
        self.out.bias_SH.copy_(start_KT.T)


class OwnTowers(Towers):
    """A tower a task as TaskTowers, but each of its own depth and widths: a loop over tasks for that reason.

    Args:
        in_dim: D. widths: of each task's hidden layers. dropout: after each hidden layer.
        sizes: numbers of each task; K is the largest, and what a task does not have is 0.
    Shapes: h_BTD -> out_KBT.
    """

    def __init__(self, in_dim: int, widths: Sequence[Sequence[int]], dropout: float, sizes: Sequence[int]) -> None:
        super().__init__()
        towers = (TaskTowers(1, in_dim, w, dropout, size) for w, size in zip(widths, sizes, strict=True))
        self.tasks, self.sizes = nn.ModuleList(towers), sizes

    def forward(self, h_BTD: Tensor) -> Tensor:
        out_KB1 = [tower(h_BTD[:, task : task + 1]) for task, tower in enumerate(self.tasks)]
        missing = [max(self.sizes) - size for size in self.sizes]
        return torch.cat([F.pad(out, (0, 0, 0, 0, 0, more)) for out, more in zip(out_KB1, missing, strict=True)], 2)

    def start_at(self, start_KT: Tensor) -> None:
        """Sets the biases of each task's last layer."""
        for task, (tower, size) in enumerate(zip(self.tasks, self.sizes, strict=True)):
            assert isinstance(tower, TaskTowers)
            tower.start_at(start_KT[:size, task : task + 1])


class SharedTower(Towers):
    """One multi-layer perceptron for every task; a task's own are the biases of its outputs alone.

    Args:
        num_tasks: T. in_dim: D. widths, dropout, outputs: as for TaskTowers.
    Shapes: h_BTD -> out_KBT.
    """

    def __init__(
        self, num_tasks: int, in_dim: int, widths: Sequence[int], dropout: float = 0.0, outputs: int = 1
    ) -> None:
        super().__init__()
        self.tower = TaskTowers(1, in_dim, widths, dropout, outputs)
        self.bias_K1T = nn.Parameter(torch.zeros(outputs, 1, num_tasks))

    def forward(self, h_BTD: Tensor) -> Tensor:
        out_KN1 = self.tower(h_BTD.flatten(0, 1).unsqueeze(1))
        return out_KN1.view(-1, *h_BTD.shape[:2]) + self.bias_K1T

    @torch.no_grad()
    def start_at(self, start_KT: Tensor) -> None:
        """Sets the biases of the outputs."""
        self.tower.start_at(torch.zeros(len(start_KT), 1))
        self.bias_K1T.copy_(start_KT.unsqueeze(1))


def widths_by_task(tower: Sequence[int] | Mapping[str, Sequence[int]], tasks: Sequence[str]) -> list[list[int]]:
    """Hidden layers of each task's tower, in the order of `tasks`.

    Args:
        tower: those of all tasks, or by task: {"click": [64, 32], "dwell": []}.
    Raises:
        UserError: a mapping that names another task, or not all of them.
    """
    if not isinstance(tower, Mapping):
        return [list(tower)] * len(tasks)
    if unknown := sorted(set(tower) - set(tasks)):
        raise UserError(f"model.tower: {', '.join(unknown)} is not one of the tasks {', '.join(tasks)}")
    if missing := [task for task in tasks if task not in tower]:
        raise UserError(
            f"model.tower: has no layers for {', '.join(missing)}; name each task, or give one list for all"
        )
    return [list(tower[task]) for task in tasks]


def build_towers(
    widths: Sequence[Sequence[int]], in_dim: int, dropout: float, sizes: Sequence[int], shared: bool = False
) -> Towers:
    """The towers of a model: those of equal layers as one product a layer.

    Args:
        widths: of each task's hidden layers. in_dim: D. dropout: after each hidden layer. sizes: numbers of each task.
        shared: one tower for all tasks.
    Raises:
        UserError: a shared one of several widths.
    """
    equal = all(w == widths[0] for w in widths)
    if shared and not equal:
        raise UserError("model.tower: this fusion has one tower for all tasks, give it one list of layers")
    if not equal:
        return OwnTowers(in_dim, widths, dropout, sizes)
    return (SharedTower if shared else TaskTowers)(len(widths), in_dim, widths[0], dropout, max(sizes))


class Calibration(nn.Module):
    """A rising line of straight pieces from each binary task's logit to another, learnt with everything below it.

    It moves probabilities and keeps their order: NE may change, AUC does not. It is for towers whose logits are too steep or
    too flat as a whole, such as small ones, or under heavy dropout or weight decay: where the mean prediction fits the mean
    label, but not among the high ones or among the low ones. It is fitted to train rows only, so it cannot correct
    overfitting.

    Pieces end at the inner knots from -7 to 7; the first and the last are unbounded. It begins as the identity, to
    which weight decay draws it back. A regression task passes unchanged.

    Args:
        kinds: "binary" or "regression" per task.
    Shapes: logit_BT -> logit_BT.
    """

    binary_T: Tensor
    low_K: Tensor
    high_K: Tensor

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.register_buffer("binary_T", torch.tensor([kind == "binary" for kind in kinds]), persistent=False)
        inner = torch.arange(-7.0, 8.0)
        self.register_buffer("low_K", torch.cat([torch.tensor([-torch.inf]), inner]), persistent=False)
        self.register_buffer("high_K", torch.cat([inner, torch.tensor([torch.inf])]), persistent=False)
        self.steepness_TK = nn.Parameter(torch.zeros(len(kinds), len(self.low_K)))  # 0: slope 1
        self.shift_T = nn.Parameter(torch.zeros(len(kinds)))

    def forward(self, logit_BT: Tensor) -> Tensor:
        slope_TK = F.softplus(self.steepness_TK + math.log(math.e - 1))
        part_BTK = self._parts(logit_BT.unsqueeze(2)) - self._parts(logit_BT.new_zeros(1))  # of the way from 0
        return torch.where(self.binary_T, (part_BTK * slope_TK).sum(2) + self.shift_T, logit_BT)

    def _parts(self, logit: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(logit, self.low_K), self.high_K)
