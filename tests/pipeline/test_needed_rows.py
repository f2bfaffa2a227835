"""The rows that a split needs: against its columns row by row, and scoring with them alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from score_within_memory import logits, make_run
from torchrec import KeyedJaggedTensor

from features.errors import UserError
from features.schema.schema import Schema
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation import needed_rows
from pipeline.evaluation.needed_rows import CompactIds
from pipeline.evaluation.weights import Loading

HERE = Path(__file__).parent
SCHEMA = Schema.parse(
    {
        "source": {"files": "log.csv"},
        "tables": {"item": {"hash": 300}},
        "categorical": {"user": {"hash": 90}, "shown": {"table": "item"}, "page": {"managed": {"rows": 5}}},
        "bag": {"recent": {"table": "item"}, "topics": {"hash": 40}},
        "tasks": {"click": {"kind": "binary", "label": "y"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    },
    "mine.yaml",
)
ROWS = {"item": 301, "user": 91, "topics": 41}
FEATURES = {"user": "user", "shown": "item", "page": None, "recent": "item", "topics": "topics"}


def by_loop(dataset: Dataset, split: str) -> dict[str, list[int]]:
    found: dict[str, set[int]] = {dataset.schema.table_of(name): {0} for name in dataset.schema.sparse}
    for shard in dataset.shards(split):
        for row in pq.read_table(dataset.path / shard.path).to_pylist():
            for name in dataset.schema.sparse:
                found[dataset.schema.table_of(name)] |= {*row[name]} if isinstance(row[name], list) else {row[name]}
    return {table: sorted(ids) for table, ids in found.items()}


@pytest.mark.parametrize("merge", [1, 1 << 20])
def test_the_needed_rows_are_the_ids_of_the_split(
    small_dataset: Path, monkeypatch: pytest.MonkeyPatch, merge: int
) -> None:
    monkeypatch.setattr(needed_rows, "MERGE", merge)
    dataset = Dataset(small_dataset)
    found = {split: needed_rows.needed_rows(dataset, [split]) for split in ("valid", "test")}
    for split, tables in found.items():
        assert {table: row_N.tolist() for table, row_N in tables.items()} == by_loop(dataset, split)
    assert {**found["valid"]}.keys() == {dataset.schema.table_of(name) for name in dataset.schema.sparse}
    both = needed_rows.needed_rows(dataset, ["valid", "test"])
    shared = needed_rows.union([needed_rows.needed_rows(dataset, ["valid", "test"], part, 4) for part in range(4)])
    for table, row_N in needed_rows.union([*found.values()]).items():
        assert both[table].tolist() == shared[table].tolist() == row_N.tolist()


@settings(max_examples=examples(60), deadline=None)
@given(st.data(), st.booleans())
def test_ids_become_places_among_the_needed_rows(data: st.DataObject, direct: bool) -> None:
    needed = {table: sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1))) for table, rows in ROWS.items()}
    ids, size = [], data.draw(st.integers(0, 6))
    for table in FEATURES.values():
        known = st.sampled_from(needed[table]) if table else st.integers(0, (1 << 63) - 1)
        ids.append([data.draw(st.lists(known, max_size=4)) for _ in range(size)])
    flat = [id for feature in ids for row in feature for id in row]
    lengths = [len(row) for feature in ids for row in feature]
    sparse = KeyedJaggedTensor(
        [*FEATURES], torch.tensor(flat, dtype=torch.int64), lengths=torch.tensor(lengths), stride=size
    )
    arrays = {table: np.array(rows) for table, rows in needed.items()}
    with mock.patch.object(needed_rows, "DIRECT_ROWS", 1 << 20 if direct else 0):
        compact = CompactIds(SCHEMA, arrays, ROWS, torch.device("cpu"))
    assert (compact.place_R is not None) == direct
    found = compact(sparse)
    wanted = [
        needed[table].index(id) if table else id
        for table, feature in zip(FEATURES.values(), ids, strict=True)
        for row in feature
        for id in row
    ]
    assert found.values().tolist() == wanted
    assert found.lengths().tolist() == lengths
    assert sparse.values().tolist() == flat


@pytest.mark.parametrize("direct", [0, 1 << 20])
def test_an_id_that_is_not_needed_is_refused(monkeypatch: pytest.MonkeyPatch, direct: int) -> None:
    monkeypatch.setattr(needed_rows, "DIRECT_ROWS", direct)
    needed = {"item": np.array([0, 7]), "user": np.array([0]), "topics": np.array([0, 40])}
    compact = CompactIds(SCHEMA, needed, ROWS, torch.device("cpu"))
    lengths = torch.tensor([0, 1, 0, 0, 0])
    with pytest.raises(UserError, match="an id that the split did not have"):
        compact(KeyedJaggedTensor([*FEATURES], torch.tensor([8]), lengths=lengths, stride=1))


def scored(folder: Path, tables: str, megabytes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "score_within_memory.py"), str(folder), tables, str(megabytes)]
    path = os.pathsep.join(map(str, HERE.parents[:2]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.system
def test_a_host_scores_a_model_larger_than_its_memory(tmp_path: Path) -> None:
    """Its table has 384 MiB; 160 MiB are allowed beyond what the program itself takes."""
    make_run(tmp_path)
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "rank-00000.bin").stat().st_size > 384 << 20
    needed, refused = (scored(tmp_path, tables, 160) for tables in ("needed", "all"))
    assert needed.returncode == 0, needed.stderr
    assert refused.returncode != 0
    assert "memory" in refused.stderr.lower()
    wanted = logits(tmp_path, Loading())
    assert len(wanted) > 40
    assert len({str(row) for row in wanted}) > 40
    assert json.loads(needed.stdout) == wanted
