"""Losses and gradients that are not finite, on a CPU and on a device whose numbers arrive later."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from tiny_training import LateDevice
from torch import Tensor

from features.errors import UserError
from pipeline.training.faults import consensus
from pipeline.training.faults.consensus import Consensus
from pipeline.training.faults.nonfinite import MOST_PENDING, NonfiniteCheck
from pipeline.training.step import StepOutput

GOOD = torch.tensor(1.0)


def output(*losses: float) -> StepOutput:
    """Of two rows and two tasks. Rows are 70 and 71."""
    loss_BT = torch.tensor([[0.5, losses[0]], [0.1, losses[-1]]])
    return StepOutput(loss_BT, loss_BT, loss_BT > 0, loss_BT, torch.tensor([70, 71]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_on_a_cpu_a_loss_is_found_before_the_backward_and_a_gradient_before_the_update(bad: float) -> None:
    check = NonfiniteCheck("skip")
    check.record_losses(4, output(0.2, 0.3))
    assert check.check(0, wait=False) is None
    check.record_grad_norm(4, torch.tensor(bad))
    assert check.check(0, wait=False) == 4
    assert check.bad == (4, "step 4, epoch 0: a gradient is not finite, though the losses are.")
    check.reset()
    check.record_losses(5, output(0.2, bad))
    assert check.check(1, wait=False) == 5
    assert check.bad == (5, "step 5, epoch 1: the loss of 1 rows of the batch is not finite, row_id 71.")
    check.record_losses(6, output(bad))
    assert check.check(1) == 5


def test_a_loss_of_a_device_is_found_when_it_arrives_and_not_before() -> None:
    device = LateDevice(delay=4)  # two steps
    check, found = NonfiniteCheck("skip", device.send), []
    for step in range(1, 12):
        check.record_losses(step, output(float("nan") if step == 6 else 0.2))
        check.record_grad_norm(step, GOOD)
        found.append(check.check(0, wait=False))
    assert found == [None] * 7 + [6] * 4
    assert check.bad
    assert "row_id 70, 71" in check.bad[1]
    assert device.waits == 0


def test_a_step_that_waits_for_its_device_knows_all_and_stops_a_run_that_skips_nothing() -> None:
    check = NonfiniteCheck("stop", LateDevice(delay=100).send)
    check.record_losses(6, output(0.2))
    check.record_grad_norm(6, torch.tensor(float("inf")))
    assert check.check(0, wait=False) is None
    with pytest.raises(UserError, match=r"step 6, epoch 0: a gradient is not finite"):
        check.check(0)


def test_what_is_kept_of_steps_whose_numbers_do_not_arrive_is_bounded() -> None:
    device = LateDevice(delay=10**6)
    check, kept = NonfiniteCheck("skip", device.send), weakref.WeakSet[Tensor]()
    for step in range(1, 101):
        made = output(float("nan") if step == 50 else 0.2)
        kept.add(made.loss_BT)
        check.record_losses(step, made)
        check.record_grad_norm(step, GOOD)
        assert check.check(0, wait=False) == (50 if step >= 50 + MOST_PENDING // 2 else None)
        del made
        gc.collect(0)
        assert len(kept) <= MOST_PENDING // 2 + 1


def other_rank(monkeypatch: pytest.MonkeyPatch, messages: list[list[int]]) -> Consensus:
    """A consensus with a second rank, which sends these messages."""

    class Done:
        def wait(self) -> None: ...

    def all_reduce(message: Tensor, *_: object, **__: object) -> Done:
        message.copy_(torch.minimum(message, torch.tensor(messages.pop(0)).view_as(message)))
        return Done()

    monkeypatch.setattr(consensus.dist, "all_reduce", all_reduce)
    group: dist.ProcessGroup = object()  # type: ignore[assignment]
    return Consensus(group)


def knows(at_once: int | None, after_waiting: int | None) -> Callable[[bool], int | None]:
    return lambda wait: after_waiting if wait else at_once


def test_the_first_bad_step_of_all_ranks_is_left_out_also_where_a_later_one_arrives_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never = 2**63 - 1
    agreed = other_rank(monkeypatch, [[1, never, 1], [1, never, 1], [4]])
    assert agreed.agree(False, False, knows(5, 5), read=False, save=False).bad_step is None
    assert agreed.agree(False, False, knows(5, 5), read=False, save=False).bad_step == 4


def test_what_a_preempted_run_saves_is_read_first(monkeypatch: pytest.MonkeyPatch) -> None:
    never = 2**63 - 1
    told = other_rank(monkeypatch, [[0, never, 1], [0, never, 1], [never]])
    told.agree(False, False, knows(None, 7), read=False, save=False)
    verdict = told.agree(False, False, knows(None, 7), read=False, save=False)
    assert verdict.stop
    assert verdict.bad_step == 7
    assert Consensus(None).agree(True, False, knows(None, 7), read=False, save=False).bad_step == 7
