"""Every table optimiser: its update against a float64 loop, its state's bytes against the tensors, where it is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from pydantic import ValidationError
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel

from features.errors import UserError
from pipeline.training.config import Settings
from pipeline.training.optim.settings import TableOptimizer
from pipeline.training.optim.table_optimizers import TABLE_OPTIMIZERS
from pipeline.training.optim.tables import ReplicatedTables
from pipeline.training.parallel import plan, shard
from pipeline.training.parallel.topology import Cluster

pytestmark = pytest.mark.usefixtures("device")

ON_CPU = [name for name, optimizer in TABLE_OPTIMIZERS.items() if optimizer.cpu]
ON_GPU = [name for name in TABLE_OPTIMIZERS if name not in ON_CPU]
ROWS, DIM, LR, EPS = 7, 4, 0.1, 1e-3


def rowwise_adagrad(weight: list[float], momentum: list[float], gradient: list[float]) -> None:
    momentum[0] += sum(g * g for g in gradient) / len(gradient)
    for i, g in enumerate(gradient):
        weight[i] -= LR * g / (momentum[0] ** 0.5 + EPS)


def adagrad(weight: list[float], momentum: list[float], gradient: list[float]) -> None:
    for i, g in enumerate(gradient):
        momentum[i] += g * g
        weight[i] -= LR * g / (momentum[i] ** 0.5 + EPS)


def sgd(weight: list[float], momentum: list[float], gradient: list[float]) -> None:
    for i, g in enumerate(gradient):
        weight[i] -= LR * g


# One row's update in double precision, and how many numbers of state it has for a row.
WRITTEN: dict[str, tuple[Callable[..., None], int]] = {
    "rowwise_adagrad": (rowwise_adagrad, 1),
    "adagrad": (adagrad, DIM),
    "sgd": (sgd, 0),
}
# Numbers of state for each row, from the papers: Adam has two means an element, the partial form one of them a row.
NUMBERS = {name: count for name, (_, count) in WRITTEN.items()} | {"adam": 2 * DIM, "partial_rowwise_adam": DIM + 1}


class Model(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.configs = [EmbeddingBagConfig(ROWS, DIM, name="t", feature_names=["f"])]
        self.embeddings = EmbeddingBagCollection(self.configs, device=torch.device(device))

    def forward(self, sparse: KeyedJaggedTensor) -> Tensor:
        return self.embeddings(sparse).values()


def settings(name: str) -> Settings:
    return Settings(batch_size=3, tables={"name": name, "lr": LR, "eps": EPS})


def sharded(name: str) -> DistributedModelParallel:
    model, wanted = Model("meta"), settings(name)
    sharders = shard.sharders(wanted)
    placed, _ = plan.place(model, sharders, model.configs, wanted, Cluster(1, 1, "cpu", 0, 10**9))
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=placed, sharders=sharders)


def state_of(model: DistributedModelParallel) -> list[Tensor]:
    [states] = model.fused_optimizer.state_dict()["state"].values()
    return [value.local_shards()[0].tensor for value in states.values()]


def test_all_registered_ones_are_tested() -> None:
    assert set(WRITTEN) == set(ON_CPU)
    assert set(NUMBERS) == set(TABLE_OPTIMIZERS)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_fused_update_and_that_of_a_replicated_table_are_the_written_one(name: str) -> None:
    """Three steps; row 2 is looked up twice in the first, row 6 never."""
    row_update, numbers = WRITTEN[name]
    fused, generator = sharded(name), torch.Generator().manual_seed(3)
    weight = fused.state_dict()["embeddings.embedding_bags.t.weight"].local_shards()[0].tensor
    weight.copy_(torch.randn(ROWS, DIM, generator=generator))
    copy = nn.Parameter(weight.clone())
    replicated = ReplicatedTables({"e.t.weight": copy}, TableOptimizer(name=name, lr=LR, eps=EPS))
    rows = weight.double().tolist()
    momenta = [[0.0] * max(numbers, 1) for _ in range(ROWS)]
    for ids in ([2, 0, 2], [5, 1, 3], [2, 4, 5]):
        slope_BD = torch.randn(3, DIM, generator=generator)
        out_BD = fused(KeyedJaggedTensor(["f"], torch.tensor(ids), lengths=torch.ones(3, dtype=torch.int64)))
        (out_BD * slope_BD).sum().backward()
        copy.grad = torch.zeros(ROWS, DIM).index_add_(0, torch.tensor(ids), slope_BD)
        replicated.step()
        for row in set(ids):
            of_row = [slope for id, slope in zip(ids, slope_BD.double().tolist(), strict=True) if id == row]
            row_update(rows[row], momenta[row], [sum(parts) for parts in zip(*of_row, strict=True)])
    for found in (weight, copy.detach()):
        torch.testing.assert_close(found.double(), torch.tensor(rows, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    for found in (state_of(fused), list(replicated.state[copy].values())):
        assert len(found) == (1 if numbers else 0)
        for momentum in found:
            wanted = torch.tensor(momenta, dtype=torch.float64)
            torch.testing.assert_close(momentum.double().view(ROWS, -1), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_state_has_the_shapes_and_bytes_that_are_estimated(name: str) -> None:
    optimizer, found = TABLE_OPTIMIZERS[name], state_of(sharded(name))
    assert [tuple(tensor.shape) for tensor in found] == optimizer.state_shapes(ROWS, DIM)
    assert sum(tensor.nbytes for tensor in found) == optimizer.state_bytes(ROWS, DIM)


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_state_bytes_are_those_of_the_formula(name: str) -> None:
    optimizer = TABLE_OPTIMIZERS[name]
    assert optimizer.state_bytes(ROWS, DIM) == 4 * ROWS * NUMBERS[name]
    assert optimizer.row_bytes(ROWS) + optimizer.element_bytes(ROWS, DIM) == optimizer.state_bytes(ROWS, DIM)


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_fbgemm_keeps_the_state_that_is_registered(name: str) -> None:
    """Of a kernel on the meta device, which has the buffers of a GPU's without one."""
    optimizer = TABLE_OPTIMIZERS[name]
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        optimizer=optimizer.kernel,
        device=torch.device("meta"),
    )
    found = [getattr(kernel, f"momentum{number}_dev", torch.empty(0)).numel() for number in (1, 2)]
    wanted = [torch.Size(shape).numel() for shape in optimizer.state_shapes(ROWS, DIM)]
    assert [count for count in found if count > 1] == wanted  # 1: a placeholder
    assert optimizer.counts_steps == ("iter" in kernel.state_dict())


@pytest.mark.parametrize("name", ON_GPU)
def test_what_has_no_cpu_kernel_is_refused_there_and_planned_for_a_gpu(name: str) -> None:
    with pytest.raises(UserError, match=rf"train\.tables\.name={name}: FBGEMM has no CPU kernel") as error:
        sharded(name)
    assert "\n" not in str(error.value)
    with pytest.raises(AssertionError, match="not supported in CPU mode"):  # FBGEMM's own word
        SplitTableBatchedEmbeddingBagsCodegen(
            [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=TABLE_OPTIMIZERS[name].kernel
        )
    model, wanted = Model("meta"), settings(name)
    cluster = Cluster(1, 1, "cuda", 10**10, 10**9)
    _, found = plan.place(model, shard.sharders(wanted), model.configs, wanted, cluster)
    assert found.tables[0].size.state == 4 * ROWS * NUMBERS[name]


@pytest.mark.parametrize(
    ("name", "memory"), [("rowwise_adagrad", "hbm"), ("adam", "ddr"), ("partial_rowwise_adam", "both")]
)
def test_beside_a_cache_the_state_per_row_is_on_the_gpu(name: str, memory: str) -> None:
    def bytes_of(optimizer: str) -> tuple[int, int]:
        model = Model("meta")
        changes = {"kernels": {"default": ["fused_uvm_caching"]}, "checkpoint_async": False}
        wanted = settings(optimizer).model_copy(update=changes)
        cluster = Cluster(1, 1, "cuda", 10**10, 10**9)
        [rank] = plan.place(model, shard.sharders(wanted), model.configs, wanted, cluster)[1].ranks
        return rank.hbm, rank.ddr

    without = bytes_of("sgd")
    more = [found - base for found, base in zip(bytes_of(name), without, strict=True)]
    per_row, per_element = 4 * ROWS, 4 * ROWS * DIM
    assert more == {"hbm": [per_row, 0], "ddr": [0, 2 * per_element], "both": [per_row, per_element]}[memory]


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
@pytest.mark.parametrize("placement", ["column_wise", "data_parallel"])
def test_a_placement_that_would_change_the_result_is_refused_with_others_to_use(name: str, placement: str) -> None:
    optimizer = TABLE_OPTIMIZERS[name]
    allowed = optimizer.splits_columns if placement == "column_wise" else optimizer.change is not None
    model, wanted = Model("meta"), settings(name).model_copy(update={"sharding": {"default": [placement]}})
    pair = Cluster(2, 2, "cuda", 10**10, 10**9)
    made = lambda: plan.place(model, shard.sharders(wanted), model.configs, wanted, pair)  # noqa: E731
    if allowed:
        assert made()[1].tables[0].placement == placement
        return
    with pytest.raises(UserError, match=r"the result would depend on the plan.*train\.tables\.name=") as error:
        made()
    assert name not in str(error.value).split("train.tables.name=")[1]


def test_a_name_that_is_not_registered_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValidationError, match=f"shampoo is not one of {', '.join(TABLE_OPTIMIZERS)}"):
        TableOptimizer(name="shampoo")


def test_the_comment_of_the_setting_names_all() -> None:
    text = (Path(__file__).parents[2] / "jobs" / "conf" / "train.yaml").read_text()
    [line] = [line for line in text.splitlines() if "name: rowwise_adagrad" in line]
    assert all(name in line for name in TABLE_OPTIMIZERS)
