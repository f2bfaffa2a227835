"""Tables in fp16: what is kept in which format, resuming, warm starts, scoring, bytes of a plan, and what is refused."""

from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from tiny_training import assert_identical, configuration, initial_state, last, losses
from torch import Tensor
from two_ranks import stopped

from features.errors import UserError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.evaluation.scorer import Scorer
from pipeline.run.run import Run
from pipeline.torch_compat import table_kernels
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.parallel import plan, shard
from pipeline.training.parallel.plan import Cluster
from pipeline.training.step import TrainStep
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")

HALF = {"name": "rowwise_adagrad", "lr": 0.05, "precision": "fp16", "rounding": "nearest"}
STEPS, STOP = 12, 6
ITEM = "embeddings.embedding_bags.item.weight"


def config(folder: Path, name: str, tables: dict, **settings: object) -> TrainConfig:
    quick = {"max_steps": STEPS, "checkpoint_every": STOP, "tables": tables}
    return configuration(folder / "data", folder / name, **(quick | settings))


def trained(folder: Path, name: str, tables: dict, **settings: object) -> Trainer:
    made = prepare(config(folder, name, tables, **settings), None, torch.device("cpu"))
    made.run_to_end()
    return made


@pytest.fixture(scope="module")
def half(folder: Path) -> Trainer:
    return trained(folder, "half", HALF)


def test_weights_are_kept_in_16_bits_and_everything_else_in_32(folder: Path, half: Trainer) -> None:
    state = last(folder / "half")
    tables = {name for name in state if name.startswith("model.embeddings.")}
    assert len(tables) == 4
    assert {state[name].dtype for name in tables} == {torch.float16}
    others = {v.dtype for n, v in state.items() if n not in tables and not n.startswith("progress.")}
    assert others == {torch.float32}
    loader = Loader(half.dataset, "valid", 20, 2)
    assert half.learner.ranker.embedded(next(loader.batches(loader.start()))).dtype == torch.float32
    for kernel in table_kernels(half.learner.model):
        assert kernel.weights_precision == SparseType.FP16
        assert not kernel.stochastic_rounding


def test_they_start_at_the_rounded_draws_of_fp32_and_learn_what_fp32_learns(folder: Path, half: Trainer) -> None:
    start = {p: initial_state(config(folder, "start", HALF | {"precision": p})) for p in ("fp32", "fp16")}
    for name, value in start["fp32"].items():
        assert torch.equal(start["fp16"][name], value.to(start["fp16"][name].dtype)), name
    trained(folder, "full", HALF | {"precision": "fp32"})
    found, wanted, before = (x[f"model.{ITEM}"] for x in (last(folder / "half"), last(folder / "full"), start["fp32"]))
    assert (wanted - before).abs().max() > 0.05
    torch.testing.assert_close(found.float(), wanted, rtol=2**-9, atol=2e-4)  # each of the updates is rounded
    assert losses(folder / "half") == pytest.approx(losses(folder / "full"), rel=1e-3)


def test_a_run_goes_on_bit_for_bit_and_in_its_own_format_only(folder: Path, half: Trainer) -> None:
    stopped(folder, "half", "half-resumed", STOP)
    with pytest.raises(UserError, match="has model and optimisers"):
        trained(folder, "half-resumed", HALF | {"precision": "fp32"})
    trained(folder, "half-resumed", HALF)
    assert_identical(last(folder / "half-resumed"), last(folder / "half"))


@pytest.mark.parametrize(("source", "precision"), [("half", "fp32"), ("full", "fp16")])
def test_a_run_can_start_from_the_weights_of_one_in_another_format(
    folder: Path, half: Trainer, source: str, precision: str
) -> None:
    if not (folder / source).exists():
        trained(folder, source, HALF | {"precision": "fp32"})
    begun = prepare(
        config(folder, f"from-{source}", HALF | {"precision": precision}, init_from=folder / source),
        None,
        torch.device("cpu"),
    )
    found = begun.learner.state()["model"][ITEM].local_shards()[0].tensor
    assert torch.equal(found, last(folder / source)[f"model.{ITEM}"].to(found.dtype))


def test_scoring_answers_as_the_trainer_does(folder: Path, half: Trainer) -> None:
    found: dict[int, Tensor] = {}
    scorer = Scorer(Run(folder / "half"), Dataset(folder / "data"), "valid", 7)
    scorer.metrics(STEPS, on_batch=lambda b, logit_BT: found.update(zip(b.row_id_B.tolist(), logit_BT, strict=True)))
    half.learner.model.eval()
    loader = Loader(half.dataset, "valid", 20, 2)
    with torch.no_grad():
        for batch in loader.batches(loader.start()):
            for row, logit_T in zip(batch.row_id_B.tolist(), half.learner.ranker(batch), strict=True):
                if row >= 0:
                    torch.testing.assert_close(found[row], logit_T, rtol=1e-5, atol=1e-6)
    assert found


def test_a_plan_counts_two_bytes_a_weight_and_gpus_round_stochastically(half: Trainer) -> None:
    sizes = {}
    for precision in ("fp32", "fp16"):
        wanted = Settings(batch_size=32, tables={"precision": precision}, sharding={"default": ["table_wise"]})
        ranker = shard.unplaced(half.dataset.schema, half.dataset.encoders, half.config.model, wanted)
        sharders, model = shard.sharders(wanted), TrainStep(ranker, half.learner.loss, bf16=False)
        _, found = plan.place(model, sharders, ranker.tables, wanted, Cluster(1, 1, "cuda", 10**10, 10**9))
        sizes[precision] = [(table.size.weights, table.size.state) for table in found.tables]
        assert sharders[0].fused_params.get("stochastic_rounding") == (True if precision == "fp16" else None)
    assert [(weights // 2, state) for weights, state in sizes["fp32"]] == sizes["fp16"]


@pytest.mark.parametrize(
    ("tables", "more", "message"),
    [
        (
            {"rounding": "stochastic"},
            {},
            r"train\.tables\.rounding=stochastic: FBGEMM's CPU kernels round to the nearest",
        ),
        ({"precision": "bf16"}, {}, r"train\.tables\.precision=bf16: .* fp32 and fp16 only"),
        ({}, {"sharding_group": 1}, r"train\.tables\.precision=fp16: sharding_group averages replicas"),
        ({}, {"sharding": {"default": ["data_parallel"]}}, r"train\.sharding\.default: gradients .* averaged in fp16"),
    ],
)
def test_what_would_lose_updates_or_has_no_kernel_is_refused_with_the_reason(
    folder: Path, tables: dict, more: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prepare(config(folder, "refused", HALF | tables, **more), None, torch.device("cpu"))
    assert "\n" not in str(caught.value)
