"""How a gated model mixes its experts: mean weights per level, as numbers and as a heat map (AdaTT, figure 3)."""

# Shapes: B rows, U units (tasks at the last level), E experts.

from types import TracebackType
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from features.batch import Batch
from models.fusion.fusion import Fusion

ROWS = 65_536  # of a split that are looked at: a mean needs no more


class GateMeans:
    """Mean gate weights over the first rows of a split, padding apart. Use it as a context around the ranker's passes.

    Args:
        fusion: what is looked at.
    """

    def __init__(self, fusion: Fusion) -> None:
        self.fusion = fusion
        self.rows = 0
        self.sums: list[Tensor] = []

    def __enter__(self) -> "GateMeans":
        self.hook = self.fusion.register_forward_pre_hook(self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hook.remove()

    def _remember(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.x = arguments[0]

    def update(self, batch: Batch) -> None:
        """Adds the rows of the batch that the fusion has just seen."""
        if self.rows >= ROWS:
            return
        real_B = batch.row_id_B >= 0
        sums = [weight_BUE[real_B].double().sum(0) for weight_BUE in self.fusion.gates(self.x)]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.rows += int(real_B.sum())

    def means(self) -> list[list[list[float]]]:
        """Per level its U x E mean weights, [] for a model without gates."""
        return [(sum_UE / max(self.rows, 1)).tolist() for sum_UE in self.sums]


def picture(means: list[list[list[float]]], tasks: list[str]) -> Figure:
    """A heat map a level: units down (tasks by name where there are as many or one more, the shared unit), experts across."""
    figure = Figure(figsize=(1 + 4.4 * len(means), 3.2), layout="constrained")
    for level, (axes, mean_UE) in enumerate(zip(figure.subplots(1, len(means), squeeze=False)[0], means, strict=True)):
        units, experts = len(mean_UE), len(mean_UE[0])
        names = [*tasks, "shared"][:units] if 0 <= units - len(tasks) <= 1 else [str(u) for u in range(units)]
        image = axes.imshow(torch.tensor(mean_UE).numpy(), aspect="auto", cmap="viridis")
        axes.set(title=f"level {level + 1}", xlabel="expert", yticks=range(units), yticklabels=names)
        axes.set_xticks(range(experts) if experts <= 16 else range(0, experts, experts // 8))
        if units * experts <= 64:
            top = max(max(row) for row in mean_UE)
            for u, row in enumerate(mean_UE):
                for e, weight in enumerate(row):
                    axes.text(e, u, f"{weight:.2f}", ha="center", va="center", size=8,
                              color="black" if weight > top / 2 else "white")  # fmt: skip
        figure.colorbar(image, ax=axes)
    return figure
