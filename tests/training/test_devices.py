"""A step and a scoring of every model on the device it is given: on meta, where a tensor made on the CPU by mistake shows.

A tensor without `device=` works here and fails on a GPU only. The meta device stands in for it: shapes alone are computed, and
an operation whose tensors are on two devices is an error, as on a GPU.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import yaml
from tiny_search import SPACE
from tiny_training import SCHEMA, make_dataset
from torch import Tensor
from torch.fx.experimental import _config as assumptions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from two_ranks_sequences import BAGS

from features.batch import Batch
from models.automtl.architecture import Architecture
from models.emm import build_ranker
from models.fusion.automtl import Supernet
from models.ranker import ModelConfig, is_table
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.search.learner import SearchLearner
from pipeline.training.config import Settings
from pipeline.training.faults.nonfinite import NonfiniteCheck
from pipeline.training.logging.progressive import ProgressiveMetrics
from pipeline.training.optim import weighting
from pipeline.training.optim.weighting.base import AdaptiveLoss, shared_parameters
from pipeline.training.state_names import in_ranker
from pipeline.training.step import TrainStep

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings(
        "ignore:fbgemm..jagged_to_padded_dense"
    ),  # FBGEMM's meta kernel alone lacks a derivative
]
META = torch.device("meta")
CONF = Path(__file__).parents[2] / "jobs" / "conf" / "model"
# Copies from one device to another, and indices, which a GPU takes from the CPU.
MIXED = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, save on scalars; meta kernels themselves let some of them pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor) and x.dim()]
        if len({x.device for x in found}) > 1 and func.overloadpacket.__name__ not in MIXED:
            raise RuntimeError(f"{func}: tensors on {[str(x.device) for x in found]}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def accelerator(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two ranks whose default group takes tensors of the device alone, as NCCL does; no autocast, which meta has not."""

    def all_reduce(tensor: Tensor, *_: Any, async_op: bool = False) -> Any:
        assert tensor.device == META
        return SimpleNamespace(wait=lambda: None) if async_op else None

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with OneDevice(), assumptions.patch(meta_nonzero_assume_all_nonzero=True):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Dataset, Batch]]:
    """Datasets, each with a batch on the device."""
    path = tmp_path_factory.mktemp("devices")
    quantile = {**SCHEMA["tasks"], "dwell": SCHEMA["tasks"]["dwell"] | {"loss": "quantile"}}
    changes: dict[str, dict[str, Any]] = {"plain": {}, "sequences": {"bag": BAGS}, "quantile": {"tasks": quantile}}
    found = {}
    for name, changed in changes.items():
        dataset = Dataset(make_dataset(path / name, rows=120, **changed))
        loader = Loader(dataset, "train", 16, 1, 5, window=24)
        batch = next(loader.batches(loader.start()))
        batch.sparse.sync()  # how many ids a feature has is not known of ids on meta
        found[name] = dataset, batch.to(META)
    return found


def check_on_device(
    dataset: Dataset, batch: Batch, model: dict[str, Any], weights: dict[str, Any] | None = None, accumulate: int = 1
) -> None:
    """A training step, what is recorded of it, and a scoring, of a model on meta."""
    tasks = dataset.schema.tasks
    ranker = build_ranker(dataset.schema, dataset.encoders, ModelConfig.model_validate({"tower": [4]} | model))
    ranker.start_at(dataset.base_rates())
    loss = weighting.task_loss(Settings.model_validate({"weighting": weights or {"name": "fixed"}}).weighting, tasks, 0)
    step = TrainStep(ranker, loss, bf16=False, accumulate=accumulate).to(META).train()
    progress, nonfinite = ProgressiveMetrics(tasks, 2, META), NonfiniteCheck("stop")
    if isinstance(loss, AdaptiveLoss):
        dense = [(name, p) for name, p in step.named_parameters() if not is_table(in_ranker(name))]
        loss.attach(shared_parameters(ranker, dense), 16, 2)
        loss.before_step()
    total, output = step(batch)
    total.backward()
    if isinstance(loss, AdaptiveLoss):
        loss.after_backward(0)
        loss.after_update()
    progress.update(output)
    nonfinite.record_losses(1, output)
    assert {x.device for x in (total, *output, progress.day_T3, progress.rows)} == {META}
    assert any(parameter.grad is not None for parameter in step.parameters())
    with torch.no_grad():
        assert ranker.eval()(batch).device == META
        assert all(gate.device == META for gate in ranker.fusion.gates(ranker.inputs(batch)))


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("*.yaml") if p.stem not in ("automtl", "emm")))
def test_a_model_makes_its_tensors_on_its_device(name: str, data: dict[str, tuple[Dataset, Batch]]) -> None:
    model = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    check_on_device(*data["sequences" if name in ("dtrn", "mmoe") else "plain"], model)


MMOE: dict[str, Any] = {"fusion": {"name": "mmoe", "num_experts": 2, "levels": [[8]]}}
FOUND = Architecture(
    width=8, token_dim=4, interaction="attention_2", experts=[["conv_3", "mlp_4"], ["gating", "skip"]],
    tasks={"click": [1], "conversion": [1, 2], "dwell": [2]},
)  # fmt: skip
SUPERNET = {key: value for key, value in SPACE.items() if key != "chosen"}
OPTIONS: dict[str, tuple[str, dict[str, Any], int]] = {
    **{name: ("plain", {"interaction": {"name": name}}, 1) for name in ("dot", "attention")},
    "cross": ("plain", {"interaction": {"name": "cross", "layers": 2}}, 1),
    "calibration": ("quantile", {"calibration": "monotone", "dropout": 0.1, "input_dropout": 0.1}, 1),
    "micro-batches": ("plain", {}, 2),
    "dr": ("plain", {"given": {"name": "dr"}}, 1),
    "supernet": ("plain", {"fusion": {"name": "automtl_supernet", **SUPERNET}}, 1),
    "automtl": ("plain", {"fusion": {"name": "automtl", "architecture": FOUND.model_dump()}}, 1),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_a_model_makes_its_tensors_on_its_device(
    name: str, data: dict[str, tuple[Dataset, Batch]]
) -> None:
    which, changes, accumulate = OPTIONS[name]
    check_on_device(*data[which], MMOE | changes, accumulate=accumulate)


# The others solve a small problem in main memory, and are all of one base.
@pytest.mark.parametrize(
    "name", sorted(weighting.WEIGHTINGS.keys() - {"mgda", "cagrad", "nash_mtl", "fairgrad", "aligned"})
)
def test_a_weighting_makes_its_tensors_on_its_device(name: str, data: dict[str, tuple[Dataset, Batch]]) -> None:
    check_on_device(*data["plain"], MMOE, {"name": name})


def test_what_a_search_has_found_is_derived_in_main_memory() -> None:
    net = Supernet(4, 2, [[0, 1], [2, 3]], **SUPERNET).to(META)
    learner = SimpleNamespace(supernet=net, _sharpness=lambda _: 1.0)
    with pytest.raises(NotImplementedError, match="copy out of meta"):  # a budget's costs are there, too
        SearchLearner.strengths(cast(SearchLearner, learner), 1)


def test_a_tensor_on_the_cpu_would_be_found() -> None:
    x_BD, other_D = torch.empty(2, 3, device=META), torch.zeros(3)
    for mixed in (lambda: x_BD + other_D, lambda: x_BD @ other_D, lambda: torch.bmm(x_BD[None], torch.zeros(1, 3, 3))):
        with pytest.raises(RuntimeError, match=r"tensors on"):
            mixed()
