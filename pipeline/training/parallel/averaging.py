"""Gradients of replicated weights averaged over ranks in one message, laid out alike in every step of every attempt."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel


def average_in_one_message(model: nn.Module) -> None:
    """Makes each DDP in the model average all its gradients at once, in the order of its parameters.

    In which order an all-reduce adds up ranks depends on where in a message a number lies. DDP sends its first steps'
    gradients in one message, and lays later ones out by the order in which gradients came: a resumed run would round otherwise
    than an uninterrupted one. Two ranks have one order only. The backward no longer covers a part of the messages.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and dist.get_world_size(module.process_group) > 2:
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            module.register_comm_hook(_Message(trained, module.process_group), _take)


class _Message:
    """The gradients of a step that have come, and the buffers of DDP that wait for their averages."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters, self.group = parameters, group
        self.gradients: dict[Tensor, Tensor] = {}
        self.waiting: list[tuple[Future[Tensor], Tensor]] = []

    def send(self) -> None:
        gradients = [self.gradients[parameter] for parameter in self.parameters if parameter in self.gradients]
        average_N = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(average_N, group=self.group)
        average_N /= dist.get_world_size(self.group)
        for gradient, part in zip(gradients, average_N.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        for future, buffer in self.waiting:
            future.set_result(buffer)
        self.gradients, self.waiting = {}, []


def _take(message: _Message, bucket: dist.GradBucket) -> Future[Tensor]:
    """Adds a bucket of DDP's to the message, which is sent with the last one."""
    averaged: Future[Tensor] = Future()
    message.gradients |= zip(bucket.parameters(), bucket.gradients(), strict=True)  # views of its buffer
    message.waiting.append((averaged, bucket.buffer()))
    if bucket.is_last():
        message.send()
    return averaged
