"""Tensors in main memory piece by piece: those of a GPU pass through pinned memory of a bounded size."""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_BYTES = 64 << 20  # a power of two, to which the allocator of pinned memory rounds up


class Staging:
    """Two pieces of pinned memory: one is filled from a GPU while the other is read.

    A whole tensor is never pinned, since the allocator would take up to twice its bytes and keep them. No memory is taken
    before the first tensor of a GPU.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """The numbers of a tensor in their order, as contiguous tensors in main memory.

        One is valid until the next is asked for.
        """
        views = cut(tensor.detach())
        if not on_gpu(tensor):
            yield from (view.contiguous() for view in views)
            return
        self.buffers = self.buffers or [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        sent: list[tuple[Tensor, torch.cuda.Event]] = []
        for number, view in enumerate(views):
            sent.append(_send(view, self.buffers[number % 2]))  # while the one before it is read
            if number:
                yield _arrived(*sent.pop(0))
        yield _arrived(*sent.pop())

    def copied(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """A copy of a tensor in ordinary main memory.

        Args:
            into: an earlier copy of it, whose memory is used again.
        """
        if into is None:
            into = torch.empty(tensor.shape, dtype=tensor.dtype)
        if not on_gpu(tensor):
            return into.copy_(tensor.detach())
        for part, piece in zip(cut(into), self.pieces(tensor), strict=True):
            part.copy_(piece)
        return into


def on_gpu(tensor: Tensor) -> bool:
    """Whether the CPU cannot read a tensor."""
    return tensor.device.type != "cpu"


def cut(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most PIECE_BYTES, which hold the numbers of a tensor in their order."""
    if tensor.nbytes <= PIECE_BYTES:
        yield tensor
    elif (rows := PIECE_BYTES // (tensor.nbytes // len(tensor))) > 0:
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from cut(row)


def _send(view: Tensor, buffer: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Begins to copy a view into pinned memory: where it will be, and when."""
    piece = buffer[: view.nbytes].view(view.dtype).view(view.shape)
    piece.copy_(view, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(view.device))
    return piece, arrival


def _arrived(piece: Tensor, arrival: torch.cuda.Event) -> Tensor:
    arrival.synchronize()
    return piece
