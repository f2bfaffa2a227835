"""Rows of managed tables: a row that another id gets starts afresh."""

# Shapes: N rows that change hands, D width of a table.

from collections.abc import Mapping, Sequence
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

    @property
    def range(self) -> tuple[int, int]:
        """Its first row, and the one after its last."""
        return self.row, self.row + len(self.tensor)

    def write_rows(self, own_N: Tensor, value_D: Tensor) -> None:
        """Overwrites rows, numbered from its first."""
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
        changed = {table: row_N for table, row_N in self.managed.admit(step).items() if len(row_N)}
        starts = self._unknown(changed)
        for (table, row_N), start_D in zip(changed.items(), starts, strict=True):
            own: dict[tuple[int, int], Tensor] = {}  # of each range of rows, the host waits for their number once
            for parts, value_D in ((self.weights, start_D), (self.momenta, torch.zeros_like(start_D))):
                for part in parts[table]:
                    first, end = part.range
                    if part.range not in own:
                        own[part.range] = row_N[(row_N >= first) & (row_N < end)] - first
                    part.write_rows(own[part.range], value_D)

    def _unknown(self, changed: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The tables' rows of unknown ids, gathered in one message from the ranks that have them or some of their columns."""
        if not changed:
            return []
        starts = [torch.zeros(self.dims[table], device=row_N.device) for table, row_N in changed.items()]
        for table, start_D in zip(changed, starts, strict=True):
            for part in self.weights[table]:
                if part.row <= UNKNOWN < part.range[1] and (table not in self.replicated or dist.get_rank() == 0):
                    start_D[part.column : part.column + part.tensor.shape[1]] = part.tensor[UNKNOWN - part.row]
        row = torch.cat(starts)
        if dist.get_world_size() > 1:
            dist.all_reduce(row)
        return row.split([len(start_D) for start_D in starts])


def _parts(tensor: Tensor | ShardedTensor) -> list[_Part]:
    found = local_parts(tensor)
    return [_Part(local.detach(), offsets[0], sum(offsets[1:])) for local, offsets in found if len(local)]
