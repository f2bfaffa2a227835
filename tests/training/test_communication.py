"""What ranks exchange: number formats, micro-batches, shards of the dense part, replicas of the tables."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from four_ranks import FORMATS, GROUP, LARGE, PLACEMENTS, RARE, RARELY, RUNS, STEPS, STOP
from pydantic import ValidationError
from tiny_training import (
    assert_close,
    assert_identical,
    configuration,
    last,
    model,
    task_loss,
    tensors,
    torchrun,
    unsharded,
    write_checkpoint,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torchrec import KeyedJaggedTensor, KeyedTensor
from two_ranks import stopped, trainer

from features.batch import Batch
from features.schema.schema import Schema
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.run import checkpoint
from pipeline.training.config import Settings
from pipeline.training.parallel import replicas
from pipeline.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("device")

HERE = Path(__file__).parent
RANKS = 4
LR, EPS = 0.05, 1e-8  # of the tables, in the tiny_training's configuration


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Path:
    """The runs of four_ranks.py, all of one process group."""
    torchrun(str(HERE / "four_ranks.py"), str(folder), ranks=RANKS).check_returncode()
    return folder


def first_batch(folder: Path, rank: int = 0, ranks: int = 1) -> Batch:
    """Of the tiny_training's configuration: the whole of it, or the rows of one rank."""
    s = configuration(folder / "data", folder / "none").train
    loader = Loader(Dataset(folder / "data"), "train", s.batch_size, s.lanes, s.seed, rank, ranks, window=s.window)
    return next(loader.batches(loader.start()))


# Formats, against an unsharded model in float64


class PooledRecorder(nn.Module):
    """Tables whose pooled embeddings stay at hand, with their gradient."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        self.pooled = self.tables(sparse)
        self.pooled.values().retain_grad()
        return self.pooled


@dataclass
class FirstStep:
    """The first step of every run here, on one device in float64.

    Attributes:
        start: the weights before it. slope: per feature the gradient of its pooled embedding, row by row of the batch.
    """

    schema: Schema
    start: dict[str, Tensor]
    batch: Batch
    slope: dict[str, Tensor]

    def over_rows(self, of: Callable[[Tensor], Tensor], rows_B: Tensor | None = None) -> dict[str, Tensor]:
        """Per table, summed for each of its rows over the (chosen) places where it is looked up: `of` the slope there."""
        sparse = self.batch.sparse.to_dict()
        total = {t: torch.zeros_like(self.start[weight_of(t)]).double() for t in self.schema.all_tables}
        for feature, slope_BW in self.slope.items():
            chosen_BW = slope_BW if rows_B is None else slope_BW * rows_B.unsqueeze(1)
            id_V, length_B = sparse[feature].values(), sparse[feature].lengths()
            total[self.schema.table_of(feature)].index_add_(0, id_V, of(chosen_BW).repeat_interleave(length_B, 0))
        return total

    def embedded(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """All features side by side, a bag as the mean over its items: of `of` the rows of the tables."""
        found = []
        for feature in self.schema.sparse:
            ids = self.batch.sparse[feature]
            rows = of(self.start[weight_of(self.schema.table_of(feature))].double())
            parts = [rows[part].sum(0) / max(len(part), 1) for part in ids.values().split(ids.lengths().tolist())]
            found.append(torch.stack(parts))
        return torch.cat(found, 1)


def weight_of(table: str) -> str:
    return f"embeddings.embedding_bags.{table}.weight"


@pytest.fixture(scope="module")
def step(ranks: Path) -> FirstStep:
    data, config = Dataset(ranks / "data"), configuration(ranks / "data", ranks / "none")
    start, batch = model(last(ranks / "start")), first_batch(ranks)
    ranker = unsharded(config, data.schema, data.encoders, start)
    ranker.embeddings = recorder = PooledRecorder(ranker.embeddings)
    total, _ = TrainStep(ranker, task_loss(data.schema), bf16=False)(in_float64(batch))
    total.backward()
    slopes = recorder.pooled.values().grad.double().split(recorder.pooled.length_per_key(), 1)
    return FirstStep(data.schema, start, batch, dict(zip(recorder.pooled.keys(), slopes, strict=True)))


def in_float64(batch: Batch) -> Batch:
    return Batch(**(vars(batch) | {"dense_BD": batch.dense_BD.double()}))


def rounding(name: str) -> float:
    """The largest relative error of a number in a format: half of the distance from 1 to the next."""
    return torch.finfo({"fp16": torch.float16, "bf16": torch.bfloat16}[name]).eps / 2


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_embeddings_in_16_bits_are_within_the_rounding_of_the_tables_rows_at_half_the_bytes(
    ranks: Path, step: FirstStep, placement: str, name: str
) -> None:
    parts = [torch.load(ranks / f"forward-{placement}-{name}.{rank}.pt") for rank in range(RANKS)]
    plain = [torch.load(ranks / f"forward-{placement}-fp32.{rank}.pt") for rank in range(RANKS)]
    place = {row: place for place, row in enumerate(step.batch.row_id_B.tolist())}
    order_B = torch.tensor([place[row] for rows, _, _ in parts for row in rows.tolist()])
    wanted_BE, size_BE = step.embedded(lambda x: x)[order_B], step.embedded(torch.abs)[order_B]
    # Table-wise, a sum is rounded once. Row-wise, each rank's part is, and then each of the three sums of two parts.
    bound_BE = rounding(name) * (wanted_BE.abs() if placement == "table_wise" else RANKS * size_BE)
    error_BE = (torch.cat([found for _, found, _ in parts]) - wanted_BE).abs()
    slack_BE = 1e-6 * size_BE + 2.0**-25  # of float32, and of the smallest numbers of fp16
    assert (error_BE <= 1.01 * bound_BE + slack_BE).all()
    assert error_BE.max() > 0.2 * rounding(name) * wanted_BE.abs().max() > 10 * slack_BE.max()
    assert [2 * sent for _, _, sent in parts] == [sent for _, _, sent in plain]
    assert all(sent for _, _, sent in plain)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_in_16_bits_move_a_row_by_their_sum_within_the_rounding_of_each(
    ranks: Path, step: FirstStep, placement: str, name: str
) -> None:
    found = model(last(ranks / f"backward-{placement}-{name}"))
    slope, size = step.over_rows(lambda x: x), step.over_rows(torch.abs)
    shares = []
    for table in slope:
        wanted = step.start[weight_of(table)] - LARGE["lr"] * slope[table]
        error, bound = (found[weight_of(table)] - wanted).abs(), rounding(name) * LARGE["lr"] * size[table]
        # The gradients themselves come from a dense part in float32.
        slack = 1e-6 * wanted.abs() + 2e-5 * LARGE["lr"] * size[table] + 1e-6
        assert (error <= bound + slack).all()
        shares.append((error / (bound + slack)).max())
    assert max(shares) > 0.2


# Micro-batches (test_micro_batches.py has one rank)


def test_training_in_micro_batches_is_training_on_the_batch_on_four_ranks_and_on_one(ranks: Path) -> None:
    assert_close(last(ranks / "micro-batches"), last(ranks / "ddp"), rtol=1e-4, atol=1e-6)
    made = trainer(ranks, "one-micro-batches", **RUNS["micro-batches"])
    assert made.learner.model.module.accumulate == 3  # 32 rows: 11, 11, 10
    made.run_to_end()
    assert_close(last(ranks / "one-micro-batches"), last(ranks / "ddp"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"accumulate": 2, "weighting": {"name": "pcgrad"}}, "accumulate=2"),
        ({"accumulate": 2, "pipelined": True}, "pipelined=true"),
        ({"dense_parallel": "fsdp", "weighting": {"name": "gradnorm"}}, "dense_parallel=fsdp"),
        ({"sharding_group": 2, "kernels": {"default": ["fused", "fused_uvm_caching"]}}, "fused_uvm_caching"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_line(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError) as error:
        Settings(**settings)
    (fault,) = error.value.errors()
    assert word in fault["msg"]
    assert "\n" not in fault["msg"]


# The dense part in shards


@pytest.mark.parametrize("name", ["fsdp", "fsdp-micro-batches"])
def test_a_sharded_dense_part_learns_what_a_replicated_one_does_clipped_by_the_norm_of_all(
    ranks: Path, name: str
) -> None:
    assert_close(last(ranks / name), last(ranks / "ddp"), rtol=1e-4, atol=1e-6)
    shares = [json.loads((ranks / f"share.{rank}.json").read_text()) for rank in range(RANKS)]
    # Cut along the three experts, one of the four ranks would have nothing.
    assert shares == pytest.approx([1 / RANKS] * RANKS, abs=0.06)
    clipped, free = (
        sum(value.square().sum() for key, value in last(ranks / run).items() if "exp_avg" in key)
        for run in ("ddp", "whole")
    )
    assert clipped < 0.5 * free


@pytest.mark.parametrize("name", ["fsdp-ddp", "ddp-fsdp"])
def test_a_checkpoint_moves_between_shards_and_replicas_of_the_dense_part(ranks: Path, name: str) -> None:
    assert_close(last(ranks / name), last(ranks / "ddp"), rtol=1e-4, atol=1e-6)


def test_gradients_are_the_mean_over_ranks_and_the_same_however_ddp_lays_out_its_messages(ranks: Path) -> None:
    inputs, models, found = zip(
        *(torch.load(ranks / f"averages.{rank}.pt", weights_only=False) for rank in range(RANKS)), strict=True
    )
    model = models[0].double()
    model(torch.cat(inputs).double()).square().mean().backward()
    for first, _, third in found:
        for weight, one, other, ours in zip(model.parameters(), first, third, found[0][0], strict=True):
            torch.testing.assert_close(one.double(), weight.grad, rtol=1e-5, atol=1e-7)
            assert torch.equal(one, other)
            assert torch.equal(one, ours)


@pytest.mark.parametrize("name", ["ddp", "copies", "fsdp"])
def test_a_resumed_run_on_four_ranks_rounds_as_one_that_was_not_interrupted(ranks: Path, name: str) -> None:
    """DDP lays out its messages anew after each attempt's first step, and a ring adds up ranks by the place in a message."""
    assert_identical(last(ranks / f"{name}-{name}"), last(ranks / name))


def test_a_checkpoint_of_shards_is_read_on_one_rank_element_by_element(ranks: Path) -> None:
    stopped(ranks, "fsdp", "fsdp-one", STOP)
    moved(ranks, "fsdp-one", RUNS["ddp"])


def moved(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Asserts that a checkpoint of several ranks is written again by one as it was."""
    path = checkpoint.folder(folder / name / "checkpoints", STOP)
    before = tensors(path)
    made = trainer(folder, name, **settings)
    assert made.state.step == STOP
    write_checkpoint(made)
    assert_identical(tensors(path), before)


# Copies of the tables


@pytest.mark.parametrize("name", ["on-nodes", "on-nodes-replicas"])
def test_tables_on_the_ranks_of_one_node_train_the_same_model_in_groups_of_nodes_too(ranks: Path, name: str) -> None:
    for rank in range(RANKS):
        found = json.loads((ranks / f"{name}.{rank}.json").read_text())
        own = rank // 2 * 2
        nodes = [[own, own + 1]] if name == "on-nodes-replicas" else [[0, 1], [2, 3]]
        assert [kind for kind, _ in found.values()] == ["table_row_wise"] * 4
        assert sorted(map(list, {tuple(on) for _, on in found.values()})) == nodes
    assert_close(last(ranks / name), last(ranks / "whole"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["replicas", "replicas-fsdp"])
def test_with_sgd_replicas_that_are_averaged_after_each_step_are_one_table(ranks: Path, name: str) -> None:
    assert_close(last(ranks / name), last(ranks / "whole"), rtol=1e-5, atol=1e-6)


def test_a_replica_steps_with_its_ranks_gradient_scaled_to_the_batch_and_the_mean_of_the_replicas_is_kept(
    ranks: Path, step: FirstStep
) -> None:
    found = last(ranks / "replicas-adagrad")
    groups = [range(first, first + GROUP) for first in range(0, RANKS, GROUP)]
    rows = [{row for rank in group for row in first_batch(ranks, rank, RANKS).row_id_B.tolist()} for group in groups]
    mine_GB = torch.tensor([[row in own for row in step.batch.row_id_B.tolist()] for own in rows])
    assert mine_GB.sum(0).tolist() == [1] * 32
    slopes = [step.over_rows(lambda x: len(groups) * x, mine_B) for mine_B in mine_GB]
    for table in slopes[0]:
        momenta = [slope[table].square().mean(1) for slope in slopes]
        moves = [s[table] / (m.sqrt() + EPS).unsqueeze(1) for s, m in zip(slopes, momenta, strict=True)]
        wanted = step.start[weight_of(table)] - LR * sum(moves) / len(groups)
        torch.testing.assert_close(found[f"model.{weight_of(table)}"].double(), wanted, rtol=1e-4, atol=1e-3 * LR)
        momentum = next(v for n, v in found.items() if n.startswith("tables") and f".{table}.momentum" in n)
        torch.testing.assert_close(momentum.double(), sum(momenta) / len(groups), rtol=1e-3, atol=1e-12)


def test_a_group_is_of_consecutive_ranks_and_torchrec_is_told_how_many_of_them_share_a_node(ranks: Path) -> None:
    for rank in range(RANKS):
        first, place = rank // GROUP * GROUP, rank % GROUP
        wanted = [[first, first + 1], [place, GROUP + place], GROUP]
        assert json.loads((ranks / f"groups.{rank}.json").read_text()) == wanted


def test_replicas_are_made_equal_before_a_checkpoint_which_holds_each_table_once(ranks: Path) -> None:
    held = [torch.load(ranks / f"held.{rank}.pt") for rank in range(RANKS)]
    assert [len(saves) for saves in held] == [STEPS // STOP] * RANKS
    assert STOP % RARELY > 0
    assert STEPS % RARELY > 0
    for rank in range(RANKS - GROUP):
        for (before, after), (other_before, other_after) in zip(held[rank], held[rank + GROUP], strict=True):
            assert after.keys() == other_after.keys() != set()
            assert any(not torch.equal(part, other_before[name]) for name, part in before.items())
            assert all(torch.equal(part, other_after[name]) for name, part in after.items())
            mean = {name: (part + other_before[name]) / 2 for name, part in before.items()}
            assert_close(after, mean, rtol=1e-6, atol=1e-8)
    path = checkpoint.folder(ranks / "replicas-rarely" / "checkpoints", STEPS)
    for name, entry in json.loads((path / "tensors.json").read_text())["tensors"].items():
        if "embedding_bags" in name:
            assert sum(math.prod(part["sizes"]) for part in entry["parts"]) == math.prod(entry["shape"])
    size = {
        name: sum(p.stat().st_size for p in (ranks / name).glob("checkpoints/*/*.bin"))
        for name in ("replicas", "whole")
    }
    assert size["replicas"] < 1.1 * size["whole"]


def test_a_checkpoint_of_replicas_is_read_without_replicas_on_one_rank_element_by_element(ranks: Path) -> None:
    stopped(ranks, "replicas-rarely", "replicas-one", STOP)
    moved(ranks, "replicas-one", {k: v for k, v in RARE.items() if k not in ("sharding_group", "sync_every")})


def test_a_table_that_is_not_sharded_cannot_be_averaged_and_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"^item\.weight is a DTensor, not a ShardedTensor"):
        replicas._parts(
            {"item.weight": DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (1,)), [Replicate()])}
        )


def test_groups_that_do_not_share_the_ranks_evenly_are_refused_in_one_line(ranks: Path) -> None:
    for rank in range(RANKS):
        line = (ranks / f"refused.{rank}.txt").read_text()
        assert "train.sharding_group=3 does not divide the 4 ranks" in line
        assert "\n" not in line
