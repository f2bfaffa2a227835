"""From Arrow to tensors: decoded rows, and the Batch that a model takes. Nothing here loops over rows."""

# Shapes: N rows, B rows of a batch, F features of one id, G features of a list of ids, D dense columns, T tasks, V ids of
# lists, K features of ids, C keys.

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from features.errors import UserError
from features.kinds.base import floats
from features.schema.schema import Schema

PADDING = -1  # row_id of rows that only fill a batch up
MAX_INT32 = np.iinfo(np.int32).max


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
        single: how many of the first keys of `sparse` have one id in each row, none in those of padding at the end.
    """

    sparse: KeyedJaggedTensor
    dense_BD: Tensor
    label_BT: Tensor
    observed_BT: Tensor
    weight_BT: Tensor
    row_id_B: Tensor
    key_BC: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    single: int = 0

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        tensors = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()}
        if self.single and device.type != "cpu" and self.sparse.values().is_cpu:
            return Batch(to_device(self.sparse, self.single, device, non_blocking), **tensors, single=self.single)
        return Batch(self.sparse.to(device, non_blocking=non_blocking), **tensors, single=self.single)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from reuse until the stream has finished with it."""
        self.sparse.record_stream(stream)
        for tensor in self._tensors().values():
            tensor.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory."""
        tensors = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return Batch(self.sparse.pin_memory(), **tensors, single=self.single)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("sparse", "single")}


@dataclass
class Rows:
    """N decoded rows. Ids are int32, or int64 where a table of the schema may have more of them (`id_type`).

    Lists lie row after row, those of one row in the schema's order: rows that follow each other are one piece of memory.

    Attributes:
        id_NF: ids of features that have one.
        length_NG: int32, ids of each list. value_V: the ids of all lists.
        dense_ND, label_NT: float32; label is NaN where not observed.
        weight_N: float32. row_id_N: int64. key_NC: see Batch.
    """

    id_NF: Tensor
    length_NG: Tensor
    value_V: Tensor
    dense_ND: Tensor
    label_NT: Tensor
    weight_N: Tensor
    row_id_N: Tensor
    key_NC: Tensor

    def __len__(self) -> int:
        return len(self.row_id_N)

    @cached_property
    def begins(self) -> Tensor:
        """Where the ids of each row begin in value_V, and where the last ones end: int64, M = N + 1."""
        return torch.nn.functional.pad(self.length_NG.sum(1).cumsum(0), (1, 0))

    @classmethod
    def decode(cls, table: pa.Table, schema: Schema) -> "Rows":
        """Decodes rows of a dataset; numeric columns are viewed where Arrow holds them, then stacked once.

        Raises:
            UserError: an id that none of the schema's tables can have.
        """
        numbers = [part for name in schema.dense_ranges for part in schema.features[name].decode(name, table)]
        kind = pa.from_numpy_dtype(id_type(schema))
        single = [_ids(name, table[name], kind) for name in schema.single]
        lists = [table[name].combine_chunks() for name in schema.lists]
        lengths = [np.diff(np.asarray(column.offsets)).astype(np.int32, copy=False) for column in lists]
        values = [_ids(name, column.flatten(), kind) for name, column in zip(schema.lists, lists, strict=True)]
        length_GN = torch.from_numpy(_stacked(lengths, table.num_rows, np.int32))
        value_V = torch.from_numpy(np.concatenate(values) if values else np.zeros(0, id_type(schema)))
        return cls(
            id_NF=torch.from_numpy(_stacked(single, table.num_rows, id_type(schema))).t().contiguous(),
            length_NG=length_GN.t().contiguous(),
            value_V=transposed(value_V, length_GN),
            dense_ND=_side_by_side(numbers, table.num_rows),
            label_NT=_side_by_side([floats(table[f"label.{task}"]) for task in schema.tasks], table.num_rows),
            weight_N=torch.from_numpy(floats(table["weight"]).copy()),
            row_id_N=torch.from_numpy(table["row_id"].to_numpy().astype(np.int64)),
            key_NC=torch.zeros(table.num_rows, 0, dtype=torch.int64),
        )

    @classmethod
    def blank(cls, schema: Schema, rows: int) -> "Rows":
        """Rows of weight 0, in place of some that cannot be read."""
        return cls(
            id_NF=torch.from_numpy(np.zeros((rows, len(schema.single)), id_type(schema))),
            length_NG=torch.zeros(rows, len(schema.lists), dtype=torch.int32),
            value_V=torch.from_numpy(np.zeros(0, id_type(schema))),
            dense_ND=torch.zeros(rows, schema.dense_width),
            label_NT=torch.full((rows, len(schema.tasks)), torch.nan),
            weight_N=torch.zeros(rows),
            row_id_N=torch.full((rows,), PADDING),
            key_NC=torch.zeros(rows, 0, dtype=torch.int64),
        )

    def take(self, index_N: Tensor) -> "Rows":
        """The rows at `index_N`, in that order."""
        value_V = _permuted(self.value_V, self.begins.diff(), index_N)
        return Rows(value_V=value_V, **{name: x_N.index_select(0, index_N) for name, x_N in self._by_row().items()})

    def slice(self, start: int, stop: int) -> "Rows":
        """Rows start .. stop - 1, as views."""
        value_V = self.value_V[int(self.begins[start]) : int(self.begins[stop])]
        return Rows(value_V=value_V, **{name: x_N[start:stop] for name, x_N in self._by_row().items()})

    @staticmethod
    def concat(parts: Sequence["Rows"]) -> "Rows":
        """The rows of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Rows(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Rows)})

    def _by_row(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "value_V"}

    def lists(self) -> list[Tensor]:
        """Of each feature of lists its ids, row after row."""
        return list(transposed(self.value_V, self.length_NG).split(self.length_NG.sum(0).tolist()))

    def batch(self, schema: Schema, size: int) -> Batch:
        """A batch of `size` rows: these, then padding without ids, labels and weight."""
        pad, (rows, num_ids) = size - len(self), self.id_NF.shape
        present_FB = torch.zeros(num_ids, size, dtype=torch.int32)
        present_FB[:, :rows] = 1
        length_KB = torch.cat([present_FB, torch.nn.functional.pad(self.length_NG.t(), (0, pad))])
        length_K = [*[rows] * num_ids, *self.length_NG.sum(0).tolist()]
        observed_NT = ~self.label_NT.isnan()
        weight_BT = torch.nn.functional.pad(self.weight_N, (0, pad)).unsqueeze(1).expand(-1, len(schema.tasks))
        return Batch(
            sparse=KeyedJaggedTensor(
                keys=list(schema.sparse),
                values=torch.cat([self.id_NF.t().reshape(-1), transposed(self.value_V, self.length_NG)]),
                lengths=length_KB.reshape(-1),
                stride=size,
                # Known here; of lengths on a GPU it would be copied back, which waits for all that the GPU still has to do.
                length_per_key=length_K,
                offset_per_key=[0, *accumulate(length_K)],
            ),
            dense_BD=torch.nn.functional.pad(self.dense_ND, (0, 0, 0, pad)),
            label_BT=torch.nn.functional.pad(self.label_NT.nan_to_num(0.0), (0, 0, 0, pad)),
            observed_BT=torch.nn.functional.pad(observed_NT, (0, 0, 0, pad)),
            weight_BT=weight_BT.contiguous(),
            row_id_B=torch.nn.functional.pad(self.row_id_N, (0, pad), value=PADDING),
            key_BC=torch.nn.functional.pad(self.key_NC, (0, 0, 0, pad)),
            single=num_ids,
        )


def to_device(sparse: KeyedJaggedTensor, single: int, device: torch.device, non_blocking: bool) -> KeyedJaggedTensor:
    """A batch's ids on a device, where the lengths of the first `single` keys are made: copied are those of lists alone."""
    stride, length_K = sparse.stride(), sparse.length_per_key()
    length_KB = torch.ones(len(length_K), stride, dtype=sparse.lengths().dtype, device=device)
    length_KB[:single, length_K[0] :] = 0
    length_KB[single:].copy_(sparse.lengths().view_as(length_KB)[single:], non_blocking=non_blocking)
    return KeyedJaggedTensor(
        keys=sparse.keys(),
        values=sparse.values().to(device, non_blocking=non_blocking),
        lengths=length_KB.view(-1),
        stride=stride,
        length_per_key=length_K,
        offset_per_key=sparse.offset_per_key(),
    )


def id_type(schema: Schema) -> type[np.int32] | type[np.int64]:
    """Of a batch's ids: int64 where a table may have more than int32 counts, as a managed one has, whose ids are hashes.

    Tables look ids up as int64 in any case: shorter ones halve what is copied to a device and exchanged by ranks.
    """
    tables = schema.all_tables.values()
    known = (table.vocabulary.unknown if table.vocabulary else table.hash or 0 for table in tables)
    return np.int64 if any(table.managed for table in tables) or max(known, default=0) >= MAX_INT32 else np.int32


def transposed(value_V: Tensor, length_XY: Tensor) -> Tensor:
    """Lists in the order of length_XY, int32, put in that of its transpose: from feature after feature to row after row."""
    order_XY = torch.arange(length_XY.numel(), dtype=torch.int32).view(length_XY.shape)
    return _permuted(value_V, length_XY.reshape(-1), order_XY.t().reshape(-1), len(value_V))


def _permuted(value_V: Tensor, length_N: Tensor, index_M: Tensor, total: int | None = None) -> Tensor:
    """The lists at `index_M` of N lists that lie one after the other. total: how many values they have, where it is known.

    FBGEMM copies list by list, which takes a tenth of the time of a gather by an index that is made of the lengths.
    """
    if not len(index_M) or not len(value_V):
        return value_V[:0]
    return torch.ops.fbgemm.permute_1D_sparse_data(index_M.int(), length_N.int(), value_V, None, total)[1]


def _ids(name: str, column: pa.ChunkedArray | pa.Array, kind: pa.DataType) -> np.ndarray:
    wrong = "is missing" if column.null_count else None
    try:
        ids = column.cast(kind)
    except pa.ArrowInvalid:
        wrong = f"is over {MAX_INT32:,}, more than its table has"
    if wrong:
        raise UserError(
            f"an id of {name} {wrong}: the dataset changed after it was written. Restore it, or run jobs.preprocess again."
        )
    return ids.to_numpy()


def _stacked(columns: Sequence[np.ndarray], rows: int, kind: type) -> np.ndarray:
    return np.stack(columns) if columns else np.zeros((0, rows), kind)


def _side_by_side(parts: Sequence[np.ndarray], rows: int) -> Tensor:
    """Arrays of shape (N,) or (N, K) as one of shape (N, D), D = 0 where there are none."""
    return torch.from_numpy(np.column_stack(parts) if parts else np.zeros((rows, 0), np.float32))
