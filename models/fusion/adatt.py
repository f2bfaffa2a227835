"""Adaptive task-to-task fusion (AdaTT, arXiv 2304.04959)."""

from collections.abc import Sequence

from models.fusion.level import SharedExperts, TaskExperts, UnitNetwork


class AdaTT(UnitNetwork):
    """Every task's gate sees the experts of all tasks; its own are added once more, linearly (AdaTT, section 3, eq. 1-10).

    f_t = (pad(v_t) + softmax(W_t f_t))^T E per level (eq. 10), where E holds the experts of all units, each a function of
    its unit's representation. v_t is learnt (eq. 7), or 1 for each unit with one expert; the paper states it for
    networks whose units all have one. With shared experts it is the general form of section 3.2: at the last level
    the shared unit only has experts. Without, it is AdaTT-sp. Gates have no bias, as in eq. 9.

    Args:
        in_dim: D in. num_tasks: T.
        levels: for each level the layers of its experts, such as [[256], [128]]; the last is D out.
        task_experts, shared_experts: of each task, and shared (0: AdaTT-sp); may differ as in PLE. The native part of a
            task without experts is 0.
        native: False leaves pad(v_t) out, the ablation of section 4.4.
    Shapes: x_BD -> h_BTD.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Sequence[Sequence[int]], task_experts: TaskExperts = 1,
        shared_experts: SharedExperts = 0, native: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_dim, num_tasks, levels, task_experts, shared_experts, isolated=False, native=native)
