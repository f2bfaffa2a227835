"""Batches copied to a GPU while it computes."""

from collections.abc import Iterator

import torch

from features.batch import Batch


def copied_ahead(batches: Iterator[Batch], device: torch.device, stream: torch.cuda.Stream) -> Iterator[Batch]:
    """The batches on a GPU: the copy of each begins before the step on the one before it, and nothing waits for it but its own.

    Args:
        batches: in page-locked memory; copies from other memory would hold up this thread.
        stream: of the copies, which no step uses.
    """
    steps = torch.cuda.current_stream(device)
    ready: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = batch.to(device, non_blocking=True)
        if ready is not None:
            yield ready
        steps.wait_stream(stream)  # what a step does from here on
        copied.record_stream(steps)  # a later copy must not take its memory while a step may still read it
        ready = copied
    if ready is not None:
        yield ready
