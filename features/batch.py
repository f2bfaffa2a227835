"""From Arrow to tensors: a run of decoded rows, and the Batch that a model takes. Nothing here loops over rows."""

# Shapes: N rows of a run, B rows of a batch, F categorical features, G bags, D dense columns, T tasks, V values of a bag.

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from features.schema.schema import Schema

PADDING = -1  # row_id of rows that only fill a batch up


@dataclass
class Batch(Pipelineable):
    """What a model sees of B rows.

    Attributes:
        sparse: ids of categorical features and bags, keys in the schema's order, stride B.
        dense_BD: float32.
        label_BT: float32, 0 where not observed.
        observed_BT: bool, whether the label counts for the task.
        weight_BT: float32, the row's weight; 0 in rows that are padding.
        row_id_B: int64, PADDING in rows that are padding.
    """

    sparse: KeyedJaggedTensor
    dense_BD: Tensor
    label_BT: Tensor
    observed_BT: Tensor
    weight_BT: Tensor
    row_id_B: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from reuse until the stream is through with it."""
        for f in fields(self):
            getattr(self, f.name).record_stream(stream)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass
class Rows:
    """A run of N decoded rows, column by column.

    Attributes:
        id_FN: int64.
        length_GN: int64, ids of each bag in each row.
        bags: per bag its values, int64 of shape (V,), row after row.
        dense_ND, label_NT: float32; label is NaN where not observed.
        weight_N: float32. row_id_N: int64.
    """

    id_FN: Tensor
    length_GN: Tensor
    bags: list[Tensor]
    dense_ND: Tensor
    label_NT: Tensor
    weight_N: Tensor
    row_id_N: Tensor

    def __len__(self) -> int:
        return len(self.row_id_N)

    @classmethod
    def decode(cls, table: pa.Table, schema: Schema) -> "Rows":
        """Decodes rows of a dataset; numeric columns are viewed where Arrow holds them, then stacked once."""

        def stack(names: Sequence[str], dtype: type[np.generic], axis: int) -> Tensor:
            if not names:
                return torch.from_numpy(np.zeros((0, table.num_rows) if axis == 0 else (table.num_rows, 0), dtype))
            return torch.from_numpy(np.stack([_view(table[name], dtype) for name in names], axis=axis))

        lists = [table[name].combine_chunks() for name in schema.bag]
        offsets = [np.asarray(column.offsets, dtype=np.int64) for column in lists]
        return cls(
            id_FN=stack(list(schema.categorical), np.int64, 0),
            length_GN=torch.from_numpy(np.stack([np.diff(o) for o in offsets])) if lists else _no_bags(table.num_rows),
            bags=[
                torch.from_numpy(column.values.to_numpy()[o[0] : o[-1]].copy())
                for column, o in zip(lists, offsets, strict=True)
            ],
            dense_ND=stack(schema.dense_columns, np.float32, 1),
            label_NT=stack([f"label.{task}" for task in schema.tasks], np.float32, 1),
            weight_N=stack(["weight"], np.float32, 0)[0],
            row_id_N=stack(["row_id"], np.int64, 0)[0],
        )

    @classmethod
    def blank(cls, schema: Schema, rows: int) -> "Rows":
        """Rows that count in nothing, in place of some that cannot be read."""
        return cls(
            id_FN=torch.zeros(len(schema.categorical), rows, dtype=torch.int64),
            length_GN=torch.zeros(len(schema.bag), rows, dtype=torch.int64),
            bags=[torch.zeros(0, dtype=torch.int64) for _ in schema.bag],
            dense_ND=torch.zeros(rows, len(schema.dense_columns)),
            label_NT=torch.full((rows, len(schema.tasks)), torch.nan),
            weight_N=torch.zeros(rows),
            row_id_N=torch.full((rows,), PADDING),
        )

    def take(self, index_N: Tensor) -> "Rows":
        """The rows at `index_N`, in its order."""
        length_GN = self.length_GN[:, index_N]
        return Rows(
            id_FN=self.id_FN[:, index_N],
            length_GN=length_GN,
            bags=[
                _take_ragged(values, before, index_N, after)
                for values, before, after in zip(self.bags, self.length_GN, length_GN, strict=True)
            ],
            dense_ND=self.dense_ND[index_N],
            label_NT=self.label_NT[index_N],
            weight_N=self.weight_N[index_N],
            row_id_N=self.row_id_N[index_N],
        )

    def slice(self, start: int, stop: int) -> "Rows":
        """Rows start .. stop - 1, as views."""
        bounds = [(int(length[:start].sum()), int(length[:stop].sum())) for length in self.length_GN]
        return Rows(
            id_FN=self.id_FN[:, start:stop],
            length_GN=self.length_GN[:, start:stop],
            bags=[values[a:b] for values, (a, b) in zip(self.bags, bounds, strict=True)],
            dense_ND=self.dense_ND[start:stop],
            label_NT=self.label_NT[start:stop],
            weight_N=self.weight_N[start:stop],
            row_id_N=self.row_id_N[start:stop],
        )

    @staticmethod
    def concat(parts: Sequence["Rows"]) -> "Rows":
        """The rows of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Rows(
            id_FN=torch.cat([p.id_FN for p in parts], 1),
            length_GN=torch.cat([p.length_GN for p in parts], 1),
            bags=[torch.cat(values) for values in zip(*(p.bags for p in parts), strict=True)],
            dense_ND=torch.cat([p.dense_ND for p in parts]),
            label_NT=torch.cat([p.label_NT for p in parts]),
            weight_N=torch.cat([p.weight_N for p in parts]),
            row_id_N=torch.cat([p.row_id_N for p in parts]),
        )

    def batch(self, schema: Schema, size: int) -> Batch:
        """A batch of `size` rows: these, then padding, which has no ids, no labels and no weight."""
        pad, (num_ids, rows) = size - len(self), self.id_FN.shape
        present_FB = torch.zeros(num_ids, size, dtype=torch.int64)
        present_FB[:, :rows] = 1
        length_KB = torch.cat([present_FB, torch.nn.functional.pad(self.length_GN, (0, pad))])
        observed_NT = ~self.label_NT.isnan()
        weight_BT = torch.nn.functional.pad(self.weight_N, (0, pad)).unsqueeze(1).expand(-1, len(schema.tasks))
        return Batch(
            sparse=KeyedJaggedTensor(
                keys=list(schema.sparse),
                values=torch.cat([self.id_FN.reshape(-1), *self.bags]),
                lengths=length_KB.reshape(-1),
                stride=size,
            ),
            dense_BD=torch.nn.functional.pad(self.dense_ND, (0, 0, 0, pad)),
            label_BT=torch.nn.functional.pad(self.label_NT.nan_to_num(0.0), (0, 0, 0, pad)),
            observed_BT=torch.nn.functional.pad(observed_NT, (0, 0, 0, pad)),
            weight_BT=weight_BT.contiguous(),
            row_id_B=torch.nn.functional.pad(self.row_id_N, (0, pad), value=PADDING),
        )


def _view(column: pa.ChunkedArray, dtype: type[np.generic]) -> np.ndarray:
    """A numeric column as numpy, NaN where a float is null."""
    return column.to_numpy().astype(dtype, copy=False)


def _no_bags(rows: int) -> Tensor:
    return torch.zeros(0, rows, dtype=torch.int64)


def _take_ragged(value_V: Tensor, length_N: Tensor, index_M: Tensor, length_M: Tensor) -> Tensor:
    """Values of the rows at `index_M` of a ragged column: each row's start, repeated, plus the place within the row."""
    start_N = length_N.cumsum(0) - length_N
    place_M = length_M.cumsum(0) - length_M
    shift_V = (start_N[index_M] - place_M).repeat_interleave(length_M)
    return value_V[shift_V + torch.arange(len(shift_V))]
