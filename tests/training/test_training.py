"""Training against a float64 twin on one device, one rank against two, and a run against itself after a stop."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from tiny_training import (
    NEVER_OBSERVED,
    PATHS,
    SCHEMA,
    TABLES,
    TRAIN_ROWS,
    assert_close,
    assert_identical,
    configuration,
    dwell_variance,
    last,
    losses,
    make_dataset,
    model,
    tensors,
    torchrun,
    unsharded,
    write_checkpoint,
)
from torch import Tensor
from two_ranks import HALF, MIXED, OPTIMIZERS, PLACEMENTS, STOP, SURVIVING, stopped, train

from features.batch import Batch
from features.errors import UserError
from features.schema.schema import Schema
from models.ranker import is_table
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.run import checkpoint
from pipeline.torch_compat import table_kernels
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner
from pipeline.training.optim.dense import rate
from pipeline.training.optim.settings import DenseOptimizer
from pipeline.training.optim.table_optimizers import TABLE_OPTIMIZERS
from pipeline.training.parallel import shard
from pipeline.training.train import prepare

pytestmark = pytest.mark.usefixtures("device")

HERE = Path(__file__).parent
EPS = 1e-8


@pytest.fixture(scope="module")
def one_rank(folder: Path, device: torch.device) -> Path:
    """A run of each table optimiser on one rank."""
    runs = folder / "one"
    for name in OPTIMIZERS:
        train(folder, f"one/{name}", tables={"name": name, "lr": 0.05}, checkpoint_every=STOP)
    return runs


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    """The runs of two_ranks.py, all of one process group."""
    make_dataset(folder / "infinite-two", spoil=("price", 22))
    torn = make_dataset(folder / "torn-two")
    shard = sorted((torn / "train").glob("*.parquet"))[1]
    content = bytearray(shard.read_bytes())
    content[40:60] = bytes(20)  # in the pages of a row group of 40 rows
    shard.write_bytes(content)
    torchrun(str(HERE / "two_ranks.py"), str(folder)).check_returncode()
    return folder


# One rank against a twin in float64


class Twin:
    """The same model without sharding, fused optimisers or batched losses, in float64."""

    def __init__(self, config: TrainConfig, start: dict[str, Tensor]) -> None:
        data, self.config = Dataset(config.dataset), config
        self.schema, s = data.schema, config.train
        self.ranker = unsharded(config, self.schema, data.encoders, model(start))
        self.loader = Loader(data, "train", s.batch_size, s.lanes, s.seed, window=s.window)
        dense = [p for n, p in self.ranker.named_parameters() if not n.startswith("embeddings.")]
        self.dense = torch.optim.Adam(dense, lr=s.dense.lr)
        self.tables = [p for n, p in self.ranker.named_parameters() if n.startswith("embeddings.")]
        self.momentum = [torch.zeros_like(p) for p in self.tables]

    def loss(self, batch: Batch) -> Tensor:
        """Per task the weighted mean over observed rows, row by row."""
        logit_BT = self.ranker(Batch(**(vars(batch) | {"dense_BD": batch.dense_BD.double()})))
        total = torch.zeros((), dtype=torch.float64)
        for t, task in enumerate(self.schema.tasks.values()):
            top, bottom = torch.zeros((), dtype=torch.float64), 0.0
            for b in range(len(logit_BT)):
                if batch.observed_BT[b, t]:
                    weight, label, z = float(batch.weight_BT[b, t]), float(batch.label_BT[b, t]), logit_BT[b, t]
                    squared = (z - label) ** 2 / dwell_variance()
                    one = torch.log1p(torch.exp(z)) - label * z if task.kind == "binary" else squared
                    top, bottom = top + weight * one, bottom + weight
            total = total + (task.loss_weight * top / bottom if bottom else 0.0)
        return total

    def step(self, batch: Batch) -> float:
        loss = self.loss(batch)
        self.ranker.zero_grad()
        loss.backward()
        self.dense.step()
        with torch.no_grad():
            for table, momentum in zip(self.tables, self.momentum, strict=True):
                self.update(table, momentum)
        return loss.item()

    def update(self, table: Tensor, momentum: Tensor) -> None:
        name, lr, gradient = self.config.train.tables.name, self.config.train.tables.lr, table.grad
        if name == "sgd":
            table -= lr * gradient
            return
        square = gradient**2
        momentum += square.mean(1, keepdim=True) if name == "rowwise_adagrad" else square
        table -= lr * gradient / (momentum.sqrt() + EPS)


def start_of(folder: Path, name: str, **settings: Any) -> dict[str, Tensor]:
    """The state before the first step."""
    made = prepare(configuration(folder / "data", folder / name, **settings), None, torch.device("cpu"))
    write_checkpoint(made)
    return last(folder / name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_moves_every_weight_as_the_formulas_say(folder: Path, tmp_path: Path, name: str) -> None:
    settings = {"tables": {"name": name, "lr": 0.05}, "max_steps": 1}
    start = start_of(folder, f"start-{name}", **settings)
    train(folder, f"step-{name}", **settings)
    found = model(last(folder / f"step-{name}"))
    twin = Twin(configuration(folder / "data", tmp_path, **settings), start)
    loss = twin.step(next(twin.loader.batches(twin.loader.start())))
    assert losses(folder / f"step-{name}") == [pytest.approx(loss, rel=1e-6)]
    for key, wanted in twin.ranker.state_dict().items():
        # A gradient of rounding error has any sign, and Adam's first step takes the sign.
        parameter = twin.ranker.get_parameter(key)
        sure = (parameter.grad.abs() > 1e-5) | (parameter.grad == 0)
        assert sure.double().mean() > 0.5
        torch.testing.assert_close(
            found[key][sure].double(), wanted[sure], rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_epoch_with_its_padding_follows_the_float64_twin(
    folder: Path, tmp_path: Path, one_rank: Path, name: str
) -> None:
    start = start_of(folder, f"start-epoch-{name}", tables={"name": name})
    config = configuration(folder / "data", tmp_path, tables={"name": name, "lr": 0.05})
    twin = Twin(config, start)
    wanted = [twin.step(batch) for batch in twin.loader.batches(twin.loader.start())]
    assert losses(one_rank / name)[: len(wanted)] == pytest.approx(wanted, rel=2e-3)


def test_inputs_are_rows_means_of_bags_and_dense_columns_in_the_schemas_order(folder: Path, tmp_path: Path) -> None:
    data, start = Dataset(folder / "data"), model(start_of(folder, "start-inputs"))
    ranker = unsharded(configuration(data.path, tmp_path), data.schema, data.encoders, start)
    loader = Loader(data, "valid", 20, 2)
    batch = list(loader.batches(loader.start()))[-1]
    rows = pq.read_table(data.path / "valid").to_pylist()
    cells = {row["row_id"]: row for row in rows}
    x_BD = ranker.inputs(Batch(**(vars(batch) | {"dense_BD": batch.dense_BD.double()})))
    assert (batch.row_id_B < 0).any()
    for x_D, row_id in zip(x_BD, batch.row_id_B.tolist(), strict=True):
        wanted: list[float] = []
        for feature in ("user", "shown", "device", "recent", "topics"):
            table = start[f"embeddings.embedding_bags.{data.schema.table_of(feature)}.weight"].double()
            ids = cells[row_id][feature] if row_id >= 0 else []
            ids = ids if isinstance(ids, list) else [ids]
            columns = zip(*(table[i].tolist() for i in ids), strict=True) if ids else [[0.0]] * table.shape[1]
            wanted += [sum(column) / len(column) for column in columns]
        wanted += [cells[row_id][name] if row_id >= 0 else 0.0 for name in ("age", "age_missing", "price")]
        assert x_D.tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad"])
def test_weight_decay_starts_with_the_first_step_and_not_before(folder: Path, name: str) -> None:
    dense = {"name": name, "lr": 0.01, "weight_decay": 0.1}
    plain = start_of(folder, f"undecayed-{name}")
    start = start_of(folder, f"decayed-{name}", dense=dense)
    assert_identical(model(start), model(plain))
    for key, value in start.items():
        if key.startswith("dense."):
            assert not value.any(), f"{key} is not zero before the first step"


def test_rows_without_an_observed_label_or_weight_move_nothing(folder: Path) -> None:
    start = start_of(folder, "start-unobserved", max_steps=1)
    train(folder, "unobserved", max_steps=1)
    loader = Loader(Dataset(folder / "data"), "train", 32, 4, 5, window=24)
    batch = next(loader.batches(loader.start()))
    counts = (batch.observed_BT & (batch.weight_BT > 0)).any(1)
    assert 3 < int((~counts).sum()) < 29
    users = batch.sparse["user"].values()
    moved = set(users[counts].tolist())
    found, key = last(folder / "unobserved"), "model.embeddings.embedding_bags.user.weight"
    changed = (found[key] != start[key]).any(1).nonzero().flatten().tolist()
    assert set(changed) == moved
    assert set(users[~counts].tolist()) - moved
    momentum = found["tables.ranker.embeddings.embedding_bags.user.weight.user.momentum1"]
    assert set(momentum.nonzero().flatten().tolist()) == moved


# One rank against two


@pytest.mark.system
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_train_what_one_rank_trains(two_ranks: Path, one_rank: Path, name: str, placement: str) -> None:
    other = two_ranks / f"{name}-{placement}"
    assert len(losses(other)) == 50
    assert losses(other) == pytest.approx(losses(one_rank / name), rel=1e-3)
    assert_close(last(other), last(one_rank / name), rtol=5e-3, atol=5e-4)


@pytest.mark.system
@pytest.mark.parametrize("name", MIXED)
def test_a_plan_of_several_placements_trains_the_same_model(two_ranks: Path, one_rank: Path, name: str) -> None:
    alone = one_rank / MIXED[name][0]
    assert losses(two_ranks / name) == pytest.approx(losses(alone), rel=1e-3)
    assert_close(last(two_ranks / name), last(alone), rtol=5e-3, atol=5e-4)


@pytest.mark.system
def test_the_data_holds_the_steps_that_are_hard_to_share(two_ranks: Path) -> None:
    """Steps where only one rank, or none, sees a label of the conversion, and an end with padding."""
    kinds: Counter[tuple[bool, bool]] = Counter()
    padding = 0
    loaders = [Loader(Dataset(two_ranks / "data"), "train", 32, 4, 5, r, 2, window=24) for r in range(2)]
    for number in range(4):
        for pair in zip(*(loader.batches(loader.start(number)) for loader in loaders), strict=True):
            kinds[tuple(bool((b.observed_BT[:, 1] & (b.weight_BT[:, 1] > 0)).any()) for b in pair)] += 1
            padding += sum(int((b.row_id_B < 0).sum()) for b in pair)
    assert kinds[True, False] + kinds[False, True] > 5
    assert kinds[False, False] > 0
    assert kinds[True, True] > 5
    assert padding == 4 * (13 * 32 - TRAIN_ROWS)


@pytest.mark.system
@pytest.mark.parametrize("name", ["rowwise_adagrad-table_wise", *MIXED])
def test_the_sharded_forward_is_the_unsharded_rankers(two_ranks: Path, tmp_path: Path, name: str) -> None:
    data = Dataset(two_ranks / "data")
    config = configuration(data.path, tmp_path)
    ranker = unsharded(config, data.schema, data.encoders, model(last(two_ranks / name))).eval()
    for rank in range(2):
        row_id_B, logit_BT = torch.load(two_ranks / f"{name}.logits.{rank}.pt", weights_only=True)
        loader = Loader(data, "valid", 20, 2, rank=rank, ranks=2)
        batches = [Batch(**(vars(b) | {"dense_BD": b.dense_BD.double()})) for b in loader.batches(loader.start())]
        assert torch.equal(row_id_B, torch.cat([b.row_id_B for b in batches]))
        wanted_BT = torch.cat([ranker(b) for b in batches])
        torch.testing.assert_close(logit_BT.double(), wanted_BT, rtol=1e-5, atol=1e-5)
    # The trap: by rank, the sharded tensor has another order of features.
    assert json.loads((two_ranks / f"{name}.keys.json").read_text()) != list(data.schema.sparse)


@pytest.mark.system
def test_tables_start_alike_under_every_plan(folder: Path, two_ranks: Path) -> None:
    start = model(start_of(folder, "start-alone"))
    for plan in ("table_wise", "row_wise", "column_wise"):
        assert_identical(model(last(two_ranks / f"start-{plan}")), start)
    other = model(start_of(folder, "start-other", seed=6))
    assert [name for name in start if torch.equal(start[name], other[name])] == ["towers.out.bias_SH"]
    drawn = torch.cat([start[f"embeddings.embedding_bags.{table}.weight"].flatten() for table in TABLES])
    assert drawn.std().item() == pytest.approx(0.1, rel=0.1)
    assert len(drawn.unique()) > 0.99 * len(drawn)


@pytest.mark.system
def test_a_run_on_two_ranks_goes_on_bit_for_bit_in_mid_epoch_with_dropout(two_ranks: Path) -> None:
    assert_identical(last(two_ranks / "dropout-resumed"), last(two_ranks / "dropout"))
    assert losses(two_ranks / "dropout-resumed") == losses(two_ranks / "dropout")
    assert f"step-{STOP:08d}" in (two_ranks / "log.0.txt").read_text()


@pytest.mark.system
def test_rows_of_two_ranks_are_seen_exactly_once_after_going_on_with_one(two_ranks: Path) -> None:
    stopped(two_ranks, "rowwise_adagrad-table_wise", "fewer")
    alone = train(two_ranks, "fewer", checkpoint_every=STOP)
    before = [json.loads((two_ranks / f"seen.{rank}.json").read_text()) for rank in range(2)]
    steps = {step: [row for part in before for row in part[str(step)]] for step in range(1, 51)}
    assert sorted(alone.seen) == list(range(STOP + 1, 51))
    assert all(sorted(alone.seen[step]) == sorted(steps[step]) for step in alone.seen)
    second_epoch = [row for s in range(14, 27) for row in (steps[s] if s <= STOP else alone.seen[s])]
    assert len(second_epoch) == len(set(second_epoch)) == TRAIN_ROWS
    assert_close(last(two_ranks / "fewer"), last(two_ranks / "rowwise_adagrad-table_wise"), rtol=5e-3, atol=5e-4)


@pytest.mark.system
@pytest.mark.parametrize("name", SURVIVING)
def test_two_ranks_leave_out_what_one_rank_leaves_out(folder: Path, two_ranks: Path, name: str) -> None:
    settings = SURVIVING[name]
    train(folder, f"{name}-alone", data=f"{name}-two", **settings)
    runs = [checkpoint.folder(two_ranks / run / "checkpoints", 30) for run in (f"{name}-two-run", f"{name}-alone")]
    two, one = map(checkpoint.read, runs)
    assert (two.rows, two.left_out, two.skipped) == (one.rows, one.left_out, one.skipped)
    assert two.left_out > 30
    assert_close(*map(tensors, runs), rtol=5e-3, atol=5e-4)
    assert losses(two_ranks / f"{name}-two-run") == pytest.approx(losses(folder / f"{name}-alone"), rel=1e-3)
    if name == "infinite":
        late = checkpoint.folder(two_ranks / "infinite-late" / "checkpoints", 30)
        assert checkpoint.read(late).skipped == one.skipped, "ranks that read their losses at different times"
        assert_identical(tensors(late), tensors(runs[0]))


@pytest.mark.system
def test_tables_in_16_bits_are_the_same_on_two_ranks_and_go_on_on_one(folder: Path, two_ranks: Path) -> None:
    train(folder, "half-alone", checkpoint_every=STOP, **HALF)
    stopped(folder, "half", "half-narrowed")
    train(folder, "half-narrowed", checkpoint_every=STOP, **HALF)
    for run in (two_ranks / "half", folder / "half-narrowed"):
        assert_close(last(run), last(folder / "half-alone"), rtol=5e-3, atol=1e-3)
    assert last(two_ranks / "half")["model.embeddings.embedding_bags.item.weight"].dtype == torch.float16


@pytest.mark.system
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_pipelined_loop_trains_the_same_model_on_two_ranks(two_ranks: Path, placement: str) -> None:
    pipelined = two_ranks / ("pipelined" if placement == "table_wise" else "pipelined-row_wise")
    plain = two_ranks / f"rowwise_adagrad-{placement}"
    assert_identical(last(pipelined), last(plain))
    assert losses(pipelined) == losses(plain)


@pytest.mark.system
def test_a_batch_with_less_rows_than_ranks_is_refused_on_both(two_ranks: Path) -> None:
    for rank in range(2):
        assert (
            "batch_size=1 leaves some of the 2 ranks without a row" in (two_ranks / f"refused.{rank}.txt").read_text()
        )


@pytest.mark.system
def test_the_norm_that_is_clipped_is_that_of_the_gradients_averaged_over_ranks(folder: Path, two_ranks: Path) -> None:
    train(folder, "clipped-alone", max_steps=3, clip_norm=0.05)
    assert_close(last(two_ranks / "clipped"), last(folder / "clipped-alone"), rtol=1e-3, atol=1e-4)


# Reproducible, and going on


def test_a_seed_gives_the_same_weights_to_the_last_bit_and_another_seed_others(folder: Path, one_rank: Path) -> None:
    train(folder, "again", checkpoint_every=STOP)
    assert_identical(last(folder / "again"), last(one_rank / "rowwise_adagrad"))
    assert losses(folder / "again") == losses(one_rank / "rowwise_adagrad")
    train(folder, "other", seed=6)
    assert losses(folder / "other") != losses(folder / "again")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("pipelined", [False, True])
def test_a_run_that_stopped_in_mid_epoch_ends_as_if_it_had_not(folder: Path, name: str, pipelined: bool) -> None:
    settings = {
        "tables": {"name": name, "lr": 0.05},
        "dense": {"name": "adamw", "lr": 0.003, "weight_decay": 0.01, "warmup_steps": 5, "decay": "cosine"},
        "dropout": 0.3,
        "checkpoint_every": STOP,
        "pipelined": pipelined,
        "clip_norm": 1.0,
        "max_steps": 35,
    }
    whole, part = f"whole-{name}-{pipelined}", f"part-{name}-{pipelined}"
    train(folder, whole, **settings)
    stopped(folder, whole, part)
    resumed = train(folder, part, **settings)
    assert min(resumed.seen) == STOP + 1
    assert_identical(last(folder / part), last(folder / whole))
    assert losses(folder / part) == losses(folder / whole)


def test_tables_are_drawn_once_and_not_at_all_by_a_run_that_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its memory holds before the checkpoint is loaded."""
    drawn, normal, load = [0], Tensor.normal_, Learner.load

    def counted(self: Tensor, *arguments: Any, **named: Any) -> Tensor:
        drawn[0] += self.numel() if self.device.type != "meta" else 0
        return normal(self, *arguments, **named)

    def overwritten(learner: Learner, *arguments: Any) -> None:
        state = learner.state()
        momenta = [value for of_table in state["tables"].values() for value in of_table.values()]
        for tensor, _ in chain.from_iterable(map(shard.local_parts, [*state["model"].values(), *momenta])):
            tensor.detach().fill_(7 if tensor.dtype == torch.int64 else torch.nan)
        load(learner, *arguments)

    monkeypatch.setattr(Tensor, "normal_", counted)
    monkeypatch.setattr(Learner, "load", overwritten)
    train(folder, "drawn", max_steps=8, checkpoint_every=4)
    numbers = sum(value.numel() for name, value in model(last(folder / "drawn")).items() if is_table(name))
    assert drawn[0] == numbers > 0
    stopped(folder, "drawn", "undrawn", 4)
    train(folder, "undrawn", max_steps=8, checkpoint_every=4)
    assert drawn[0] == numbers
    assert_identical(last(folder / "undrawn"), last(folder / "drawn"))


def test_a_run_that_stopped_at_max_steps_or_an_epochs_end_ends_as_if_it_had_not(folder: Path, one_rank: Path) -> None:
    for stop in (7, 13, 30):
        train(folder, "in-parts", max_steps=stop, checkpoint_every=STOP)
    train(folder, "in-parts", checkpoint_every=STOP)
    assert_identical(last(folder / "in-parts"), last(one_rank / "rowwise_adagrad"))
    assert losses(folder / "in-parts") == losses(one_rank / "rowwise_adagrad")


def test_a_finished_run_is_left_as_it_is(folder: Path) -> None:
    train(folder, "finished", max_steps=3)
    before = {path: path.stat().st_mtime_ns for path in (folder / "finished" / "checkpoints").rglob("*")}
    assert train(folder, "finished", max_steps=3).seen == {}
    assert {path: path.stat().st_mtime_ns for path in (folder / "finished" / "checkpoints").rglob("*")} == before
    assert len(losses(folder / "finished")) == 3


def test_a_damaged_newest_checkpoint_is_skipped_and_that_is_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipeline")
    train(folder, "damaged", max_steps=20, checkpoint_every=8)
    whole = last(folder / "damaged")
    for step, change in ((20, lambda data: data[:-1] + b"?"), (16, lambda data: data[:-1])):
        path = checkpoint.folder(folder / "damaged" / "checkpoints", step) / "rank-00000.bin"
        path.write_bytes(change(path.read_bytes()))
    caplog.clear()
    resumed = train(folder, "damaged", max_steps=20, checkpoint_every=8)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("pipeline.")]
    assert [line.split(":")[0] for line in told[:2]] == ["skipped a checkpoint"] * 2
    assert "step-00000020/rank-00000.bin: its checksum" in told[0]
    assert "step-00000016/rank-00000.bin has" in told[1]
    assert told[2].endswith("step-00000008")
    assert sorted(resumed.seen) == list(range(9, 21))
    assert_identical(last(folder / "damaged"), whole)


def test_a_manifest_that_is_not_even_text_is_skipped_too(folder: Path) -> None:
    train(folder, "garbled", max_steps=4, checkpoint_every=2)
    path = checkpoint.folder(folder / "garbled" / "checkpoints", 4) / "manifest.json"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    assert sorted(train(folder, "garbled", max_steps=4, checkpoint_every=2).seen) == [3, 4]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 6}, "train.seed 5, this job has 6"),
        ({"lanes": 8}, "train.lanes 4, this job has 8"),
        ({"window": 12}, "train.window 24, this job has 12"),
        ({"batch_size": 64}, "train.batch_size 32, this job has 64"),
        ({"dropout": 0.5}, "model and optimisers"),
        ({"tables": {"name": "sgd"}}, "model and optimisers"),
        ({"dense": {"name": "adagrad"}}, "model and optimisers"),
        ({"resume": "never"}, "has checkpoints. Choose another run="),
    ],
)
def test_what_would_make_the_state_or_the_order_another_is_refused(folder: Path, change: dict, says: str) -> None:
    if not (folder / "started").exists():
        train(folder, "started", max_steps=2)
    config = (folder / "started" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=says):
        train(folder, "started", **change)
    assert (folder / "started" / "config.yaml").read_bytes() == config


def test_a_dataset_of_the_same_schema_with_other_rows_is_refused_in_mid_run(folder: Path) -> None:
    train(folder, "moved", max_steps=2)
    make_dataset(folder / "other-data", rows=300)
    with pytest.raises(UserError, match=r"has train rows \w+, this job has"):
        train(folder, "moved", data="other-data")


@pytest.mark.parametrize("name", ["adam", "partial_rowwise_adam", "adagrad"])
def test_a_fused_optimiser_that_counts_steps_resumes_with_those_of_the_checkpoint(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's kernels run on GPUs alone; here another one stands for them."""
    train(folder, f"steps-{name}", max_steps=7)
    steps: list[int] = []
    kind = SplitTableBatchedEmbeddingBagsCodegen
    monkeypatch.setattr(kind, "set_optimizer_step", lambda _, step: steps.append(step))

    def renamed(model: torch.nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
        for kernel in table_kernels(model):
            kernel.optimizer = TABLE_OPTIMIZERS[name].kernel
            yield kernel

    monkeypatch.setattr(shard, "table_kernels", renamed)
    prepare(configuration(folder / "data", folder / f"steps-{name}", max_steps=9), None, torch.device("cpu"))
    assert steps == ([] if name == "adagrad" else [7])


# Settings that act


def test_the_pipelined_loop_trains_the_same_model(folder: Path, one_rank: Path) -> None:
    train(folder, "pipelined-alone", pipelined=True, checkpoint_every=STOP)
    assert_identical(last(folder / "pipelined-alone"), last(one_rank / "rowwise_adagrad"))
    assert losses(folder / "pipelined-alone") == losses(one_rank / "rowwise_adagrad")


@pytest.mark.parametrize("pipelined", [False, True])
def test_bfloat16_stays_near_float32(folder: Path, one_rank: Path, pipelined: bool) -> None:
    train(folder, f"bf16-{pipelined}", precision="bf16", pipelined=pipelined)
    found, wanted = losses(folder / f"bf16-{pipelined}"), losses(one_rank / "rowwise_adagrad")
    assert all(map(math.isfinite, found))
    assert found != wanted
    assert found[:13] == pytest.approx(wanted[:13], rel=0.05)
    kept = {name: value.dtype for name, value in last(folder / f"bf16-{pipelined}").items() if "progress." not in name}
    assert set(kept.values()) <= {torch.float32, torch.int64}


def test_clipping_bounds_the_norm_of_all_dense_gradients_together(folder: Path) -> None:
    """Adam's first moment is a tenth of its first gradient."""

    def norm(name: str) -> float:
        moments = [value for key, value in last(folder / name).items() if key.endswith(".exp_avg")]
        return 10 * torch.cat([m.double().flatten() for m in moments]).norm().item()

    for name, limit in (("free", None), ("clipped-1", 0.01), ("loose", 1e6)):
        train(folder, name, max_steps=1, clip_norm=limit)
    assert norm("clipped-1") == pytest.approx(0.01, rel=1e-3)
    assert norm("loose") == pytest.approx(norm("free"), rel=1e-6)
    assert norm("free") > 0.1


def test_the_learning_rate_rises_and_falls_as_said(folder: Path) -> None:
    dense = {"lr": 0.1, "warmup_steps": 4, "decay": "cosine", "final": 0.1}
    train(folder, "rates", max_steps=12, dense=dense)
    lines = (folder / "rates" / "metrics" / "train.jsonl").read_text().splitlines()
    wanted = [0.1 * i / 4 for i in (1, 2, 3, 4)]
    wanted += [0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2) for i in range(8)]
    assert [json.loads(line)["lr"] for line in lines] == pytest.approx(wanted, rel=1e-12)
    linear = DenseOptimizer(lr=2.0, decay="linear", final=0.5)
    assert [rate(linear, step, 4) for step in range(5)] == [2.0, 1.75, 1.5, 1.25, 1.0]
    assert [rate(DenseOptimizer(lr=2.0, warmup_steps=2), step, 4) for step in range(4)] == [1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("pipelined", [False, True])
def test_the_rate_that_is_logged_is_the_rate_that_acts(folder: Path, pipelined: bool) -> None:
    """Of a hundred warm-up steps the first moves a weight by a hundredth of lr at most."""
    start = model(start_of(folder, "start-warm"))
    name = f"warm-{pipelined}"
    train(folder, name, max_steps=1, pipelined=pipelined, dense={"lr": 0.1, "warmup_steps": 100})
    key = "fusion.experts.0.layers.0.weight_SDH"
    moved = (model(last(folder / name))[key] - start[key]).abs()
    assert moved.max().item() == pytest.approx(0.001, rel=1e-2)


# Refusals


@pytest.mark.parametrize("row_id", [22, NEVER_OBSERVED])
def test_a_loss_that_is_not_finite_stops_before_anything_is_spoilt(folder: Path, row_id: int) -> None:
    data = f"infinite-{row_id}"
    make_dataset(folder / data, spoil=("price", row_id))
    loader = Loader(Dataset(folder / data), "train", 32, 4, 5, window=24)
    batches = enumerate(loader.batches(loader.start()), start=1)
    step = next(number for number, batch in batches if row_id in batch.row_id_B)
    assert step > 1
    run = folder / f"run-{data}"
    with pytest.raises(UserError, match=rf"step {step}, epoch 0: .* row_id {row_id}\b"):
        train(folder, run.name, data=data, checkpoint_every=1)
    assert checkpoint.steps(run / "checkpoints") == list(range(1, step))
    assert all(value.isfinite().all() for value in last(run).values())
    assert all(map(math.isfinite, losses(run)))


@pytest.mark.system
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_on_one_of_two_ranks_ends_both_with_one_line(folder: Path, rank: int) -> None:
    clean = Dataset(make_dataset(folder / f"finite-{rank}"))
    loader = Loader(clean, "train", 32, lanes=4, rank=rank, ranks=2, window=16384)
    row_id = int(list(loader.batches(loader.start()))[2].row_id_B[0])
    data, run = make_dataset(folder / f"infinite-{rank}", spoil=("price", row_id)), folder / f"run-{rank}"
    arguments = [f"dataset={data}", f"run={run}", "model=shared_bottom"]
    arguments += [f"train.{name}" for name in ("batch_size=32", "lanes=4", "checkpoint_every=1", "threads=1")]
    done = torchrun("-m", "jobs.train", *arguments)
    assert done.returncode != 0
    # Rank 1 leaves it to rank 0 to print what all ranks may have found; the watch of rank 0 has its reason by then.
    prefix = (
        r"error: step 3, epoch 0" if rank == 0 else r"error \(rank 0\): step \d: rank 1 on \S+ failed: step 3, epoch 0"
    )
    [error] = [line for line in done.stderr.splitlines() if re.match(prefix, line)]
    assert "Traceback" not in done.stderr
    assert f"row_id {row_id}." in error
    assert checkpoint.steps(run / "checkpoints") == [1, 2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tables": {"name": "adam"}}, "FBGEMM has no CPU kernel for it"),
        ({"sharding": {"default": ["column_wise"]}}, "column_wise with rowwise_adagrad keeps one"),
        ({"sharding": {"default": ["table_row_wise"]}}, "no CPU kernel"),
        ({"sharding": {"default": ["sideways"]}}, "train.sharding.default: sideways is not allowed"),
        (
            {"sharding": {"shown": ["row_wise"]}},
            "sharding.shown: no such table; the tables are device, item, topics, user",
        ),
        ({"batch_size": 30}, "batch_size=30 must be divisible by lanes=4"),
    ],
)
def test_settings_that_cannot_hold_are_refused_and_nothing_is_written(folder: Path, change: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        train(folder, "never", **change)
    assert not (folder / "never").exists()


def test_a_dataset_of_another_schema_is_refused_with_both_named(folder: Path) -> None:
    schema = Schema.parse(SCHEMA | {"weight": "importance * 2"}, "other.yaml")
    config = configuration(folder / "data", folder / "never")
    with pytest.raises(UserError, match=schema.fingerprint) as error:
        prepare(config, schema, torch.device("cpu"))
    assert Dataset(folder / "data").schema.fingerprint in str(error.value)


def test_a_checkpoint_loads_without_a_process_group_into_an_unsharded_ranker(folder: Path, one_rank: Path) -> None:
    """In a process of its own, since this one has a group."""
    code = f"""
import torch
from pathlib import Path
from tiny_training import configuration
from models.ranker import Ranker
from pipeline.run import checkpoint
from pipeline.dataset.dataset import Dataset
data = Dataset(Path({str(folder / "data")!r}))
ranker = Ranker(data.schema, data.encoders, configuration(data.path, Path("unused")).model, device="cpu")
path = Path({str(one_rank / "rowwise_adagrad" / "checkpoints" / "step-00000050")!r})
checkpoint.load(path, {{"model": ranker.state_dict()}}, alone=True)
torch.save(ranker.state_dict(), {str(folder / "loaded.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": PATHS}, check=True, timeout=120)
    loaded = torch.load(folder / "loaded.pt", weights_only=True)
    assert_identical(loaded, model(tensors(one_rank / "rowwise_adagrad" / "checkpoints" / "step-00000050")))
