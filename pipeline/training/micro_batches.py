"""Micro-batches: the gradients of a large batch in the memory of a small one, the dense part runs over some rows at a time.

Accumulating the gradients of several backward passes would update the tables once a micro-batch, since their optimisers are
fused into the backward, and would make ranks average as often. Here all micro-batches run within one node of the graph,
forward and backward: for everything outside, the tables and the averaging, a step is one pass over the whole batch.
"""

# Shapes: B rows, S rows of a micro-batch, T tasks, E width of all embeddings.

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def loss_by_micro_batches(
    run: Run, embedding_BE: Tensor, parameters: Sequence[nn.Parameter], count: int
) -> tuple[Tensor, Tensor]:
    """A sum over rows and its gradient, with the activations of one micro-batch at a time.

    Args:
        run: from the embeddings of some rows and their place in the batch to the scalar that they add to the sum, and
            their loss_BT. It may depend on `parameters` besides.
        embedding_BE: of all rows.
        parameters: whose gradients are wanted.
        count: of micro-batches; their sizes differ by one row at most.
    Returns: the sum, to differentiate once, and loss_BT of all rows, detached.
    """
    return _MicroBatches.apply(run, count, embedding_BE, *parameters)


class _MicroBatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, count: int, embedding_BE: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        total, losses, embedding_grads = embedding_BE.new_zeros(()), list[Tensor](), list[Tensor]()
        grads: list[Tensor | None] = [None] * len(parameters)
        begin = 0
        for embedding_SE in embedding_BE.tensor_split(min(count, len(embedding_BE))):
            end = begin + len(embedding_SE)
            part, loss_ST, grad_SE, found = _gradients(run, embedding_SE, slice(begin, end), parameters)
            total, begin = total + part, end
            losses.append(loss_ST)
            embedding_grads += [] if grad_SE is None else [grad_SE]
            grads = [_sum(before, grad) for before, grad in zip(grads, found, strict=True)]
        # Frozen tables have no gradient.
        grad_BE = torch.cat(embedding_grads) if embedding_grads else None
        ctx.save_for_backward(grad_BE, *grads)
        loss_BT = torch.cat(losses)
        ctx.mark_non_differentiable(loss_BT)
        return total, loss_BT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if known is None else known * grad for known in ctx.saved_tensors)


def _gradients(
    run: Run, embedding_SE: Tensor, rows: slice, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor | None]]:
    """A micro-batch's part of the sum, its loss_ST, and the gradients of its embeddings and of the parameters."""
    with torch.enable_grad():
        leaf_SE = embedding_SE.detach().requires_grad_()
        part, loss_ST = run(leaf_SE, rows)
        grad_SE, *found = torch.autograd.grad(part, (leaf_SE, *parameters), allow_unused=True)
    return part.detach(), loss_ST.detach(), grad_SE, found


def _sum(before: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return grad if before is None else before if grad is None else before.add_(grad)
