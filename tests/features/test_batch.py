"""Batches against plain Python rows: a row is a dict, and every operation has a twin that loops."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import KeyedJaggedTensor

from features.batch import PADDING, Batch, Rows, id_type, to_device
from features.errors import UserError
from features.fit.encoders import arrow_schema
from features.schema.schema import Schema


def schema_of(dense: int = 2, categorical: int = 2, bags: int = 2, wide: bool = False) -> Schema:
    content: dict[str, Any] = {
        "source": {"files": "*.csv"},
        "dense": {f"d{i}": {"missing_flag": i == 0} for i in range(dense)},
        "categorical": {f"c{i}": {"managed": {"rows": 9}} if wide and not i else {} for i in range(categorical)},
        "bag": {f"b{i}": {} for i in range(bags)},
        "tasks": {name: {"kind": "binary", "label": name} for name in ("click", "conversion", "like")},
        "split": {"by": "hash", "key": "k", "valid": 0.1, "test": 0.1},
    }
    return Schema.parse(content, "small.yaml")


FULL, WIDE = schema_of(), schema_of(wide=True)  # WIDE has a managed table, whose ids are hashes of 63 bits
numbers = st.floats(-(2.0**99), 2.0**99, width=32)


def numbers_of(schema: Schema) -> list[str]:
    return [name for name, kind in schema.columns.items() if kind == pa.float32()]


def row_of(schema: Schema) -> st.SearchStrategy[dict[str, Any]]:
    columns: dict[str, st.SearchStrategy] = dict.fromkeys(numbers_of(schema), numbers)
    ids = st.integers(0, 2**62 if schema is WIDE else 2**31 - 1)
    last, count = st.integers(60, 2**62 if schema is WIDE else 2**31 - 1), st.integers(50, 60)
    long = st.builds(lambda last, count: [last - i for i in range(count)], last, count)
    columns |= dict.fromkeys(schema.categorical, ids)
    columns |= dict.fromkeys(schema.bag, st.one_of(st.lists(ids, max_size=3), long))
    columns |= {f"label.{task}": st.none() | st.sampled_from([0.0, 1.0, 0.25]) for task in schema.tasks}
    columns |= {"weight": st.floats(0, 100, width=32), "event_time": st.just(0), "row_id": st.integers(0, 2**62)}
    return st.fixed_dictionaries(columns)


def row_of_zeros(schema: Schema = FULL) -> dict[str, Any]:
    columns: dict[str, Any] = dict.fromkeys(numbers_of(schema), 0.0) | dict.fromkeys(schema.categorical, 0)
    columns |= {name: [] for name in schema.bag} | {f"label.{task}": None for task in schema.tasks}
    return columns | {"weight": 1.0, "event_time": 0, "row_id": 0}


def table_of(rows: list[dict[str, Any]], schema: Schema, chunk: int = 0) -> pa.Table:
    """An Arrow table of the rows, in chunks of a size, as the reader of a large row group would give it."""
    table = pa.Table.from_pylist(rows, schema=arrow_schema(schema))
    chunk = chunk or max(len(rows), 1)
    return pa.concat_tables([table.slice(start, chunk) for start in range(0, max(len(rows), 1), chunk)])


def tables(schema: Schema = FULL) -> st.SearchStrategy[tuple[list[dict[str, Any]], Rows]]:
    def make(rows: list[dict[str, Any]], chunk: int) -> tuple[list[dict[str, Any]], Rows]:
        return rows, Rows.decode(table_of(rows, schema, chunk), schema)

    return st.builds(make, st.lists(row_of(schema), max_size=8), st.integers(0, 5))


def expect_rows(batch: Batch, rows: list[dict[str, Any]], size: int, schema: Schema = FULL) -> None:
    """Compares a batch with its rows, cell by cell."""
    assert batch.sparse.keys() == [*schema.categorical, *schema.bag]
    assert batch.sparse.stride() == size
    for name in schema.sparse:
        jagged = batch.sparse[name].to_dense()
        assert len(jagged) == size
        for index, found in enumerate(jagged):
            wanted = rows[index][name] if index < len(rows) else []
            assert found.tolist() == (wanted if isinstance(wanted, list) else [wanted])
    assert batch.sparse.values().dtype == (torch.int64 if schema is WIDE else torch.int32)
    assert batch.sparse.lengths().dtype == torch.int32
    by_hand = KeyedJaggedTensor(batch.sparse.keys(), batch.sparse.values(), lengths=batch.sparse.lengths())
    assert batch.sparse.length_per_key_or_none() == by_hand.length_per_key()
    assert batch.sparse.offset_per_key_or_none() == by_hand.offset_per_key()
    shapes = {"label_BT": len(schema.tasks), "observed_BT": len(schema.tasks), "weight_BT": len(schema.tasks)}
    for field, width in {"dense_BD": len(numbers_of(schema)), **shapes}.items():
        assert getattr(batch, field).shape == (size, width)
        assert getattr(batch, field).dtype == (torch.bool if field == "observed_BT" else torch.float32)
    assert batch.row_id_B.dtype == torch.int64
    for index in range(size):
        if index >= len(rows):
            assert batch.row_id_B[index] == PADDING
            for field in ("dense_BD", "label_BT", "observed_BT", "weight_BT"):
                assert not getattr(batch, field)[index].any()
            continue
        row = rows[index]
        assert batch.row_id_B[index] == row["row_id"]
        assert batch.dense_BD[index].tolist() == [row[name] for name in numbers_of(schema)]
        for t, task in enumerate(schema.tasks):
            label = row[f"label.{task}"]
            assert batch.label_BT[index, t] == (label or 0.0)
            assert batch.observed_BT[index, t] == (label is not None)
            assert batch.weight_BT[index, t] == np.float32(row["weight"])


@given(st.sampled_from([FULL, WIDE]), st.data(), st.integers(0, 3))
def test_a_batch_holds_every_cell_of_its_rows_and_padding_holds_nothing(
    schema: Schema, data: st.DataObject, padding: int
) -> None:
    rows, decoded = data.draw(tables(schema))
    assert len(decoded) == len(rows)
    size = len(rows) + padding
    expect_rows(decoded.batch(schema, size), rows, size, schema)


@given(tables(), st.data())
def test_taken_rows_are_those_at_the_indices_in_their_order_and_may_repeat(table: tuple, data: st.DataObject) -> None:
    rows, decoded = table
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12)) if rows else []
    taken = decoded.take(torch.tensor(index, dtype=torch.int64))
    expect_rows(taken.batch(FULL, len(index)), [rows[i] for i in index], len(index))
    assert [ids.tolist() for ids in taken.lists()] == [[v for i in index for v in rows[i][name]] for name in FULL.lists]


@given(tables(), st.data())
def test_a_slice_of_a_slice_of_taken_rows_is_that_of_the_list(table: tuple, data: st.DataObject) -> None:
    rows, decoded = table
    order = data.draw(st.permutations(range(len(rows))))
    rows, decoded = [rows[i] for i in order], decoded.take(torch.tensor(order, dtype=torch.int64))
    for _ in range(2):
        start = data.draw(st.integers(0, len(rows)))
        stop = data.draw(st.integers(start, len(rows)))
        rows, decoded = rows[start:stop], decoded.slice(start, stop)
    expect_rows(decoded.batch(FULL, len(rows) + 1), rows, len(rows) + 1)


@given(st.lists(tables(), min_size=1, max_size=4))
def test_joined_parts_are_the_parts_one_after_the_other(parts: list[tuple]) -> None:
    rows = [row for part, _ in parts for row in part]
    joined = Rows.concat([decoded for _, decoded in parts])
    expect_rows(joined.batch(FULL, len(rows)), rows, len(rows))


@pytest.mark.parametrize("widths", [(0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 2, 2)])
def test_schemas_without_one_kind_of_feature_work(widths: tuple[int, int, int]) -> None:
    schema = schema_of(*widths)
    rows = [
        dict.fromkeys(numbers_of(schema), 1.5)
        | dict.fromkeys(schema.categorical, i)
        | {name: list(range(i)) for name in schema.bag}
        | {f"label.{task}": None if i == 1 else 1.0 for task in schema.tasks}
        | {"weight": 2.0, "event_time": 0, "row_id": i}
        for i in range(4)
    ]
    decoded = Rows.decode(table_of(rows, schema), schema)
    expect_rows(decoded.batch(schema, 6), rows, 6, schema)
    taken = Rows.concat([decoded.slice(2, 4), decoded.take(torch.tensor([3, 0]))])
    expect_rows(taken.batch(schema, 4), [rows[i] for i in (2, 3, 3, 0)], 4, schema)


def test_rows_are_decoded_from_a_table_that_is_a_slice_of_another() -> None:
    rows = [
        {name: float(i) for name in numbers_of(FULL)}
        | dict.fromkeys(FULL.categorical, i)
        | {name: list(range(i)) for name in FULL.bag}
        | {f"label.{task}": None for task in FULL.tasks}
        | {"weight": 1.0, "event_time": 0, "row_id": i}
        for i in range(6)
    ]
    decoded = Rows.decode(table_of(rows, FULL).slice(2, 3), FULL)
    expect_rows(decoded.batch(FULL, 3), rows[2:5], 3)


def test_an_id_that_int32_cannot_hold_is_refused_and_not_cut_to_another_one() -> None:
    table = table_of([row_of_zeros() | {"c1": 2**32 + 5}, row_of_zeros()], FULL)
    with pytest.raises(UserError, match="an id of c1 is over 2,147,483,647"):
        Rows.decode(table, FULL)
    with pytest.raises(UserError, match="an id of b0 is over"):
        Rows.decode(table_of([row_of_zeros() | {"b0": [1, 2**31]}], FULL), FULL)


@pytest.mark.parametrize("tables", [{"hash": 2**31}, {"vocabulary": {"unknown": 2**31}}])
def test_ids_of_tables_that_int32_cannot_count_are_int64(tables: dict[str, Any]) -> None:
    content = {**FULL.model_dump(exclude_unset=True), "categorical": {"c0": tables}}
    assert id_type(Schema.parse(content, "wide.yaml")) is np.int64
    assert id_type(FULL) is np.int32


class Operations(TorchDispatchMode):
    """Counts operations of torch, and the numbers that they copy from main memory to a device without any."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.copied = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        found = func(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if isinstance(found, torch.Tensor) and found.is_meta and tensors and tensors[-1].is_cpu:
            self.copied += tensors[-1].numel()
        return found


def test_as_many_operations_move_fifty_lists_of_a_row_as_two() -> None:
    counts = []
    for bags in (2, 50):
        schema = schema_of(bags=bags)
        rows = Rows.decode(table_of([row_of_zeros(schema) | {"b1": [i, i]} for i in range(6)], schema), schema)
        with Operations() as operations:
            rows = Rows.concat([rows.slice(0, 4), rows.slice(1, 3)])
            rows.take(torch.tensor([2, 0, 5])).batch(schema, 4)
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_a_batch_moves_as_one_without_lengths_of_features_of_one_id() -> None:
    rows = [row_of_zeros() | {"b0": [i] * i} for i in range(4)]
    batch = Rows.decode(table_of(rows, FULL), FULL).batch(FULL, 5)
    with Operations() as operations:
        moved = batch.to(torch.device("meta"), non_blocking=True)
    assert {moved.dense_BD.device.type, moved.sparse.values().device.type, moved.row_id_B.device.type} == {"meta"}
    assert moved.sparse.lengths().shape == batch.sparse.lengths().shape
    per_row = sum(getattr(batch, name).shape[1] for name in ("dense_BD", "label_BT", "observed_BT", "weight_BT")) + 1
    assert operations.copied == 5 * per_row + len(batch.sparse.values()) + 5 * len(FULL.lists)
    assert moved.sparse.length_per_key_or_none() == [4, 4, 6, 0]
    assert moved.to(torch.device("meta")).single == len(FULL.single)


@pytest.mark.parametrize(("count", "padding"), [(0, 0), (0, 2), (3, 0), (3, 2)])
@pytest.mark.parametrize("schema", [FULL, schema_of(categorical=0), schema_of(bags=0)])
def test_lengths_that_are_made_on_a_device_are_those_of_the_batch(schema: Schema, count: int, padding: int) -> None:
    rows = [row_of_zeros(schema) | dict.fromkeys(schema.lists, [7] * i) for i in range(count)]
    batch = Rows.decode(table_of(rows, schema), schema).batch(schema, count + padding)
    sparse = to_device(batch.sparse, batch.single, torch.device("cpu"), False)
    assert torch.equal(sparse.lengths(), batch.sparse.lengths())
    expect_rows(replace(batch, sparse=sparse), rows, count + padding, schema)
