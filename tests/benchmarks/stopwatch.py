"""Where a step's time goes: a stopwatch that is in one part at a time, and the hooks that tell it which in a trainer."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen as TableKernel,
)
from torch import Tensor, nn

from pipeline.training.trainer import Trainer

DATA = "waiting for data"
LOOKUP = "tables: forward"
UPDATE = "tables: backward and update"
RANKS = "all-to-all and waiting for ranks"
DENSE = "dense part: forward, loss, backward"
OPTIMISER = "dense part: optimiser"
REST = "the rest"
PARTS = (DATA, LOOKUP, UPDATE, RANKS, DENSE, OPTIMISER, REST)


class Stopwatch:
    """Seconds by part; to enter one pauses the one that it is entered from."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.open = clock, [REST]
        self.gradient = 0.0  # when the last gradient came, on the clock
        self.restart()

    def restart(self) -> None:
        """From 0, in the parts that are open."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.since = self.clock()

    def enter(self, part: str) -> None:
        """Begins a part."""
        self._note(self.open[-1])
        self.open.append(part)

    def leave(self) -> None:
        """Ends the last one begun."""
        self._note(self.open.pop())

    def move(self, before: str, after: str, seconds: float) -> None:
        """Books time under another part."""
        self.seconds[before] -= seconds
        self.seconds[after] += seconds

    def read(self) -> dict[str, float]:
        """Seconds by part until now; they sum to the time since the start."""
        self._note(self.open[-1])
        return dict(self.seconds)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """A block that belongs to a part."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time that of a part."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return function(*args, **kwargs)

        return run

    def _note(self, part: str) -> None:
        now = self.clock()
        self.seconds[part] += now - self.since
        self.since = now


def attach(trainer: Trainer, watch: Stopwatch) -> None:
    """Has a trainer on CPU tell a stopwatch what it does; nothing of the step is replaced, only wrapped."""
    learner = trainer.learner
    trainer.loader.batches = _timed_batches(trainer.loader.batches, watch)
    learner.model.forward = watch.timed(DENSE, learner.model.forward)
    learner.ranker.embedded = watch.timed(LOOKUP, learner.ranker.embedded)
    for name in ("step", "zero_grad"):
        setattr(learner.optimizer, name, watch.timed(OPTIMISER, getattr(learner.optimizer, name)))
    dist.Work.wait = watch.timed(RANKS, dist.Work.wait)
    # Not a hook on modules: TorchRec keeps the kernels of sharded tables where model.modules() does not look.
    TableKernel.forward = _timed_kernel(TableKernel.forward, watch)
    _time_backward(learner.model, watch)


def _timed_batches(batches: Callable[..., Iterator[Any]], watch: Stopwatch) -> Callable[..., Iterator[Any]]:
    @wraps(batches)
    def timed(*args: Any) -> Iterator[Any]:
        made = batches(*args)
        while True:
            with watch.within(DATA):
                batch = next(made, None)
            if batch is None:
                return
            yield batch

    return timed


def _timed_kernel(forward: Callable[..., Tensor], watch: Stopwatch) -> Callable[..., Tensor]:
    """The same; when the graph comes to its derivative, which also updates the tables, the stopwatch is told."""

    def end(*_: Any) -> None:
        watch.leave()
        watch.gradient = watch.since

    @wraps(forward)
    def timed(*args: Any, **kwargs: Any) -> Tensor:
        output = forward(*args, **kwargs)
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: watch.enter(UPDATE))
            output.grad_fn.register_hook(end)
        return output

    return timed


def _time_backward(model: nn.Module, watch: Stopwatch) -> None:
    """It is the dense part's; on several ranks its end, once the last gradient is there, waits for averages over them."""

    def note(_: Tensor) -> None:
        watch.gradient = watch.clock()

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(note)
    backward = torch.Tensor.backward

    @wraps(backward)
    def timed(*args: Any, **kwargs: Any) -> None:
        with watch.within(DENSE):
            backward(*args, **kwargs)
        if dist.get_world_size() > 1:
            watch.move(DENSE, RANKS, watch.since - watch.gradient)

    torch.Tensor.backward = timed
