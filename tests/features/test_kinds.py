"""Every registered feature kind on its way from a raw column to the input of a model, against plain Python.

A kind SECTION has its cases in test_kind_SECTION.py.
"""

import importlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kind_case import Case
from test_raw import typed

from features.batch import Batch, Rows
from features.fit.encoders import Encoders, arrow_schema
from features.fit.statistics import Statistics
from features.kinds import KINDS
from features.parse.raw import Parsed, parse
from features.schema.schema import Schema
from models.inputs import Inputs
from models.ranker import ModelConfig, Ranker

PADDED = 9  # rows of a batch


def cases() -> list:
    found = []
    for section in KINDS:
        own = importlib.import_module(f"test_kind_{section}").CASES
        found += [pytest.param(section, case, id=f"{section}-{number}") for number, case in enumerate(own)]
    return found


pytestmark = pytest.mark.parametrize(("section", "case"), cases())


def schema_of(section: str, case: Case) -> Schema:
    content = {
        "source": {"files": "x"},
        "tables": case.tables,
        "dense": {"before": {"column": "y", "standardize": False}},
        "categorical": {"user": {"hash": 5, "dim": 4}},
        "tasks": {"t": {"kind": "binary", "label": "s = '1'"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    content[section] = content.get(section, {}) | {"x": case.settings}
    return Schema.parse(content, "small.yaml")


def parsed(schema: Schema, cells: list) -> Parsed:
    count = range(len(cells))
    columns = {"user": [f"u{i % 3}" for i in count], "y": [str(i) for i in count], "s": [str(i % 2) for i in count]}
    arrays = {name: pa.array(texts, pa.string()) for name, texts in columns.items()}
    lists = any(isinstance(cell, list) for cell in cells)
    arrays["x"] = pa.array(cells, pa.list_(pa.string()) if lists else pa.string())
    return parse(schema, typed(schema, arrays).rows, 0)


def good(case: Case) -> list[int]:
    return [row for row in range(len(case.cells)) if row not in case.bad]


def through_a_file(schema: Schema, case: Case, folder: Path) -> tuple[Encoders, pa.Table]:
    """Encoders that were saved and loaded, and rows as a shard returns them."""
    rows = parsed(schema, case.cells).rows
    Encoders.fit(schema, Statistics.of(schema, rows)).save(folder / "encoders")
    encoders = Encoders.load(folder / "encoders", schema)
    with pq.ParquetWriter(folder / "rows.parquet", arrow_schema(schema), store_schema=True) as writer:
        writer.write_table(encoders.encode(rows), row_group_size=2)
    file = pq.ParquetFile(folder / "rows.parquet")
    assert file.schema_arrow == arrow_schema(schema)
    assert str(file.schema_arrow) == str(arrow_schema(schema)) or schema.lists
    return encoders, file.read()


def batch_of(schema: Schema, table: pa.Table) -> Batch:
    return Rows.decode(table, schema).batch(schema, PADDED)


def expected_dense(case: Case) -> np.ndarray:
    return np.array(case.dense + [[0.0] * len(case.dense[0])] * (PADDED - len(case.dense)))


def test_bad_rows_are_dead_letters_with_their_reason_and_the_others_are_rows(section, case):
    found = parsed(schema_of(section, case), case.cells)
    assert dict(zip(found.bad["line"], found.bad["reason"], strict=True)) == {
        3 + 2 * row: reason for row, reason in case.bad.items()
    }
    assert found.rows["row_id"].to_pylist() == good(case)


def test_missing_values_are_counted_whole_or_in_parts(section, case):
    schema = schema_of(section, case)
    rows = parsed(schema, case.cells).rows
    parts = [Statistics.of(schema, rows.slice(0, 2)), Statistics.of(schema, rows.slice(2))]
    for found in (Statistics.of(schema, rows), parts[0].merge(parts[1])):
        assert (found.rows, found.missing["x"]) == (len(good(case)), case.missing)


def test_a_batch_read_back_from_a_shard_holds_what_plain_python_computes(section, case, tmp_path):
    schema = schema_of(section, case)
    _, table = through_a_file(schema, case, tmp_path)
    batch = batch_of(schema, table)
    assert ("x" in schema.dense_ranges, "x" in schema.sparse) == (case.dense is not None, case.ids is not None)
    assert batch.dense_BD.shape == (PADDED, schema.dense_width)
    if case.dense is not None:
        columns = schema.dense_ranges["x"]
        assert len(columns) == KINDS[section](**case.settings).width
        assert batch.dense_BD[:, list(columns)].numpy() == pytest.approx(expected_dense(case), rel=1e-5, abs=1e-6)
    else:
        padding = [[]] * (PADDED - len(case.ids))
        assert [ids.tolist() for ids in batch.sparse["x"].to_dense()] == case.ids + padding
    kept = [float(row) for row in good(case)]
    assert batch.dense_BD[: len(kept), schema.dense_ranges["before"].start].tolist() == kept


def test_rows_are_encoded_one_by_one_as_they_are_together(section, case, tmp_path):
    schema = schema_of(section, case)
    encoders, _ = through_a_file(schema, case, tmp_path)
    rows = parsed(schema, case.cells).rows
    single = pa.concat_tables([encoders.encode(rows.slice(row, 1)) for row in range(rows.num_rows)])
    assert single.equals(encoders.encode(rows))
    assert encoders.encode(rows.slice(0, 0)).schema == arrow_schema(schema)


def test_rows_taken_in_another_order_and_cut_hold_the_same_cells(section, case, tmp_path):
    schema = schema_of(section, case)
    _, table = through_a_file(schema, case, tmp_path)
    rows = Rows.decode(table, schema)
    order = list(range(len(rows)))[::-1]
    halves = [Rows.decode(part, schema) for part in (table.slice(0, 1), table.slice(1))]
    for other in (rows.take(torch.tensor(order)).take(torch.tensor(order)), Rows.concat(halves)):
        whole, again = rows.batch(schema, PADDED), other.batch(schema, PADDED)
        assert torch.equal(whole.dense_BD, again.dense_BD)
        assert torch.equal(whole.sparse.values(), again.sparse.values())
        assert torch.equal(whole.sparse.lengths(), again.sparse.lengths())


def test_an_input_has_the_columns_of_the_feature_where_it_says_so(section, case, tmp_path):
    schema = schema_of(section, case)
    encoders, table = through_a_file(schema, case, tmp_path)
    module = Inputs(schema, encoders, 4)
    batch = batch_of(schema, table)
    dims = {name: schema.table(name).dim for name in schema.sparse}
    embedding_BE = torch.randn(PADDED, sum(dims.values()))
    x_BD = module(embedding_BE, batch.dense_BD)
    assert x_BD.shape == (PADDED, module.out_dim)
    assert sorted(column for own in module.columns.values() for column in own) == list(range(module.out_dim))
    own = x_BD[:, module.columns["x"]].detach()
    if case.dense is None:
        before = sum(dim for name, dim in dims.items() if list(dims).index(name) < list(dims).index("x"))
        assert torch.equal(own, embedding_BE[:, before : before + dims["x"]])
    elif KINDS[section](**case.settings).code_bins is None:
        assert own.numpy() == pytest.approx(expected_dense(case), rel=1e-5, abs=1e-6)
    else:
        assert own[:, 0].numpy() == pytest.approx(expected_dense(case)[:, 0], rel=1e-5, abs=1e-6)
        assert own.shape[1] == len(case.dense[0]) + 4


def test_a_ranker_over_tokens_learns_from_the_feature(section, case, tmp_path):
    schema = schema_of(section, case)
    encoders, table = through_a_file(schema, case, tmp_path)
    # Of few hidden units all may be negative for every row, and the gradient zero.
    config = ModelConfig(interaction={"name": "dot"}, fusion={"name": "shared_bottom", "widths": [64]}, tower=[])
    ranker = Ranker(schema, encoders, config, device="cpu")
    names = list(ranker.numbers.columns)
    logit_BT = ranker(batch_of(schema, table))
    logit_BT.square().sum().backward()
    gradient_DW = ranker.interaction.tokens.linear.weight_SDH.grad[names.index("x")]
    assert logit_BT.isfinite().all()
    assert gradient_DW[: len(ranker.numbers.columns["x"])].abs().sum() > 0
