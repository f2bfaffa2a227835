"""The interface between the ranker and every fusion."""

# Shapes: B rows, T tasks, F features, D width, U units, E experts, K numbers of a task.

from typing import ClassVar

from torch import Tensor, nn


class Fusion(nn.Module):
    """Base of all fusions: (in_dim, num_tasks, …), or (in_dim, num_tasks, num_fields, …) where `fields` is set.

    Where `sequences` is set as well, a mapping follows: of each field that is a sequence, the most items it may have.

    Attributes:
        fields: it attends over features and reads x_BFD, one token a feature, in place of x_BD.
        sequences: it reads WithItems (models.sequences) in place of x_BFD where the schema has sequences.
        shared_tower: one tower scores every task.
        reads_tasks: it has an argument `tasks`, which is no part of a config: a TaskInfo of each (models.fusion.tasks).
        reads_observed: it is called with observed_BT as well.
        task_arguments: arguments that a config gives as names of tasks, and the class takes as their indices.
        field_arguments: the same with names of features.
        out_dim: D of what it returns.
    Shapes: x_BD or x_BFD -> h_BTD.
    """

    fields: ClassVar[bool] = False
    sequences: ClassVar[bool] = False
    shared_tower: ClassVar[bool] = False
    reads_tasks: ClassVar[bool] = False
    task_arguments: ClassVar[tuple[str, ...]] = ()
    field_arguments: ClassVar[tuple[str, ...]] = ()
    reads_observed: bool = False
    out_dim: int

    def gates(self, _: Tensor) -> list[Tensor]:
        """Weights that mix experts, weight_BUE per level, for reports; [] for a fusion without gates."""
        return []

    def penalty(self, _: Tensor) -> Tensor | None:
        """A further loss of each row from its logit_BT: loss_B, or None."""
        return None

    def detach_unseen(self, out_KBT: Tensor) -> Tensor:
        """The outputs, without a gradient where a task's labels must not train the model."""
        return out_KBT

    def start(self, start_KT: Tensor) -> Tensor:
        """The outputs' biases at the start, without those that a task's labels must not give."""
        return start_KT
