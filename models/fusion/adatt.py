"""Adaptive task-to-task fusion (AdaTT, arXiv 2304.04959)."""

from models.fusion.level import Native, SharedExperts, TaskExperts, UnitNetwork
from models.layers import LINEAR_GATES, PLAIN_EXPERTS, ExpertLayers, GateLayers, Levels


class AdaTT(UnitNetwork):
    """Every task's gate sees the experts of all tasks; its own are added once more, linearly (AdaTT, section 3, eq. 1-10).

    f_t = (pad(v_t) + softmax(W_t f_t))^T E per level (eq. 10), where E holds the experts of all units, each a function of
    its unit's representation. With shared experts it is the general form of section 3.2: at the last level the shared
    unit only has experts. Without, it is AdaTT-sp. Gates have no bias by default, as in eq. 9.

    v_t is learnt (eq. 7), except that a single expert counts fully. Section 3.1 states the exception for m_1 = … = m_T = 1,
    where all fusion units have one expert; units of which only some have one are left to eq. 7, and shared units are not
    mentioned. By default the exception holds unit by unit: with one expert a task and several shared ones every m_t is 1,
    so v_t is 1 and only the shared unit's vector is learnt. In the published code it holds for all units, shared ones too,
    or for none: there those v_t are learnt as well, from U(-1, 1), so that a task's own expert starts with a random weight.
    `native: published` is that form, level by level; a vector of n experts starts from U(-1/sqrt(n), 1/sqrt(n)) in both.

    Checked against the published code (weights copied over): largest difference 2e-14 forward and backward, measured
    outside this repository.

    Args:
        in_dim: D in. num_tasks: T.
        levels: for each level the layers of its experts, such as [[256], [128]]; the last is D out.
        task_experts, shared_experts: of each task, and shared (0: AdaTT-sp); may differ as in PLE. The native part of a
            task without experts is 0.
        native: True, "published" (see above), or False, which leaves pad(v_t) out, the ablation of section 4.4.
        experts: their layers, by default linear and ReLU. gate: of the gates, by default W alone.
    Shapes: x_BD -> h_BTD.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Levels, task_experts: TaskExperts = 1,
        shared_experts: SharedExperts = 0, native: Native = True, experts: ExpertLayers = PLAIN_EXPERTS,
        gate: GateLayers = LINEAR_GATES,
    ) -> None:  # fmt: skip
        super().__init__(in_dim, num_tasks, levels, task_experts, shared_experts, False, native, experts, gate)
