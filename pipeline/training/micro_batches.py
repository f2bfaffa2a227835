"""The gradients of a large batch in the memory of a small one: the dense part runs over slices of rows, one by one.

Adding up the gradients of several backward passes would update the tables once a slice, since their optimisers are fused
into the backward, and would make ranks average once a slice. Here all slices run within one node of the graph, forward and
backward: to everything outside, to the tables and to the averaging, a step is one pass over the whole batch.
"""

# Shapes: B rows, S rows of a slice, T tasks, E width of all embeddings.

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def loss_by_slices(
    run: Run, embedding_BE: Tensor, parameters: Sequence[nn.Parameter], count: int
) -> tuple[Tensor, Tensor]:
    """A sum over rows and its gradient, with the activations of one slice of rows at a time.

    Args:
        run: from the embeddings of some rows and their place in the batch to the scalar that they add to the sum, and
            their loss_BT. It may depend on `parameters` besides.
        embedding_BE: of all rows.
        parameters: whose gradients are wanted.
        count: of slices; they differ by one row at most.
    Returns: the sum, to differentiate once, and loss_BT of all rows, detached.
    """
    return _Slices.apply(run, count, embedding_BE, *parameters)


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, count: int, embedding_BE: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        total, losses, embedding_slopes = embedding_BE.new_zeros(()), list[Tensor](), list[Tensor]()
        slopes: list[Tensor | None] = [None] * len(parameters)
        begin = 0
        for embedding_SE in embedding_BE.tensor_split(min(count, len(embedding_BE))):
            end = begin + len(embedding_SE)
            part, loss_ST, slope_SE, found = _differentiated(run, embedding_SE, slice(begin, end), parameters)
            total, begin = total + part, end
            losses.append(loss_ST)
            embedding_slopes += [] if slope_SE is None else [slope_SE]
            slopes = [_added(before, slope) for before, slope in zip(slopes, found, strict=True)]
        # Frozen tables have no gradient, in no slice.
        slope_BE = torch.cat(embedding_slopes) if embedding_slopes else None
        ctx.save_for_backward(slope_BE, *slopes)
        loss_BT = torch.cat(losses)
        ctx.mark_non_differentiable(loss_BT)
        return total, loss_BT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if known is None else known * slope for known in ctx.saved_tensors)


def _differentiated(
    run: Run, embedding_SE: Tensor, rows: slice, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor | None]]:
    """A slice's part of the sum, its loss_ST, and the gradients of its embeddings and of the parameters."""
    with torch.enable_grad():
        leaf_SE = embedding_SE.detach().requires_grad_()
        part, loss_ST = run(leaf_SE, rows)
        slope_SE, *found = torch.autograd.grad(part, (leaf_SE, *parameters), allow_unused=True)
    return part.detach(), loss_ST.detach(), slope_SE, found


def _added(before: Tensor | None, slope: Tensor | None) -> Tensor | None:
    return slope if before is None else before if slope is None else before.add_(slope)
