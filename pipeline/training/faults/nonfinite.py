"""Losses and gradients that are not finite: found in their own step, and what to do about them."""

# Shapes: B rows, T tasks, N rows that are not finite.

import math
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from features.errors import UserError
from pipeline.training.step import StepOutput

MOST_PENDING = 16  # numbers on their way from a GPU, two a step: a host that is further ahead waits for the oldest


class Arrival(Protocol):
    """Of a copy from a device, as torch.cuda.Event."""

    def query(self) -> bool:
        """Whether it is there."""

    def synchronize(self) -> None:
        """Waits until it is there."""


class Pending(NamedTuple):
    """A number of a step that is finite if the step is good.

    Attributes:
        value: on the host, once `arrival` says so; None: at once. rows: loss_BT and row_id_B of a loss, to name its rows.
    """

    step: int
    value: Tensor
    arrival: Arrival | None
    rows: tuple[Tensor, Tensor] | None


def to_host(value: Tensor) -> tuple[Tensor, Arrival | None]:
    """A copy on the host that nothing waits for: of a GPU's tensor in pinned memory, which torch uses again once it is free."""
    if not value.is_cuda:
        return value, None
    copy, arrival = value.to("cpu", non_blocking=True), torch.cuda.Event()
    arrival.record()
    return copy, arrival


class NonfiniteCheck:
    """The largest loss and gradient norm of each step; a GPU's are read when they arrive, a step or two later.

    Args:
        policy: stop raises at the first bad step; skip keeps it in `bad`, for a rollback.
        send: begins to copy a number to the host, as `to_host`.
    Attributes:
        bad: the first step that must not be trained on, and why; None if there was none since the last reset.
    """

    def __init__(
        self,
        policy: Literal["stop", "skip"],
        send: Callable[[Tensor], tuple[Tensor, Arrival | None]] = to_host,
    ) -> None:
        self.policy, self.send = policy, send
        self.reset()

    def reset(self) -> None:
        """Forgets everything, as after a rollback."""
        self.bad: tuple[int, str] | None = None
        self._pending: deque[Pending] = deque()

    def record_losses(self, step: int, output: StepOutput) -> None:
        """Records a step's losses, those of unobserved labels too: a gradient of 0 times infinity is not 0."""
        largest = output.loss_BT.abs().amax()  # NaN if there is one
        self._pending.append(Pending(step, *self.send(largest), (output.loss_BT, output.row_id_B)))

    def record_grad_norm(self, step: int, norm: Tensor) -> None:
        """Records the largest norm of a step's gradients."""
        self._pending.append(Pending(step, *self.send(norm), None))

    def check(self, epoch: int, wait: bool = True) -> int | None:
        """The first bad step, after a look through what was recorded since the last check, in the order of steps.

        Args:
            wait: for all of it, and so for a GPU; else it ends at the first number that has not arrived.
        Raises:
            UserError: a loss or gradient is not finite, and the policy is stop.
        """
        while self._pending:
            first = self._pending[0]
            if first.arrival is not None:
                if wait or len(self._pending) > MOST_PENDING:
                    first.arrival.synchronize()
                elif not first.arrival.query():
                    break
            self._pending.popleft()
            if self.bad or math.isfinite(first.value.item()):
                continue
            line = f"step {first.step}, epoch {epoch}: {_what(first.rows)}."
            if self.policy == "stop":
                raise UserError(
                    f"{line} Earlier checkpoints are kept. Lower train.dense.lr or train.tables.lr, set train.clip_norm, "
                    "correct these rows, or skip such batches with train.nonfinite=skip."
                )
            self.bad = first.step, line
        return self.bad[0] if self.bad else None


def _what(rows: tuple[Tensor, Tensor] | None) -> str:
    if rows is None:
        return "a gradient is not finite, though the losses are"
    loss_BT, row_id_B = rows
    row_id_N = row_id_B[~loss_BT.isfinite().all(1)]
    some = ", ".join(map(str, row_id_N[:3].tolist()))
    return f"the loss of {len(row_id_N)} rows of the batch is not finite, row_id {some}"
