"""Progressive layered extraction (Tang et al., RecSys 2020)."""

from features.errors import UserError
from models.fusion.level import SharedExperts, TaskExperts, UnitNetwork
from models.layers import LINEAR_GATES, PLAIN_EXPERTS, ExpertLayers, GateLayers, Levels


class PLE(UnitNetwork):
    """Task experts, shared experts, and gates that keep tasks apart (Tang et al. 2020, section 4, eq. 1-6).

    Level by level, a task's gate, softmax(W x) over its own and the shared experts, reads the task's representation; the
    shared gate chooses from all experts. The last level has no shared gate. One level is customised gate control (CGC).

    Checked against the published code (weights copied over): largest difference 2e-14 forward and backward, measured
    outside this repository.

    Args:
        in_dim: D in. num_tasks: T.
        levels: for each level the layers of its experts, such as [[256], [128]]; the last is D out.
        task_experts: of each task, everywhere the same (1), by task ([2, 1, 1]), or by level and task
            ([[2, 1, 1], [1, 1, 1]]). A task may have none where there are shared ones.
        shared_experts: everywhere the same (1), or by level ([2, 1]).
        experts: their layers, by default linear and ReLU. gate: of the gates, by default W alone.
    Shapes: x_BD -> h_BTD.
    Raises:
        UserError: numbers of experts that do not fit tasks and levels.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Levels, task_experts: TaskExperts = 1,
        shared_experts: SharedExperts = 1, experts: ExpertLayers = PLAIN_EXPERTS, gate: GateLayers = LINEAR_GATES,
    ) -> None:  # fmt: skip
        super().__init__(in_dim, num_tasks, levels, task_experts, shared_experts, True, False, experts, gate)


class CGC(PLE):
    """Customised gate control, PLE of exactly one level (Tang et al. 2020, section 4.1, eq. 1-4). Arguments as PLE's.

    Checked against the published code (weights copied over): largest difference 2e-14 forward and backward, measured
    outside this repository.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Levels, task_experts: TaskExperts = 1,
        shared_experts: SharedExperts = 1, experts: ExpertLayers = PLAIN_EXPERTS, gate: GateLayers = LINEAR_GATES,
    ) -> None:  # fmt: skip
        if len(levels) != 1:
            raise UserError(f"model.fusion.levels: cgc has one level, not {len(levels)}; with more it is ple")
        super().__init__(in_dim, num_tasks, levels, task_experts, shared_experts, experts, gate)
