"""Rows of a checkpoint's tables, read without the others, against whole tensors cut by hand."""

import hashlib
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import memory_below
from small_checkpoint import MANIFEST

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.checkpoint import reader, rows

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}


def cut(size: int, places: list[int]) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(place % (size + 1) for place in places)})
    return list(zip(edges, edges[1:], strict=False))


def write(path: Path, table_RD: torch.Tensor, row_cuts: list[int], column_cuts: list[int]) -> Path:
    """A checkpoint of one tensor, in blocks that lie in two files by turns."""
    path.mkdir()
    content = {"rank-00000.bin": b"", "rank-00001.bin": b"x" * 64}
    parts = []
    blocks = [(r, c) for r in cut(len(table_RD), row_cuts) for c in cut(table_RD.shape[1], column_cuts)]
    for number, ((top, bottom), (left, right)) in enumerate(blocks):
        file = f"rank-{number % 2:05d}.bin"
        content[file] += bytes(-len(content[file]) % 64)
        block = table_RD[top:bottom, left:right].contiguous()
        place = {"offsets": [top, left], "sizes": [bottom - top, right - left]}
        parts.append({**place, "file": file, "start": len(content[file])})
        content[file] += block.reshape(-1).view(torch.uint8).numpy().tobytes()
    entry = {"dtype": str(table_RD.dtype).removeprefix("torch."), "shape": list(table_RD.shape), "parts": parts}
    content["tensors.json"] = json.dumps({"version": 1, "tensors": {"model.t": entry}}).encode()
    for name, data in content.items():
        (path / name).write_bytes(data)
    files = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()}
    (path / "manifest.json").write_text(MANIFEST.sealed(files).model_dump_json())
    return path


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 200),
    st.integers(1, 9),
    st.lists(st.integers(0, 300), max_size=3),
    st.lists(st.integers(0, 300), max_size=2),
    st.sampled_from(sorted(DTYPES)),
    st.sets(st.integers(0, 199)),
    st.tuples(st.integers(0, 80), st.integers(1, 400), st.integers(1, 400)),
)
def test_the_rows_that_are_wanted_are_read_from_any_parts(
    tmp_path_factory: pytest.TempPathFactory, height, width, row_cuts, column_cuts, dtype, wanted, limits
) -> None:
    table_RD = torch.arange(height * width).reshape(height, width).to(DTYPES[dtype])
    path = write(tmp_path_factory.mktemp("rows") / "step-00000003", table_RD, row_cuts, column_cuts)
    checkpoint.check(path)
    row_N = np.array(sorted(row for row in wanted if row < height), np.int64)
    found_ND = torch.full((len(row_N), width), -1, dtype=torch.float64)
    sizes = dict(zip(("GAP_BYTES", "READ_BYTES", "GATHER_BYTES"), limits, strict=True))
    with mock.patch.multiple(rows, **sizes):
        checkpoint.load_rows(path, {"model.t": (row_N, found_ND)})
    assert torch.equal(found_ND, table_RD[row_N].double())


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 60),
    st.integers(1, 5),
    st.lists(st.integers(0, 100), max_size=3),
    st.lists(st.integers(0, 100), max_size=2),
    st.sampled_from(sorted(DTYPES)),
    st.integers(1, 200),
)
def test_a_tensor_is_read_some_rows_at_a_time(
    tmp_path_factory: pytest.TempPathFactory, height, width, row_cuts, column_cuts, dtype, block
) -> None:
    table_RD = torch.arange(height * width).reshape(height, width).to(DTYPES[dtype])
    path = write(tmp_path_factory.mktemp("blocks") / "step-00000003", table_RD, row_cuts, column_cuts)
    found_RD = torch.full((height, width), -1, dtype=torch.float64)
    with mock.patch.object(reader, "BLOCK_BYTES", block):
        checkpoint.load(path, {"model": {"t": found_RD}}, alone=True)
    assert torch.equal(found_RD, table_RD.double())


def test_what_lies_between_distant_rows_is_not_read(tmp_path: Path) -> None:
    table_RD = torch.arange(1 << 20, dtype=torch.int64).reshape(-1, 16)  # 8 MiB
    path = write(tmp_path / "step-00000003", table_RD, [], [])
    row_N = np.array([5, 6, 9, 40_000, 65_535], np.int64)
    found_ND = torch.zeros(5, 16, dtype=torch.int64)
    taken, read = [], os.pread

    def pread(descriptor: int, length: int, place: int) -> bytes:
        taken.append(length)
        return read(descriptor, length, place)

    with mock.patch.object(os, "pread", pread), memory_below(1 << 20):
        checkpoint.load_rows(path, {"model.t": (row_N, found_ND)})
    assert torch.equal(found_ND, table_RD[row_N])
    assert taken == [5 * 128, 128, 128]


@pytest.mark.parametrize(
    ("name", "row", "width", "says"),
    [
        ("model.u", 0, 3, "model.u needs 3 columns, the checkpoint does not have it"),
        ("model.t", 0, 4, r"needs 4 columns, the checkpoint has \[7, 3\]"),
        ("model.t", 7, 3, "has 7 rows, row 7 is wanted"),
    ],
)
def test_rows_that_a_checkpoint_does_not_have_are_named(tmp_path: Path, name, row, width, says) -> None:
    path = write(tmp_path / "step-00000003", torch.zeros(7, 3), [], [])
    with pytest.raises(UserError, match=says):
        checkpoint.load_rows(path, {name: (np.array([row]), torch.zeros(1, width))})


def test_a_file_that_was_cut_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "step-00000003", torch.zeros(700, 3), [], [])
    index = checkpoint.rows.read_index(path, checkpoint.read(path))
    monkeypatch.setattr(rows, "read_index", lambda *_: index)
    (path / "rank-00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"rank-00000\.bin ends before a row that its index has"):
        checkpoint.load_rows(path, {"model.t": (np.array([699]), torch.zeros(1, 3))})
