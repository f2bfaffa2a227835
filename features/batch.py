"""From Arrow to tensors: decoded rows, and the Batch that a model takes. Nothing here loops over rows."""

# Shapes: N rows, B rows of a batch, F features of one id, G features of a list of ids, D dense columns, T tasks, V ids of all
# lists of a feature, C keys.

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from features.kinds.base import floats
from features.schema.schema import Schema

PADDING = -1  # row_id of rows that only fill a batch up


@dataclass
class Batch(Pipelineable):
    """What a model sees of B rows.

    Attributes:
        sparse: ids, keys in the order of `Schema.sparse`, stride B.
        dense_BD: float32.
        label_BT: float32, 0 where not observed.
        observed_BT: bool, whether the label counts for the task.
        weight_BT: float32, the row's weight; 0 in rows that are padding.
        row_id_B: int64, PADDING in rows that are padding.
        key_BC: int64, what evaluation groups rows by (pipeline.evaluation.row_keys); no columns where it is not asked for.
    """

    sparse: KeyedJaggedTensor
    dense_BD: Tensor
    label_BT: Tensor
    observed_BT: Tensor
    weight_BT: Tensor
    row_id_B: Tensor
    key_BC: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from reuse until the stream has finished with it."""
        for f in fields(self):
            getattr(self, f.name).record_stream(stream)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass
class Rows:
    """N decoded rows, column by column.

    Attributes:
        id_FN: int64.
        length_GN: int64, ids of each list.
        lists: per feature the ids of its lists, int64 of shape (V,), row after row.
        dense_ND, label_NT: float32; label is NaN where not observed.
        weight_N: float32. row_id_N: int64. key_NC: see Batch.
    """

    id_FN: Tensor
    length_GN: Tensor
    lists: list[Tensor]
    dense_ND: Tensor
    label_NT: Tensor
    weight_N: Tensor
    row_id_N: Tensor
    key_NC: Tensor

    def __len__(self) -> int:
        return len(self.row_id_N)

    @classmethod
    def decode(cls, table: pa.Table, schema: Schema) -> "Rows":
        """Decodes rows of a dataset; numeric columns are viewed where Arrow holds them, then stacked once."""

        numbers = [part for name in schema.dense_ranges for part in schema.features[name].decode(name, table)]
        lists = [table[name].combine_chunks() for name in schema.lists]
        offsets = [np.asarray(column.offsets, dtype=np.int64) for column in lists]
        empty = np.zeros((0, table.num_rows), np.int64)
        return cls(
            id_FN=torch.from_numpy(np.stack([_ids(table[name]) for name in schema.single]) if schema.single else empty),
            length_GN=torch.from_numpy(np.stack([np.diff(o) for o in offsets]) if lists else empty.copy()),
            lists=[
                torch.from_numpy(column.values.to_numpy()[o[0] : o[-1]].copy())
                for column, o in zip(lists, offsets, strict=True)
            ],
            dense_ND=_side_by_side(numbers, table.num_rows),
            label_NT=_side_by_side([floats(table[f"label.{task}"]) for task in schema.tasks], table.num_rows),
            weight_N=torch.from_numpy(floats(table["weight"]).copy()),
            row_id_N=torch.from_numpy(_ids(table["row_id"]).copy()),
            key_NC=torch.zeros(table.num_rows, 0, dtype=torch.int64),
        )

    @classmethod
    def blank(cls, schema: Schema, rows: int) -> "Rows":
        """Rows of weight 0, in place of some that cannot be read."""
        return cls(
            id_FN=torch.zeros(len(schema.single), rows, dtype=torch.int64),
            length_GN=torch.zeros(len(schema.lists), rows, dtype=torch.int64),
            lists=[torch.zeros(0, dtype=torch.int64) for _ in schema.lists],
            dense_ND=torch.zeros(rows, schema.dense_width),
            label_NT=torch.full((rows, len(schema.tasks)), torch.nan),
            weight_N=torch.zeros(rows),
            row_id_N=torch.full((rows,), PADDING),
            key_NC=torch.zeros(rows, 0, dtype=torch.int64),
        )

    def take(self, index_N: Tensor) -> "Rows":
        """The rows at `index_N`, in that order."""
        length_GN = self.length_GN[:, index_N]
        return Rows(
            id_FN=self.id_FN[:, index_N],
            length_GN=length_GN,
            lists=[
                _take_ragged(values, before, index_N, after)
                for values, before, after in zip(self.lists, self.length_GN, length_GN, strict=True)
            ],
            dense_ND=self.dense_ND[index_N],
            label_NT=self.label_NT[index_N],
            weight_N=self.weight_N[index_N],
            row_id_N=self.row_id_N[index_N],
            key_NC=self.key_NC[index_N],
        )

    def slice(self, start: int, stop: int) -> "Rows":
        """Rows start .. stop - 1, as views."""
        bounds = [(int(length[:start].sum()), int(length[:stop].sum())) for length in self.length_GN]
        return Rows(
            id_FN=self.id_FN[:, start:stop],
            length_GN=self.length_GN[:, start:stop],
            lists=[values[a:b] for values, (a, b) in zip(self.lists, bounds, strict=True)],
            dense_ND=self.dense_ND[start:stop],
            label_NT=self.label_NT[start:stop],
            weight_N=self.weight_N[start:stop],
            row_id_N=self.row_id_N[start:stop],
            key_NC=self.key_NC[start:stop],
        )

    @staticmethod
    def concat(parts: Sequence["Rows"]) -> "Rows":
        """The rows of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Rows(
            id_FN=torch.cat([p.id_FN for p in parts], 1),
            length_GN=torch.cat([p.length_GN for p in parts], 1),
            lists=[torch.cat(values) for values in zip(*(p.lists for p in parts), strict=True)],
            dense_ND=torch.cat([p.dense_ND for p in parts]),
            label_NT=torch.cat([p.label_NT for p in parts]),
            weight_N=torch.cat([p.weight_N for p in parts]),
            row_id_N=torch.cat([p.row_id_N for p in parts]),
            key_NC=torch.cat([p.key_NC for p in parts]),
        )

    def batch(self, schema: Schema, size: int) -> Batch:
        """A batch of `size` rows: these, then padding without ids, labels and weight."""
        pad, (num_ids, rows) = size - len(self), self.id_FN.shape
        present_FB = torch.zeros(num_ids, size, dtype=torch.int64)
        present_FB[:, :rows] = 1
        length_KB = torch.cat([present_FB, torch.nn.functional.pad(self.length_GN, (0, pad))])
        observed_NT = ~self.label_NT.isnan()
        weight_BT = torch.nn.functional.pad(self.weight_N, (0, pad)).unsqueeze(1).expand(-1, len(schema.tasks))
        return Batch(
            sparse=KeyedJaggedTensor(
                keys=list(schema.sparse),
                values=torch.cat([self.id_FN.reshape(-1), *self.lists]),
                lengths=length_KB.reshape(-1),
                stride=size,
            ),
            dense_BD=torch.nn.functional.pad(self.dense_ND, (0, 0, 0, pad)),
            label_BT=torch.nn.functional.pad(self.label_NT.nan_to_num(0.0), (0, 0, 0, pad)),
            observed_BT=torch.nn.functional.pad(observed_NT, (0, 0, 0, pad)),
            weight_BT=weight_BT.contiguous(),
            row_id_B=torch.nn.functional.pad(self.row_id_N, (0, pad), value=PADDING),
            key_BC=torch.nn.functional.pad(self.key_NC, (0, 0, 0, pad)),
        )


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.int64, copy=False)


def _side_by_side(parts: Sequence[np.ndarray], rows: int) -> Tensor:
    """Arrays of shape (N,) or (N, K) as one of shape (N, D), D = 0 where there are none."""
    return torch.from_numpy(np.column_stack(parts) if parts else np.zeros((rows, 0), np.float32))


def _take_ragged(value_V: Tensor, length_N: Tensor, index_M: Tensor, length_M: Tensor) -> Tensor:
    """Values of the rows at `index_M` of a ragged column: each row's start, repeated, plus the place within the row."""
    start_N = length_N.cumsum(0) - length_N
    place_M = length_M.cumsum(0) - length_M
    shift_V = (start_N[index_M] - place_M).repeat_interleave(length_M)
    return value_V[shift_V + torch.arange(len(shift_V))]
