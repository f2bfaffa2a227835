"""Rows of managed tables: a row that another id gets starts afresh."""

# Shapes: N rows that change hands, D width of a table.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from features.fit.encoders import UNKNOWN
from models.ranker import Ranker, table_weights
from pipeline.torch_compat import ShardedTensor
from pipeline.training.parallel.shard import local_parts
from pipeline.training.state_names import in_step


@dataclass(frozen=True)
class _Part:
    """A part of a table's weights or momenta on this rank: rows from `row` on, of weights the columns from `column` on."""

    tensor: Tensor
    row: int
    column: int

    def write_rows(self, row_N: Tensor, value_D: Tensor) -> None:
        """Overwrites those of the rows that this part has."""
        own_N = row_N[(row_N >= self.row) & (row_N < self.row + len(self.tensor))] - self.row
        columns = self.tensor[0].numel()
        value = value_D[self.column : self.column + columns].reshape(self.tensor.shape[1:])
        self.tensor[own_N] = value.to(self.tensor.dtype)


class ManagedRows:
    """Resets rows of managed tables, wherever a plan has put them: the next id inherits nothing of the last one.

    Args:
        ranker: with its tables placed.
        state: parts `model` and `tables` of a checkpoint's state, as views.
    """

    def __init__(self, ranker: Ranker, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.managed = ranker.managed
        self.dims = {table.name: table.embedding_dim for table in ranker.tables}
        self.weights: dict[str, list[_Part]] = {}
        self.momenta: dict[str, list[_Part]] = {}
        self.replicated: set[str] = set()
        for table in self.managed.maps if self.managed else ():
            name = table_weights(ranker)[table]
            weight = state["model"][name]
            momenta = state["tables"].get(in_step(name), {}).values()
            self.weights[table] = _parts(weight)
            self.momenta[table] = [part for momentum in momenta for part in _parts(momentum)]
            if not isinstance(weight, ShardedTensor):
                self.replicated.add(table)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Gives rows to the new ids of a step, after its update; all ranks call it.

        A row starts as a copy of the row of unknown ids, and without momentum.

        Args:
            step: from 1.
        """
        if self.managed is None:
            return
        for table, row_N in self.managed.admit(step).items():
            if len(row_N):
                start_D = self._unknown(table, row_N.device)
                for part in self.weights[table]:
                    part.write_rows(row_N, start_D)
                for part in self.momenta[table]:
                    part.write_rows(row_N, torch.zeros_like(start_D))

    def _unknown(self, table: str, device: torch.device) -> Tensor:
        """The row of unknown ids, gathered from the ranks that have it or some of its columns."""
        if table in self.replicated:
            return self.weights[table][0].tensor[UNKNOWN].clone()
        start_D = torch.zeros(self.dims[table], device=device)
        for part in self.weights[table]:
            if part.row <= UNKNOWN < part.row + len(part.tensor):
                start_D[part.column : part.column + part.tensor.shape[1]] = part.tensor[UNKNOWN - part.row]
        if dist.get_world_size() > 1:
            dist.all_reduce(start_D)
        return start_D


def _parts(tensor: Tensor | ShardedTensor) -> list[_Part]:
    found = local_parts(tensor)
    return [_Part(local.detach(), offsets[0], sum(offsets[1:])) for local, offsets in found if len(local)]
