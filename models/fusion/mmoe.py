"""Multi-gate mixture of experts (Ma et al., KDD 2018), with any number of levels."""

# Shapes: B rows, T tasks, E experts a level, D width, U gates of a level.

from collections.abc import Sequence

from torch import Tensor, nn

from models.fusion.fusion import Fusion, GateNames, numbered
from models.layers import LINEAR_GATES, PLAIN_EXPERTS, ExpertLayers, GateLayers, Levels, mix


class MMoE(Fusion):
    """Experts shared by all tasks, mixed by a gate for each (Ma et al. 2018, section 4, eq. 6-8).

    With more than one level it is the ML-MMoE of AdaTT (arXiv 2304.04959, section 4.1): each expert above the first level
    has a gate of its own that mixes the experts below, and all gates, softmax(W x), read the raw input.

    Checked against the published code, MMoE and ML-MMoE (weights copied over): largest difference 2e-14 forward and
    backward, measured outside this repository.

    Args:
        in_dim: D in. num_tasks: T. num_experts: E.
        levels: for each level the layers of its experts, such as [[256, 128]] or [[256], [128]]; the last is D out.
        experts: their layers, by default linear and ReLU. gate: of the gates, by default W alone.
    Shapes: x_BD -> h_BTD.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, num_experts: int, levels: Levels,
        experts: ExpertLayers = PLAIN_EXPERTS, gate: GateLayers = LINEAR_GATES,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_experts, self.out_dim = num_experts, levels[-1][-1]
        dims = [in_dim, *(layers[-1] for layers in levels)]
        self.experts = nn.ModuleList(experts.stack(num_experts, d, w) for d, w in zip(dims, levels, strict=False))
        users = [num_experts] * (len(levels) - 1) + [num_tasks]
        self.gate = nn.ModuleList(gate.stack(u, in_dim, num_experts) for u in users)

    def forward(self, x_BD: Tensor) -> Tensor:
        h_UBD = x_BD.unsqueeze(0)
        for experts, gate_UBE in zip(self.experts, self._gates(x_BD), strict=True):
            h_UBD = mix(gate_UBE, experts(h_UBD))
        return h_UBD.transpose(0, 1)

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """Weights of the experts per level: gate_BUE, U the next level's experts, T at the last."""
        return [gate_UBE.transpose(0, 1) for gate_UBE in self._gates(x_BD)]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """All experts are shared; below the last level the units are the next level's experts."""
        experts = numbered(["shared"], [self.num_experts])
        above = [f"{name}, level {level}" for level in range(2, len(self.gate) + 1) for name in experts]
        units = [above[at : at + len(experts)] for at in range(0, len(above), len(experts))]
        return [GateNames(names, experts) for names in [*units, list(tasks)]]

    def _gates(self, x_BD: Tensor) -> list[Tensor]:
        return [gate(x_BD.unsqueeze(0)).softmax(-1) for gate in self.gate]
