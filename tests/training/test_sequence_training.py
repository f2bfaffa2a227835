"""Training on sequences: against formulas, one rank against two, a checkpoint on other ranks, and the scorer."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tiny_training import (
    assert_close,
    assert_identical,
    dwell_variance,
    last,
    losses,
    make_dataset,
    model,
    tensors,
    torchrun,
    write_checkpoint,
)
from torch import Tensor
from two_ranks import stopped
from two_ranks_sequences import BAGS, FUSION, PLACEMENTS, STEPS, STOP, config, trainer

from features.batch import Batch, Rows
from features.errors import UserError
from models.ranker import Ranker, is_table
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.evaluation.scorer import Scorer
from pipeline.release.export.tables import occurring_rows, write_tables
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.serving.encoded import encoded
from pipeline.serving.manifest import Manifest, write_manifest
from pipeline.serving.manifest import Model as ServedModel
from pipeline.serving.tables import Tables

pytestmark = pytest.mark.usefixtures("device")

HERE = Path(__file__).parent
LR, EPS = 0.05, 1e-8  # of the tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sequences")
    make_dataset(path / "data", bag=BAGS)
    return path


@pytest.fixture(scope="module")
def one_rank(folder: Path, device: torch.device) -> Path:
    trainer(folder, "one").run_to_end()
    return folder / "one"


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    """The runs of two_ranks_sequences.py, all of one process group."""
    torchrun(str(HERE / "two_ranks_sequences.py"), str(folder)).check_returncode()
    return folder


class Double(Ranker):
    """Without sharding and in float64, though TorchRec looks up in float32."""

    def embedded(self, batch: Batch) -> Tensor:
        return super().embedded(batch).double()


def test_a_step_moves_tables_of_sequences_as_row_wise_adagrad_says(folder: Path) -> None:
    """From a batch whose loss is a sum of one-row losses, each over its task's weight."""
    write_checkpoint(trainer(folder, "start"))
    start, data, settings = model(last(folder / "start")), Dataset(folder / "data"), config(folder, "step", max_steps=1)
    trainer(folder, "step", max_steps=1).run_to_end()
    ranker = Double(data.schema, data.encoders, settings.model, device="cpu").double()
    ranker.load_state_dict({name: value.double() for name, value in start.items()})
    s = settings.train
    loader = Loader(data, "train", s.batch_size, s.lanes, s.seed, window=s.window)
    batch = next(loader.batches(loader.start()))
    logit_BT = ranker(Batch(**(vars(batch) | {"dense_BD": batch.dense_BD.double()})))
    observed_weight_BT = (batch.weight_BT * batch.observed_BT).double()
    total = torch.zeros((), dtype=torch.float64)
    for t, task in enumerate(data.schema.tasks.values()):
        z_B, label_B = logit_BT[:, t], batch.label_BT[:, t].double()
        one_B = (z_B - label_B) ** 2 / dwell_variance()
        if task.kind == "binary":
            one_B = torch.nn.functional.softplus(z_B) - label_B * z_B
        total = total + task.loss_weight * (observed_weight_BT[:, t] * one_B).sum() / observed_weight_BT[:, t].sum()
    total.backward()
    assert losses(folder / "step") == [pytest.approx(total.item(), rel=1e-5)]
    found = last(folder / "step")
    tables = [name for name, _ in ranker.named_parameters() if is_table(name)]
    assert sorted(name.split(".")[-2] for name in tables) == ["device", "item", "topics", "user", "words"]
    for name in tables:
        weight = ranker.get_parameter(name)
        momentum = weight.grad.square().mean(1, keepdim=True)
        wanted = weight.detach() - LR * weight.grad / (momentum.sqrt() + EPS)
        sure = ((weight.grad.abs() > 1e-7) | (weight.grad == 0)).all(1)  # rounding error in a small row has any size
        assert sure.double().mean() > 0.5, name
        torch.testing.assert_close(found[f"model.{name}"][sure].double(), wanted[sure], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fusion", [FUSION, {"name": "mmoe", "num_experts": 2, "levels": [[8]]}], ids=["dtrn", "mmoe"])
def test_the_pipelined_loop_and_micro_batches_train_the_same_on_one_rank(folder: Path, fusion: dict) -> None:
    name = fusion["name"]
    for run, settings in {"plain": {}, "pipelined": {"pipelined": True}, "micro-batches": {"accumulate": 3}}.items():
        trainer(folder, f"{run}-{name}", fusion=fusion, max_steps=STOP, **settings).run_to_end()
    assert_identical(last(folder / f"pipelined-{name}"), last(folder / f"plain-{name}"))
    assert_close(last(folder / f"micro-batches-{name}"), last(folder / f"plain-{name}"), rtol=5e-3, atol=5e-4)


def test_tables_of_sequences_can_be_in_16_bits(folder: Path) -> None:
    half = {"precision": "fp16", "rounding": "nearest", "lr": LR}
    for name, tables in {"half": half, "full": half | {"precision": "fp32"}}.items():
        trainer(folder, name, tables=tables, max_steps=5).run_to_end()
    found, wanted = model(last(folder / "half")), model(last(folder / "full"))
    for name in (n for n in found if is_table(n)):
        assert found[name].dtype == torch.float16
        torch.testing.assert_close(found[name].float(), wanted[name], rtol=5e-3, atol=1e-3)
    assert losses(folder / "half") == pytest.approx(losses(folder / "full"), rel=1e-3)


def test_copies_of_a_table_that_is_read_item_by_item_are_refused_where_the_kernel_would_pool(folder: Path) -> None:
    with pytest.raises(UserError, match="table item cannot be data_parallel on cpu, only") as caught:
        trainer(folder, "refused", sharding={"default": ["table_wise"], "item": ["data_parallel"]})
    assert "\n" not in str(caught.value)


@pytest.mark.system
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_ranks_train_what_one_rank_trains_on_sequences(two_ranks: Path, one_rank: Path, placement: str) -> None:
    assert len(losses(two_ranks / placement)) == STEPS
    assert losses(two_ranks / placement) == pytest.approx(losses(one_rank), rel=1e-3)
    assert_close(last(two_ranks / placement), last(one_rank), rtol=5e-3, atol=5e-4)


@pytest.mark.system
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_pipelined_loop_trains_the_same_on_two_ranks(two_ranks: Path, placement: str) -> None:
    plain = tensors(checkpoint.folder(two_ranks / placement / "checkpoints", STOP))
    assert_identical(last(two_ranks / f"pipelined-{placement}"), plain)


@pytest.mark.system
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_checkpoint_of_two_ranks_is_taken_over_by_one_with_all_its_numbers(two_ranks: Path, placement: str) -> None:
    name = f"fewer-{placement}"
    stopped(two_ranks, placement, name, STOP)
    path = checkpoint.folder(two_ranks / name / "checkpoints", STOP)
    before = tensors(path)
    momentum = before["tables.ranker.unpooled.embeddings.item.weight.item.momentum1"]
    assert (momentum > 0).sum() > 10
    alone = trainer(two_ranks, name)
    assert alone.state.step == STOP
    write_checkpoint(alone)
    assert_close(tensors(path), before, rtol=0, atol=0)
    alone.run_to_end()
    assert_close(last(two_ranks / name), last(two_ranks / placement), rtol=5e-3, atol=5e-4)


@pytest.mark.system
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_scorer_scores_a_checkpoint_as_the_sharded_model_does(two_ranks: Path, placement: str) -> None:
    found: dict[int, Tensor] = {}
    scorer = Scorer(Run(two_ranks / placement), Dataset(two_ranks / "data"), "valid", 64)
    scorer.metrics(STEPS, lambda batch, logit_BT: found.update(zip(batch.row_id_B.tolist(), logit_BT, strict=True)))
    for rank in range(2):
        row_id_B, logit_BT = torch.load(two_ranks / f"{placement}.logits.{rank}.pt", weights_only=True)
        assert len(row_id_B) > 20
        for row_id, logit_T in zip(row_id_B.tolist(), logit_BT, strict=True):
            if row_id >= 0:
                torch.testing.assert_close(found[row_id], logit_T, rtol=1e-5, atol=1e-5)
    assert scorer.evaluate(STEPS)["gates"]


@pytest.mark.system
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tables_of_a_package_are_those_of_the_ranks_that_wrote_the_checkpoint(
    two_ranks: Path, tmp_path: Path, placement: str
) -> None:
    data, run = Dataset(two_ranks / "data"), Run(two_ranks / placement)
    ranker = Ranker(data.schema, data.encoders, config(two_ranks, placement).model, device="cpu")
    tables, lookups, names = write_tables(run, STEPS, ranker, data.schema, "fp32", occurring_rows(data), tmp_path)
    manifest = Manifest(
        model=ServedModel(run="r", step=STEPS, checkpoint="c", fingerprint="f", encoders="e"), versions={}, tasks={},
        format="fp32", tables=tables, lookups=lookups, dense_width=data.schema.dense_width,
    )  # fmt: skip
    manifest = write_manifest(tmp_path, manifest, names)
    ranker.load_state_dict(model(last(run.path)))
    rows = pq.read_table(data.path / data.shards("train")[0].path)  # all of whose ids have a row
    with torch.no_grad():
        wanted_BE = ranker.embedded(Rows.decode(rows, data.schema).batch(data.schema, rows.num_rows))
    assert torch.equal(Tables.open(tmp_path, manifest).embed(encoded(rows, data.schema)), wanted_BE)
