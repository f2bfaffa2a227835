"""Whether what a step found can be learnt from: losses and gradients that are not finite, and where they are first."""

import torch
from torch import Tensor

from pipeline.training.step import StepOutput


class Finite:
    """Losses and gradients of some steps; they stay on the device until somebody asks."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self.losses: list[tuple[int, Tensor, Tensor]] = []  # step, which rows' are not finite, their row_ids
        self.gradients: list[tuple[int, Tensor]] = []  # step, the largest norm

    def look(self, step: int, output: StepOutput) -> None:
        """Notes a step's losses, unobserved labels' too: a gradient of 0 times infinity is not 0."""
        self.losses.append((step, ~output.loss_BT.isfinite().all(1), output.row_id_B))

    def feel(self, step: int, largest: Tensor) -> None:
        """Notes the largest norm of a step's gradients."""
        self.gradients.append((step, largest))

    def first_bad(self) -> tuple[int, str] | None:
        """The first step since the last call that cannot be learnt from, and what is wrong with it; None if all can."""
        losses, gradients = self.losses, self.gradients
        self.forget()
        flags = [torch.stack([bad_B.any() for _, bad_B, _ in losses])] if losses else []
        flags += [~torch.stack([largest for _, largest in gradients]).isfinite()] if gradients else []
        if not flags or not torch.cat(flags).any():
            return None
        bad = [(step, _of_rows(row_id_B[bad_B])) for step, bad_B, row_id_B in losses if bad_B.any()]
        bad += [(s, "a gradient is not finite, though the losses are") for s, norm in gradients if not norm.isfinite()]
        return min(bad, key=lambda found: found[0])  # of one step the loss, which is named first


def _of_rows(row_id_N: Tensor) -> str:
    some = ", ".join(map(str, row_id_N[:3].tolist()))
    return f"the loss of {len(row_id_N)} rows of the batch is not finite, row_id {some}"
