"""Default placements of random tables: no empty shard, balanced bytes, and ranks that train what one rank does."""

from collections import Counter
from math import ceil
from pathlib import Path

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tables import CASES, make_datasets, train
from tiny_training import assert_close, last, torchrun
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

from features.errors import UserError
from pipeline.training.config import Settings
from pipeline.training.parallel import plan, shard
from pipeline.training.parallel.topology import Cluster

SIZES = st.one_of(st.integers(1, 12), st.integers(1, 64), st.integers(1, 1_000_000))
WIDTHS = st.sampled_from([4, 8, 16, 64])


class Tables(nn.Module):
    """Pooled tables of (rows, columns), and tables that are looked up item by item, all of one width."""

    def __init__(self, pooled: list[tuple[int, int]], items: list[int], width: int) -> None:
        super().__init__()
        bags = [EmbeddingBagConfig(n, d, name=f"p{i}", feature_names=[f"p{i}"]) for i, (n, d) in enumerate(pooled)]
        singles = [EmbeddingConfig(n, width, name=f"i{i}", feature_names=[f"i{i}"]) for i, n in enumerate(items)]
        meta = torch.device("meta")
        self.pooled = EmbeddingBagCollection(bags, device=meta) if bags else None
        self.items = EmbeddingCollection(singles, device=meta) if singles else None
        self.configs = [*bags, *singles]


def place(made: Tables, ranks: int, **train: object):
    wanted = Settings(batch_size=ranks, **train)
    return plan.place(made, shard.sharders(wanted), made.configs, wanted, Cluster(ranks, ranks, "cpu", 0, 10**12))


@settings(max_examples=examples(80), deadline=None)
@given(st.lists(st.tuples(SIZES, WIDTHS), max_size=4), st.lists(SIZES, max_size=3), WIDTHS, st.integers(1, 8))
def test_random_tables_are_placed_without_empty_shards_and_with_bytes_in_balance(
    pooled: list[tuple[int, int]], items: list[int], width: int, ranks: int
) -> None:
    made = Tables(pooled or [(7, 4)], items, width)
    placed, found = place(made, ranks)
    shardings = {name: sharding for module in placed.plan.values() for name, sharding in module.items()}
    assert shardings.keys() == {config.name for config in made.configs}
    on_rank, whole, spread = Counter(), [0], 0
    size = {c.name: 4 * c.num_embeddings * (c.embedding_dim + 1) for c in made.configs}  # and a momentum a row
    for config in made.configs:
        parts = shardings[config.name].sharding_spec.shards
        rows = [part.shard_sizes[0] for part in parts]
        assert min(rows) > 0
        assert sum(rows) == config.num_embeddings
        for part in parts:
            on_rank[part.placement.rank()] += 4 * part.shard_sizes[0] * (config.embedding_dim + 1)
        if len(parts) == 1:
            whole.append(size[config.name])
            if size[config.name] > sum(size.values()) / ranks > 0 and ranks > 1:
                assert ceil(config.num_embeddings / ranks) * (ranks - 1) >= config.num_embeddings
        else:
            spread += 4 * rows[0] * (config.embedding_dim + 1)
    # No rank has more than its share and the largest table that lies on one rank, beside what a batch takes.
    buffers = max(rank.ddr - rank.size.total for rank in found.ranks)
    assert max(on_rank.values()) <= max(sum(size.values()) / ranks, spread) + max(whole) + 2 * buffers
    assert [rank.size.total for rank in found.ranks] == [on_rank[rank] for rank in range(ranks)]


def test_tables_that_take_little_time_do_not_all_go_to_the_rank_that_has_time_left() -> None:
    """One wide table takes as much time as six narrow ones, which are six times as large together."""
    made = Tables([(100_000, 256), *[(1_500_000, 16)] * 6], [], 8)
    wanted = Settings(batch_size=4096, sharding={"default": ["table_wise"]})
    _, found = plan.place(made, shard.sharders(wanted), made.configs, wanted, Cluster(2, 2, "cpu", 0, 10**12))
    sizes = [rank.size.total for rank in found.ranks]
    assert max(sizes) < sum(sizes) / 2 + 4 * 1_500_000 * 17


@pytest.mark.parametrize(("rows", "ranks"), [(3, 4), (6, 4), (5, 4), (9, 4), (49, 8)])
def test_a_table_with_too_few_rows_is_never_row_wise(rows: int, ranks: int) -> None:
    made = Tables([(rows, 8), (1000, 8)], [], 8)
    found = {table.name: table.placement for table in place(made, ranks, sharding={"default": ["row_wise"]})[1].tables}
    assert found == {"p0": "table_wise", "p1": "row_wise"}
    either = {"p0": ["row_wise", "column_wise"]}
    found = place(made, ranks, sharding=either, tables={"name": "adagrad"})[1].tables
    assert {table.placement for table in found if table.name == "p0"} == {"column_wise"}
    with pytest.raises(UserError, match=rf"^train\.sharding\.p0: {rows} rows are too few for row_wise") as error:
        place(made, ranks, sharding={"p0": ["row_wise"]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rows", "ranks"), [(4, 4), (7, 4), (8, 4), (50, 8), (2, 2)])
def test_a_table_with_a_row_for_each_rank_may_be_row_wise(rows: int, ranks: int) -> None:
    placed, _ = place(Tables([(rows, 8)], [], 8), ranks, sharding={"p0": ["row_wise"]})
    assert len(placed.plan["pooled"]["p0"].sharding_spec.shards) == ranks


@pytest.mark.parametrize("ranks", [2, 3, 7, 64])
def test_shards_of_columns_are_as_wide_as_fbgemms_kernels_take(ranks: int) -> None:
    made = Tables([(1000, dim) for dim in (4, 8, 12, 20, 36, 44, 60, 68, 100, 204, 260)], [1000], 52)
    either = {"default": ["column_wise"]}
    placed, _ = place(made, ranks, sharding=either, tables={"name": "sgd"})
    for config in made.configs:
        [sharding] = [module[config.name] for module in placed.plan.values() if config.name in module]
        widths = [part.shard_sizes[1] for part in sharding.sharding_spec.shards]
        assert sum(widths) == config.embedding_dim
        assert all(width % 4 == 0 for width in widths)


RANKS = (3, 4, 8)


@pytest.fixture(scope="module")
def random_tables(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Path:
    """A folder of runs `RANKS-CASE`, those of one rank included."""
    folder = tmp_path_factory.mktemp("random")
    make_datasets(folder)
    for ranks in RANKS:
        torchrun(str(Path(__file__).with_name("random_tables.py")), str(folder), ranks=ranks).check_returncode()
    for case in CASES:
        train(folder, case, f"1-{case}")
    return folder


@pytest.mark.system
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_ranks_train_random_tables_as_one_rank_does(random_tables: Path, case: str, ranks: int) -> None:
    assert_close(last(random_tables / f"{ranks}-{case}"), last(random_tables / f"1-{case}"))
