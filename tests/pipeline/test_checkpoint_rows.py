"""Rows of a checkpoint's tables, read without the others, against whole tensors cut by hand."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import checkpoint_by_hand
import numpy as np
import pytest
import torch
import torch.distributed as dist
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import memory_below
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.testing._internal.distributed.fake_pg import FakeStore

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.checkpoint import reader, rows
from pipeline.torch_compat import Shard, ShardedTensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}


def write(path: Path, table_RD: torch.Tensor, row_cuts: list[int], column_cuts: list[int]) -> Path:
    return checkpoint_by_hand.write(path, {"model.t": table_RD}, row_cuts, column_cuts)


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


@pytest.fixture
def ranks() -> Iterator[Callable[[int, int], None]]:
    """Makes this process one of several, which say nothing to each other."""

    def become(rank: int, ranks: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)

    yield become
    dist.destroy_process_group()


def sharded(shape: tuple[int, int], blocks: list[tuple[list[int], list[int]]], rank: int) -> ShardedTensor:
    """A tensor of zeros with a block on each rank, (offsets, sizes)."""
    metadata = [ShardMetadata(*block, placement=f"rank:{owner}/cpu") for owner, block in enumerate(blocks)]
    whole = ShardedTensorMetadata(metadata, torch.Size(shape), TensorProperties())
    shard = Shard(torch.zeros(blocks[rank][1]), metadata[rank])
    return ShardedTensor._init_from_local_shards_and_global_metadata([shard], whole)


class CountedFile(io.FileIO):
    """Counts the bytes that are read of all files."""

    taken = 0

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer)
        CountedFile.taken += count or 0
        return count


HEIGHT, WIDTH = 6000, 32
BY_ROW = {ranks: [([HEIGHT // ranks * r, 0], [HEIGHT // ranks, WIDTH]) for r in range(ranks)] for ranks in (2, 3, 4)}
BY_COLUMN = {ranks: [([0, WIDTH // ranks * r], [HEIGHT, WIDTH // ranks]) for r in range(ranks)] for ranks in (2, 4)}


@pytest.mark.parametrize(
    ("saved", "loaded", "times"),
    [
        (([3000], []), BY_ROW[4], 1),
        (([2000, 4000], []), BY_ROW[2], 1),
        (([3000], []), BY_ROW[3], 1),
        (([], [16]), BY_ROW[4], 1),
        (([], [8, 16, 24]), BY_COLUMN[2], 1),
        (([3000], []), BY_COLUMN[4], 4),  # bytes of a row that lie between are read: fewer than a disk seeks past
    ],
)
def test_a_rank_reads_its_part_of_a_table_whatever_ranks_have_written_it(
    tmp_path: Path, saved, loaded, times, ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    table_RD = torch.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).float()
    path = write(tmp_path / "step-00000003", table_RD, *saved)
    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedReader(CountedFile(self, mode)))
    for rank, ((top, left), (height, width)) in enumerate(loaded):
        ranks(rank, len(loaded))
        found = sharded((HEIGHT, WIDTH), loaded, rank)
        CountedFile.taken = 0
        checkpoint.load(path, {"model": {"t": found}}, alone=True)
        part = found.local_shards()[0].tensor
        assert torch.equal(part, table_RD[top : top + height, left : left + width])
        assert CountedFile.taken == times * part.nbytes


def test_of_rows_that_are_long_a_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks) -> None:
    """As of a dense weight that was saved whole, and is loaded in parts of its columns; no more than a block at a time."""
    monkeypatch.setattr(reader, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(reader, "_read_rows", blocks := mock.Mock(wraps=reader._read_rows))
    table_RD = torch.randn(8, 40_000)
    path = write(tmp_path / "step-00000003", table_RD, [], [])
    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedReader(CountedFile(self, mode)))
    ranks(1, 4)
    found = sharded((8, 40_000), [([0, 10_000 * r], [8, 10_000]) for r in range(4)], 1)
    CountedFile.taken = 0
    checkpoint.load(path, {"model": {"t": found}}, alone=True)
    part = found.local_shards()[0].tensor
    assert torch.equal(part, table_RD[:, 10_000:20_000])
    assert CountedFile.taken == part.nbytes
    assert {4 * np.prod(call.args[2]) for call in blocks.call_args_list} == {20_000}


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
