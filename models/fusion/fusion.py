"""The interface between the ranker and every fusion."""

# Shapes: B rows, T tasks, F features, S sets of embeddings, D width, U units, E experts, K numbers of a task.

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class GateNames(NamedTuple):
    """The names of a level's gate weights: of its U units, which mix, and of its E experts, which are mixed."""

    units: list[str]
    experts: list[str]


def numbered(owners: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Names of things by their owner, in order: the owner's own name, or "name 1", "name 2", … where it has several."""
    return [
        f"{owner} {index + 1}" if count > 1 else owner
        for owner, count in zip(owners, counts, strict=True)
        for index in range(count)
    ]


class Fusion(nn.Module):
    """Base of all fusions: (in_dim, num_tasks, …), or (in_dim, num_tasks, num_fields, …) where `fields` is set.

    Where `sequences` is set as well, a mapping follows: of each field that is a sequence, the most items it may have. Where
    `reads_columns` is set, it is (in_dim, num_tasks, columns, …): of each field, its columns of x_BD.

    Attributes:
        fields: it attends over features and reads x_BFD, one token a feature, in place of x_BD.
        sequences: it reads WithItems (models.sequences) in place of x_BFD where the schema has sequences.
        reads_columns: it reads x_BD and knows which columns are a feature's, so the interaction must be concat.
        feature_layers: first parts of the names of parameters that weigh features though none of their widths is D.
        shared_tower: one tower scores every task.
        reads_tasks: it has an argument `tasks`, which is no part of a config: a TaskInfo of each (models.fusion.tasks).
        reads_observed: it is called with observed_BT as well.
        varying: why its tensors' shapes depend on a batch's content, as a sentence without its subject; "" where they do not.
        unseen: indices of tasks whose labels must not train the model.
        task_arguments: arguments that a config gives as names of tasks, or as lists of these, and the class takes as indices.
        field_arguments: the same with names of features.
        out_dim: D of what it returns.
    Shapes: x_BD, x_BFD or, with S > 1 sets, x_BSD -> h_BTD.
    """

    fields: ClassVar[bool] = False
    sequences: ClassVar[bool] = False
    reads_columns: ClassVar[bool] = False
    feature_layers: ClassVar[tuple[str, ...]] = ()
    shared_tower: ClassVar[bool] = False
    reads_tasks: ClassVar[bool] = False
    task_arguments: ClassVar[tuple[str, ...]] = ()
    field_arguments: ClassVar[tuple[str, ...]] = ()
    reads_observed: bool = False
    varying: str = ""
    unseen: Sequence[int] = ()
    out_dim: int

    @classmethod
    def table_sets(cls, num_tasks: int) -> int:  # noqa: ARG003
        """S: how many embeddings each id has, side by side in the row of one table, so that a table is S times as wide."""
        return 1

    def gates(self, _: Tensor) -> list[Tensor]:
        """Weights that mix experts, weight_BUE per level, for reports; [] for a fusion without gates."""
        return []

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """Of the units and experts of each level of `gates`; an expert is named by its owner: a task, or "shared".

        Args:
            tasks, features: names, in the order of the model's.
        """
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
