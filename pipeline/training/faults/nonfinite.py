"""Losses and gradients that are not finite: found in their own step, and what to do about them."""

from typing import Literal

import torch
from torch import Tensor

from features.errors import UserError
from pipeline.training.step import StepOutput


class NonfiniteCheck:
    """Losses and gradient norms of recent steps; they stay on the device until `check`.

    Args:
        policy: stop raises at the first bad step; skip keeps it in `bad`, for a rollback.
    Attributes:
        bad: the first step that must not be trained on, and why; None if there was none since the last reset.
    """

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        self.policy = policy
        self.reset()

    @property
    def bad_step(self) -> int | None:
        """The step of `bad`."""
        return self.bad[0] if self.bad else None

    def reset(self) -> None:
        """Forgets everything, as after a rollback."""
        self.bad: tuple[int, str] | None = None
        self._losses: list[tuple[int, Tensor, Tensor]] = []  # step, rows whose loss is not finite, their row_ids
        self._norms: list[tuple[int, Tensor]] = []  # step, the largest gradient norm

    def record_losses(self, step: int, output: StepOutput) -> None:
        """Records a step's losses, those of unobserved labels too: a gradient of 0 times infinity is not 0."""
        self._losses.append((step, ~output.loss_BT.isfinite().all(1), output.row_id_B))

    def record_grad_norm(self, step: int, norm: Tensor) -> None:
        """Records the largest norm of a step's gradients."""
        self._norms.append((step, norm))

    def check(self, epoch: int) -> None:
        """Looks through what was recorded since the last check; on a GPU this waits for the device.

        Raises:
            UserError: a loss or gradient is not finite, and the policy is stop.
        """
        if (found := self._first_bad()) is None or self.bad:
            return
        step, what = found
        line = f"step {step}, epoch {epoch}: {what}."
        if self.policy == "stop":
            raise UserError(
                f"{line} Earlier checkpoints are kept. Lower train.dense.lr or train.tables.lr, set train.clip_norm, correct "
                "these rows, or skip such batches with train.nonfinite=skip."
            )
        self.bad = step, line

    def _first_bad(self) -> tuple[int, str] | None:
        losses, norms = self._losses, self._norms
        self._losses, self._norms = [], []
        flags = [torch.stack([bad_B.any() for _, bad_B, _ in losses])] if losses else []
        flags += [~torch.stack([norm for _, norm in norms]).isfinite()] if norms else []
        if not flags or not torch.cat(flags).any():
            return None
        bad = [(step, _rows(row_id_B[bad_B])) for step, bad_B, row_id_B in losses if bad_B.any()]
        bad += [(s, "a gradient is not finite, though the losses are") for s, norm in norms if not norm.isfinite()]
        return min(bad, key=lambda found: found[0])  # of one step the loss, which comes first


def _rows(row_id_N: Tensor) -> str:
    some = ", ".join(map(str, row_id_N[:3].tolist()))
    return f"the loss of {len(row_id_N)} rows of the batch is not finite, row_id {some}"
