"""Task affinity: what a step on one task's loss does to another's (Fifty et al., NeurIPS 2021, section 3, "TAG").

Z_ij = 1 - L_j(after a step on the loss of i) / L_j(before), on the batch of the step: above 0 the step helps task j.

The step changes what tasks share: the tables and all dense parameters below the towers (one tower of all tasks included). It
is a plain gradient step with the run's learning rates, without the optimiser's state, loss weights, penalties and dropout.
"""

# Shapes: B rows of a batch, T tasks, M batches, V rows of a table that a batch uses.

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from features.batch import Batch
from models.ranker import Ranker, is_table


def affinities(
    ranker: Ranker, batches: Iterable[Batch], dense_rate: float, table_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Z of every pair of tasks, the mean over batches and its standard error; row i: the step is on task i.

    Args:
        ranker: in evaluation mode, tables not sharded and in fp32; its weights are the same afterwards.
        dense_rate, table_rate: learning rates of what is shared.
    Returns: z_TT and error_TT, NaN where no batch has rows of both tasks or no loss of task j is above 0 (the error with fewer
        than two batches).
    """
    with _sparse_gradients(ranker):
        z_MTT = np.stack([_of_batch(ranker, batch, dense_rate, table_rate) for batch in batches])
    count_TT = np.isfinite(z_MTT).sum(0)
    known_MTT = np.nan_to_num(z_MTT)
    with np.errstate(invalid="ignore", divide="ignore"):
        z_TT = known_MTT.sum(0) / np.where(count_TT > 0, count_TT, np.nan)
        squares_TT = np.where(np.isfinite(z_MTT), (z_MTT - z_TT) ** 2, 0.0).sum(0)
        return z_TT, np.sqrt(squares_TT / np.where(count_TT > 1, count_TT - 1, np.nan) / count_TT)


def _of_batch(ranker: Ranker, batch: Batch, dense_rate: float, table_rate: float) -> np.ndarray:
    """z_TT of one batch, NaN where a task has no rows or its loss is not above 0."""
    shared = _shared_parameters(ranker)
    rates = [table_rate if is_table(name) else dense_rate for name in shared]
    parameters = list(shared.values())
    before_T = _losses(ranker, batch)
    known_T = before_T.detach() > 0
    # All gradients come before the first step: they are of the weights that it changes.
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if known else None
        for loss, known in zip(before_T, before_T.isfinite(), strict=True)
    ]
    z_TT = np.full((len(before_T), len(before_T)), np.nan)
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            with torch.no_grad(), _after_step(parameters, gradient, rates):
                z_T = 1 - _losses(ranker, batch) / before_T
            z_TT[i] = torch.where(known_T, z_T, torch.nan).cpu().numpy()
    return z_TT


def _losses(ranker: Ranker, batch: Batch) -> Tensor:
    """mean_T: each task's loss in float64 over the observed rows by weight, NaN where there are none."""
    batch = ranker.row_losses.training_batch(batch)
    loss_BT, _ = ranker.row_losses(ranker.outputs(batch), batch.label_BT, batch.observed_BT)
    weight_BT = (batch.weight_BT * batch.observed_BT).double()
    total_T = weight_BT.sum(0)
    # Not 0 / 0: its gradient is NaN, and would be added to those of the other tasks.
    mean_T = (loss_BT.double() * weight_BT).sum(0) / torch.where(total_T > 0, total_T, 1.0)
    return torch.where(total_T > 0, mean_T, torch.nan)


def _shared_parameters(ranker: Ranker) -> dict[str, nn.Parameter]:
    """The trained parameters that tasks share, by name."""
    own = ("calibration.",) if ranker.fusion.shared_tower else ("calibration.", "towers.")
    return {name: p for name, p in ranker.named_parameters() if p.requires_grad and not name.startswith(own)}


@contextmanager
def _after_step(
    parameters: list[nn.Parameter], gradients: tuple[Tensor | None, ...], rates: list[float]
) -> Iterator[None]:
    """Within: the parameters after a gradient step. Of tables only the rows that a batch uses are copied and written."""
    undo: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for parameter, gradient, rate in zip(parameters, gradients, rates, strict=True):
        if gradient is None:
            continue
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            row_V = gradient.indices()[0]
            undo.append((parameter, row_V, parameter[row_V].clone()))
            parameter.index_add_(0, row_V, gradient.values(), alpha=-rate)
        else:
            undo.append((parameter, None, parameter.clone()))
            parameter.add_(gradient, alpha=-rate)
    try:
        yield
    finally:
        for changed, rows, value in undo:
            if rows is None:
                changed.copy_(value)
            else:
                changed.index_copy_(0, rows, value)


@contextmanager
def _sparse_gradients(ranker: Ranker) -> Iterator[None]:
    """Within: gradients of tables hold the rows of a batch alone; others would be as large as the tables."""
    tables = [module for module in ranker.modules() if isinstance(module, nn.EmbeddingBag | nn.Embedding)]
    were = [table.sparse for table in tables]
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table, was in zip(tables, were, strict=True):
            table.sparse = was
