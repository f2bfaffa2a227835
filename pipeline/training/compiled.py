"""`train.compile`: the dense part and the losses of its rows compiled to few kernels, applied to a step from outside."""

# Shapes: B rows, E width of all embeddings.

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from features.batch import Batch
from features.errors import UserError
from pipeline.training.step import LossesOfRows, TrainStep

COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")  # any of which builds what torch.compile writes


def compiled(step: TrainStep, mode: str) -> Callable[[Tensor, Batch], LossesOfRows]:
    """`step.row_losses` as one graph, compiled in the first step.

    A method is compiled and no module, so that names in a checkpoint are the same with and without. Random draws are still a
    function of seed and step, but others than without.

    Args:
        mode: of torch.compile. "reduce-overhead" replays the kernels as CUDA graphs: what it returns is overwritten in the next
            step.
    Raises:
        UserError: CUDA graphs of a fusion whose shapes vary, or no compiler on this machine.
    """
    if mode == "reduce-overhead" and (reason := step.ranker.fusion.varying):
        raise UserError(f"train.compile={mode}: this fusion {reason}: set train.compile=default")
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), os.environ.get("CXX", "c++"), *COMPILERS))):
        raise UserError(f"train.compile={mode}: this machine has no C compiler: install gcc, or set train.compile=null")
    run: Callable[[Tensor, Batch], LossesOfRows] = torch.compile(
        step.row_losses, mode=mode, fullgraph=True, dynamic=False
    )
    if mode != "reduce-overhead":
        return run

    def next_step(embedding_BE: Tensor, batch: Batch) -> LossesOfRows:
        torch.compiler.cudagraph_mark_step_begin()
        rows = run(embedding_BE, batch)
        # What checks of this step read some steps later.
        return LossesOfRows(rows.loss_BT, rows.shown_BT.clone(), rows.penalty_B)

    return next_step
