"""Optimisers of embedding tables: a registry in which one entry holds everything that is known of one.

The optimiser of a sharded table is fused into the backward of FBGEMM's kernel: one pass reads, updates and writes the rows of a
batch. A table of which every rank has a copy is updated by `change`, which must give the same numbers.
"""

# Shapes: R rows and D columns of a table, or of a part of one.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor

FLOAT = 4  # bytes

Change = Callable[[Tensor, Sequence[Tensor], float, float], Tensor]


def sgd_change(gradient_RD: Tensor, state: Sequence[Tensor], lr: float, eps: float) -> Tensor:  # noqa: ARG001
    """lr g."""
    return lr * gradient_RD


def adagrad_change(gradient_RD: Tensor, state: Sequence[Tensor], lr: float, eps: float) -> Tensor:
    """m += g^2, and lr g / (sqrt(m) + eps). Where m has a number per row, it grows by the mean of the row's g^2."""
    [momentum] = state
    square_RD = gradient_RD.square()
    momentum += square_RD.mean(1) if momentum.dim() == 1 else square_RD
    return lr / (momentum.view(len(momentum), -1).sqrt() + eps) * gradient_RD


@dataclass(frozen=True)
class FusedOptimizer:
    """What is known of a table optimiser.

    Attributes:
        kernel: its name in FBGEMM.
        settings: those of train.tables that it reads.
        state: whether each tensor that it keeps has a number per row or per element, in the order of FBGEMM's momentum1 and
            momentum2 (listed in SplitTableBatchedEmbeddingBagsCodegen.split_optimizer_states).
        cpu: whether FBGEMM has a CPU kernel.
        counts_steps: the kernel corrects its means for the number of steps, which no state dict has.
        change: what is subtracted from weight_RD, given gradient_RD, the state (updated in place), lr and eps. None if rows
            that are in no batch, whose gradient is 0, would move: then no table can be replicated.
    """

    kernel: EmbOptimType
    settings: tuple[Literal["lr", "eps"], ...]
    state: tuple[Literal["row", "element"], ...]
    cpu: bool
    counts_steps: bool
    change: Change | None

    @property
    def splits_columns(self) -> bool:
        """Whether a table's columns can be trained apart: not with a state per row, of which each part would have its own."""
        return "row" not in self.state

    def state_shapes(self, rows: int, columns: int) -> list[tuple[int, ...]]:
        """Of the tensors that it keeps for a table."""
        return [(rows,) if per == "row" else (rows, columns) for per in self.state]

    def row_bytes(self, rows: int) -> int:
        """Bytes of the state per row, which stays on the GPU where a table is cached (fused_uvm_caching)."""
        return FLOAT * rows * self.state.count("row")

    def element_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the state per element, which lies in main memory where a table is cached."""
        return FLOAT * rows * columns * self.state.count("element")

    def state_bytes(self, rows: int, columns: int) -> int:
        """Bytes of all its state."""
        return self.row_bytes(rows) + self.element_bytes(rows, columns)


TABLE_OPTIMIZERS = {
    "rowwise_adagrad": FusedOptimizer(
        kernel=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        settings=("lr", "eps"),
        state=("row",),
        cpu=True,
        counts_steps=False,
        change=adagrad_change,
    ),
    "adagrad": FusedOptimizer(
        kernel=EmbOptimType.EXACT_ADAGRAD,
        settings=("lr", "eps"),
        state=("element",),
        cpu=True,
        counts_steps=False,
        change=adagrad_change,
    ),
    "sgd": FusedOptimizer(
        kernel=EmbOptimType.EXACT_SGD, settings=("lr",), state=(), cpu=True, counts_steps=False, change=sgd_change
    ),
    "adam": FusedOptimizer(
        kernel=EmbOptimType.ADAM,
        settings=("lr", "eps"),
        state=("element", "element"),
        cpu=False,
        counts_steps=True,
        change=None,
    ),
    "partial_rowwise_adam": FusedOptimizer(  # Adam with one second moment per row, of the mean of its squares
        kernel=EmbOptimType.PARTIAL_ROWWISE_ADAM,
        settings=("lr", "eps"),
        state=("element", "row"),
        cpu=False,
        counts_steps=True,
        change=None,
    ),
}


def which(allowed: Callable[[FusedOptimizer], bool]) -> str:
    """The names of the optimisers that `allowed` accepts, for messages."""
    *names, last = (name for name, optimizer in TABLE_OPTIMIZERS.items() if allowed(optimizer))
    return f"{', '.join(names)} or {last}" if names else last
