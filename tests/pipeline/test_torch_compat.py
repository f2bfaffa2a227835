"""The contract of private names of torch, TorchRec and FBGEMM: they exist, do what we rely on, and are used nowhere else."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.flop_counter import FlopCounterMode
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan

from models import torch_compat as models_compat
from pipeline import torch_compat

ROOT = Path(__file__).parents[2]
COMPAT = {"pipeline/torch_compat.py", "pipeline/serving/torch_compat.py", "models/torch_compat.py"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77))
    yield
    dist.destroy_process_group()


@pytest.fixture
def sharded() -> DistributedModelParallel:
    tables = [EmbeddingBagConfig(9, 4, name=name, feature_names=[name]) for name in "ab"]
    model = nn.Sequential(EmbeddingBagCollection(tables, device=torch.device("meta")))
    sharder = EmbeddingBagCollectionSharder(fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD})
    placed = {name: table_wise(rank=0, compute_kernel="fused") for name in "ab"}
    plan = construct_module_sharding_plan(model[0], placed, sharder, local_size=1, world_size=1, device_type="cpu")
    return DistributedModelParallel(model, device=CPU, plan=ShardingPlan({"0": plan}), sharders=[sharder])


def weight(sharded: DistributedModelParallel) -> torch_compat.ShardedTensor:
    return sharded.state_dict()["0.embedding_bags.a.weight"]


# Process groups


def test_a_timeout_that_is_set_is_that_of_the_group() -> None:
    made = dist.new_group(backend="gloo")
    for of in (dist.GroupMember.WORLD, made):
        torch_compat.set_timeout(of, timedelta(seconds=55))
        assert torch_compat.timeout_of(of, CPU) == timedelta(seconds=55)
    torch_compat.set_timeout(dist.GroupMember.WORLD, timedelta(seconds=77))
    assert torch_compat.timeout_of(made, CPU) == timedelta(seconds=55)


@pytest.mark.integration
def test_the_store_is_the_one_that_the_group_was_made_with(tmp_path: Path) -> None:
    script = tmp_path / "store.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from pipeline.torch_compat import default_store\n"
        "made = dist.TCPStore('127.0.0.1', 0, 1, is_master=True)\n"
        "dist.init_process_group('gloo', store=made, rank=0, world_size=1)\n"
        "found = default_store()\n"
        "found.set('key', 'value')\n"
        "assert found.get('key') == b'value'\n"
    )
    subprocess.run([sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, check=True, timeout=120)


def test_torchruns_agent_asks_what_becomes_of_its_ranks(tmp_path: Path) -> None:
    """And takes ranks that are judged healthy for such, until the rendezvous has nodes that wait."""
    seen: list[WorkerState] = []
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)

    class Waiting(StaticTCPRendezvous):
        waiting = 1  # once: ranks that are restarted each time they are asked for never live to fail

        def num_nodes_waiting(self) -> int:
            found = self.waiting if seen else 0
            self.waiting -= found
            return found

    def judge(result: RunResult) -> RunResult:
        if result.state is not WorkerState.HEALTHY:
            seen.append(result.state)
            return RunResult(WorkerState.HEALTHY) if len(seen) == 1 else result
        return result

    spec = WorkerSpec(
        role="", local_world_size=1, entrypoint=sys.executable, args=("-c", "raise SystemExit(3)"), max_restarts=0,
        rdzv_handler=Waiting("127.0.0.1", server.port, 0, 1, "id", 9), monitor_interval=0.02,
    )  # fmt: skip
    agent = torch_compat.JudgedAgent(judge, spec=spec, logs_specs=DefaultLogsSpecs(str(tmp_path)), start_method="spawn")
    result = agent.run()
    assert result is not None
    assert seen == [WorkerState.FAILED] * 2, "the second attempt, though no restart is allowed"
    assert [failure.exitcode for failure in result.failures.values()] == [3]


def test_a_clone_of_a_store_is_another_connection_to_it() -> None:
    made = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clone = torch_compat.clone_of(dist.PrefixStore("part", made))
    clone.set("key", "value")
    assert made.get("part/key") == b"value"


def test_the_place_of_a_shard_has_its_rank_and_device() -> None:
    place = torch_compat.rank_device(3, torch.device("cuda", 1))
    assert (place.rank(), place.device()) == (3, torch.device("cuda", 1))
    assert torch_compat.rank_device(0, CPU) == weight_place()


def weight_place() -> object:
    from torch.distributed._shard.sharding_spec import ShardMetadata

    return ShardMetadata([0], [1], "rank:0/cpu").placement


# Sharded tensors


def test_a_table_of_a_state_is_a_sharded_tensor_and_so_is_its_copy(sharded: DistributedModelParallel) -> None:
    value = weight(sharded)
    assert isinstance(value, torch_compat.ShardedTensor)
    [shard] = value.local_shards()
    assert isinstance(shard, torch_compat.Shard)
    copy = torch_compat.on_cpu(value, [shard.tensor + 1])
    assert copy.metadata() == value.metadata()
    assert copy.metadata() is not value.metadata()
    assert torch.equal(copy.local_shards()[0].tensor, shard.tensor + 1)
    assert copy.local_shards()[0].metadata.placement.device() == CPU


def test_all_state_of_the_fused_optimiser_is_sharded(sharded: DistributedModelParallel) -> None:
    states = sharded.fused_optimizer.state_dict()["state"]
    assert len(states) == 2
    assert all(isinstance(v, torch_compat.ShardedTensor) for state in states.values() for v in state.values())


def test_a_dtensor_keeps_its_layout_over_another_tensor() -> None:
    value = DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (1,)), [Replicate()])
    copy = torch_compat.with_local(value, torch.zeros(3))
    assert (copy.placements, copy.shape, copy.device_mesh) == (value.placements, value.shape, value.device_mesh)
    assert torch.equal(copy.to_local(), torch.zeros(3))
    meta = torch_compat.with_local(value, torch.empty(3, device="meta"))  # the mesh is on the CPU
    assert meta.to_local().device.type == "meta"


# Tables


def test_a_state_dict_has_what_a_module_gives_through_torchrecs_wrapper_too() -> None:
    class Own(torch_compat.OwnState):
        def own_state(self) -> dict[str, torch.Tensor]:
            return {"x": torch.ones(2)}

    plain = nn.ModuleDict({"own": Own(), "linear": nn.Linear(1, 1)})
    assert set(plain.state_dict()) == {"own.x", "linear.weight", "linear.bias"}
    wrapped = DistributedModelParallel(plain, device=CPU, init_data_parallel=False)
    assert set(wrapped.state_dict()) == set(plain.state_dict())


def test_the_kernels_of_all_tables_are_found(sharded: DistributedModelParallel) -> None:
    kernels = list(torch_compat.table_kernels(sharded))
    assert sum(len(kernel.embedding_specs) for kernel in kernels) == 2
    parts = [part for kernel in kernels for part in kernel.split_embedding_weights()]
    assert any(part.data_ptr() == weight(sharded).local_shards()[0].tensor.data_ptr() for part in parts)
    assert all(hasattr(kernel, name) for kernel in kernels for name in ("set_optimizer_step", "reset_cache_states"))


def test_what_a_kernel_fetched_ahead_is_forgotten(sharded: DistributedModelParallel) -> None:
    """Its forward takes the first of the places that it was left with: none, as in a new kernel."""
    for kernel in torch_compat.table_kernels(sharded):
        assert (kernel.timesteps_prefetched, kernel.lxu_cache_locations_list) == ([], [])
        kernel.timesteps_prefetched.append(1)
        kernel.lxu_cache_locations_list.append(torch.zeros(1))
        kernel.register_buffer("lxu_cache_locking_counter", torch.ones(2, 2, dtype=torch.int32), persistent=False)
        kernel.prefetch_stream = object()
        torch_compat.forget_prefetched(kernel)
        assert kernel.prefetch_stream is None
        assert (kernel.timesteps_prefetched, kernel.lxu_cache_locations_list) == ([], [])
        assert not kernel.lxu_cache_locking_counter.any()


def test_tables_whose_kernel_is_not_found_are_an_error(sharded: DistributedModelParallel) -> None:
    [module] = [module for module in sharded.modules() if hasattr(module, "_lookups")]
    module.renamed = module._lookups
    del module._lookups
    with pytest.raises(RuntimeError, match=r"no FBGEMM kernel found for its fused tables .*a\.weight"):
        list(torch_compat.table_kernels(sharded))


def test_a_codec_has_the_format_that_it_was_made_for() -> None:
    codecs = get_qcomm_codecs(QCommsConfig(CommType.FP16, CommType.BF16))
    found = [str(torch_compat.precision(codec)) for codec in (codecs.forward, codecs.backward)]
    assert found == ["fp16", "bf16"]


# Gradients and files


def test_norms_are_those_of_each_tensor() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[2.0]]), torch.tensor([float("nan")])]
    found = [float(norm) for norm in torch_compat.norms(tensors)]
    assert found[:2] == [5.0, 2.0]
    assert found[2] != found[2]
    assert list(torch_compat.norms([])) == []


# Models


def test_onednns_linear_is_the_product_and_its_operator_can_be_counted() -> None:
    x, weights, bias = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4)
    torch.testing.assert_close(models_compat.onednn_linear(x, weights, bias), x @ weights.T + bias)
    torch.testing.assert_close(models_compat.onednn_linear(x, weights, None), x @ weights.T)
    seen: list[tuple] = []
    count = {models_compat.onednn_kernel(): lambda *shapes, **_: seen.append(shapes) or 7}
    with FlopCounterMode(display=False, custom_mapping=count) as counter:
        models_compat.onednn_linear(x, weights, bias)
    assert counter.get_total_flops() == 7
    assert seen[0][:2] == (torch.Size((5, 3)), torch.Size((4, 3)))


# Nowhere else

PACKAGES = ("torch", "torchrec", "fbgemm_gpu")


def private_names(source: str) -> list[str]:
    """Private names of the packages that a module imports, reads off another object, overrides, or asks for by getattr."""
    tree, found = ast.parse(source), []
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if of_packages(alias.name) and private(alias.name)]
        elif isinstance(node, ast.ImportFrom) and of_packages(node.module or ""):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if private(name)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            python = isinstance(node.value, ast.Name) and node.value.id == "os"  # os._exit is documented
            found += [node.attr] if node.attr not in own and not python else []
        elif isinstance(node, ast.FunctionDef) and is_private(node.name):
            found += [node.name] if hasattr(nn.Module, node.name) or hasattr(KeyedJaggedTensor, node.name) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            found += [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and is_private(str(a.value))]
    return found


def of_packages(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private(dotted: str) -> bool:
    return any(is_private(part) for part in dotted.split("."))


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch.distributed._shard.sharded_tensor import Shard",
        "from torch.distributed.remote_device import _remote_device",
        "x = torch._foreach_norm(y)",
        "x = group._get_backend(d).options",
        "class A(nn.Module):\n    def _save_to_state_dict(self): ...",
        "x = getattr(module, '_lookups', ())",
    ],
)
def test_a_private_name_is_seen(line: str) -> None:
    assert private_names(line)


def test_no_other_file_uses_a_private_name() -> None:
    files = [path for room in ("features", "models", "pipeline", "jobs") for path in (ROOT / room).rglob("*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    used = {
        name: private_names(text)
        for name, text in texts.items()
        if name not in COMPAT and any(f"import {p}" in text or f"from {p}" in text for p in PACKAGES)
    }
    assert len(used) > 40
    assert {name: names for name, names in used.items() if names} == {}


def test_a_launcher_and_what_every_rank_reads_import_no_library_that_takes_seconds() -> None:
    script = """
import sys
import jobs.launch
from pipeline.training.parallel import launcher, process_group, rendezvous
heavy = {"torchrec", "fbgemm_gpu", "torch._dynamo", "sympy"} & sys.modules.keys()
from pipeline.evaluation.metrics import intervals
from pipeline.run.tracking import registry
print(heavy | {"scipy.stats", "tensorboard"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
