"""Plans and what they come to, for clusters that are not there, and data-parallel tables against sharded ones on two ranks."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import TABLES, assert_close, assert_identical, configuration, last, losses, tensors, torchrun
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner.types import Storage
from torchrec.distributed.types import ShardingPlan
from two_ranks_planning import MIXED, OPTIMIZERS, STEPS, STOP, settings, tables

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.training import learner
from pipeline.training.config import Settings
from pipeline.training.optim.settings import TableOptimizer
from pipeline.training.optim.tables import ReplicatedTables
from pipeline.training.parallel import cache, plan, shard
from pipeline.training.parallel.memory import Estimate
from pipeline.training.parallel.row_load import RowLoad
from pipeline.training.parallel.topology import COMMUNICATOR, Cluster
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

HERE = Path(__file__).parent
GB = 10**9
ROWS = {"user": 40_000_000, "item": 5_000_000, "query": 300_000, "country": 200}
DIM = 64


class Model(nn.Module):
    """Tables of a given number of rows beside a dense part of 1001 numbers."""

    def __init__(self, rows: dict[str, int]) -> None:
        super().__init__()
        self.configs = [EmbeddingBagConfig(count, DIM, name=n, feature_names=[n]) for n, count in rows.items()]
        self.embeddings = EmbeddingBagCollection(self.configs, device=torch.device("meta"))
        self.linear = nn.Linear(1000, 1)


def place(
    rows: dict[str, int] | None = None,
    hbm: int = 80 * GB,
    ranks: int = 64,
    device: str = "cuda",
    load: RowLoad | None = None,
    ddr: int = 1000 * GB,
    **train: Any,
):
    made, wanted = Model(rows or ROWS), Settings(batch_size=64 * 512, **train)
    cluster = Cluster(ranks, min(ranks, 8), device, hbm if device == "cuda" else 0, ddr)
    return plan.place(made, shard.sharders(wanted), made.configs, wanted, cluster, load or RowLoad())


def bytes_by_rank(plan: ShardingPlan, ranks: int, momentum: dict[str, int]) -> list[tuple[int, int]]:
    """Weights and row-wise momentum of each rank, from the shards' sizes. momentum: bytes of a whole table's."""
    weights, states = Counter(), Counter()
    for name, sharding in plan.plan["embeddings"].items():
        if sharding.sharding_type == "data_parallel":
            for rank in range(ranks):
                weights[rank] += ROWS[name] * DIM * 4
                states[rank] += momentum[name]
            continue
        for part in sharding.sharding_spec.shards:
            rows, columns = part.shard_sizes
            weights[part.placement.rank()] += rows * columns * 4
            states[part.placement.rank()] += momentum[name] * rows * columns // (ROWS[name] * DIM)
    return [(weights[rank], states[rank]) for rank in range(ranks)]


# Plans for a cluster that is not there


def test_every_table_is_placed_as_its_own_entry_or_else_the_default_allows() -> None:
    plan, found = place(
        tables={"name": "adagrad"},
        sharding={"default": ["table_wise"], "user": ["row_wise"], "item": ["column_wise"], "country": ["data_parallel"]},
        kernels={"default": ["fused"], "query": ["fused_uvm_caching"]},
    )  # fmt: skip
    wanted = {
        "user": ("row_wise", "fused", 64),
        "item": ("column_wise", "fused", 2),
        "query": ("table_wise", "fused_uvm_caching", 1),
        "country": ("data_parallel", "dense", 64),
    }
    assert {t.name: (t.placement, t.kernel, t.ranks) for t in found.tables} == wanted
    chosen = plan.plan["embeddings"]
    assert {name: (s.sharding_type, s.compute_kernel) for name, s in chosen.items()} == {
        name: entry[:2] for name, entry in wanted.items()
    }


def test_a_table_row_wise_table_stays_on_one_machine() -> None:
    plan, _ = place(sharding={"default": ["table_row_wise"]})
    for sharding in plan.plan["embeddings"].values():
        ranks = [shard.placement.rank() for shard in sharding.sharding_spec.shards]
        assert len(set(ranks)) == 8
        assert len({rank // 8 for rank in ranks}) == 1


@pytest.mark.parametrize(
    ("optimizer", "floats"), [("rowwise_adagrad", 1), ("adagrad", DIM), ("sgd", 0), ("adam", 2 * DIM)]
)
def test_bytes_of_tables_and_ranks_are_those_of_the_shards(optimizer: str, floats: int) -> None:
    sharding = {"default": ["table_wise"], "user": ["row_wise"]}
    if optimizer != "adam":
        sharding["country"] = ["data_parallel"]
    plan, found = place(tables={"name": optimizer}, sharding=sharding)
    momentum = {name: rows * floats * 4 for name, rows in ROWS.items()}
    assert [t.name for t in found.tables] == ["user", "item", "query", "country"]
    assert {t.name: (t.rows, t.size.weights, t.size.state) for t in found.tables} == {
        name: (rows, rows * DIM * 4, momentum[name]) for name, rows in ROWS.items()
    }
    assert [(r.size.weights, r.size.state) for r in found.ranks] == bytes_by_rank(plan, 64, momentum)
    assert {r.size.gradients for r in found.ranks} == {0 if optimizer == "adam" else ROWS["country"] * DIM * 4}
    assert sum(r.work for r in found.ranks) == pytest.approx(1)
    numbers = 1001 * 4  # and Adam's two moments of each
    assert (found.dense.weights, found.dense.gradients, found.dense.state) == (numbers, numbers, 2 * numbers)


def test_what_an_optimiser_keeps_counts_where_room_is_short() -> None:
    """Weights alone would fit into 95% of 12 GB, less three communicators."""
    alone = {"user": 35_000_000}
    sharding = {"default": ["table_wise"]}
    assert alone["user"] * DIM * 4 < 0.95 * 12 * GB - 3 * COMMUNICATOR < 2 * alone["user"] * DIM * 4
    place(alone, 12 * GB, sharding=sharding)
    place(alone, 12 * GB, sharding=sharding, tables={"name": "sgd"})
    with pytest.raises(UserError, match=r"table user needs 17\.\d GB on one rank, which has 10\.4 GB of GPU memory"):
        place(alone, 12 * GB, sharding=sharding, tables={"name": "adagrad"})


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd"])
def test_what_a_checkpoint_is_copied_to_is_main_memory_of_every_rank(device: str, optimizer: str) -> None:
    sharding = {"default": ["row_wise"], "item": ["table_wise"], "country": ["data_parallel"]}
    train = {"device": device, "sharding": sharding, "tables": {"name": optimizer}}
    copied, at_once = place(**train)[1], place(checkpoint_async=False, **train)[1]
    for ours, theirs in zip(copied.ranks, at_once.ranks, strict=True):
        assert ours.size == theirs.size
        assert ours.ddr - theirs.ddr == ours.size.weights + ours.size.state > 0
        assert ours.hbm == theirs.hbm


def test_too_little_memory_for_a_checkpoints_copy_is_an_error_with_what_helps() -> None:
    """Weights and momentum are 15.6 MB on each rank. The dense part has its copy, too."""
    train = {"rows": {"user": 60_000}, "ranks": 1, "sharding": {"default": ["table_wise"]}}
    with pytest.raises(
        UserError, match=r"15\.6 MB and 1 ranks have 15\.\d MB of memory.* train\.checkpoint_async=false"
    ):
        place(ddr=15_610_000, **train)
    place(ddr=15_610_000, checkpoint_async=False, **train)
    place(ddr=15_613_000, **train)


def test_a_group_that_shares_tables_is_planned_alone() -> None:
    plan, found = place(ranks=64, sharding={"default": ["row_wise"]}, sharding_group=16)
    assert (len(found.ranks), found.replicas) == (16, 4)
    assert found.lines()[-1] == "4 replicas, each on 16 ranks"
    assert {s.placement.rank() for p in plan.plan["embeddings"].values() for s in p.sharding_spec.shards} == set(
        range(16)
    )
    with pytest.raises(UserError, match="sharding_group=12 does not divide the 64 ranks"):
        place(sharding_group=12)


def test_averages_of_large_tables_after_each_step_are_a_warning_with_their_bytes() -> None:
    _, found = place(ranks=64, sharding={"default": ["row_wise"]}, sharding_group=16)
    whole = sum(rows * (DIM + 1) * 4 for rows in ROWS.values())
    sent = 2 * 3 / 4 * whole  # of a replica; an all-reduce over four, of weights and a momentum per row
    said = re.fullmatch(
        r"train\.sync_every=1 averages the tables of 4 replicas after each step: up to ([\d.]+) GB sent by a rank and "
        r"([\d.]+) GB by all\. A larger train\.sync_every divides that\.",
        found.costly_averages(),
    )
    assert [float(cell) for cell in said.groups()] == pytest.approx([sent / 16 / GB, 4 * sent / GB], abs=0.06)
    for quiet in ({"sharding_group": 16, "sync_every": 2}, {}, {"sharding_group": 16, "rows": {"country": 200}}):
        assert place(ranks=64, **quiet)[1].costly_averages() is None


def test_a_batch_that_ranks_cannot_share_evenly_is_planned_with_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    kind = plan.EmbeddingEnumerator
    monkeypatch.setattr(
        plan, "EmbeddingEnumerator", lambda t, batch, *a, **k: batches.append(batch) or kind(t, batch, *a, **k)
    )
    place({"user": 1000}, ranks=3)
    assert batches == [ceil(64 * 512 / 3)]


def test_many_tables_on_many_ranks_are_summarised_in_thirteen_lines() -> None:
    rows = {f"t{i}": 1000 * (i + 1) for i in range(30)}
    _, found = place(rows, sharding={"default": ["table_wise"]})
    lines = found.lines()
    assert len(lines) == 13
    assert [line.split()[0] for line in lines[1:7]] == [f"t{i}" for i in range(29, 23, -1)]
    assert lines[7].split()[:3] == ["24", "smaller", f"{sum(1000 * (i + 1) for i in range(24)):,}"]
    assert [line.split()[0] for line in lines[8:-1]] == ["rank", "min", "median", "max"]
    assert lines[-1].startswith(f"peak: {found.peak.rank}")


# What plans are chosen by


def test_on_several_nodes_of_gpus_tables_may_lie_on_one_of_them_and_elsewhere_not() -> None:
    def placements(**where: Any) -> set[str]:
        return {table.placement for table in place(**where)[1].tables}

    assert placements(ranks=64) == {"table_row_wise"}
    assert "table_row_wise" not in placements(ranks=8) | placements(ranks=64, device="cpu")
    assert "table_row_wise" not in placements(ranks=64, sharding_group=8) | placements(ranks=64, sharding_group=4)
    assert "table_row_wise" in placements(ranks=64, sharding_group=16)


def test_no_gpu_is_filled_while_others_have_room_but_many_tables_stay_whole() -> None:
    """By time alone `query`, of a third of a rank's share, would be whole: 51 GB on one of four GPUs, 38 GB on the others."""
    rows = {"user": 400_000_000, "item": 200_000_000, "query": 50_000_000, "country": 200}
    sizes = [rank.size.total for rank in place(rows, ranks=4)[1].ranks]
    assert max(sizes) < 1.02 * sum(sizes) / 4
    _, found = place({f"t{i}": 4_000_000 for i in range(24)}, ranks=8)
    assert {table.placement for table in found.tables} == {"table_wise"}
    assert len({rank.size.total for rank in found.ranks}) == 1


def test_ids_of_a_row_count_for_the_bytes_of_a_batch_and_activations_for_what_is_left_of_a_gpu() -> None:
    rows = 64 * 512 // 8
    bare, full = (place({"user": 1000}, ranks=8, load=RowLoad(ids))[1] for ids in ({}, {"user": 50.0}))
    more = max(r.hbm for r in full.ranks) - max(r.hbm for r in bare.ranks)
    assert more == rows * 49 * 8  # ids of 8 bytes: an eighth of the batches of eight ranks
    kept = RowLoad(activations=10_000)
    assert place({"user": 1000}, ranks=8, load=kept)[1].buffers == rows * 10_000 + 3 * COMMUNICATOR
    assert place({"user": 1000}, ranks=8, load=kept, accumulate=4)[1].buffers == rows // 4 * 10_000 + 3 * COMMUNICATOR
    with pytest.raises(UserError, match=r"activations and communication 42\.0 GB: 4\.0 GB more than a rank has"):
        place({"user": 1000}, hbm=40 * GB, ranks=8, load=RowLoad(activations=1e7))


def test_cached_tables_have_what_their_gpus_have_left_and_every_kernel_knows_of_a_loop_that_fetches_ahead() -> None:
    kernels = {"default": ["fused"], "user": ["fused_uvm_caching"], "item": ["fused_uvm_caching"]}
    made = Model(ROWS)
    wanted = Settings(batch_size=64 * 512, kernels=kernels, sharding={"default": ["row_wise"]})
    cluster = Cluster(2, 2, "cuda", 5 * GB, 10**12)
    arguments = (made, shard.sharders(wanted), made.configs, wanted, cluster, RowLoad())
    placed, found = plan.place(*arguments, prefetch=True)
    room, _ = cluster.available(found.dense, found.buffers)
    assert 0.02 < found.cached < 0.95
    assert 0.99 * room < max(rank.hbm for rank in found.ranks) <= room
    beside = sum(ROWS[name] * (DIM + 1) * 4 for name in ("query", "country")) + (ROWS["user"] + ROWS["item"]) * 4
    rows = (ROWS["user"] + ROWS["item"]) * (DIM * 4 + 20)
    assert found.cached == pytest.approx((2 * room - beside) / rows, rel=0.05)  # less maps of rows and a batch
    shardings = placed.plan["embeddings"]
    factors = {name: sharding.cache_params.load_factor for name, sharding in shardings.items()}
    assert factors == {"user": found.cached, "item": found.cached, "query": None, "country": None}
    assert all(sharding.cache_params.prefetch_pipeline for sharding in shardings.values())
    assert f"fused_uvm_caching: {found.cached:.0%} of the rows are cached on the GPUs" in found.lines()
    plain, _ = plan.place(*arguments)
    assert not any(s.cache_params and s.cache_params.prefetch_pipeline for s in plain.plan["embeddings"].values())
    assert cache.is_cached(plain)
    roomy = plan.place(*arguments[:4], replace(cluster, hbm=80 * GB), RowLoad())[1]
    assert roomy.cached == 0.95
    whole, _ = place()
    assert not cache.is_cached(whole)
    assert {sharding.cache_params for sharding in whole.plan["embeddings"].values()} == {None}


def test_the_loop_is_pipelined_on_a_gpu_where_nothing_hides_the_graph() -> None:
    assert Settings().is_pipelined("cuda", managed=False)
    assert Settings(pipelined=True).is_pipelined("cpu", managed=False)
    for other in ({"accumulate": 2}, {"weighting": {"name": "pcgrad"}}, {"pipelined": False}):
        assert not Settings(**other).is_pipelined("cuda", managed=False)
    assert not Settings().is_pipelined("cuda", managed=True)
    assert not Settings().is_pipelined("cpu", managed=False)


@pytest.mark.parametrize(("prefetch", "columns"), [(True, (16, 128)), (False, (128, 128))])
def test_tables_that_share_a_cache_have_rows_of_its_widest_table_in_it(
    prefetch: bool, columns: tuple[int, int]
) -> None:
    def option(rows: int, dim: int) -> Any:
        part = SimpleNamespace(rank=0, size=[rows, dim], storage=Storage(0, 0))
        tensor = torch.zeros(1, dtype=torch.float16)
        return SimpleNamespace(compute_kernel="fused_uvm_caching", shards=[part], tensor=tensor)

    sizes = (100_000, 1_000)
    options = [option(rows, dim) for rows, dim in zip(sizes, (16, 128), strict=True)]
    whole = sum(rows * (2 * width + 20) for rows, width in zip(sizes, columns, strict=True))
    share = cache.cache_rows(ShardingPlan({}), options, whole // 2, prefetch)
    assert share == pytest.approx(0.02 + 0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("kernel", "kind"), [("fused", "TrainPipelineSparseDist"), ("fused_uvm_caching", "PrefetchTrainPipelineSparseDist")]
)
def test_the_pipelined_loop_fetches_rows_ahead_where_a_table_is_cached(
    kernel: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TrainPipelineSparseDist", "PrefetchTrainPipelineSparseDist"):
        monkeypatch.setattr(learner, name, lambda *_, name=name, **__: name)
    kernels, before = [SimpleNamespace(prefetch_stream=1)], []
    monkeypatch.setattr(shard, "table_kernels", lambda _: kernels)
    monkeypatch.setattr(shard.torch_compat, "forget_prefetched", before.append)
    placed, _ = place(kernels={"default": ["fused"], "item": [kernel]})
    pipelined = object.__new__(learner.PipelinedLearner)
    pipelined.model, pipelined.optimizer, pipelined.device = SimpleNamespace(plan=placed), None, None
    pipelined.feed(iter([]), 0)
    assert pipelined.pipeline == kind
    assert before == (kernels if kernel == "fused_uvm_caching" else [])  # whose stream was the loop's before
    assert (learner.PipelinedLearner.prefetch, learner.Learner.prefetch) == (True, False)


# What does not fit


def test_too_many_bytes_are_said_with_a_number_of_ranks_that_helps() -> None:
    row_wise, hbm = {"sharding": {"default": ["row_wise"]}}, 3 * GB // 2
    room = 0.95 * hbm - 3 * COMMUNICATOR
    with pytest.raises(UserError, match=r"Try (\d+) ranks or more, train\.kernels") as error:
        place(hbm=hbm, ranks=16, **row_wise)
    bytes_needed = sum(rows * (DIM + 1) * 4 for rows in ROWS.values())
    said = re.search(
        r"need ([\d.]+) GB and 16 ranks have ([\d.]+) GB of GPU memory for them: ([\d.]+) GB too much", str(error.value)
    )
    need, have, over = map(float, said.groups())
    assert need == pytest.approx(bytes_needed / GB, rel=0.05)  # and a batch on its way
    assert have == pytest.approx(16 * room / GB, abs=0.06)
    assert over == pytest.approx(need - have, abs=0.11)
    enough = int(re.search(r"Try (\d+) ranks", str(error.value)).group(1))
    assert enough >= ceil(bytes_needed / room)
    place(hbm=hbm, ranks=enough, **row_wise)


def test_a_table_too_large_for_one_rank_is_named_and_the_advice_helps() -> None:
    with pytest.raises(
        UserError, match=r"table user needs 10\.4 GB on one rank.* Try \+train\.sharding\.user=\[row_wise\]"
    ):
        place(hbm=8 * GB, sharding={"default": ["table_wise"]})
    place(hbm=8 * GB, sharding={"default": ["table_wise"], "user": ["row_wise"]})
    place(hbm=8 * GB, sharding={"default": ["table_wise"]}, kernels={"default": ["fused_uvm_caching"]})


@pytest.mark.parametrize(
    ("device", "change", "says"),
    [
        ("cuda", {"sharding": {"default": ["column_wise"]}}, "one momentum per column shard"),
        ("cuda", {"sharding": {"item": ["data_parallel"]}, "tables": {"name": "adam"}}, r"sharding\.item: fused adam moves"),
        ("cuda", {"sharding": {"item": ["data_parallel"]}, "sharding_group": 8}, "its replicas would diverge"),
        ("cuda", {"sharding": {"item": ["data_parallel"]}, "kernels": {"item": ["fused"]}}, "a kernel of its own"),
        ("cuda", {"kernels": {"default": ["dense"]}}, r"train\.kernels\.default: dense is not allowed"),
        ("cuda", {"kernels": {"shown": ["fused"]}}, r"train\.kernels\.shown: no such table; the tables are country, item"),
        ("cpu", {"kernels": {"item": ["fused_uvm_caching"]}}, r"train\.kernels\.item: .* all tables are in main memory"),
        ("cpu", {"sharding": {"item": ["table_row_wise"]}}, "table_row_wise has no CPU kernel"),
        ("cpu", {"tables": {"name": "adam"}}, "has no CPU kernel for it. Use rowwise_adagrad, adagrad or sgd"),
    ],
)  # fmt: skip
def test_what_would_change_results_or_lose_state_is_refused_with_the_reason(
    device: str, change: dict, says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        place(device=device, **change)
    assert "\n" not in str(error.value)


# The optimiser of replicated tables


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replicated_tables_take_the_steps_of_the_formula(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {f"e.{n}.weight": nn.Parameter(torch.randn(7, 4, generator=generator)) for n in ("a", "b", "frozen")}
    twin = {n: w.detach().double().clone() for n, w in weights.items()}
    momentum = {n: torch.zeros(7, 1 if name == "rowwise_adagrad" else 4, dtype=torch.float64) for n in weights}
    optimizer = ReplicatedTables(weights, TableOptimizer(name=name, lr=0.1, eps=1e-3))
    for _ in range(5):
        optimizer.zero_grad()
        for n in ("e.a.weight", "e.b.weight"):
            gradient = torch.randn(7, 4, generator=generator) * (torch.rand(7, 1, generator=generator) < 0.6)
            weights[n].grad = gradient.clone()
            for row in range(7):
                g = gradient[row].double()
                square = (g**2).mean().view(1) if name == "rowwise_adagrad" else g**2
                momentum[n][row] += square
                twin[n][row] -= 0.1 * g / (momentum[n][row].sqrt() + 1e-3) if name != "sgd" else 0.1 * g
        optimizer.step()
    for n, weight in weights.items():
        torch.testing.assert_close(weight.detach().double(), twin[n], rtol=1e-5, atol=1e-6)
        for key, value in optimizer.state_dict()["state"][n].items():
            assert key == f"{n.split('.')[1]}.momentum1"
            torch.testing.assert_close(value.double().view(7, -1), momentum[n], rtol=1e-5, atol=1e-6)


# Two ranks


@pytest.fixture(scope="module")
def two_ranks(folder: Path, device: torch.device) -> Path:
    alone(folder, "alone", "rowwise_adagrad", STOP).run_to_end()
    torchrun(str(HERE / "two_ranks_planning.py"), str(folder)).check_returncode()
    return folder


def alone(folder: Path, name: str, optimizer: str, steps: int = STEPS) -> Trainer:
    config = configuration(folder / "data", folder / name, **settings(optimizer, {"default": ["table_wise"]}, steps))
    return prepare(config, None, torch.device("cpu"))


@pytest.mark.system
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replicated_tables_train_as_table_wise_ones(two_ranks: Path, optimizer: str) -> None:
    replicated, sharded = two_ranks / f"replicated-{optimizer}", two_ranks / f"table_wise-{optimizer}"
    assert_close(last(replicated), last(sharded))
    assert losses(replicated) == pytest.approx(losses(sharded), rel=1e-5)
    momenta = [name for name in last(replicated) if name.endswith(".momentum1")]
    assert len(momenta) == (0 if optimizer == "sgd" else len(TABLES))


@pytest.mark.system
def test_some_tables_replicated_and_pipelined_train_the_same_model(two_ranks: Path) -> None:
    assert_close(last(two_ranks / "mixed"), last(two_ranks / "table_wise-rowwise_adagrad"))


@pytest.mark.system
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_a_checkpoint_of_replicated_tables_goes_on_sharded_on_one_rank(two_ranks: Path, optimizer: str) -> None:
    source, moved = two_ranks / f"replicated-{optimizer}", two_ranks / f"moved-{optimizer}"
    shutil.copytree(source, moved)
    shutil.rmtree(checkpoint.folder(moved / "checkpoints", STEPS))
    saved = tensors(checkpoint.folder(moved / "checkpoints", STOP))
    made = alone(two_ranks, moved.name, optimizer)
    loaded = {name: shard.local_parts(value)[0][0] for name, value in tables(made).items()}
    assert len(loaded) == 2 * len(TABLES)
    assert all(value.abs().max() > 0 for value in loaded.values())
    assert_identical(loaded, {name: saved[name] for name in loaded})
    made.run_to_end()
    assert_close(last(moved), last(source), rtol=1e-3, atol=1e-4)


@pytest.mark.system
def test_a_checkpoint_of_sharded_tables_goes_on_replicated_on_two_ranks(two_ranks: Path) -> None:
    saved = tensors(checkpoint.folder(two_ranks / "alone" / "checkpoints", STOP))
    for rank in range(2):
        loaded = torch.load(two_ranks / f"loaded.{rank}.pt", weights_only=True)
        assert len(loaded) == 2 * len(TABLES)
        assert_identical(loaded, {name: saved[name] for name in loaded})
    assert_close(
        last(two_ranks / "alone-goes-on"), last(two_ranks / "table_wise-rowwise_adagrad"), rtol=1e-3, atol=1e-4
    )


@pytest.mark.system
def test_ranks_hold_the_bytes_that_the_estimate_gives(two_ranks: Path) -> None:
    logged = (two_ranks / "logged.0.txt").read_text().splitlines()
    assert (two_ranks / "logged.1.txt").read_text() == ""
    assert len(logged) == 1 + len(TABLES) + 1 + 2
    placements = {line.split()[0]: line for line in logged[1 : 1 + len(TABLES)]}
    assert all(MIXED.get(name, MIXED["default"])[0] in line for name, line in placements.items())
    estimated = mixed_estimate(two_ranks)
    assert logged == estimated.lines()
    held = [json.loads((two_ranks / f"held.{rank}.json").read_text()) for rank in range(2)]
    assert [{"weights": r.size.weights, "state": r.size.state} for r in estimated.ranks] == held


def mixed_estimate(folder: Path) -> Estimate:
    made, wanted = alone(folder, "unused", "rowwise_adagrad"), Settings(batch_size=32, sharding=MIXED)
    ranker = planning_model(made)
    configs = ranker.ranker.embeddings.embedding_bag_configs()
    load = RowLoad.of_training(made.dataset, made.config.model, bf16=False)
    return plan.place(ranker, shard.sharders(wanted), configs, wanted, Cluster(2, 2, "cpu", 0, 10**12), load)[1]


def planning_model(made: Trainer) -> nn.Module:
    """The model before it is sharded."""
    from models.ranker import Ranker
    from pipeline.training.step import TrainStep

    return TrainStep(
        Ranker(made.dataset.schema, made.dataset.encoders, made.config.model), made.learner.loss, bf16=False
    )


@pytest.mark.system
def test_a_plan_that_only_rank_0_makes_is_refused_on_both(two_ranks: Path) -> None:
    for rank in range(2):
        said = (two_ranks / f"refused.{rank}.txt").read_text()
        assert re.search(r"the tables with their batches need [\d.]+ kB and 2 ranks have", said), said
