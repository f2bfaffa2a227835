"""Progressive layered extraction (Tang et al., RecSys 2020)."""

from collections.abc import Sequence

from models.fusion.level import UnitNetwork


class PLE(UnitNetwork):
    """Task experts, shared experts, and gates that keep tasks apart (Tang et al. 2020, section 4, eq. 1-6).

    Level by level, a task's gate, softmax(W x) over its own and the shared experts, reads the task's representation; the
    shared gate chooses from all experts. The last level has no shared gate. One level is customised gate control (CGC).

    Args:
        in_dim: D in. num_tasks: T.
        levels: for each level the layers of its experts, such as [[256], [128]]; the last is D out.
        task_experts, shared_experts: of each task, and shared, on every level.
    Shapes: x_BD -> h_BTD.
    """

    def __init__(
        self,
        in_dim: int,
        num_tasks: int,
        levels: Sequence[Sequence[int]],
        task_experts: int = 1,
        shared_experts: int = 1,
    ) -> None:
        super().__init__(in_dim, num_tasks, levels, task_experts, shared_experts, isolated=True, native=False)
