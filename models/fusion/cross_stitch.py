"""Cross-stitch networks (Misra et al., CVPR 2016)."""

# Shapes: B rows, T tasks (S those that receive, T those that send), D width in and out, L levels.

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from models.fusion.fusion import Fusion, GateNames
from models.layers import PLAIN_EXPERTS, ExpertLayers, Levels, mix


class CrossStitch(Fusion):
    """A network a task; after each level every task takes a learnt linear mixture of all (Misra et al. 2016, eq. 1).

    One scalar per pair of tasks and level, the same for every row, with a unit after each level as in AdaTT's comparison
    (arXiv 2304.04959, section 4.2.3). The paper trains these scalars at a higher rate than the rest; here there is one rate.

    Checked against the published code (weights copied over): largest difference 2e-14 forward and backward, measured
    outside this repository.

    Args:
        in_dim: D in. num_tasks: T.
        levels: for each level the layers of its networks, such as [[256], [128]]; the last is D out.
        keep: weight of a task's own activation at the start, in [0, 1] (the paper: .9); the rest is shared evenly.
        experts: layers of the networks, by default linear and ReLU.
    Shapes: x_BD -> h_BTD.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Levels,
        keep: Annotated[float, Field(ge=0, le=1)] = 0.9, experts: ExpertLayers = PLAIN_EXPERTS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_tasks, self.out_dim = num_tasks, levels[-1][-1]
        dims = [in_dim, *(layers[-1] for layers in levels)]
        self.networks = nn.ModuleList(experts.stack(num_tasks, d, w) for d, w in zip(dims, levels, strict=False))
        start_TT = torch.full((num_tasks, num_tasks), (1 - keep) / max(num_tasks - 1, 1)).fill_diagonal_(keep)
        self.stitch_LST = nn.Parameter(start_TT.repeat(len(levels), 1, 1))

    def forward(self, x_BD: Tensor) -> Tensor:
        h_TBD = x_BD.unsqueeze(0)
        for level, networks in enumerate(self.networks):
            h_TBD = networks(h_TBD)
            h_TBD = mix(self.stitch_LST[level].unsqueeze(1).expand(-1, x_BD.shape[0], -1), h_TBD)
        return h_TBD.transpose(0, 1)

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """The stitches by level: weight_BST, the same for each row."""
        return [stitch_ST.expand(len(x_BD), -1, -1) for stitch_ST in self.stitch_LST]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """Tasks mix what tasks have."""
        return [GateNames(list(tasks), list(tasks))] * len(self.networks)
