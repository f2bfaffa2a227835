"""What training is measured against does the same work, and the floor counts what cannot be left out."""

import itertools

import numpy as np
import plain_model
import plain_trainer
import polars as pl
import pyarrow as pa
import pytest
import torch
import workload as w
import yaml
from dataset_from_rows import parse_text, write_dataset
from floor import flops, products, table_bytes
from soak import Look, by_step
from stopwatch import DENSE, PARTS, RANKS, REST, Stopwatch
from train import CONTENDERS, RECHUB_RUN, table
from train_runs import HERE

from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.schema.schema import Schema
from models.losses import TaskLoss
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.loader import Loader

pytestmark = pytest.mark.integration

ROWS, SIZE, GROUP = 500, 100, 60


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    content = yaml.safe_load((HERE / "conf" / "data" / "workload.yaml").read_text())
    schema = Schema.parse(content["schema"], "workload.yaml")
    rows = parse_text(schema, pl.from_arrow(pa.table(w.rows(count=ROWS))).cast(pl.String))
    encoders = Encoders.fit(schema, Statistics.of(schema, rows))
    return write_dataset(
        tmp_path_factory.mktemp("plain") / "data", schema, {"train": encoders.encode(rows)}, GROUP, 250, encoders
    )


def paths(dataset):
    return sorted((dataset.path / "train").glob("*.parquet"))


def identity(batch):
    return [tuple(row) for row in batch.dense_BD.tolist()]


def test_plain_loader_gives_each_row_once_an_epoch_over_two_ranks_but_for_what_fills_no_batch(dataset, monkeypatch):
    monkeypatch.setattr(plain_trainer, "WINDOW", 2)
    of_ranks = [list(plain_trainer.batches(paths(dataset), 20, 3, rank, 2)) for rank in range(2)]
    seen = [row for batches in of_ranks for batch in batches for row in identity(batch)]
    table = pa.concat_tables([pa.parquet.read_table(path, columns=list(w.DENSES)) for path in paths(dataset)])
    everything = set(zip(*(table[name].to_pylist() for name in w.DENSES), strict=True))
    assert len(seen) == len(set(seen)) > ROWS - 2 * 20
    assert set(seen) <= everything
    other = [identity(batch) for batch in plain_trainer.batches(paths(dataset), 20, 4)]
    assert other[0] != identity(of_ranks[0][0])


def copied(plain, encoders, ranker):
    """Gives the plain model's weights to a ranker of taskfuse."""
    dense, weights = plain.dense, {}
    experts = len(dense.second_EHK)
    for column, (name, first) in enumerate(zip(w.CATS, plain.tables.first_F.tolist(), strict=True)):
        rows = encoders.num_embeddings(name)
        assert rows <= w.TABLE_ROWS[column] + plain_model.UNSEEN
        weights[f"embeddings.embedding_bags.{name}.weight"] = plain.tables.table.weight[first : first + rows]
    weights |= {
        "fusion.experts.0.layers.0.weight_SDH": dense.first.weight.t().view(w.IN_DIM, experts, -1).transpose(0, 1),
        "fusion.experts.0.layers.0.bias_SH": dense.first.bias.view(experts, -1),
        "fusion.experts.0.layers.1.weight_SDH": dense.second_EHK,
        "fusion.experts.0.layers.1.bias_SH": dense.second_E1K.squeeze(1),
        "fusion.gate.0.weight_SDH": dense.gate.weight.view(w.TASKS, experts, -1).transpose(1, 2),
        "towers.hidden.layers.0.weight_SDH": dense.tower_TKH,
        "towers.hidden.layers.0.bias_SH": dense.tower_T1H.squeeze(1),
        "towers.out.weight_SDH": dense.head_TH1,
        "towers.out.bias_SH": dense.head_T11.squeeze(1),
    }
    ranker.load_state_dict({name: value.detach() for name, value in weights.items()})


def test_plain_trainer_and_taskfuse_compute_the_same_loss_and_gradient_from_the_same_files(dataset):
    torch.manual_seed(1)
    plain = plain_model.PlainRanker("mmoe", bf16=False)
    config = ModelConfig(**yaml.safe_load((HERE / "conf" / "model" / "bench_mmoe.yaml").read_text()))
    ranker = Ranker(dataset.schema, dataset.encoders, config, device="cpu")
    copied(plain, dataset.encoders, ranker)
    ours = next(Loader(dataset, "train", ROWS).batches(Loader(dataset, "train", ROWS).start()))
    loss = TaskLoss([1.0] * w.TASKS)
    observed_weight_BT = ours.weight_BT * ours.observed_BT
    loss_BT, _ = ranker.row_losses(ranker.outputs(ours), ours.label_BT, ours.observed_BT)
    our_loss = loss(loss_BT, observed_weight_BT, observed_weight_BT.sum(0))
    theirs = next(plain_trainer.batches(paths(dataset), ROWS, 0))  # the same rows in another order
    their_loss = plain(*theirs)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=0)
    our_loss.backward()
    their_loss.backward()
    ours_SDH, theirs_EHK = ranker.fusion.experts[0].layers[1].weight_SDH.grad, plain.dense.second_EHK.grad
    torch.testing.assert_close(ours_SDH, theirs_EHK, rtol=1e-3, atol=1e-7)
    last, first = w.CATS[-1], int(plain.tables.first_F[-1])
    ours_RW = ranker.embeddings.embedding_bags[last].weight.grad
    theirs_RW = plain.tables.table.weight.grad.to_dense()[first : first + len(ours_RW)]
    torch.testing.assert_close(ours_RW, theirs_RW, rtol=1e-3, atol=1e-8)


def test_plain_ple_hides_the_experts_of_other_tasks():
    torch.manual_seed(2)
    dense, x_BD = plain_model.Dense("ple"), torch.randn(3, w.IN_DIM)
    before_BT = dense(x_BD)
    with torch.no_grad():
        dense.second_EHK[: w.PLE_OWN] += 1  # those of the first task
    moved_T = (dense(x_BD) != before_BT).any(0).tolist()
    assert moved_T == [True] + [False] * (w.TASKS - 1)


def test_plain_training_in_steps_lowers_the_loss(dataset):
    torch.manual_seed(3)
    plain = plain_model.PlainRanker("mmoe", bf16=True)
    first = next(plain_trainer.batches(paths(dataset), ROWS, 0))
    before = plain(*first).item()
    trained = plain_trainer.steps(
        plain, plain, plain_trainer.ahead(lambda e: plain_trainer.batches(paths(dataset), SIZE, e))
    )
    for _ in range(12):
        next(trained)
    assert plain(*first).item() < before - 0.05


def test_bytes_of_tables_are_those_that_a_loop_over_ids_touches():
    rng = np.random.default_rng(5)
    id_BF, width, moved = rng.integers(0, 7, (20, 3)), 5, 0
    for column in range(3):
        for _ in set(id_BF[:, column].tolist()):
            moved += 4 * width  # forward reads the row
            moved += 2 * 4 * width  # backward reads it and writes it
            moved += 2 * 4  # and its momentum
    assert table_bytes(id_BF, width) == moved


@pytest.mark.parametrize("model", ["mmoe", "ple"])
def test_flops_are_those_of_every_layer_counted_one_by_one(model):
    rows, total = 11, 0

    def layer(inner, outer):
        forward = rows * outer * inner * 2  # y[r, o] += x[r, i] * w[i, o]
        return forward + rows * inner * outer * 2 + inner * outer * rows * 2  # dx and dw

    own, shared = (0, w.MMOE_EXPERTS) if model == "mmoe" else (w.PLE_OWN, w.PLE_SHARED)
    for _ in range(w.TASKS * own + shared):
        total += layer(w.IN_DIM, w.EXPERT_DIMS[0]) + layer(*w.EXPERT_DIMS)
    for _ in range(w.TASKS):
        total += layer(w.IN_DIM, own + shared)  # the gate
        total += layer(w.EXPERT_DIMS[1], w.TOWER_DIM) + layer(w.TOWER_DIM, 1)
    assert flops(products(model, rows)) == total


def test_a_stopwatch_books_each_second_in_one_part():
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    watch.enter(DENSE)
    now[0] = 2.0
    with watch.within(RANKS):
        now[0] = 5.0
    now[0] = 6.0
    watch.leave()
    now[0] = 10.0
    watch.move(DENSE, RANKS, 0.5)
    assert watch.read() == dict.fromkeys(PARTS, 0.0) | {DENSE: 2.5, RANKS: 3.5, REST: 4.0}


def test_ratios_are_medians_of_ratios_within_rounds():
    speeds = [dict.fromkeys(CONTENDERS, machine) for machine in (100.0, 10.0, 1.0)]
    taskfuse = CONTENDERS[0]
    for speed, factor in zip(speeds, (2, 3, 9), strict=True):
        speed[taskfuse] *= factor
    parts = {"bytes": 1e6, "tables_s": 0.001, "flops": 1e9, "products_s": 0.1}
    rounds = [{each: parts | {"rows_per_s": value} for each, value in speed.items()} for speed in speeds]
    line = next(line for line in table("mmoe", rounds).splitlines() if line.startswith(str(taskfuse)))
    assert line.removeprefix(str(taskfuse)).split()[:4] == ["30", "3.00", "3.00", "300%"]
    assert str(RECHUB_RUN) in table("mmoe", rounds)


def test_a_leak_is_found_by_step_whatever_a_step_takes_and_whatever_start_and_end_hold():
    reached = [(100.0, 1), (110.0, 1_000), (130.0, 2_000), (200.0, 20_000)]  # slow ones, then quick ones
    ends = [Look(90.0, 7, 0), Look(99.0, 9_999_999, 0), Look(201.0, 1, 0)]
    training = []
    for (begin, first), (end, last) in itertools.pairwise(reached):
        for part in range(10):
            step = first + (last - first) * part / 10
            training.append(Look(begin + (end - begin) * part / 10, 5_000_000 + round(24 * step), 0))
    found = by_step(ends[:2] + training + ends[2:], reached, [1_000, 2_000, 20_000])
    assert found["bytes_per_step"] == pytest.approx(24, abs=0.01)
    assert found["resident"]["2000"] == 5_000_000 + 24 * 2_000
    assert found["looks"] == 20
